"""Grouped GEMM for Hopper: the operand trick of hopper.py with a tile -> expert map in front.

A thread block owns one tile: BM permuted rows of one expert times 16 output features a warp. Two blocks share a
multiprocessor, so that one decodes while the other's products run. A fragment of 16 weight rows is made of 8 rows from each
of two places: for GEMM 1 with a gated activation 8 of the gate and the same 8 of the up projection, which then meet in one
thread's registers, and the epilogue forms act(gate) * up without an exchange.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..devices import arch_of, processors_of
from ..reference.moe import UNGATED
from ..reference.moe_routing import Routing
from .descriptors import descriptor
from .gluon_compat import copy_async, reinterpret, thread_barrier, tma_load
from .hopper import (
    burst_of,
    decode_16,
    decode_fp8,
    decode_word_fp8,
    halves,
    part_of,
    scale_pairs,
    scale_tables,
    sum_parts,
    tile_of,
)
from .launch import cdiv, launch
from .moe_combine import gated, ungated
from .moe_gemm import ExpertWeights
from .moe_operand import whole_stages
from .workspace import split_k


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
def _pairs_layout(warps):
    """Scale pairs [16 * warps, 4]."""
    lanes = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([[8, 0]], lanes, _warp_rows(16, warps), [], [16 * warps, 4])


@gluon.constexpr_function
def _loaded_pairs_layout(warps):
    lanes = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([[8 * warps, 0]], lanes, _warp_rows(8, warps), [], [16 * warps, 4])


@gluon.constexpr_function
def _rows_layout(columns, warps, operand_order):
    """How a tile's results [rows, columns] are stored."""
    vector = columns // 16 if operand_order else 8
    return gl.BlockedLayout([1, vector], [32 * vector // columns, columns // vector], [warps, 1], [1, 0])


@gluon.jit
def _weight_rows(column0, second, WARPS: gl.constexpr, LAYOUT: gl.constexpr):
    """The expert's weight row behind each fragment row: 0..7 of a fragment lie from column0 on, 8..15 `second` further."""
    fragment = gl.arange(0, 16 * WARPS, gl.SliceLayout(1, LAYOUT))
    return column0 + fragment // 16 * 8 + fragment % 8 + (fragment // 8) % 2 * second


@gluon.jit
def _load_weights(w_desc, s_desc, words, scales, bar, expert, column, k, stage, pred, MORE_BYTES: gl.constexpr = 0):
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
def _rows_of_x(x_ptr, live_ptr, m0, K, BM: gl.constexpr, WARPS: gl.constexpr):
    """What `_load_x` finds BM permuted rows from m0 on by: m0; with x_ptr, where their tokens begin, in units of 16 bytes.

    Less than 0 for padding.
    """
    if x_ptr is None:
        return m0
    else:
        BITS: gl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth
        token = gl.load(live_ptr + m0 + gl.arange(0, BM, gl.SliceLayout(1, _gather_layout(BITS, WARPS))))
        return token * (K * BITS // 128)


@gluon.jit
def _load_x(x_desc, x_ptr, rows, x_ring, bars, k, stage, WARPS: gl.constexpr, pred):
    """x stage k (128 bytes of each of the `rows` of `_rows_of_x`) into slot `stage`.

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
def _read_words(words, slot, chunk: gl.constexpr, WARPS: gl.constexpr):
    """Words [16 * WARPS, 16] of 128 values of K, from shared memory."""
    if words.shape[2] == 16:  # noqa: SIM108
        loaded = words.index(slot * 2 + chunk)
    else:
        loaded = words.index(slot).slice(16 * chunk, 16, dim=1)
    return _as_fragments(loaded.load(_loaded_words_layout(WARPS)), WARPS, _words_layout(WARPS))


@gluon.jit
def _read_scales(scales, slot, chunk: gl.constexpr, WARPS: gl.constexpr):
    """Scale pairs [16 * WARPS, 4] of 128 values of K, from shared memory."""
    loaded = scales.index(slot).slice(4 * chunk, 4, dim=1).load(_loaded_pairs_layout(WARPS))
    return _as_fragments(loaded, WARPS, _pairs_layout(WARPS))


@gluon.jit
def _weight_slots(w_desc, s_desc, STAGES: gl.constexpr, WARPS: gl.constexpr):
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
def _fold_pairs(fold_ptr, expert, column0, second, N, WARPS: gl.constexpr):
    """2^-fold of the tile's rows as pairs of f16, int32 [16 * WARPS, 4]. A fold is a power of two from 2^-15 to 2^3: exact."""
    LAYOUT: gl.constexpr = _pairs_layout(WARPS)
    row = _weight_rows(column0, second, WARPS, LAYOUT)
    inverse = 1.0 / gl.load(fold_ptr + (expert.to(gl.int64) * N + row), mask=row < N, other=1.0)
    bits = inverse.to(gl.float16).to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
    pairs, _ = gl.broadcast(gl.expand_dims(bits | (bits << 16), 1), gl.zeros([16 * WARPS, 4], gl.int32, LAYOUT))
    return pairs


@gluon.jit
def _row_factor(
    row_ptr, fold_ptr, input_scale_ptr, expert, row, N, row_expert, row_stride, input_scale_expert,
    FP8: gl.constexpr, FP16: gl.constexpr,
):  # fmt: skip
    """What the products of weight rows `row` are multiplied by, for all tokens alike."""
    factor = gl.load(row_ptr + expert.to(gl.int64) * row_expert + row * row_stride, mask=row < N, other=0.0)
    if FP8:
        factor *= gl.load(fold_ptr + (expert.to(gl.int64) * N + row), mask=row < N, other=0.0)
    elif FP16:
        factor *= 128.0
    else:
        factor *= 256.0
    if input_scale_ptr is not None:
        factor *= gl.load(input_scale_ptr + expert * input_scale_expert)
    return factor


@gluon.jit
def _token_scale(token_ptr, live_ptr, m0, GATHER: gl.constexpr, BM: gl.constexpr, LAYOUT: gl.constexpr):
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
def _live(live_ptr, m0, BM: gl.constexpr, COLUMNS: gl.constexpr, WARPS: gl.constexpr, OPERAND_ORDER: gl.constexpr):
    """Which of BM rows from m0 on are no padding; live_ptr: permuted_idx_to_token."""
    row = m0 + gl.arange(0, BM, gl.SliceLayout(1, _rows_layout(COLUMNS, WARPS, OPERAND_ORDER)))
    return gl.load(live_ptr + row) >= 0


@gluon.jit
def _finish(
    acc, factor, token_scale, live, out_ptr, bias_ptr, expert, row, n_tile, m0, N, out_stride,
    BM: gl.constexpr, WARPS: gl.constexpr, ACT: gl.constexpr, ACT_FN: gl.constexpr, OPERAND_ORDER: gl.constexpr,
):  # fmt: skip
    """Scale, bias, rounding and activation function of products [16 * WARPS, BM]; the rows that are `live` go to `out`."""
    DTYPE: gl.constexpr = out_ptr.dtype.element_ty
    COLUMNS: gl.constexpr = 8 * WARPS if ACT == 2 else 16 * WARPS
    result = acc * factor[:, None] * token_scale[None, :]
    if bias_ptr is not None:
        bias = gl.load(bias_ptr + (expert.to(gl.int64) * N + row), mask=row < N, other=0.0)
        result += bias.to(gl.float32)[:, None]
    result = gl.reshape(result.to(DTYPE), [WARPS, 2, 8, BM])
    if ACT == 2:
        gate, up = gl.split(gl.permute(result.to(gl.float32), [0, 2, 3, 1]))
        values = gl.reshape(gated(gate, up, ACT_FN).to(DTYPE), [COLUMNS, BM])
    else:
        values = gl.reshape(gl.permute(result, [1, 0, 2, 3]), [COLUMNS, BM])
        if ACT == 1:
            values = ungated(values.to(gl.float32), ACT_FN).to(DTYPE)
    values = gl.permute(values, [1, 0])
    width = N // 2 if ACT == 2 else N
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
    ROWS: gl.constexpr = _rows_layout(COLUMNS, WARPS, OPERAND_ORDER)
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
def _word(words, word: gl.constexpr, BN: gl.constexpr, WARPS: gl.constexpr):
    """Word 0 to 3 of every thread, int32 [BN, 4], of words [BN, 16]."""
    first, second = halves(words, BN)
    even, odd = gl.split(first if word < 2 else second)
    return gl.convert_layout(even if word % 2 == 0 else odd, _pairs_layout(WARPS), assert_trivial=True)


@gluon.jit
def _one_tile(
    w_desc, s_desc, x_desc, x_ptr, out_ptr, fold_ptr, row_ptr, token_ptr, input_scale_ptr, bias_ptr, live_ptr,
    words, scales, read_words, read_scales, x_ring, w_bars, x_bars, fold, expert, n_tile, m0, rows, N, out_stride, k_stages,
    row_expert, row_stride, input_scale_expert,
    BM: gl.constexpr, WARPS: gl.constexpr, WEIGHT_STAGES: gl.constexpr, X_STAGES: gl.constexpr,
    ACT: gl.constexpr, ACT_FN: gl.constexpr, OPERAND_ORDER: gl.constexpr, BY_WORD: gl.constexpr,
):  # fmt: skip
    """Products and epilogue of `grouped_gemm_kernel`, whose first stages are on their way."""
    BN: gl.constexpr = 16 * WARPS
    FP8: gl.constexpr = x_desc.dtype == gl.float8e4nv
    FP16: gl.constexpr = x_desc.dtype == gl.float16
    XK: gl.constexpr = 128 if FP8 else 64
    PER_STAGE: gl.constexpr = 256 // XK
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BM, 32 if FP8 else 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, ACC, 4 if FP8 else 2)
    COLUMNS: gl.constexpr = BN // 2 if ACT == 2 else BN
    column0 = n_tile * COLUMNS
    second = N // 2 if ACT == 2 else BN // 2
    x_stages = k_stages * PER_STAGE

    token = warpgroup_mma_init(gl.zeros([BN, BM], gl.float32, ACC))
    x_step = 0
    for stage in range(k_stages):
        # Every warp is past the last barrier, so past its reads of the stage before: that slot is free.
        ahead_w = stage + WEIGHT_STAGES - 1
        free = ahead_w % WEIGHT_STAGES
        _load_weights(w_desc, s_desc, words, scales, w_bars.index(free), expert, column0, ahead_w, free, ahead_w < k_stages)
        slot = stage % WEIGHT_STAGES
        mbarrier.wait(w_bars.index(slot), (stage // WEIGHT_STAGES) & 1)
        for chunk in gl.static_range(2):
            w = _read_words(read_words, slot, chunk, WARPS)
            s = _read_scales(read_scales, slot, chunk, WARPS)
            if not FP8:
                s_first, s_second = scale_pairs(s, FP16)
                w_first, w_second = halves(w, BN)
            if BY_WORD:
                low_first, high_first, low_second, high_second = scale_tables(s, fold)
            for half in gl.static_range(PER_STAGE // 2):
                x_slot = x_step % X_STAGES
                ahead = x_step + X_STAGES - 1
                x = x_ring.index(x_slot).permute((1, 0))
                if BY_WORD:
                    mbarrier.wait(x_bars.index(x_slot), (x_step // X_STAGES) & 1)
                    if x_ptr is not None:
                        fence_async_shared()  # threads wrote the stage, tensor cores read it
                    for word in gl.static_range(4):
                        low = low_first if word < 2 else low_second
                        high = high_first if word < 2 else high_second
                        a = decode_word_fp8(_word(w, word, BN, WARPS), low, high, BN, OPERAND)
                        token = warpgroup_mma(a, x.slice(32 * word, 32, dim=0), token, is_async=True)
                        token = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[token]))
                        if word == 0:
                            # The products before these are done, in every warp once past the barrier: their x stage is free.
                            thread_barrier()
                            _load_x(x_desc, x_ptr, rows, x_ring, x_bars, ahead, ahead % X_STAGES, WARPS, ahead < x_stages)
                else:
                    if FP8:
                        a = decode_fp8(w, s, fold, BN, OPERAND)
                    else:
                        a = decode_16(w_first if half == 0 else w_second, s_first if half == 0 else s_second, BN, OPERAND, FP16)
                    mbarrier.wait(x_bars.index(x_slot), (x_step // X_STAGES) & 1)
                    if x_ptr is not None:
                        fence_async_shared()  # threads wrote the stage, tensor cores read it
                    token = warpgroup_mma(a, x, token, is_async=True)
                    token = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[token]))
                    thread_barrier()
                    _load_x(x_desc, x_ptr, rows, x_ring, x_bars, ahead, ahead % X_STAGES, WARPS, ahead < x_stages)
                x_step += 1
    acc = warpgroup_mma_wait(0, deps=[token])
    if x_ptr is not None:
        # Copies past the last stage write zeros to slots whose memory the epilogue uses again.
        async_copy.commit_group()
        async_copy.wait_group(0)
        thread_barrier()

    row = _weight_rows(column0, second, WARPS, ACC)
    factor = _row_factor(
        row_ptr, fold_ptr, input_scale_ptr, expert, row, N, row_expert, row_stride, input_scale_expert, FP8, FP16
    )
    live = _live(live_ptr, m0, BM, COLUMNS, WARPS, OPERAND_ORDER)
    token_scale = _token_scale(token_ptr, live_ptr, m0, x_ptr is not None, BM, ACC)
    _finish(
        acc, factor, token_scale, live, out_ptr, bias_ptr, expert, row, n_tile, m0,
        N, out_stride, BM, WARPS, ACT, ACT_FN, OPERAND_ORDER,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["n_tiles"])
def grouped_gemm_kernel(
    w_desc, s_desc, x_desc, out_ptr, fold_ptr, row_ptr, token_ptr, input_scale_ptr, bias_ptr, live_ptr, tile_to_expert,
    offsets, N, out_stride, k_stages, n_tiles, x_ptr, experts, row_expert, row_stride, input_scale_expert,
    BM: gl.constexpr, WARPS: gl.constexpr, WEIGHT_STAGES: gl.constexpr, X_STAGES: gl.constexpr, GROUP: gl.constexpr,
    ACT: gl.constexpr, ACT_FN: gl.constexpr, OPERAND_ORDER: gl.constexpr, BY_WORD: gl.constexpr,
):  # fmt: skip
    """out[rows of a tile] = epilogue(x @ weight[expert of the tile]^T), rows in permuted order; a tile a thread block.

    w_desc int32 [E * parts, N / parts, K/8] in boxes [parts, 16 * WARPS / parts, 16 or 32], parts being 2 where gate lies
    above up and 1 elsewhere; s_desc int16 [E * parts, N / parts, K/32] in boxes [parts, 16 * WARPS / parts, 8]; x_desc
    [rows, K] in the order of hopper.py in boxes [BM, 128 bytes]. ACT 2: gated, out has N / 2 columns; 1: ungated; 0: none.
    OPERAND_ORDER: out's columns come in the order that the next GEMM reads 16-bit operands in.

    x_ptr: None, or where x begins if its rows are tokens; then they, and their scales, are gathered by live_ptr, which is
    permuted_idx_to_token.

    BY_WORD: FP8 operands are decoded and multiplied a word of each thread, 32 values of K, at a time.

    The launch may overlap the one before it, which has written x and no more: routing and weights are older.
    """
    BN: gl.constexpr = 16 * WARPS
    FP8: gl.constexpr = x_desc.dtype == gl.float8e4nv
    XK: gl.constexpr = 128 if FP8 else 64  # values of K in an x stage: rows of 128 bytes
    PER_STAGE: gl.constexpr = 256 // XK
    COLUMNS: gl.constexpr = BN // 2 if ACT == 2 else BN  # of out

    unit = gl.program_id(0)
    expert = gl.load(tile_to_expert + unit // n_tiles)
    if expert < 0:
        gdc_wait()
        return
    first_tile = gl.load(offsets + expert) // BM
    m_tiles = gl.load(offsets + expert + 1) // BM - first_tile
    n_tile, m_tile = tile_of(unit - first_tile * n_tiles, n_tiles, m_tiles, GROUP)
    m0 = (first_tile + m_tile) * BM
    column0 = n_tile * COLUMNS
    second = N // 2 if ACT == 2 else BN // 2

    words, scales, read_words, read_scales = _weight_slots(w_desc, s_desc, WEIGHT_STAGES, WARPS)
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [X_STAGES, BM, XK], x_desc.layout)
    w_bars = gl.allocate_shared_memory(gl.int64, [WEIGHT_STAGES, 1], mbarrier.MBarrierLayout())
    x_bars = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(WEIGHT_STAGES):
        mbarrier.init(w_bars.index(i), count=1)
    for i in gl.static_range(X_STAGES):
        mbarrier.init(x_bars.index(i), count=1 if x_ptr is None else 32 * WARPS)
    fence_async_shared()
    x_stages = k_stages * PER_STAGE
    for i in gl.static_range(WEIGHT_STAGES - 1):
        _load_weights(w_desc, s_desc, words, scales, w_bars.index(i), expert, column0, i, i, i < k_stages)
    gdc_wait()
    gdc_launch_dependents()
    rows = _rows_of_x(x_ptr, live_ptr, m0, k_stages * 256, BM, WARPS)
    for i in gl.static_range(X_STAGES - 1):
        _load_x(x_desc, x_ptr, rows, x_ring, x_bars, i, i, WARPS, i < x_stages)
    fold = n_tile
    if FP8:
        fold = _fold_pairs(fold_ptr, expert, column0, second, N, WARPS)
    if BY_WORD:
        # Once. ptxas serializes the products of a tile that no loop surrounds, and takes fewer registers then.
        for _ in range(unit, gl.load(offsets + experts) // BM * n_tiles, gl.num_programs(0)):
            _one_tile(
                w_desc, s_desc, x_desc, x_ptr, out_ptr, fold_ptr, row_ptr, token_ptr, input_scale_ptr, bias_ptr, live_ptr,
                words, scales, read_words, read_scales, x_ring, w_bars, x_bars, fold, expert, n_tile, m0, rows, N, out_stride,
                k_stages, row_expert, row_stride, input_scale_expert,
                BM, WARPS, WEIGHT_STAGES, X_STAGES, ACT, ACT_FN, OPERAND_ORDER, BY_WORD,
            )  # fmt: skip
    else:
        _one_tile(
            w_desc, s_desc, x_desc, x_ptr, out_ptr, fold_ptr, row_ptr, token_ptr, input_scale_ptr, bias_ptr, live_ptr,
            words, scales, read_words, read_scales, x_ring, w_bars, x_bars, fold, expert, n_tile, m0, rows, N, out_stride,
            k_stages, row_expert, row_stride, input_scale_expert,
            BM, WARPS, WEIGHT_STAGES, X_STAGES, ACT, ACT_FN, OPERAND_ORDER, BY_WORD,
        )  # fmt: skip


@gluon.jit
def _tile(unit, tile_to_expert, offsets, n_tiles, last_tile, BM: gl.constexpr, GROUP: gl.constexpr):
    """(expert, tile along n, first row of x) of a unit of work; units past the last tile's count as its own."""
    unit = gl.minimum(unit, (last_tile + 1) * n_tiles - 1)
    expert = gl.maximum(gl.load(tile_to_expert + unit // n_tiles), 0)
    first_tile = gl.load(offsets + expert) // BM
    m_tiles = gl.load(offsets + expert + 1) // BM - first_tile
    n_tile, m_tile = tile_of(unit - first_tile * n_tiles, n_tiles, m_tiles, GROUP)
    return expert, n_tile, (first_tile + m_tile) * BM


@gluon.jit(do_not_specialize=["n_tiles"])
def grouped_gemm_long_kernel(
    w_desc, s_desc, x_desc, out_ptr, fold_ptr, row_ptr, token_ptr, input_scale_ptr, bias_ptr, live_ptr, tile_to_expert,
    offsets, N, out_stride, k_stages, n_tiles, experts, row_expert, row_stride, input_scale_expert,
    BM: gl.constexpr, WARPS: gl.constexpr, WEIGHT_STAGES: gl.constexpr, X_STAGES: gl.constexpr, GROUP: gl.constexpr,
    ACT: gl.constexpr, ACT_FN: gl.constexpr, OPERAND_ORDER: gl.constexpr,
):  # fmt: skip
    """`grouped_gemm_kernel` for many rows and long K, persistent: a block a multiprocessor, whose loads run ahead across tiles.

    256 rows halve what decoding costs a product, and leave no room for a second block.
    """
    BN: gl.constexpr = 16 * WARPS
    FP8: gl.constexpr = x_desc.dtype == gl.float8e4nv
    FP16: gl.constexpr = x_desc.dtype == gl.float16
    XK: gl.constexpr = 128 if FP8 else 64  # values of K in an x stage: rows of 128 bytes
    PER_STAGE: gl.constexpr = 256 // XK
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BM, 32 if FP8 else 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, ACC, 4 if FP8 else 2)
    COLUMNS: gl.constexpr = BN // 2 if ACT == 2 else BN  # of out
    second = N // 2 if ACT == 2 else BN // 2

    words, scales, read_words, read_scales = _weight_slots(w_desc, s_desc, WEIGHT_STAGES, WARPS)
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [X_STAGES, BM, XK], x_desc.layout)
    w_bars = gl.allocate_shared_memory(gl.int64, [WEIGHT_STAGES, 1], mbarrier.MBarrierLayout())
    x_bars = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(WEIGHT_STAGES):
        mbarrier.init(w_bars.index(i), count=1)
    for i in gl.static_range(X_STAGES):
        mbarrier.init(x_bars.index(i), count=1)
    fence_async_shared()

    tiles = gl.load(offsets + experts) // BM
    units = tiles * n_tiles
    last_tile = gl.maximum(tiles - 1, 0)
    stride = gl.num_programs(0)
    x_stages = k_stages * PER_STAGE
    # The loads run ahead of the products, across tiles: cursors of the weight stage and of the x stage to load next.
    w_unit = gl.program_id(0)
    expert, n_tile, m0 = _tile(w_unit, tile_to_expert, offsets, n_tiles, last_tile, BM, GROUP)
    w_expert = expert
    w_column = n_tile * COLUMNS
    w_k = 0
    for i in gl.static_range(WEIGHT_STAGES - 1):
        _load_weights(w_desc, s_desc, words, scales, w_bars.index(i), w_expert, w_column, w_k, i, w_unit < units)
        w_k += 1
        if w_k == k_stages:
            w_k = 0
            w_unit += stride
            w_expert, w_n, _ = _tile(w_unit, tile_to_expert, offsets, n_tiles, last_tile, BM, GROUP)
            w_column = w_n * COLUMNS
    gdc_wait()
    gdc_launch_dependents()
    x_unit = gl.program_id(0)
    x_row = m0
    x_k = 0
    for i in gl.static_range(X_STAGES - 1):
        _load_x(x_desc, None, x_row, x_ring, x_bars, x_k, i, WARPS, x_unit < units)
        x_k += 1
        if x_k == x_stages:
            x_k = 0
            x_unit += stride
            _, _, x_row = _tile(x_unit, tile_to_expert, offsets, n_tiles, last_tile, BM, GROUP)

    w_slot = 0
    w_phase = 0
    w_free = WEIGHT_STAGES - 1
    x_slot = 0
    x_phase = 0
    x_free = X_STAGES - 1
    for unit in range(gl.program_id(0), units, stride):
        expert, n_tile, m0 = _tile(unit, tile_to_expert, offsets, n_tiles, last_tile, BM, GROUP)
        if FP8:
            fold = _fold_pairs(fold_ptr, expert, n_tile * COLUMNS, second, N, WARPS)
        token = warpgroup_mma_init(gl.zeros([BN, BM], gl.float32, ACC))
        for _stage in range(k_stages):
            mbarrier.wait(w_bars.index(w_slot), w_phase)
            for chunk in gl.static_range(2):
                w = _read_words(read_words, w_slot, chunk, WARPS)
                s = _read_scales(read_scales, w_slot, chunk, WARPS)
                if not FP8:
                    s_first, s_second = scale_pairs(s, FP16)
                    w_first, w_second = halves(w, BN)
                for half in gl.static_range(PER_STAGE // 2):
                    if FP8:
                        a = decode_fp8(w, s, fold, BN, OPERAND)
                    else:
                        a = decode_16(w_first if half == 0 else w_second, s_first if half == 0 else s_second, BN, OPERAND, FP16)
                    mbarrier.wait(x_bars.index(x_slot), x_phase)
                    token = warpgroup_mma(a, x_ring.index(x_slot).permute((1, 0)), token, is_async=True)
                    token = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[token]))
                    # The products before these are done, in every warp once past the barrier: their x stage is free.
                    thread_barrier()
                    _load_x(x_desc, None, x_row, x_ring, x_bars, x_k, x_free, WARPS, x_unit < units)
                    x_free = x_slot
                    x_slot += 1
                    if x_slot == X_STAGES:
                        x_slot = 0
                        x_phase ^= 1
                    x_k += 1
                    if x_k == x_stages:
                        x_k = 0
                        x_unit += stride
                        _, _, x_row = _tile(x_unit, tile_to_expert, offsets, n_tiles, last_tile, BM, GROUP)
            # Past the barrier, every warp has read the stage before: that slot is free.
            _load_weights(w_desc, s_desc, words, scales, w_bars.index(w_free), w_expert, w_column, w_k, w_free, w_unit < units)
            w_free = w_slot
            w_slot += 1
            if w_slot == WEIGHT_STAGES:
                w_slot = 0
                w_phase ^= 1
            w_k += 1
            if w_k == k_stages:
                w_k = 0
                w_unit += stride
                w_expert, w_n, _ = _tile(w_unit, tile_to_expert, offsets, n_tiles, last_tile, BM, GROUP)
                w_column = w_n * COLUMNS
        acc = warpgroup_mma_wait(0, deps=[token])
        PART: gl.constexpr = BM // 2
        PART_ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, PART, 32 if FP8 else 16])
        row = _weight_rows(n_tile * COLUMNS, second, WARPS, PART_ACC)
        factor = _row_factor(
            row_ptr, fold_ptr, input_scale_ptr, expert, row, N, row_expert, row_stride, input_scale_expert, FP8, FP16
        )
        low, high = gl.split(gl.permute(gl.reshape(acc, [BN, 2, PART]), [0, 2, 1]))
        low = gl.convert_layout(low, PART_ACC, assert_trivial=True)
        high = gl.convert_layout(high, PART_ACC, assert_trivial=True)
        for half in gl.static_range(2):
            part0 = m0 + half * PART
            _finish(
                low if half == 0 else high, factor, _token_scale(token_ptr, live_ptr, part0, False, PART, PART_ACC),
                _live(live_ptr, part0, PART, COLUMNS, WARPS, OPERAND_ORDER), out_ptr, bias_ptr, expert, row, n_tile, part0,
                N, out_stride, PART, WARPS, ACT, ACT_FN, OPERAND_ORDER,
            )  # fmt: skip


@gluon.jit
def _load_stage_x(x_desc, x_ring, bar, m0, k, stage, pred):
    """x of stage k, 256 values of K, on the barrier of the stage's weights, which expects its bytes."""
    XK: gl.constexpr = x_desc.block_type.shape[1]
    for part in gl.static_range(256 // XK):
        slot = x_ring.index(stage * (256 // XK) + part)
        tma_load(x_desc, [m0, k * 256 + part * XK], bar, slot, pred=pred)


@gluon.jit
def _sharing(tiles, stages, blocks, MIN_STAGES: gl.constexpr):
    """(tiles that are a unit of work each, blocks that share the K of each tile behind them).

    Whole rounds of tiles take a block each. What is left is shared such that its rounds are short; a unit costs about as much
    as two more stages where it is shared, and one where it is not.
    """
    whole = tiles // blocks * blocks
    rest = tiles - whole
    split = 1
    best = (stages + 1).to(gl.float32)
    for rounds in gl.static_range(1, 5):
        shares = gl.minimum(rounds * blocks // gl.maximum(rest, 1), stages // MIN_STAGES)
        cost = rounds * (stages.to(gl.float32) / shares + 2)
        better = (cost < best) & (shares > 1)
        split = gl.where(better, shares, split)
        best = gl.where(better, cost, best)
    return whole, split


@gluon.jit
def _tile_of_unit(unit, whole, split, REDUCE: gl.constexpr):
    """The tile of a unit of work: the first `whole` have one unit each, the others `split`, side by side."""
    if REDUCE:
        return gl.minimum(unit, whole) + gl.maximum(unit - whole, 0) // split
    else:
        return unit


@gluon.jit
def _share_of(unit, whole, split, stages, REDUCE: gl.constexpr):
    """(first stage, stages) of a unit of work."""
    if REDUCE:
        shares = gl.where(unit < whole, 1, split)
        share = gl.where(unit < whole, 0, (unit - whole) % split)
        return part_of(share, stages, shares)
    else:
        return 0, stages


@gluon.jit
def _unit_to_load(
    unit, tile_to_expert, last_tile, whole, split, stages, n_tiles, stride,
    BM: gl.constexpr, COLUMNS: gl.constexpr, REDUCE: gl.constexpr,
):  # fmt: skip
    """What a unit of work copies: (first stage, stages, column of the result, row of x, the next unit's expert)."""
    first, count = _share_of(unit, whole, split, stages, REDUCE)
    tile = _tile_of_unit(unit, whole, split, REDUCE)
    later = _tile_of_unit(unit + stride, whole, split, REDUCE) // n_tiles
    expert_later = gl.load(tile_to_expert + gl.minimum(later, last_tile))
    return first, count, tile % n_tiles * COLUMNS, tile // n_tiles * BM, expert_later


@gluon.jit(do_not_specialize=["n_tiles", "shares"])
def grouped_gemm_decode_kernel(
    w_desc, s_desc, x_desc, out_ptr, fold_ptr, row_ptr, token_ptr, input_scale_ptr, bias_ptr, live_ptr,
    partial_ptr, count_ptr, tile_to_expert, offsets, N, out_stride, k_stages, n_tiles, shares, experts, row_expert, row_stride,
    input_scale_expert,
    BM: gl.constexpr, WARPS: gl.constexpr, STAGES: gl.constexpr, BURST: gl.constexpr, ACT: gl.constexpr, ACT_FN: gl.constexpr,
    OPERAND_ORDER: gl.constexpr, REDUCE: gl.constexpr, MIN_STAGES: gl.constexpr,
):  # fmt: skip
    """`grouped_gemm_kernel` for small tiles: bound by the bytes of the weights, so that their stream must not stop.

    Persistent: the loads run ahead across tiles. What a tile needs beside them is read a tile ahead: its expert two.
    BURST, a divisor of STAGES: so many stages are loaded at once, so that neighbouring bytes of a row meet in the memory.
    REDUCE: `shares` blocks share the K of each tile, and the last of them adds up. 0: the blocks share the tiles that do not
    fill a round, as it is seen here how many those are: the host does not know how many experts were hit.
    """
    BN: gl.constexpr = 16 * WARPS
    FP8: gl.constexpr = x_desc.dtype == gl.float8e4nv
    FP16: gl.constexpr = x_desc.dtype == gl.float16
    gl.static_assert(BURST < STAGES and STAGES % BURST == 0)
    XK: gl.constexpr = 128 if FP8 else 64
    PER_STAGE: gl.constexpr = 256 // XK
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BM, 32 if FP8 else 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, ACC, 4 if FP8 else 2)
    COLUMNS: gl.constexpr = BN // 2 if ACT == 2 else BN
    X_BYTES: gl.constexpr = PER_STAGE * x_desc.block_type.nbytes
    second = N // 2 if ACT == 2 else BN // 2

    words, scales, read_words, read_scales = _weight_slots(w_desc, s_desc, STAGES, WARPS)
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [STAGES * PER_STAGE, BM, XK], x_desc.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()

    tiles = gl.load(offsets + experts) // BM
    stride = gl.num_programs(0)
    start = gl.program_id(0)
    units = tiles * n_tiles
    whole = units
    split = 1
    if REDUCE:
        whole = 0
        split = shares
        if shares == 0:
            whole, split = _sharing(units, k_stages, stride, MIN_STAGES)
        units = whole + (units - whole) * split
    # Experts of units past the end: the map has an entry for any unit that is clamped to the last one.
    last_tile = gl.maximum(tiles - 1, 0)
    tile = _tile_of_unit(start, whole, split, REDUCE)
    tile_next = _tile_of_unit(start + stride, whole, split, REDUCE)
    expert = gl.load(tile_to_expert + gl.minimum(tile // n_tiles, last_tile))
    # What is loaded next. Divisions happen between units alone: they take longer than a stage's copies.
    load_unit = start
    load_expert = expert
    load_k, left, load_column, load_m0, expert_next = _unit_to_load(
        start, tile_to_expert, last_tile, whole, split, k_stages, n_tiles, stride, BM, COLUMNS, REDUCE
    )
    load_next = expert_next
    for i in gl.static_range(STAGES - BURST):
        more = load_unit < units
        _load_weights(w_desc, s_desc, words, scales, bars.index(i), load_expert, load_column, load_k, i, more, X_BYTES)
        load_k += 1
        left -= 1
        if left == 0:
            load_unit += stride
            load_expert = load_next
            load_k, left, load_column, load_m0, load_next = _unit_to_load(
                load_unit, tile_to_expert, last_tile, whole, split, k_stages, n_tiles, stride, BM, COLUMNS, REDUCE
            )
    gdc_wait()
    gdc_launch_dependents()
    x_unit = start
    x_tile = tile
    x_k, x_left = _share_of(start, whole, split, k_stages, REDUCE)
    for i in gl.static_range(STAGES - BURST):
        _load_stage_x(x_desc, x_ring, bars.index(i), x_tile // n_tiles * BM, x_k, i, x_unit < units)
        x_k += 1
        x_left -= 1
        if x_left == 0:
            x_unit += stride
            x_tile = _tile_of_unit(x_unit, whole, split, REDUCE)
            x_k, x_left = _share_of(x_unit, whole, split, k_stages, REDUCE)
    if FP8:
        fold_next = _fold_pairs(fold_ptr, gl.maximum(expert, 0), tile % n_tiles * COLUMNS, second, N, WARPS)

    step = 0
    for unit in range(start, units, stride):
        # Needed a tile from here: whoever waits for an expert's number waits for a load behind all the weights' copies.
        tile_later = _tile_of_unit(unit + 2 * stride, whole, split, REDUCE)
        expert_later = gl.load(tile_to_expert + gl.minimum(tile_later // n_tiles, last_tile))
        n_tile = tile % n_tiles
        m0 = tile // n_tiles * BM
        token_scale = _token_scale(token_ptr, live_ptr, m0, False, BM, ACC)
        live = _live(live_ptr, m0, BM, COLUMNS, WARPS, OPERAND_ORDER)
        row = _weight_rows(n_tile * COLUMNS, second, WARPS, ACC)
        factor = _row_factor(
            row_ptr, fold_ptr, input_scale_ptr, expert, row, N, row_expert, row_stride, input_scale_expert, FP8, FP16
        )
        if FP8:
            fold = fold_next
            fold_next = _fold_pairs(fold_ptr, expert_next, tile_next % n_tiles * COLUMNS, second, N, WARPS)
        token = warpgroup_mma_init(gl.zeros([BN, BM], gl.float32, ACC))
        _, count = _share_of(unit, whole, split, k_stages, REDUCE)
        for _stage in range(count):
            slot = step % STAGES
            mbarrier.wait(bars.index(slot), (step // STAGES) & 1)
            for chunk in gl.static_range(2):
                w = _read_words(read_words, slot, chunk, WARPS)
                s = _read_scales(read_scales, slot, chunk, WARPS)
                if not FP8:
                    s_first, s_second = scale_pairs(s, FP16)
                    w_first, w_second = halves(w, BN)
                for half in gl.static_range(PER_STAGE // 2):
                    if FP8:
                        a = decode_fp8(w, s, fold, BN, OPERAND)
                    else:
                        a = decode_16(w_first if half == 0 else w_second, s_first if half == 0 else s_second, BN, OPERAND, FP16)
                    x = x_ring.index(slot * PER_STAGE + chunk * (PER_STAGE // 2) + half)
                    token = warpgroup_mma(a, x.permute((1, 0)), token, is_async=True)
                    token = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[token]))
            if step % BURST == 0:
                # The stages before this one are free: their products are done, in every warp past the barrier.
                thread_barrier()
                for i in gl.static_range(BURST):
                    free = (step + STAGES - BURST + i) % STAGES
                    more = load_unit < units
                    bar = bars.index(free)
                    _load_weights(w_desc, s_desc, words, scales, bar, load_expert, load_column, load_k, free, more, X_BYTES)
                    _load_stage_x(x_desc, x_ring, bar, load_m0, load_k, free, more)
                    load_k += 1
                    left -= 1
                    if left == 0:
                        load_unit += stride
                        load_expert = load_next
                        load_k, left, load_column, load_m0, load_next = _unit_to_load(
                            load_unit, tile_to_expert, last_tile, whole, split, k_stages, n_tiles, stride, BM, COLUMNS, REDUCE
                        )
            step += 1
        acc = warpgroup_mma_wait(0, deps=[token])
        last = True
        if REDUCE:  # noqa: SIM102
            if (unit >= whole) & (split > 1):
                last, acc = sum_parts(acc, partial_ptr, count_ptr, tile - whole, unit - whole, split, BN, BM, WARPS)
        if last:
            _finish(
                acc, factor, token_scale, live, out_ptr, bias_ptr, expert, row, n_tile, m0,
                N, out_stride, BM, WARPS, ACT, ACT_FN, OPERAND_ORDER,
            )  # fmt: skip
        tile = tile_next
        tile_next = tile_later
        expert = expert_next
        expert_next = expert_later


@gluon.jit
def _next_along_n(tile, n_tile, expert, expert_next, tile_to_expert, n_tiles, last_tile):
    """(tile of rows, tile along n, expert, expert of the next tile of rows) one tile along n further."""
    n_tile += 1
    if n_tile == n_tiles:
        n_tile = 0
        tile += 1
        expert = expert_next
        expert_next = gl.maximum(gl.load(tile_to_expert + gl.minimum(tile + 1, last_tile)), 0)
    return tile, n_tile, expert, expert_next


@gluon.jit(do_not_specialize=["n_tiles"])
def grouped_gemm_short_kernel(
    w_desc, s_desc, x_desc, out_ptr, fold_ptr, row_ptr, token_ptr, input_scale_ptr, bias_ptr, live_ptr, tile_to_expert,
    offsets, N, out_stride, n_tiles, experts, row_expert, row_stride, input_scale_expert,
    BM: gl.constexpr, WARPS: gl.constexpr, WEIGHT_STAGES: gl.constexpr,
    ACT: gl.constexpr, ACT_FN: gl.constexpr, OPERAND_ORDER: gl.constexpr,
):  # fmt: skip
    """`grouped_gemm_kernel` in e4m3 for a K of one stage, where a tile is over before its loads have paid.

    Persistent: a block takes neighbouring tiles along n, so that it loads x once for all of them; the weights run ahead.
    """
    BN: gl.constexpr = 16 * WARPS
    XK: gl.constexpr = 128
    X_BYTES: gl.constexpr = 256 // XK * x_desc.block_type.nbytes
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BM, 32])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, ACC, 4)
    COLUMNS: gl.constexpr = BN // 2 if ACT == 2 else BN
    second = N // 2 if ACT == 2 else BN // 2

    words, scales, read_words, read_scales = _weight_slots(w_desc, s_desc, WEIGHT_STAGES, WARPS)
    x_slots = gl.allocate_shared_memory(x_desc.dtype, [256 // XK, BM, XK], x_desc.layout)
    w_bars = gl.allocate_shared_memory(gl.int64, [WEIGHT_STAGES, 1], mbarrier.MBarrierLayout())
    x_bar = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout()).index(0)
    for i in gl.static_range(WEIGHT_STAGES):
        mbarrier.init(w_bars.index(i), count=1)
    mbarrier.init(x_bar, count=1)
    fence_async_shared()

    tiles = gl.load(offsets + experts) // BM  # of rows
    last_tile = gl.maximum(tiles - 1, 0)
    units = tiles * n_tiles
    share = gl.cdiv(units, gl.num_programs(0))
    start = gl.program_id(0) * share
    end = gl.minimum(start + share, units)
    tile = start // n_tiles
    n_tile = start % n_tiles
    # Experts of tiles past the end: the map has an entry for any tile that is clamped to the last one.
    expert = gl.maximum(gl.load(tile_to_expert + gl.minimum(tile, last_tile)), 0)
    expert_next = gl.maximum(gl.load(tile_to_expert + gl.minimum(tile + 1, last_tile)), 0)
    load_unit = start
    load_tile = tile
    load_n = n_tile
    load_expert = expert
    load_next = expert_next
    for i in gl.static_range(WEIGHT_STAGES):
        _load_weights(w_desc, s_desc, words, scales, w_bars.index(i), load_expert, load_n * COLUMNS, 0, i, load_unit < end)
        load_unit += 1
        load_tile, load_n, load_expert, load_next = _next_along_n(
            load_tile, load_n, load_expert, load_next, tile_to_expert, n_tiles, last_tile
        )
    gdc_wait()
    gdc_launch_dependents()
    mbarrier.expect(x_bar, X_BYTES, pred=start < end)
    _load_stage_x(x_desc, x_slots, x_bar, tile * BM, 0, 0, start < end)
    fold_next = _fold_pairs(fold_ptr, expert, n_tile * COLUMNS, second, N, WARPS)

    x_step = 0
    for unit in range(start, end):
        step = unit - start
        m0 = tile * BM
        fold = fold_next
        ends = n_tile + 1 == n_tiles
        fold_next = _fold_pairs(
            fold_ptr, gl.where(ends, expert_next, expert), gl.where(ends, 0, (n_tile + 1) * COLUMNS), second, N, WARPS
        )
        token_scale = _token_scale(token_ptr, live_ptr, m0, False, BM, ACC)
        live = _live(live_ptr, m0, BM, COLUMNS, WARPS, OPERAND_ORDER)
        row = _weight_rows(n_tile * COLUMNS, second, WARPS, ACC)
        factor = _row_factor(
            row_ptr, fold_ptr, input_scale_ptr, expert, row, N, row_expert, row_stride, input_scale_expert, True, False
        )
        slot = step % WEIGHT_STAGES
        mbarrier.wait(x_bar, x_step & 1)
        mbarrier.wait(w_bars.index(slot), (step // WEIGHT_STAGES) & 1)
        token = warpgroup_mma_init(gl.zeros([BN, BM], gl.float32, ACC))
        for chunk in gl.static_range(2):
            w = _read_words(read_words, slot, chunk, WARPS)
            s = _read_scales(read_scales, slot, chunk, WARPS)
            a = decode_fp8(w, s, fold, BN, OPERAND)
            token = warpgroup_mma(a, x_slots.index(chunk).permute((1, 0)), token, is_async=True)
            token = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[token]))
        acc = warpgroup_mma_wait(0, deps=[token])
        # The products are done, in every warp past the barrier: their slots are free.
        thread_barrier()
        more = load_unit < end
        _load_weights(w_desc, s_desc, words, scales, w_bars.index(slot), load_expert, load_n * COLUMNS, 0, slot, more)
        load_unit += 1
        load_tile, load_n, load_expert, load_next = _next_along_n(
            load_tile, load_n, load_expert, load_next, tile_to_expert, n_tiles, last_tile
        )
        if ends:
            mbarrier.expect(x_bar, X_BYTES, pred=unit + 1 < end)
            _load_stage_x(x_desc, x_slots, x_bar, m0 + BM, 0, 0, unit + 1 < end)
        _finish(
            acc, factor, token_scale, live, out_ptr, bias_ptr, expert, row, n_tile, m0,
            N, out_stride, BM, WARPS, ACT, ACT_FN, OPERAND_ORDER,
        )  # fmt: skip
        if ends:
            x_step += 1
        tile, n_tile, expert, expert_next = _next_along_n(tile, n_tile, expert, expert_next, tile_to_expert, n_tiles, last_tile)


def serves(device: torch.device, weights: tuple[ExpertWeights, ...], act_fn: str) -> bool:
    """Whether this path takes the layer: Hopper, rows of whole 16 bytes along both K, gate and up rows below each other."""
    return (
        arch_of(device) == 90
        and act_fn != "swigluoai"
        and all(w.data.shape[-1] % 16 == 0 and w.data.shape[1] % 16 == 0 for w in weights)
        and all(t.data_ptr() % 16 == 0 for w in weights for t in (w.data, w.scales))
    )


_DECODE_ROWS = 32  # tiles up to which the kernel for few rows serves
_LONG_ROWS = 256
_GATHER_TOP_K = 4  # from which on, and weight rows up to which, GEMM 1 gathers its rows
_GATHER_ROWS = 768
_MIN_STAGES = 2  # of a part of K
_LONG_STAGES = 8  # from which on it pays to see how the last tiles are best shared


def is_short(block_m: int, fp8: bool, k: int) -> bool:
    """Whether the kernel for a K of one stage serves."""
    return fp8 and k <= 256 and block_m < _LONG_ROWS


def tiling(block_m: int, fp8: bool, k: int) -> tuple[int, int, int, int]:
    """(warps, weight stages, x stages, blocks of a multiprocessor) of a tile of `block_m` rows.

    The kernel for few rows has stages of weights and x together.
    """
    if is_short(block_m, fp8, k):
        return (4, 2, 1, 5) if block_m == 32 else (4, 3, 1, {8: 6, 16: 6, 64: 4, 128: 3}[block_m])
    if block_m <= _DECODE_ROWS:
        x_size = block_m if fp8 else 2 * block_m
        if x_size <= 16 and k >= _LONG_STAGES * 256 and k % 256:
            # Rows that begin between the 128-byte lines of the memory: more of each is loaded at once, so that lines are whole.
            return 4, 8, 0, 2
        return 4, 4 if x_size <= 32 else 3, 0, 4 if x_size <= 16 else 3 if x_size <= 32 else 2
    if block_m == _LONG_ROWS:
        return 8, 3, 4, 1
    return 8, 2, 3 if block_m == 128 else 4, 2


def max_registers(warps: int, resident: int) -> int:
    """Registers a thread that leave room for `resident` blocks of a multiprocessor.

    A limit only where there would be more: below it, ptxas chooses more registers than without one.
    """
    return min(65536 // (32 * warps * resident) // 8 * 8, 255)


def gathers(block_m: int, top_k: int, n: int) -> bool:
    """Whether GEMM 1 of `n` weight rows takes the rows of tokens by itself, instead of copies in permuted order.

    That saves top_k copies of each token, but gathering is slower than a bulk copy, and is done once for every tile along n.
    """
    return _DECODE_ROWS < block_m < _LONG_ROWS and top_k >= _GATHER_TOP_K and n <= _GATHER_ROWS


def grouped_gemm(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weights: ExpertWeights,
    routing: Routing,
    *,
    dtype: torch.dtype,
    block_m: int,
    gather: bool = False,
    act_fn: str | None = None,
    operand_order: bool = False,
) -> torch.Tensor:
    """As `moe_gemm.grouped_gemm` for x [rows, whole_stages(K)], in the order of hopper.py along K.

    `gather`, for tiles of 64 or 128 rows: the rows of x are tokens, as those of x_scale; otherwise they are permuted.
    """
    experts, n, half_k = weights.data.shape
    gated_act = act_fn is not None and act_fn not in UNGATED
    fp8 = x.dtype == torch.float8_e4m3fn
    stages = cdiv(half_k, 128)
    warps, weight_stages, x_stages, resident = tiling(block_m, fp8, 2 * half_k)
    short = is_short(block_m, fp8, 2 * half_k)
    few = block_m <= _DECODE_ROWS
    columns = 8 * warps if gated_act else 16 * warps
    width = n // 2 if gated_act else n
    out_width = whole_stages(width) if operand_order else width
    n_tiles = cdiv(out_width, columns)
    out = x.new_empty((len(routing.permuted_idx_to_token), out_width), dtype=dtype)
    units = len(routing.tile_to_expert) * n_tiles
    parts = 2 if gated_act else 1
    shape = (experts * parts, n // parts)
    box = (parts, 16 * warps // parts)
    operands = (
        descriptor(weights.data, (*box, 32 if few or short else 16), torch.int32, (*shape, half_k // 4)),
        descriptor(weights.scales, (*box, 8), torch.int16, (*shape, half_k // 16)),
        descriptor(x, (block_m, 128 if fp8 else 64)),
        out,
        weights.fp8_fold,
        weights.row_scale,
        x_scale,
        weights.input_scale,
        weights.bias,
        routing.permuted_idx_to_token,
    )
    maps = (routing.tile_to_expert, routing.expert_offsets, n, out_width)
    strides = (
        experts,
        weights.row_scale.shape[1],
        int(weights.row_scale.shape[1] > 1),
        int(weights.input_scale is not None and weights.input_scale.numel() > 1),
    )
    options = {
        "BM": block_m,
        "WARPS": warps,
        "ACT": 2 if gated_act else 0 if act_fn is None else 1,
        "ACT_FN": act_fn or "",
        "OPERAND_ORDER": operand_order,
        "num_warps": warps,
        "launch_pdl": True,
    }
    by_word = fp8 and not few and block_m < _LONG_ROWS and stages >= (16 if block_m == 64 else 8)
    if by_word or short or block_m == 128:
        options["maxnreg"] = max_registers(warps, resident)
    processors = processors_of(x.device)
    if short:
        launch(
            grouped_gemm_short_kernel, (min(resident * processors, units),), *operands, *maps, n_tiles, *strides,
            WEIGHT_STAGES=weight_stages, **options,
        )  # fmt: skip
    elif few:
        # Where a fourth block saves a round of tiles, it gets the room of a stage. An expert has about one tile.
        tiles = min(len(routing.tile_to_expert), experts) * n_tiles
        if resident == 3 and 4 * cdiv(tiles, 4 * processors) < 0.8 * 3 * cdiv(tiles, 3 * processors):
            weight_stages, resident = 3, 4
        blocks = resident * processors
        shares = min(blocks // units, stages // _MIN_STAGES)
        # A long K is worth the time that it takes to see how its last tiles are best shared; many rounds end about evenly.
        if shares == 0 and stages >= _LONG_STAGES and tiles <= 4 * blocks:
            partial, count = split_k(x.device, 4 * blocks * 16 * warps * block_m, blocks)
        elif shares > 1:
            shares = cdiv(stages, cdiv(stages, shares))  # no more than shorten the longest share
            blocks = units * shares
            partial, count = split_k(x.device, blocks * 16 * warps * block_m, units)
        else:
            blocks, partial, count = min(blocks, units), None, None
        launch(
            grouped_gemm_decode_kernel, (blocks,),
            *operands, partial, count, *maps, stages, n_tiles, shares, *strides,
            STAGES=weight_stages, BURST=burst_of(weight_stages) if stages >= 4 else 1,
            REDUCE=partial is not None, MIN_STAGES=_MIN_STAGES, **options,
        )  # fmt: skip
    else:
        long = block_m == _LONG_ROWS
        kernel = grouped_gemm_long_kernel if long else grouped_gemm_kernel
        launch(
            kernel, (min(units, processors) if long else units,),
            *operands, *maps, stages, n_tiles, *(() if long else (x if gather else None,)), *strides,
            WEIGHT_STAGES=weight_stages, X_STAGES=x_stages, GROUP=8, **({} if long else {"BY_WORD": by_word}), **options,
        )  # fmt: skip
    return out
