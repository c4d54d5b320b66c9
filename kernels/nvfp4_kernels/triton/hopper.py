"""What the Hopper GEMMs share: NVFP4 weights decoded straight into tensor-core operand registers, and their epilogue.

K is permuted, not the weights. A thread of a wgmma A operand needs a few values of K at each step; thread t of a row
takes the 32 *consecutive* codes k = 128c + 32t .. +31, one 16-byte load of the checkpoint's own row-major bytes, and reads
them as several steps. Any permutation of K is right as long as x is read under the same one. With K split as
(chunk of 128, t: 4, word: 4, code: 8) the order of a chunk in x is

    16-bit operands: (word, j, t, h) for code = 4h + j      fp8 operands: (word, half, t, q) for code = 4 half + q

so that two codes 16 bits apart in a word become one register of two 16-bit values, and four neighbours one of e4m3.

Decoding costs about 2.5 instructions a weight for 16-bit operands and 1.9 for e4m3:

- 16 bits: shift and mask put the three magnitude bits at the exponent's end and the mantissa's top (so the value is the
  code's times 2^-126 in bf16, 2^-14 in fp16; subnormals are exact), the sign goes on top; one product with the scale,
  times 2^118 (2^7), makes the exact weight times 2^-8 (2^-7). The epilogue takes that power of two out again.
- e4m3: a block's scale makes an 8-byte table of e4m3(magnitude * scale / 2^fold); one byte permute picks four weights.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from .gluon_compat import thread_barrier, tma_load, tma_store, tma_store_wait

# Two e4m3 scales to the 16-bit pairs that a word's products take. The f16 step keeps NaN scales NaN.
_SCALES_BF16 = gl.constexpr("""
{
 .reg .b16 h0, h1, s; .reg .b32 p, e; .reg .f32 f0, f1;
 cvt.u16.u32 s, $2;
 cvt.rn.f16x2.e4m3x2 p, s;
 mov.b32 {h0,h1}, p; cvt.f32.f16 f0, h0; cvt.f32.f16 f1, h1;
 cvt.rn.bf16x2.f32 p, f1, f0;
 mov.b32 e, 0x7A807A80; mul.rn.bf16x2 p, p, e;
 prmt.b32 $0, p, p, 0x1010; prmt.b32 $1, p, p, 0x3232;
}
""")
_SCALES_FP16 = gl.constexpr("""
{
 .reg .b16 s; .reg .b32 p, e;
 cvt.u16.u32 s, $2;
 cvt.rn.f16x2.e4m3x2 p, s;
 mov.b32 e, 0x58005800; mul.rn.f16x2 p, p, e;
 prmt.b32 $0, p, p, 0x1010; prmt.b32 $1, p, p, 0x3232;
}
""")
# A word of 8 codes ($8) and its scale pair ($9) to 8 values: register j holds codes j and j + 4.
_DECODE_BF16 = gl.constexpr("""
{
 .reg .b32 a<4>, b<4>;
 shl.b32 a0, $8, 6;   shl.b32 b0, $8, 12;
 shl.b32 a1, $8, 2;   shl.b32 b1, $8, 8;
 shr.u32 a2, $8, 2;   shl.b32 b2, $8, 4;
 shr.u32 a3, $8, 6;   mov.b32 b3, $8;
 and.b32 a0, a0, 0x01C001C0; lop3.b32 a0, a0, b0, 0x80008000, 0xF8;
 and.b32 a1, a1, 0x01C001C0; lop3.b32 a1, a1, b1, 0x80008000, 0xF8;
 and.b32 a2, a2, 0x01C001C0; lop3.b32 a2, a2, b2, 0x80008000, 0xF8;
 and.b32 a3, a3, 0x01C001C0; lop3.b32 a3, a3, b3, 0x80008000, 0xF8;
 mul.rn.bf16x2 a0, a0, $9; mul.rn.bf16x2 a1, a1, $9; mul.rn.bf16x2 a2, a2, $9; mul.rn.bf16x2 a3, a3, $9;
 mov.b32 {$0,$1}, a0; mov.b32 {$2,$3}, a1; mov.b32 {$4,$5}, a2; mov.b32 {$6,$7}, a3;
}
""")
_DECODE_FP16 = gl.constexpr("""
{
 .reg .b32 a<4>, b<4>;
 shl.b32 a0, $8, 9;   shl.b32 b0, $8, 12;
 shl.b32 a1, $8, 5;   shl.b32 b1, $8, 8;
 shl.b32 a2, $8, 1;   shl.b32 b2, $8, 4;
 shr.u32 a3, $8, 3;   mov.b32 b3, $8;
 and.b32 a0, a0, 0x0E000E00; lop3.b32 a0, a0, b0, 0x80008000, 0xF8;
 and.b32 a1, a1, 0x0E000E00; lop3.b32 a1, a1, b1, 0x80008000, 0xF8;
 and.b32 a2, a2, 0x0E000E00; lop3.b32 a2, a2, b2, 0x80008000, 0xF8;
 and.b32 a3, a3, 0x0E000E00; lop3.b32 a3, a3, b3, 0x80008000, 0xF8;
 mul.rn.f16x2 a0, a0, $9; mul.rn.f16x2 a1, a1, $9; mul.rn.f16x2 a2, a2, $9; mul.rn.f16x2 a3, a3, $9;
 mov.b32 {$0,$1}, a0; mov.b32 {$2,$3}, a1; mov.b32 {$4,$5}, a2; mov.b32 {$6,$7}, a3;
}
""")
# Two e4m3 scales ($4) and 2^-fold as an f16 pair ($5) to a table each: bytes of e4m3(0 .5 1 1.5) and e4m3(2 3 4 6).
_TABLES = gl.constexpr("""
{
 .reg .b16 h0, h1, q<4>; .reg .b32 p, a, b, t<4>, e; .reg .b16 s;
 cvt.u16.u32 s, $4;
 cvt.rn.f16x2.e4m3x2 p, s;
 mul.rn.f16x2 p, p, $5;
 mov.b32 {h0,h1}, p; mov.b32 a, {h0,h0}; mov.b32 b, {h1,h1};
 mov.b32 e, 0x38000000; mul.rn.f16x2 t0, a, e; cvt.rn.satfinite.e4m3x2.f16x2 q0, t0;
 mov.b32 e, 0x3E003C00; mul.rn.f16x2 t1, a, e; cvt.rn.satfinite.e4m3x2.f16x2 q1, t1;
 mov.b32 e, 0x42004000; mul.rn.f16x2 t2, a, e; cvt.rn.satfinite.e4m3x2.f16x2 q2, t2;
 mov.b32 e, 0x46004400; mul.rn.f16x2 t3, a, e; cvt.rn.satfinite.e4m3x2.f16x2 q3, t3;
 mov.b32 $0, {q0,q1}; mov.b32 $1, {q2,q3};
 mov.b32 e, 0x38000000; mul.rn.f16x2 t0, b, e; cvt.rn.satfinite.e4m3x2.f16x2 q0, t0;
 mov.b32 e, 0x3E003C00; mul.rn.f16x2 t1, b, e; cvt.rn.satfinite.e4m3x2.f16x2 q1, t1;
 mov.b32 e, 0x42004000; mul.rn.f16x2 t2, b, e; cvt.rn.satfinite.e4m3x2.f16x2 q2, t2;
 mov.b32 e, 0x46004400; mul.rn.f16x2 t3, b, e; cvt.rn.satfinite.e4m3x2.f16x2 q3, t3;
 mov.b32 $2, {q0,q1}; mov.b32 $3, {q2,q3};
}
""")
# A word of 8 codes ($2) and the halves of its table ($10, $18) to 8 e4m3 bytes. Inline PTX on 8-bit values packs 8
# elements, so that every 32-bit input comes 8 times.
_PICK = gl.constexpr("""
{
 .reg .b32 m, u, lo, hi, a, b;
 and.b32 m, $2, 0x77777777; shl.b32 u, $2, 4;
 prmt.b32 lo, $10, $18, m; shr.u32 m, m, 16; prmt.b32 hi, $10, $18, m;
 prmt.b32 a, u, $2, 0x5140; prmt.b32 b, u, $2, 0x7362;
 lop3.b32 $0, lo, a, 0x80808080, 0xF8; lop3.b32 $1, hi, b, 0x80808080, 0xF8;
}
""")
_PICK_CONSTRAINTS = gl.constexpr("=r,=r," + ",".join(["r"] * 24))


def burst_of(stages: int) -> int:
    """How many stages of a ring of `stages` are loaded at once: two at a time read memory 3 % faster, others stay ahead."""
    return 4 if stages == 8 else 2 if stages in (4, 6) else 1


# Packed weights [64, 16 words] and scale pairs [64, 4] of 128 values of K as the operand threads of four warps hold them.
GROUP_WORDS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0]], [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 16]
    )
)
GROUP_PAIRS = gl.constexpr(
    gl.DistributedLinearLayout([[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 4])
)


@gluon.jit
def _eight(x):
    y = gl.join(x, x)
    y = gl.join(y, y)
    return gl.join(y, y)


@gluon.jit
def _by_word(first, second, BN: gl.constexpr, LAYOUT: gl.constexpr):
    """Values of words 0, 1 and of words 2, 3, both [BN, 4 threads], to one a word: [BN, 16]."""
    both = gl.join(gl.join(first, first), gl.join(second, second))
    both = gl.reshape(gl.permute(both, [0, 1, 3, 2]), [BN, 16])
    return gl.convert_layout(both, LAYOUT, assert_trivial=True)


@gluon.jit
def scale_tables(scales, fold):
    """int16 scale pairs and f16 pairs of 2^-fold, [BN, 4], to the halves of the tables of words 0, 1 and of words 2, 3."""
    return gl.inline_asm_elementwise(
        _TABLES, "=r,=r,=r,=r,r,r", [scales.to(gl.int32) & 0xFFFF, fold], dtype=[gl.int32] * 4, is_pure=True, pack=1
    )


@gluon.jit
def decode_fp8(words, scales, fold, BN: gl.constexpr, OPERAND: gl.constexpr):
    """int32 words [BN, 16], int16 scale pairs [BN, 4], f16 pairs of 2^-fold [BN, 4] to e4m3 [BN, 128] in operand layout."""
    a0, a1, b0, b1 = scale_tables(scales, fold)
    LAYOUT: gl.constexpr = words.type.layout
    low = _eight(_by_word(a0, b0, BN, LAYOUT))
    high = _eight(_by_word(a1, b1, BN, LAYOUT))
    codes = gl.inline_asm_elementwise(_PICK, _PICK_CONSTRAINTS, [_eight(words), low, high], dtype=gl.int8, is_pure=True, pack=8)
    codes = gl.permute(gl.reshape(codes, [BN, 4, 4, 2, 4]), [0, 2, 3, 1, 4])  # t word half q -> word half t q
    return gl.convert_layout(gl.reshape(codes, [BN, 128]).to(gl.float8e4nv, bitcast=True), OPERAND, assert_trivial=True)


@gluon.jit
def decode_word_fp8(word, low, high, BN: gl.constexpr, OPERAND: gl.constexpr):
    """One word of every thread, int32 [BN, 4], and the halves of its table to e4m3 [BN, 32] in operand layout."""
    codes = gl.inline_asm_elementwise(
        _PICK, _PICK_CONSTRAINTS, [_eight(word), _eight(low), _eight(high)], dtype=gl.int8, is_pure=True, pack=8
    )
    codes = gl.permute(gl.reshape(codes, [BN, 4, 2, 4]), [0, 2, 1, 3])  # t half q -> half t q
    return gl.convert_layout(gl.reshape(codes, [BN, 32]).to(gl.float8e4nv, bitcast=True), OPERAND, assert_trivial=True)


@gluon.jit
def scale_pairs(scales, FP16: gl.constexpr):
    """int16 scale pairs [BN, 4] to the 16-bit pairs of words 0, 1 and of words 2, 3, int32 [BN, 4] each."""
    return gl.inline_asm_elementwise(
        _SCALES_FP16 if FP16 else _SCALES_BF16,
        "=r,=r,r",
        [scales.to(gl.int32) & 0xFFFF],
        dtype=[gl.int32] * 2,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def halves(words, BN: gl.constexpr):
    """int32 words [BN, 16] to words 0, 1 and words 2, 3 of every thread: [BN, 4, 2] each."""
    return gl.split(gl.permute(gl.reshape(words, [BN, 4, 2, 2]), [0, 1, 3, 2]))


@gluon.jit
def decode_values(words, scale, FP16: gl.constexpr):
    """int32 words and their scale pairs to 8 tensors of 16-bit values: codes 0, 4, 1, 5, 2, 6, 3, 7 of every word."""
    return gl.inline_asm_elementwise(
        _DECODE_FP16 if FP16 else _DECODE_BF16,
        "=h,=h,=h,=h,=h,=h,=h,=h,r,r",
        [words, scale],
        dtype=[gl.float16] * 8 if FP16 else [gl.bfloat16] * 8,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def decode_16(words, scale, BN: gl.constexpr, OPERAND: gl.constexpr, FP16: gl.constexpr):
    """int32 words [BN, 4, 2] and scale pairs [BN, 4] to 16-bit values [BN, 64] in operand layout, times 2^-8 (fp16: 2^-7)."""
    LAYOUT: gl.constexpr = words.type.layout
    scale = gl.convert_layout(gl.join(scale, scale), LAYOUT, assert_trivial=True)
    v0, v1, v2, v3, v4, v5, v6, v7 = decode_values(words, scale, FP16)
    a = gl.join(gl.join(gl.join(v0, v1), gl.join(v2, v3)), gl.join(gl.join(v4, v5), gl.join(v6, v7)))
    a = gl.permute(a, [0, 2, 5, 4, 1, 3])  # t word h j0 j1 -> word j1 j0 t h
    return gl.convert_layout(gl.reshape(a, [BN, 64]), OPERAND, assert_trivial=True)


@gluon.jit
def decode_part(
    words, scales, fold, part: gl.constexpr, BN: gl.constexpr, OPERAND: gl.constexpr, FP8: gl.constexpr, FP16: gl.constexpr
):
    """A chunk of 128 values of K, int32 words [BN, 16] and int16 scale pairs [BN, 4], in operand layout.

    FP8: [BN, 128] in e4m3, with f16 pairs of 2^-fold [BN, 4]; otherwise its first or second half, [BN, 64].
    """
    if FP8:
        return decode_fp8(words, scales, fold, BN, OPERAND)
    else:
        s_first, s_second = scale_pairs(scales, FP16)
        w_first, w_second = halves(words, BN)
        return decode_16(w_first if part == 0 else w_second, s_first if part == 0 else s_second, BN, OPERAND, FP16)


@gluon.jit
def load_fold(fold_ptr, n0, N, BN: gl.constexpr, LAYOUT: gl.constexpr):
    """2^fold of rows n0 .. n0 + BN, for `pairs_of_fold`."""
    n = n0 + gl.arange(0, BN, gl.SliceLayout(1, LAYOUT))
    return gl.load(fold_ptr + n, mask=n < N, other=1.0)


@gluon.jit
def pairs_of_fold(fold, LAYOUT: gl.constexpr):
    """2^-fold of rows as pairs of f16, int32 [rows, 4] in LAYOUT. A fold is a power of two from 2^-15 to 2^3: exact."""
    inverse = 1.0 / fold
    bits = inverse.to(gl.float16).to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
    pairs, _ = gl.broadcast(gl.expand_dims(bits | (bits << 16), 1), gl.zeros([fold.shape[0], 4], gl.int32, LAYOUT))
    return pairs


@gluon.jit
def tile_of(tile, n_tiles, m_tiles, GROUP: gl.constexpr):
    """(n, m) of a tile: m first within groups of GROUP tiles along n, so that what runs together shares x and weights."""
    group = GROUP * m_tiles
    first = (tile // group) * GROUP
    width = gl.minimum(n_tiles - first, GROUP)
    return first + (tile % group) % width, (tile % group) // width


@gluon.jit
def part_of(share, stages, shares):
    """(first stage, stages) of one of `shares` parts of a tile's K, which differ by one stage at most."""
    first = share * stages // shares
    return first, (share + 1) * stages // shares - first


@gluon.jit
def share_of(unit, whole, split, stages, n_tiles, m_tiles, GROUP: gl.constexpr, REDUCE: gl.constexpr):
    """(n, m, first stage, stages) of a unit of work: one of the first `whole` tiles; then `split` units share a tile's K."""
    if REDUCE:
        rest = gl.maximum(unit - whole, 0)
        shares = split if unit >= whole else 1
        share = rest % split
        n, m = tile_of(gl.minimum(unit, whole) + rest // split, n_tiles, m_tiles, GROUP)
        first, count = part_of(share, stages, shares)
    else:
        n, m = tile_of(unit, n_tiles, m_tiles, GROUP)
        first = 0
        count = stages
    return n, m, first, count


@gluon.jit
def _helpers(rest):
    """How many blocks have none of the `rest` tiles of the last wave: the first ones."""
    return gl.num_programs(0) - rest


@gluon.jit
def _lent_to(lent, rest):
    """[first, end) of what this block, a helper, has of the stages that `rest` tiles lend, `lent` each, counted in a row."""
    helpers = _helpers(rest)
    return gl.program_id(0) * (rest * lent) // helpers, (gl.program_id(0) + 1) * (rest * lent) // helpers


@gluon.jit
def _helped_tile(unit, whole, lent, rest):
    """The tile behind the whole ones that a unit of this block, a helper, is a part of."""
    low, _ = _lent_to(lent, rest)
    return low // lent + (unit - whole) // gl.num_programs(0)


@gluon.jit
def helped_share_of(unit, whole, lent, stages, n_tiles, m_tiles, GROUP: gl.constexpr):
    """(n, m, first stage, stages) of a unit of work: one of the first `whole` tiles; then a part of those behind them.

    Of these each has a block, which lends the last `lent` of its stages. The other blocks, helpers, share evenly what is lent;
    they come first, as they are waited for.
    """
    rest = n_tiles * m_tiles - whole
    own = gl.program_id(0) - _helpers(rest)  # of a helper below 0
    low, high = _lent_to(lent, rest)
    tile = gl.where(own < 0, _helped_tile(unit, whole, lent, rest), own)
    begin = gl.maximum(low, tile * lent)
    first = gl.where(own < 0, stages - lent + begin - tile * lent, 0)
    count = gl.where(own < 0, gl.minimum(high, (tile + 1) * lent) - begin, stages - lent)
    n, m = tile_of(gl.where(unit < whole, unit, whole + tile), n_tiles, m_tiles, GROUP)
    return n, m, gl.where(unit < whole, 0, first), gl.where(unit < whole, stages, count)


@gluon.jit
def helped_units(whole, lent, tiles):
    """An end of this block's units of work, see `helped_share_of`; they are as far apart as there are blocks."""
    rest = tiles - whole
    low, high = _lent_to(lent, rest)
    parts = gl.where(gl.program_id(0) < _helpers(rest), (high - 1) // lent - low // lent + 1, 1)
    return whole + parts * gl.num_programs(0)


@gluon.jit
def lent_part(unit, whole, lent, tiles):
    """(tile behind the whole ones, place of the part's sums) of a helper's unit."""
    tile = _helped_tile(unit, whole, lent, tiles - whole)
    return tile, gl.program_id(0) + tile  # from one part to the next the block, the tile or both go up


@gluon.jit
def lent_parts(lent, whole, tiles):
    """(tile behind the whole ones, place of the first part's sums, parts) of what this block's tile has lent."""
    rest = tiles - whole
    helpers = _helpers(rest)
    tile = gl.program_id(0) - helpers
    first = ((tile * lent + 1) * helpers - 1) // (rest * lent)
    last = ((tile + 1) * lent * helpers - 1) // (rest * lent)
    return tile, first + tile, last - first + 1


@gluon.jit
def give_part(acc, partial_ptr, counter_ptr):
    """Store acc [BN, BM], a part of a tile's sums, at partial_ptr; how many parts were there before it."""
    BN: gl.constexpr = acc.shape[0]
    BM: gl.constexpr = acc.shape[1]
    gl.store(partial_ptr + gl.arange(0, BN * BM, part_layout(BM, BN // 16)), flat_of(acc, BN, BM, BN // 16))
    thread_barrier()
    return gl.atomic_add(counter_ptr, 1, sem="acq_rel")


@gluon.jit
def take_parts(acc, partial_ptr, stride, counter_ptr, parts):
    """acc [BN, BM] and the `parts` other parts of its tile's sums, when they are there; `stride` values lie between them.

    The counter is 0 again afterwards.
    """
    BN: gl.constexpr = acc.shape[0]
    BM: gl.constexpr = acc.shape[1]
    ACC: gl.constexpr = acc.type.layout
    if parts > 0:
        stored = gl.atomic_add(counter_ptr, 0, sem="acquire")
        while stored < parts:
            stored = gl.atomic_add(counter_ptr, 0, sem="acquire")
        gl.store(counter_ptr, 0)
    flat = flat_of(acc, BN, BM, BN // 16)
    part_ptr = partial_ptr + gl.arange(0, BN * BM, part_layout(BM, BN // 16))
    for _part in range(parts):
        flat += gl.load(part_ptr)
        part_ptr += stride
    return as_products(flat, BN, BM, BN // 16, ACC)


@gluon.jit
def _product_of(row, fold, DTYPE: gl.constexpr, FP8: gl.constexpr):
    """What products are multiplied by for all tokens alike: row scale and fold, or what decoding to 16 bits divides by."""
    if FP8:
        row *= fold
    elif gl.float16 == DTYPE:
        row *= 128.0
    else:
        row *= 256.0
    return row


@gluon.jit
def _load_factors(n, N, fold_ptr, row_ptr, row_stride, FP8: gl.constexpr):
    """Row scales and folds of features n, for `_product_of`."""
    row = gl.load(row_ptr + n * row_stride, mask=n < N, other=0.0)
    fold = row
    if FP8:
        fold = gl.load(fold_ptr + n, mask=n < N, other=0.0)
    return row, fold


@gluon.jit
def _rounded(sums, factor, token, bias, DTYPE: gl.constexpr, TOKEN: gl.constexpr, BIAS: gl.constexpr):
    """fp32 sums [n, m] times the factors of features and the scales of tokens, plus the bias, rounded once to DTYPE.

    token may lie otherwise than the columns of sums.
    """
    result = sums * factor[:, None]
    if TOKEN:
        result *= gl.convert_layout(token, gl.SliceLayout(0, sums.type.layout))[None, :]
    if BIAS:
        result += bias.to(gl.float32)[:, None]
    return result.to(DTYPE)


@gluon.jit
def scaled(
    acc, n, m, N, M, fold_ptr, row_ptr, token_ptr, bias_ptr, row_stride, token_stride,
    DTYPE: gl.constexpr, FP8: gl.constexpr, TOKEN: gl.constexpr, BIAS: gl.constexpr,
):  # fmt: skip
    """The epilogue's arithmetic on fp32 products [n, m]: row scale, token scale, bias; rounded once to DTYPE."""
    row, fold = _load_factors(n, N, fold_ptr, row_ptr, row_stride, FP8)
    result = acc * _product_of(row, fold, DTYPE, FP8)[:, None]
    # Loaded where they are used: loads before the product make another kernel, of other registers, for few rows.
    if TOKEN:
        result *= gl.load(token_ptr + m * token_stride, mask=m < M, other=0.0)[None, :]
    if BIAS:
        result += gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32)[:, None]
    return result.to(DTYPE)


@gluon.jit
def store_direct(result, out_ptr, n, m, N, M):
    """Values [n, m] to out [M, N]."""
    gl.store(out_ptr + m.to(gl.int64)[None, :] * N + n[:, None], result, mask=(m < M)[None, :] & (n < N)[:, None])


@gluon.jit
def store_bulk(result, out_desc, staging, at: gl.constexpr, n0, m0):
    """Values [features, tokens] to rows m0.., columns n0.. of out [M, N], transposed in rows `at`.. of staging."""
    BN: gl.constexpr = result.shape[0]
    TOKENS: gl.constexpr = result.shape[1]
    ROWS: gl.constexpr = out_desc.block_type.shape[0]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [BN // 16, 1], [16, TOKENS, 16])
    staging.slice(at, TOKENS, dim=0).permute((1, 0)).store(gl.convert_layout(result, LAYOUT))
    fence_async_shared()
    for i in gl.static_range(TOKENS // ROWS):
        tma_store(out_desc, [m0 + i * ROWS, n0], staging.slice(at + i * ROWS, ROWS, dim=0))


@gluon.jit
def pieces_of(values, PIECES: gl.constexpr):
    """[features, tokens] as a tuple of as many tensors, a power of two, of equally many tokens."""
    BN: gl.constexpr = values.shape[0]
    BM: gl.constexpr = values.shape[1]
    pieces = (values,)
    for level in gl.static_range(PIECES.bit_length() - 1):
        halved = ()
        for i in gl.static_range(1 << level):
            halved = halved + gl.split(gl.permute(gl.reshape(pieces[i], [BN, 2, BM >> (level + 1)]), [0, 2, 1]))  # type: ignore[assignment]
        pieces = halved  # type: ignore[assignment]
    return pieces


@gluon.jit
def load_scales(
    n0, m0, N, M, fold_ptr, row_ptr, token_ptr, bias_ptr, row_stride, token_stride,
    ACC: gl.constexpr, FP8: gl.constexpr, TOKEN: gl.constexpr, BIAS: gl.constexpr,
):  # fmt: skip
    """What `store_tile` multiplies a tile's sums [64, tokens] in ACC by, and adds to them: row scales, folds, token scales and
    bias, loaded while the tile is multiplied. A load that is waited for takes as long as the products of 128 values.
    """
    BM: gl.constexpr = ACC.instr_shape[1]
    n = n0 + gl.arange(0, 64, gl.SliceLayout(1, ACC))
    m = m0 + gl.arange(0, BM, gl.BlockedLayout([1], [32], [4], [0]))  # once for all of its columns
    row, fold = _load_factors(n, N, fold_ptr, row_ptr, row_stride, FP8)
    token = row
    if TOKEN:
        token = gl.load(token_ptr + m * token_stride, mask=m < M, other=0.0)
    bias = row
    if BIAS:
        bias = gl.load(bias_ptr + n, mask=n < N, other=0.0)
    return row, fold, token, bias


@gluon.jit
def store_tile(
    acc, scales, n0, m0, out_desc, staging, out_ptr, N, M, fold_ptr, row_ptr, token_ptr, bias_ptr, row_stride, token_stride,
    FP8: gl.constexpr, TOKEN: gl.constexpr, BIAS: gl.constexpr, BULK_STORE: gl.constexpr,
):  # fmt: skip
    """The epilogue of a whole tile: its sums [features, tokens] to rows m0.., columns n0.. of out [M, N], half at a time.

    scales: of `load_scales`, or None; what does not go in bulk is scaled by what is loaded here.
    """
    DTYPE: gl.constexpr = out_ptr.dtype.element_ty
    # What does not go in bulk goes in pieces: the addresses of one are out of the registers when the next one's are made.
    SCALED: gl.constexpr = 1 if BULK_STORE else 8
    TOKENS: gl.constexpr = acc.shape[1] // SCALED
    pieces = pieces_of(acc, SCALED)
    for i in gl.static_range(SCALED):
        n = n0 + gl.arange(0, acc.shape[0], gl.SliceLayout(1, pieces[i].type.layout))
        m = m0 + i * TOKENS + gl.arange(0, TOKENS, gl.SliceLayout(0, pieces[i].type.layout))
        if BULK_STORE and scales is not None:
            row, fold, token, bias = scales
            result = _rounded(acc, _product_of(row, fold, DTYPE, FP8), token, bias, DTYPE, TOKEN, BIAS)
        else:
            result = scaled(
                pieces[i], n, m, N, M, fold_ptr, row_ptr, token_ptr, bias_ptr, row_stride, token_stride, DTYPE, FP8, TOKEN, BIAS
            )
        if BULK_STORE:
            halves = pieces_of(result, 2)
            for half in gl.static_range(2):
                tma_store_wait(0)
                store_bulk(halves[half], out_desc, staging, 0, n0, m0 + half * acc.shape[1] // 2)
        else:
            store_direct(result, out_ptr, n, m, N, M)


@gluon.jit
def load_x(x_desc, x_ring, full, row, k, slot, pred):
    """x stage k, a box of x_desc, of rows `row`.. into `slot`."""
    bar = full.index(slot)
    mbarrier.expect(bar, x_desc.block_type.nbytes, pred=pred)
    tma_load(x_desc, [row, k * x_desc.block_type.shape[1]], bar, x_ring.index(slot), pred=pred)


@gluon.jit
def retire_products(
    token, x_desc, x_ring, x_full, x_empty, pair, x_phase, own_pair, own_phase, row, x_k, next_row, next_x_k, next_live, begun,
    INDEX: gl.constexpr, COUNT: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """What follows the products of an x stage where two groups of warps share a ring of two pairs of x stages.

    Waits for the products before them, which end with their x stage: both groups leave it. The group of parity HALF copies the
    stages of its parity, two further. INDEX of COUNT: the stage within its weight stage, whose first stage of this parity is
    x_k of rows row..; the next weight stage's is next_x_k of next_row... begun: some stage of the tile came before. Returns
    the sums and the places in the ring.
    """
    token = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[token]))
    # The products before these are done, in every warp once past the barrier.
    thread_barrier()
    left = 2 * (pair ^ 1) + 1 if INDEX % 2 == 0 else 2 * pair
    if INDEX == 0:
        mbarrier.arrive(x_empty.index(left), count=1, pred=begun)
    else:
        mbarrier.arrive(x_empty.index(left), count=1)
    if INDEX % 2 == HALF:
        free = 2 * own_pair + HALF
        mbarrier.wait(x_empty.index(free), own_phase)
        if INDEX + 2 < COUNT:
            load_x(x_desc, x_ring, x_full, row, x_k + 2, free, True)
        else:
            load_x(x_desc, x_ring, x_full, next_row, next_x_k, free, next_live)
        own_pair ^= 1
        if own_pair == 0:
            own_phase ^= 1
    if INDEX % 2 == 1:
        pair ^= 1
        if pair == 0:
            x_phase ^= 1
    return token, pair, x_phase, own_pair, own_phase


@gluon.constexpr_function
def part_layout(bm, warps):
    """How [16 * warps * bm] values lie in an accumulator: registers m0 n3, lanes m1 m2 n0 n1 n2, warps n4.., registers m3.."""
    return gl.DistributedLinearLayout(
        [[1], [2], *([128 * warps << i] for i in range((bm // 8).bit_length() - 1))],
        [[4 << i] for i in range(5)],
        [[128 << i] for i in range(warps.bit_length() - 1)],
        [],
        [16 * warps * bm],
    )


@gluon.jit
def flat_of(acc, BN: gl.constexpr, BM: gl.constexpr, WARPS: gl.constexpr):
    """acc [BN, BM] in the order of `part_layout`."""
    flat = gl.permute(gl.reshape(acc, [WARPS, 2, 8, BM // 8, 4, 2]), [3, 0, 2, 4, 1, 5])
    return gl.convert_layout(gl.reshape(flat, [BN * BM]), part_layout(BM, WARPS), assert_trivial=True)


@gluon.jit
def as_products(flat, BN: gl.constexpr, BM: gl.constexpr, WARPS: gl.constexpr, LAYOUT: gl.constexpr):
    values = gl.permute(gl.reshape(flat, [BM // 8, WARPS, 8, 4, 2, 2]), [1, 4, 2, 0, 3, 5])
    return gl.convert_layout(gl.reshape(values, [BN, BM]), LAYOUT, assert_trivial=True)


@gluon.jit
def sum_parts(acc, partial_ptr, count_ptr, tile, unit, split, BN: gl.constexpr, BM: gl.constexpr, WARPS: gl.constexpr):
    """Split-K: store acc [BN, BM], the part `unit` of `tile`; (is this block the tile's last?, then the sum of all parts).

    The parts tile * split .. + split - 1 are added in this order. A part lies in partial as its threads hold it, in 16-byte
    pieces; the tile's counter is 0 again afterwards.
    """
    ACC: gl.constexpr = acc.type.layout
    FLAT: gl.constexpr = part_layout(BM, WARPS)
    flat = flat_of(acc, BN, BM, WARPS)
    offsets = gl.arange(0, BN * BM, FLAT)
    last = give_part(acc, partial_ptr + unit.to(gl.int64) * (BN * BM), count_ptr + tile) == split - 1
    if last:
        gl.store(count_ptr + tile, 0)
        part_ptr = partial_ptr + (tile * split).to(gl.int64) * (BN * BM) + offsets
        # Several at a time: what counts is how much is on its way. 32 registers hold them.
        AT_ONCE: gl.constexpr = max(1, min(8, 1024 * WARPS // (BN * BM)))
        flat = gl.load(part_ptr)
        for part in range(1, split, AT_ONCE):
            loaded = ()
            for i in gl.static_range(AT_ONCE):
                mask = (offsets >= 0) & (part + i < split)
                values = gl.load(part_ptr + (part + i) * (BN * BM), mask=mask, other=0.0)
                loaded = loaded + (values,)  # type: ignore[assignment]  # noqa: RUF005
            for i in gl.static_range(AT_ONCE):
                flat += loaded[i]
    return last, as_products(flat, BN, BM, WARPS, ACC)


@gluon.jit
def add_parts(
    acc, partial_ptr, count_ptr, tile, share, split, n0, m0, out_desc, staging, out_ptr,
    N, M, fold_ptr, row_ptr, token_ptr, bias_ptr, row_stride, token_stride,
    FP8: gl.constexpr, TOKEN: gl.constexpr, BIAS: gl.constexpr, BULK_STORE: gl.constexpr,
):  # fmt: skip
    """Split-K for large tiles: acc [BN, BM] is one of `split` parts of a tile's sums; together their blocks write the tile.

    Each block adds up, and writes, an eighth of the tokens or several: its own part is still in registers, the others' come
    through memory. So the blocks of a tile wait for each other. They are neighbours, and blocks start in order: wherever there
    is room for `split` of them, beside whatever else runs, all tiles come to an end. partial: fp32 [tiles * split * BN * BM];
    count: int32 [2 * tiles], zeros before and afterwards.
    """
    BN: gl.constexpr = acc.shape[0]
    BM: gl.constexpr = acc.shape[1]
    DTYPE: gl.constexpr = out_ptr.dtype.element_ty
    WARPS: gl.constexpr = BN // 16
    TOKENS: gl.constexpr = BM // 8
    AT_ONCE: gl.constexpr = 3  # what counts is how much is on its way
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TOKENS, 32 if FP8 else 16])
    offsets = gl.arange(0, BN * TOKENS, part_layout(TOKENS, WARPS))
    parts_ptr = partial_ptr + (tile * split).to(gl.int64) * (BN * BM) + offsets
    pieces = pieces_of(acc, 8)
    for i in gl.static_range(8):
        if i * split // 8 != share:
            gl.store(parts_ptr + share * (BN * BM) + i * BN * TOKENS, flat_of(pieces[i], BN, TOKENS, WARPS))
    thread_barrier()
    stored = gl.atomic_add(count_ptr + 2 * tile, 1, sem="acq_rel") + 1
    n = n0 + gl.arange(0, BN, gl.SliceLayout(1, LAYOUT))
    row, fold = _load_factors(n, N, fold_ptr, row_ptr, row_stride, FP8)
    factor = _product_of(row, fold, DTYPE, FP8)
    bias = row
    if BIAS:
        bias = gl.load(bias_ptr + n, mask=n < N, other=0.0)
    while stored < split:
        stored = gl.atomic_add(count_ptr + 2 * tile, 0, sem="acquire")
    for i in range((share * 8 + split - 1) // split, ((share + 1) * 8 + split - 1) // split):
        m = m0 + i * TOKENS + gl.arange(0, TOKENS, gl.SliceLayout(0, LAYOUT))
        scale = row
        if TOKEN:
            scale = gl.load(token_ptr + m * token_stride, mask=m < M, other=0.0)
        own = pieces[0]
        for k in gl.static_range(1, 8):
            own = gl.where(i == k, pieces[k], own)
        total = flat_of(own, BN, TOKENS, WARPS)
        # In an order that depends on the piece alone.
        for j in range(0, split - 1, AT_ONCE):
            loaded = ()
            for k in gl.static_range(AT_ONCE):
                part = j + k + (j + k >= share).to(gl.int32)
                mask = offsets >= (j + k - split + 2) * BN * TOKENS  # all, or none of them
                values = gl.load(parts_ptr + part * (BN * BM) + i * BN * TOKENS, mask=mask, other=0.0)
                loaded = loaded + (values,)  # type: ignore[assignment]  # noqa: RUF005
            for k in gl.static_range(AT_ONCE):
                total += loaded[k]
        result = _rounded(as_products(total, BN, TOKENS, WARPS, LAYOUT), factor, scale, bias, DTYPE, TOKEN, BIAS)
        if BULK_STORE:
            tma_store_wait(0)
            store_bulk(result, out_desc, staging, 0, n0, m0 + i * TOKENS)
        else:
            store_direct(result, out_ptr, n, m, N, M)
    # The last block to leave zeros the counters.
    if gl.atomic_add(count_ptr + 2 * tile + 1, 1, sem="acq_rel") == split - 1:
        gl.store(count_ptr + 2 * tile, 0)
        gl.store(count_ptr + 2 * tile + 1, 0)
