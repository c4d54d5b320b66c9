"""Grouped GEMM for Hopper, few rows an expert: bound by the bytes of the weights, whose stream goes on across tiles."""

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
from .hopper import decode_part, part_of, sum_parts
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

    words, scales, read_words, read_scales = weight_slots(w_desc, s_desc, STAGES, WARPS)
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
        load_weights(w_desc, s_desc, words, scales, bars.index(i), load_expert, load_column, load_k, i, more, X_BYTES)
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
        load_stage_x(x_desc, x_ring, bars.index(i), x_tile // n_tiles * BM, x_k, i, x_unit < units)
        x_k += 1
        x_left -= 1
        if x_left == 0:
            x_unit += stride
            x_tile = _tile_of_unit(x_unit, whole, split, REDUCE)
            x_k, x_left = _share_of(x_unit, whole, split, k_stages, REDUCE)
    if FP8:
        fold_next = fold_pairs(fold_ptr, gl.maximum(expert, 0), tile % n_tiles * COLUMNS, second, N, WARPS)

    step = 0
    for unit in range(start, units, stride):
        # Needed a tile from here: whoever waits for an expert's number waits for a load behind all the weights' copies.
        tile_later = _tile_of_unit(unit + 2 * stride, whole, split, REDUCE)
        expert_later = gl.load(tile_to_expert + gl.minimum(tile_later // n_tiles, last_tile))
        n_tile = tile % n_tiles
        m0 = tile // n_tiles * BM
        token_scale = token_scales(token_ptr, live_ptr, m0, False, BM, ACC)
        live = live_rows(live_ptr, m0, BM, COLUMNS, WARPS, OPERAND_ORDER)
        row = weight_rows(n_tile * COLUMNS, second, WARPS, ACC)
        factor = row_factor(
            row_ptr, fold_ptr, input_scale_ptr, expert, row, N, row_expert, row_stride, input_scale_expert, FP8, FP16
        )
        fold = None
        if FP8:
            fold = fold_next
            fold_next = fold_pairs(fold_ptr, expert_next, tile_next % n_tiles * COLUMNS, second, N, WARPS)
        token = warpgroup_mma_init(gl.zeros([BN, BM], gl.float32, ACC))
        _, count = _share_of(unit, whole, split, k_stages, REDUCE)
        for _stage in range(count):
            slot = step % STAGES
            mbarrier.wait(bars.index(slot), (step // STAGES) & 1)
            for chunk in gl.static_range(2):
                w = words_of_slot(read_words, slot, chunk, WARPS)
                s = scales_of_slot(read_scales, slot, chunk, WARPS)
                for half in gl.static_range(PER_STAGE // 2):
                    a = decode_part(w, s, fold, half, BN, OPERAND, FP8, FP16)
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
                    load_weights(w_desc, s_desc, words, scales, bar, load_expert, load_column, load_k, free, more, X_BYTES)
                    load_stage_x(x_desc, x_ring, bar, load_m0, load_k, free, more)
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
            finish(
                acc, factor, token_scale, live, out_ptr, bias_ptr, expert, row, n_tile, m0,
                N, out_stride, BM, WARPS, ACT, ACT_FN, OPERAND_ORDER,
            )  # fmt: skip
        tile = tile_next
        tile_next = tile_later
        expert = expert_next
        expert_next = expert_later
