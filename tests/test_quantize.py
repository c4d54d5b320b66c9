"""Activation quantization against the numpy oracle, hand-worked blocks, and every refusal by its message."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvfp4_kernels import (
    SfLayout,
    nvfp4_dequantize,
    nvfp4_permute_quantize,
    nvfp4_quantize,
    sf_shape,
    silu_and_mul_nvfp4_quantize,
)
from nvfp4_kernels.formats import e2m1_decode, e2m1_encode, e4m3_decode, e4m3_encode, unpack_codes

C = 1 / (448 * 6)
LAYOUTS = list(SfLayout)


def random_matrix(m: int, k: int, dtype: torch.dtype = torch.bfloat16, spread: float = 4.0) -> torch.Tensor:
    """Values whose blocks differ by powers of two, some blocks zero."""
    x = torch.randn(m, k) * torch.exp2(torch.randint(-6, 7, (m, k // 16)).float() * spread / 4).repeat_interleave(16, 1)
    x *= (torch.rand(m, k // 16) > 0.1).float().repeat_interleave(16, 1)
    return x.to(dtype)


def test_e2m1_rounds_to_nearest_even_code_everywhere():
    edges = [0.0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 1e30, float("inf"), 1e-40]
    x = torch.tensor([*edges, *(np.nextafter(np.float32(e), np.float32(9)) for e in edges)])
    x = torch.cat((x, -x, torch.tensor([float("nan")]), torch.randn(2000) * 3))
    assert e2m1_encode(x).tolist() == [oracle.e2m1(v) for v in x.numpy()]
    assert e2m1_encode(torch.tensor([-0.1, -0.0])).tolist() == [8, 8]


def test_e4m3_rounds_to_nearest_even_and_saturates():
    grid = torch.tensor(oracle.E4M3, dtype=torch.float32)
    middles = (grid[1:] + grid[:-1]) / 2
    x = torch.cat((grid, middles, torch.rand(2000) * 500, torch.tensor([448.0, 464, 465, 1e9, float("inf"), float("nan")])))
    assert e4m3_encode(x).tolist() == [oracle.e4m3(v) for v in x.numpy()]
    assert torch.equal(e4m3_encode(e4m3_decode(torch.arange(127, dtype=torch.uint8))), torch.arange(127, dtype=torch.uint8))


def test_hand_worked_block():
    # amax 6 and g 1: the scale is 1, so the codes are the values themselves; 0.3 -> 0.5, -0.1 -> -0, 2.5 -> 2, 5 -> 4.
    block = [6, -6, 0.5, -0.5, 1, -1, 1.5, 2, 3, 4, 0.3, -0.1, 2.5, 5, 0, -3]
    x_q, sf = nvfp4_quantize(torch.tensor([block], dtype=torch.bfloat16), torch.ones(1), SfLayout.layout_linear)
    assert sf.tolist() == [[0x38]]
    assert unpack_codes(x_q).tolist() == [[7, 15, 1, 9, 2, 10, 3, 4, 5, 6, 1, 8, 4, 6, 0, 13]]
    assert x_q[0, 0] == 7 | (15 << 4)  # the low nibble is the even index


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize(("m", "k"), [(1, 16), (7, 48), (130, 80), (33, 256)])
@pytest.mark.parametrize("mode", ["tensor", "rows", "token"])
def test_quantize_gives_the_oracle_bits(layout, dtype, m, k, mode):
    x = random_matrix(m, k, dtype, spread=1.0 if dtype == torch.float8_e4m3fn else 4.0)
    x32 = x.float()
    if mode == "token":
        codes, sf, scales = oracle.quantize(x32.numpy(), None, np.float32(C))
        x_q, got_sf, got_scales = nvfp4_quantize(x, C, layout, per_token_activation=True)
        assert torch.equal(got_scales, torch.from_numpy(scales))
    else:
        amax = x32.abs().amax(-1) if mode == "rows" else x32.abs().amax().reshape(1)
        g = torch.where(amax > 0, 448 * 6 / amax, 1.0)
        codes, sf, _ = oracle.quantize(x32.numpy(), g.numpy())
        x_q, got_sf = nvfp4_quantize(x, g, layout)
    assert x_q.numpy().tolist() == oracle.pack(codes).tolist()
    assert tuple(got_sf.shape) == sf_shape(m, k, layout)
    assert got_sf.flatten().tolist() == oracle.place_scales(sf, layout).tolist()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 0xFFFF), min_size=16, max_size=16), st.floats(2.0**-100, 2.0**100, width=32))
def test_any_bf16_block_gives_the_oracle_bits(bits, g):
    x = torch.tensor([bits], dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    codes, sf, _ = oracle.quantize(x.float().numpy(), np.array([g], np.float32))
    x_q, got_sf = nvfp4_quantize(x, torch.tensor([g]), SfLayout.layout_linear)
    assert got_sf.tolist() == sf.tolist()
    assert x_q.tolist() == oracle.pack(codes).tolist()


def test_nan_block_is_nan_and_leaves_the_others_alone():
    x = random_matrix(2, 64).abs() + 1
    clean, clean_sf = nvfp4_quantize(x, torch.ones(1), SfLayout.layout_linear)
    x[0, 17] = float("nan")
    x_q, sf = nvfp4_quantize(x, torch.ones(1), SfLayout.layout_linear)
    assert sf[0, 1] == 0x7F
    assert unpack_codes(x_q)[0, 16:32].tolist() == [7] * 16
    keep = torch.ones(2, 4, dtype=torch.bool)
    keep[0, 1] = False
    assert torch.equal(sf[keep], clean_sf[keep])
    assert torch.equal(x_q.view(2, 4, 8)[keep], clean.view(2, 4, 8)[keep])
    assert nvfp4_dequantize(x_q, sf, 1.0, SfLayout.layout_linear)[0, 16:32].isnan().all()


def test_zero_rows_and_blocks_are_zero_bytes():
    x = torch.zeros(3, 32, dtype=torch.bfloat16)
    x[1, :16] = -1e-30  # under g = 1 its scale rounds to 0: codes are 0, sign bits too
    x_q, sf, scales = nvfp4_quantize(x[::2], C, per_token_activation=True)
    assert not x_q.any()
    assert not sf.any()
    assert not scales.any()
    x_q, sf = nvfp4_quantize(x, torch.ones(1))
    assert not x_q.any()
    assert not sf.any()


def test_error_against_float64_is_that_of_the_format():
    x = torch.randn(256, 2048, dtype=torch.bfloat16)
    x_q, sf, scales = nvfp4_quantize(x, C, per_token_activation=True)
    error = nvfp4_dequantize(x_q, sf, None, per_token_scale=scales).double() - x.double()
    sqnr = 10 * torch.log10(x.double().square().sum() / error.square().sum())
    assert 20.3 < sqnr < 20.6  # 20.43 dB on Gaussian values


def test_scales_may_be_flat_or_in_tiles():
    x_q, sf = nvfp4_quantize(random_matrix(130, 128), torch.ones(1))
    want = nvfp4_dequantize(x_q, sf, 1.0)
    for form in (sf.flatten(), sf.view(2, 2, 32, 4, 4), sf.view(torch.float8_e4m3fn)):
        assert torch.equal(nvfp4_dequantize(x_q, form, 1.0), want)


def test_strided_rows_and_no_rows():
    wide = random_matrix(20, 128)
    x = wide[::2, 32:96]
    for got, want in zip(nvfp4_quantize(x, torch.ones(1)), nvfp4_quantize(x.contiguous(), torch.ones(1)), strict=True):
        assert torch.equal(got, want)
    x_q, sf, scales = nvfp4_quantize(x[:0], C, per_token_activation=True)
    assert (x_q.shape, sf.shape, scales.shape) == ((0, 32), (0, 4), (0,))


@pytest.mark.parametrize("per_token", [False, True])
def test_shuffle_permutes_rows_then_interleaves(per_token):
    x = random_matrix(256, 128)
    scale = C if per_token else torch.ones(1)
    plain = nvfp4_quantize(x, scale, SfLayout.layout_linear, per_token_activation=per_token)
    got = nvfp4_quantize(x, scale, do_shuffle=True, per_token_activation=per_token)
    order = [32 * (d // 32) + 4 * (d % 8) + d % 32 // 8 for d in range(256)]
    assert torch.equal(got[0], plain[0][order])
    assert got[1].shape == plain[1].shape
    assert got[1].flatten().tolist() == oracle.place_scales(plain[1][order].numpy(), 0).tolist()
    if per_token:
        assert torch.equal(got[2], plain[2][order])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per_token", [False, True])
def test_row_selection_quantizes_named_rows_in_place_and_zeroes_the_rest(layout, per_token):
    x = random_matrix(40, 64)
    index = torch.tensor([[3, -1], [39, 0], [3, 17]], dtype=torch.int32)
    named = sorted({r for r in index.flatten().tolist() if r >= 0})
    poisoned = x.clone()
    poisoned[[r for r in range(40) if r not in named]] = float("nan")
    scale = C if per_token else torch.ones(1)
    want = nvfp4_quantize(x, scale, SfLayout.layout_linear, per_token_activation=per_token)
    got = nvfp4_quantize(poisoned, scale, layout, per_token_activation=per_token, expanded_idx_to_permuted_idx=index)
    rest = torch.ones(40, dtype=torch.bool)
    rest[named] = False
    assert torch.equal(got[0][named], want[0][named])
    assert not got[0][rest].any()
    want_sf = want[1].clone()
    want_sf[rest] = 0
    assert got[1].flatten().tolist() == oracle.place_scales(want_sf.numpy(), layout).tolist()
    if per_token:
        assert torch.equal(got[2][named], want[2][named])
        assert not got[2][rest].any()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 12), st.integers(1, 4), st.integers(0, 20), st.sampled_from(LAYOUTS), st.randoms())
def test_permute_quantize_is_quantize_then_scatter(tokens, top_k, spare, layout, random):
    rows = tokens * top_k + spare
    targets = random.sample(range(rows), tokens * top_k)
    index = torch.tensor(targets, dtype=torch.int32).view(tokens, top_k)
    index[torch.rand(tokens, top_k) < 0.3] = -1
    x = random_matrix(tokens, 96)
    x_q, sf, scales = nvfp4_quantize(x, C, SfLayout.layout_linear, per_token_activation=True)
    want_q, want_sf, want_scales = torch.zeros(rows, 48), torch.zeros(rows, 6, dtype=torch.uint8), torch.zeros(rows)
    for t in range(tokens):
        for r in index[t].tolist():
            if r >= 0:
                want_q[r], want_sf[r], want_scales[r] = x_q[t], sf[t], scales[t]
    got = nvfp4_permute_quantize(x, index, rows=rows, sfLayout=layout)
    assert torch.equal(got[0].float(), want_q)
    assert got[1].flatten().tolist() == oracle.place_scales(want_sf.numpy(), layout).tolist()
    assert torch.equal(got[2], want_scales)


@pytest.mark.parametrize("per_token", [False, True])
def test_silu_and_mul_quantize_is_quantize_of_the_product(per_token):
    x = torch.randn(9, 2 * 64, dtype=torch.bfloat16)
    product = (torch.nn.functional.silu(x[:, :64].double()) * x[:, 64:].double()).to(torch.bfloat16)
    scale = C if per_token else torch.ones(1)
    got = silu_and_mul_nvfp4_quantize(x, scale, per_token_activation=per_token)
    want = nvfp4_quantize(product, scale, per_token_activation=per_token)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        # Rounding the product from fp32 or from float64 may differ in one value in thousands.
        assert (a != b).float().mean() < 0.01


def test_dequantize_inverts_every_layout_and_scale():
    x = random_matrix(130, 80)
    g = 448 * 6 / x.float().abs().amax(-1).clamp(min=1e-3)
    x_q, linear = nvfp4_quantize(x, g, SfLayout.layout_linear)
    values = e2m1_decode(unpack_codes(x_q)).view(130, 5, 16) * e4m3_decode(linear)[:, :, None]
    want = values.view(130, 80) * (1 / g)[:, None]
    for layout in LAYOUTS:
        _, sf = nvfp4_quantize(x, g, layout)
        assert torch.equal(nvfp4_dequantize(x_q, sf, 1 / g, layout), want)
        assert torch.equal(nvfp4_dequantize(x_q, sf, 1 / g, layout, dtype=torch.bfloat16), want.bfloat16())
        assert torch.equal(nvfp4_dequantize(x_q, sf.view(torch.float8_e4m3fn), None, layout, per_token_scale=1 / g), want)


X = torch.randn(4, 32, dtype=torch.bfloat16)
G = torch.ones(1)
CODES = torch.zeros(4, 16, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: nvfp4_quantize(X[:, :24], G), ValueError, "a: the last dimension is 24, allowed are positive multiples of 16"),
        (lambda: nvfp4_quantize(X.float(), G), TypeError, "a: got dtype float32, allowed are float16, bfloat16, float8_e4m3fn"),
        (lambda: nvfp4_quantize(X[0], G), ValueError, r"a: got shape \[32\]"),
        (lambda: nvfp4_quantize([1.0], G), TypeError, "a: got list"),
        (lambda: nvfp4_quantize(X, G, 7), ValueError, "sfLayout: got 7, allowed are SfLayout.layout_128x4"),
        (lambda: nvfp4_quantize(X, G, sf_vec_size=32), ValueError, "sf_vec_size: got 32, allowed is 16.*mxfp4"),
        (lambda: nvfp4_quantize(X, G, do_shuffle=True), ValueError, "do_shuffle: got layout_128x4 and M = 4"),
        (lambda: nvfp4_quantize(X, torch.ones(3)), ValueError, "a_global_sf: got 3 elements, allowed are 1 or 4 elements"),
        (lambda: nvfp4_quantize(X, G.double()), TypeError, "a_global_sf: got dtype float64"),
        (lambda: nvfp4_quantize(X, G.to("meta")), ValueError, "a_global_sf: it is on meta, allowed is the input's device cpu"),
        (lambda: nvfp4_quantize(X, 0.0), ValueError, "a_global_sf: got 0.0, allowed are scales above 0"),
        (
            lambda: nvfp4_quantize(X, torch.ones(4), per_token_activation=True),
            ValueError,
            "got 4 elements, allowed are 1 element",
        ),
        (
            lambda: nvfp4_quantize(X, G, backend="cutlass"),
            ValueError,
            "backend: got 'cutlass' for quantize, allowed are 'cuda', 'reference'",
        ),
        (lambda: nvfp4_quantize(X, G, backend="cute-dsl"), ValueError, "'cute-dsl' cannot serve this call: .* on cpu"),
        (
            lambda: nvfp4_quantize(X, G, expanded_idx_to_permuted_idx=torch.zeros(2)),
            TypeError,
            "expanded_idx_to_permuted_idx: got dtype float32, allowed is int32",
        ),
        (
            lambda: nvfp4_quantize(X, G, expanded_idx_to_permuted_idx=torch.tensor([4], dtype=torch.int32)),
            ValueError,
            "expanded_idx_to_permuted_idx: the largest entry is 4, allowed are entries below 4 rows",
        ),
        (
            lambda: nvfp4_permute_quantize(X, torch.zeros(3, 2, dtype=torch.int32), rows=8),
            ValueError,
            "got 3 tokens, allowed is x's 4",
        ),
        (lambda: nvfp4_permute_quantize(X, torch.zeros(4, 2, dtype=torch.int32), rows=-1), ValueError, "rows: got -1"),
        (lambda: nvfp4_permute_quantize(X, torch.zeros(4, 2, dtype=torch.int32), rows=1.5), TypeError, "rows: got 1.5"),
        (lambda: nvfp4_permute_quantize(X, None, rows=8), TypeError, "expanded_idx_to_permuted_idx: got NoneType"),
        (lambda: nvfp4_quantize(X, None), TypeError, "a_global_sf: got None, allowed is a number or a float32 tensor"),
        (lambda: nvfp4_quantize(X, float("inf")), ValueError, "a_global_sf: got inf, allowed are scales above 0 that float32"),
        (lambda: nvfp4_quantize(X, 1e-60), ValueError, "a_global_sf: got 1e-60"),
        (lambda: nvfp4_quantize(X, G, expanded_idx_to_permuted_idx=[0]), TypeError, "expanded_idx_to_permuted_idx: got list"),
        (lambda: nvfp4_dequantize(CODES, CODES.new_zeros(4, 128), 1.0), ValueError, r"sf: got uint8 \[4, 128\], allowed"),
        (lambda: nvfp4_dequantize(CODES, CODES.new_zeros(512).to("meta"), 1.0), ValueError, "sf: it is on meta"),
        (lambda: nvfp4_dequantize(CODES, CODES.new_zeros(512), 1.0, dtype=torch.int32), TypeError, r"dtype: got torch\.int32"),
        (lambda: nvfp4_dequantize(CODES, CODES.new_zeros(512), None, per_token_scale=1.0), TypeError, "per_token_scale: got"),
        (lambda: silu_and_mul_nvfp4_quantize(X[:, :16], G), ValueError, "x: the last dimension is 16, .* multiples of 32"),
        (lambda: nvfp4_dequantize(X, G, 1.0), ValueError, "x_q: got bfloat16"),
        (
            lambda: nvfp4_dequantize(torch.zeros(4, 16, dtype=torch.uint8), torch.zeros(3, dtype=torch.uint8), 1.0),
            ValueError,
            r"sf: got uint8 \[3\], allowed is uint8 or float8_e4m3fn \[128, 4\]",
        ),
        (
            lambda: nvfp4_dequantize(torch.zeros(4, 16, dtype=torch.uint8), torch.zeros(128, 4, dtype=torch.uint8), None),
            ValueError,
            "global_scale: give it or per_token_scale",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
