"""GEMM for a few rows, Ampere's matrix instructions: nothing between the weights and the operand registers.

A thread takes 64 codes of a row, two 16-byte loads of the checkpoint's own bytes, as 16 steps of its operand; x is read in
the matching order. The 64 codes follow each other, so that their scales are one load; or, with APART, each load's 32 codes
follow those of the thread before, so that x lies closer together, which costs the caches less from about four rows on. No
barrier, no shuffle, no shared memory in the loop: a warp waits for memory alone, and its weights come one step ahead. The
warps of a block share K, each a product of a batch, in turns of neighbouring pieces, and add up at the end. See hopper.py
for the permutation of K and the decoding.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .gluon_compat import let_next_kernel_start, wait_for_previous_kernel
from .hopper import decode_values, scale_pairs, scaled, store_direct


@gluon.constexpr_function
def _layout(registers, lanes, shape):
    """A layout of [KW, rows, columns] values: every warp has a part of K, and of its lanes eight rows."""
    warps = [[1 << i, 0, 0] for i in range(shape[0].bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, [*lanes, [0, 1, 0], [0, 2, 0], [0, 4, 0]], warps, [], shape)


@gluon.jit
def _positions(SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
    """The three coordinates of a tensor, to be broadcast against each other."""
    k = gl.arange(0, SHAPE[0], gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
    row = gl.arange(0, SHAPE[1], gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
    return k, row, gl.arange(0, SHAPE[2], gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]


@gluon.jit
def _decode(words, scales, KW: gl.constexpr, BN: gl.constexpr, OPERAND: gl.constexpr, APART: gl.constexpr, FP16: gl.constexpr):
    """int32 words [KW, BN, 32] and their scales to 16-bit values [KW, BN, 256] as operand.

    scales: int32 [KW, BN, 4], four a thread; APART: int16 [KW, BN, 8], two for each of its loads.
    """
    if APART:
        first, second = scale_pairs(scales, FP16)
        s = gl.join(first, second)
    else:
        s0, s1 = scale_pairs(scales & 0xFFFF, FP16)
        s2, s3 = scale_pairs((scales >> 16) & 0xFFFF, FP16)
        s = gl.join(gl.join(s0, s2), gl.join(s1, s3))  # thread, load, second of a pair
    s = gl.convert_layout(gl.reshape(gl.join(s, s), [KW, BN, 32]), words.type.layout, assert_trivial=True)
    v0, v1, v2, v3, v4, v5, v6, v7 = decode_values(words, s, FP16)
    a = gl.join(gl.join(gl.join(v0, v1), gl.join(v2, v3)), gl.join(gl.join(v4, v5), gl.join(v6, v7)))
    if APART:  # load t word h j0 j1 -> load word j1 j0 t h
        a = gl.permute(gl.reshape(a, [KW, BN, 2, 4, 4, 2, 2, 2]), [0, 1, 2, 4, 7, 6, 3, 5])
    else:  # t load ...
        a = gl.permute(gl.reshape(a, [KW, BN, 4, 2, 4, 2, 2, 2]), [0, 1, 3, 4, 7, 6, 2, 5])
    return gl.convert_layout(gl.reshape(a, [KW, BN, 256]), OPERAND, assert_trivial=True)


@gluon.jit(do_not_specialize=["M", "N", "stages", "pieces", "row_stride", "token_stride"])
def gemm_few(
    w_ptr, s_ptr, x_ptr, out_ptr, row_ptr, token_ptr, bias_ptr, N, M, stages, pieces, s_stride, x_stride, row_stride,
    token_stride, KW: gl.constexpr, APART: gl.constexpr, TAIL: gl.constexpr, TOKEN: gl.constexpr, BIAS: gl.constexpr,
):  # fmt: skip
    """out [M, N] = x [M, K] @ weight [N, K]^T for M <= 8, K in its own order; see linear.py for the arguments.

    w_ptr int32 [N, K/8], s_ptr int32 [N, 4 stages], zeros behind K; pieces = K / 32, stages = K / 256, rounded up. A block has
    16 features, and KW warps that share K. APART: a thread's two loads of weights lie 64 bytes apart, and s_ptr is int16
    [N, 8 stages]. TAIL: K is no multiple of 256; APART, too.
    """
    gl.static_assert(APART or not TAIL)
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    FP16: gl.constexpr = gl.float16 == DTYPE
    BN: gl.constexpr = 16
    BM: gl.constexpr = 8
    # Of 32 words and 256 values of x: what tells a thread's two loads apart, and what tells threads apart.
    LOAD: gl.constexpr = 16 if APART else 4
    T: gl.constexpr = 4 if APART else 8
    WORDS: gl.constexpr = _layout([[0, 0, 1], [0, 0, 2], [0, 0, LOAD], [0, 8, 0]], [[0, 0, T], [0, 0, 2 * T]], [KW, BN, 32])
    S: gl.constexpr = 8 if APART else 4
    SCALES: gl.constexpr = _layout([[0, 0, 4], [0, 8, 0]] if APART else [[0, 8, 0]], [[0, 0, 1], [0, 0, 2]], [KW, BN, S])
    X: gl.constexpr = _layout(
        [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 0, 8], [0, 0, 16], [0, 0, 8 * LOAD]],
        [[0, 0, 8 * T], [0, 0, 16 * T]],
        [KW, BM, 256],
    )
    ACC: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [KW, 1, 1], [1, 16, 8])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    X_OPERAND: gl.constexpr = gl.DotOperandLayout(1, ACC, 2)

    tile = gl.program_id(0)
    k_w, n_w, column_w = _positions([KW, BN, 32], WORDS)
    k_s, n_s, column_s = _positions([KW, BN, S], SCALES)
    k_x, m_x, column_x = _positions([KW, BM, 256], X)
    # Rows past N read row N - 1; what comes of them is not stored. A stride as an argument would not do for 16-byte loads:
    # Triton learns of multiples of 16 alone, and this is one of 4.
    w_pointers = w_ptr + gl.minimum(tile * BN + n_w, N - 1).to(gl.int64) * (pieces * 4) + (k_w * 32 + column_w)
    s_pointers = s_ptr + gl.minimum(tile * BN + n_s, N - 1).to(gl.int64) * s_stride + (k_s * S + column_s)
    x_pointers = x_ptr + m_x.to(gl.int64) * x_stride + (k_x * 256 + column_x)
    every_w = (n_w >= 0) & (column_w >= 0)
    every_s = (n_s >= 0) & (column_s >= 0)
    x_valid = (m_x < M) & (column_x >= 0)

    # With a tail a load's own 32 codes count, not the step that they are of.
    if TAIL:
        at_w = k_w * 32 + column_w
        at_x = k_x * 256 + column_x
        w_inside = every_w & (at_w < pieces * 4)
    else:
        w_inside = every_w & (k_w < stages)
    w = gl.load(w_pointers, mask=w_inside, other=0)
    s = gl.load(s_pointers, mask=every_s & (k_s < stages), other=0)
    # The first weights are on their way while the kernel before this one, which x may come from, still runs.
    wait_for_previous_kernel()
    acc = gl.zeros([KW, BN, BM], gl.float32, ACC)
    # Two steps a turn: their weights alternate, so that no register moves. A step past the end has weights of zero. `end` says
    # no more than K does, but without it ptxas puts half of the loads at the end of a turn, just before they are used.
    step = 0
    turns = gl.cdiv(stages, 2 * KW)
    for turn in range(turns):
        for odd in gl.static_range(2):
            ahead = step + KW
            end = stages
            end_pieces = pieces
            if odd == 1:
                end = gl.where(turn < turns - 1, stages, 0)
                end_pieces = gl.where(turn < turns - 1, pieces, 0)
            if TAIL:
                w_inside = every_w & (at_w < end_pieces * 4 - ahead * 32)
                x_inside = x_valid & (at_x < pieces * 32 - step * 256)
            else:
                w_inside = every_w & (ahead + k_w < end)
                x_inside = x_valid & (step + k_x < stages)
            w_next = gl.load(w_pointers + ahead * 32, mask=w_inside, other=0)
            s_next = gl.load(s_pointers + ahead * S, mask=every_s & (ahead + k_s < end), other=0)
            x = gl.load(x_pointers + step * 256, mask=x_inside, other=0.0)
            step = ahead
            if APART:  # m load t word h j1 j0 -> load word j1 j0 t h m
                b = gl.permute(gl.reshape(x, [KW, BM, 2, 4, 4, 2, 2, 2]), [0, 2, 4, 6, 7, 3, 5, 1])
            else:  # m t load ...
                b = gl.permute(gl.reshape(x, [KW, BM, 4, 2, 4, 2, 2, 2]), [0, 3, 4, 6, 7, 2, 5, 1])
            b = gl.convert_layout(gl.reshape(b, [KW, 256, BM]), X_OPERAND, assert_trivial=True)
            acc = mma_v2(_decode(w, s, KW, BN, OPERAND, APART, FP16), b, acc)
            w = w_next
            s = s_next
    let_next_kernel_start()

    TOTAL: gl.constexpr = gl.SliceLayout(0, ACC)
    n = tile * BN + gl.arange(0, BN, gl.SliceLayout(1, TOTAL))
    m = gl.arange(0, BM, gl.SliceLayout(0, TOTAL))
    total = gl.sum(acc, axis=0)
    result = scaled(
        total, n, m, N, M, row_ptr, row_ptr, token_ptr, bias_ptr, row_stride, token_stride, DTYPE, False, TOKEN, BIAS
    )
    store_direct(result, out_ptr, n, m, N, M)
