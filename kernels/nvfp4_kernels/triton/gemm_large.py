"""Hopper GEMM for many rows: NVFP4 weights x e4m3 or 16-bit activations on wgmma, persistent tiles.

Eight warps hold a tile of 128 output features x BM tokens. Weights (packed), scales and x come by bulk tensor copies into
rings in shared memory, across tiles; a weight step is decoded in registers while the products of the last one run: one
group of wgmma stays in flight.
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
from .hopper import (
    decode_part,
    fold_pairs,
    join_parts,
    scaled,
    share_of,
    store_bulk,
    store_direct,
    store_sum,
)


@gluon.jit
def _load_weights(w_desc, s_desc, words, scales, bar, n0, k, stage, pred):
    """Weight stage k (256 values of K) of rows n0.. into slot `stage`."""
    mbarrier.expect(bar, 2 * w_desc.block_type.nbytes + s_desc.block_type.nbytes, pred=pred)
    for chunk in gl.static_range(2):
        tma_load(w_desc, [n0, k * 32 + chunk * 16], bar, words.index(stage * 2 + chunk), pred=pred)
    tma_load(s_desc, [n0, k * 8], bar, scales.index(stage), pred=pred)


@gluon.jit
def _load_x(x_desc, x_ring, bars, m0, k, stage, XK: gl.constexpr, pred):
    mbarrier.expect(bars.index(stage), x_desc.block_type.nbytes, pred=pred)
    tma_load(x_desc, [m0, k * XK], bars.index(stage), x_ring.index(stage), pred=pred)


@gluon.jit(do_not_specialize=["M", "N", "stages", "whole", "split", "row_stride", "token_stride"])
def gemm_large(
    w_desc, s_desc, x_desc, out_desc, out_ptr, fold_ptr, row_ptr, token_ptr, bias_ptr, partial_ptr, count_ptr,
    N, M, stages, whole, split, row_stride, token_stride,
    BM: gl.constexpr, WEIGHT_STAGES: gl.constexpr, X_STAGES: gl.constexpr, GROUP: gl.constexpr,
    TOKEN: gl.constexpr, BIAS: gl.constexpr, REDUCE: gl.constexpr, BULK_STORE: gl.constexpr,
):  # fmt: skip
    """out [M, N] = x [M, K] @ weight [N, K]^T, see linear.py for the arguments.

    w_desc int32 [N, K/8] in boxes [128, 16], s_desc int16 [N, K/32] in boxes [128, 8], x_desc [M, K] in the permuted order of
    hopper.py in boxes [BM, 128 bytes]; stages = K / 256. The first `whole` tiles are a unit of work each. With REDUCE the K of
    each tile behind them is shared by `split` units, which differ by one stage at most: the last block of a tile adds up the
    fp32 partials of all, in a fixed order, and leaves the tile's counter at 0 again: partial fp32 [(tiles - whole) * split *
    128 * BM], count int32 [tiles - whole], zeros.
    """
    BN: gl.constexpr = 128
    FP8: gl.constexpr = x_desc.dtype == gl.float8e4nv
    FP16: gl.constexpr = x_desc.dtype == gl.float16
    XK: gl.constexpr = 128 if FP8 else 64  # values of K in an x stage: rows of 128 bytes
    PER_WEIGHT_STAGE: gl.constexpr = 256 // XK
    WARPS: gl.constexpr = [[16, 0], [32, 0], [64, 0]]
    WORDS: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0]], [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]], WARPS, [], [BN, 16]
    )
    PAIRS: gl.constexpr = gl.DistributedLinearLayout([[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], WARPS, [], [BN, 4])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BM, 32 if FP8 else 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, ACC, 4 if FP8 else 2)

    words = gl.allocate_shared_memory(gl.int32, [WEIGHT_STAGES * 2, BN, 16], w_desc.layout)
    scales = gl.allocate_shared_memory(gl.int16, [WEIGHT_STAGES, BN, 8], s_desc.layout)
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [X_STAGES, BM, XK], x_desc.layout)
    w_bars = gl.allocate_shared_memory(gl.int64, [WEIGHT_STAGES, 1], mbarrier.MBarrierLayout())
    x_bars = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(WEIGHT_STAGES):
        mbarrier.init(w_bars.index(i), count=1)
    for i in gl.static_range(X_STAGES):
        mbarrier.init(x_bars.index(i), count=1)
    if BULK_STORE:  # noqa: SIM108
        staging = gl.allocate_shared_memory(out_ptr.dtype.element_ty, [BM // 2, BN], out_desc.layout)
    else:
        staging = x_ring
    fence_async_shared()

    n_tiles = gl.cdiv(N, BN)
    m_tiles = gl.cdiv(M, BM)
    units = n_tiles * m_tiles
    if REDUCE:
        units = whole + (units - whole) * split
    stride = gl.num_programs(0)
    # The loads run ahead of the products, across units: cursors of the weight stage and of the x stage to load next.
    # Divisions happen between units alone.
    w_unit = gl.program_id(0)
    x_unit = w_unit
    w_tile, x_tile, w_k, w_left = share_of(w_unit, whole, split, stages, n_tiles, m_tiles, GROUP, REDUCE)
    x_k = w_k * PER_WEIGHT_STAGE
    x_left = w_left * PER_WEIGHT_STAGE
    for i in gl.static_range(WEIGHT_STAGES - 1):
        _load_weights(w_desc, s_desc, words, scales, w_bars.index(i), w_tile * BN, w_k, i, w_unit < units)
        w_k += 1
        w_left -= 1
        if w_left == 0:
            w_unit += stride
            w_tile, _, w_k, w_left = share_of(w_unit, whole, split, stages, n_tiles, m_tiles, GROUP, REDUCE)
    # The first weights are on their way while the kernel that prepares x still runs.
    wait_for_previous_kernel()
    for i in gl.static_range(X_STAGES - 1):
        _load_x(x_desc, x_ring, x_bars, x_tile * BM, x_k, i, XK, x_unit < units)
        x_k += 1
        x_left -= 1
        if x_left == 0:
            x_unit += stride
            _, x_tile, x_k, x_left = share_of(x_unit, whole, split, stages, n_tiles, m_tiles, GROUP, REDUCE)
            x_k *= PER_WEIGHT_STAGE
            x_left *= PER_WEIGHT_STAGE

    w_slot = 0
    w_phase = 0
    w_free = WEIGHT_STAGES - 1
    x_slot = 0
    x_phase = 0
    x_free = X_STAGES - 1
    for unit in range(gl.program_id(0), units, stride):
        n_tile, m_tile, _, count = share_of(unit, whole, split, stages, n_tiles, m_tiles, GROUP, REDUCE)
        fold = None
        if FP8:
            fold = fold_pairs(fold_ptr, n_tile * BN, N, BN, PAIRS)
        token = warpgroup_mma_init(gl.zeros([BN, BM], gl.float32, ACC))
        for _stage in range(count):
            mbarrier.wait(w_bars.index(w_slot), w_phase)
            for chunk in gl.static_range(2):
                w = words.index(w_slot * 2 + chunk).load(WORDS)
                s = scales.index(w_slot).slice(4 * chunk, 4, dim=1).load(PAIRS)
                for half in gl.static_range(PER_WEIGHT_STAGE // 2):
                    a = decode_part(w, s, fold, half, BN, OPERAND, FP8, FP16)
                    mbarrier.wait(x_bars.index(x_slot), x_phase)
                    token = warpgroup_mma(a, x_ring.index(x_slot).permute((1, 0)), token, is_async=True)
                    token = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[token]))
                    # The products before these are done, in every warp once past the barrier: their x stage is free.
                    thread_barrier()
                    _load_x(x_desc, x_ring, x_bars, x_tile * BM, x_k, x_free, XK, x_unit < units)
                    x_free = x_slot
                    x_slot += 1
                    if x_slot == X_STAGES:
                        x_slot = 0
                        x_phase ^= 1
                    x_k += 1
                    x_left -= 1
                    if x_left == 0:
                        x_unit += stride
                        _, x_tile, x_k, x_left = share_of(x_unit, whole, split, stages, n_tiles, m_tiles, GROUP, REDUCE)
                        x_k *= PER_WEIGHT_STAGE
                        x_left *= PER_WEIGHT_STAGE
            _load_weights(w_desc, s_desc, words, scales, w_bars.index(w_free), w_tile * BN, w_k, w_free, w_unit < units)
            w_free = w_slot
            w_slot += 1
            if w_slot == WEIGHT_STAGES:
                w_slot = 0
                w_phase ^= 1
            w_k += 1
            w_left -= 1
            if w_left == 0:
                w_unit += stride
                w_tile, _, w_k, w_left = share_of(w_unit, whole, split, stages, n_tiles, m_tiles, GROUP, REDUCE)
        acc = warpgroup_mma_wait(0, deps=[token])

        n = n_tile * BN + gl.arange(0, BN, gl.SliceLayout(1, ACC))
        m = m_tile * BM + gl.arange(0, BM, gl.SliceLayout(0, ACC))
        whole_tile = True
        if REDUCE:
            whole_tile = unit < whole
        if whole_tile:
            result = scaled(
                acc, n, m, N, M, fold_ptr, row_ptr, token_ptr, bias_ptr, row_stride, token_stride,
                out_ptr.dtype.element_ty, FP8, TOKEN, BIAS,
            )  # fmt: skip
            if BULK_STORE:
                store_bulk(result, out_desc, staging, n_tile * BN, m_tile * BM, BN, BM)
            else:
                store_direct(result, out_ptr, n, m, N, M)
        if REDUCE:  # noqa: SIM102
            if not whole_tile:
                rest = unit - whole
                tile = rest // split
                if join_parts(acc, partial_ptr, count_ptr, tile, rest, split, BN, BM, 8):
                    store_sum(
                        partial_ptr, tile, split, n_tile * BN, m_tile * BM, out_desc, staging, out_ptr,
                        N, M, fold_ptr, row_ptr, token_ptr, bias_ptr, row_stride, token_stride,
                        BN, BM, 8, FP8, TOKEN, BIAS, BULK_STORE,
                    )  # fmt: skip
    if BULK_STORE:
        tma_store_wait(0)
