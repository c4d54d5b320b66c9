"""The GEMM on Blackwell's FP4 tensor cores: Triton's `dot_scaled` over e2m1 codes and e4m3 scales of both operands.

W4A4 on SM100 (tcgen05) and SM120 (mma.sync with block scales). Triton lowers it to the instructions of kind mxf4nvf4; what
the PTX holds is tested by compiling. The other modes go to the portable GEMM.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import cdiv, launch, scale_stride


def problem(mode: str, n: int, k: int) -> str | None:
    """What keeps a mode and shape from this GEMM; None if nothing does."""
    if not mode.startswith("nvfp4"):
        return f"{mode} has no FP4 activations for Blackwell's FP4 tensor cores"
    if k % 128:
        return f"K = {k} is no multiple of 128, the step of the FP4 tensor cores' GEMM"
    return None


@triton.jit(do_not_specialize=["M", "N", "row_stride", "token_stride"])
def gemm_dot_scaled(
    x_ptr, x_scales_ptr, w_ptr, w_scales_ptr, row_ptr, token_ptr, bias_ptr, out_ptr,
    M, N, K, row_stride, token_stride,
    BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [M, N] = (x e2m1 * SF) @ (weight e2m1 * SF)^T, times token and row scales, plus bias. Scales e4m3, linear."""
    m_tiles = tl.cdiv(M, BM)
    pid = tl.program_id(0)
    m = pid % m_tiles * BM + tl.arange(0, BM)
    n = pid // m_tiles * BN + tl.arange(0, BN)
    # Rows past the end read the last row; what comes of them is not stored.
    m_rows = tl.minimum(m, M - 1).to(tl.int64)[:, None]
    n_rows = tl.minimum(n, N - 1).to(tl.int64)[:, None]
    half = tl.arange(0, BK // 2)
    group = tl.arange(0, BK // 16)
    acc = tl.zeros([BM, BN], dtype=tl.float32)
    for k0 in range(0, K, BK):
        x = tl.load(x_ptr + m_rows * (K // 2) + k0 // 2 + half[None, :])
        w = tl.load(w_ptr + n_rows * (K // 2) + k0 // 2 + half[None, :])
        x_scales = tl.load(x_scales_ptr + m_rows * (K // 16) + k0 // 16 + group[None, :])
        w_scales = tl.load(w_scales_ptr + n_rows * (K // 16) + k0 // 16 + group[None, :])
        acc = tl.dot_scaled(x, x_scales, "e2m1", tl.trans(w), w_scales, "e2m1", acc)
    row = tl.load(row_ptr + n * row_stride, mask=n < N, other=0.0)
    token = tl.load(token_ptr + m * token_stride, mask=m < M, other=0.0)
    result = acc * token[:, None] * row[None, :]
    if BIAS:
        result += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out, result.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def run(
    operand: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    data: torch.Tensor,
    scales: torch.Tensor,
    row_scale: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Launch into out [M, N]. operand: x [M, K] as `linear.quantize_nvfp4` returns it."""
    codes, sf, token = operand
    m, k = codes.shape[0], 2 * codes.shape[1]
    n = data.shape[0]
    bn, bk = 128, 128 if k % 256 else 256
    launch(
        gemm_dot_scaled, (cdiv(m, 128) * cdiv(n, bn),),
        codes, sf.view(torch.float8_e4m3fn), data, scales, row_scale, token, bias, out,
        m, n, k, scale_stride(row_scale), scale_stride(token),
        BIAS=bias is not None, BM=128, BN=bn, BK=bk, num_warps=8 if bk == 256 else 4, num_stages=3,
    )  # fmt: skip
    return out
