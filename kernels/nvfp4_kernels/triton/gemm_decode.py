"""Hopper GEMM for few rows (M <= 64): bound by the bytes of the weights, so that many of them have to be in flight.

A block of four or eight warps holds 16 output features a warp and all tokens. One bulk-copied stage brings 256 values of K:
packed weights, scales, and x where x comes prepared. Raw 16-bit x is staged by the threads themselves, which put it in
the decoded weights' order on the way: no pass over x before the GEMM. Split-K adds up in the last block of a tile.
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

from .gluon_compat import thread_barrier, tma_load
from .hopper import (
    decode_16,
    decode_fp8,
    fold_pairs,
    halves,
    partial_offsets,
    scale_pairs,
    scaled,
    store_direct,
)

_RAW_X_SLOTS = gl.constexpr(3)


@gluon.jit
def _load_stage(
    w_desc, s_desc, x_desc, words, scales, x_ring, bar, n0, k, stage, PREPARED: gl.constexpr, pred
):  # fmt: skip
    if PREPARED:
        x_bytes: gl.constexpr = x_desc.block_type.nbytes
    else:
        x_bytes: gl.constexpr = 0
    mbarrier.expect(bar, 2 * w_desc.block_type.nbytes + s_desc.block_type.nbytes + x_bytes, pred=pred)
    for chunk in gl.static_range(2):
        tma_load(w_desc, [n0, k * 32 + chunk * 16], bar, words.index(stage * 2 + chunk), pred=pred)
    tma_load(s_desc, [n0, k * 8], bar, scales.index(stage), pred=pred)
    if PREPARED:
        tma_load(x_desc, [0, k * 256], bar, x_ring.index(stage), pred=pred)


@gluon.jit
def _load_raw(x_ptr, x_stride, M, k, pred, BM: gl.constexpr, LAYOUT: gl.constexpr):
    m = gl.arange(0, BM, gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, 256, gl.SliceLayout(0, LAYOUT))
    pointers = x_ptr + m.to(gl.int64)[:, None] * x_stride + (k * 256 + column)[None, :]
    return gl.load(pointers, mask=(m < M)[:, None] & (column >= 0)[None, :] & pred, other=0.0)


@gluon.jit
def _store_raw(x, slot, BM: gl.constexpr):
    """x [BM, 256] in its own order to a shared slot in the decoded weights' order."""
    x = gl.permute(gl.reshape(x, [BM, 2, 4, 4, 2, 2, 2]), [0, 1, 3, 5, 6, 2, 4])  # c t word h j1 j0 -> c word j1 j0 t h
    slot.store(gl.reshape(x, [BM, 256]))


@gluon.jit(do_not_specialize=["M", "N", "k_stages", "split", "row_stride"])
def gemm_decode(
    w_desc, s_desc, x_desc, x_ptr, out_ptr, fold_ptr, row_ptr, token_ptr, bias_ptr, partial_ptr, count_ptr,
    N, M, k_stages, split, x_stride, row_stride,
    BM: gl.constexpr, WARPS: gl.constexpr, STAGES: gl.constexpr,
    PREPARED: gl.constexpr, TOKEN: gl.constexpr, BIAS: gl.constexpr, REDUCE: gl.constexpr,
):  # fmt: skip
    """out [M, N] = x [M, K] @ weight [N, K]^T for M <= BM <= 64, see linear.py for the arguments.

    With PREPARED x comes from x_desc (boxes [BM, 256], permuted), else from x_ptr in its own order. The rest as gemm_large.
    """
    BN: gl.constexpr = 16 * WARPS
    DTYPE: gl.constexpr = x_desc.dtype if PREPARED else x_ptr.dtype.element_ty
    FP8: gl.constexpr = gl.float8e4nv == DTYPE
    FP16: gl.constexpr = gl.float16 == DTYPE
    STEP: gl.constexpr = 128 if FP8 else 64
    WARP_ROWS: gl.constexpr = [[16, 0], [32, 0]] if WARPS == 4 else [[16, 0], [32, 0], [64, 0]]
    WORDS: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0]], [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]], WARP_ROWS, [], [BN, 16]
    )
    PAIRS: gl.constexpr = gl.DistributedLinearLayout([[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], WARP_ROWS, [], [BN, 4])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BM, 32 if FP8 else 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, ACC, 4 if FP8 else 2)
    # Raw x: a thread takes 8 neighbours of each t, which it writes as four times 16 bytes. Rows past the warps' go to
    # registers, warps past the rows hold copies.
    RAW_WARPS: gl.constexpr = (
        ([[4, 0]] if BM > 4 else [[0, 0]])
        + ([[8, 0]] if BM > 8 else [[0, 0]])
        + (([[16, 0]] if BM > 16 else [[0, 0]]) if WARPS == 8 else [])
    )
    RAW_ROWS: gl.constexpr = ([[16, 0]] if BM > 16 and WARPS == 4 else []) + ([[32, 0]] if BM > 32 else [])
    RAW: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 32], [0, 64]] + RAW_ROWS,  # noqa: RUF005
        [[0, 8], [0, 16], [0, 128], [1, 0], [2, 0]],
        RAW_WARPS,
        [],
        [BM, 256],
    )
    X_SLOTS: gl.constexpr = STAGES if PREPARED else _RAW_X_SLOTS
    X_SHARED: gl.constexpr = (
        x_desc.layout if PREPARED else gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    )

    words = gl.allocate_shared_memory(gl.int32, [STAGES * 2, BN, 16], w_desc.layout)
    scales = gl.allocate_shared_memory(gl.int16, [STAGES, BN, 8], s_desc.layout)
    x_ring = gl.allocate_shared_memory(DTYPE, [X_SLOTS, BM, 256], X_SHARED)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()

    units = gl.cdiv(N, BN) * split
    stages = k_stages // split
    stride = gl.num_programs(0)
    unit_ahead = gl.program_id(0)
    k_ahead = 0
    for i in gl.static_range(STAGES - 1):
        _load_stage(
            w_desc, s_desc, x_desc, words, scales, x_ring, bars.index(i),
            unit_ahead // split * BN, unit_ahead % split * stages + k_ahead, i, PREPARED, unit_ahead < units,
        )  # fmt: skip
        k_ahead += 1
        if k_ahead == stages:
            k_ahead = 0
            unit_ahead += stride
    x_unit = gl.program_id(0)
    x_k = 0
    if not PREPARED:
        raw = _load_raw(x_ptr, x_stride, M, x_unit % split * stages, x_unit < units, BM, RAW)
        x_k += 1
        if x_k == stages:
            x_k = 0
            x_unit += stride
        _store_raw(raw, x_ring.index(0), BM)
        raw = _load_raw(x_ptr, x_stride, M, x_unit % split * stages + x_k, x_unit < units, BM, RAW)
        fence_async_shared()
        thread_barrier()

    step = 0
    for unit in range(gl.program_id(0), units, stride):
        tile = unit // split
        if FP8:
            fold = fold_pairs(fold_ptr, tile * BN, N, BN, PAIRS)
        token = warpgroup_mma_init(gl.zeros([BN, BM], gl.float32, ACC))
        for _stage in range(stages):
            slot = step % STAGES
            x_slot = step % X_SLOTS
            mbarrier.wait(bars.index(slot), (step // STAGES) & 1)
            for chunk in gl.static_range(2):
                w = words.index(slot * 2 + chunk).load(WORDS)
                s = scales.index(slot).slice(4 * chunk, 4, dim=1).load(PAIRS)
                if not FP8:
                    s_first, s_second = scale_pairs(s, FP16)
                    w_first, w_second = halves(w, BN)
                for half in gl.static_range(128 // STEP):
                    if FP8:
                        a = decode_fp8(w, s, fold, BN, OPERAND)
                    else:
                        a = decode_16(w_first if half == 0 else w_second, s_first if half == 0 else s_second, BN, OPERAND, FP16)
                    x = x_ring.index(x_slot).slice(chunk * 128 + half * 64, STEP, dim=1)
                    token = warpgroup_mma(a, x.permute((1, 0)), token, is_async=True)
                    token = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[token]))
            if not PREPARED:
                # The slot ahead was last read two stages ago.
                _store_raw(raw, x_ring.index((step + 1) % X_SLOTS), BM)
                x_k += 1
                if x_k == stages:
                    x_k = 0
                    x_unit += stride
                raw = _load_raw(x_ptr, x_stride, M, x_unit % split * stages + x_k, x_unit < units, BM, RAW)
                fence_async_shared()
            thread_barrier()
            # The stage before this one is free: its products are done, in every warp past the barrier.
            free = (step + STAGES - 1) % STAGES
            _load_stage(
                w_desc, s_desc, x_desc, words, scales, x_ring, bars.index(free),
                unit_ahead // split * BN, unit_ahead % split * stages + k_ahead, free, PREPARED, unit_ahead < units,
            )  # fmt: skip
            step += 1
            k_ahead += 1
            if k_ahead == stages:
                k_ahead = 0
                unit_ahead += stride
        acc = warpgroup_mma_wait(0, deps=[token])

        n = tile * BN + gl.arange(0, BN, gl.SliceLayout(1, ACC))
        m = gl.arange(0, BM, gl.SliceLayout(0, ACC))
        if REDUCE:
            offsets = partial_offsets(BN, BM, ACC)
            valid = (m < M)[None, :] & (n < N)[:, None]
            gl.store(partial_ptr + unit.to(gl.int64) * (BN * BM) + offsets, acc, mask=valid)
            thread_barrier()
            if gl.atomic_add(count_ptr + tile, 1, sem="acq_rel") == split - 1:
                gl.store(count_ptr + tile, 0)
                total = gl.zeros([BN, BM], gl.float32, ACC)
                for part in range(split):
                    slot_ptr = partial_ptr + (tile * split + part).to(gl.int64) * (BN * BM)
                    total += gl.load(slot_ptr + offsets, mask=valid, other=0.0)
                result = scaled(
                    total, n, m, N, M, fold_ptr, row_ptr, token_ptr, bias_ptr, row_stride,
                    out_ptr.dtype.element_ty, FP8, TOKEN, BIAS,
                )  # fmt: skip
                store_direct(result, out_ptr, n, m, N, M)
        else:
            result = scaled(
                acc, n, m, N, M, fold_ptr, row_ptr, token_ptr, bias_ptr, row_stride,
                out_ptr.dtype.element_ty, FP8, TOKEN, BIAS,
            )  # fmt: skip
            store_direct(result, out_ptr, n, m, N, M)
