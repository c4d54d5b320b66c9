"""Weights widened in memory to e4m3, for the FP8 GEMMs of whole libraries (GPUs with fp8: SM89 and newer)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import cdiv, launch, scale_stride

# A word of 8 codes ($2), its e4m3 scale ($3) and 2^-fold as f16 ($4) to 8 e4m3 bytes: the scale makes an 8-byte table,
# a byte permute picks four weights from it, and the signs go on top.
_WIDEN = tl.constexpr("""
{
 .reg .b16 h0, h1, s, f, q<4>; .reg .b32 p, t<4>, lo, hi, m, u, a, b;
 cvt.u16.u32 s, $3; cvt.u16.u32 f, $4;
 cvt.rn.f16x2.e4m3x2 p, s;
 mov.b32 {h0,h1}, p; mul.rn.f16 h0, h0, f; mov.b32 p, {h0,h0};
 mov.b32 u, 0x38000000; mul.rn.f16x2 t0, p, u; cvt.rn.satfinite.e4m3x2.f16x2 q0, t0;
 mov.b32 u, 0x3E003C00; mul.rn.f16x2 t1, p, u; cvt.rn.satfinite.e4m3x2.f16x2 q1, t1;
 mov.b32 u, 0x42004000; mul.rn.f16x2 t2, p, u; cvt.rn.satfinite.e4m3x2.f16x2 q2, t2;
 mov.b32 u, 0x46004400; mul.rn.f16x2 t3, p, u; cvt.rn.satfinite.e4m3x2.f16x2 q3, t3;
 mov.b32 lo, {q0,q1}; mov.b32 hi, {q2,q3};
 and.b32 m, $2, 0x77777777; shl.b32 u, $2, 4;
 prmt.b32 a, lo, hi, m; shr.u32 m, m, 16; prmt.b32 b, lo, hi, m;
 prmt.b32 lo, u, $2, 0x5140; prmt.b32 hi, u, $2, 0x7362;
 lop3.b32 $0, a, lo, 0x80808080, 0xF8; lop3.b32 $1, b, hi, 0x80808080, 0xF8;
}
""")


@triton.jit
def _widen_kernel(
    words_ptr, scales_ptr, fold_ptr, row_ptr, out_ptr, column_ptr, N, pieces, scales_stride, row_stride,
    ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    row_words = pieces * 4  # so that Triton knows of 16-byte accesses: as an argument, it learns of multiples of 16 alone
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    inside = (n < N)[:, None] & (word < row_words)[None, :]
    rows = n.to(tl.int64)[:, None]
    fold = tl.load(fold_ptr + n, mask=n < N, other=1.0)
    if tl.program_id(1) == 0:
        row_scale = tl.load(row_ptr + n * row_stride, mask=n < N, other=0.0)
        tl.store(column_ptr + n, fold * row_scale, mask=n < N)
    inverse = (1.0 / fold).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    words = tl.load(words_ptr + rows * row_words + word[None, :], mask=inside, other=0)
    scales = tl.load(scales_ptr + rows * scales_stride + word[None, :] // 2, mask=inside, other=0).to(tl.int32)
    low, high = tl.inline_asm_elementwise(
        _WIDEN,
        "=r,=r,r,r,r",
        [words, scales, tl.broadcast_to(inverse[:, None], [ROWS, WORDS])],
        dtype=(tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )
    pairs = tl.join(low, high).reshape(ROWS, 2 * WORDS)
    quad = tl.program_id(1) * (2 * WORDS) + tl.arange(0, 2 * WORDS)
    out_mask = (n < N)[:, None] & (quad < 2 * row_words)[None, :]
    tl.store(out_ptr + rows * (2 * row_words) + quad[None, :], pairs, mask=out_mask)


def widen_fp8(
    data: torch.Tensor, scales: torch.Tensor, fp8_fold: torch.Tensor, row_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [N, K/2] to e4m3(e2m1 * SF / fold) [N, K], and fold * row_scale as fp32 [1, N].

    K is a multiple of 32. Rows of scales may lie apart.
    """
    n, k = data.shape[0], data.shape[1] * 2
    out = torch.empty(n, k, dtype=torch.float8_e4m3fn, device=data.device)
    column = torch.empty(1, n, dtype=torch.float32, device=data.device)
    rows, words = 4, 512
    launch(
        _widen_kernel, (cdiv(n, rows), cdiv(k // 8, words)),
        data.view(torch.int32), scales.view(torch.uint8), fp8_fold, row_scale, out.view(torch.int32), column,
        n, k // 32, scales.stride(0), scale_stride(row_scale), ROWS=rows, WORDS=words, num_warps=4,
    )  # fmt: skip
    return out, column
