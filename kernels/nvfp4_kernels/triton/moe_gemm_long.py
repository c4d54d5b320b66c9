"""Grouped GEMM for Hopper, many rows: persistent tiles of 256 rows, whose loads run ahead across tiles.

As in gemm_large.py, two groups of four warps hold half of a tile's features each and go on their own: each copies its own
weights, and x in turns.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .gluon_compat import thread_barrier, tma_store, tma_store_wait
from .hopper import decode_part, load_x, pairs_of_fold, pieces_of, retire_products
from .moe_hopper import (
    activated,
    load_factors,
    load_fold,
    load_weights,
    pairs_layout,
    product_of,
    rows_layout,
    scales_of_slot,
    store_rows,
    weight_rows,
    weight_slots,
    words_of_slot,
)

_M_TILES = gl.constexpr(16)  # that meet a tile of weights one after the other, in whatever experts they are


@gluon.jit
def _tile(unit, tile_to_expert, tiles, n_tiles, BM: gl.constexpr):
    """(expert, tile along n, first row of x) of a unit of work; units past the last one's count as its own."""
    unit = gl.minimum(unit, tiles * n_tiles - 1)
    part = unit // (_M_TILES * n_tiles)
    unit -= part * _M_TILES * n_tiles
    m_tiles = gl.minimum(tiles - part * _M_TILES, _M_TILES)
    n_tile = unit // m_tiles
    m_tile = part * _M_TILES + unit - n_tile * m_tiles
    return gl.load(tile_to_expert + m_tile), n_tile, m_tile * BM


@gluon.jit
def _group(
    w_desc, s_desc, x_desc, words, scales, read_words, read_scales, x_ring, w_full, x_full, x_empty, staging, out_desc,
    out_ptr, fold_ptr, row_ptr, token_ptr, input_scale_ptr, bias_ptr, live_ptr, tile_to_expert,
    offsets, N, out_stride, k_stages, n_tiles, experts, row_expert, row_stride, input_scale_expert,
    HALF: gl.constexpr, BM: gl.constexpr, WEIGHT_STAGES: gl.constexpr,
    ACT: gl.constexpr, ACT_FN: gl.constexpr, OPERAND_ORDER: gl.constexpr,
):  # fmt: skip
    """Four warps: every second half tile along n, and the x stages of this parity."""
    WARPS: gl.constexpr = 4
    BN: gl.constexpr = 16 * WARPS
    FP8: gl.constexpr = x_desc.dtype == gl.float8e4nv
    FP16: gl.constexpr = x_desc.dtype == gl.float16
    PARTS: gl.constexpr = 1 if FP8 else 2  # x stages of a chunk of 128 values of K
    PER_STAGE: gl.constexpr = 2 * PARTS
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BM, 32 if FP8 else 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, ACC, 4 if FP8 else 2)
    COLUMNS: gl.constexpr = BN // 2 if ACT == 2 else BN  # of out, in half a tile
    second = N // 2 if ACT == 2 else BN // 2

    PART: gl.constexpr = BM // 2
    PART_ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, PART, 32 if FP8 else 16])
    ROWS: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    part_row = gl.arange(0, PART, ROWS)

    units = gl.load(offsets + experts) // BM * n_tiles
    tiles = gl.maximum(units // n_tiles, 1)
    stride = gl.num_programs(0)
    # What a tile needs of memory but x and weights is loaded while the tile before it is multiplied, its place in the matrices
    # two tiles before: a load that is waited for takes as long as the products of 128 values.
    first = gl.program_id(0)
    expert, n_tile, m0 = _tile(first, tile_to_expert, tiles, n_tiles, BM)
    next_expert, next_n, next_m0 = _tile(first + stride, tile_to_expert, tiles, n_tiles, BM)
    # The copies of weights run ahead of the products, across tiles. At the start of one they are in the same or in the next.
    a_tile_ahead = WEIGHT_STAGES // k_stages > 0
    expert = gl.maximum(expert, 0)  # without any tile there is none, and nothing happens below
    next_expert = gl.maximum(next_expert, 0)
    w_unit = first
    w_expert = expert
    w_column = (2 * n_tile + HALF) * COLUMNS
    w_k = 0
    for i in gl.static_range(WEIGHT_STAGES):
        load_weights(w_desc, s_desc, words, scales, w_full.index(i), w_expert, w_column, w_k, i, w_unit < units)
        w_k += 1
        if w_k == k_stages:
            w_k = 0
            w_unit += stride
            w_expert = next_expert
            w_column = (2 * next_n + HALF) * COLUMNS
    next_fold = gl.full([BN], 1.0, gl.float32, gl.SliceLayout(1, pairs_layout(WARPS)))
    if FP8:
        next_fold = load_fold(fold_ptr, expert, (2 * n_tile + HALF) * COLUMNS, second, N, WARPS)
    gdc_wait()
    gdc_launch_dependents()
    load_x(x_desc, x_ring, x_full, m0, HALF, HALF, first < units)
    own_pair = 1
    own_phase = 1  # the first time around, slots are free
    w_slot = 0
    w_phase = 0
    pair = 0
    x_phase = 0
    for unit in range(first, units, stride):
        after_expert, after_n, after_m0 = _tile(unit + 2 * stride, tile_to_expert, tiles, n_tiles, BM)
        half_n = 2 * n_tile + HALF
        fold = None
        if FP8:
            fold = pairs_of_fold(next_fold, pairs_layout(WARPS))
            next_fold = load_fold(fold_ptr, next_expert, (2 * next_n + HALF) * COLUMNS, second, N, WARPS)
        row = weight_rows(half_n * COLUMNS, second, WARPS, PART_ACC)
        factors = load_factors(
            row_ptr, fold_ptr, input_scale_ptr, expert, row, N, row_expert, row_stride, input_scale_expert, FP8
        )
        live = ()
        token_scale = ()
        for half in gl.static_range(2):
            at = m0 + half * PART
            if OPERAND_ORDER:
                at += part_row
            live = live + (gl.load(live_ptr + at),)  # type: ignore[assignment]  # noqa: RUF005
            if token_ptr is not None:
                token_scale = token_scale + (gl.load(token_ptr + m0 + half * PART + part_row),)  # type: ignore[assignment]  # noqa: RUF005
        token = warpgroup_mma_init(gl.zeros([BN, BM], gl.float32, ACC))
        for stage in range(k_stages):
            last = stage == k_stages - 1
            next_row = gl.where(last, next_m0, m0)
            next_x_k = gl.where(last, 0, stage + 1) * PER_STAGE + HALF
            next_live = (stage < k_stages - 1) | (unit + stride < units)
            mbarrier.wait(w_full.index(w_slot), w_phase)
            for chunk in gl.static_range(2):
                w = words_of_slot(read_words, w_slot, chunk, WARPS)
                s = scales_of_slot(read_scales, w_slot, chunk, WARPS)
                for part in gl.static_range(PARTS):
                    a = decode_part(w, s, fold, part, BN, OPERAND, FP8, FP16)
                    slot = 2 * pair + (chunk * PARTS + part) % 2
                    mbarrier.wait(x_full.index(slot), x_phase)
                    token = warpgroup_mma(a, x_ring.index(slot).permute((1, 0)), token, is_async=True)
                    token, pair, x_phase, own_pair, own_phase = retire_products(
                        token, x_desc, x_ring, x_full, x_empty, pair, x_phase, own_pair, own_phase, m0,
                        stage * PER_STAGE + HALF, next_row, next_x_k, next_live, stage > 0, chunk * PARTS + part, PER_STAGE,
                        HALF,
                    )  # fmt: skip
            # All four warps have read this stage's weights: before the last barrier.
            load_weights(w_desc, s_desc, words, scales, w_full.index(w_slot), w_expert, w_column, w_k, w_slot, w_unit < units)
            w_slot += 1
            if w_slot == WEIGHT_STAGES:
                w_slot = 0
                w_phase ^= 1
            w_k += 1
            if w_k == k_stages:
                w_k = 0
                w_unit += stride
                w_expert = gl.where(a_tile_ahead, after_expert, next_expert)
                w_column = (2 * gl.where(a_tile_ahead, after_n, next_n) + HALF) * COLUMNS
        acc = warpgroup_mma_wait(0, deps=[token])
        thread_barrier()
        mbarrier.arrive(x_empty.index(2 * (pair ^ 1) + 1), count=1)
        factor = product_of(factors, FP8, FP16)
        halves = pieces_of(acc, 2)
        for half in gl.static_range(2):
            scale = gl.full([PART], 1.0, gl.float32, gl.SliceLayout(0, PART_ACC))
            if token_ptr is not None:
                scale = gl.convert_layout(token_scale[half], gl.SliceLayout(0, PART_ACC))
            values = activated(
                gl.convert_layout(halves[half], PART_ACC, assert_trivial=True), factor, scale, bias_ptr, expert, row, N,
                out_ptr.dtype.element_ty, WARPS, ACT, ACT_FN,
            )  # fmt: skip
            part_m0 = m0 + half * PART
            if OPERAND_ORDER:
                keep = gl.convert_layout(live[half], gl.SliceLayout(1, rows_layout(COLUMNS, WARPS, True))) >= 0
                store_rows(values, keep, out_ptr, half_n, part_m0, N // 2 if ACT == 2 else N, out_stride, WARPS, True)
            else:
                tma_store_wait(0)
                staging.permute((1, 0)).store(values)
                fence_async_shared()
                if live[half] >= 0:  # padding comes last
                    tma_store(out_desc, [part_m0, half_n * COLUMNS], staging)
        expert = next_expert
        n_tile = next_n
        m0 = next_m0
        next_expert = after_expert
        next_n = after_n
        next_m0 = after_m0
    if not OPERAND_ORDER:
        tma_store_wait(0)


@gluon.jit(do_not_specialize=["n_tiles"])
def grouped_gemm_long_kernel(
    w_desc, s_desc, x_desc, out_desc, out_ptr, fold_ptr, row_ptr, token_ptr, input_scale_ptr, bias_ptr, live_ptr,
    tile_to_expert, offsets, N, out_stride, k_stages, n_tiles, experts, row_expert, row_stride, input_scale_expert,
    BM: gl.constexpr, WEIGHT_STAGES: gl.constexpr,
    ACT: gl.constexpr, ACT_FN: gl.constexpr, OPERAND_ORDER: gl.constexpr,
):  # fmt: skip
    """`grouped_gemm_kernel` for many rows, persistent: a block a multiprocessor, whose loads run ahead across tiles.

    256 rows halve what decoding costs a product, and leave no room for a second block. Boxes of w_desc and s_desc are half a
    tile's, for four warps, that of out_desc is half a tile's rows by as many columns; n_tiles counts whole tiles, of eight;
    k_stages is 2 or more. Launched with four warps; four more are started here.
    """
    X_STAGES: gl.constexpr = 4  # two of each parity
    words0, scales0, read_words0, read_scales0 = weight_slots(w_desc, s_desc, WEIGHT_STAGES, 4)
    words1, scales1, read_words1, read_scales1 = weight_slots(w_desc, s_desc, WEIGHT_STAGES, 4)
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [X_STAGES, BM, x_desc.block_type.shape[1]], x_desc.layout)
    w_full0 = gl.allocate_shared_memory(gl.int64, [WEIGHT_STAGES, 1], mbarrier.MBarrierLayout())
    w_full1 = gl.allocate_shared_memory(gl.int64, [WEIGHT_STAGES, 1], mbarrier.MBarrierLayout())
    x_full = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], mbarrier.MBarrierLayout())
    x_empty = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(WEIGHT_STAGES):
        mbarrier.init(w_full0.index(i), count=1)
        mbarrier.init(w_full1.index(i), count=1)
    for i in gl.static_range(X_STAGES):
        mbarrier.init(x_full.index(i), count=1)
        mbarrier.init(x_empty.index(i), count=2)
    if OPERAND_ORDER:
        staging0 = x_ring
        staging1 = x_ring
    else:
        staging0 = gl.allocate_shared_memory(out_ptr.dtype.element_ty, [BM // 2, out_desc.block_type.shape[1]], out_desc.layout)
        staging1 = gl.allocate_shared_memory(out_ptr.dtype.element_ty, [BM // 2, out_desc.block_type.shape[1]], out_desc.layout)
    fence_async_shared()
    thread_barrier()
    gl.warp_specialize(
        [
            (_group, (
                w_desc, s_desc, x_desc, words0, scales0, read_words0, read_scales0, x_ring, w_full0, x_full, x_empty,
                staging0, out_desc, out_ptr, fold_ptr, row_ptr, token_ptr, input_scale_ptr, bias_ptr, live_ptr, tile_to_expert,
                offsets, N, out_stride, k_stages, n_tiles, experts, row_expert, row_stride, input_scale_expert,
                0, BM, WEIGHT_STAGES, ACT, ACT_FN, OPERAND_ORDER,
            )),
            (_group, (
                w_desc, s_desc, x_desc, words1, scales1, read_words1, read_scales1, x_ring, w_full1, x_full, x_empty,
                staging1, out_desc, out_ptr, fold_ptr, row_ptr, token_ptr, input_scale_ptr, bias_ptr, live_ptr, tile_to_expert,
                offsets, N, out_stride, k_stages, n_tiles, experts, row_expert, row_stride, input_scale_expert,
                1, BM, WEIGHT_STAGES, ACT, ACT_FN, OPERAND_ORDER,
            )),
        ],
        [4],
        [248],
    )  # fmt: skip
