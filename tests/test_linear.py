"""nvfp4_linear against float64 over the same quantized operands."""

from __future__ import annotations

import pytest
import torch

from nvfp4_kernels import Nvfp4Weight, SfLayout, nvfp4_dequantize, nvfp4_linear, nvfp4_quantize, quantize_weight

MODES = ["none", "fp8_per_token", "nvfp4_per_token", "nvfp4_per_tensor"]


def operand64(x: torch.Tensor, mode: str, input_scale: float) -> torch.Tensor:
    """What x stands for in `mode`, in float64: built from the public quantizer, or by hand for FP8."""
    if mode == "none":
        return x.double()
    if mode == "fp8_per_token":
        scale = x.float().abs().amax(-1, keepdim=True) / 448
        return (x.float() / scale).to(torch.float8_e4m3fn).double() * scale.double()
    if mode == "nvfp4_per_token":
        x_q, sf, scales = nvfp4_quantize(x, 1 / (448 * 6), SfLayout.layout_linear, per_token_activation=True)
        return nvfp4_dequantize(x_q, sf, 1.0, SfLayout.layout_linear, dtype=torch.float64) * scales.double()[:, None]
    x_q, sf = nvfp4_quantize(x, 1 / input_scale, SfLayout.layout_linear)
    return nvfp4_dequantize(x_q, sf, 1.0, SfLayout.layout_linear, dtype=torch.float64) * input_scale


def weight64(weight: Nvfp4Weight, mode: str) -> torch.Tensor:
    one = Nvfp4Weight(weight.data, weight.scales, torch.ones(()))
    values = one.dequantize(torch.float64)
    if mode == "fp8_per_token":
        fold = torch.exp2(torch.ceil(torch.log2(6 * weight.scales.double().amax(-1) / 448)))[:, None]
        values = (values / fold).float().to(torch.float8_e4m3fn).double() * fold
    return values * weight.row_scale().double().reshape(-1, 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 40, 64), (17, 33, 176), (5, 128, 1024)])
@pytest.mark.parametrize("per_row", [False, True])
def test_linear_errs_by_the_output_rounding_alone(mode, dtype, m, n, k, per_row):
    x = torch.randn(m, k).to(dtype)
    weight = quantize_weight(torch.randn(n, k) / k**0.5)
    if per_row:
        weight = Nvfp4Weight(weight.data, weight.scales, weight.global_scale * torch.rand(n).add(0.5))
    bias = torch.randn(n).to(dtype)
    input_scale = float(x.float().abs().max()) / (448 * 6)
    got = nvfp4_linear(x, weight.prepared(mode), activation=mode, input_scale=torch.tensor(input_scale), bias=bias)
    want = operand64(x, mode, torch.tensor(input_scale).item()) @ weight64(weight, mode).t() + bias.double()
    assert got.dtype == dtype
    unit = torch.finfo(dtype).eps / 2
    assert ((got.double() - want).abs() <= unit * want.abs() * 1.01 + 2e-5).all()
    unprepared = nvfp4_linear(x, weight, activation=mode, input_scale=input_scale, bias=bias)
    assert torch.equal(unprepared, got)


def test_auto_on_the_cpu_is_weight_only():
    x, weight = torch.randn(3, 32), quantize_weight(torch.randn(8, 32))
    assert torch.equal(nvfp4_linear(x, weight, activation="auto"), nvfp4_linear(x, weight, activation="none"))


def test_leading_dimensions_and_no_rows():
    weight = quantize_weight(torch.randn(8, 32))
    x = torch.randn(2, 3, 32, dtype=torch.bfloat16)
    out = nvfp4_linear(x, weight)
    assert out.shape == (2, 3, 8)
    assert torch.equal(out[1, 2], nvfp4_linear(x[1, 2], weight))
    for mode in MODES:
        assert nvfp4_linear(x[:0], weight, activation=mode, input_scale=1.0).shape == (0, 3, 8)


def test_token_scales_keep_tokens_apart():
    # A huge neighbour ruins a token under one scale for the tensor, and leaves it untouched per token.
    weight = quantize_weight(torch.randn(16, 64))
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    alone = nvfp4_linear(x[:1], weight, activation="nvfp4_per_token")
    x[3] *= 1e5
    assert torch.equal(nvfp4_linear(x, weight, activation="nvfp4_per_token")[:1], alone)


def test_compiles_to_one_opaque_op():
    weight = quantize_weight(torch.randn(8, 32))

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def layer(x):
        return nvfp4_linear(x, weight, activation="nvfp4_per_token") + 1

    for m in (2, 5):
        x = torch.randn(m, 32, dtype=torch.bfloat16)
        assert torch.equal(layer(x), nvfp4_linear(x, weight, activation="nvfp4_per_token") + 1)


@pytest.mark.parametrize("name", ["quantize", "linear", "permute_quantize", "dequantize", "search_scales"])
def test_ops_pass_torch_opcheck(name):
    x = torch.randn(4, 32, dtype=torch.bfloat16)
    weight = quantize_weight(torch.randn(8, 32))
    one = torch.ones(1)
    index = torch.arange(8, dtype=torch.int32).view(4, 2)
    arguments = {
        "quantize": (x, one, 0, False, True, None, False, False, "cuda"),
        "permute_quantize": (x, index, 8, one, 0, False, "cuda"),
        "dequantize": (weight.data, weight.scales.view(torch.uint8), one, 2, torch.bfloat16, "cuda"),
        "search_scales": (x, torch.ones(()), "mse"),
        "linear": (x, weight.data, weight.scales, weight.row_scale(), "none", None, None, None, "cuda"),
    }[name]
    # opcheck's schema test compares inputs by arithmetic that torch lacks for FP8 on the CPU.
    tests = ("test_faketensor", "test_aot_dispatch_dynamic", *(() if name == "linear" else ("test_schema",)))
    torch.library.opcheck(getattr(torch.ops.nvfp4, name).default, arguments, test_utils=tests)


WEIGHT = quantize_weight(torch.randn(8, 32))
X = torch.randn(4, 32, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: nvfp4_linear(X, WEIGHT, activation="int8"), ValueError, "activation: got 'int8', allowed are .*'auto'"),
        (lambda: nvfp4_linear(X, WEIGHT, activation="nvfp4_per_tensor"), ValueError, "input_scale: got None"),
        (lambda: nvfp4_linear(X[:, :16], WEIGHT), ValueError, r"x: got shape \[4, 16\], allowed is \[..., 32\]"),
        (lambda: nvfp4_linear(X.double(), WEIGHT), TypeError, "x: got dtype float64"),
        (lambda: nvfp4_linear(X.to("meta"), WEIGHT), ValueError, "x: it is on meta, allowed is the weight's device cpu"),
        (lambda: nvfp4_linear(X, WEIGHT, bias=torch.zeros(7)), ValueError, r"bias: got shape \[7\], allowed is \[8\]"),
        (lambda: nvfp4_linear(X, WEIGHT, backend="cutlass"), ValueError, "got 'cutlass' for linear, allowed are .*'cublas'"),
        (lambda: nvfp4_linear(X, WEIGHT, backend="cublas"), ValueError, "'cublas' cannot serve this call: .* on cpu"),
        (lambda: nvfp4_linear(X, WEIGHT, backend="flashinfer"), ValueError, "'flashinfer' cannot serve this call: .* on cpu"),
        (lambda: nvfp4_linear(X, quantize_weight(torch.randn(1, 8, 32))), ValueError, r"weight: got shape \[1, 8, 32\]"),
        (lambda: nvfp4_linear(X, torch.zeros(8, 32)), TypeError, "weight: got Tensor, allowed is an Nvfp4Weight"),
        (lambda: nvfp4_linear([1.0], WEIGHT), TypeError, r"x: got list, allowed is a torch\.Tensor"),
        (lambda: nvfp4_linear(X, WEIGHT, bias=torch.zeros(8, device="meta")), ValueError, "bias: it is on meta"),
        (lambda: nvfp4_linear(X, WEIGHT, bias=torch.zeros(8).long()), TypeError, "bias: got dtype int64, allowed are float32"),
        (
            lambda: nvfp4_linear(X, WEIGHT, activation="nvfp4_per_tensor", input_scale=float("inf")),
            ValueError,
            "input_scale: got inf, allowed are scales above 0 that float32 holds",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
