"""The quantization kernels on a GPU, bit for bit against their torch twins on the same device."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from nvfp4_kernels import (
    SfLayout,
    nvfp4_dequantize,
    nvfp4_permute_quantize,
    nvfp4_quantize,
    silu_and_mul_nvfp4_quantize,
)
from nvfp4_kernels.formats import e4m3_decode, from_layout
from nvfp4_kernels.reference import quantize as reference
from nvfp4_kernels.reference import weight as reference_weight
from nvfp4_kernels.triton import quantize as kernels
from nvfp4_kernels.triton.weight import search_scales

pytestmark = pytest.mark.gpu

C = 1 / (448 * 6)
DTYPES = [torch.bfloat16, torch.float16, torch.float8_e4m3fn]
CASES = 575  # for each of 18 triples of dtype, layout and kind of scale: 10,350
SPECIAL = (0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-40, -1e-7, 448.0, 3e38)


def base() -> torch.Tensor:
    return torch.full((1,), C, device="cuda")


def matrix(m: int, k: int, dtype: torch.dtype = torch.bfloat16, special: bool = False) -> torch.Tensor:
    """Rows and blocks of very different size; with `special` zeros of both signs, infinities, NaN and rows of zeros."""
    x = torch.randn(m, k, device="cuda") * (torch.randn(m, 1, device="cuda") * 3).exp()
    x *= (torch.randn(m, -(-k // 16), device="cuda") * 2).exp().repeat_interleave(16, 1)[:, :k]
    if special and m:
        for value in random.sample(SPECIAL, 4):
            x.view(-1)[torch.randint(x.numel(), (max(1, x.numel() // 300),), device="cuda")] = value
        x[random.randrange(m)] = 0
        x[0, :16] = -1e-30
    if dtype == torch.float8_e4m3fn:
        x = x.clamp(-448, 448)
    return x.to(dtype)


def poison(*shapes: tuple[torch.Size, torch.dtype]) -> None:
    """Leave blocks of these sizes behind, full of 0xA5, for the allocator to hand out next."""
    for shape, dtype in shapes:
        torch.empty(shape, dtype=dtype, device="cuda").view(torch.uint8).fill_(0xA5)


def same(got: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> bool:
    """Equal bits, but for the payload of NaN."""
    for a, b in zip(got, expected, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        equal = (a == b) | (a.isnan() & b.isnan()) if a.dtype == torch.float32 else a.view(torch.uint8) == b.view(torch.uint8)
        if not bool(equal.all()):
            return False
    return True


@pytest.mark.parametrize("layout", list(SfLayout))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_token", [True, False])
def test_ten_thousand_random_cases(per_token: bool, dtype: torch.dtype, layout: SfLayout):
    seed = random.randrange(2**31)
    random.seed(seed)
    torch.manual_seed(seed)
    for case in range(CASES):
        # Mostly small shapes; every way to hold a row comes up.
        k = 16 * random.choice([*range(1, 129)] * 3 + [256, 257, 511, 640, 1024, 1040])
        m = random.choice([random.randrange(1, 20), random.randrange(1, 400)]) if k <= 2048 else random.choice([1, 5, 20, 66])
        form = random.choice(["all", "out", "named", "listed"])
        shuffle = layout == SfLayout.layout_128x4 and form == "all" and random.random() < 0.2
        if shuffle:
            m = random.choice([128, 256])
        x = matrix(m, k, dtype, special=random.random() < 0.5)
        if per_token:
            g = base() * random.choice([1.0, 448 / 256])
        else:
            g = torch.rand(random.choice([1, m]), device="cuda") * random.choice([1e-3, 1.0, 1e3])
        options = {"layout": int(layout), "per_token": per_token, "pdl": True}
        label = f"seed {seed}, case {case}: {[m, k]} {form} {options} shuffle={shuffle}"
        if form in ("named", "listed"):
            index = torch.randint(-2, m + 2, (random.randrange(1, 2 * m + 1),), dtype=torch.int32, device="cuda")
            valid = index[index < m]
            expected = reference.quantize(x, g, row_index=valid, **options)
        else:
            expected = reference.quantize(x, g, shuffle=shuffle, **options)
        if form == "named":
            poison(*((t.shape, t.dtype) for t in expected))
            got = kernels.quantize(x, g, row_index=index, **options)
        elif form == "all":
            poison(*((t.shape, t.dtype) for t in expected))
            got = kernels.quantize(x, g, shuffle=shuffle, **options)
        else:
            got = tuple(torch.full(t.shape, 77, dtype=t.dtype, device="cuda") for t in expected)
            if form == "out":
                kernels.quantize(x, g, out=got, **options)
            else:
                kernels.quantize(x, g, row_index=index, out=got, **options)
                rows = torch.zeros(m, dtype=torch.bool, device="cuda")
                rows[valid[valid >= 0].long()] = True
                parts = [(got[0], expected[0]), *((from_layout(t, m, k, layout),) for t in (got[1], expected[1]))]
                sf, expected_sf = parts[1][0], parts[2][0]
                named = [(got[0], expected[0]), (sf, expected_sf)] + ([(got[2], expected[2])] if per_token else [])
                assert same(tuple(a[rows] for a, _ in named), tuple(b[rows] for _, b in named)), label
                assert all(bool((a[~rows] == 77).all()) for a, _ in named), f"{label}: a row that nobody named was written"
                continue
        assert same(got, expected), label


@pytest.mark.parametrize("layout", list(SfLayout))
@pytest.mark.parametrize("dtype", DTYPES)
def test_permute_quantize(dtype: torch.dtype, layout: SfLayout):
    for _ in range(50):
        # A kernel is compiled for each top_k and power of two of blocks.
        tokens, top_k = random.randrange(1, 300), random.choice([1, 3, 8])
        k = 16 * random.randrange(*random.choice([(9, 17), (65, 129), (129, 257)]))
        rows = tokens * top_k + random.randrange(300)
        x = matrix(tokens, k, dtype, special=random.random() < 0.5)
        index = torch.randperm(rows, device="cuda")[: tokens * top_k].view(tokens, top_k).int()
        index = torch.where(torch.rand(index.shape, device="cuda") < 0.2, -1, index)
        expected = reference.permute_quantize(x, index, rows, base(), layout=int(layout))
        too_large = torch.where(index < 0, torch.randint(-1, 1, index.shape, dtype=torch.int32, device="cuda") * 9 - 1, index)
        too_large = torch.where((index < 0) & (torch.rand(index.shape, device="cuda") < 0.3), rows + 5, too_large)
        poison(*((t.shape, t.dtype) for t in expected))
        assert same(nvfp4_permute_quantize(x, too_large, rows=rows, sfLayout=layout), expected)


@pytest.mark.parametrize("layout", list(SfLayout))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per_token", [False, True])
def test_silu_and_mul_quantize(dtype: torch.dtype, layout: SfLayout, per_token: bool):
    g = base() if per_token else torch.full((1,), 20.0, device="cuda")
    for m, k in ((1, 16), (3, 4096), (200, 2048), (70, 8192), (65, 14336), (66, 18944), (300, 272)):
        x = (torch.randn(m, 2 * k, device="cuda") * random.choice([1.0, 10.0])).to(dtype)
        got = silu_and_mul_nvfp4_quantize(x, g, layout, per_token_activation=per_token)
        expected = silu_and_mul_nvfp4_quantize(x, g, layout, per_token_activation=per_token, backend="reference")
        # The same expf and the nearest quotient as torch: the last bit of fp32 may differ once in millions of values, and
        # moves the kept bits of it once in thousands of those.
        for a, b in zip(got, expected, strict=True):
            assert (a != b).float().mean() < 1e-5, (m, k)
    index = torch.tensor([2, 0], dtype=torch.int32, device="cuda")
    x = torch.randn(4, 2 * 64, device="cuda").to(dtype)
    got = silu_and_mul_nvfp4_quantize(x, g, layout, per_token, index)
    assert same(got, silu_and_mul_nvfp4_quantize(x, g, layout, per_token, index, backend="reference"))


@pytest.mark.parametrize("layout", list(SfLayout))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantize(dtype: torch.dtype, layout: SfLayout):
    for m, k in ((1, 16), (5, 2064), (300, 512), (129, 4096)):
        x_q, sf, scale = nvfp4_quantize(matrix(m, k, special=True), base(), layout, per_token_activation=True)
        for options in ({"global_scale": None, "per_token_scale": scale}, {"global_scale": 0.37}):
            got = nvfp4_dequantize(x_q, sf, sfLayout=layout, dtype=dtype, **options)
            expected = nvfp4_dequantize(x_q, sf, sfLayout=layout, dtype=dtype, backend="reference", **options)
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("search", reference_weight.SCALE_SEARCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_searches(search: str, dtype: torch.dtype):
    for shape in ((256, 4096), (3, 100, 272), (5, 16)):
        weight = torch.randn(shape, device="cuda")
        weight *= torch.randn(*shape[:-1], shape[-1] // 16, device="cuda").exp().repeat_interleave(16, -1)
        weight.view(-1, 16)[3] = 0
        weight = weight.to(dtype)
        g = torch.rand(shape[:-2], device="cuda") * 500
        assert same(
            search_scales(weight, g, scale_search=search), reference_weight.search_scales(weight, g, scale_search=search)
        )


@pytest.mark.parametrize("per_token", [False, True])
def test_fast_numerics_differ_in_few_codes(per_token: bool):
    """The hardware's reciprocals against IEEE ones in the same formulas (the twin's), and against the strict formulas."""
    x = torch.randn(4096, 4096, device="cuda").bfloat16()
    g = base() if per_token else 448 * 6 / x.abs().amax().float().reshape(1)
    fast = kernels.quantize(x, g, layout=2, per_token=per_token, fast=True)
    for other in (
        reference.quantize(x, g, layout=2, per_token=per_token, fast=True),
        reference.quantize(x, g, layout=2, per_token=per_token),
    ):
        assert (fast[0] != other[0]).float().mean() < 5e-3
        assert (fast[1] != other[1]).float().mean() < 5e-3
        torch.testing.assert_close(fast[2], other[2], rtol=1e-6, atol=0)
    zeros = kernels.quantize(torch.zeros(3, 64, device="cuda").bfloat16(), g, layout=0, per_token=per_token, fast=True)
    assert [int(t.count_nonzero()) for t in zeros] == [0, 0, 0]


def test_more_than_two_to_the_31_elements():
    m, k = 131_200, 16_384  # 2.15e9 elements, 1.07e9 bytes of codes
    x = torch.randn(1 << 22, device="cuda").bfloat16().repeat(m * k // (1 << 22) + 1)[: m * k].view(m, k)
    x[-3:] = torch.randn(3, k, device="cuda") * 5
    for layout in SfLayout:
        x_q, sf, scale = kernels.quantize(x, base(), layout=int(layout), per_token=True)
        tail = slice(m - 128 - m % 128, m)  # whole tiles of rows
        expected = reference.quantize(x[tail], base(), layout=int(layout), per_token=True)
        assert torch.equal(x_q[tail], expected[0])
        assert torch.equal(sf[-expected[1].shape[0] :], expected[1])
        assert torch.equal(scale[tail], expected[2])
        if layout == SfLayout.layout_128x4:
            out = kernels.dequantize(x_q, sf, scale, layout=0, dtype=torch.bfloat16)
            assert torch.equal(
                out[tail], reference.dequantize(expected[0], expected[1], expected[2], layout=0, dtype=torch.bfloat16)
            )
            del out
        del x_q, sf, scale
    index = torch.arange(m, dtype=torch.int32, device="cuda").view(-1, 1)
    x_q, _, _ = kernels.permute_quantize(x, index.flip(0).contiguous(), m, base(), layout=2)
    assert torch.equal(x_q[:3], reference.quantize(x[-3:].flip(0), base(), layout=2, per_token=True)[0])


def graph_forms() -> dict[str, Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]]:
    g = torch.full((1,), 100.0, device="cuda")
    c = base()
    return {
        "per tensor": lambda x, index: nvfp4_quantize(x, g),
        "per token": lambda x, index: nvfp4_quantize(x, c, per_token_activation=True),
        "per token, no pdl": lambda x, index: nvfp4_quantize(x, c, enable_pdl=False, per_token_activation=True),
        "named rows": lambda x, index: nvfp4_quantize(
            x, c, per_token_activation=True, expanded_idx_to_permuted_idx=index[: len(x)]
        ),
        "permuted": lambda x, index: nvfp4_permute_quantize(x, index, rows=2 * len(x)),
        "silu": lambda x, index: silu_and_mul_nvfp4_quantize(x, c, per_token_activation=True),
        "dequantize": lambda x, index: (nvfp4_dequantize(*nvfp4_quantize(x, g), 0.01),),
    }


@pytest.mark.parametrize(
    "form", ["per tensor", "per token", "per token, no pdl", "named rows", "permuted", "silu", "dequantize"]
)
def test_cuda_graphs_replay_on_new_data(form: str):
    call = graph_forms()[form]
    x = matrix(40, 1024)
    index = torch.randperm(80, device="cuda").view(40, 2).int()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(x, index)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(x, index)
    for _ in range(3):
        x.copy_(matrix(40, 1024))
        index.copy_(torch.randperm(80, device="cuda").view(40, 2))
        graph.replay()
        assert same(out, call(x, index))


def test_no_call_waits_for_the_device():
    x, index = matrix(40, 1024), torch.randperm(80, device="cuda").view(40, 2).int()
    forms = graph_forms()
    for call in forms.values():
        call(x, index)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in forms.values():
            call(x, index)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("m", [3, 4096])
def test_programmatic_launches_see_what_came_before(m: int):
    """Chains in which each call reads what the one before it wrote: an early start would read stale rows."""
    g = torch.full((1,), 300.0, device="cuda")
    last = []
    for pdl in (False, True):
        torch.manual_seed(m)
        x = torch.randn(m, 16384, device="cuda").bfloat16()
        for _ in range(20):
            # An ordinary kernel in between.
            current = nvfp4_dequantize(*nvfp4_quantize(x, g, enable_pdl=pdl), 1 / 310, dtype=torch.bfloat16)
            # None: each reads the codes of the one before it as e4m3 values, in memory that the allocator hands round.
            for per_token in (True, False, True):
                codes = nvfp4_quantize(current, base() if per_token else g, enable_pdl=pdl, per_token_activation=per_token)[0]
                current = codes.view(torch.float8_e4m3fn)
            x = torch.where(x.isfinite(), x, 1.0).roll(1) + current.view(torch.uint8).repeat(1, 8).to(x.dtype) / 1000
        last.append((x, current.view(torch.uint8)))
    assert torch.equal(last[0][0], last[1][0])
    assert torch.equal(last[0][1], last[1][1])
    assert last[0][0].isfinite().all()


def test_programmatic_launches_write_after_what_came_before():
    """Two calls into the same outputs: the second one's rows stay, however early it starts."""
    first, second = (torch.randn(8192, 4096, device="cuda").bfloat16() for _ in range(2))
    expected = reference.quantize(second, base(), layout=0, per_token=True)
    for _ in range(20):
        out = tuple(torch.empty_like(t) for t in expected)
        kernels.quantize(first, base(), layout=0, per_token=True, pdl=True, out=out)
        kernels.quantize(second, base(), layout=0, per_token=True, pdl=True, out=out)
        assert same(out, expected)


@pytest.mark.parametrize("layout", list(SfLayout))
def test_no_rows(layout: SfLayout):
    x = torch.empty(0, 256, dtype=torch.bfloat16, device="cuda")
    x_q, sf, scale = nvfp4_quantize(x, base(), layout, per_token_activation=True)
    assert (x_q.shape, sf.shape[0], scale.shape) == ((0, 128), 0, (0,))
    index = torch.empty(0, 2, dtype=torch.int32, device="cuda")
    out = nvfp4_permute_quantize(x, index, rows=5, sfLayout=layout)
    assert [int(t.count_nonzero()) for t in out] == [0, 0, 0]
    assert silu_and_mul_nvfp4_quantize(x, base(), layout, True)[0].shape == (0, 64)
    assert nvfp4_dequantize(x_q, sf, None, layout, scale).shape == (0, 256)


def test_strides():
    wide = matrix(100, 1024)
    flat = wide.view(-1)
    views = {
        "column slice": wide[:, 256:512],
        "every other row": wide[::2],
        "transposed": wide.t()[:, :96],
        "off by one": flat[1 : 1 + 99 * 1024].view(99, 1024),
        "expanded": wide[:1].expand(7, 1024),
        "odd row stride": torch.as_strided(flat, (50, 64), (72, 1)),
    }
    for name, x in views.items():
        for per_token in (False, True):
            g = base() if per_token else torch.full((1,), 3.0, device="cuda")
            got = kernels.quantize(x, g, layout=0, per_token=per_token)
            assert same(got, reference.quantize(x, g, layout=0, per_token=per_token)), name
    got = silu_and_mul_nvfp4_quantize(wide[:, :256], base(), per_token_activation=True)
    assert same(got, silu_and_mul_nvfp4_quantize(wide[:, :256].clone(), base(), per_token_activation=True))


def test_error_against_float64():
    x = torch.randn(2048, 4096, device="cuda", dtype=torch.float64)
    x[::7] *= 1e4
    x_q, sf, scale = nvfp4_quantize(x.bfloat16(), base(), per_token_activation=True)
    error = nvfp4_dequantize(x_q, sf, None, per_token_scale=scale).double() - x
    snr = 10 * torch.log10(x.square().sum(1) / error.square().sum(1))
    assert 20.2 < snr.median() < 20.7  # Gaussian rows: 20.43 dB whatever their size
    assert snr.min() > 19
    assert e4m3_decode(sf).max() <= 448
