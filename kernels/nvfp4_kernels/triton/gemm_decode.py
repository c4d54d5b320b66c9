"""Hopper GEMM for tens of rows, and hundreds of small layers: bound by the bytes of the weights, on wgmma.

A group of four or eight warps holds 16 output features a warp and up to 128 tokens. One bulk-copied stage brings 256 values of
K: packed weights, scales and x, several stages ahead. A block has one group, or two that halve K and add up in shared memory;
split-K, where blocks share a tile, adds up in the last of its blocks.
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

from .gluon_compat import let_next_kernel_start, thread_barrier, tma_load, wait_for_previous_kernel
from .hopper import (
    as_products,
    decode_part,
    flat_of,
    load_fold,
    load_x,
    pairs_of_fold,
    part_layout,
    part_of,
    scaled,
    store_direct,
    sum_parts,
)


@gluon.jit
def _load_weights(w_desc, s_desc, words, scales, full, n0, k, slot, pred):
    """Weights and scales of stage k into `slot`."""
    bar = full.index(slot)
    mbarrier.expect(bar, w_desc.block_type.nbytes + s_desc.block_type.nbytes, pred=pred)
    tma_load(w_desc, [n0, k * 32], bar, words.index(slot), pred=pred)
    tma_load(s_desc, [n0, k * 8], bar, scales.index(slot), pred=pred)


@gluon.jit
def _stages_of(unit, stages, split, INDEX: gl.constexpr, GROUPS: gl.constexpr):
    """(first stage, stages) of a group's share of a unit of work."""
    return part_of(unit % split * GROUPS + INDEX, stages, split * GROUPS)


@gluon.jit
def _operand(
    words, scales, slot, fold, part: gl.constexpr, BN: gl.constexpr, WORDS: gl.constexpr, PAIRS: gl.constexpr,
    OPERAND: gl.constexpr, FP8: gl.constexpr, FP16: gl.constexpr,
):  # fmt: skip
    """Part of a stage's weights as an operand: 128 values of K in e4m3, or 64 in 16 bits."""
    chunk: gl.constexpr = part if FP8 else part // 2
    w = words.index(slot).slice(16 * chunk, 16, dim=1).load(WORDS)
    s = scales.index(slot).slice(4 * chunk, 4, dim=1).load(PAIRS)
    return decode_part(w, s, fold, part % 2, BN, OPERAND, FP8, FP16)


@gluon.jit
def _group(
    memory, pointers, sizes,
    INDEX: gl.constexpr, GROUPS: gl.constexpr, REGISTERS: gl.constexpr, BM: gl.constexpr, WARPS: gl.constexpr,
    STAGES: gl.constexpr, BURST: gl.constexpr, TOKEN: gl.constexpr, BIAS: gl.constexpr, REDUCE: gl.constexpr,
):  # fmt: skip
    """One group's share of every unit of work. The first group also adds up and writes."""
    w_desc, s_desc, x_desc, words, scales, x_ring, w_full, x_full, sums, stored, taken = memory
    out_ptr, fold_ptr, row_ptr, token_ptr, bias_ptr, partial_ptr, count_ptr = pointers
    N, M, stages, split, row_stride, token_stride = sizes
    BN: gl.constexpr = 16 * WARPS
    FP8: gl.constexpr = x_desc.dtype == gl.float8e4nv
    FP16: gl.constexpr = x_desc.dtype == gl.float16
    STEP: gl.constexpr = 128 if FP8 else 64
    FIRST: gl.constexpr = INDEX * STAGES  # slot of the rings
    # Operands in registers at a time. ptxas gives each group registers of its own for them: at 128 a thread, one set has room.
    SETS: gl.constexpr = 2 if GROUPS == 1 or REGISTERS > 128 else 1
    # When the next kernel may start: with the last products, so that it finds room where blocks are done. Two groups take a
    # processor or half of one, and blocks of the next kernel would gather there, one for each token.
    LATE: gl.constexpr = GROUPS == 2 and BM > 16
    EARLY: gl.constexpr = 2 if FP8 and SETS == 2 else 1  # parts of a stage that are decoded before its x is waited for
    WARP_ROWS: gl.constexpr = [[16, 0], [32, 0]] if WARPS == 4 else [[16, 0], [32, 0], [64, 0]]
    WORDS: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0]], [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]], WARP_ROWS, [], [BN, 16]
    )
    PAIRS: gl.constexpr = gl.DistributedLinearLayout([[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], WARP_ROWS, [], [BN, 4])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BM, 32 if FP8 else 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, ACC, 4 if FP8 else 2)

    m_tiles = gl.cdiv(M, BM)
    units = gl.cdiv(N, BN) * m_tiles * split
    stride = gl.num_programs(0)
    # The loads run ahead of the products, across units; divisions happen between units alone.
    ahead = gl.program_id(0)
    n_ahead = ahead // split // m_tiles * BN
    k_ahead, left = _stages_of(ahead, stages, split, INDEX, GROUPS)
    for i in gl.static_range(STAGES - BURST):
        _load_weights(w_desc, s_desc, words, scales, w_full, n_ahead, k_ahead, FIRST + i, ahead < units)
        k_ahead += 1
        left -= 1
        if left == 0:
            ahead += stride
            n_ahead = ahead // split // m_tiles * BN
            k_ahead, left = _stages_of(ahead, stages, split, INDEX, GROUPS)
    # The weights of the first stages are on their way while the kernel that prepares x still runs.
    wait_for_previous_kernel()
    x_unit = gl.program_id(0)
    m_ahead = x_unit // split % m_tiles * BM
    x_k, x_left = _stages_of(x_unit, stages, split, INDEX, GROUPS)
    for i in gl.static_range(STAGES - BURST):
        load_x(x_desc, x_ring, x_full, m_ahead, x_k, FIRST + i, x_unit < units)
        x_k += 1
        x_left -= 1
        if x_left == 0:
            x_unit += stride
            m_ahead = x_unit // split % m_tiles * BM
            x_k, x_left = _stages_of(x_unit, stages, split, INDEX, GROUPS)

    slot = 0
    phase = 0
    free = STAGES - BURST
    sums_phase = 0
    for unit in range(gl.program_id(0), units, stride):
        tile = unit // split
        fold = None
        if FP8:
            fold = pairs_of_fold(load_fold(fold_ptr, tile // m_tiles * BN, N, BN, PAIRS), PAIRS)
        token = warpgroup_mma_init(gl.zeros([BN, BM], gl.float32, ACC))
        _, count = _stages_of(unit, stages, split, INDEX, GROUPS)
        for _stage in range(count):
            mbarrier.wait(w_full.index(FIRST + slot), phase)
            if SETS == 2:
                # The products of the stage before end while this is decoded; those that read the same registers have ended.
                if EARLY == 2:
                    token = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[token]))
                first = _operand(words, scales, FIRST + slot, fold, 0, BN, WORDS, PAIRS, OPERAND, FP8, FP16)
                token = warpgroup_mma_init(warpgroup_mma_wait(0, deps=[token]))
            if slot % BURST == 0:
                # The stages before this one are free, in every warp past the barrier.
                thread_barrier()
                for i in gl.static_range(BURST):
                    at = FIRST + free + i
                    _load_weights(w_desc, s_desc, words, scales, w_full, n_ahead, k_ahead, at, ahead < units)
                    load_x(x_desc, x_ring, x_full, m_ahead, k_ahead, at, ahead < units)
                    k_ahead += 1
                    left -= 1
                    if left == 0:
                        ahead += stride
                        n_ahead = ahead // split // m_tiles * BN
                        m_ahead = ahead // split % m_tiles * BM
                        k_ahead, left = _stages_of(ahead, stages, split, INDEX, GROUPS)
                free = slot
            if SETS == 1:
                first = _operand(words, scales, FIRST + slot, fold, 0, BN, WORDS, PAIRS, OPERAND, FP8, FP16)
            if EARLY == 2:
                second = _operand(words, scales, FIRST + slot, fold, 1, BN, WORDS, PAIRS, OPERAND, FP8, FP16)
            # Of the first stage, all of that happens before x is there.
            mbarrier.wait(x_full.index(FIRST + slot), phase)
            x = x_ring.index(FIRST + slot)
            token = warpgroup_mma(first, x.slice(0, STEP, dim=1).permute((1, 0)), token, is_async=True)
            if EARLY == 2:
                token = warpgroup_mma(second, x.slice(STEP, STEP, dim=1).permute((1, 0)), token, is_async=True)
            for part in gl.static_range(EARLY, 256 // STEP):
                token = warpgroup_mma_init(warpgroup_mma_wait(SETS - 1, deps=[token]))
                more = _operand(words, scales, FIRST + slot, fold, part, BN, WORDS, PAIRS, OPERAND, FP8, FP16)
                token = warpgroup_mma(more, x.slice(part * STEP, STEP, dim=1).permute((1, 0)), token, is_async=True)
            if SETS == 1:
                token = warpgroup_mma_init(warpgroup_mma_wait(0, deps=[token]))
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1
        acc = warpgroup_mma_wait(0, deps=[token])
        if INDEX == 0 and not LATE:  # noqa: SIM102
            if unit + stride >= units:
                let_next_kernel_start()

        if GROUPS > 1:
            flat = flat_of(acc, BN, BM, WARPS)
            if INDEX == 1:
                mbarrier.wait(taken, sums_phase ^ 1)  # the first time around, there is room
                sums.store(flat)
                thread_barrier()
                mbarrier.arrive(stored, count=1)
            else:
                mbarrier.wait(stored, sums_phase)
                acc = as_products(flat + sums.load(part_layout(BM, WARPS)), BN, BM, WARPS, ACC)
                thread_barrier()
                mbarrier.arrive(taken, count=1)
            sums_phase ^= 1
        if INDEX == 0:
            last = True
            if REDUCE:
                last, acc = sum_parts(acc, partial_ptr, count_ptr, tile, unit, split, BN, BM, WARPS)
            if LATE:  # noqa: SIM102
                if unit + stride >= units:
                    let_next_kernel_start()
            if last:
                n = tile // m_tiles * BN + gl.arange(0, BN, gl.SliceLayout(1, ACC))
                m = tile % m_tiles * BM + gl.arange(0, BM, gl.SliceLayout(0, ACC))
                result = scaled(
                    acc, n, m, N, M, fold_ptr, row_ptr, token_ptr, bias_ptr, row_stride, token_stride,
                    out_ptr.dtype.element_ty, FP8, TOKEN, BIAS,
                )  # fmt: skip
                store_direct(result, out_ptr, n, m, N, M)


@gluon.jit(do_not_specialize=["M", "N", "stages", "split", "row_stride", "token_stride"])
def gemm_decode(
    w_desc, s_desc, x_desc, out_ptr, fold_ptr, row_ptr, token_ptr, bias_ptr, partial_ptr, count_ptr,
    N, M, stages, split, row_stride, token_stride,
    BM: gl.constexpr, WARPS: gl.constexpr, GROUPS: gl.constexpr, REGISTERS: gl.constexpr, STAGES: gl.constexpr,
    BURST: gl.constexpr, TOKEN: gl.constexpr, BIAS: gl.constexpr, REDUCE: gl.constexpr,
):  # fmt: skip
    """out [M, N] = x [M, K] @ weight [N, K]^T for BM <= 128, see linear.py for the arguments.

    w_desc in boxes [16 WARPS, 32], x_desc [BM, 256], K permuted; stages = K / 256, rounded up, which `split` units of work
    share, and in a unit its GROUPS, one or two: split * GROUPS <= stages. Each has WARPS warps, of REGISTERS a thread, and a
    ring of STAGES stages. BURST, a divisor of STAGES: so many stages are loaded at once, so that neighbouring bytes of a row
    meet in the memory. Launched with WARPS warps, a second group's are started here. The rest as gemm_large.
    """
    gl.static_assert(BURST < STAGES and STAGES % BURST == 0)
    BN: gl.constexpr = 16 * WARPS
    words = gl.allocate_shared_memory(gl.int32, [GROUPS * STAGES, BN, 32], w_desc.layout)
    scales = gl.allocate_shared_memory(gl.int16, [GROUPS * STAGES, BN, 8], s_desc.layout)
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [GROUPS * STAGES, BM, 256], x_desc.layout)
    w_full = gl.allocate_shared_memory(gl.int64, [GROUPS * STAGES, 1], mbarrier.MBarrierLayout())
    x_full = gl.allocate_shared_memory(gl.int64, [GROUPS * STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(GROUPS * STAGES):
        mbarrier.init(w_full.index(i), count=1)
        mbarrier.init(x_full.index(i), count=1)
    sums = w_full
    stored = w_full
    taken = w_full
    if GROUPS > 1:
        sums = gl.allocate_shared_memory(gl.float32, [BN * BM], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        stored = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        taken = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(stored, count=1)
        mbarrier.init(taken, count=1)
    fence_async_shared()
    memory = (w_desc, s_desc, x_desc, words, scales, x_ring, w_full, x_full, sums, stored, taken)
    pointers = (out_ptr, fold_ptr, row_ptr, token_ptr, bias_ptr, partial_ptr, count_ptr)
    sizes = (N, M, stages, split, row_stride, token_stride)
    if GROUPS == 1:
        _group(memory, pointers, sizes, 0, GROUPS, REGISTERS, BM, WARPS, STAGES, BURST, TOKEN, BIAS, REDUCE)
    else:
        gl.static_assert(GROUPS == 2)
        gl.warp_specialize(
            [
                (_group, (memory, pointers, sizes, 0, GROUPS, REGISTERS, BM, WARPS, STAGES, BURST, TOKEN, BIAS, REDUCE)),
                (_group, (memory, pointers, sizes, 1, GROUPS, REGISTERS, BM, WARPS, STAGES, BURST, TOKEN, BIAS, REDUCE)),
            ],
            [WARPS],
            [REGISTERS],
        )
