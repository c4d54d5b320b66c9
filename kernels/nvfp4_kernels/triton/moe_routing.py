"""Routing metadata on the GPU: a stable counting sort of the slots by expert, in one launch or two.

Few slots: one program does it all. Many: a first launch counts the experts of each chunk of slots, a second one adds up the
counts of the chunks before its own (nothing is accumulated in an order that could change) and places its slots. The
programs of the last launch share the writing of the tile map and of the padding rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..reference.moe_routing import Routing, max_tiles

_STEP = 128  # slots ranked at once, by comparing each with each
_ONE_PROGRAM = 1024  # slots up to which a second launch costs more than it saves
_MAX_CHUNKS = 256


@triton.jit
def _load_experts(ids, expert_map, slot, slots, experts, global_experts, HAS_MAP: tl.constexpr, BINS: tl.constexpr):
    """Local experts (int32) of slots; BINS - 1, which is no expert, where there is none."""
    expert = tl.load(ids + slot, mask=slot < slots, other=-1).to(tl.int32)
    if HAS_MAP:
        known = (expert >= 0) & (expert < global_experts)
        expert = tl.load(expert_map + expert, mask=known, other=-1).to(tl.int32)
    return tl.where((expert >= 0) & (expert < experts), expert, BINS - 1)


@triton.jit(do_not_specialize=["slots", "chunk"])
def count_kernel(
    ids, expert_map, counts, slots, chunk, experts, global_experts,
    HAS_MAP: tl.constexpr, BINS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """counts[program, :] = slots of each expert in the program's chunk."""
    first = tl.program_id(0) * chunk
    total = tl.zeros([BINS], tl.int32)
    for start in range(0, chunk, STEP):
        slot = first + start + tl.arange(0, STEP)
        total += tl.histogram(_load_experts(ids, expert_map, slot, slots, experts, global_experts, HAS_MAP, BINS), BINS)
    tl.store(counts + tl.program_id(0) * BINS + tl.arange(0, BINS), total)


@triton.jit(do_not_specialize=["slots", "chunk", "tiles"])
def place_kernel(
    ids, expert_map, counts, expanded_to_permuted, permuted_to_token, expert_offsets, tile_to_expert,
    slots, chunk, experts, global_experts, tiles,
    TOP_K: tl.constexpr, BLOCK_M: tl.constexpr, CHUNKS: tl.constexpr, HAS_MAP: tl.constexpr, BINS: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Write all four tensors of `Routing`. CHUNKS: the launch's programs, up to a multiple of 8; 0: one, without counts."""
    program = tl.program_id(0)
    bins = tl.arange(0, BINS)
    total = tl.zeros([BINS], tl.int32)
    before = tl.zeros([BINS], tl.int32)
    if CHUNKS == 0:
        for start in range(0, chunk, STEP):
            slot = start + tl.arange(0, STEP)
            total += tl.histogram(_load_experts(ids, expert_map, slot, slots, experts, global_experts, HAS_MAP, BINS), BINS)
    else:
        for start in range(0, CHUNKS, 8):
            other = start + tl.arange(0, 8)[:, None]
            part = tl.load(counts + other * BINS + bins[None, :], mask=other < tl.num_programs(0), other=0)
            total += tl.sum(part, axis=0)
            before += tl.sum(tl.where(other < program, part, 0), axis=0)
    total = tl.where(bins < experts, total, 0)
    expert_tiles = (total + (BLOCK_M - 1)) // BLOCK_M
    tile_end = tl.cumsum(expert_tiles, axis=0)
    first_tile = tile_end - expert_tiles
    if program == 0:
        # The bins past the last expert are empty: they hold the end.
        tl.store(expert_offsets + bins, first_tile * BLOCK_M, mask=bins <= experts)

    next_row = first_tile * BLOCK_M + before
    lane = tl.arange(0, STEP)
    for start in range(0, chunk, STEP):
        slot = program * chunk + start + tl.arange(0, STEP)
        expert = _load_experts(ids, expert_map, slot, slots, experts, global_experts, HAS_MAP, BINS)
        earlier = (expert[:, None] == expert[None, :]) & (lane[:, None] > lane[None, :])
        rank = tl.sum(earlier.to(tl.int32), axis=1)
        row = tl.gather(next_row, expert, 0) + rank
        live = (expert < experts) & (slot < slots)
        tl.store(expanded_to_permuted + slot, tl.where(live, row, -1), mask=slot < slots)
        tl.store(permuted_to_token + row, slot // TOP_K, mask=live)
        next_row += tl.histogram(expert, BINS)

    num_tiles = tl.sum(expert_tiles, axis=0)
    for start in range(program * 16, tiles, tl.num_programs(0) * 16):
        tile = start + tl.arange(0, 16)
        owner = tl.sum((tile_end[None, :] <= tile[:, None]).to(tl.int32), axis=1)
        used = tile < num_tiles
        tl.store(tile_to_expert + tile, tl.where(used, owner, -1), mask=tile < tiles)
        owner = tl.minimum(owner, BINS - 1)
        end = tl.gather(first_tile * BLOCK_M + total, owner, 0)
        row = tile[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        padding = (tile < tiles)[:, None] & ((used == 0)[:, None] | (row >= end[:, None]))
        tl.store(permuted_to_token + row, tl.full(row.shape, -1, tl.int32), mask=padding)


def route(topk_ids: torch.Tensor, experts: int, block_m: int, expert_map: torch.Tensor | None = None) -> Routing:
    """As `reference.moe_routing.route`; `block_m` a power of two. Reads nothing back to the host."""
    tokens, top_k = topk_ids.shape
    slots = tokens * top_k
    tiles = max_tiles(slots, experts, block_m)
    result = Routing(
        topk_ids.new_empty((tokens, top_k), dtype=torch.int32),
        topk_ids.new_empty((tiles * block_m,), dtype=torch.int32),
        topk_ids.new_empty((experts + 1,), dtype=torch.int32),
        topk_ids.new_empty((tiles,), dtype=torch.int32),
    )
    if slots == 0:
        result.expert_offsets.zero_()
        return result
    topk_ids = topk_ids.contiguous()
    bins = max(16, triton.next_power_of_2(experts + 1))
    shared = {"HAS_MAP": expert_map is not None, "BINS": bins, "STEP": _STEP, "num_warps": 4}
    global_experts = 0 if expert_map is None else expert_map.numel()
    if slots <= _ONE_PROGRAM:
        programs, chunk, counts = 1, triton.cdiv(slots, _STEP) * _STEP, result.tile_to_expert
    else:
        chunk = triton.cdiv(triton.cdiv(slots, _MAX_CHUNKS), _STEP) * _STEP
        programs = triton.cdiv(slots, chunk)
        counts = topk_ids.new_empty((programs, bins), dtype=torch.int32)
        count_kernel[(programs,)](topk_ids, expert_map, counts, slots, chunk, experts, global_experts, **shared)
    place_kernel[(programs,)](
        topk_ids,
        expert_map,
        counts,
        *result,
        slots,
        chunk,
        experts,
        global_experts,
        tiles,
        TOP_K=top_k,
        BLOCK_M=block_m,
        CHUNKS=0 if programs == 1 else triton.cdiv(programs, 8) * 8,
        **shared,
    )
    return result
