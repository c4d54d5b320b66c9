"""Grouped GEMM for Hopper: the operand trick of hopper.py with a tile -> expert map in front.

A thread block owns one tile: BM permuted rows of one expert times 16 output features a warp. Two blocks share a
multiprocessor, so that one decodes while the other's products run. A fragment of 16 weight rows is made of 8 rows from each
of two places: for GEMM 1 with a gated activation 8 of the gate and the same 8 of the up projection, which then meet in one
thread's registers, and the epilogue forms act(gate) * up without an exchange.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..reference.moe import UNGATED
from ..reference.moe_routing import Routing
from .gluon_compat import thread_barrier, tma_load
from .hopper import decode_16, decode_fp8, halves, scale_pairs, tile_of
from .moe_combine import gated, ungated
from .moe_gemm import ExpertWeights


@gluon.jit
def _load_weights(
    w_desc, s_desc, words, scales, bar, row, second, k, stage, pred
):  # fmt: skip
    """Weight stage k (256 values of K) of rows row.. and row + second.. into slot `stage`."""
    mbarrier.expect(bar, 4 * w_desc.block_type.nbytes + 2 * s_desc.block_type.nbytes, pred=pred)
    for part in gl.static_range(2):
        for chunk in gl.static_range(2):
            slot = words.index(stage * 4 + chunk * 2 + part)
            tma_load(w_desc, [row + part * second, k * 32 + chunk * 16], bar, slot, pred=pred)
        tma_load(s_desc, [row + part * second, k * 8], bar, scales.index(stage * 2 + part), pred=pred)


@gluon.jit
def _load_x(x_desc, x_ring, bars, m0, k, stage, XK: gl.constexpr, pred):
    mbarrier.expect(bars.index(stage), x_desc.block_type.nbytes, pred=pred)
    tma_load(x_desc, [m0, k * XK], bars.index(stage), x_ring.index(stage), pred=pred)


@gluon.jit
def _interleave(first, second, WARPS: gl.constexpr, LAYOUT: gl.constexpr):
    """[8 * WARPS, columns] twice to [16 * WARPS, columns]: 8 rows of the one, 8 rows of the other, in turns."""
    COLUMNS: gl.constexpr = first.shape[1]
    both = gl.reshape(gl.join(first, second), [WARPS, 8, COLUMNS, 2])
    both = gl.reshape(gl.permute(both, [0, 3, 1, 2]), [16 * WARPS, COLUMNS])
    return gl.convert_layout(both, LAYOUT, assert_trivial=True)


@gluon.jit(do_not_specialize=["n_tiles"])
def grouped_gemm_kernel(
    w_desc, s_desc, x_desc, out_ptr, fold_ptr, row_ptr, token_ptr, input_scale_ptr, bias_ptr, tile_to_expert, offsets,
    N, k_stages, n_tiles, row_expert, row_stride, input_scale_expert,
    BM: gl.constexpr, WARPS: gl.constexpr, WEIGHT_STAGES: gl.constexpr, X_STAGES: gl.constexpr, GROUP: gl.constexpr,
    ACT: gl.constexpr, ACT_FN: gl.constexpr, OPERAND_ORDER: gl.constexpr,
):  # fmt: skip
    """out[rows of a tile] = epilogue(x @ weight[expert of the tile]^T), rows in permuted order.

    w_desc int32 [E * N, K/8] in boxes [8 * WARPS, 16], s_desc int16 [E * N, K/32] in boxes [8 * WARPS, 8], x_desc [rows, K] in
    the order of hopper.py in boxes [BM, 128 bytes]. ACT 2: gated, out has N / 2 columns; 1: ungated; 0: none. OPERAND_ORDER:
    out's columns come in the order that the next GEMM reads 16-bit operands in.
    """
    BN: gl.constexpr = 16 * WARPS
    FP8: gl.constexpr = x_desc.dtype == gl.float8e4nv
    FP16: gl.constexpr = x_desc.dtype == gl.float16
    DTYPE: gl.constexpr = out_ptr.dtype.element_ty
    XK: gl.constexpr = 128 if FP8 else 64  # values of K in an x stage: rows of 128 bytes
    PER_STAGE: gl.constexpr = 256 // XK
    WARP_ROWS: gl.constexpr = [[16, 0], [32, 0]] if WARPS == 4 else [[16, 0], [32, 0], [64, 0]]
    WORDS: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0]], [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]], WARP_ROWS, [], [BN, 16]
    )
    PAIRS: gl.constexpr = gl.DistributedLinearLayout([[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], WARP_ROWS, [], [BN, 4])
    HALF_WARP_ROWS: gl.constexpr = [[8, 0], [16, 0]] if WARPS == 4 else [[8, 0], [16, 0], [32, 0]]
    HALF_WORDS: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2]], [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]], HALF_WARP_ROWS, [], [BN // 2, 16]
    )
    HALF_PAIRS: gl.constexpr = gl.DistributedLinearLayout(
        [], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], HALF_WARP_ROWS, [], [BN // 2, 4]
    )
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BM, 32 if FP8 else 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, ACC, 4 if FP8 else 2)
    COLUMNS: gl.constexpr = BN // 2 if ACT == 2 else BN  # of out

    unit = gl.program_id(0)
    expert = gl.load(tile_to_expert + unit // n_tiles)
    if expert < 0:
        return
    first_tile = gl.load(offsets + expert) // BM
    m_tiles = gl.load(offsets + expert + 1) // BM - first_tile
    n_tile, m_tile = tile_of(unit - first_tile * n_tiles, n_tiles, m_tiles, GROUP)
    m0 = (first_tile + m_tile) * BM
    column0 = n_tile * COLUMNS
    second = N // 2 if ACT == 2 else BN // 2
    row0 = expert * N + column0

    words = gl.allocate_shared_memory(gl.int32, [WEIGHT_STAGES * 4, BN // 2, 16], w_desc.layout)
    scales = gl.allocate_shared_memory(gl.int16, [WEIGHT_STAGES * 2, BN // 2, 8], s_desc.layout)
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [X_STAGES, BM, XK], x_desc.layout)
    w_bars = gl.allocate_shared_memory(gl.int64, [WEIGHT_STAGES, 1], mbarrier.MBarrierLayout())
    x_bars = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(WEIGHT_STAGES):
        mbarrier.init(w_bars.index(i), count=1)
    for i in gl.static_range(X_STAGES):
        mbarrier.init(x_bars.index(i), count=1)
    fence_async_shared()
    x_stages = k_stages * PER_STAGE
    for i in gl.static_range(WEIGHT_STAGES - 1):
        _load_weights(w_desc, s_desc, words, scales, w_bars.index(i), row0, second, i, i, i < k_stages)
    for i in gl.static_range(X_STAGES - 1):
        _load_x(x_desc, x_ring, x_bars, m0, i, i, XK, i < x_stages)

    # A fragment's rows 0..7 are weight rows from row0 on, its rows 8..15 those from row0 + second on.
    fragment = gl.arange(0, BN, gl.SliceLayout(1, ACC))
    weight_row = column0 + fragment // 16 * 8 + fragment % 8 + (fragment // 8) % 2 * second
    in_n = weight_row < N
    row_at = (expert * N + weight_row).to(gl.int64)
    if FP8:
        pair_row = gl.arange(0, BN, gl.SliceLayout(1, PAIRS))
        pair_row = column0 + pair_row // 16 * 8 + pair_row % 8 + (pair_row // 8) % 2 * second
        inverse = 1.0 / gl.load(fold_ptr + (expert * N + pair_row).to(gl.int64), mask=pair_row < N, other=1.0)
        bits = inverse.to(gl.float16).to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
        fold, _ = gl.broadcast(gl.expand_dims(bits | (bits << 16), 1), gl.zeros([BN, 4], gl.int32, PAIRS))

    token = warpgroup_mma_init(gl.zeros([BN, BM], gl.float32, ACC))
    x_step = 0
    for stage in range(k_stages):
        # Every warp is past the last barrier, so past its reads of the stage before: that slot is free.
        ahead_w = stage + WEIGHT_STAGES - 1
        free = ahead_w % WEIGHT_STAGES
        _load_weights(w_desc, s_desc, words, scales, w_bars.index(free), row0, second, ahead_w, free, ahead_w < k_stages)
        slot = stage % WEIGHT_STAGES
        mbarrier.wait(w_bars.index(slot), (stage // WEIGHT_STAGES) & 1)
        for chunk in gl.static_range(2):
            w = _interleave(
                words.index(slot * 4 + chunk * 2).load(HALF_WORDS),
                words.index(slot * 4 + chunk * 2 + 1).load(HALF_WORDS),
                WARPS,
                WORDS,
            )
            s = _interleave(
                scales.index(slot * 2).slice(4 * chunk, 4, dim=1).load(HALF_PAIRS),
                scales.index(slot * 2 + 1).slice(4 * chunk, 4, dim=1).load(HALF_PAIRS),
                WARPS,
                PAIRS,
            )
            if not FP8:
                s_first, s_second = scale_pairs(s, FP16)
                w_first, w_second = halves(w, BN)
            for half in gl.static_range(PER_STAGE // 2):
                if FP8:
                    a = decode_fp8(w, s, fold, BN, OPERAND)
                else:
                    a = decode_16(w_first if half == 0 else w_second, s_first if half == 0 else s_second, BN, OPERAND, FP16)
                x_slot = x_step % X_STAGES
                mbarrier.wait(x_bars.index(x_slot), (x_step // X_STAGES) & 1)
                token = warpgroup_mma(a, x_ring.index(x_slot).permute((1, 0)), token, is_async=True)
                token = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[token]))
                # The products before these are done, in every warp once past the barrier: their x stage is free.
                thread_barrier()
                ahead = x_step + X_STAGES - 1
                _load_x(x_desc, x_ring, x_bars, m0, ahead, ahead % X_STAGES, XK, ahead < x_stages)
                x_step += 1
    acc = warpgroup_mma_wait(0, deps=[token])

    factor = gl.load(row_ptr + expert.to(gl.int64) * row_expert + weight_row * row_stride, mask=in_n, other=0.0)
    if FP8:
        factor *= gl.load(fold_ptr + row_at, mask=in_n, other=0.0)
    elif FP16:
        factor *= 128.0
    else:
        factor *= 256.0
    if input_scale_ptr is not None:
        factor *= gl.load(input_scale_ptr + expert * input_scale_expert)
    result = acc * factor[:, None]
    if token_ptr is not None:
        m = m0 + gl.arange(0, BM, gl.SliceLayout(0, ACC))
        result *= gl.load(token_ptr + m)[None, :]
    if bias_ptr is not None:
        result += gl.load(bias_ptr + row_at, mask=in_n, other=0.0).to(gl.float32)[:, None]
    result = gl.reshape(result.to(DTYPE), [WARPS, 2, 8, BM])
    if ACT == 2:
        gate, up = gl.split(gl.permute(result.to(gl.float32), [0, 2, 3, 1]))
        values = gl.reshape(gated(gate, up, ACT_FN).to(DTYPE), [COLUMNS, BM])
    else:
        values = gl.reshape(gl.permute(result, [1, 0, 2, 3]), [COLUMNS, BM])
        if ACT == 1:
            values = ungated(values.to(gl.float32), ACT_FN).to(DTYPE)
    values = gl.permute(values, [1, 0])
    VECTOR: gl.constexpr = COLUMNS // 16 if OPERAND_ORDER else 8
    if OPERAND_ORDER:
        # t word h j -> word j t h, for the part of t that the tile holds: COLUMNS / 16 neighbours stay together.
        values = gl.permute(gl.reshape(values, [BM, COLUMNS // 32, 4, 2, 4]), [0, 2, 4, 1, 3])
        values = gl.reshape(values, [BM, COLUMNS])
    ROWS: gl.constexpr = gl.BlockedLayout([1, VECTOR], [32 * VECTOR // COLUMNS, COLUMNS // VECTOR], [WARPS, 1], [1, 0])
    values = gl.convert_layout(values, ROWS)
    out_row = (m0 + gl.arange(0, BM, gl.SliceLayout(1, ROWS))).to(gl.int64)
    column = gl.arange(0, COLUMNS, gl.SliceLayout(0, ROWS))
    width = N // 2 if ACT == 2 else N
    if OPERAND_ORDER:
        # The next GEMM's K is a multiple of 256: no tile is cut.
        PARTS: gl.constexpr = 128 // COLUMNS
        column = n_tile // PARTS * 128 + n_tile % PARTS * VECTOR + column // VECTOR * 8 + column % VECTOR
        gl.store(out_ptr + out_row[:, None] * width + column[None, :], values)
    else:
        column = column0 + column
        gl.store(out_ptr + out_row[:, None] * width + column[None, :], values, mask=(column < width)[None, :])


def serves(device: torch.device, weights: tuple[ExpertWeights, ...], act_fn: str) -> bool:
    """Whether this path takes the layer: Hopper, whole stages of 256 along both K, gate and up rows below each other."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) == (9, 0)
        and act_fn != "swigluoai"
        and all(w.data.shape[-1] % 128 == 0 and w.data.shape[1] % 16 == 0 for w in weights)
        and all(t.data_ptr() % 16 == 0 for w in weights for t in (w.data, w.scales))
    )


def tiling(block_m: int, fp8: bool) -> tuple[int, int, int]:
    """(warps, weight stages, x stages) of a tile of `block_m` rows."""
    if block_m <= 32:
        return 4, 4, 6
    return 8, 2 if block_m == 128 else 3, 3 if block_m == 128 else 4


def _descriptor(t: torch.Tensor, box: list[int], dtype: gl.dtype) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(t, box, gl.NVMMASharedLayout.get_default_for(box, dtype))


def grouped_gemm(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weights: ExpertWeights,
    routing: Routing,
    *,
    dtype: torch.dtype,
    block_m: int,
    act_fn: str | None = None,
    operand_order: bool = False,
) -> torch.Tensor:
    """As `moe_gemm.grouped_gemm` for x in permuted rows and in the order of hopper.py along K."""
    experts, n, half_k = weights.data.shape
    gated_act = act_fn is not None and act_fn not in UNGATED
    fp8 = x.dtype == torch.float8_e4m3fn
    warps, weight_stages, x_stages = tiling(block_m, fp8)
    columns = 8 * warps if gated_act else 16 * warps
    width = n // 2 if gated_act else n
    n_tiles = triton.cdiv(width, columns)
    out = x.new_empty((x.shape[0], width), dtype=dtype)
    element = gl.float8e4nv if fp8 else gl.float16 if x.dtype == torch.float16 else gl.bfloat16
    grouped_gemm_kernel[(len(routing.tile_to_expert) * n_tiles,)](
        _descriptor(weights.data.view(torch.int32).view(experts * n, -1), [8 * warps, 16], gl.int32),
        _descriptor(weights.scales.view(torch.int16).view(experts * n, -1), [8 * warps, 8], gl.int16),
        _descriptor(x, [block_m, 128 if fp8 else 64], element),
        out,
        weights.fp8_fold,
        weights.row_scale,
        x_scale,
        weights.input_scale,
        weights.bias,
        routing.tile_to_expert,
        routing.expert_offsets,
        n,
        half_k // 128,
        n_tiles,
        weights.row_scale.shape[1],
        int(weights.row_scale.shape[1] > 1),
        int(weights.input_scale is not None and weights.input_scale.numel() > 1),
        BM=block_m,
        WARPS=warps,
        WEIGHT_STAGES=weight_stages,
        X_STAGES=x_stages,
        GROUP=8,
        ACT=2 if gated_act else 0 if act_fn is None else 1,
        ACT_FN=act_fn or "",
        OPERAND_ORDER=operand_order,
        num_warps=warps,
    )
    return out
