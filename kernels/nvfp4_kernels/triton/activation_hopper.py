"""The input of a dense layer made ready on Hopper, one pass over a row: what comes before the layer (an RMSNorm, the sum
before it, or silu(gate) * up), the rounding to 16 bits, and per-token e4m3 in the K order of the GEMMs; 16-byte accesses.

A thread takes 8 neighbours at a time, which in the GEMM's order are twice 4.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .gluon_compat import let_next_kernel_start, prefetch, wait_for_previous_kernel


@gluon.constexpr_function
def _row_layout(permuted, block, warps):
    """A layout of [block] values: a thread has 8 of each 256 of its warp.

    `permuted`: of the positions in the GEMM's order (word half t q), else of those in x (t word half q).
    """
    q, half, word, t = ([1, 2], [16], [32, 64], [4, 8]) if permuted else ([1, 2], [4], [8, 16], [32, 64])
    rest = (block // (256 * warps)).bit_length() - 1
    return gl.DistributedLinearLayout(
        [[i] for i in q + half] + [[256 * warps << i] for i in range(rest)],
        [[i] for i in [*t, *word, 128]],
        [[256 << i] for i in range(warps.bit_length() - 1)],
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


@gluon.constexpr_function
def _silu_times_asm(dtype):
    one = """
        mul.ftz.f32 e, ${gate}, 0fBFB8AA3B;  // -log2(e)
        ex2.approx.ftz.f32 e, e;
        add.ftz.f32 e, e, 0f3F800000;
        rcp.approx.ftz.f32 e, e;
        mul.ftz.f32 e, e, ${gate};
        mul.ftz.f32 {out}, e, ${up};"""
    pair = one.format(gate=1, up=3, out="low") + one.format(gate=2, up=4, out="high")
    return "{ .reg .f32 e, low, high;" + pair + f" cvt.rn.{dtype}x2.f32 $0, high, low; }}"


@gluon.jit
def silu_times(gate, up, DTYPE: gl.constexpr):
    """silu(gate) * up of fp32 values, rounded to 16 bits, in the fewest instructions: a row has one multiprocessor.

    The error is 2^-21 before the rounding; a gate below -87 gives 0.
    """
    WORDS: gl.constexpr = "=r,f,f,f,f"
    if gl.bfloat16 == DTYPE:
        out = gl.inline_asm_elementwise(_silu_times_asm("bf16"), WORDS, [gate, up], dtype=gl.bfloat16, is_pure=True, pack=2)
    else:
        out = gl.inline_asm_elementwise(_silu_times_asm("f16"), WORDS, [gate, up], dtype=gl.float16, is_pure=True, pack=2)
    return out


@gluon.jit
def _read(x_row, residual_row, at, K, SOURCE: gl.constexpr):
    """Columns `at` of a row: x, or silu(gate) * up, in 16 bits; for a norm, what it is the norm of, in fp32."""
    x = gl.load(x_row + at, mask=at < K, other=0.0)
    DTYPE: gl.constexpr = x.dtype
    if SOURCE == "silu_and_mul":
        up = gl.load(x_row + K + at, mask=at < K, other=0.0).to(gl.float32)
        x = silu_times(x.to(gl.float32), up, DTYPE)
    elif SOURCE == "rms_norm":
        x = x.to(gl.float32)
    elif SOURCE == "add_rms_norm":
        x = x.to(gl.float32) + gl.load(residual_row + at, mask=at < K, other=0.0).to(gl.float32)
    return x


@gluon.jit
def _normalized(x, rsqrt, weight, DTYPE: gl.constexpr):
    """x * rsqrt rounded to weight's type, times weight, in 16 bits: the roundings of reference/source.py."""
    x = (x * rsqrt).to(weight.dtype).to(gl.float32) * weight.to(gl.float32)
    return x.to(weight.dtype).to(DTYPE)


@gluon.jit
def _piece(x_row, residual_row, weight_ptr, at, K, rsqrt, SOURCE: gl.constexpr):
    """Columns `at` of the layer's input in 16 bits, once the norm's factor is known."""
    x = _read(x_row, residual_row, at, K, SOURCE)
    if SOURCE == "rms_norm" or SOURCE == "add_rms_norm":
        x = _normalized(x, rsqrt, gl.load(weight_ptr + at, mask=at < K, other=0.0), x_row.dtype.element_ty)
    return x


@gluon.jit
def prepare_rows(
    x_ptr, residual_ptr, weight_ptr, out_ptr, scale_ptr, total_ptr, stride, residual_stride, K, out_k, eps,
    SOURCE: gl.constexpr, PERMUTE: gl.constexpr, BLOCK: gl.constexpr, WHOLE: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Row program_id(0) of a layer's input (reference/source.py) to out, BLOCK values at a time; WHOLE: BLOCK >= K.

    Where no sum over a row is asked for, several programs may share it: program_id(1) is a block then, and WHOLE.
    out [M, out_k] is e4m3, with a decode scale for each row, or of x's type. K is a multiple of 32; PERMUTE puts e4m3 into the
    order of the Hopper GEMMs' operands, with zeros behind K. Longer rows are read again for each sum over them, from the
    caches.
    """
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    QUANTIZE: gl.constexpr = out_ptr.dtype.element_ty == gl.float8e4nv
    NORM: gl.constexpr = SOURCE == "rms_norm" or SOURCE == "add_rms_norm"
    IN: gl.constexpr = _row_layout(False, BLOCK, WARPS)
    OUT: gl.constexpr = _row_layout(PERMUTE, BLOCK, WARPS)
    let_next_kernel_start()
    if NORM:
        line = gl.arange(0, WARPS * 32, gl.BlockedLayout([1], [32], [WARPS], [0])) * 64
        prefetch(weight_ptr + gl.minimum(line, K - 1))
    wait_for_previous_kernel()
    row = gl.program_id(0).to(gl.int64)
    first = gl.program_id(1) * BLOCK
    k = first + gl.arange(0, BLOCK, IN)
    to = first + gl.arange(0, BLOCK, OUT)
    x_row = x_ptr + row * stride
    residual_row = x_row
    if SOURCE == "add_rms_norm":
        residual_row = residual_ptr + row * residual_stride
    x = _read(x_row, residual_row, k, K, SOURCE)
    rsqrt = 1.0
    if NORM:
        weight = gl.load(weight_ptr + k, mask=k < K, other=0.0)
        squares = x * x
        if SOURCE == "add_rms_norm":
            gl.store(total_ptr + row * K + k, x.to(DTYPE), mask=k < K)
        if not WHOLE:
            for start in range(BLOCK, K, BLOCK):
                more = _read(x_row, residual_row, start + k, K, SOURCE)
                squares += more * more
                if SOURCE == "add_rms_norm":
                    gl.store(total_ptr + row * K + start + k, more.to(DTYPE), mask=start + k < K)
        rsqrt = gl.rsqrt(gl.sum(squares, axis=0) / K + eps)
        x = _normalized(x, rsqrt, weight, DTYPE)
    if QUANTIZE:
        # A NaN counts as infinite: the scale is then infinite and the layer's row comes out NaN.
        largest = gl.where(x != x, float("inf"), gl.abs(x.to(gl.float32)))
        if not WHOLE:
            for start in range(BLOCK, K, BLOCK):
                more = _piece(x_row, residual_row, weight_ptr, start + k, K, rsqrt, SOURCE)
                largest = gl.maximum(largest, gl.where(more != more, float("inf"), gl.abs(more.to(gl.float32))))
        amax = gl.max(largest, axis=0)
        scale = gl.div_rn(amax, 448.0)
        gl.store(scale_ptr + row, scale)
        # Very small and very large rows are moved by a power of two, where every step of the division stays normal.
        factor = gl.where(amax < 1e-25, 2.0**96, gl.where(amax > 1e30, 2.0**-60, 1.0))
        scale *= factor
        reciprocal = gl.where(amax > 0, gl.div_rn(1.0, scale), 0.0)
    if WHOLE:
        if QUANTIZE:
            gl.store(out_ptr + row * out_k + to, _quantize(x, factor, scale, reciprocal, PERMUTE, OUT), mask=to < out_k)
        else:
            gl.store(out_ptr + row * out_k + to, x, mask=to < out_k)
    else:
        for start in range(0, K, BLOCK):
            more = _piece(x_row, residual_row, weight_ptr, start + k, K, rsqrt, SOURCE)
            if QUANTIZE:
                q = _quantize(more, factor, scale, reciprocal, PERMUTE, OUT)
                gl.store(out_ptr + row * out_k + start + to, q, mask=start + to < out_k)
            else:
                gl.store(out_ptr + row * out_k + start + to, more, mask=start + to < out_k)
