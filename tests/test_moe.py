"""nvfp4_fused_moe on the CPU against a float64 model written apart from it: one slot at a time, from the definitions."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from nvfp4_kernels import (
    Nvfp4Weight,
    SfLayout,
    nvfp4_dequantize,
    nvfp4_fused_moe,
    nvfp4_quantize,
    quantize_weight,
)

MODES = ["none", "fp8_per_token", "nvfp4_per_token", "nvfp4_per_tensor"]
GATED = ["silu", "gelu", "gelu_tanh", "relu2", "swigluoai", "swigluoai_uninterleave"]
UNGATED = ["silu_no_mul", "gelu_no_mul", "gelu_tanh_no_mul", "relu2_no_mul"]


def operand(row: torch.Tensor, mode: str, scale: float | None) -> torch.Tensor:
    """What a row [K] stands for in `mode`, in float64."""
    if mode == "none":
        return row.double()
    if mode == "fp8_per_token":
        s = row.float().abs().max() / 448
        if s == 0:
            return row.double() * 0
        return (row.float() / s).to(torch.float8_e4m3fn).double() * s.double()
    if mode == "nvfp4_per_token":
        q, sf, scales = nvfp4_quantize(row[None], 1 / (448 * 6), SfLayout.layout_linear, per_token_activation=True)
        return nvfp4_dequantize(q, sf, 1.0, SfLayout.layout_linear, dtype=torch.float64)[0] * scales.double()
    assert scale is not None
    encode = (1 / torch.tensor(scale, dtype=torch.float32)).reshape(1)
    q, sf = nvfp4_quantize(row[None], encode, SfLayout.layout_linear)
    return nvfp4_dequantize(q, sf, 1.0, SfLayout.layout_linear, dtype=torch.float64)[0] * scale


def matrix(weight: Nvfp4Weight, expert: int, mode: str) -> torch.Tensor:
    """One expert's weight in float64; in the FP8 mode rounded to e4m3 under the row's power of two."""
    one = Nvfp4Weight(weight.data[expert], weight.scales[expert], torch.ones(()))
    values = one.dequantize(torch.float64)
    if mode == "fp8_per_token":
        largest = weight.scales[expert].double().amax(-1)
        fold = torch.exp2(torch.ceil(torch.log2(6 * largest / 448)))[:, None]
        values = (values / fold).float().to(torch.float8_e4m3fn).double() * fold
    return values * weight.row_scale()[expert].double().reshape(-1, 1)


def act(h: torch.Tensor, name: str) -> torch.Tensor:
    """The activation function of a row in float64, by scalar formulas."""

    def sigmoid(v: float) -> float:
        return 1 / (1 + math.exp(-v))

    scalar = {
        "silu": lambda v: v * sigmoid(v),
        "gelu": lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2))),
        "gelu_tanh": lambda v: 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
        "relu2": lambda v: max(v, 0.0) ** 2,
    }
    values = h.double().tolist()
    if name.endswith("_no_mul"):
        return torch.tensor([scalar[name.removesuffix("_no_mul")](v) for v in values], dtype=torch.float64)
    half = len(values) // 2
    gate, up = (values[0::2], values[1::2]) if name == "swigluoai" else (values[:half], values[half:])
    pairs = zip(gate, up, strict=True)
    if name.startswith("swigluoai"):
        # gpt-oss: the gate is clamped from above, up on both sides, and 1 is added to it.
        clamped = ((min(g, 7.0), max(-7.0, min(u, 7.0))) for g, u in pairs)
        return torch.tensor([(u + 1) * g * sigmoid(1.702 * g) for g, u in clamped], dtype=torch.float64)
    return torch.tensor([scalar[name](g) * u for g, u in pairs], dtype=torch.float64)


def model(
    x: torch.Tensor,
    w13: Nvfp4Weight,
    w2: Nvfp4Weight,
    weights: torch.Tensor,
    ids: torch.Tensor,
    mode: str = "none",
    act_fn: str = "silu",
    input_scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    on_input: bool = False,
) -> torch.Tensor:
    """The layer in float64, rounding to x's dtype where the layer does."""
    result = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(x.shape[0]):
        for slot in range(ids.shape[1]):
            expert = int(ids[token, slot])
            if expert >= 0 and expert_map is not None:
                expert = int(expert_map[expert])
            if expert < 0:
                continue
            row = x[token]
            if on_input:
                row = (row.float() * weights[token, slot]).to(x.dtype)
            a13, a2 = (None, None) if input_scales is None else (float(s[expert] if s.numel() > 1 else s) for s in input_scales)
            h = matrix(w13, expert, mode) @ operand(row, mode, a13)
            if w13_bias is not None:
                h = h + w13_bias[expert].double()
            h = act(h.to(x.dtype), act_fn).to(x.dtype)
            y = matrix(w2, expert, mode) @ operand(h, mode, a2)
            if w2_bias is not None:
                y = y + w2_bias[expert].double()
            y = y.to(x.dtype).double()
            result[token] += y if on_input else y * weights[token, slot].double()
    return result


def layer(experts: int, hidden: int, inner: int, act_fn: str = "silu") -> tuple[Nvfp4Weight, Nvfp4Weight]:
    rows = inner if act_fn.endswith("_no_mul") else 2 * inner
    return (
        quantize_weight(torch.randn(experts, rows, hidden) / hidden**0.5),
        quantize_weight(torch.randn(experts, hidden, inner) / inner**0.5),
    )


def routing(m: int, top_k: int, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(topk_weights, topk_ids) with distinct experts for each token."""
    return torch.rand(m, top_k), torch.rand(m, experts).topk(top_k, dim=-1).indices.to(torch.int32)


def assert_close(got: torch.Tensor, want: torch.Tensor, mode: str = "none") -> None:
    """By the norm: the order of an fp32 sum can flip the last bit of h, and that a code of its quantization."""
    assert got.isfinite().all()
    error = (got.double() - want).norm() / want.norm().clamp(min=1e-30)
    unit = max(torch.finfo(got.dtype).eps / 2, 5e-7)  # fp32 sums err by a few units
    assert error < 2 * unit + (0.0 if mode == "none" else 4e-3), error.item()


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [(mode, dtype) for mode in MODES for dtype in (torch.bfloat16, torch.float16)]
    + [("none", torch.float32), ("fp8_per_token", torch.float32)],  # the public NVFP4 quantizer takes no fp32
)
@pytest.mark.parametrize("on_input", [False, True])
def test_every_mode_against_float64(mode, dtype, on_input):
    w13, w2 = layer(4, 64, 48)
    x = torch.randn(7, 64).to(dtype)
    weights, ids = routing(7, 2, 4)
    scales = (torch.rand(4).add(1) * (3 / (448 * 6)), torch.tensor([2 / (448 * 6)])) if mode == "nvfp4_per_tensor" else None
    got = nvfp4_fused_moe(
        x,
        w13.prepared(mode),
        w2.prepared(mode),
        weights,
        ids,
        activation=mode,
        input_scales=scales,
        apply_router_weight_on_input=on_input,
    )
    assert got.dtype == dtype
    assert_close(got, model(x, w13, w2, weights, ids, mode, input_scales=scales, on_input=on_input), mode)


@pytest.mark.parametrize("act_fn", GATED + UNGATED)
@pytest.mark.parametrize("biased", [False, True])
def test_every_activation_function(act_fn, biased):
    w13, w2 = layer(3, 48, 32, act_fn)
    x = torch.randn(5, 48).mul(4).bfloat16()  # large enough to reach the clamps
    weights, ids = routing(5, 2, 3)
    more: dict[str, Any] = {}
    if biased:
        more = {"w13_bias": torch.randn(3, w13.shape[1]).mul(3), "w2_bias": torch.randn(3, 48).bfloat16()}
    got = nvfp4_fused_moe(x, w13, w2, weights, ids, act_fn=act_fn, **more)
    assert_close(got, model(x, w13, w2, weights, ids, act_fn=act_fn, **more))


def test_gate_and_up_change_places_as_named():
    """swigluoai reads gate and up in turns, swigluoai_uninterleave below each other: the same layer under a row permutation."""
    w13, w2 = layer(2, 32, 16)
    turns = torch.stack((torch.arange(16), torch.arange(16, 32)), dim=1).flatten()
    interleaved = replace(w13, data=w13.data[:, turns], scales=w13.scales[:, turns])
    x, (weights, ids) = torch.randn(4, 32).bfloat16(), routing(4, 1, 2)
    apart = nvfp4_fused_moe(x, w13, w2, weights, ids, act_fn="swigluoai_uninterleave")
    assert torch.equal(nvfp4_fused_moe(x, interleaved, w2, weights, ids, act_fn="swigluoai"), apart)


@pytest.mark.parametrize("top_k", [1, 2, 5, 16])
def test_top_k(top_k):
    w13, w2 = layer(16, 32, 16)
    x, (weights, ids) = torch.randn(6, 32).bfloat16(), routing(6, top_k, 16)
    got = nvfp4_fused_moe(x, w13, w2, weights, ids)
    assert_close(got, model(x, w13, w2, weights, ids))
    assert torch.equal(nvfp4_fused_moe(x, w13, w2, weights, ids.long()), got)


@pytest.mark.parametrize("mode", MODES)
def test_shards_of_experts_sum_to_the_whole(mode):
    experts, ranks = 6, 3
    w13, w2 = layer(experts, 64, 32)
    x, (weights, ids) = torch.randn(9, 64), routing(9, 3, experts)
    scales = (torch.rand(experts).add(1) / 1000, torch.rand(experts).add(1) / 1000) if mode == "nvfp4_per_tensor" else None

    def run(a: Nvfp4Weight, b: Nvfp4Weight, s: Any, **more: Any) -> torch.Tensor:
        return nvfp4_fused_moe(x, a, b, weights, ids, activation=mode, input_scales=s, **more)

    whole = run(w13, w2, scales)
    total = torch.zeros_like(whole)
    for rank in range(ranks):
        mine = torch.arange(rank, experts, ranks)
        expert_map = torch.full((experts,), -1, dtype=torch.int32)
        expert_map[mine] = torch.arange(len(mine), dtype=torch.int32)
        a, b = (Nvfp4Weight(w.data[mine], w.scales[mine], w.global_scale[mine]) for w in (w13, w2))
        total += run(a, b, None if scales is None else (scales[0][mine], scales[1][mine]), expert_map=expert_map)
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-5)


def test_shards_of_the_intermediate_size_sum_to_the_whole():
    """Tensor parallelism: each rank has a part of gate, the same part of up, and those columns of w2."""
    w13, w2 = layer(3, 64, 64)
    x, (weights, ids) = torch.randn(5, 64), routing(5, 2, 3)
    whole = nvfp4_fused_moe(x, w13, w2, weights, ids)
    total = torch.zeros_like(whole)
    for rank in range(2):
        rows = torch.cat([torch.arange(32) + 32 * rank, torch.arange(32) + 64 + 32 * rank])
        a = Nvfp4Weight(w13.data[:, rows], w13.scales[:, rows], w13.global_scale)
        b = Nvfp4Weight(
            w2.data[..., 16 * rank : 16 * rank + 16].contiguous(),
            w2.scales[..., 2 * rank : 2 * rank + 2].contiguous(),
            w2.global_scale,
        )
        total += nvfp4_fused_moe(x, a, b, weights, ids)
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_empty_experts_absent_slots_and_one_expert_for_all(mode):
    w13, w2 = layer(5, 32, 32)
    x = torch.randn(8, 32).bfloat16()
    scales = (torch.full((1,), 1e-3), torch.full((1,), 1e-3)) if mode == "nvfp4_per_tensor" else None
    w13_poisoned = replace(w13, global_scale=w13.global_scale.clone())
    w13_poisoned.global_scale[2] = torch.nan  # nobody asks for expert 2
    ids = torch.tensor([[0, 1], [-1, 4], [3, -1], [-1, -1], [1, 0], [4, 3], [0, 4], [1, -1]])
    weights = torch.where(ids < 0, torch.nan, torch.rand(8, 2))  # what has no expert is not read
    got = nvfp4_fused_moe(x, w13_poisoned, w2, weights, ids, activation=mode, input_scales=scales)
    assert not got[3].any()
    assert_close(got, model(x, w13, w2, weights, ids, mode, input_scales=scales), mode)
    one = torch.full((8, 2), 4)
    got = nvfp4_fused_moe(x, w13, w2, weights.nan_to_num(0.5), one, activation=mode, input_scales=scales)
    assert_close(got, model(x, w13, w2, weights.nan_to_num(0.5), one, mode, input_scales=scales), mode)


def test_ids_beyond_the_experts_add_nothing():
    w13, w2 = layer(3, 32, 16)
    x, (weights, ids) = torch.randn(5, 32).bfloat16(), routing(5, 2, 3)
    known = torch.where(ids == 2, -1, ids)
    for beyond, expert_map in ((2, None), (5, torch.arange(3, dtype=torch.int32))):
        some = ids if expert_map is None else torch.where(ids == 2, beyond, ids)
        a, b = (Nvfp4Weight(w.data[:2], w.scales[:2], w.global_scale[:2]) for w in (w13, w2)) if beyond == 2 else (w13, w2)
        got = nvfp4_fused_moe(x, a, b, weights, some, expert_map=expert_map)
        assert torch.equal(got, nvfp4_fused_moe(x, w13, w2, weights, known))


def test_row_scales_of_logical_matrices():
    w13, w2 = layer(3, 32, 16)
    per_row = replace(w13, global_scale=w13.global_scale[:, None] * torch.rand(3, 32).add(0.5))
    x, (weights, ids) = torch.randn(5, 32).bfloat16(), routing(5, 2, 3)
    assert_close(nvfp4_fused_moe(x, per_row, w2, weights, ids), model(x, per_row, w2, weights, ids))


def test_no_tokens():
    w13, w2 = layer(2, 32, 16)
    out = nvfp4_fused_moe(torch.zeros(0, 32).bfloat16(), w13, w2, torch.zeros(0, 2), torch.zeros(0, 2).int())
    assert out.shape == (0, 32)
    assert out.dtype == torch.bfloat16


def test_fake_kernel_gives_the_shape():
    from torch._subclasses.fake_tensor import FakeTensorMode

    w13, w2 = layer(2, 32, 16)
    arguments = (torch.zeros(3, 32).bfloat16(), torch.zeros(3, 2), torch.zeros(3, 2).int())
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        x, weights, ids = (fake.from_tensor(t) for t in arguments)
        out = nvfp4_fused_moe(x, w13, w2, weights, ids)
    assert (out.shape, out.dtype) == ((3, 32), torch.bfloat16)


BAD = {
    "act_fn": ({"act_fn": "tanh"}, ValueError, r"act_fn: got 'tanh', allowed are 'silu'"),
    "activation": ({"activation": "int8"}, ValueError, r"activation: got 'int8', allowed are"),
    "backend": ({"backend": "cutlass"}, ValueError, r"backend: got 'cutlass'"),
    "input_scales": ({"activation": "nvfp4_per_tensor"}, ValueError, r"input_scales: got None"),
    "x dtype": ({"x": torch.zeros(2, 32, dtype=torch.float64)}, TypeError, r"x: got dtype float64, allowed are"),
    "x width": ({"x": torch.zeros(2, 48)}, ValueError, r"x: got shape \[2, 48\], allowed is \[M, 32\]"),
    "ids shape": ({"topk_ids": torch.zeros(3, 2).int()}, ValueError, r"topk_ids, topk_weights: got shapes \[3, 2\]"),
    "ids dtype": ({"topk_ids": torch.zeros(2, 2)}, TypeError, r"topk_ids: got dtype float32, allowed are int32 and int64"),
    "bias shape": ({"w13_bias": torch.zeros(2, 1)}, ValueError, r"w13_bias: got shape \[2, 1\], allowed is \[2, 32\]"),
    "bias dtype": ({"w2_bias": torch.zeros(2, 32).int()}, TypeError, r"w2_bias: got dtype int32, allowed are float32"),
    "bias device": ({"w2_bias": torch.zeros(2, 32, device="meta")}, ValueError, r"w2_bias: it is on meta"),
    "map dtype": ({"expert_map": torch.zeros(2)}, ValueError, r"expert_map: got float32 \[2\], allowed is int32 or int64"),
    "map device": ({"expert_map": torch.zeros(2, device="meta").int()}, ValueError, r"expert_map: it is on meta"),
    "no scale": (
        {"activation": "nvfp4_per_tensor", "input_scales": (torch.ones(1), None)},
        TypeError,
        r"input_scales\[1\]: got None, allowed is a number or a float32 tensor",
    ),
    "one scale": (
        {"activation": "nvfp4_per_tensor", "input_scales": 0.1},
        TypeError,
        r"input_scales: got 0\.1, allowed is one",
    ),
    "w13": ({"w13": torch.zeros(2, 32, 32)}, TypeError, r"w13: got Tensor, allowed is an Nvfp4Weight"),
    "ids": ({"topk_ids": [[0, 1], [0, 1]]}, TypeError, r"topk_ids: got list, allowed is a torch\.Tensor"),
    "ungated": ({"act_fn": "silu_no_mul"}, ValueError, r"w13: got shape \[2, 32, 32\], allowed is \[2, 16, 32\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    w13, w2 = layer(2, 32, 16)
    change, error, message = BAD[case]
    arguments: dict[str, Any] = {
        "x": torch.zeros(2, 32),
        "w13": w13,
        "w2": w2,
        "topk_weights": torch.ones(2, 2),
        "topk_ids": torch.zeros(2, 2).int(),
    }
    with pytest.raises(error, match=message):
        nvfp4_fused_moe(**(arguments | change))
