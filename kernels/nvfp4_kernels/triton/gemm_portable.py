"""The GEMM in plain Triton: any GPU from Ampere on, any N, any K that is a multiple of 16. Right before fast.

Weights are decoded to x's 16-bit dtype, exactly. Under fp8_per_token they are rounded to e4m3 first, and both operands enter
the product as 16-bit values: e4m3 is exact there, and so is the result but for the order of the sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .activation import round_e4m3
from .launch import cdiv, launch, next_power_of_2, scale_stride
from .numerics import e2m1_decode, e4m3_decode


@triton.jit(do_not_specialize=["M", "N", "row_stride", "token_stride"])
def gemm_portable(
    x_ptr, data_ptr, scales_ptr, fold_ptr, row_ptr, token_ptr, bias_ptr, out_ptr,
    M, N, K, x_stride, row_stride, token_stride,
    FP8: tl.constexpr, TOKEN: tl.constexpr, BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [M, N] = x [M, K] @ (e2m1 * SF)^T, times token and row scales, plus bias [N]. fold [N] with FP8."""
    m_tiles = tl.cdiv(M, BM)
    pid = tl.program_id(0)
    m = pid % m_tiles * BM + tl.arange(0, BM)
    n = pid // m_tiles * BN + tl.arange(0, BN)
    rows = n.to(tl.int64)
    half = tl.arange(0, BK // 2)
    group = tl.arange(0, BK // 16)
    x_rows = x_ptr + m.to(tl.int64)[:, None] * x_stride
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    if FP8:
        fold = tl.load(fold_ptr + n, mask=n < N, other=1.0)
    acc = tl.zeros([BM, BN], dtype=tl.float32)
    for k0 in range(0, K, BK):
        codes = tl.load(
            data_ptr + rows[:, None] * (K // 2) + (k0 // 2 + half)[None, :],
            mask=(n < N)[:, None] & (k0 // 2 + half < K // 2)[None, :],
            other=0,
        ).to(tl.int32)
        sf = tl.load(
            scales_ptr + rows[:, None] * (K // 16) + (k0 // 16 + group)[None, :],
            mask=(n < N)[:, None] & (k0 // 16 + group < K // 16)[None, :],
            other=0,
        ).to(tl.int32)
        scale = e4m3_decode(sf)
        if FP8:
            scale = scale / fold[:, None]  # a power of two: exact
        values = tl.join(e2m1_decode(codes & 0xF), e2m1_decode(codes >> 4)).reshape(BN, BK // 16, 16)
        values = (values * scale[:, :, None]).reshape(BN, BK)
        if FP8:
            values = round_e4m3(values)
        k = k0 + tl.arange(0, BK)
        x = tl.load(x_rows + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        # By way of fp32: Triton 3.6 takes e4m3 to bf16 with an instruction that Ada lacks.
        x = x.to(tl.float32).to(dtype)
        acc = tl.dot(x, tl.trans(values.to(dtype)), acc)
    row = tl.load(row_ptr + n * row_stride, mask=n < N, other=0.0)
    if FP8:
        row *= fold
    result = acc * row[None, :]
    if TOKEN:
        result *= tl.load(token_ptr + m * token_stride, mask=m < M, other=0.0)[:, None]
    if BIAS:
        result += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + m.to(tl.int64)[:, None] * N + n[None, :], result.to(dtype), mask=(m < M)[:, None] & (n < N)[None, :])


def run(
    x: torch.Tensor,
    data: torch.Tensor,
    scales: torch.Tensor,
    row_scale: torch.Tensor,
    out: torch.Tensor,
    *,
    fp8_fold: torch.Tensor | None,
    token_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> None:
    """Launch into out [M, N]; x is the operand [M, K], its scales apart."""
    m, k = x.shape
    n = data.shape[0]
    bm = min(128, max(16, next_power_of_2(m)))
    bn, bk = (128, 64) if bm >= 64 else (64, 128)
    launch(
        gemm_portable, (cdiv(m, bm) * cdiv(n, bn),),
        x, data, scales.view(torch.uint8), fp8_fold, row_scale, token_scale, bias, out,
        m, n, k, x.stride(0), scale_stride(row_scale), scale_stride(token_scale),
        FP8=fp8_fold is not None, TOKEN=token_scale is not None, BIAS=bias is not None,
        BM=bm, BN=bn, BK=bk, num_warps=8 if bm >= 64 else 4, num_stages=3,
    )  # fmt: skip
