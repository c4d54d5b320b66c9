"""The MoE kernels under Triton's interpreter against their twins. fp16 throughout: the interpreter truncates to bf16."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvfp4_kernels import dispatch, quantize_weight
from nvfp4_kernels.formats import SfLayout, decode_packed, e4m3_decode
from nvfp4_kernels.reference import linear as reference_linear
from nvfp4_kernels.reference import moe as reference
from nvfp4_kernels.reference.quantize import permute_quantize
from nvfp4_kernels.triton import moe as kernels
from nvfp4_kernels.triton import moe_gemm, moe_operand
from nvfp4_kernels.triton.moe_combine import combine
from nvfp4_kernels.triton.moe_routing import route

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

MODES = ["none", "fp8_per_token", "nvfp4_per_token", "nvfp4_per_tensor"]


def layer(mode: str, experts: int, hidden: int, inner: int, act_fn: str = "silu", **more: Any) -> dict[str, Any]:
    rows = inner if act_fn in reference.UNGATED else 2 * inner
    w13 = quantize_weight(torch.randn(experts, rows, hidden) / hidden**0.5).prepared(mode)
    w2 = quantize_weight(torch.randn(experts, hidden, inner) / inner**0.5).prepared(mode)
    arguments: dict[str, Any] = {
        "w13_data": w13.data,
        "w13_scales": w13.scales,
        "w13_row_scale": w13.row_scale(),
        "w13_fp8_fold": w13.fp8_fold,
        "w2_data": w2.data,
        "w2_scales": w2.scales,
        "w2_row_scale": w2.row_scale(),
        "w2_fp8_fold": w2.fp8_fold,
        "activation": mode,
        "act_fn": act_fn,
    }
    if mode == "nvfp4_per_tensor":
        arguments["w13_input_scale"] = torch.rand(experts).add(1) * (4.0 / (448 * 6))
        arguments["w2_input_scale"] = torch.full((1,), 2.0 / (448 * 6))
    return arguments | more


def check(arguments: dict[str, Any], m: int, top_k: int, ids: torch.Tensor | None = None, **more: Any) -> None:
    experts, hidden, _ = arguments["w2_data"].shape
    x = torch.randn(m, hidden).half()
    if ids is None:
        ids = torch.rand(m, experts).topk(top_k, -1).indices.to(torch.int32)
    arguments = arguments | {"topk_weights": torch.rand(ids.shape), "topk_ids": ids} | more
    got = kernels.fused_moe(x, **arguments)
    want = reference.fused_moe(x, **arguments)
    assert got.dtype == want.dtype
    # The order of the sums differs: a last bit of h may, too, and with it a code of its quantization.
    error = (got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)
    assert error < (5e-4 if arguments["activation"] == "none" else 5e-3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("experts", "hidden", "inner"), [(4, 112, 48), (3, 128, 256)])
@pytest.mark.parametrize("on_input", [False, True])
def test_layer_equals_the_twin(mode, experts, hidden, inner, on_input):
    check(layer(mode, experts, hidden, inner), 9, 2, apply_router_weight_on_input=on_input)


@pytest.mark.parametrize("act_fn", reference.ACT_FNS)
def test_activation_functions_and_biases(act_fn):
    arguments = layer("none", 4, 64, 48, act_fn)
    rows = arguments["w13_data"].shape[1]
    check(arguments | {"w13_bias": torch.randn(4, rows) * 3, "w2_bias": torch.randn(4, 64).half()}, 12, 2)


@pytest.mark.parametrize("mode", ["none", "fp8_per_token"])
def test_row_scales_and_expert_map(mode):
    arguments = layer(mode, 4, 64, 32)
    arguments["w13_row_scale"] = arguments["w13_row_scale"] * torch.rand(4, 64).add(0.5)
    expert_map = torch.tensor([-1, 2, -1, 0, 1, 3, -1], dtype=torch.int32)
    check(arguments, 20, 3, ids=torch.rand(20, 7).topk(3, -1).indices, expert_map=expert_map)


def test_tiles_are_for_a_ranks_share_of_the_slots(monkeypatch):
    """256 slots over the 64 experts of all ranks are 4 an expert, also where a rank has four of the experts."""
    rows = []

    def seen(topk_ids, experts, block_m, expert_map=None):
        rows.append(block_m)
        return route(topk_ids, experts, block_m, expert_map)

    monkeypatch.setattr(kernels, "route", seen)
    arguments, ids = layer("none", 4, 64, 32), torch.rand(64, 64).topk(4, -1).indices
    expert_map = torch.where(torch.arange(64) < 4, torch.arange(64), -1).int()
    check(arguments, 64, 4, ids=ids, expert_map=expert_map)
    local = torch.where(ids < 4, ids, -1)
    check(arguments, 64, 4, ids=local, num_experts=64)
    check(arguments, 64, 4, ids=local)
    assert rows == [16, 16, 128]


@pytest.mark.parametrize("mode", MODES)
def test_absent_experts_and_one_expert_for_all(mode):
    arguments = layer(mode, 5, 64, 32)
    ids = torch.randint(-1, 5, (18, 3), dtype=torch.int32)
    weights = torch.where(ids < 0, torch.nan, torch.rand(18, 3))
    check(arguments, 18, 3, ids=ids, topk_weights=weights)
    check(arguments, 18, 3, ids=torch.full((18, 3), 4, dtype=torch.int32))


def test_chunks_of_tokens_equal_the_whole(monkeypatch):
    arguments = layer("none", 4, 64, 32)
    monkeypatch.setattr(kernels, "_CHUNK_SLOTS", 10)
    check(arguments, 23, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wide_dtype_is_refused(dtype):
    arguments = layer("none", 2, 64, 32)
    with pytest.raises(TypeError, match=r"x: got torch\.float"):
        kernels.fused_moe(
            torch.zeros(1, 64, dtype=dtype), topk_weights=torch.ones(1, 1), topk_ids=torch.zeros(1, 1).int(), **arguments
        )


def test_no_tokens():
    arguments = layer("none", 2, 64, 32)
    x = torch.zeros(0, 64).half()
    out = kernels.fused_moe(x, topk_weights=torch.ones(0, 2), topk_ids=torch.zeros(0, 2).int(), **arguments)
    assert out.shape == (0, 64)


def test_the_mode_of_auto_is_e4m3_where_the_hopper_kernels_serve(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(kernels, "arch_of", lambda device: 90)
    assert kernels.faster_mode(gpu, 2048, 768) == "fp8_per_token"
    assert kernels.faster_mode(gpu, 2880, 2880) == "fp8_per_token"
    assert kernels.faster_mode(gpu, 2880, 2896) == "none"  # the Hopper kernels do not take it
    monkeypatch.setattr(kernels, "arch_of", lambda device: 89)
    assert kernels.faster_mode(gpu, 2048, 768) == "none"


def test_auto_is_w4a4_on_blackwell_where_fp4_tensor_cores_serve(monkeypatch):
    monkeypatch.setattr(dispatch, "arch_of", lambda device: 100)
    gpu = torch.device("cuda", 0)
    assert dispatch.resolve_activation("auto", gpu, 16, 4096, 4096) == "nvfp4_per_token"
    assert dispatch.resolve_moe_activation("auto", gpu, 2048, 768) == "none"
    monkeypatch.setattr(kernels, "arch_of", lambda device: 100)
    assert kernels.describe("auto", gpu)[1].startswith("auto is 'none' here; weights decoded in registers, 16-bit operands")


# ---------------------------------------------------------------------------------------------------------------------
# The steps


def awkward_rows(m: int, k: int) -> torch.Tensor:
    """Rows of very different sizes, one of zeros, one with a single value."""
    x = torch.randn(m, k) * torch.logspace(-3, 2, m)[:, None]
    x[0] = 0
    x[1, 1:] = 0
    return x.half()


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 20), st.integers(1, 6), st.sampled_from([16, 112, 256]), st.integers(0, 2**32))
def test_permuted_nvfp4_operand_has_the_quantizers_bits(tokens, top_k, k, seed):
    torch.manual_seed(seed)
    x = awkward_rows(tokens, k)
    routing = route(torch.randint(-1, 5, (tokens, top_k)), 5, 16)
    got, scale = moe_operand.operand(x, "nvfp4_per_token", routing=routing, permute=True, block_m=16)
    rows = len(routing.permuted_idx_to_token)
    c = torch.tensor([reference_linear.INVERSE_BASE])
    codes, sf, want_scale = permute_quantize(x, routing.expanded_idx_to_permuted_idx, rows, c, layout=SfLayout.layout_linear)
    want = (decode_packed(codes).unflatten(-1, (-1, 16)) * e4m3_decode(sf).unsqueeze(-1)).flatten(-2)
    named = routing.permuted_idx_to_token >= 0
    assert torch.equal(got[named].float(), want[named])
    assert torch.equal(scale[named], want_scale[named])


@pytest.mark.parametrize("fp8_tensor_cores", [True, False])
def test_fp8_operand_has_the_twins_bits(fp8_tensor_cores, monkeypatch):
    monkeypatch.setattr(moe_operand, "has_fp8_tensor_cores", lambda arch: fp8_tensor_cores)
    x = awkward_rows(11, 176)
    got, scale = moe_operand.operand(x, "fp8_per_token")
    want, want_scale = reference_linear.quantize_fp8_per_token(x)
    assert got.dtype == (torch.float8_e4m3fn if fp8_tensor_cores else torch.float16)
    assert torch.equal(got.float(), want.float())
    assert torch.equal(scale, want_scale)


def test_fp8_without_fp8_tensor_cores(monkeypatch):
    monkeypatch.setattr(moe_operand, "has_fp8_tensor_cores", lambda arch: False)
    check(layer("fp8_per_token", 4, 112, 48), 9, 2)


@pytest.mark.parametrize("mode", ["none", "nvfp4_per_token", "fp8_per_token"])
def test_reordered_operand(mode):
    """Position p of a chunk of 128 holds the value that hopper.py's decoded weights have there."""
    x = awkward_rows(6, 400)
    natural, _ = moe_operand.operand(x, mode)
    reordered, _ = moe_operand.operand(x, mode, reorder=True)
    natural = torch.nn.functional.pad(natural.float(), (0, 512 - 400))  # whole stages
    chunks = natural.view(6, 4, 4, 4, 2, 4)  # t, word, half, code
    order = (0, 1, 3, 4, 2, 5) if mode == "fp8_per_token" else (0, 1, 3, 5, 2, 4)
    assert torch.equal(reordered.float().view(6, -1), chunks.permute(order).reshape(6, -1))


def test_rows_longer_than_a_program_holds(monkeypatch):
    monkeypatch.setattr(moe_operand, "_MAX_BLOCK", 64)
    x = awkward_rows(5, 176)
    got, scale = moe_operand.operand(x, "fp8_per_token")
    want, want_scale = reference_linear.quantize_fp8_per_token(x)
    assert torch.equal(got.float(), want.float())
    assert torch.equal(scale, want_scale)


def test_padding_rows_are_neither_read_nor_written():
    routing = route(torch.tensor([[0], [2], [0]]), 3, 16)
    h = torch.full((len(routing.permuted_idx_to_token), 64), torch.nan).half()
    named = routing.permuted_idx_to_token >= 0
    h[named] = torch.randn(int(named.sum()), 64).half()
    got, _ = moe_operand.operand(h, "nvfp4_per_token", routing=routing)
    assert got[named].isfinite().all()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 16), st.sampled_from([16, 100]), st.booleans(), st.integers(0, 2**32))
def test_combine_has_the_twins_bits(tokens, top_k, hidden, weighted, seed):
    torch.manual_seed(seed)
    routing = route(torch.randint(-1, 6, (tokens, top_k)), 6, 16)
    y = torch.full((len(routing.permuted_idx_to_token), hidden), torch.nan).half()
    named = routing.permuted_idx_to_token >= 0
    y[named] = torch.randn(int(named.sum()), hidden).half()
    index = routing.expanded_idx_to_permuted_idx
    weights = torch.where(index < 0, torch.nan, torch.rand(tokens, top_k))
    got = combine(y, routing, weights if weighted else None, torch.full((tokens, hidden), torch.nan).half())
    want = torch.zeros(tokens, hidden)
    for slot in range(top_k):
        term = y[index[:, slot].clamp(min=0)].float()
        if weighted:
            term = term * weights[:, slot, None]
        want += torch.where((index[:, slot] >= 0)[:, None], term, 0.0)
    assert torch.equal(got, want.half())


def test_grouped_gemm_leaves_experts_apart():
    """NaN weights of an expert that no slot names reach nothing, nor do NaN scales beyond K."""
    arguments = layer("none", 3, 80, 32)
    arguments["w13_row_scale"] = arguments["w13_row_scale"].clone()
    arguments["w13_row_scale"][1] = torch.nan
    ids = torch.tensor([[0, 2], [2, 0], [0, 2]])
    weights = moe_gemm.ExpertWeights(
        *(arguments[f"w13_{name}"] for name in ("data", "scales", "row_scale", "fp8_fold")), None, None
    )
    routing = route(ids, 3, 16)
    out = moe_gemm.grouped_gemm(torch.randn(3, 80).half(), None, weights, routing, dtype=torch.float16, block_m=16, gather=True)
    assert out[routing.expanded_idx_to_permuted_idx.flatten().long()].isfinite().all()


def test_large_tiles_refuse_a_k_of_one_stage():
    from nvfp4_kernels.triton import moe_gemm_hopper
    from nvfp4_kernels.triton.moe_gemm import ExpertWeights

    weights = ExpertWeights(torch.zeros(1, 16, 128, dtype=torch.uint8), *[None] * 5)
    with pytest.raises(ValueError, match="block_m: got 256 for K = 256, allowed from K = 512 on"):
        moe_gemm_hopper.grouped_gemm(torch.zeros(256, 256), None, weights, None, dtype=torch.bfloat16, block_m=256)
