"""Hopper GEMM for tens of rows: bound by the bytes of the weights, on wgmma.

A block of four or eight warps holds 16 output features a warp and up to 64 tokens. One bulk-copied stage brings 256 values of
K: packed weights, scales and x, several stages ahead. Split-K adds up in the last block of a tile.
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

from .gluon_compat import thread_barrier, tma_load, wait_for_previous_kernel
from .hopper import (
    decode_part,
    load_fold,
    pairs_of_fold,
    part_of,
    scaled,
    store_direct,
    sum_parts,
)


@gluon.jit
def _load_weights(w_desc, s_desc, x_desc, words, scales, bars, n0, k, slot, pred):
    """Weights and scales of stage k into `slot`, whose barrier is told to expect x, too."""
    bar = bars.index(slot)
    mbarrier.expect(bar, w_desc.block_type.nbytes + s_desc.block_type.nbytes + x_desc.block_type.nbytes, pred=pred)
    tma_load(w_desc, [n0, k * 32], bar, words.index(slot), pred=pred)
    tma_load(s_desc, [n0, k * 8], bar, scales.index(slot), pred=pred)


@gluon.jit(do_not_specialize=["M", "N", "stages", "split", "row_stride", "token_stride"])
def gemm_decode(
    w_desc, s_desc, x_desc, out_ptr, fold_ptr, row_ptr, token_ptr, bias_ptr, partial_ptr, count_ptr,
    N, M, stages, split, row_stride, token_stride,
    BM: gl.constexpr, WARPS: gl.constexpr, STAGES: gl.constexpr, BURST: gl.constexpr,
    TOKEN: gl.constexpr, BIAS: gl.constexpr, REDUCE: gl.constexpr,
):  # fmt: skip
    """out [M, N] = x [M, K] @ weight [N, K]^T for BM <= 64, see linear.py for the arguments.

    w_desc in boxes [16 WARPS, 32], x_desc [BM, 256], K permuted; stages = K / 256, which `split` units of work share.
    BURST, a divisor of STAGES: so many stages are loaded at once, so that neighbouring bytes of a row meet in the memory.
    The rest as gemm_large.
    """
    gl.static_assert(BURST < STAGES and STAGES % BURST == 0)
    BN: gl.constexpr = 16 * WARPS
    FP8: gl.constexpr = x_desc.dtype == gl.float8e4nv
    FP16: gl.constexpr = x_desc.dtype == gl.float16
    STEP: gl.constexpr = 128 if FP8 else 64
    WARP_ROWS: gl.constexpr = [[16, 0], [32, 0]] if WARPS == 4 else [[16, 0], [32, 0], [64, 0]]
    WORDS: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0]], [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]], WARP_ROWS, [], [BN, 16]
    )
    PAIRS: gl.constexpr = gl.DistributedLinearLayout([[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], WARP_ROWS, [], [BN, 4])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BM, 32 if FP8 else 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, ACC, 4 if FP8 else 2)

    words = gl.allocate_shared_memory(gl.int32, [STAGES, BN, 32], w_desc.layout)
    scales = gl.allocate_shared_memory(gl.int16, [STAGES, BN, 8], s_desc.layout)
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BM, 256], x_desc.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()

    m_tiles = gl.cdiv(M, BM)
    units = gl.cdiv(N, BN) * m_tiles * split
    stride = gl.num_programs(0)
    # The loads run ahead of the products, across units; divisions happen between units alone.
    ahead = gl.program_id(0)
    n_ahead = ahead // split // m_tiles * BN
    k_ahead, left = part_of(ahead % split, stages, split)
    for i in gl.static_range(STAGES - BURST):
        _load_weights(w_desc, s_desc, x_desc, words, scales, bars, n_ahead, k_ahead, i, ahead < units)
        k_ahead += 1
        left -= 1
        if left == 0:
            ahead += stride
            n_ahead = ahead // split // m_tiles * BN
            k_ahead, left = part_of(ahead % split, stages, split)
    # The weights of the first stages are on their way while the kernel that prepares x still runs.
    wait_for_previous_kernel()
    x_unit = gl.program_id(0)
    m_ahead = x_unit // split % m_tiles * BM
    x_k, x_left = part_of(x_unit % split, stages, split)
    for i in gl.static_range(STAGES - BURST):
        tma_load(x_desc, [m_ahead, x_k * 256], bars.index(i), x_ring.index(i), pred=x_unit < units)
        x_k += 1
        x_left -= 1
        if x_left == 0:
            x_unit += stride
            m_ahead = x_unit // split % m_tiles * BM
            x_k, x_left = part_of(x_unit % split, stages, split)

    slot = 0
    phase = 0
    free = STAGES - BURST
    for unit in range(gl.program_id(0), units, stride):
        tile = unit // split
        fold = None
        if FP8:
            fold = pairs_of_fold(load_fold(fold_ptr, tile // m_tiles * BN, N, BN, PAIRS), PAIRS)
        token = warpgroup_mma_init(gl.zeros([BN, BM], gl.float32, ACC))
        _, count = part_of(unit % split, stages, split)
        for _stage in range(count):
            mbarrier.wait(bars.index(slot), phase)
            for chunk in gl.static_range(2):
                w = words.index(slot).slice(16 * chunk, 16, dim=1).load(WORDS)
                s = scales.index(slot).slice(4 * chunk, 4, dim=1).load(PAIRS)
                for half in gl.static_range(128 // STEP):
                    a = decode_part(w, s, fold, half, BN, OPERAND, FP8, FP16)
                    x = x_ring.index(slot).slice(chunk * 128 + half * 64, STEP, dim=1)
                    token = warpgroup_mma(a, x.permute((1, 0)), token, is_async=True)
                    token = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[token]))
            if slot % BURST == 0:
                # The stages before this one are free: their products are done, in every warp past the barrier.
                thread_barrier()
                for i in gl.static_range(BURST):
                    at = free + i
                    _load_weights(w_desc, s_desc, x_desc, words, scales, bars, n_ahead, k_ahead, at, ahead < units)
                    tma_load(x_desc, [m_ahead, k_ahead * 256], bars.index(at), x_ring.index(at), pred=ahead < units)
                    k_ahead += 1
                    left -= 1
                    if left == 0:
                        ahead += stride
                        n_ahead = ahead // split // m_tiles * BN
                        m_ahead = ahead // split % m_tiles * BM
                        k_ahead, left = part_of(ahead % split, stages, split)
                free = slot
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1
        acc = warpgroup_mma_wait(0, deps=[token])

        last = True
        if REDUCE:
            last, acc = sum_parts(acc, partial_ptr, count_ptr, tile, unit, split, BN, BM, WARPS)
        if last:
            n = tile // m_tiles * BN + gl.arange(0, BN, gl.SliceLayout(1, ACC))
            m = tile % m_tiles * BM + gl.arange(0, BM, gl.SliceLayout(0, ACC))
            result = scaled(
                acc, n, m, N, M, fold_ptr, row_ptr, token_ptr, bias_ptr, row_stride, token_stride,
                out_ptr.dtype.element_ty, FP8, TOKEN, BIAS,
            )  # fmt: skip
            store_direct(result, out_ptr, n, m, N, M)
