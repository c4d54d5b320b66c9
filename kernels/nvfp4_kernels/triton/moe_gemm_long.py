"""Grouped GEMM for Hopper, many rows and a long K: persistent tiles of 256 rows, whose loads run ahead across tiles."""

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
from .hopper import decode_part, tile_of
from .moe_hopper import (
    finish,
    fold_pairs,
    live_rows,
    load_weights,
    load_x,
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

    words, scales, read_words, read_scales = weight_slots(w_desc, s_desc, WEIGHT_STAGES, WARPS)
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
        load_weights(w_desc, s_desc, words, scales, w_bars.index(i), w_expert, w_column, w_k, i, w_unit < units)
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
        load_x(x_desc, None, x_row, x_ring, x_bars, x_k, i, WARPS, x_unit < units)
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
        fold = None
        if FP8:
            fold = fold_pairs(fold_ptr, expert, n_tile * COLUMNS, second, N, WARPS)
        token = warpgroup_mma_init(gl.zeros([BN, BM], gl.float32, ACC))
        for _stage in range(k_stages):
            mbarrier.wait(w_bars.index(w_slot), w_phase)
            for chunk in gl.static_range(2):
                w = words_of_slot(read_words, w_slot, chunk, WARPS)
                s = scales_of_slot(read_scales, w_slot, chunk, WARPS)
                for half in gl.static_range(PER_STAGE // 2):
                    a = decode_part(w, s, fold, half, BN, OPERAND, FP8, FP16)
                    mbarrier.wait(x_bars.index(x_slot), x_phase)
                    token = warpgroup_mma(a, x_ring.index(x_slot).permute((1, 0)), token, is_async=True)
                    token = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[token]))
                    # The products before these are done, in every warp once past the barrier: their x stage is free.
                    thread_barrier()
                    load_x(x_desc, None, x_row, x_ring, x_bars, x_k, x_free, WARPS, x_unit < units)
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
            load_weights(w_desc, s_desc, words, scales, w_bars.index(w_free), w_expert, w_column, w_k, w_free, w_unit < units)
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
        row = weight_rows(n_tile * COLUMNS, second, WARPS, PART_ACC)
        factor = row_factor(
            row_ptr, fold_ptr, input_scale_ptr, expert, row, N, row_expert, row_stride, input_scale_expert, FP8, FP16
        )
        low, high = gl.split(gl.permute(gl.reshape(acc, [BN, 2, PART]), [0, 2, 1]))
        low = gl.convert_layout(low, PART_ACC, assert_trivial=True)
        high = gl.convert_layout(high, PART_ACC, assert_trivial=True)
        for half in gl.static_range(2):
            part0 = m0 + half * PART
            finish(
                low if half == 0 else high, factor, token_scales(token_ptr, live_ptr, part0, False, PART, PART_ACC),
                live_rows(live_ptr, part0, PART, COLUMNS, WARPS, OPERAND_ORDER), out_ptr, bias_ptr, expert, row, n_tile, part0,
                N, out_stride, PART, WARPS, ACT, ACT_FN, OPERAND_ORDER,
            )  # fmt: skip
