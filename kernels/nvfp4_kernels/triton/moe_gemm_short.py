"""Grouped GEMM for Hopper in e4m3 for a K of one stage, where a tile is over before its loads have paid."""

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
from .hopper import decode_fp8
from .moe_hopper import (
    finish,
    fold_pairs,
    live_rows,
    load_stage_x,
    load_weights,
    row_factor,
    scales_of_slot,
    token_scales,
    weight_rows,
    weight_slots,
    words_of_slot,
)


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

    words, scales, read_words, read_scales = weight_slots(w_desc, s_desc, WEIGHT_STAGES, WARPS)
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
        load_weights(w_desc, s_desc, words, scales, w_bars.index(i), load_expert, load_n * COLUMNS, 0, i, load_unit < end)
        load_unit += 1
        load_tile, load_n, load_expert, load_next = _next_along_n(
            load_tile, load_n, load_expert, load_next, tile_to_expert, n_tiles, last_tile
        )
    gdc_wait()
    gdc_launch_dependents()
    mbarrier.expect(x_bar, X_BYTES, pred=start < end)
    load_stage_x(x_desc, x_slots, x_bar, tile * BM, 0, 0, start < end)
    fold_next = fold_pairs(fold_ptr, expert, n_tile * COLUMNS, second, N, WARPS)

    x_step = 0
    for unit in range(start, end):
        step = unit - start
        m0 = tile * BM
        fold = fold_next
        ends = n_tile + 1 == n_tiles
        fold_next = fold_pairs(
            fold_ptr, gl.where(ends, expert_next, expert), gl.where(ends, 0, (n_tile + 1) * COLUMNS), second, N, WARPS
        )
        token_scale = token_scales(token_ptr, live_ptr, m0, False, BM, ACC)
        live = live_rows(live_ptr, m0, BM, COLUMNS, WARPS, OPERAND_ORDER)
        row = weight_rows(n_tile * COLUMNS, second, WARPS, ACC)
        factor = row_factor(
            row_ptr, fold_ptr, input_scale_ptr, expert, row, N, row_expert, row_stride, input_scale_expert, True, False
        )
        slot = step % WEIGHT_STAGES
        mbarrier.wait(x_bar, x_step & 1)
        mbarrier.wait(w_bars.index(slot), (step // WEIGHT_STAGES) & 1)
        token = warpgroup_mma_init(gl.zeros([BN, BM], gl.float32, ACC))
        for chunk in gl.static_range(2):
            w = words_of_slot(read_words, slot, chunk, WARPS)
            s = scales_of_slot(read_scales, slot, chunk, WARPS)
            a = decode_fp8(w, s, fold, BN, OPERAND)
            token = warpgroup_mma(a, x_slots.index(chunk).permute((1, 0)), token, is_async=True)
            token = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[token]))
        acc = warpgroup_mma_wait(0, deps=[token])
        # The products are done, in every warp past the barrier: their slots are free.
        thread_barrier()
        more = load_unit < end
        load_weights(w_desc, s_desc, words, scales, w_bars.index(slot), load_expert, load_n * COLUMNS, 0, slot, more)
        load_unit += 1
        load_tile, load_n, load_expert, load_next = _next_along_n(
            load_tile, load_n, load_expert, load_next, tile_to_expert, n_tiles, last_tile
        )
        if ends:
            mbarrier.expect(x_bar, X_BYTES, pred=unit + 1 < end)
            load_stage_x(x_desc, x_slots, x_bar, m0 + BM, 0, 0, unit + 1 < end)
        finish(
            acc, factor, token_scale, live, out_ptr, bias_ptr, expert, row, n_tile, m0,
            N, out_stride, BM, WARPS, ACT, ACT_FN, OPERAND_ORDER,
        )  # fmt: skip
        if ends:
            x_step += 1
        tile, n_tile, expert, expert_next = _next_along_n(tile, n_tile, expert, expert_next, tile_to_expert, n_tiles, last_tile)
