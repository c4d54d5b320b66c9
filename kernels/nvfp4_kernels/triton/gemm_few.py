"""GEMM for one or two rows, Ampere's matrix instructions: nothing between the weights and the operand registers.

A thread takes 64 consecutive codes of a row, two 16-byte loads of the checkpoint's own bytes, as 16 steps of its operand;
x is read in the matching order. No barrier, no shuffle, no shared memory: a warp waits for memory alone, and its weights
come one step ahead. Split-K adds up in the last block of a tile. See hopper.py for the permutation of K and the decoding.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .gluon_compat import thread_barrier
from .hopper import decode_values, partial_offsets, scale_pairs, scaled, store_direct


@gluon.jit
def _decode(words, scales, BN: gl.constexpr, OPERAND: gl.constexpr, FP16: gl.constexpr):
    """int32 words [BN, 32] and four scales a thread, int32 [BN, 4], to 16-bit values [BN, 256] in operand layout."""
    LAYOUT: gl.constexpr = words.type.layout
    s0, s1 = scale_pairs(scales & 0xFFFF, FP16)
    s2, s3 = scale_pairs((scales >> 16) & 0xFFFF, FP16)
    s = gl.join(gl.join(s0, s2), gl.join(s1, s3))  # [BN, 4, high half, second of a pair]
    s = gl.reshape(gl.join(s, s), [BN, 32])
    v0, v1, v2, v3, v4, v5, v6, v7 = decode_values(words, gl.convert_layout(s, LAYOUT, assert_trivial=True), FP16)
    a = gl.join(gl.join(gl.join(v0, v1), gl.join(v2, v3)), gl.join(gl.join(v4, v5), gl.join(v6, v7)))
    a = gl.permute(gl.reshape(a, [BN, 4, 8, 2, 2, 2]), [0, 2, 5, 4, 1, 3])  # t word h j0 j1 -> word j1 j0 t h
    return gl.convert_layout(gl.reshape(a, [BN, 256]), OPERAND, assert_trivial=True)


@gluon.jit(do_not_specialize=["M", "N", "stages", "split", "row_stride"])
def gemm_few(
    w_ptr, s_ptr, x_ptr, out_ptr, row_ptr, token_ptr, bias_ptr, partial_ptr, count_ptr,
    N, M, stages, split, w_stride, s_stride, x_stride, row_stride,
    WARPS: gl.constexpr, TOKEN: gl.constexpr, BIAS: gl.constexpr, REDUCE: gl.constexpr,
):  # fmt: skip
    """out [M, N] = x [M, K] @ weight [N, K]^T for M <= 8, K in its own order; see linear.py for the arguments.

    w_ptr int32 [N, K/8], s_ptr int32 [N, K/64]; stages = K / 256 / split, the steps of a block; 16 rows of weights a warp.
    """
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    FP16: gl.constexpr = gl.float16 == DTYPE
    BN: gl.constexpr = 16 * WARPS
    BM: gl.constexpr = 8
    WARP_ROWS: gl.constexpr = [[16, 0], [32, 0], [64, 0]][: WARPS.bit_length() - 1]
    NO_ROWS: gl.constexpr = [[0, 0], [0, 0], [0, 0]][: WARPS.bit_length() - 1]
    WORDS: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [8, 0]], [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], WARP_ROWS, [], [BN, 32]
    )
    SCALES: gl.constexpr = gl.DistributedLinearLayout(
        [[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], WARP_ROWS, [], [BN, 4]
    )
    X: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16], [0, 32]],
        [[0, 64], [0, 128], [1, 0], [2, 0], [4, 0]],
        NO_ROWS,
        [],
        [BM, 256],
    )
    ACC: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    X_OPERAND: gl.constexpr = gl.DotOperandLayout(1, ACC, 2)

    unit = gl.program_id(0)
    tile = unit // split
    k_stage = unit % split * stages
    n_w = tile * BN + gl.arange(0, BN, gl.SliceLayout(1, WORDS))
    n_s = tile * BN + gl.arange(0, BN, gl.SliceLayout(1, SCALES))
    k_w = gl.arange(0, 32, gl.SliceLayout(0, WORDS))
    k_s = gl.arange(0, 4, gl.SliceLayout(0, SCALES))
    m_x = gl.arange(0, BM, gl.SliceLayout(1, X))
    k_x = gl.arange(0, 256, gl.SliceLayout(0, X))
    # Rows past N read row N - 1; what comes of them is not stored.
    w_pointers = w_ptr + gl.minimum(n_w, N - 1).to(gl.int64)[:, None] * w_stride + (k_stage * 32 + k_w)[None, :]
    s_pointers = s_ptr + gl.minimum(n_s, N - 1).to(gl.int64)[:, None] * s_stride + (k_stage * 4 + k_s)[None, :]
    x_pointers = x_ptr + m_x.to(gl.int64)[:, None] * x_stride + (k_stage * 256 + k_x)[None, :]
    every_w = (n_w >= 0)[:, None] & (k_w >= 0)[None, :]
    every_s = (n_s >= 0)[:, None] & (k_s >= 0)[None, :]
    x_valid = (m_x < M)[:, None] & (k_x >= 0)[None, :]

    w = gl.load(w_pointers)
    s = gl.load(s_pointers)
    acc = gl.zeros([BN, BM], gl.float32, ACC)
    # Two steps a turn: their weights alternate, so that no register moves. A step past the end has weights of zero.
    for first in range(0, stages, 2):
        for odd in gl.static_range(2):
            w_pointers += 32
            s_pointers += 4
            more = first + odd + 1 < stages
            w_next = gl.load(w_pointers, mask=every_w & more, other=0)
            s_next = gl.load(s_pointers, mask=every_s & more, other=0)
            x = gl.load(x_pointers, mask=x_valid & (first + odd < stages), other=0.0)
            x_pointers += 256
            b = gl.permute(gl.reshape(x, [BM, 4, 8, 2, 2, 2]), [2, 4, 5, 1, 3, 0])  # m t w h j1 j0 -> w j1 j0 t h m
            b = gl.convert_layout(gl.reshape(b, [256, BM]), X_OPERAND, assert_trivial=True)
            acc = mma_v2(_decode(w, s, BN, OPERAND, FP16), b, acc)
            w = w_next
            s = s_next

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
            result = scaled(total, n, m, N, M, row_ptr, row_ptr, token_ptr, bias_ptr, row_stride, DTYPE, False, TOKEN, BIAS)
            store_direct(result, out_ptr, n, m, N, M)
    else:
        result = scaled(acc, n, m, N, M, row_ptr, row_ptr, token_ptr, bias_ptr, row_stride, DTYPE, False, TOKEN, BIAS)
        store_direct(result, out_ptr, n, m, N, M)
