"""The GEMMs of others: what they are handed holds the layer, torch's own checks pass it, and our kernel ends the product.

Their products need an SM100. Everything before and after runs here.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nvfp4_kernels import quantize_weight
from nvfp4_kernels.formats import GROUP_SIZE, SfLayout, decode_packed, e4m3_decode, from_layout, sf_shape
from nvfp4_kernels.reference import linear as reference
from nvfp4_kernels.triton import gemm_vendor

SHAPES = [(1, 16, 32), (5, 112, 160), (130, 144, 96)]


def values(codes: torch.Tensor, sf: torch.Tensor) -> torch.Tensor:
    """fp64 [rows, K] of codes and scales in 128x4, as the PTX ISA and cuBLAS define them."""
    rows, k = codes.shape[0], 2 * codes.shape[1]
    scales = e4m3_decode(from_layout(sf, rows, k, SfLayout.layout_128x4).contiguous()).double()
    return decode_packed(codes).double() * scales.repeat_interleave(GROUP_SIZE, 1)


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("mode", ["nvfp4_per_token", "nvfp4_per_tensor"])
@pytest.mark.parametrize("rows", [False, True])
def test_layer_around_the_product(m: int, n: int, k: int, mode: str, rows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def multiply(backend: str, *operands: torch.Tensor) -> torch.Tensor:
        codes, sf, data, weight_sf = operands
        return (values(codes, sf) @ values(data, weight_sf).t()).float()

    monkeypatch.setattr(gemm_vendor, "multiply", multiply)
    x = (torch.randn(m, 2 * k) * torch.logspace(-2, 2, m)[:, None]).to(torch.float16)[:, ::2]
    x[-1] = 0
    weight = quantize_weight(torch.randn(n, k))
    row_scale = weight.row_scale() * (torch.rand(n) + 0.5) if rows else weight.row_scale()
    bias = torch.randn(n, dtype=torch.float16) if rows else None
    layer = {"activation": mode, "input_scale": torch.tensor([300 / 2688]), "bias": bias}
    want = reference.linear(x, weight.data, weight.scales, row_scale, **layer)
    got = gemm_vendor.linear(x, weight.data, weight.scales, row_scale, backend="cublas", **layer)
    torch.testing.assert_close(got, want, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize(("m", "n"), [(1, 16), (3, 1024), (4, 2080)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scale_product_bits(m: int, n: int, dtype: torch.dtype) -> None:
    product = torch.randn(m, n).to(dtype)
    bias = torch.randn(n, dtype=torch.float16)
    for token in (torch.rand(m), torch.rand(1)):
        for row in (torch.rand(n), torch.rand(1)):
            out = torch.full((m, n), float("nan"), dtype=torch.float16)
            gemm_vendor.scale_product(product, token, row, bias, out)
            assert torch.equal(out, (product.float() * token[:, None] * row + bias.float()).half())


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_torch_takes_the_operands(m: int, n: int, k: int) -> None:
    """Shapes, dtypes and layouts against what torch checks of a product on a GPU."""
    with FakeTensorMode():

        def operand(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
            sf = torch.empty(sf_shape(rows, k, SfLayout.layout_128x4), dtype=torch.uint8, device="cuda")
            return torch.empty(rows, k // 2, dtype=torch.uint8, device="cuda"), sf

        (codes, sf), (data, weight_sf) = operand(m), operand(n)
        product = gemm_vendor.multiply("cublas", codes, sf, data, weight_sf)
        assert (product.shape, product.dtype, product.device.type) == ((m, n), torch.float32, "cuda")
        with pytest.raises(RuntimeError, match="scale_b should have"):
            gemm_vendor.multiply("cublas", codes, sf, data, torch.empty(n, k // 16, dtype=torch.uint8, device="cuda"))


@pytest.mark.parametrize(
    ("shape", "mode", "dtype", "error", "message"),
    [
        ((24, 64), "nvfp4_per_token", torch.float16, ValueError, r"'cublas' cannot serve a weight \[24, 64\]"),
        ((32, 48), "nvfp4_per_token", torch.float16, ValueError, r"'cublas' cannot serve a weight \[32, 48\]"),
        ((32, 64), "none", torch.float16, ValueError, "'cublas' multiplies FP4 alone"),
        ((32, 64), "nvfp4_per_token", torch.float32, TypeError, "x: got torch.float32"),
    ],
)
def test_what_it_does_not_serve(
    shape: tuple[int, int], mode: str, dtype: torch.dtype, error: type[Exception], message: str
) -> None:
    weight, x = quantize_weight(torch.randn(shape)), torch.randn(2, shape[1], dtype=dtype)
    arguments = (x, weight.data, weight.scales, weight.row_scale())
    with pytest.raises(error, match=message):
        gemm_vendor.linear(*arguments, backend="cublas", activation=mode)


def test_no_rows() -> None:
    weight = quantize_weight(torch.randn(32, 64))
    x = torch.empty(0, 64, dtype=torch.float16)
    out = gemm_vendor.linear(
        x, weight.data, weight.scales, weight.row_scale(), backend="flashinfer", activation="nvfp4_per_token"
    )
    assert out.shape == (0, 32)
