"""Block scale searches for weights on the GPU: the Triton twin of `reference/weight.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..devices import arch_of
from ..formats import E4M3_MAX_CODE, GROUP_SIZE
from ..reference.weight import MSE_CANDIDATES
from .launch import cdiv
from .numerics import (
    clamp_finite,
    e2m1_magnitude,
    e4m3_decode,
    e4m3_encode,
    encode_pair,
    max_magnitude,
    reciprocal,
    times_sixth,
    unpack_pair,
    word_pointer,
)
from .quantize import aligned_rows, on_device

_FIRST_STEP = tl.constexpr(MSE_CANDIDATES.start)
_END_STEP = tl.constexpr(MSE_CANDIDATES.stop)
_MAX_CODE = tl.constexpr(E4M3_MAX_CODE)


@triton.jit
def _pair_error(x, step, factor):
    """Squared error of magnitudes x rounded under a block's step (SF / g); factor is 1 / step."""
    error = e2m1_magnitude(x * factor) * step - x
    return error * error


@triton.jit
def _block_error(low, high, sf, inverse_g, ARCH: tl.constexpr):
    """Squared error [rows, blocks] of magnitudes under scale codes sf: sums of neighbours, then of neighbouring sums."""
    step = e4m3_decode(sf) * inverse_g
    factor = clamp_finite(reciprocal(step, False, ARCH))
    error = _pair_error(low, step[:, :, None], factor[:, :, None]) + _pair_error(high, step[:, :, None], factor[:, :, None])
    rows: tl.constexpr = error.shape[0]
    blocks: tl.constexpr = error.shape[1]
    error = tl.sum(error.reshape(rows, blocks, 4, 2), axis=3)
    error = tl.sum(error.reshape(rows, blocks, 2, 2), axis=3)
    return tl.sum(error, axis=2)


@triton.jit(do_not_specialize=["rows", "rows_per_matrix", "blocks", "stride"])
def search_kernel(
    weight, encode_scale, data, scales, rows, rows_per_matrix, blocks, stride,
    SEARCH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCKS: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """weight [rows, K] (`stride` in words of two values) to data [rows, K/2] and linear scales [rows, blocks]."""
    chunks = tl.cdiv(blocks, BLOCKS)
    program = tl.program_id(0)
    row = (program // chunks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    block = (program % chunks) * BLOCKS + tl.arange(0, BLOCKS)
    word = tl.arange(0, 8)
    mask = (row < rows)[:, None] & (block < blocks)
    dtype: tl.constexpr = weight.dtype.element_ty
    row_offset = tl.multiple_of(row * stride, 64 // dtype.primitive_bitwidth)  # 16 bytes
    offset = row_offset[:, None, None] + (block[:, None] * 8 + word)
    low, high = unpack_pair(tl.load(word_pointer(weight) + offset, mask=mask[:, :, None], other=0), dtype)
    g = tl.load(encode_scale + row // rows_per_matrix, mask=row < rows, other=1.0)[:, None]
    inverse_g = reciprocal(g, False, ARCH)
    amax = max_magnitude(low, high, ARCH)
    s6 = amax * times_sixth(g)
    sf = e4m3_encode(s6, ARCH)
    low_magnitude = tl.abs(low)
    high_magnitude = tl.abs(high)
    if SEARCH == "four_over_six":
        sf4 = e4m3_encode(1.5 * s6, ARCH)
        error4 = _block_error(low_magnitude, high_magnitude, sf4, inverse_g, ARCH)
        sf = tl.where(error4 < _block_error(low_magnitude, high_magnitude, sf, inverse_g, ARCH), sf4, sf)
    elif SEARCH == "mse":
        center = sf
        best = tl.full(amax.shape, float("inf"), tl.float32)
        for step in range(_FIRST_STEP, _END_STEP):
            candidate = tl.minimum(tl.maximum(center + step, 1), _MAX_CODE)
            error = _block_error(low_magnitude, high_magnitude, candidate, inverse_g, ARCH)
            sf = tl.where(error < best, candidate, sf)
            best = tl.where(error < best, error, best)
        sf = tl.where(amax == 0.0, 0, sf)
    live = (sf != 0)[:, :, None]
    factor = clamp_finite(reciprocal(e4m3_decode(sf) * inverse_g, False, ARCH))[:, :, None]
    codes = encode_pair(tl.where(live, low * factor, 0.0), tl.where(live, high * factor, 0.0), -1, ARCH)
    tl.store(data + (((row[:, None] * blocks + block) * 8)[:, :, None] + word), codes, mask=mask[:, :, None])
    tl.store(scales + (row[:, None] * blocks + block), sf.to(tl.uint8), mask=mask)


def search_scales(weight: torch.Tensor, encode_scale: torch.Tensor, *, scale_search: str) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., N, K] under fp32 encode scales [...] to (data uint8 [..., N, K/2], scales float8_e4m3fn [..., N, K/16]).

    As `reference.weight.search_scales`, bit for bit. A weight whose rows do not lie at one stride is copied first.
    """
    *shape, n, k = weight.shape
    data = torch.empty(*shape, n, k // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(*shape, n, k // GROUP_SIZE, dtype=torch.float8_e4m3fn, device=weight.device)
    rows, blocks = weight.numel() // max(k, 1), k // GROUP_SIZE
    if rows:
        block_m, width = 4, 64
        with on_device(weight):
            matrix = aligned_rows(weight.reshape(rows, k))
            search_kernel[(cdiv(rows, block_m) * cdiv(blocks, width),)](
                matrix,
                encode_scale.reshape(-1),
                data,
                scales.view(torch.uint8),
                rows,
                n,
                blocks,
                matrix.stride(0) // 2 if rows > 1 else k // 2,
                SEARCH=scale_search,
                BLOCK_M=block_m,
                BLOCKS=width,
                ARCH=arch_of(weight.device),
                num_warps=4,
                enable_fp_fusion=False,
            )
    return data, scales
