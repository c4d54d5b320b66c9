"""Grouped GEMM for Hopper: which kernel takes a layer, in tiles of which size, and its launch."""

from __future__ import annotations

import torch

from ..devices import arch_of, processors_of
from ..reference.moe import UNGATED
from ..reference.moe_routing import Routing
from .descriptors import descriptor
from .hopper import burst_of
from .launch import cdiv, launch
from .moe_gemm import ExpertWeights
from .moe_gemm_decode import grouped_gemm_decode_kernel
from .moe_gemm_long import grouped_gemm_long_kernel
from .moe_gemm_short import grouped_gemm_short_kernel
from .moe_gemm_tile import grouped_gemm_kernel
from .moe_operand import whole_stages
from .workspace import split_k


def serves(device: torch.device, weights: tuple[ExpertWeights, ...], act_fn: str) -> bool:
    """Whether this path takes the layer: Hopper, rows of whole 16 bytes along both K, gate and up rows below each other."""
    return (
        arch_of(device) == 90
        and act_fn != "swigluoai"
        and all(w.data.shape[-1] % 16 == 0 and w.data.shape[1] % 16 == 0 for w in weights)
        and all(t.data_ptr() % 16 == 0 for w in weights for t in (w.data, w.scales))
    )


_DECODE_ROWS = 32  # tiles up to which the kernel for few rows serves
_LONG_ROWS = 256
_LONG_MIN_STAGES = 2  # so that copies of weights are a tile ahead of the products at most
_GATHER_TOP_K = 4  # from which on, and weight rows up to which, GEMM 1 gathers its rows
_GATHER_ROWS = 768
_MIN_STAGES = 2  # of a part of K
_LONG_STAGES = 8  # from which on it pays to see how the last tiles are best shared


def is_short(block_m: int, fp8: bool, k: int) -> bool:
    """Whether the kernel for a K of one stage serves."""
    return fp8 and k <= 256 and block_m < _LONG_ROWS


def tiling(block_m: int, fp8: bool, k: int) -> tuple[int, int, int, int]:
    """(warps, weight stages, x stages, blocks of a multiprocessor) of a tile of `block_m` rows.

    The kernel for few rows has stages of weights and x together.
    """
    if is_short(block_m, fp8, k):
        return (4, 2, 1, 5) if block_m == 32 else (4, 3, 1, {8: 6, 16: 6, 64: 4, 128: 3}[block_m])
    if block_m <= _DECODE_ROWS:
        x_size = block_m if fp8 else 2 * block_m
        if x_size <= 16 and k >= _LONG_STAGES * 256 and k % 256:
            # Rows that begin between the 128-byte lines of the memory: more of each is loaded at once, so that lines are whole.
            return 4, 8, 0, 2
        return 4, 4 if x_size <= 32 else 3, 0, 4 if x_size <= 16 else 3 if x_size <= 32 else 2
    if block_m == _LONG_ROWS:
        return 8, 3, 4, 1
    return 8, 2, 3 if block_m == 128 else 4, 2


def max_registers(warps: int, resident: int) -> int:
    """Registers a thread that leave room for `resident` blocks of a multiprocessor.

    A limit only where there would be more: below it, ptxas chooses more registers than without one.
    """
    return min(65536 // (32 * warps * resident) // 8 * 8, 255)


def gathers(block_m: int, top_k: int, n: int) -> bool:
    """Whether GEMM 1 of `n` weight rows takes the rows of tokens by itself, instead of copies in permuted order.

    That saves top_k copies of each token, but gathering is slower than a bulk copy, and is done once for every tile along n.
    """
    return _DECODE_ROWS < block_m < _LONG_ROWS and top_k >= _GATHER_TOP_K and n <= _GATHER_ROWS


def grouped_gemm(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weights: ExpertWeights,
    routing: Routing,
    *,
    dtype: torch.dtype,
    block_m: int,
    gather: bool = False,
    act_fn: str | None = None,
    operand_order: bool = False,
) -> torch.Tensor:
    """As `moe_gemm.grouped_gemm` for x [rows, whole_stages(K)], in the order of hopper.py along K.

    `gather`, for tiles of 64 or 128 rows: the rows of x are tokens, as those of x_scale; otherwise they are permuted.
    """
    experts, n, half_k = weights.data.shape
    gated_act = act_fn is not None and act_fn not in UNGATED
    fp8 = x.dtype == torch.float8_e4m3fn
    stages = cdiv(half_k, 128)
    if block_m == _LONG_ROWS and stages < _LONG_MIN_STAGES:
        raise ValueError(f"block_m: got {block_m} for K = {2 * half_k}, allowed from K = {256 * _LONG_MIN_STAGES} on")
    warps, weight_stages, x_stages, resident = tiling(block_m, fp8, 2 * half_k)
    short = is_short(block_m, fp8, 2 * half_k)
    few = block_m <= _DECODE_ROWS
    long = block_m == _LONG_ROWS  # where each half of the warps has boxes of its own
    columns = 8 * warps if gated_act else 16 * warps
    width = n // 2 if gated_act else n
    out_width = whole_stages(width) if operand_order else width
    n_tiles = cdiv(out_width, columns)
    out = x.new_empty((len(routing.permuted_idx_to_token), out_width), dtype=dtype)
    units = len(routing.tile_to_expert) * n_tiles
    parts = 2 if gated_act else 1
    shape = (experts * parts, n // parts)
    box = (parts, (8 if long else 16) * warps // parts)
    operands = (
        descriptor(weights.data, (*box, 32 if few or short else 16), torch.int32, (*shape, half_k // 4)),
        descriptor(weights.scales, (*box, 8), torch.int16, (*shape, half_k // 16)),
        descriptor(x, (block_m, 128 if fp8 else 64)),
        out,
        weights.fp8_fold,
        weights.row_scale,
        x_scale,
        weights.input_scale,
        weights.bias,
        routing.permuted_idx_to_token,
    )
    maps = (routing.tile_to_expert, routing.expert_offsets, n, out_width)
    strides = (
        experts,
        weights.row_scale.shape[1],
        int(weights.row_scale.shape[1] > 1),
        int(weights.input_scale is not None and weights.input_scale.numel() > 1),
    )
    options = {
        "BM": block_m,
        "ACT": 2 if gated_act else 0 if act_fn is None else 1,
        "ACT_FN": act_fn or "",
        "OPERAND_ORDER": operand_order,
        "num_warps": warps,
        "launch_pdl": True,
    }
    if not long:
        options["WARPS"] = warps
    by_word = fp8 and not few and block_m < _LONG_ROWS and stages >= (16 if block_m == 64 else 8)
    if by_word or short or block_m == 128:
        options["maxnreg"] = max_registers(warps, resident)
    processors = processors_of(x.device)
    if short:
        launch(
            grouped_gemm_short_kernel, (min(resident * processors, units),), *operands, *maps, n_tiles, *strides,
            WEIGHT_STAGES=weight_stages, **options,
        )  # fmt: skip
    elif few:
        # Where a fourth block saves a round of tiles, it gets the room of a stage. An expert has about one tile.
        tiles = min(len(routing.tile_to_expert), experts) * n_tiles
        if resident == 3 and 4 * cdiv(tiles, 4 * processors) < 0.8 * 3 * cdiv(tiles, 3 * processors):
            weight_stages, resident = 3, 4
        blocks = resident * processors
        shares = min(blocks // units, stages // _MIN_STAGES)
        # A long K is worth the time that it takes to see how its last tiles are best shared; many rounds end about evenly.
        if shares == 0 and stages >= _LONG_STAGES and tiles <= 4 * blocks:
            partial, count = split_k(x.device, 4 * blocks * 16 * warps * block_m, blocks)
        elif shares > 1:
            shares = cdiv(stages, cdiv(stages, shares))  # no more than shorten the longest share
            blocks = units * shares
            partial, count = split_k(x.device, blocks * 16 * warps * block_m, units)
        else:
            blocks, partial, count = min(blocks, units), None, None
        launch(
            grouped_gemm_decode_kernel, (blocks,),
            *operands, partial, count, *maps, stages, n_tiles, shares, *strides,
            STAGES=weight_stages, BURST=burst_of(weight_stages) if stages >= 4 else 1,
            REDUCE=partial is not None, MIN_STAGES=_MIN_STAGES, **options,
        )  # fmt: skip
    elif long:
        options["num_warps"] = warps // 2  # which start the others
        out_box = None if operand_order else descriptor(out, (block_m // 2, columns // 2))
        launch(
            grouped_gemm_long_kernel, (min(units, processors),),
            *operands[:3], out_box, *operands[3:], *maps, stages, n_tiles, *strides,
            WEIGHT_STAGES=weight_stages, **options,
        )  # fmt: skip
    else:
        launch(
            grouped_gemm_kernel, (units,), *operands, *maps, stages, n_tiles, x if gather else None, *strides,
            WEIGHT_STAGES=weight_stages, X_STAGES=x_stages, GROUP=8, BY_WORD=by_word, **options,
        )  # fmt: skip
    return out
