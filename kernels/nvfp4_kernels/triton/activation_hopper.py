"""Per-token e4m3 quantization on Hopper, straight into the K order of its GEMMs: one pass, 16-byte loads and stores.

A thread takes 32 values, 8 neighbours at each of the four t of hopper.py, which are 32 neighbours of the permuted row.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .gluon_compat import let_next_kernel_start, wait_for_previous_kernel


@gluon.constexpr_function
def _row_layout(permuted, values, block, warps):
    """A layout of [block] values, each thread with 8 (`values` = 8) or 32 values that lie beside each other in one order.

    `permuted`: of the positions in the GEMM's order (word half t q), else of those in x (t word half q).
    """
    q, half, word, t = ([1, 2], [16], [32, 64], [4, 8]) if permuted else ([1, 2], [4], [8, 16], [32, 64])
    if values == 8:
        registers, lanes, unit = q + half, [*t, *word, 128], 256
    else:
        registers, lanes, unit = q + half + t, [*word, 128, 256, 512], 1024
    rest = (block // (unit * warps)).bit_length() - 1
    return gl.DistributedLinearLayout(
        [[i] for i in sorted(registers)] + [[unit * warps << i] for i in range(rest)],
        [[i] for i in lanes],
        [[unit << i] for i in range(warps.bit_length() - 1)],
        [],
        [block],
    )


@gluon.jit
def _quantize(x, factor, scale, reciprocal, PERMUTE: gl.constexpr, LAYOUT: gl.constexpr):
    """e4m3(x / scale), the division rounded as IEEE does; `scale` and `reciprocal` belong to x * factor."""
    x = x.to(gl.float32) * factor
    # A product with the rounded reciprocal, corrected twice by the exact remainder (Markstein).
    value = x * reciprocal
    value = gl.fma(gl.fma(-value, scale, x), reciprocal, value)
    value = gl.fma(gl.fma(-value, scale, x), reciprocal, value)
    q = gl.where(x == 0, x, value).to(gl.float8e4nv)  # the corrections lose the sign of -0
    if PERMUTE:
        BLOCK: gl.constexpr = x.shape[0]
        q = gl.permute(gl.reshape(q, [BLOCK // 128, 4, 4, 2, 4]), [0, 2, 3, 1, 4])  # t word half q -> word half t q
        q = gl.convert_layout(gl.reshape(q, [BLOCK]), LAYOUT, assert_trivial=True)
    return q


@gluon.jit
def quantize_fp8_rows(
    x_ptr, q_ptr, scale_ptr, stride, K, PERMUTE: gl.constexpr, BLOCK: gl.constexpr, WHOLE: gl.constexpr,
    VALUES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Row program_id(0) of x [M, K] to e4m3 [M, K] and its decode scale, BLOCK values at a time; WHOLE: BLOCK >= K.

    K is a multiple of 128; PERMUTE puts it into the order of the Hopper GEMMs' fp8 operands. Longer rows are read twice,
    the second time from the caches.
    """
    let_next_kernel_start()
    wait_for_previous_kernel()
    PERMUTED: gl.constexpr = _row_layout(True, VALUES, BLOCK, WARPS)
    NATURAL: gl.constexpr = _row_layout(False, VALUES, BLOCK, WARPS)
    LAYOUT: gl.constexpr = NATURAL if PERMUTE else PERMUTED
    row = gl.program_id(0).to(gl.int64)
    k = gl.arange(0, BLOCK, LAYOUT)
    to = gl.arange(0, BLOCK, PERMUTED)
    x_row = x_ptr + row * stride
    x = gl.load(x_row + k, mask=k < K, other=0.0)
    # A NaN counts as infinite: the scale is then infinite and the layer's row comes out NaN.
    largest = gl.where(x != x, float("inf"), gl.abs(x.to(gl.float32)))
    if not WHOLE:
        for start in range(BLOCK, K, BLOCK):
            more = gl.load(x_row + start + k, mask=start + k < K, other=0.0)
            largest = gl.maximum(largest, gl.where(more != more, float("inf"), gl.abs(more.to(gl.float32))))
    amax = gl.max(largest, axis=0)
    scale = gl.div_rn(amax, 448.0)
    gl.store(scale_ptr + row, scale)
    # Very small and very large rows are moved by a power of two, where every step of the division stays normal.
    factor = gl.where(amax < 1e-25, 2.0**96, gl.where(amax > 1e30, 2.0**-60, 1.0))
    scale *= factor
    reciprocal = gl.where(amax > 0, gl.div_rn(1.0, scale), 0.0)
    if WHOLE:
        gl.store(q_ptr + row * K + to, _quantize(x, factor, scale, reciprocal, PERMUTE, PERMUTED), mask=to < K)
    else:
        for start in range(0, K, BLOCK):
            x = gl.load(x_row + start + k, mask=start + k < K, other=0.0)
            q = _quantize(x, factor, scale, reciprocal, PERMUTE, PERMUTED)
            gl.store(q_ptr + row * K + start + to, q, mask=start + to < K)
