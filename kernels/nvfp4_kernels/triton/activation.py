"""Activations made ready for the GEMMs, one pass each: per-token e4m3, decoded W4A4 codes, or x itself in another K order.

`ORDER` is the order of K within chunks of 128 that the GEMM reads (see hopper.py): "natural", "16" for 16-bit operands, or
"fp8" for e4m3 operands.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..devices import arch_of, hopper_serves
from ..reference.source import PLAIN, Source, apply
from .launch import cdiv, launch, next_power_of_2
from .numerics import e2m1_decode, e4m3_decode


@triton.jit
def source_column(column, ORDER: tl.constexpr):
    """The column of x that stands at `column` of the prepared operand."""
    chunk = column - column % 128
    if ORDER == "16":  # word j1 j0 t h -> t word h j1 j0
        word = column // 32 % 4
        j = column // 8 % 4
        thread = column // 2 % 4
        return chunk + thread * 32 + word * 8 + column % 2 * 4 + j
    if ORDER == "fp8":  # word half t q -> t word half q
        word = column // 32 % 4
        half = column // 16 % 2
        thread = column // 4 % 4
        source = chunk + thread * 32 + word * 8 + half * 4 + column % 4
        return tl.max_contiguous(tl.multiple_of(source, 4), 4)
    return column


@triton.jit
def round_e4m3(x):
    """fp32 to the nearest e4m3 value, ties to even, saturating at 448; fp32 out, NaN stays NaN. For GPUs without fp8."""
    magnitude = tl.abs(x)
    # In the binade of p the grid has the step p / 8 (2^-9 below 2^-6). Adding and taking away 1.5 * 2^20 * p leaves just
    # those bits.
    binade = (magnitude.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    anchor = tl.minimum(tl.maximum(binade, 0.015625), 256.0) * 1572864.0
    rounded = tl.minimum(magnitude + anchor - anchor, 448.0)
    rounded = tl.where(x != x, x, rounded)
    return tl.where(x < 0, -rounded, rounded)


@triton.jit
def _quantize_fp8_kernel(
    x_ptr, q_ptr, scale_ptr, stride, K, out_k, ORDER: tl.constexpr, FP8: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < out_k
    source = source_column(column, ORDER)
    x = tl.load(x_ptr + row * stride + source, mask=source < K, other=0.0).to(tl.float32)
    amax = tl.max(tl.where(x != x, float("inf"), tl.abs(x)), axis=0)
    scale = tl.div_rn(amax, 448.0)
    value = tl.where(amax > 0, tl.div_rn(x, scale), x)
    if FP8:
        value = tl.clamp(value, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(q_ptr + row * out_k + column, value.to(tl.float8e4nv), mask=inside)
    else:
        tl.store(q_ptr + row * out_k + column, round_e4m3(value).to(q_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + row, scale)


def _row_tile(m: int, k: int) -> tuple[int, int]:
    """Values of a row at a time, and warps, as measured on an H100: a thread takes 32 values, and the whole row is in registers
    if it has up to 32768."""
    block = min(max(next_power_of_2(k), 1024), 32768)
    # Few rows leave room for more warps, of which those of short rows gain nothing.
    return block, 32 if m <= 128 and block == 16384 else block // 1024


def _prepare_rows(x: torch.Tensor, source: Source, k: int, out: torch.Tensor, scale: torch.Tensor | None, order: str) -> None:
    """Hopper's pass over a layer's input [M, k], into out, which in the GEMMs' order goes up to their next step with zeros."""
    from .activation_hopper import prepare_rows

    m, out_k = out.shape
    # Nothing asks for a sum over a row; for very many rows a program for each is 2 to 4 % faster.
    shared = scale is None and source.kind == "silu_and_mul" and m <= 1024
    block, warps = (1024, 4) if shared else _row_tile(m, k)
    residual = source.residual
    launch(
        prepare_rows, (m, cdiv(k, block) if shared else 1),
        x, residual, source.norm_weight, out, scale, source.total, x.stride(0),
        0 if residual is None else residual.stride(0), k, out_k, source.eps,
        SOURCE=source.kind, PERMUTE=order == "fp8", BLOCK=block, WHOLE=shared or k <= block, WARPS=warps,
        num_warps=warps, launch_pdl=True,
    )  # fmt: skip


def operand_rows(m: int) -> int:
    """Rows that an operand of the Hopper GEMMs has memory for: what lies behind its own is read, and comes to nothing.

    Bulk copies that go past a tensor's last row are slow: with 32 rows in the last of several tiles a layer takes up to 30 %
    longer.
    """
    return m if m <= 64 else cdiv(m, 256) * 256


def _empty_operand(m: int, k: int, order: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An operand to be filled, for an input [M, K]; in the order of the Hopper GEMMs it has their whole steps of K."""
    if order == "natural":
        return torch.empty(m, k, dtype=dtype, device=device)
    return torch.empty(operand_rows(m), cdiv(k, 256) * 256, dtype=dtype, device=device)[:m]


def sourced(x: torch.Tensor, source: Source, k: int) -> torch.Tensor:
    """The layer's input [M, K] in x's dtype: `reference.source.apply`, in one pass on Hopper."""
    if source.kind == "plain" or not hopper_serves(x.device, k):
        return apply(x, source)
    out = torch.empty(x.shape[0], k, dtype=x.dtype, device=x.device)
    _prepare_rows(x, source, k, out, None, "natural")
    return out


def quantize_fp8(x: torch.Tensor, order: str, source: Source = PLAIN) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer's input [M, K] (x itself unless `source` says otherwise) to e4m3 [M, K] in `order`, as `permute`, and decode
    scales fp32 [M]; GPUs without fp8 get the same values in bf16."""
    m, k = x.shape[0], x.shape[1] // 2 if source.kind == "silu_and_mul" else x.shape[1]
    arch = arch_of(x.device)
    fp8 = arch >= 89
    q = _empty_operand(m, k, order, torch.float8_e4m3fn if fp8 else torch.bfloat16, x.device)
    scale = torch.empty(m, dtype=torch.float32, device=x.device)
    if hopper_serves(x.device, k) and order in ("natural", "fp8"):
        _prepare_rows(x, source, k, q, scale, order)
        return q, scale
    x = apply(x, source)
    block = next_power_of_2(q.shape[1])
    launch(
        _quantize_fp8_kernel, (m,), x, q, scale, x.stride(0), k, q.shape[1], ORDER=order, FP8=fp8, BLOCK=block,
        num_warps=max(4, min(16, block // 1024)), enable_fp_fusion=False,
    )  # fmt: skip
    return q, scale


@triton.jit
def _permute_kernel(x_ptr, out_ptr, stride, K, out_k, ORDER: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = source_column(column, ORDER)
    x = tl.load(x_ptr + row * stride + source, mask=source < K, other=0.0)
    tl.store(out_ptr + row * out_k + column, x, mask=column < out_k)


def permute(x: torch.Tensor, order: str) -> torch.Tensor:
    """x [M, K] with K in `order`, and zeros up to the GEMMs' next step."""
    m, k = x.shape
    out = _empty_operand(m, k, order, x.dtype, x.device)
    out_k = out.shape[1]
    block = min(1024 if m <= 64 else 4096, next_power_of_2(out_k))
    pdl = arch_of(x.device) >= 90
    launch(
        _permute_kernel, (m, cdiv(out_k, block)), x, out, x.stride(0), k, out_k, ORDER=order, BLOCK=block, PDL=pdl,
        num_warps=max(1, block // 512), launch_pdl=pdl,
    )  # fmt: skip
    return out


@triton.jit
def _decode_kernel(q_ptr, sf_ptr, out_ptr, K, out_k, ORDER: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = source_column(column, ORDER)
    inside = source < K
    byte = tl.load(q_ptr + row * (K // 2) + source // 2, mask=inside, other=0).to(tl.int32)
    sf = tl.load(sf_ptr + row * (K // 16) + source // 16, mask=inside, other=0).to(tl.int32)
    value = e2m1_decode(byte >> (source % 2 * 4)) * e4m3_decode(sf)
    tl.store(out_ptr + row * out_k + column, value.to(out_ptr.dtype.element_ty), mask=column < out_k)


def decode(q: torch.Tensor, sf: torch.Tensor, dtype: torch.dtype, order: str) -> torch.Tensor:
    """Codes uint8 [M, K/2] and linear scale bytes [M, K/16] to e2m1 * SF [M, K] in a 16-bit dtype, exactly, K as `permute`."""
    m, k = q.shape[0], q.shape[1] * 2
    out = _empty_operand(m, k, order, dtype, q.device)
    out_k = out.shape[1]
    block = min(4096, next_power_of_2(out_k))
    pdl = arch_of(q.device) >= 90
    launch(
        _decode_kernel, (m, cdiv(out_k, block)), q, sf.view(torch.uint8), out, k, out_k, ORDER=order, BLOCK=block, PDL=pdl,
        num_warps=8, launch_pdl=pdl,
    )  # fmt: skip
    return out
