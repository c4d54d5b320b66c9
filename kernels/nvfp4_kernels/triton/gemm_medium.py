"""Hopper GEMM for hundreds of rows: gemm_large.py's work with warps of their own for the copies.

A tile is 128 output features x BM tokens. Two groups of four warps hold 64 features each and go on their own: while one
decodes, or writes its tile, the other multiplies. A ninth warp copies weights, scales and x into rings for both.
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

from .gluon_compat import thread_barrier, tma_load, tma_store_wait, wait_for_previous_kernel
from .hopper import GROUP_PAIRS, GROUP_WORDS, add_parts, decode_part, load_fold, pairs_of_fold, share_of, store_tile


@gluon.jit
def _operand(words, scales, slot, chunk: gl.constexpr, HALF: gl.constexpr):
    """A group's words [64, 16] and scale pairs [64, 4] of 128 values of K."""
    w = words.index(slot * 2 + chunk).slice(HALF * 64, 64, dim=0).load(GROUP_WORDS)
    s = scales.index(slot).slice(HALF * 64, 64, dim=0).slice(4 * chunk, 4, dim=1).load(GROUP_PAIRS)
    return w, s


@gluon.jit
def _multiply(
    words, scales, x_ring, w_full, w_empty, x_full, x_empty, staging, out_desc,
    out_ptr, fold_ptr, row_ptr, token_ptr, bias_ptr, partial_ptr, count_ptr,
    N, M, stages, whole, split, row_stride, token_stride, units,
    HALF: gl.constexpr, BM: gl.constexpr, WEIGHT_STAGES: gl.constexpr, X_STAGES: gl.constexpr, GROUP: gl.constexpr,
    TOKEN: gl.constexpr, BIAS: gl.constexpr, REDUCE: gl.constexpr, BULK_STORE: gl.constexpr,
):  # fmt: skip
    """Four warps: features 64 HALF .. 64 HALF + 63 of every tile."""
    BN: gl.constexpr = 64
    FP8: gl.constexpr = x_ring.dtype == gl.float8e4nv
    FP16: gl.constexpr = x_ring.dtype == gl.float16
    PER_WEIGHT_STAGE: gl.constexpr = 2 if FP8 else 4
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 32 if FP8 else 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, ACC, 4 if FP8 else 2)

    wait_for_previous_kernel()
    n_tiles = gl.cdiv(N, 2 * BN)
    m_tiles = gl.cdiv(M, BM)
    w_slot = 0
    w_phase = 0
    x_slot = 0
    x_phase = 0
    x_last = X_STAGES - 1
    begun = False
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        n_tile, m_tile, _, count = share_of(unit, whole, split, stages, n_tiles, m_tiles, GROUP, REDUCE)
        n0 = n_tile * 2 * BN + HALF * BN
        fold = None
        if FP8:
            fold = pairs_of_fold(load_fold(fold_ptr, n0, N, BN, GROUP_PAIRS), GROUP_PAIRS)
        token = warpgroup_mma_init(gl.zeros([BN, BM], gl.float32, ACC))
        mbarrier.wait(w_full.index(w_slot), w_phase)
        w, s = _operand(words, scales, w_slot, 0, HALF)
        for stage in range(count):
            next_slot = w_slot + 1
            next_phase = w_phase
            if next_slot == WEIGHT_STAGES:
                next_slot = 0
                next_phase = w_phase ^ 1
            for chunk in gl.static_range(2):
                for half in gl.static_range(PER_WEIGHT_STAGE // 2):
                    a = decode_part(w, s, fold, half, BN, OPERAND, FP8, FP16)
                    mbarrier.wait(x_full.index(x_slot), x_phase)
                    token = warpgroup_mma(a, x_ring.index(x_slot).permute((1, 0)), token, is_async=True)
                    # The next words are on their way from shared memory while this group waits.
                    if half == PER_WEIGHT_STAGE // 2 - 1:
                        if chunk == 0:
                            w, s = _operand(words, scales, w_slot, 1, HALF)
                        else:
                            mbarrier.wait(w_full.index(next_slot), next_phase, pred=stage < count - 1)
                            w, s = _operand(words, scales, next_slot, 0, HALF)
                    token = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[token]))
                    # The products before these are done, in every warp once past the barrier.
                    thread_barrier()
                    mbarrier.arrive(x_empty.index(x_last), count=1, pred=begun)
                    if chunk == 1 and half == PER_WEIGHT_STAGE // 2 - 1:
                        mbarrier.arrive(w_empty.index(w_slot), count=1)
                    begun = True
                    x_last = x_slot
                    x_slot += 1
                    if x_slot == X_STAGES:
                        x_slot = 0
                        x_phase ^= 1
            w_slot = next_slot
            w_phase = next_phase
        acc = warpgroup_mma_wait(0, deps=[token])

        whole_tile = True
        if REDUCE:
            whole_tile = unit < whole
        if whole_tile:
            store_tile(
                acc, None, n0, m_tile * BM, out_desc, staging, out_ptr, N, M, fold_ptr, row_ptr, token_ptr, bias_ptr,
                row_stride, token_stride, FP8, TOKEN, BIAS, BULK_STORE,
            )  # fmt: skip
        if REDUCE:  # noqa: SIM102
            if not whole_tile:
                rest = unit - whole
                add_parts(
                    acc, partial_ptr, count_ptr, rest // split * 2 + HALF, rest % split, split, n0, m_tile * BM, out_desc,
                    staging, out_ptr, N, M, fold_ptr, row_ptr, token_ptr, bias_ptr, row_stride, token_stride,
                    FP8, TOKEN, BIAS, BULK_STORE,
                )  # fmt: skip
    if BULK_STORE:
        tma_store_wait(0)


@gluon.jit
def _load_weights(w_desc, s_desc, words, scales, full, n0, k, slot):
    """Weight stage k (256 values of K) of rows n0.. into `slot`."""
    bar = full.index(slot)
    mbarrier.expect(bar, 2 * w_desc.block_type.nbytes + s_desc.block_type.nbytes)
    for chunk in gl.static_range(2):
        tma_load(w_desc, [n0, k * 32 + chunk * 16], bar, words.index(slot * 2 + chunk))
    tma_load(s_desc, [n0, k * 8], bar, scales.index(slot))


@gluon.jit
def _copy(
    w_desc, s_desc, x_desc, words, scales, x_ring, w_full, w_empty, x_full, x_empty, N, M, stages, whole, split, units,
    BM: gl.constexpr, WEIGHT_STAGES: gl.constexpr, X_STAGES: gl.constexpr, GROUP: gl.constexpr, REDUCE: gl.constexpr,
):  # fmt: skip
    """One warp: all copies, in the order of their use, as far ahead as the rings are long."""
    PER_WEIGHT_STAGE: gl.constexpr = 2 if x_desc.dtype == gl.float8e4nv else 4
    XK: gl.constexpr = 256 // PER_WEIGHT_STAGE
    # Weights are copied this many stages before x, which waits for them in one queue: further, and x would wait for slots of
    # weights that are still in use.
    AHEAD: gl.constexpr = max(0, WEIGHT_STAGES - X_STAGES // PER_WEIGHT_STAGE)
    n_tiles = gl.cdiv(N, 128)
    m_tiles = gl.cdiv(M, BM)
    stride = gl.num_programs(0)
    w_unit = gl.program_id(0)
    w_tile, _, w_k, w_left = share_of(w_unit, whole, split, stages, n_tiles, m_tiles, GROUP, REDUCE)
    for i in gl.static_range(WEIGHT_STAGES):
        if w_unit < units:
            _load_weights(w_desc, s_desc, words, scales, w_full, w_tile * 128, w_k, i)
        w_k += 1
        w_left -= 1
        if w_left == 0:
            w_unit += stride
            w_tile, _, w_k, w_left = share_of(w_unit, whole, split, stages, n_tiles, m_tiles, GROUP, REDUCE)
    # The first weights are on their way while the kernel that prepares x still runs.
    wait_for_previous_kernel()
    early = WEIGHT_STAGES - AHEAD  # stages whose weights are there already
    w_slot = 0
    w_phase = 0
    x_slot = 0
    x_phase = 1  # the first time around, slots are free
    for unit in range(gl.program_id(0), units, stride):
        _, x_tile, first, count = share_of(unit, whole, split, stages, n_tiles, m_tiles, GROUP, REDUCE)
        for stage in range(first, first + count):
            if early > 0:
                early -= 1
            elif w_unit < units:
                mbarrier.wait(w_empty.index(w_slot), w_phase)
                _load_weights(w_desc, s_desc, words, scales, w_full, w_tile * 128, w_k, w_slot)
                w_slot += 1
                if w_slot == WEIGHT_STAGES:
                    w_slot = 0
                    w_phase ^= 1
                w_k += 1
                w_left -= 1
                if w_left == 0:
                    w_unit += stride
                    w_tile, _, w_k, w_left = share_of(w_unit, whole, split, stages, n_tiles, m_tiles, GROUP, REDUCE)
            for i in gl.static_range(PER_WEIGHT_STAGE):
                mbarrier.wait(x_empty.index(x_slot), x_phase)
                mbarrier.expect(x_full.index(x_slot), x_desc.block_type.nbytes)
                k = stage * PER_WEIGHT_STAGE + i
                tma_load(x_desc, [x_tile * BM, k * XK], x_full.index(x_slot), x_ring.index(x_slot))
                x_slot += 1
                if x_slot == X_STAGES:
                    x_slot = 0
                    x_phase ^= 1


@gluon.jit(do_not_specialize=["M", "N", "stages", "whole", "split", "row_stride", "token_stride"])
def gemm_medium(
    w_desc, s_desc, x_desc, out_desc, out_ptr, fold_ptr, row_ptr, token_ptr, bias_ptr, partial_ptr, count_ptr,
    N, M, stages, whole, split, row_stride, token_stride,
    BM: gl.constexpr, WEIGHT_STAGES: gl.constexpr, X_STAGES: gl.constexpr, GROUP: gl.constexpr,
    TOKEN: gl.constexpr, BIAS: gl.constexpr, REDUCE: gl.constexpr, BULK_STORE: gl.constexpr,
):  # fmt: skip
    """out [M, N] = x [M, K] @ weight [N, K]^T: arguments as of gemm_large, but w_desc int32 [N, K/8] in boxes [128, 16] and
    s_desc in boxes [128, 8]. Launched with four warps; eight more are started here."""
    words = gl.allocate_shared_memory(gl.int32, [WEIGHT_STAGES * 2, 128, 16], w_desc.layout)
    scales = gl.allocate_shared_memory(gl.int16, [WEIGHT_STAGES, 128, 8], s_desc.layout)
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [X_STAGES, BM, x_desc.block_type.shape[1]], x_desc.layout)
    w_full = gl.allocate_shared_memory(gl.int64, [WEIGHT_STAGES, 1], mbarrier.MBarrierLayout())
    w_empty = gl.allocate_shared_memory(gl.int64, [WEIGHT_STAGES, 1], mbarrier.MBarrierLayout())
    x_full = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], mbarrier.MBarrierLayout())
    x_empty = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(WEIGHT_STAGES):
        mbarrier.init(w_full.index(i), count=1)
        mbarrier.init(w_empty.index(i), count=2)
    for i in gl.static_range(X_STAGES):
        mbarrier.init(x_full.index(i), count=1)
        mbarrier.init(x_empty.index(i), count=2)
    if BULK_STORE:
        staging = gl.allocate_shared_memory(out_ptr.dtype.element_ty, [2, BM // 2, 64], out_desc.layout)
        first_staging = staging.index(0)
        second_staging = staging.index(1)
    else:
        first_staging = x_ring
        second_staging = x_ring
    fence_async_shared()
    thread_barrier()
    units = gl.cdiv(N, 128) * gl.cdiv(M, BM)
    if REDUCE:
        units = whole + (units - whole) * split
    # Registers as they would be shared out anyway: ptxas serializes the products if any warps are given fewer.
    gl.warp_specialize(
        [
            (_multiply, (
                words, scales, x_ring, w_full, w_empty, x_full, x_empty, first_staging, out_desc,
                out_ptr, fold_ptr, row_ptr, token_ptr, bias_ptr, partial_ptr, count_ptr,
                N, M, stages, whole, split, row_stride, token_stride, units,
                0, BM, WEIGHT_STAGES, X_STAGES, GROUP, TOKEN, BIAS, REDUCE, BULK_STORE,
            )),
            (_multiply, (
                words, scales, x_ring, w_full, w_empty, x_full, x_empty, second_staging, out_desc,
                out_ptr, fold_ptr, row_ptr, token_ptr, bias_ptr, partial_ptr, count_ptr,
                N, M, stages, whole, split, row_stride, token_stride, units,
                1, BM, WEIGHT_STAGES, X_STAGES, GROUP, TOKEN, BIAS, REDUCE, BULK_STORE,
            )),
            (_copy, (
                w_desc, s_desc, x_desc, words, scales, x_ring, w_full, w_empty, x_full, x_empty,
                N, M, stages, whole, split, units, BM, WEIGHT_STAGES, X_STAGES, GROUP, REDUCE,
            )),
        ],
        [4, 1],
        [168, 168],
    )  # fmt: skip
