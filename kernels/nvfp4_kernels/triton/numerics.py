"""NVFP4's roundings as Triton device functions, bit-equal to `formats.py` and `reference/`.

`ARCH` is the compute capability as major * 10 + minor, and 0 under Triton's interpreter, which knows no inline PTX: there
the same bits come from plain Triton. Kernels that call these functions are compiled with `enable_fp_fusion=False`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..formats import E4M3_NAN_CODE, FLOAT32_MAX

_FLOAT32_MAX = tl.constexpr(FLOAT32_MAX)
_SIXTH = tl.constexpr(float(torch.tensor(1.0 / 6.0, dtype=torch.float32)))
_E4M3_NAN = tl.constexpr(E4M3_NAN_CODE)


# ---------------------------------------------------------------------------------------------------------------------
# Pairs: neighbours along K travel as one word, so that a thread's 16-byte load needs no shuffle to pair up codes.


@triton.jit
def word_pointer(pointer):
    """A pointer to 1-, 2- or 4-byte values as a pointer to words of two neighbours."""
    bits: tl.constexpr = pointer.dtype.element_ty.primitive_bitwidth
    if bits == 8:
        return pointer.to(tl.pointer_type(tl.int16), bitcast=True)
    elif bits == 16:
        return pointer.to(tl.pointer_type(tl.int32), bitcast=True)
    else:
        return pointer.to(tl.pointer_type(tl.int64), bitcast=True)


@triton.jit
def _e4m3_to_float(code):
    """int32 whose low byte is an e4m3 code, to fp32: the exponent field moves as it is, 2^120 mends the bias (exactly)."""
    magnitude = ((code & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
    bits = magnitude.to(tl.int32, bitcast=True) | ((code & 0x80) << 24)
    return tl.where((code & 0x7F) == 0x7F, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def unpack_pair(word, dtype: tl.constexpr):
    """Words of two `dtype` values to two fp32 tensors: the even (low) and the odd (high) neighbours. Exact. uint8 is e4m3."""
    if dtype == tl.bfloat16:
        return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)
    elif dtype == tl.float16:
        low = (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
        high = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        return low.to(tl.float32), high.to(tl.float32)
    elif dtype == tl.float32:
        return word.to(tl.int32).to(tl.float32, bitcast=True), (word >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        wide = word.to(tl.int32)
        return _e4m3_to_float(wide & 0xFF), _e4m3_to_float((wide >> 8) & 0xFF)


@triton.jit
def _bfloat16_bits(x):
    """fp32 to the pattern of the nearest bf16 value in the upper half (the interpreter's own conversion truncates)."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FC00000, bits + 0x7FFF + ((bits >> 16) & 1))


@triton.jit
def _round_pair_portable(low, high, dtype: tl.constexpr):
    if dtype == tl.bfloat16:
        return ((_bfloat16_bits(low) >> 16) & 0xFFFF) | (_bfloat16_bits(high) & -65536)
    else:
        low_bits = low.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        return low_bits | (high.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def round_pair(low, high, dtype: tl.constexpr, ARCH: tl.constexpr):
    """Two fp32 tensors, rounded to `dtype`, to words of neighbours: the inverse of `unpack_pair` (not for e4m3)."""
    if dtype == tl.float32:
        return (low.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF) | (high.to(tl.int32, bitcast=True).to(tl.int64) << 32)
    elif ARCH == 0:
        return _round_pair_portable(low, high, dtype)
    # One conversion for two values: those for a single one run at a fraction of its rate.
    elif dtype == tl.bfloat16:
        return tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", [high, low], tl.int32, is_pure=True, pack=1)
    else:
        return tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $1, $2;", "=r,f,f", [high, low], tl.int32, is_pure=True, pack=1)


@triton.jit
def quotient(x, y, ARCH: tl.constexpr):
    """x / y rounded to nearest even for y in [1, 2^126]; -0 or 0 above. Cheaper than `divide`: nothing branches.

    One residual step makes the approximate quotient the nearest one (a tie that the last bit of the reciprocal could sway
    does not exist between 24-bit operands); infinities make the residual NaN, there the approximation is exact.
    """
    if ARCH == 0:
        return x / y
    else:
        r = reciprocal(y, True, ARCH)
        q = x * r
        refined = tl.fma(tl.fma(-y, q, x), r, q)
        return tl.where(refined == refined, refined, q)


# ---------------------------------------------------------------------------------------------------------------------
# fp32 arithmetic that keeps NaN and IEEE rounding


@triton.jit
def _max_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def max_magnitude(low, high, ARCH: tl.constexpr):
    """max(|low|, |high|) over the last axis; a NaN wins, as in torch's amax."""
    if ARCH == 0:
        # The interpreter runs a custom reduction value by value; the bit patterns of magnitudes order as integers, NaN on top.
        low_bits = low.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        high_bits = high.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        return tl.max(tl.maximum(low_bits, high_bits), axis=len(low.shape) - 1).to(tl.float32, bitcast=True)
    else:
        return tl.reduce(_max_nan(tl.abs(low), tl.abs(high)), len(low.shape) - 1, _max_nan)


@triton.jit
def max_positive(x, axis: tl.constexpr):
    """Maximum of magnitudes over an axis; a NaN wins."""
    return tl.max(x.to(tl.int32, bitcast=True), axis=axis).to(tl.float32, bitcast=True)


@triton.jit
def _max_nan_bfloat16x2(a, b):
    return tl.inline_asm_elementwise("max.NaN.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, is_pure=True, pack=1)


@triton.jit
def _max_nan_float16x2(a, b):
    return tl.inline_asm_elementwise("max.NaN.f16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, is_pure=True, pack=1)


@triton.jit
def max_magnitude_of_words(words, dtype: tl.constexpr, ARCH: tl.constexpr):
    """`max_magnitude` of what words of two `dtype` values unpack to."""
    if ARCH > 0 and dtype == tl.bfloat16:
        both = tl.reduce(words & 0x7FFF7FFF, len(words.shape) - 1, _max_nan_bfloat16x2)
        low, high = unpack_pair(both, dtype)
        return _max_nan(low, high)
    elif ARCH > 0 and dtype == tl.float16:
        both = tl.reduce(words & 0x7FFF7FFF, len(words.shape) - 1, _max_nan_float16x2)
        low, high = unpack_pair(both, dtype)
        return _max_nan(low, high)
    else:
        low, high = unpack_pair(words, dtype)
        return max_magnitude(low, high, ARCH)


@triton.jit
def divide(x, y, ARCH: tl.constexpr):
    """x / y rounded to nearest even, subnormals kept (`tl.div_rn` goes through libdevice, which may flush them)."""
    if ARCH == 0:
        return x / y
    else:
        return tl.inline_asm_elementwise("div.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], tl.float32, is_pure=True, pack=1)


@triton.jit
def reciprocal(x, FAST: tl.constexpr, ARCH: tl.constexpr):
    """1 / x: IEEE, or the hardware's approximation that flushes subnormals."""
    if ARCH == 0:
        return 1.0 / x
    elif FAST:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.inline_asm_elementwise("rcp.rn.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def clamp_finite(x):
    """min(x, FLT_MAX), NaN stays NaN."""
    return tl.minimum(x, _FLOAT32_MAX, propagate_nan=tl.PropagateNan.ALL)


# ---------------------------------------------------------------------------------------------------------------------
# e4m3 block scales


_E4M3_PTX = tl.constexpr("{ .reg .b16 pair; cvt.rn.satfinite.e4m3x2.f32 pair, 0f00000000, $1; cvt.u32.u16 $0, pair; }")


@triton.jit
def e4m3_encode(x, ARCH: tl.constexpr):
    """fp32 to e4m3 codes in int32: to nearest even, saturating at 448; NaN is 0x7F."""
    if ARCH >= 89:
        # Not x.to(tl.float8e4nv): that packs two values, and the ptxas of Triton 3.6 takes such a pair apart before it is made.
        return tl.inline_asm_elementwise(_E4M3_PTX, "=r,f", [x], tl.int32, is_pure=True, pack=1)
    else:
        return _e4m3_encode_portable(x)


@triton.jit
def _e4m3_encode_portable(x):
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Normal codes: the top of the fp32 pattern, rounded at bit 20 (a carry runs into the exponent, as it should).
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960
    # Subnormal ones count steps of 2^-9: adding 1.5 * 2^14 leaves just those bits, rounded to nearest even.
    small = magnitude.to(tl.float32, bitcast=True) + 24576.0
    code = tl.where(magnitude < 0x3C800000, small.to(tl.int32, bitcast=True) - 0x46C00000, tl.minimum(normal, 0x7E))
    return tl.where(magnitude > 0x7F800000, _E4M3_NAN, code | ((bits >> 24) & 0x80))


@triton.jit
def e4m3_decode(code):
    """e4m3 codes in int32 to fp32."""
    return _e4m3_to_float(code)


@triton.jit
def times_sixth(x):
    """x * (1/6), with 1/6 rounded to fp32."""
    return x * _SIXTH


@triton.jit
def token_base(inverse_base, FAST: tl.constexpr, ARCH: tl.constexpr):
    """What `token_scales` makes of the inverse base before it knows a row: its reciprocal, or itself with FAST."""
    return inverse_base if FAST else reciprocal(inverse_base, False, ARCH)


@triton.jit
def token_scales(amax, base, FAST: tl.constexpr, ARCH: tl.constexpr):
    """The per-token rule: row maxima to encode scales G and per_token_scale; both 0 for rows of zeros.

    base: `token_base` of the inverse base.
    """
    zero = amax == 0.0
    if FAST:
        scale = amax * base
        g = tl.where(zero, 0.0, reciprocal(scale, True, ARCH))
    else:
        g = tl.where(zero, 0.0, clamp_finite(divide(base, amax, ARCH)))
        scale = tl.where(zero, 0.0, reciprocal(g, False, ARCH))
    return g, scale


@triton.jit
def block_scale(amax, g, inverse_g, FAST: tl.constexpr, ARCH: tl.constexpr):
    """The block rule of numerics.md: block maxima to e4m3 scale codes (int32) and the factors that take values to e2m1's range.

    g, inverse_g: the encode scale and its reciprocal (`reciprocal` with the same FAST).
    """
    if FAST:
        sf = e4m3_encode(g * times_sixth(amax), ARCH)
        factor = reciprocal(e4m3_decode(sf) * inverse_g, True, ARCH)
    else:
        sf = e4m3_encode(amax * times_sixth(g), ARCH)
        factor = clamp_finite(reciprocal(e4m3_decode(sf) * inverse_g, False, ARCH))
    return sf, factor


# ---------------------------------------------------------------------------------------------------------------------
# e2m1 codes


def _encode_asm(hardware: bool) -> str:
    """PTX for eight fp32 values ($1-$4 the even ones, $5-$8 the odd ones) to eight codes in $0, and-ed with the mask $9.

    Without e2m1 conversions (before SM100): the code of a magnitude a is min(2a, a + 2, a/2 + 4, 7) rounded to nearest even,
    one line for each binade of the grid. Adding 1.5 * 2^23 in the same fused multiply-add rounds just once; the line for
    4 and 6 can only give 6 or 7 and is a saturated comparison of a with 5 (a NaN fails it, min drops NaNs: code 7). All of
    that runs on the floating-point pipe, which is twice as wide as the integer one. The codes then move into place by
    acc * 8 + code, each behind its sign bit (the sign that the product has: a NaN's is 0); the constant at the end takes away
    what the eight exponent fields have left.
    """
    if hardware:
        lines = [".reg .b8 b0, b1, b2, b3;", ".reg .b32 acc;"]
        lines += [f"cvt.rn.satfinite.e2m1x2.f32 b{i}, ${5 + i}, ${1 + i};" for i in range(4)]
        lines += ["mov.b32 acc, {b0, b1, b2, b3};", "and.b32 $0, acc, $9;"]
        return "{" + " ".join(lines) + "}"
    lines = [".reg .f32 a, c, d;", ".reg .b32 acc, code;", "mov.b32 acc, 0;"]
    for value in (f"${half + i}" for i in (3, 2, 1, 0) for half in (5, 1)):
        lines += [
            f"abs.f32 a, {value};",
            "fma.rn.f32 c, a, 0f40000000, 0f4B400000;",  # 2a + 1.5 * 2^23
            "add.rn.f32 d, a, 0f4B400002;",  # a + 2 + 1.5 * 2^23
            "min.f32 c, c, d;",
            "fma.rn.sat.f32 d, a, 0fCA000000, 0f4B200001;",  # a <= 5 ? 1 : 0, as -2^21 a + 10485761 saturated to [0, 1]
            "sub.rn.f32 d, 0f4B400007, d;",
            "min.f32 c, c, d;",
            f"mov.b32 code, {value};",
            "shf.l.wrap.b32 acc, code, acc, 1;",
            "mov.b32 code, c;",
            "mad.lo.u32 acc, acc, 8, code;",
        ]
    # The eight 0x4B400000, each shifted by four bits more: 0x4B400000 + 0xB4000000 + 0x40000000, modulo 2^32.
    lines += ["sub.u32 acc, acc, 0x3F400000;", "and.b32 $0, acc, $9;"]
    return "{" + " ".join(lines) + "}"


_E2M1_PTX = tl.constexpr(_encode_asm(hardware=False))
_E2M1_SM100 = tl.constexpr(_encode_asm(hardware=True))
_E2M1_OPERANDS = tl.constexpr("=r,f,f,f,f,f,f,f,f,r,r,r,r")


@triton.jit
def e2m1_decode(code):
    """e2m1 codes in int32 (0..15) to fp32: exponent and mantissa move as they are, 2^126 mends the bias (exactly)."""
    return (((code & 7) << 22) | ((code & 8) << 28)).to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit
def e2m1_magnitude(a):
    """Magnitudes (fp32, not negative) rounded to e2m1's grid: to nearest even, saturating at 6."""
    # In the binade of p the grid has the step p/2 (and 1/2 below 1): adding and taking away 1.5 * 2^22 * p rounds to it.
    binade = (a.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    binade = tl.minimum(tl.maximum(binade, 1.0), 4.0) * 6291456.0
    rounded = (a + binade) - binade
    return tl.where(rounded < 6.0, rounded, 6.0)  # 6 for NaN, which minimum keeps in the interpreter of some Triton versions


@triton.jit
def _e2m1_code(x):
    """fp32 to e2m1 codes in int32 by comparisons."""
    a = tl.abs(x)
    code = (
        (a > 0.25).to(tl.int32)
        + (a >= 0.75).to(tl.int32)
        + (a > 1.25).to(tl.int32)
        + (a >= 1.75).to(tl.int32)
        + (a > 2.5).to(tl.int32)
        + (a >= 3.5).to(tl.int32)
        + (a > 5.0).to(tl.int32)
    )
    return tl.where(x != x, 7, code | ((x.to(tl.int32, bitcast=True) >> 28) & 8))


@triton.jit
def encode_pair(low, high, live, ARCH: tl.constexpr):
    """fp32 values, the even and the odd neighbours, to bytes of two e2m1 codes (uint8); 0 where `live` is 0.

    To nearest even, saturating; the sign stays where a magnitude rounds to 0; NaN is 0x7. live: int32, -1 or 0, broadcast to
    the values. On a GPU it must be the same for the four neighbours (along the last axis) that share a thread's register.
    """
    if ARCH == 0:
        return ((_e2m1_code(low) | (_e2m1_code(high) << 4)) & live).to(tl.uint8)
    elif ARCH >= 100:
        return tl.inline_asm_elementwise(_E2M1_SM100, _E2M1_OPERANDS, [low, high, live], tl.uint8, is_pure=True, pack=4)
    else:
        return tl.inline_asm_elementwise(_E2M1_PTX, _E2M1_OPERANDS, [low, high, live], tl.uint8, is_pure=True, pack=4)
