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

from .gluon_compat import thread_barrier
from .hopper import decode_part, load_x, pieces_of, retire_products, tile_of
from .moe_hopper import (
    finish,
    fold_pairs,
    live_rows,
    load_weights,
    row_factor,
    scales_of_slot,
    token_scales,
    weight_rows,
    weight_slots,
    words_of_slot,
)


@gluon.jit
def _tile(unit, tile_to_expert, offsets, n_tiles, last_tile, BM: gl.constexpr, GROUP: gl.constexpr):
    """(expert, tile along n, first row of x) of a unit of work; units past the last tile's count as its own."""
    unit = gl.minimum(unit, (last_tile + 1) * n_tiles - 1)
    expert = gl.maximum(gl.load(tile_to_expert + unit // n_tiles), 0)
    first_tile = gl.load(offsets + expert) // BM
    m_tiles = gl.load(offsets + expert + 1) // BM - first_tile
    n_tile, m_tile = tile_of(unit - first_tile * n_tiles, n_tiles, m_tiles, GROUP)
    return expert, n_tile, (first_tile + m_tile) * BM


@gluon.jit
def _group(
    w_desc, s_desc, x_desc, words, scales, read_words, read_scales, x_ring, w_full, x_full, x_empty,
    out_ptr, fold_ptr, row_ptr, token_ptr, input_scale_ptr, bias_ptr, live_ptr, tile_to_expert,
    offsets, N, out_stride, k_stages, n_tiles, experts, row_expert, row_stride, input_scale_expert,
    HALF: gl.constexpr, BM: gl.constexpr, WEIGHT_STAGES: gl.constexpr, GROUP: gl.constexpr,
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

    tiles = gl.load(offsets + experts) // BM
    units = tiles * n_tiles
    last_tile = gl.maximum(tiles - 1, 0)
    stride = gl.num_programs(0)
    # The loads run ahead of the products, across tiles: cursors of the weight stage to load next, and of the one whose x is.
    w_unit = gl.program_id(0)
    x_unit = w_unit
    next_expert, next_n, next_m0 = _tile(w_unit, tile_to_expert, offsets, n_tiles, last_tile, BM, GROUP)
    w_expert = next_expert
    w_column = (2 * next_n + HALF) * COLUMNS
    w_k = 0
    for i in gl.static_range(WEIGHT_STAGES):
        load_weights(w_desc, s_desc, words, scales, w_full.index(i), w_expert, w_column, w_k, i, w_unit < units)
        w_k += 1
        if w_k == k_stages:
            w_k = 0
            w_unit += stride
            w_expert, w_n, _ = _tile(w_unit, tile_to_expert, offsets, n_tiles, last_tile, BM, GROUP)
            w_column = (2 * w_n + HALF) * COLUMNS
    gdc_wait()
    gdc_launch_dependents()
    x_k = 0  # in weight stages
    load_x(x_desc, x_ring, x_full, next_m0, HALF, HALF, x_unit < units)
    own_pair = 1
    own_phase = 1  # the first time around, slots are free
    w_slot = 0
    w_phase = 0
    pair = 0
    x_phase = 0
    for _unit in range(gl.program_id(0), units, stride):
        expert = next_expert
        half_n = 2 * next_n + HALF
        m0 = next_m0
        fold = None
        if FP8:
            fold = fold_pairs(fold_ptr, expert, half_n * COLUMNS, second, N, WARPS)
        token = warpgroup_mma_init(gl.zeros([BN, BM], gl.float32, ACC))
        for stage in range(k_stages):
            x_k += 1
            if x_k == k_stages:
                x_k = 0
                x_unit += stride
                next_expert, next_n, next_m0 = _tile(x_unit, tile_to_expert, offsets, n_tiles, last_tile, BM, GROUP)
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
                        stage * PER_STAGE + HALF, next_m0, x_k * PER_STAGE + HALF, x_unit < units, stage > 0,
                        chunk * PARTS + part, PER_STAGE, HALF,
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
                w_expert, w_n, _ = _tile(w_unit, tile_to_expert, offsets, n_tiles, last_tile, BM, GROUP)
                w_column = (2 * w_n + HALF) * COLUMNS
        acc = warpgroup_mma_wait(0, deps=[token])
        thread_barrier()
        mbarrier.arrive(x_empty.index(2 * (pair ^ 1) + 1), count=1)
        PART: gl.constexpr = BM // 2
        PART_ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, PART, 32 if FP8 else 16])
        row = weight_rows(half_n * COLUMNS, second, WARPS, PART_ACC)
        factor = row_factor(
            row_ptr, fold_ptr, input_scale_ptr, expert, row, N, row_expert, row_stride, input_scale_expert, FP8, FP16
        )
        halves = pieces_of(acc, 2)
        for half in gl.static_range(2):
            part0 = m0 + half * PART
            finish(
                gl.convert_layout(halves[half], PART_ACC, assert_trivial=True), factor,
                token_scales(token_ptr, live_ptr, part0, False, PART, PART_ACC),
                live_rows(live_ptr, part0, PART, COLUMNS, WARPS, OPERAND_ORDER), out_ptr, bias_ptr, expert, row, half_n, part0,
                N, out_stride, PART, WARPS, ACT, ACT_FN, OPERAND_ORDER,
            )  # fmt: skip


@gluon.jit(do_not_specialize=["n_tiles"])
def grouped_gemm_long_kernel(
    w_desc, s_desc, x_desc, out_ptr, fold_ptr, row_ptr, token_ptr, input_scale_ptr, bias_ptr, live_ptr, tile_to_expert,
    offsets, N, out_stride, k_stages, n_tiles, experts, row_expert, row_stride, input_scale_expert,
    BM: gl.constexpr, WEIGHT_STAGES: gl.constexpr, GROUP: gl.constexpr,
    ACT: gl.constexpr, ACT_FN: gl.constexpr, OPERAND_ORDER: gl.constexpr,
):  # fmt: skip
    """`grouped_gemm_kernel` for many rows, persistent: a block a multiprocessor, whose loads run ahead across tiles.

    256 rows halve what decoding costs a product, and leave no room for a second block. Boxes of w_desc and s_desc are half a
    tile's, for four warps; n_tiles counts whole tiles, of eight. Launched with four warps; four more are started here.
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
    fence_async_shared()
    thread_barrier()
    gl.warp_specialize(
        [
            (_group, (
                w_desc, s_desc, x_desc, words0, scales0, read_words0, read_scales0, x_ring, w_full0, x_full, x_empty,
                out_ptr, fold_ptr, row_ptr, token_ptr, input_scale_ptr, bias_ptr, live_ptr, tile_to_expert,
                offsets, N, out_stride, k_stages, n_tiles, experts, row_expert, row_stride, input_scale_expert,
                0, BM, WEIGHT_STAGES, GROUP, ACT, ACT_FN, OPERAND_ORDER,
            )),
            (_group, (
                w_desc, s_desc, x_desc, words1, scales1, read_words1, read_scales1, x_ring, w_full1, x_full, x_empty,
                out_ptr, fold_ptr, row_ptr, token_ptr, input_scale_ptr, bias_ptr, live_ptr, tile_to_expert,
                offsets, N, out_stride, k_stages, n_tiles, experts, row_expert, row_stride, input_scale_expert,
                1, BM, WEIGHT_STAGES, GROUP, ACT, ACT_FN, OPERAND_ORDER,
            )),
        ],
        [4],
        [248],
    )  # fmt: skip
