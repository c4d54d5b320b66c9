"""The quantization kernels under Triton's interpreter, bit for bit against their torch twins."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from nvfp4_kernels.formats import e2m1_encode, e4m3_encode
from nvfp4_kernels.reference import quantize as reference
from nvfp4_kernels.reference import weight as reference_weight
from nvfp4_kernels.triton import numerics
from nvfp4_kernels.triton import quantize as kernels
from nvfp4_kernels.triton import weight as kernels_weight

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

C = 1 / (448 * 6)
SPECIAL = (0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-40, -1e-7, 448.0, 3e38)


def matrix(m: int, k: int, dtype: torch.dtype = torch.bfloat16, special: bool = False) -> torch.Tensor:
    """Rows of very different size; with `special` zeros of both signs, infinities, NaN, subnormals and a row of zeros."""
    x = torch.randn(m, k) * torch.randn(m, 1).mul(3).exp()
    if special:
        for value in SPECIAL:
            x.view(-1)[torch.randint(x.numel(), (max(1, x.numel() // 97),))] = value
        x[m // 2] = 0
        x[0, :16] = -1e-30
    if dtype == torch.float8_e4m3fn:
        x = x.clamp(-448, 448)
    return x.to(dtype)


def assert_same(got: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    """Equal bits, but for the payload of NaN."""
    for a, b in zip(got, expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        if a.dtype == torch.float32:
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        else:
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@triton.jit
def _encode_kernel(x, e4m3, e2m1, N: tl.constexpr):
    at = tl.arange(0, N)
    value = tl.load(x + at)
    tl.store(e4m3 + at, numerics._e4m3_encode_portable(value).to(tl.uint8))
    tl.store(e2m1 + at, numerics.encode_pair(value, value, -1, 0))


def test_portable_encoders_on_every_boundary_and_at_random():
    grid = torch.tensor([0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 2**-10, 2**-6, 15.5, 448, 464, 1e30])
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    x = torch.cat((grid, codes, (codes[1:] + codes[:-1]) / 2, torch.rand(300) * 500))
    x = torch.cat((x, torch.from_numpy(np.nextafter(x.numpy(), np.float32(1e9))), torch.tensor([float("inf"), float("nan")])))
    x = torch.cat((x, -x))
    x = torch.nn.functional.pad(x, (0, triton.next_power_of_2(len(x)) - len(x)))
    e4m3, e2m1 = torch.empty(len(x), dtype=torch.uint8), torch.empty(len(x), dtype=torch.uint8)
    _encode_kernel[(1,)](x, e4m3, e2m1, N=len(x))
    assert torch.equal(e4m3, e4m3_encode(x))
    assert torch.equal(e2m1, e2m1_encode(x) * 17)


@pytest.mark.parametrize("layout", [0, 1, 2])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize(("m", "k"), [(1, 16), (5, 272), (130, 64)])
@pytest.mark.parametrize("special", [False, True])
def test_quantize(m: int, k: int, dtype: torch.dtype, per_token: bool, layout: int, special: bool):
    x = matrix(m, k, dtype, special)
    g = torch.tensor([C if per_token else 37.5])
    assert_same(
        kernels.quantize(x, g, layout=layout, per_token=per_token), reference.quantize(x, g, layout=layout, per_token=per_token)
    )


@pytest.mark.parametrize("g", [0.0, 1e-42, float("inf"), float("nan")])
def test_odd_global_scales(g: float):
    x = matrix(3, 80, special=True)
    scale = torch.tensor([g, 1.0, 2.0])
    assert_same(kernels.quantize(x, scale, layout=0), reference.quantize(x, scale, layout=0))
    assert_same(kernels.quantize(x, scale[:1], layout=1), reference.quantize(x, scale[:1], layout=1))


@pytest.mark.parametrize(("m", "k"), [(2, 4112), (133, 2064), (2, 16640)])
def test_every_way_to_hold_a_row(m: int, k: int):
    """Rows in one piece, in several, and in two passes."""
    x, c = matrix(m, k), torch.tensor([C])
    assert_same(kernels.quantize(x, c, layout=0, per_token=True), reference.quantize(x, c, layout=0, per_token=True))


@pytest.mark.parametrize("per_token", [False, True])
def test_shuffle(per_token: bool):
    x, g = matrix(256, 48), torch.tensor([C if per_token else 50.0])
    assert_same(
        kernels.quantize(x, g, layout=0, per_token=per_token, shuffle=True),
        reference.quantize(x, g, layout=0, per_token=per_token, shuffle=True),
    )


@pytest.mark.parametrize("layout", [0, 1, 2])
@pytest.mark.parametrize("per_token", [False, True])
def test_row_index(layout: int, per_token: bool):
    x = matrix(9, 96, special=True)
    g = torch.tensor([C]) if per_token else torch.rand(9) * 50 + 1
    index = torch.tensor([[3, -1, 0], [3, 7, 12]], dtype=torch.int32)  # 12 is skipped: M is 9
    valid = index[index < 9]
    expected = reference.quantize(x, g, layout=layout, per_token=per_token, row_index=valid)
    assert_same(kernels.quantize(x, g, layout=layout, per_token=per_token, row_index=index), expected)

    out = tuple(torch.full_like(t, 77) for t in expected)
    untouched = tuple(t.clone() for t in out)
    kernels.quantize(x, g, layout=layout, per_token=per_token, row_index=index, out=out)
    rows = valid[valid >= 0].unique().long()
    others = torch.tensor([r for r in range(9) if r not in rows])
    sf, expected_sf, old_sf = (reference.from_layout(t[1], 9, 96, layout) for t in (out, expected, untouched))
    assert torch.equal(out[0][rows], expected[0][rows])
    assert torch.equal(sf[rows], expected_sf[rows])
    assert torch.equal(out[0][others], untouched[0][others])
    assert torch.equal(sf[others], old_sf[others])
    if per_token:
        torch.testing.assert_close(out[2][rows], expected[2][rows], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(out[2][others], untouched[2][others])


@pytest.mark.parametrize("layout", [0, 1, 2])
def test_permute_quantize(layout: int):
    x, c = matrix(3, 80), torch.tensor([C])
    index = torch.tensor([[3, -1], [0, 5], [11, 200]], dtype=torch.int32)
    valid = torch.where(index < 14, index, -1)
    assert_same(
        kernels.permute_quantize(x, index, 14, c, layout=layout), reference.permute_quantize(x, valid, 14, c, layout=layout)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_silu_and_mul_quantize(dtype: torch.dtype):
    # numpy's exp and torch's may differ in the last bit of fp32, which seldom moves the 8 or 11 bits that are kept.
    x, g = (torch.randn(6, 2 * 96) * 3).to(dtype), torch.tensor([100.0])
    got = kernels.silu_and_mul_quantize(x, g, layout=2)
    expected = reference.silu_and_mul_quantize(x, g, layout=2)
    assert (got[0] != expected[0]).float().mean() < 0.01
    assert (got[1] != expected[1]).float().mean() < 0.02


@pytest.mark.parametrize("layout", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantize(layout: int, dtype: torch.dtype):
    x_q, sf, scale = reference.quantize(matrix(9, 80, special=True), torch.tensor([C]), layout=layout, per_token=True)
    for g in (scale, torch.tensor([0.37])):
        got = kernels.dequantize(x_q, sf, g, layout=layout, dtype=dtype)
        expected = reference.dequantize(x_q, sf, g, layout=layout, dtype=dtype)
        assert got.dtype == dtype
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_dequantize_refuses_other_dtypes():
    with pytest.raises(TypeError, match=r"dtype: got torch\.float64"):
        kernels.dequantize(
            torch.zeros(1, 8, dtype=torch.uint8), torch.zeros(1, 1), torch.ones(1), layout=2, dtype=torch.float64
        )


@pytest.mark.parametrize("search", reference_weight.SCALE_SEARCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_search_scales(search: str, dtype: torch.dtype):
    weight = (torch.randn(2, 7, 96) * torch.randn(2, 7, 6).exp().repeat_interleave(16, -1)).to(dtype)
    weight[0, 0, :16] = 0
    g = torch.tensor([30.0, 500.0])
    assert_same(
        kernels_weight.search_scales(weight, g, scale_search=search),
        reference_weight.search_scales(weight, g, scale_search=search),
    )


def test_no_rows():
    c = torch.tensor([C])
    empty = torch.empty(0, 64, dtype=torch.bfloat16)
    for layout in (0, 1, 2):
        assert_same(
            kernels.quantize(empty, c, layout=layout, per_token=True),
            reference.quantize(empty, c, layout=layout, per_token=True),
        )
        index = torch.empty(0, 2, dtype=torch.int32)
        got = kernels.permute_quantize(empty, index, 3, c, layout=layout)
        assert [int(t.count_nonzero()) for t in got] == [0, 0, 0]
    x = matrix(3, 64)
    none = torch.empty(0, dtype=torch.int32)
    assert [int(t.count_nonzero()) for t in kernels.quantize(x, c, layout=0, per_token=True, row_index=none)] == [0, 0, 0]
    assert kernels.silu_and_mul_quantize(empty, c, layout=1, per_token=True)[0].shape == (0, 16)
    assert kernels.dequantize(empty.view(torch.uint8)[:, :16], c, c, layout=2).shape == (0, 32)


@pytest.mark.parametrize("case", ["column slice", "every other row", "transposed", "one byte off", "expanded"])
def test_strides(case: str):
    wide = matrix(8, 256)
    x = {
        "column slice": wide[:, 64:192],
        "every other row": wide[::2],
        "transposed": matrix(64, 16).t(),
        "one byte off": wide.view(-1)[1 : 1 + 7 * 256].view(7, 256),
        "expanded": wide[:1].expand(4, 256),
    }[case]
    before = x.clone()
    c = torch.tensor([C])
    assert_same(
        kernels.quantize(x, c, layout=0, per_token=True), reference.quantize(x.contiguous(), c, layout=0, per_token=True)
    )
    assert torch.equal(x, before)
