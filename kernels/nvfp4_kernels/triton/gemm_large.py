"""Hopper GEMM for many rows: NVFP4 weights x e4m3 or 16-bit activations on wgmma, persistent tiles.

A tile is 128 output features x BM tokens. Two groups of four warps hold 64 features each and go on their own: while one
decodes a step of weights in registers, copies, or writes its tile, the products of the other run, and each keeps one group of
wgmma in flight. Each copies its own weights in bulk into a ring in shared memory; x, which both multiply, they copy in turns.
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

from .gluon_compat import reinterpret, thread_barrier, tma_load, tma_store_wait, wait_for_previous_kernel
from .hopper import (
    GROUP_PAIRS,
    GROUP_WORDS,
    add_parts,
    decode_part,
    give_part,
    helped_share_of,
    helped_units,
    lent_part,
    lent_parts,
    load_fold,
    load_scales,
    load_x,
    pairs_of_fold,
    retire_products,
    share_of,
    store_tile,
    take_parts,
)


@gluon.jit
def _load_weights(w_desc, s_desc, words, scales, full, n0, k, slot, pred):
    """Weight stage k (256 values of K) of 64 rows n0.. into `slot`."""
    bar = full.index(slot)
    mbarrier.expect(bar, w_desc.block_type.nbytes + s_desc.block_type.nbytes, pred=pred)
    tma_load(w_desc, [k * 2, n0, 0], bar, words.index(slot), pred=pred)
    tma_load(s_desc, [n0, k * 8], bar, scales.index(slot), pred=pred)


@gluon.jit
def _operand(words, scales, slot, chunk: gl.constexpr):
    """A group's words [64, 16] and scale pairs [64, 4] of 128 values of K."""
    return words.index(slot * 2 + chunk).load(GROUP_WORDS), scales.index(slot).slice(4 * chunk, 4, dim=1).load(GROUP_PAIRS)


@gluon.jit
def _unit_of(unit, whole, split, stages, n_tiles, m_tiles, GROUP: gl.constexpr, REDUCE: gl.constexpr):
    """(n, m, first stage, stages) of a unit of work."""
    if REDUCE == 2:
        n, m, first, count = helped_share_of(unit, whole, split, stages, n_tiles, m_tiles, GROUP)
    else:
        n, m, first, count = share_of(unit, whole, split, stages, n_tiles, m_tiles, GROUP, REDUCE == 1)
    return n, m, first, count


@gluon.jit
def _stage(
    token, w, s, fold, words, scales, w_full, x_desc, x_ring, x_full, x_empty, w_slot, next_w_slot, next_w_phase,
    pair, x_phase, own_pair, own_phase, m0, x_k, next_m0, next_x_k, next_live, begun, last,
    HALF: gl.constexpr, ACC: gl.constexpr,
):  # fmt: skip
    """The products of a weight stage; meanwhile the group copies the x stages of its parity, two further.

    w, s: the words and scale pairs of its first half. begun: this is not the tile's first stage; last: it is the last.
    """
    BN: gl.constexpr = 64
    FP8: gl.constexpr = x_ring.dtype == gl.float8e4nv
    FP16: gl.constexpr = x_ring.dtype == gl.float16
    PARTS: gl.constexpr = 1 if FP8 else 2  # x stages of a chunk of 128 values of K
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, ACC, 4 if FP8 else 2)
    for chunk in gl.static_range(2):
        for part in gl.static_range(PARTS):
            a = decode_part(w, s, fold, part, BN, OPERAND, FP8, FP16)
            slot = 2 * pair + (chunk * PARTS + part) % 2
            mbarrier.wait(x_full.index(slot), x_phase)
            token = warpgroup_mma(a, x_ring.index(slot).permute((1, 0)), token, is_async=True)
            # The next words are on their way from shared memory while the group waits.
            if part == PARTS - 1:
                if chunk == 0:
                    w, s = _operand(words, scales, w_slot, 1)
                else:
                    mbarrier.wait(w_full.index(next_w_slot), next_w_phase, pred=not last)
                    w, s = _operand(words, scales, next_w_slot, 0)
            token, pair, x_phase, own_pair, own_phase = retire_products(
                token, x_desc, x_ring, x_full, x_empty, pair, x_phase, own_pair, own_phase, m0, x_k, next_m0, next_x_k,
                next_live, begun, chunk * PARTS + part, 2 * PARTS, HALF,
            )  # fmt: skip
    return token, w, s, pair, x_phase, own_pair, own_phase


@gluon.jit
def _group(
    w_desc, s_desc, x_desc, out_desc, words, read_words, scales, x_ring, w_full, x_full, x_empty, staging,
    out_ptr, fold_ptr, row_ptr, token_ptr, bias_ptr, partial_ptr, count_ptr,
    N, M, stages, whole, split, row_stride, token_stride, units,
    HALF: gl.constexpr, BM: gl.constexpr, WEIGHT_STAGES: gl.constexpr, GROUP: gl.constexpr,
    TOKEN: gl.constexpr, BIAS: gl.constexpr, REDUCE: gl.constexpr, BULK_STORE: gl.constexpr,
):  # fmt: skip
    """Four warps: features 64 HALF .. 64 HALF + 63 of every tile, and the x stages of this parity."""
    BN: gl.constexpr = 64
    FP8: gl.constexpr = x_ring.dtype == gl.float8e4nv
    PER_WEIGHT_STAGE: gl.constexpr = 2 if FP8 else 4
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 32 if FP8 else 16])

    n_tiles = gl.cdiv(N, 2 * BN)
    m_tiles = gl.cdiv(M, BM)
    stride = gl.num_programs(0)
    # The copies of weights run ahead of the products, across units.
    w_unit = gl.program_id(0)
    next_n, next_m, next_k, next_count = _unit_of(w_unit, whole, split, stages, n_tiles, m_tiles, GROUP, REDUCE)
    w_tile = next_n
    w_k = next_k
    w_left = next_count
    for i in gl.static_range(WEIGHT_STAGES):
        _load_weights(w_desc, s_desc, words, scales, w_full, w_tile * 2 * BN + HALF * BN, w_k, i, w_unit < units)
        w_k += 1
        w_left -= 1
        if w_left == 0:
            w_unit += stride
            w_tile, _, w_k, w_left = _unit_of(w_unit, whole, split, stages, n_tiles, m_tiles, GROUP, REDUCE)
    next_fold = gl.full([BN], 1.0, gl.float32, gl.SliceLayout(1, GROUP_PAIRS))
    if FP8:
        next_fold = load_fold(fold_ptr, next_n * 2 * BN + HALF * BN, N, BN, GROUP_PAIRS)
    # The first weights are on their way while the kernel that prepares x still runs.
    wait_for_previous_kernel()
    load_x(x_desc, x_ring, x_full, next_m * BM, next_k * PER_WEIGHT_STAGE + HALF, HALF, True)
    own_pair = 1
    own_phase = 1  # the first time around, slots are free
    w_slot = 0
    w_phase = 0
    pair = 0
    x_phase = 0
    for unit in range(gl.program_id(0), units, stride):
        n0 = next_n * 2 * BN + HALF * BN
        m0 = next_m * BM
        x_k = next_k * PER_WEIGHT_STAGE + HALF
        count = next_count
        writes = True  # this block alone writes the tile
        if REDUCE == 1:
            writes = unit < whole
        if REDUCE == 2:
            writes = (unit < whole) | (next_k == 0)
        fold = None
        if FP8:
            fold = pairs_of_fold(next_fold, GROUP_PAIRS)
        if unit + stride < units:
            next_n, next_m, next_k, next_count = _unit_of(unit + stride, whole, split, stages, n_tiles, m_tiles, GROUP, REDUCE)
            if FP8:
                next_fold = load_fold(fold_ptr, next_n * 2 * BN + HALF * BN, N, BN, GROUP_PAIRS)
        tile_scales = None
        if BULK_STORE:
            # Not for a part of a tile: it gets its own, or is another block's to scale.
            rows = N
            columns = M
            if REDUCE:
                rows = gl.where(writes, N, 0)
                columns = gl.where(writes, M, 0)
            tile_scales = load_scales(
                n0, m0, rows, columns, fold_ptr, row_ptr, token_ptr, bias_ptr, row_stride, token_stride, ACC, FP8, TOKEN, BIAS
            )
        token = warpgroup_mma_init(gl.zeros([BN, BM], gl.float32, ACC))
        mbarrier.wait(w_full.index(w_slot), w_phase)
        w, s = _operand(read_words, scales, w_slot, 0)
        for step in range(count):
            last = step == count - 1
            next_row = gl.where(last, next_m * BM, m0)
            next_x_k = gl.where(last, next_k * PER_WEIGHT_STAGE + HALF, x_k + PER_WEIGHT_STAGE)
            next_live = (step < count - 1) | (unit + stride < units)
            next_w_slot = w_slot + 1
            next_w_phase = w_phase
            if next_w_slot == WEIGHT_STAGES:
                next_w_slot = 0
                next_w_phase ^= 1
            token, w, s, pair, x_phase, own_pair, own_phase = _stage(
                token, w, s, fold, read_words, scales, w_full, x_desc, x_ring, x_full, x_empty, w_slot, next_w_slot,
                next_w_phase, pair, x_phase, own_pair, own_phase, m0, x_k, next_row, next_x_k, next_live, step > 0, last,
                HALF, ACC,
            )  # fmt: skip
            x_k = next_x_k
            # All four warps have read this stage's weights: before the last barrier.
            _load_weights(w_desc, s_desc, words, scales, w_full, w_tile * 2 * BN + HALF * BN, w_k, w_slot, w_unit < units)
            w_k += 1
            w_left -= 1
            if w_left == 0:
                w_unit += stride
                w_tile, _, w_k, w_left = _unit_of(w_unit, whole, split, stages, n_tiles, m_tiles, GROUP, REDUCE)
            w_slot = next_w_slot
            w_phase = next_w_phase
        acc = warpgroup_mma_wait(0, deps=[token])
        thread_barrier()
        mbarrier.arrive(x_empty.index(2 * (pair ^ 1) + 1), count=1)

        if writes:
            if REDUCE == 2:
                tile, place, parts = lent_parts(split, whole, n_tiles * m_tiles)
                parts = gl.where(unit < whole, 0, parts)
                at = partial_ptr + (place * 2 + HALF).to(gl.int64) * (BN * BM)
                acc = take_parts(acc, at, 2 * BN * BM, count_ptr + tile * 2 + HALF, parts)
            store_tile(
                acc, tile_scales, n0, m0, out_desc, staging, out_ptr, N, M, fold_ptr, row_ptr, token_ptr, bias_ptr, row_stride,
                token_stride, FP8, TOKEN, BIAS, BULK_STORE,
            )  # fmt: skip
        if REDUCE == 2:  # noqa: SIM102
            if not writes:
                tile, place = lent_part(unit, whole, split, n_tiles * m_tiles)
                at = partial_ptr + (place * 2 + HALF).to(gl.int64) * (BN * BM)
                give_part(acc, at, count_ptr + tile * 2 + HALF)
        if REDUCE == 1:  # noqa: SIM102
            if not writes:
                rest = unit - whole
                add_parts(
                    acc, partial_ptr, count_ptr, rest // split * 2 + HALF, rest % split, split, n0, m0, out_desc, staging,
                    out_ptr, N, M, fold_ptr, row_ptr, token_ptr, bias_ptr, row_stride, token_stride,
                    FP8, TOKEN, BIAS, BULK_STORE,
                )  # fmt: skip
    if BULK_STORE:
        tma_store_wait(0)


@gluon.jit(do_not_specialize=["M", "N", "stages", "whole", "split", "row_stride", "token_stride"])
def gemm_large(
    w_desc, s_desc, x_desc, out_desc, out_ptr, fold_ptr, row_ptr, token_ptr, bias_ptr, partial_ptr, count_ptr,
    N, M, stages, whole, split, row_stride, token_stride,
    BM: gl.constexpr, WEIGHT_STAGES: gl.constexpr, GROUP: gl.constexpr, TOKEN: gl.constexpr, BIAS: gl.constexpr,
    REDUCE: gl.constexpr, BULK_STORE: gl.constexpr,
):  # fmt: skip
    """out [M, N] = x [M, K] @ weight [N, K]^T, see linear.py for the arguments.

    w_desc int32 [K/128, N, 16] in boxes [2, 64, 16], s_desc int16 [N, K/32] in boxes [64, 8], x_desc [M, K] in the permuted
    order of hopper.py in boxes [BM, 128 bytes], out_desc in boxes [BM / 8, 64] with BULK_STORE; stages = K / 256, rounded up.
    The first `whole` tiles are a unit of work each. With REDUCE 1 the K of each tile behind them is shared by `split` units,
    which differ by one stage at most, see `add_parts`; no block has more than one of these. partial: fp32 [(tiles - whole) *
    split * 128 * BM], count: int32 zeros [4 * (tiles - whole)]. With REDUCE 2 each of these tiles lends `split` stages to
    blocks without one, see `helped_share_of`; partial: fp32 [blocks * 128 * BM], count: int32 zeros [2 * (tiles - whole)].
    Launched with four warps; four more are started here.
    """
    DTYPE: gl.constexpr = out_ptr.dtype.element_ty
    X_STAGES: gl.constexpr = 4  # two of each parity
    READ: gl.constexpr = gl.NVMMASharedLayout(64, 32, 2)
    words0 = gl.allocate_shared_memory(gl.int32, [WEIGHT_STAGES, 2, 64, 16], w_desc.layout)
    words1 = gl.allocate_shared_memory(gl.int32, [WEIGHT_STAGES, 2, 64, 16], w_desc.layout)
    scales0 = gl.allocate_shared_memory(gl.int16, [WEIGHT_STAGES, 64, 8], s_desc.layout)
    scales1 = gl.allocate_shared_memory(gl.int16, [WEIGHT_STAGES, 64, 8], s_desc.layout)
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
    if BULK_STORE:
        staging0 = gl.allocate_shared_memory(DTYPE, [BM // 2, 64], out_desc.layout)
        staging1 = gl.allocate_shared_memory(DTYPE, [BM // 2, 64], out_desc.layout)
    else:
        staging0 = x_ring
        staging1 = x_ring
    fence_async_shared()
    thread_barrier()
    units = gl.cdiv(N, 128) * gl.cdiv(M, BM)
    if REDUCE == 1:
        units = whole + (units - whole) * split
    if REDUCE == 2:
        units = helped_units(whole, split, units)
    gl.warp_specialize(
        [
            (_group, (
                w_desc, s_desc, x_desc, out_desc, words0, reinterpret(words0, gl.int32, [WEIGHT_STAGES * 2, 64, 16], READ),
                scales0, x_ring, w_full0, x_full, x_empty, staging0,
                out_ptr, fold_ptr, row_ptr, token_ptr, bias_ptr, partial_ptr, count_ptr,
                N, M, stages, whole, split, row_stride, token_stride, units,
                0, BM, WEIGHT_STAGES, GROUP, TOKEN, BIAS, REDUCE, BULK_STORE,
            )),
            (_group, (
                w_desc, s_desc, x_desc, out_desc, words1, reinterpret(words1, gl.int32, [WEIGHT_STAGES * 2, 64, 16], READ),
                scales1, x_ring, w_full1, x_full, x_empty, staging1,
                out_ptr, fold_ptr, row_ptr, token_ptr, bias_ptr, partial_ptr, count_ptr,
                N, M, stages, whole, split, row_stride, token_stride, units,
                1, BM, WEIGHT_STAGES, GROUP, TOKEN, BIAS, REDUCE, BULK_STORE,
            )),
        ],
        [4],
        [248],
    )  # fmt: skip
