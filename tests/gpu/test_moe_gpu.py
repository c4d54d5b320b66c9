"""The GPU's mixture-of-experts layer against its torch twin on the same device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nvfp4_kernels import quantize_weight
from nvfp4_kernels.reference import moe as reference
from nvfp4_kernels.reference import moe_routing as reference_routing

pytestmark = pytest.mark.gpu

MODES = ["none", "fp8_per_token", "nvfp4_per_token", "nvfp4_per_tensor"]
# Both round at the same places, but sum in another order (FP8 tensor cores with fewer bits, too): a flipped last bit of h
# moves a code of its quantization. The products themselves have a bound of their own below.
# The few flipped codes of one token or two do not average out: over 60 runs the error of one spread up to 0.034.
FEW_TOKENS = 5e-2
BOUND = {"none": 4e-3, "fp8_per_token": 2e-2, "nvfp4_per_token": 2e-2, "nvfp4_per_tensor": 2e-2}
HOPPER = (512, 256)  # hidden and intermediate sizes that the Hopper kernel takes
SPLIT = (2048, 1024)  # such that blocks share a tile where tokens are few
ROUNDS = (4096, 3072)  # such that few tokens make more tiles than thread blocks run at once, and some of them are shared
RAGGED = (608, 352)  # such that rows of scales need room between them for bulk copies, and K ends within a stage
ODD = (208, 80)  # and such that only the portable one takes


def layer(
    mode: str,
    experts: int,
    sizes: tuple[int, int],
    act_fn: str = "silu",
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = False,
    per_row: bool = False,
) -> dict[str, Any]:
    """Random weights of a layer, as keyword arguments of `fused_moe`."""
    hidden, inner = sizes
    rows = inner if act_fn in reference.UNGATED else 2 * inner
    w13 = quantize_weight(torch.randn(experts, rows, hidden, device="cuda") / hidden**0.5, scale_search="absmax").prepared(mode)
    w2 = quantize_weight(torch.randn(experts, hidden, inner, device="cuda") / inner**0.5, scale_search="absmax").prepared(mode)
    row13 = w13.row_scale()
    if per_row:
        row13 = row13 * torch.rand(experts, rows, device="cuda").add(0.5)
    arguments: dict[str, Any] = {
        "w13_data": w13.data,
        "w13_scales": w13.scales,
        "w13_row_scale": row13,
        "w13_fp8_fold": w13.fp8_fold,
        "w2_data": w2.data,
        "w2_scales": w2.scales,
        "w2_row_scale": w2.row_scale(),
        "w2_fp8_fold": w2.fp8_fold,
        "activation": mode,
        "act_fn": act_fn,
    }
    if mode == "nvfp4_per_tensor":
        arguments["w13_input_scale"] = torch.full((1,), 4.5 / (448 * 6), device="cuda")
        arguments["w2_input_scale"] = torch.rand(experts, device="cuda").add(2) / (448 * 6)
    if bias:
        arguments["w13_bias"] = torch.randn(experts, rows, device="cuda").to(dtype)
        arguments["w2_bias"] = torch.randn(experts, hidden, device="cuda")
    return arguments


def tokens(
    m: int, top_k: int, experts: int, hidden: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(m, hidden, device="cuda").to(dtype)
    ids = torch.rand(m, experts, device="cuda").topk(top_k, dim=-1).indices.to(torch.int32)
    return x, torch.rand(m, top_k, device="cuda"), ids


def poison() -> None:
    """Leave NaN in the memory that the allocator will hand out next."""
    blocks = [torch.full((size,), torch.nan, device="cuda") for size in (1 << 10, 1 << 14, 1 << 18, 1 << 20, 1 << 22) * 8]
    del blocks


def check(x, weights, ids, arguments, bound=None, **more) -> torch.Tensor:
    from nvfp4_kernels.triton.moe import fused_moe

    poison()
    got = fused_moe(x, topk_weights=weights, topk_ids=ids, **arguments, **more)
    want = reference.fused_moe(x, topk_weights=weights, topk_ids=ids, **arguments, **more)
    assert got.dtype == x.dtype
    assert got.shape == want.shape
    error = ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)).item()
    mode = arguments["activation"]
    assert error < (bound or (FEW_TOKENS if len(x) <= 2 and mode != "none" else BOUND[mode])), error
    return got


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("sizes", "m", "block_m", "gather"),
    [
        (ODD, 5, 16, False),
        (ODD, 250, 128, False),
        *(((2048, 768), m, b, False) for m, b in ((5, 8), (9, 16), (40, 32), (90, 64), (250, 128), (700, 256))),
        *((RAGGED, m, b, False) for m, b in ((5, 8), (40, 32), (90, 64), (250, 128), (700, 256))),
        *(((7168, 256), m, b, False) for m, b in ((90, 64), (250, 128))),
        *(((256, 512), m, b, False) for m, b in ((90, 64), (250, 128))),
        *((sizes, 700, 256, False) for sizes in ((512, 512), (1024, 512))),
        *((sizes, m, b, True) for sizes in ((2048, 768), RAGGED, (7168, 256)) for m, b in ((90, 64), (250, 128))),
    ],
)
def test_products_err_by_the_output_rounding_alone(mode, sizes, m, block_m, gather):
    """GEMM 1 without its activation function over the operands that both implementations agree on, against float64."""
    from nvfp4_kernels.reference.linear import activation_operand, weight_operand
    from nvfp4_kernels.triton import moe, moe_gemm, moe_gemm_hopper
    from nvfp4_kernels.triton.moe_operand import operand
    from nvfp4_kernels.triton.moe_routing import route

    experts = 4
    arguments = layer(mode, experts, sizes)
    x, _, ids = tokens(m, 2, experts, sizes[0])
    names = ("data", "scales", "row_scale", "fp8_fold", "input_scale", "bias")
    weights = moe._expert_weights(mode, *(arguments.get(f"w13_{name}") for name in names))
    hopper = moe_gemm_hopper.serves(x.device, (weights,), "silu")
    routing = route(ids, experts, block_m)
    a, scale = operand(
        x,
        mode,
        input_scale=weights.input_scale,
        routing=None if gather else routing,
        permute=not gather,
        block_m=block_m,
        reorder=hopper,
    )
    if hopper:
        got = moe_gemm_hopper.grouped_gemm(a, scale, weights, routing, dtype=x.dtype, block_m=block_m, gather=gather)
    else:
        got = moe_gemm.grouped_gemm(a, scale, weights, routing, dtype=x.dtype, block_m=block_m, gather=False)
    # On the CPU: torch's CUDA division by a number multiplies by its reciprocal.
    input_scale = None if weights.input_scale is None else weights.input_scale.cpu()
    values, token_scale = activation_operand(x.cpu(), mode, input_scale)
    values = values.cuda().double() * (1.0 if token_scale is None else token_scale.cuda().double().reshape(-1, 1))
    for expert in range(experts):
        fold = None if weights.fp8_fold is None else weights.fp8_fold[expert]
        matrix = weight_operand(weights.data[expert], weights.scales[expert], fold).double()
        token, slot = (ids == expert).nonzero(as_tuple=True)
        want = values[token] @ matrix.t() * weights.row_scale[expert].double()
        rows = routing.expanded_idx_to_permuted_idx[token, slot].long()
        error = (got[rows].double() - want).abs()
        # Half a unit of bf16, and what the accumulators lose. Under FP8 each step of 32 values cuts the sum so far to 14 bits;
        # a sum of random signs stays within six of its standard deviations, of a million sums here.
        spread = (values[token].square() @ matrix.square().t()).sqrt() * weights.row_scale[expert].double()
        slack = sizes[0] / 32 * 2**-14 if mode == "fp8_per_token" else 2**-18
        assert (error <= want.abs() * 2**-8 * 1.01 + 6 * spread * slack).all(), (error / spread).max().item()
        assert error.norm() <= 5e-3 * want.norm()


@pytest.mark.parametrize("k", [96, 256, 768, 1408, 2048, 2880, 4096, 7168, 14336])
@pytest.mark.parametrize("permute", [False, True])
def test_hopper_fp8_operand_has_the_twins_bits(k, permute):
    from nvfp4_kernels.reference.linear import quantize_fp8_per_token
    from nvfp4_kernels.triton.moe_operand import operand
    from nvfp4_kernels.triton.moe_routing import route

    m, top_k = 37, 3
    x = torch.randn(m * top_k + 300, k, device="cuda") * torch.logspace(-4, 4, m * top_k + 300, device="cuda")[:, None]
    x[0] = 0
    x[1, 1:] = 0
    x[2] *= 2.0**-110
    x[3] *= 2.0**110
    x = x.bfloat16()
    ids = torch.randint(-1, 6, (m, top_k), device="cuda")
    routing = route(ids, 6, 16)
    if permute:
        x = x[:m]
        x[5, 3] = torch.nan
    else:
        x = x[: len(routing.permuted_idx_to_token)]
        x[routing.permuted_idx_to_token < 0] = torch.nan
    poison()
    got, scale = operand(x, "fp8_per_token", routing=routing, permute=permute, block_m=16, reorder=True)
    rows = routing.expanded_idx_to_permuted_idx.flatten().long()
    named = (rows >= 0).nonzero().squeeze(-1)
    source = x[named // top_k] if permute else x[rows[named]]
    want, want_scale = quantize_fp8_per_token(source.cpu())  # torch's CUDA division is another
    dirty = source.cpu().isnan().any(-1)
    width = -(-k // 256) * 256
    want = torch.nn.functional.pad(want.float(), (0, width - k))
    want = want.view(len(named), -1, 4, 4, 2, 4).permute(0, 1, 3, 4, 2, 5).reshape(len(named), width)
    got, scale = got[rows[named]].float().cpu(), scale[rows[named]].cpu()
    assert torch.equal(got[~dirty], want[~dirty])
    assert torch.equal(scale[~dirty], want_scale[~dirty])
    assert (got[dirty] * scale[dirty, None]).isnan().all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sizes", [HOPPER, ODD, SPLIT, RAGGED])
@pytest.mark.parametrize("m", [1, 33, 300, 1500])
def test_layer(mode, sizes, m):
    arguments = layer(mode, 8, sizes)
    check(*tokens(m, 2, 8, sizes[0]), arguments)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sizes", [HOPPER, RAGGED, (2048, 384)])
@pytest.mark.parametrize(("m", "top_k", "experts"), [(70, 8, 16), (300, 4, 8), (300, 16, 32)])
def test_layer_that_gathers_its_rows(mode, sizes, m, top_k, experts):
    from nvfp4_kernels.triton import moe, moe_gemm_hopper

    assert moe_gemm_hopper.gathers(moe._block_m(m * top_k, experts, *sizes, True, mode == "fp8_per_token"), top_k, 2 * sizes[1])
    arguments = layer(mode, experts, sizes)
    x, weights, ids = tokens(m, top_k, experts, sizes[0])
    whole = check(x, weights, ids, arguments)
    # What padding reads, token 0, stays where it belongs.
    x[0] = torch.nan
    dirty = moe.fused_moe(x, topk_weights=weights, topk_ids=ids, **arguments)
    assert dirty[0].isnan().all()
    assert torch.equal(dirty[1:], whole[1:])


@pytest.mark.parametrize("mode", ["none", "fp8_per_token"])
@pytest.mark.parametrize("m", [2, 16, 40])
def test_layer_whose_last_tiles_are_shared(mode, m):
    check(*tokens(m, 2, 8, ROUNDS[0]), layer(mode, 8, ROUNDS))


@pytest.mark.parametrize("mode", ["none", "fp8_per_token"])
@pytest.mark.parametrize(
    ("block_m", "sizes"), [(8, SPLIT), (64, SPLIT), (256, SPLIT), (8, RAGGED), (16, RAGGED), (128, RAGGED), (256, RAGGED)]
)
def test_layer_in_tiles_of_any_size(mode, block_m, sizes, monkeypatch):
    from nvfp4_kernels.triton import moe

    monkeypatch.setattr(moe, "_block_m", lambda *sizes: block_m)
    check(*tokens(700, 2, 5, sizes[0]), layer(mode, 5, sizes, per_row=True))


@pytest.mark.parametrize("mode", ["none", "fp8_per_token"])
@pytest.mark.parametrize("sizes", [HOPPER, RAGGED])
@pytest.mark.parametrize("act_fn", reference.ACT_FNS)
def test_activation_functions(mode, sizes, act_fn):
    check(*tokens(40, 4, 8, sizes[0], torch.float16), layer(mode, 8, sizes, act_fn, torch.float16, bias=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sizes", [HOPPER, ODD])
@pytest.mark.parametrize("on_input", [False, True])
def test_biases_row_scales_and_router_weights(mode, sizes, on_input):
    arguments = layer(mode, 6, sizes, bias=True, per_row=True)
    check(*tokens(70, 3, 6, sizes[0]), arguments, apply_router_weight_on_input=on_input)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sizes", [HOPPER, ODD])
def test_adversarial_routings(mode, sizes):
    experts = 16
    arguments = layer(mode, experts, sizes)
    x, weights, ids = tokens(129, 4, experts, sizes[0])
    one = torch.full_like(ids, 11)  # every slot of every token on one expert
    check(x, weights, one, arguments)
    holes = torch.where(torch.rand(ids.shape, device="cuda") < 0.5, ids, -1)
    weights = torch.where(holes < 0, torch.nan, weights)  # what no expert serves is not read
    check(x, weights, holes.to(torch.int64), arguments)
    none = check(x, weights, torch.full_like(ids, -1), arguments)
    assert not none.any()


@pytest.mark.parametrize("mode", ["none", "fp8_per_token"])
def test_shards_of_experts_sum_to_the_whole(mode):
    experts, sizes = 12, HOPPER
    arguments = layer(mode, experts, sizes)
    x, weights, ids = tokens(50, 3, experts, sizes[0])
    whole = check(x, weights, ids, arguments)
    total = torch.zeros_like(whole, dtype=torch.float32)
    for part in range(3):
        expert_map = torch.full((experts,), -1, dtype=torch.int32, device="cuda")
        mine = torch.arange(part, experts, 3, device="cuda")
        expert_map[mine] = torch.arange(len(mine), dtype=torch.int32, device="cuda")
        local = {
            key: value[mine].contiguous() if isinstance(value, torch.Tensor) and len(value) == experts else value
            for key, value in arguments.items()
        }
        total += check(x, weights, ids, local, expert_map=expert_map).float()
    assert ((total - whole.float()).norm() / whole.float().norm()).item() < 1e-2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("sizes", "m", "top_k"),
    [(HOPPER, 3, 2), (HOPPER, 260, 2), (HOPPER, 260, 4), (SPLIT, 1, 2), (SPLIT, 40, 2), (ROUNDS, 12, 2), (RAGGED, 40, 2)],
)
def test_runs_are_equal_bit_for_bit(mode, sizes, m, top_k):
    from nvfp4_kernels.triton.moe import fused_moe

    arguments = layer(mode, 8, sizes)
    x, weights, ids = tokens(m, top_k, 8, sizes[0])
    first = fused_moe(x, topk_weights=weights, topk_ids=ids, **arguments)
    for _ in range(4):
        poison()
        assert torch.equal(fused_moe(x, topk_weights=weights, topk_ids=ids, **arguments), first)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("sizes", "m", "top_k"), [(HOPPER, 2, 2), (HOPPER, 700, 2), (HOPPER, 500, 4), (SPLIT, 2, 2), (ROUNDS, 12, 2)]
)
def test_graph_replay_follows_the_routing(mode, sizes, m, top_k):
    from nvfp4_kernels.triton.moe import fused_moe

    arguments = layer(mode, 8, sizes)
    x, weights, ids = tokens(m, top_k, 8, sizes[0])

    def call() -> torch.Tensor:
        return fused_moe(x, topk_weights=weights, topk_ids=ids, **arguments)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for change in range(3):
        x_new, weights_new, ids_new = tokens(m, top_k, 8, sizes[0])
        if change == 2:
            ids_new = torch.where(torch.rand(ids.shape, device="cuda") < 0.3, -1, 5).to(torch.int32)
        x.copy_(x_new), weights.copy_(weights_new), ids.copy_(ids_new)
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, call())


def test_a_nan_token_stays_alone():
    arguments = layer("fp8_per_token", 4, HOPPER)
    x, weights, ids = tokens(64, 2, 4, HOPPER[0])
    from nvfp4_kernels.triton.moe import fused_moe

    clean = fused_moe(x, topk_weights=weights, topk_ids=ids, **arguments)
    x[7] = torch.nan
    dirty = fused_moe(x, topk_weights=weights, topk_ids=ids, **arguments)
    assert dirty[7].isnan().all()
    others = torch.arange(64, device="cuda") != 7
    assert torch.equal(dirty[others], clean[others])


def test_no_tokens_and_strided_tokens():
    arguments = layer("none", 4, HOPPER)
    x, weights, ids = tokens(48, 2, 4, HOPPER[0])
    from nvfp4_kernels.triton.moe import fused_moe

    assert fused_moe(x[:0], topk_weights=weights[:0], topk_ids=ids[:0], **arguments).shape == (0, HOPPER[0])
    check(x[::3], weights[::3], ids[::3], arguments)


@pytest.mark.parametrize(("m", "top_k", "experts"), [(1, 1, 1), (1, 16, 512), (130, 8, 256), (5000, 8, 128), (65536, 4, 60)])
@pytest.mark.parametrize("block_m", [16, 128])
def test_routing_equals_its_twin(m, top_k, experts, block_m):
    from nvfp4_kernels.triton.moe_routing import route

    ids = torch.randint(-1, 2 * experts, (m, top_k), device="cuda", dtype=torch.int32)
    expert_map = torch.full((2 * experts,), -1, device="cuda", dtype=torch.int32)
    expert_map[torch.randperm(2 * experts, device="cuda")[:experts]] = torch.arange(experts, device="cuda", dtype=torch.int32)
    for mapping in (None, expert_map):
        poison()
        for got, want in zip(
            route(ids, experts, block_m, mapping), reference_routing.route(ids, experts, block_m, mapping), strict=True
        ):
            assert torch.equal(got, want)
