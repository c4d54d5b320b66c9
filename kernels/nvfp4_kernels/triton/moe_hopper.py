"""What the grouped GEMMs for Hopper share: the operand trick of hopper.py with an expert in front, their loads and epilogue.

A tile is BM permuted rows of one expert times 16 output features a warp. A fragment of 16 weight rows is made of 8 rows from
each of two places: for GEMM 1 with a gated activation 8 of the gate and the same 8 of the up projection, which then meet in
one thread's registers, and the epilogue forms act(gate) * up without an exchange.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .activation_hopper import silu_times
from .gluon_compat import copy_async, reinterpret, tma_load
from .hopper import pairs_of_fold
from .moe_combine import gated, ungated


@gluon.constexpr_function
def _warp_rows(rows, warps):
    """Where warps lie along the rows: `rows` apart."""
    return [[rows * 2**i, 0] for i in range(warps.bit_length() - 1)]


@gluon.constexpr_function
def _words_layout(warps):
    """Packed weights [16 * warps, 16 words] as the operand's threads hold them."""
    lanes = [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([[0, 1], [0, 2], [8, 0]], lanes, _warp_rows(16, warps), [], [16 * warps, 16])


@gluon.constexpr_function
def _loaded_words_layout(warps):
    """The same words as they lie in shared memory: the first 8 rows of all fragments, then their last 8."""
    lanes = [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([[0, 1], [0, 2], [8 * warps, 0]], lanes, _warp_rows(8, warps), [], [16 * warps, 16])


@gluon.constexpr_function
def pairs_layout(warps):
    """Scale pairs [16 * warps, 4]."""
    lanes = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([[8, 0]], lanes, _warp_rows(16, warps), [], [16 * warps, 4])


@gluon.constexpr_function
def _loaded_pairs_layout(warps):
    lanes = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([[8 * warps, 0]], lanes, _warp_rows(8, warps), [], [16 * warps, 4])


@gluon.constexpr_function
def rows_layout(columns, warps, operand_order):
    """How a tile's results [rows, columns] are stored."""
    vector = columns // 16 if operand_order else 8
    return gl.BlockedLayout([1, vector], [32 * vector // columns, columns // vector], [warps, 1], [1, 0])


@gluon.jit
def weight_rows(column0, second, WARPS: gl.constexpr, LAYOUT: gl.constexpr):
    """The expert's weight row behind each fragment row: 0..7 of a fragment lie from column0 on, 8..15 `second` further."""
    fragment = gl.arange(0, 16 * WARPS, gl.SliceLayout(1, LAYOUT))
    return column0 + fragment // 16 * 8 + fragment % 8 + (fragment // 8) % 2 * second


@gluon.jit
def load_weights(w_desc, s_desc, words, scales, bar, expert, column, k, stage, pred, MORE_BYTES: gl.constexpr = 0):
    """Weight stage k (256 values of K) of an expert's rows for columns `column`.. of the result, into slot `stage`.

    MORE_BYTES come on `bar`, too.
    """
    PARTS: gl.constexpr = w_desc.block_type.shape[0]
    BOX: gl.constexpr = w_desc.block_type.shape[2]
    BOXES: gl.constexpr = 32 // BOX
    mbarrier.expect(bar, BOXES * w_desc.block_type.nbytes + s_desc.block_type.nbytes + MORE_BYTES, pred=pred)
    for box in gl.static_range(BOXES):
        tma_load(w_desc, [expert * PARTS, column, k * 32 + box * BOX], bar, words.index(stage * BOXES + box), pred=pred)
    tma_load(s_desc, [expert * PARTS, column, k * 8], bar, scales.index(stage), pred=pred)


@gluon.constexpr_function
def _gather_layout(bits, warps):
    """How threads copy rows of 128 bytes, 16 of them each, of values of `bits`."""
    return gl.BlockedLayout([1, 128 // bits], [4, 8], [warps, 1], [1, 0])


@gluon.jit
def rows_of_x(x_ptr, live_ptr, m0, K, BM: gl.constexpr, WARPS: gl.constexpr):
    """What `load_x` finds BM permuted rows from m0 on by: m0; with x_ptr, where their tokens begin, in units of 16 bytes.

    Less than 0 for padding.
    """
    if x_ptr is None:
        return m0
    else:
        BITS: gl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth
        token = gl.load(live_ptr + m0 + gl.arange(0, BM, gl.SliceLayout(1, _gather_layout(BITS, WARPS))))
        return token * (K * BITS // 128)


@gluon.jit
def load_x(x_desc, x_ptr, rows, x_ring, bars, k, stage, WARPS: gl.constexpr, pred):
    """x stage k (128 bytes of each of the `rows` of `rows_of_x`) into slot `stage`.

    Rows that lie together are copied in bulk; others by all threads, 16 bytes at a time, each of which arrives at the barrier.
    Padding is filled with zeros: any one row that all padding read would be in the way of the others.
    """
    XK: gl.constexpr = x_desc.block_type.shape[1]
    if x_ptr is None:
        mbarrier.expect(bars.index(stage), x_desc.block_type.nbytes, pred=pred)
        tma_load(x_desc, [rows, k * XK], bars.index(stage), x_ring.index(stage), pred=pred)
    else:
        LAYOUT: gl.constexpr = _gather_layout(x_ptr.dtype.element_ty.primitive_bitwidth, WARPS)
        at = (rows + k * 8).to(gl.int64) * LAYOUT.size_per_thread[1]
        pointers = x_ptr + at[:, None] + gl.arange(0, XK, gl.SliceLayout(0, LAYOUT))[None, :]
        copy_async(x_ring.index(stage), pointers, mask=(rows >= 0)[:, None] & pred)
        async_copy.mbarrier_arrive(bars.index(stage), increment_count=False)


@gluon.jit
def _as_fragments(loaded, WARPS: gl.constexpr, LAYOUT: gl.constexpr):
    """[16 * WARPS, columns] from shared memory to fragments: 8 rows of the first half, 8 rows of the second, in turns."""
    COLUMNS: gl.constexpr = loaded.shape[1]
    rows = gl.permute(gl.reshape(loaded, [2, WARPS, 8, COLUMNS]), [1, 0, 2, 3])
    return gl.convert_layout(gl.reshape(rows, [16 * WARPS, COLUMNS]), LAYOUT, assert_trivial=True)


@gluon.jit
def words_of_slot(words, slot, chunk: gl.constexpr, WARPS: gl.constexpr):
    """Words [16 * WARPS, 16] of 128 values of K, from shared memory."""
    if words.shape[2] == 16:  # noqa: SIM108
        loaded = words.index(slot * 2 + chunk)
    else:
        loaded = words.index(slot).slice(16 * chunk, 16, dim=1)
    return _as_fragments(loaded.load(_loaded_words_layout(WARPS)), WARPS, _words_layout(WARPS))


@gluon.jit
def scales_of_slot(scales, slot, chunk: gl.constexpr, WARPS: gl.constexpr):
    """Scale pairs [16 * WARPS, 4] of 128 values of K, from shared memory."""
    loaded = scales.index(slot).slice(4 * chunk, 4, dim=1).load(_loaded_pairs_layout(WARPS))
    return _as_fragments(loaded, WARPS, pairs_layout(WARPS))


@gluon.jit
def weight_slots(w_desc, s_desc, STAGES: gl.constexpr, WARPS: gl.constexpr):
    """Shared memory for `STAGES` weight stages: words and scales as copies fill them, then as warps read them."""
    PARTS: gl.constexpr = w_desc.block_type.shape[0]
    BOX: gl.constexpr = w_desc.block_type.shape[2]
    ROWS: gl.constexpr = 16 * WARPS
    words = gl.allocate_shared_memory(gl.int32, [STAGES * 32 // BOX, PARTS, ROWS // PARTS, BOX], w_desc.layout)
    read_words = reinterpret(words, gl.int32, [STAGES * 32 // BOX, ROWS, BOX], gl.NVMMASharedLayout(4 * BOX, 32, 2))
    scales = gl.allocate_shared_memory(gl.int16, [STAGES, PARTS, ROWS // PARTS, 8], s_desc.layout)
    read_scales = reinterpret(scales, gl.int16, [STAGES, ROWS, 8], gl.NVMMASharedLayout(0, 16, 2))
    return words, scales, read_words, read_scales


@gluon.jit
def load_fold(fold_ptr, expert, column0, second, N, WARPS: gl.constexpr):
    """2^fold of the tile's rows, for `hopper.pairs_of_fold`."""
    row = weight_rows(column0, second, WARPS, pairs_layout(WARPS))
    return gl.load(fold_ptr + (expert.to(gl.int64) * N + row), mask=row < N, other=1.0)


@gluon.jit
def fold_pairs(fold_ptr, expert, column0, second, N, WARPS: gl.constexpr):
    """`pairs_of_fold` of the tile's rows."""
    return pairs_of_fold(load_fold(fold_ptr, expert, column0, second, N, WARPS), pairs_layout(WARPS))


@gluon.jit
def load_factors(
    row_ptr, fold_ptr, input_scale_ptr, expert, row, N, row_expert, row_stride, input_scale_expert, FP8: gl.constexpr
):  # fmt: skip
    """What the products of weight rows `row` are multiplied by, for all tokens alike: three factors, loaded."""
    scale = gl.load(row_ptr + expert.to(gl.int64) * row_expert + row * row_stride, mask=row < N, other=0.0)
    fold = scale
    if FP8:
        fold = gl.load(fold_ptr + (expert.to(gl.int64) * N + row), mask=row < N, other=0.0)
    input_scale = 1.0
    if input_scale_ptr is not None:
        input_scale = gl.load(input_scale_ptr + expert * input_scale_expert)
    return scale, fold, input_scale


@gluon.jit
def product_of(factors, FP8: gl.constexpr, FP16: gl.constexpr):
    """The factors of `load_factors`, and that of the decoded weights in 16 bits, in one."""
    scale, fold, input_scale = factors
    if FP8:
        scale *= fold
    elif FP16:
        scale *= 128.0
    else:
        scale *= 256.0
    return scale * input_scale


@gluon.jit
def row_factor(
    row_ptr, fold_ptr, input_scale_ptr, expert, row, N, row_expert, row_stride, input_scale_expert,
    FP8: gl.constexpr, FP16: gl.constexpr,
):  # fmt: skip
    """What the products of weight rows `row` are multiplied by, for all tokens alike."""
    factors = load_factors(row_ptr, fold_ptr, input_scale_ptr, expert, row, N, row_expert, row_stride, input_scale_expert, FP8)
    return product_of(factors, FP8, FP16)


@gluon.jit
def token_scales(token_ptr, live_ptr, m0, GATHER: gl.constexpr, BM: gl.constexpr, LAYOUT: gl.constexpr):
    """The scales of BM permuted rows from m0 on, [BM] along the columns of LAYOUT; ones where they have none.

    GATHER: token_ptr has those of tokens, not of permuted rows.
    """
    scale = gl.full([BM], 1.0, gl.float32, gl.SliceLayout(0, LAYOUT))
    if token_ptr is not None:
        row = gl.arange(0, BM, gl.SliceLayout(0, LAYOUT))
        if GATHER:  # noqa: SIM108
            scale = gl.load(token_ptr + gl.maximum(gl.load(live_ptr + m0 + row), 0))
        else:
            scale = gl.load(token_ptr + m0 + row)
    return scale


@gluon.jit
def live_rows(live_ptr, m0, BM: gl.constexpr, COLUMNS: gl.constexpr, WARPS: gl.constexpr, OPERAND_ORDER: gl.constexpr):
    """Which of BM rows from m0 on are no padding; live_ptr: permuted_idx_to_token."""
    row = m0 + gl.arange(0, BM, gl.SliceLayout(1, rows_layout(COLUMNS, WARPS, OPERAND_ORDER)))
    return gl.load(live_ptr + row) >= 0


@gluon.jit
def activated(
    acc, factor, token_scale, bias_ptr, expert, row, N, DTYPE: gl.constexpr, WARPS: gl.constexpr, ACT: gl.constexpr,
    ACT_FN: gl.constexpr,
):  # fmt: skip
    """Scale, bias, rounding and activation function of products [16 * WARPS, BM]: [columns of the result, BM]."""
    BM: gl.constexpr = acc.shape[1]
    COLUMNS: gl.constexpr = 8 * WARPS if ACT == 2 else 16 * WARPS
    result = acc * factor[:, None] * token_scale[None, :]
    if bias_ptr is not None:
        bias = gl.load(bias_ptr + (expert.to(gl.int64) * N + row), mask=row < N, other=0.0)
        result += bias.to(gl.float32)[:, None]
    result = gl.reshape(result.to(DTYPE), [WARPS, 2, 8, BM])
    if ACT == 2:
        gate, up = gl.split(gl.permute(result.to(gl.float32), [0, 2, 3, 1]))
        if ACT_FN == "silu":  # noqa: SIM108
            h = silu_times(gate, up, DTYPE)
        else:
            h = gated(gate, up, ACT_FN).to(DTYPE)
        values = gl.reshape(h, [COLUMNS, BM])
    else:
        values = gl.reshape(gl.permute(result, [1, 0, 2, 3]), [COLUMNS, BM])
        if ACT == 1:
            values = ungated(values.to(gl.float32), ACT_FN).to(DTYPE)
    return values


@gluon.jit
def store_rows(
    values, live, out_ptr, n_tile, m0, width, out_stride, WARPS: gl.constexpr, OPERAND_ORDER: gl.constexpr
):  # fmt: skip
    """Values [columns, BM] of tile `n_tile` along the `width` columns to the rows m0.. of out that are `live`."""
    COLUMNS: gl.constexpr = values.shape[0]
    BM: gl.constexpr = values.shape[1]
    values = gl.permute(values, [1, 0])
    if OPERAND_ORDER:
        # The next GEMM reads whole stages: zeros follow the row.
        VALUES: gl.constexpr = values.type.layout
        inside = n_tile * COLUMNS + gl.arange(0, COLUMNS, gl.SliceLayout(0, VALUES)) < width
        values = gl.where(inside[None, :], values, 0.0)
    if OPERAND_ORDER:
        VECTOR: gl.constexpr = COLUMNS // 16
        # t word h j -> word j t h, for the part of t that the tile holds: COLUMNS / 16 neighbours stay together.
        values = gl.permute(gl.reshape(values, [BM, COLUMNS // 32, 4, 2, 4]), [0, 2, 4, 1, 3])
        values = gl.reshape(values, [BM, COLUMNS])
    ROWS: gl.constexpr = rows_layout(COLUMNS, WARPS, OPERAND_ORDER)
    values = gl.convert_layout(values, ROWS)
    out_row = (m0 + gl.arange(0, BM, gl.SliceLayout(1, ROWS))).to(gl.int64)
    column = gl.arange(0, COLUMNS, gl.SliceLayout(0, ROWS))
    if OPERAND_ORDER:
        PARTS: gl.constexpr = 128 // COLUMNS
        column = n_tile // PARTS * 128 + n_tile % PARTS * VECTOR + column // VECTOR * 8 + column % VECTOR
        gl.store(out_ptr + out_row[:, None] * out_stride + column[None, :], values, mask=live[:, None])
    else:
        column = n_tile * COLUMNS + column
        inside = (column < width)[None, :]
        gl.store(out_ptr + out_row[:, None] * out_stride + column[None, :], values, mask=live[:, None] & inside)


@gluon.jit
def finish(
    acc, factor, token_scale, live, out_ptr, bias_ptr, expert, row, n_tile, m0, N, out_stride,
    BM: gl.constexpr, WARPS: gl.constexpr, ACT: gl.constexpr, ACT_FN: gl.constexpr, OPERAND_ORDER: gl.constexpr,
):  # fmt: skip
    """`activated` products [16 * WARPS, BM], stored."""
    values = activated(acc, factor, token_scale, bias_ptr, expert, row, N, out_ptr.dtype.element_ty, WARPS, ACT, ACT_FN)
    store_rows(values, live, out_ptr, n_tile, m0, N // 2 if ACT == 2 else N, out_stride, WARPS, OPERAND_ORDER)


@gluon.jit
def load_stage_x(x_desc, x_ring, bar, m0, k, stage, pred):
    """x of stage k, 256 values of K, on the barrier of the stage's weights, which expects its bytes."""
    XK: gl.constexpr = x_desc.block_type.shape[1]
    for part in gl.static_range(256 // XK):
        slot = x_ring.index(stage * (256 // XK) + part)
        tma_load(x_desc, [m0, k * 256 + part * XK], bar, slot, pred=pred)
