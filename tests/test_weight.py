"""quantize_weight and Nvfp4Weight: scale searches against a plain search in float, memory, refusals."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch

from nvfp4_kernels import Nvfp4Weight, SfLayout, nvfp4_quantize, quantize_weight
from nvfp4_kernels.formats import align_scale_rows
from nvfp4_kernels.weight import fp8_fold


def sqnr(weight: torch.Tensor, quantized: Nvfp4Weight) -> float:
    error = weight.double() - quantized.dequantize(torch.float64)
    return float(10 * torch.log10(weight.double().square().sum() / error.square().sum()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_absmax_is_nvfp4_quantize_of_the_weight(dtype):
    weight = torch.randn(24, 96).to(dtype)
    got = quantize_weight(weight, scale_search="absmax")
    g = 448 * 6 / weight.float().abs().max()
    assert torch.equal(got.global_scale, 1 / g)
    x_q, sf = nvfp4_quantize(weight.half() if dtype == torch.float16 else weight.bfloat16(), g, SfLayout.layout_linear)
    if dtype != torch.float32:
        assert torch.equal(got.data, x_q)
        assert torch.equal(got.scales.view(torch.uint8), sf)
    assert sqnr(weight, got) > 19.5


def test_searches_gain_what_the_literature_says():
    weight = torch.randn(512, 2048)
    gains = {
        search: sqnr(weight, quantize_weight(weight, scale_search=search)) for search in ("absmax", "four_over_six", "mse")
    }
    # Gaussian weights: 20.44, 21.21 and 21.80 dB.
    assert gains["absmax"] == pytest.approx(20.44, abs=0.1)
    assert gains["four_over_six"] == pytest.approx(21.21, abs=0.1)
    assert gains["mse"] == pytest.approx(21.80, abs=0.1)


def block_errors(block: np.ndarray, sf: int, g: np.float32) -> float:
    """Squared error of one fp32 block under scale byte `sf`, summed as the kernels sum: an adjacent-pair tree in fp32."""
    one = np.float32(1)
    step = oracle.e4m3_value(sf) * (one / g)
    scale = np.minimum(one / step, np.finfo(np.float32).max) if step else np.finfo(np.float32).max
    q = np.array([oracle.E2M1[oracle.e2m1(np.float32(abs(v)) * scale) & 7] for v in block], np.float32)
    terms = [np.float32(e) for e in (q * step - np.abs(block)) ** np.float32(2)]
    while len(terms) > 1:
        terms = [np.float32(a + b) for a, b in zip(terms[::2], terms[1::2], strict=True)]
    return terms[0]


@pytest.mark.parametrize("search", ["four_over_six", "mse"])
def test_search_takes_the_best_candidate(search):
    weight = torch.randn(16, 64) * torch.exp2(torch.randn(16, 64) * 2)
    weight[3, :16] = 0
    weight[4, 16:32] *= 1e-9  # its absmax scale rounds to 0
    got = quantize_weight(weight, scale_search=search)
    g = np.float32(256 * 6) / weight.abs().max().numpy()
    for row in range(16):
        for b in range(4):
            block = weight[row, 16 * b : 16 * b + 16].numpy()
            amax = np.abs(block).max()
            s6 = amax * (g * np.float32(1 / np.float32(6)))
            if search == "mse":
                center = oracle.e4m3(s6)
                candidates = [min(max(center + step, 1), 0x7E) for step in range(-2, 7)] if amax else [0]
            else:
                candidates = [oracle.e4m3(s6), oracle.e4m3(np.float32(1.5) * s6)]
            errors = [block_errors(block, c, g) for c in candidates]
            assert got.scales.view(torch.uint8)[row, b] == candidates[int(np.argmin(errors))]
    assert not got.data[3, :8].any()


def test_experts_are_quantized_each_by_its_own_global_scale():
    stack = torch.randn(3, 8, 32) * torch.tensor([1.0, 50.0, 0.0])[:, None, None]
    got = quantize_weight(stack)
    assert got.global_scale.shape == (3,)
    assert got.global_scale[2] == 1.0  # a matrix of zeros
    for e in range(3):
        alone = quantize_weight(stack[e])
        assert torch.equal(got.data[e], alone.data)
        assert torch.equal(got.scales[e].view(torch.uint8), alone.scales.view(torch.uint8))
        assert torch.equal(got.dequantize()[e], alone.dequantize())
    assert not got.dequantize()[2].any()


def test_given_global_scale_is_kept():
    weight = torch.randn(8, 32)
    got = quantize_weight(weight, global_scale=0.01)
    assert got.global_scale == torch.tensor(0.01)
    assert sqnr(weight, got) > 20
    per_row = Nvfp4Weight(got.data, got.scales, got.global_scale.expand(8).contiguous())
    assert torch.equal(per_row.dequantize(), got.dequantize())
    assert per_row.row_scale().shape == (8,)
    assert got.row_scale().shape == (1,)


def test_fp8_fold_is_the_smallest_power_of_two_that_fits():
    scales = torch.tensor([[448.0, 1.0], [74.0, 2.0], [75.0, 0.0], [2**-9, 0], [0, 0]]).to(torch.float8_e4m3fn)
    fold = fp8_fold(scales)
    for row, value in zip(scales.float().amax(-1).tolist(), fold.tolist(), strict=True):
        assert np.log2(value) % 1 == 0
        assert 6 * row / value <= 448
        assert row == 0 or 6 * row / (value / 2) > 448
    assert quantize_weight(torch.randn(4, 32)).prepared("fp8_per_token").fp8_fold.shape == (4,)
    assert quantize_weight(torch.randn(4, 32)).prepared("none").fp8_fold is None


@pytest.mark.parametrize("k", [48, 256, 608])
def test_prepared_scales_of_a_stack_begin_at_whole_16_bytes(k):
    weight = quantize_weight(torch.randn(3, 5, k))
    prepared = weight.prepared("none")
    assert torch.equal(prepared.scales.view(torch.uint8), weight.scales.view(torch.uint8))
    pitch = -(-k // 256) * 16
    assert prepared.scales.stride() == (5 * pitch, pitch, 1)
    whole = prepared.scales.view(torch.uint8).as_strided((3, 5, pitch), (5 * pitch, pitch, 1))
    assert not whole[..., k // 16 :].any()
    assert (prepared.scales.data_ptr() == weight.scales.data_ptr()) == (k == 256)
    assert prepared.prepared("none").scales.data_ptr() == prepared.scales.data_ptr()
    assert prepared.nbytes == weight.nbytes
    assert torch.equal(prepared.dequantize(), weight.dequantize())


W = torch.randn(4, 32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: quantize_weight(W.double()),
            TypeError,
            "weight: got torch.float64, allowed are float32, float16 and bfloat16",
        ),
        (lambda: quantize_weight(W[0]), ValueError, r"weight: got shape \[32\]"),
        (lambda: quantize_weight(W[:, :24]), ValueError, "weight: K is 24, allowed are positive multiples of 16"),
        (lambda: quantize_weight(W, scale_search="best"), ValueError, "scale_search: got 'best', allowed are 'absmax'"),
        (
            lambda: quantize_weight(W.index_put((torch.tensor(2), torch.tensor(7)), torch.tensor(float("nan")))),
            ValueError,
            r"weight: 1 values are NaN or infinite, the first at \[2, 7\]",
        ),
        (lambda: quantize_weight(W, global_scale=0.0), ValueError, "global_scale: got a value that is not finite and positive"),
        (
            lambda: quantize_weight(W[None], global_scale=torch.ones(2)),
            ValueError,
            r"global_scale: got shape \[2\], allowed is \[1\]",
        ),
        (
            lambda: Nvfp4Weight(
                torch.zeros(4, 16, dtype=torch.uint8), torch.zeros(4, 1).to(torch.float8_e4m3fn), torch.ones(())
            ),
            ValueError,
            r"scales: got torch.float8_e4m3fn \[4, 1\], allowed is float8_e4m3fn \[4, 2\]",
        ),
        (lambda: Nvfp4Weight(W, W, W), ValueError, "data: got torch.float32"),
        (lambda: quantize_weight([1.0]), TypeError, r"weight: got list, allowed is a torch\.Tensor"),
        (lambda: quantize_weight(W, global_scale=torch.ones((), device="meta")), ValueError, "global_scale: it is on meta"),
        (
            lambda: replace(quantize_weight(W), global_scale=torch.ones((), device="meta")),
            ValueError,
            r"got data on cpu, .* global_scale on meta; allowed is one device",
        ),
        (
            lambda: Nvfp4Weight(
                torch.zeros(4, 12, dtype=torch.uint8), torch.zeros(4, 1).to(torch.float8_e4m3fn), torch.ones(())
            ),
            ValueError,
            "data: K is 24, allowed are multiples of 16",
        ),
        (
            lambda: Nvfp4Weight(
                torch.zeros(4, 16, dtype=torch.uint8), torch.zeros(4, 2).to(torch.float8_e4m3fn), torch.ones(3)
            ),
            ValueError,
            r"global_scale: got torch.float32 \[3\], allowed is float32 \[\] or \[4\]",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("shape", [(0, 32), (2, 0, 32), (0, 4, 32)])
def test_a_weight_without_rows(shape):
    weight = quantize_weight(torch.zeros(shape))
    assert weight.shape == shape
    assert weight.dequantize().shape == shape


def test_quantizing_holds_little_beside_the_weight():
    # 256 MB of bf16 weights; what the search holds beside weight and result stays under 64 MB.
    script = """
import resource, torch
from nvfp4_kernels import quantize_weight
weight = torch.randn(8192, 2048, dtype=torch.bfloat16).repeat(8, 1)
quantize_weight(weight[:64])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
result = quantize_weight(weight)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * 1024 - result.nbytes)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 64 << 20


def test_scale_rows_for_bulk_copies() -> None:
    scales = torch.rand(5, 24).to(torch.float8_e4m3fn)
    aligned = align_scale_rows(scales)
    assert aligned.stride() == (32, 1)
    assert torch.equal(aligned.view(torch.uint8), scales.view(torch.uint8))
    assert not aligned.as_strided((5, 32), (32, 1)).view(torch.uint8)[:, 24:].any()  # kernels read whole steps of K
    assert align_scale_rows(aligned) is aligned
    whole = torch.rand(5, 96).to(torch.float8_e4m3fn)
    assert align_scale_rows(whole) is whole
    assert align_scale_rows(whole[:, :32]).data_ptr() == whole.data_ptr()
    # Rows of a part of a tensor have the next part's scales behind them.
    part = align_scale_rows(whole[:, :24])
    assert part.stride() == (32, 1)
    assert not part.as_strided((5, 32), (32, 1)).view(torch.uint8)[:, 24:].any()
    # As close as padded rows, but the last one ends with the memory.
    short = align_scale_rows(torch.empty_strided((4, 24), (32, 1), dtype=torch.float8_e4m3fn))
    assert short.untyped_storage().nbytes() >= 4 * 32
