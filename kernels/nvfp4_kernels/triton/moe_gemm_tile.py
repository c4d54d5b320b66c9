"""Grouped GEMM for Hopper, a thread block a tile: 64 or 128 rows. Two blocks share a multiprocessor, so that one decodes while
the other's products run.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .gluon_compat import thread_barrier
from .hopper import decode_part, decode_word_fp8, halves, scale_tables, tile_of
from .moe_hopper import (
    finish,
    fold_pairs,
    live_rows,
    load_weights,
    load_x,
    pairs_layout,
    row_factor,
    rows_of_x,
    scales_of_slot,
    token_scales,
    weight_rows,
    weight_slots,
    words_of_slot,
)


@gluon.jit
def _word(words, word: gl.constexpr, BN: gl.constexpr, WARPS: gl.constexpr):
    """Word 0 to 3 of every thread, int32 [BN, 4], of words [BN, 16]."""
    first, second = halves(words, BN)
    even, odd = gl.split(first if word < 2 else second)
    return gl.convert_layout(even if word % 2 == 0 else odd, pairs_layout(WARPS), assert_trivial=True)


@gluon.jit
def _one_tile(
    w_desc, s_desc, x_desc, x_ptr, out_ptr, fold_ptr, row_ptr, token_ptr, input_scale_ptr, bias_ptr, live_ptr,
    words, scales, read_words, read_scales, x_ring, w_bars, x_bars, fold, expert, n_tile, m0, rows, N, out_stride, k_stages,
    row_expert, row_stride, input_scale_expert,
    BM: gl.constexpr, WARPS: gl.constexpr, WEIGHT_STAGES: gl.constexpr, X_STAGES: gl.constexpr,
    ACT: gl.constexpr, ACT_FN: gl.constexpr, OPERAND_ORDER: gl.constexpr, BY_WORD: gl.constexpr,
):  # fmt: skip
    """Products and epilogue of `grouped_gemm_kernel`, whose first stages are on their way."""
    BN: gl.constexpr = 16 * WARPS
    FP8: gl.constexpr = x_desc.dtype == gl.float8e4nv
    FP16: gl.constexpr = x_desc.dtype == gl.float16
    XK: gl.constexpr = 128 if FP8 else 64
    PER_STAGE: gl.constexpr = 256 // XK
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BM, 32 if FP8 else 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, ACC, 4 if FP8 else 2)
    COLUMNS: gl.constexpr = BN // 2 if ACT == 2 else BN
    column0 = n_tile * COLUMNS
    second = N // 2 if ACT == 2 else BN // 2
    x_stages = k_stages * PER_STAGE

    token = warpgroup_mma_init(gl.zeros([BN, BM], gl.float32, ACC))
    x_step = 0
    for stage in range(k_stages):
        # Every warp is past the last barrier, so past its reads of the stage before: that slot is free.
        ahead_w = stage + WEIGHT_STAGES - 1
        free = ahead_w % WEIGHT_STAGES
        load_weights(w_desc, s_desc, words, scales, w_bars.index(free), expert, column0, ahead_w, free, ahead_w < k_stages)
        slot = stage % WEIGHT_STAGES
        mbarrier.wait(w_bars.index(slot), (stage // WEIGHT_STAGES) & 1)
        for chunk in gl.static_range(2):
            w = words_of_slot(read_words, slot, chunk, WARPS)
            s = scales_of_slot(read_scales, slot, chunk, WARPS)
            if BY_WORD:
                low_first, high_first, low_second, high_second = scale_tables(s, fold)
            for half in gl.static_range(PER_STAGE // 2):
                x_slot = x_step % X_STAGES
                ahead = x_step + X_STAGES - 1
                x = x_ring.index(x_slot).permute((1, 0))
                if BY_WORD:
                    mbarrier.wait(x_bars.index(x_slot), (x_step // X_STAGES) & 1)
                    if x_ptr is not None:
                        fence_async_shared()  # threads wrote the stage, tensor cores read it
                    for word in gl.static_range(4):
                        low = low_first if word < 2 else low_second
                        high = high_first if word < 2 else high_second
                        a = decode_word_fp8(_word(w, word, BN, WARPS), low, high, BN, OPERAND)
                        token = warpgroup_mma(a, x.slice(32 * word, 32, dim=0), token, is_async=True)
                        token = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[token]))
                        if word == 0:
                            # The products before these are done, in every warp once past the barrier: their x stage is free.
                            thread_barrier()
                            load_x(x_desc, x_ptr, rows, x_ring, x_bars, ahead, ahead % X_STAGES, WARPS, ahead < x_stages)
                else:
                    a = decode_part(w, s, fold, half, BN, OPERAND, FP8, FP16)
                    mbarrier.wait(x_bars.index(x_slot), (x_step // X_STAGES) & 1)
                    if x_ptr is not None:
                        fence_async_shared()  # threads wrote the stage, tensor cores read it
                    token = warpgroup_mma(a, x, token, is_async=True)
                    token = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[token]))
                    thread_barrier()
                    load_x(x_desc, x_ptr, rows, x_ring, x_bars, ahead, ahead % X_STAGES, WARPS, ahead < x_stages)
                x_step += 1
    acc = warpgroup_mma_wait(0, deps=[token])
    if x_ptr is not None:
        # Copies past the last stage write zeros to slots whose memory the epilogue uses again.
        async_copy.commit_group()
        async_copy.wait_group(0)
        thread_barrier()

    row = weight_rows(column0, second, WARPS, ACC)
    factor = row_factor(
        row_ptr, fold_ptr, input_scale_ptr, expert, row, N, row_expert, row_stride, input_scale_expert, FP8, FP16
    )
    live = live_rows(live_ptr, m0, BM, COLUMNS, WARPS, OPERAND_ORDER)
    token_scale = token_scales(token_ptr, live_ptr, m0, x_ptr is not None, BM, ACC)
    finish(
        acc, factor, token_scale, live, out_ptr, bias_ptr, expert, row, n_tile, m0,
        N, out_stride, BM, WARPS, ACT, ACT_FN, OPERAND_ORDER,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["n_tiles"])
def grouped_gemm_kernel(
    w_desc, s_desc, x_desc, out_ptr, fold_ptr, row_ptr, token_ptr, input_scale_ptr, bias_ptr, live_ptr, tile_to_expert,
    offsets, N, out_stride, k_stages, n_tiles, x_ptr, experts, row_expert, row_stride, input_scale_expert,
    BM: gl.constexpr, WARPS: gl.constexpr, WEIGHT_STAGES: gl.constexpr, X_STAGES: gl.constexpr, GROUP: gl.constexpr,
    ACT: gl.constexpr, ACT_FN: gl.constexpr, OPERAND_ORDER: gl.constexpr, BY_WORD: gl.constexpr,
):  # fmt: skip
    """out[rows of a tile] = epilogue(x @ weight[expert of the tile]^T), rows in permuted order; a tile a thread block.

    w_desc int32 [E * parts, N / parts, K/8] in boxes [parts, 16 * WARPS / parts, 16 or 32], parts being 2 where gate lies
    above up and 1 elsewhere; s_desc int16 [E * parts, N / parts, K/32] in boxes [parts, 16 * WARPS / parts, 8]; x_desc
    [rows, K] in the order of hopper.py in boxes [BM, 128 bytes]. ACT 2: gated, out has N / 2 columns; 1: ungated; 0: none.
    OPERAND_ORDER: out's columns come in the order that the next GEMM reads 16-bit operands in.

    x_ptr: None, or where x begins if its rows are tokens; then they, and their scales, are gathered by live_ptr, which is
    permuted_idx_to_token.

    BY_WORD: FP8 operands are decoded and multiplied a word of each thread, 32 values of K, at a time.

    The launch may overlap the one before it, which has written x and no more: routing and weights are older.
    """
    BN: gl.constexpr = 16 * WARPS
    FP8: gl.constexpr = x_desc.dtype == gl.float8e4nv
    XK: gl.constexpr = 128 if FP8 else 64  # values of K in an x stage: rows of 128 bytes
    PER_STAGE: gl.constexpr = 256 // XK
    COLUMNS: gl.constexpr = BN // 2 if ACT == 2 else BN  # of out

    unit = gl.program_id(0)
    expert = gl.load(tile_to_expert + unit // n_tiles)
    if expert < 0:
        gdc_wait()
        return
    first_tile = gl.load(offsets + expert) // BM
    m_tiles = gl.load(offsets + expert + 1) // BM - first_tile
    n_tile, m_tile = tile_of(unit - first_tile * n_tiles, n_tiles, m_tiles, GROUP)
    m0 = (first_tile + m_tile) * BM
    column0 = n_tile * COLUMNS
    second = N // 2 if ACT == 2 else BN // 2

    words, scales, read_words, read_scales = weight_slots(w_desc, s_desc, WEIGHT_STAGES, WARPS)
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [X_STAGES, BM, XK], x_desc.layout)
    w_bars = gl.allocate_shared_memory(gl.int64, [WEIGHT_STAGES, 1], mbarrier.MBarrierLayout())
    x_bars = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(WEIGHT_STAGES):
        mbarrier.init(w_bars.index(i), count=1)
    for i in gl.static_range(X_STAGES):
        mbarrier.init(x_bars.index(i), count=1 if x_ptr is None else 32 * WARPS)
    fence_async_shared()
    x_stages = k_stages * PER_STAGE
    for i in gl.static_range(WEIGHT_STAGES - 1):
        load_weights(w_desc, s_desc, words, scales, w_bars.index(i), expert, column0, i, i, i < k_stages)
    gdc_wait()
    gdc_launch_dependents()
    rows = rows_of_x(x_ptr, live_ptr, m0, k_stages * 256, BM, WARPS)
    for i in gl.static_range(X_STAGES - 1):
        load_x(x_desc, x_ptr, rows, x_ring, x_bars, i, i, WARPS, i < x_stages)
    fold = None
    if FP8:
        fold = fold_pairs(fold_ptr, expert, column0, second, N, WARPS)
    if BY_WORD:
        # Once. ptxas serializes the products of a tile that no loop surrounds, and takes fewer registers then.
        for _ in range(unit, gl.load(offsets + experts) // BM * n_tiles, gl.num_programs(0)):
            _one_tile(
                w_desc, s_desc, x_desc, x_ptr, out_ptr, fold_ptr, row_ptr, token_ptr, input_scale_ptr, bias_ptr, live_ptr,
                words, scales, read_words, read_scales, x_ring, w_bars, x_bars, fold, expert, n_tile, m0, rows, N, out_stride,
                k_stages, row_expert, row_stride, input_scale_expert,
                BM, WARPS, WEIGHT_STAGES, X_STAGES, ACT, ACT_FN, OPERAND_ORDER, BY_WORD,
            )  # fmt: skip
    else:
        _one_tile(
            w_desc, s_desc, x_desc, x_ptr, out_ptr, fold_ptr, row_ptr, token_ptr, input_scale_ptr, bias_ptr, live_ptr,
            words, scales, read_words, read_scales, x_ring, w_bars, x_bars, fold, expert, n_tile, m0, rows, N, out_stride,
            k_stages, row_expert, row_stride, input_scale_expert,
            BM, WARPS, WEIGHT_STAGES, X_STAGES, ACT, ACT_FN, OPERAND_ORDER, BY_WORD,
        )  # fmt: skip
