"""Norms and SiLU computed in one pass with a layer's quantization, on a real GPU, against the twins and the separate passes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from nvfp4_kernels import ops
from nvfp4_kernels.reference.source import Source, apply
from nvfp4_kernels.triton.activation import quantize_fp8, sourced
from nvfp4_kernels.weight import Nvfp4Weight, fp8_fold

pytestmark = pytest.mark.gpu

KINDS = ("rms_norm", "add_rms_norm", "silu_and_mul")
EPS = 1e-5


def inputs(kind: str, m: int, k: int, dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """x, and what else this kind of source reads: residual and norm weight; rows of very different sizes."""
    x = torch.randn(m, 2 * k if kind == "silu_and_mul" else k) * torch.logspace(-2, 1, m)[:, None]
    made = [x.to(dtype)]
    if kind == "add_rms_norm":
        made.append(torch.randn(m, k).to(dtype))
    if m > 2:
        for t in made:
            t[m // 2] = 0
    if kind != "silu_and_mul":
        made.append((torch.rand(k) + 0.5).to(weight_dtype or dtype))
    return made


def source_of(kind: str, tensors: Sequence[torch.Tensor]) -> Source:
    if kind == "silu_and_mul":
        return Source(kind)
    if kind == "rms_norm":
        return Source(kind, tensors[1], EPS)
    return Source(kind, tensors[2], EPS, tensors[1], torch.full_like(tensors[0], float("nan")))


def fused(kind: str, tensors: Sequence[torch.Tensor], *layer: object) -> tuple[torch.Tensor, ...]:
    eps = () if kind == "silu_and_mul" else (EPS,)
    out = getattr(ops, f"{kind}_linear")(*tensors, *eps, *layer)
    return out if isinstance(out, tuple) else (out,)


def weight(n: int, k: int) -> Nvfp4Weight:
    scales = (torch.rand(n, k // 16, device="cuda") * 40 + 1).to(torch.float8_e4m3fn)
    data = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    return Nvfp4Weight(data, scales, torch.tensor(0.004, device="cuda"), fp8_fold(scales))


def layer(w: Nvfp4Weight, mode: str) -> tuple[object, ...]:
    scale = torch.tensor([0.002], device="cuda") if mode == "nvfp4_per_tensor" else None
    return (w.data, w.scales, w.row_scale(), mode, w.fp8_fold, scale, None, "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [144, 160, 256, 1280, 2880, 4096, 14336, 28672, 36864])
@pytest.mark.parametrize("m", [1, 37, 150])
@pytest.mark.parametrize("kind", KINDS)
def test_rows(kind: str, m: int, k: int, dtype: torch.dtype) -> None:
    tensors = inputs(kind, m, k, dtype)
    twin = source_of(kind, tensors)
    want = apply(tensors[0], twin)
    on_gpu = [t.cuda() for t in tensors]
    source = source_of(kind, on_gpu)
    got = sourced(on_gpu[0], source, k)
    assert got.dtype == dtype
    # The order of a sum, and the last bit of exp and rsqrt: few values fall on the other side of a rounding.
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(got.cpu(), want, rtol=2 * step, atol=torch.finfo(dtype).tiny)
    assert (got.cpu() != want).float().mean() < 0.005
    if kind == "add_rms_norm":
        assert twin.total is not None
        assert source.total is not None
        assert torch.equal(source.total.cpu(), twin.total)
    # Quantizing in the same pass gives the bits of a pass over what the first one wrote.
    for order in ("fp8", "natural") if k % 32 == 0 else ("natural",):
        q, scale = quantize_fp8(on_gpu[0], order, source)
        want_q, want_scale = quantize_fp8(got, order)
        assert torch.equal(q.view(torch.uint8), want_q.view(torch.uint8))
        assert torch.equal(scale, want_scale)


@pytest.mark.parametrize("kind", ["rms_norm", "add_rms_norm"])
def test_norm_weight_in_fp32(kind: str) -> None:
    tensors = inputs(kind, 33, 4096, torch.bfloat16, torch.float32)
    want = apply(tensors[0], source_of(kind, tensors))
    on_gpu = [t.cuda() for t in tensors]
    got = sourced(on_gpu[0], source_of(kind, on_gpu), 4096).cpu()
    torch.testing.assert_close(got, want, rtol=2**-7, atol=0)
    assert (got != want).float().mean() < 0.005


@pytest.mark.parametrize("mode", ["auto", "fp8_per_token", "none", "nvfp4_per_token", "nvfp4_per_tensor"])
@pytest.mark.parametrize("m", [0, 1, 3, 16, 64, 129, 700])
@pytest.mark.parametrize("k", [1024, 1120])
@pytest.mark.parametrize("kind", KINDS)
def test_layer(kind: str, k: int, m: int, mode: str) -> None:
    n = 512
    w = layer(weight(n, k), mode)
    tensors = [t.cuda() for t in inputs(kind, m, k, torch.bfloat16)] if m else _empty(kind, k)
    out, *total = fused(kind, tensors, *w)
    source = source_of(kind, tensors)
    want = ops.linear(sourced(tensors[0], source, k) if m else tensors[0][:, :k], *w)
    assert torch.equal(out, want)
    assert out.isfinite().all()
    if total:
        assert torch.equal(total[0], source.total)


def _empty(kind: str, k: int) -> list[torch.Tensor]:
    one = [t.cuda() for t in inputs(kind, 1, k, torch.bfloat16)]
    return [t[:0] if t.dim() == 2 else t for t in one]


def test_very_many_rows() -> None:
    """Where the product is cuBLAS's, over e4m3 in K's own order."""
    for kind in KINDS:
        tensors = [t.cuda() for t in inputs(kind, 5000, 512, torch.bfloat16)]
        w = layer(weight(256, 512), "fp8_per_token")
        assert torch.equal(fused(kind, tensors, *w)[0], ops.linear(sourced(tensors[0], source_of(kind, tensors), 512), *w))


@pytest.mark.parametrize("kind", KINDS)
def test_strided_and_misaligned(kind: str) -> None:
    w = layer(weight(256, 512), "fp8_per_token")
    tensors = [t.cuda() for t in inputs(kind, 9, 512, torch.bfloat16)]
    want = fused(kind, tensors, *w)
    for offset in (0, 3, 8):
        apart = []
        for t in tensors:
            if t.dim() == 2:
                wide = torch.full((9, t.shape[1] + 16), float("nan"), dtype=t.dtype, device="cuda")
                wide[:, offset : offset + t.shape[1]] = t
                t = wide[:, offset : offset + t.shape[1]]
            apart.append(t)
        for got, expected in zip(fused(kind, apart, *w), want, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["fp8_per_token", "none"])
def test_nan_spoils_its_row_alone(kind: str, mode: str) -> None:
    w = layer(weight(256, 512), mode)
    tensors = [t.cuda() for t in inputs(kind, 20, 512, torch.bfloat16)]
    want = fused(kind, tensors, *w)[0]
    tensors[0][7, 100] = float("nan")
    got = fused(kind, tensors, *w)[0]
    rest = torch.arange(20) != 7
    assert got[7].isnan().all()
    assert torch.equal(got[rest], want[rest])


@pytest.mark.parametrize("mode", ["auto", "fp8_per_token", "none"])
@pytest.mark.parametrize("m", [1, 2, 16, 64, 128, 300])
def test_chain_of_overlapping_launches(mode: str, m: int) -> None:
    """Blocks of norm, layer, SiLU and layer, launched at once, in a graph, and each after the last has ended."""
    k = 1024
    first = layer(weight(k, k), mode)
    blocks = [(layer(weight(2 * k, k), mode), layer(weight(k, k), mode)) for _ in range(4)]
    norm = (torch.rand(k, device="cuda") + 0.5).bfloat16()
    x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")

    def chain(wait: bool) -> tuple[torch.Tensor, torch.Tensor]:
        y, residual = ops.rms_norm_linear(x, norm, EPS, *first), x
        for up, down in blocks:
            y, residual = ops.add_rms_norm_linear(y, residual, norm, EPS, *up)
            if wait:
                torch.cuda.synchronize()
            y = ops.silu_and_mul_linear(y, *down)
            if wait:
                torch.cuda.synchronize()
        return y, residual

    want = chain(wait=True)
    assert all(t.isfinite().all() for t in want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(wait=False)
    for _ in range(20):
        for t in captured:
            t.fill_(float("nan"))
        graph.replay()
        for got in (captured, chain(wait=False)):
            assert all(torch.equal(t, expected) for t, expected in zip(got, want, strict=True))
