"""Routing metadata on the GPU: a stable counting sort of the slots by expert, in one launch to three.

Few slots: every program counts them all, which costs less than another launch. More: a first launch counts the experts of
each chunk of slots, and a program adds up what comes before its own chunk. Very many: a launch in between does that for all
chunks. Nothing is accumulated in an order that could change. Then a program places the slots of its chunk; all share the
writing of the tile map and of the padding rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from ..devices import arch_of
from ..reference.moe_routing import Routing, max_tiles
from .launch import cdiv, launch, next_power_of_2

_STEP = 128  # slots ranked at once, by comparing each with each, where there are many
_FEW_STEP = 32  # and in one launch, where more programs are faster
_ONE_LAUNCH = 1024  # slots up to which every program counts them all
_MAX_CHUNKS = 64  # whose counts every program adds up by itself
_SCAN_BINS = 8  # of a program that adds up the counts of more chunks
_SCAN_CHUNKS = 256  # that it takes at once
_TILES = 16  # of the tile map, a program and round
_MAP_PROGRAMS = 128  # that write it, if not more have slots to place


@triton.jit
def _load_experts(ids, expert_map, slot, slots, experts, global_experts, HAS_MAP: tl.constexpr, BINS: tl.constexpr):
    """Local experts (int32) of slots; BINS - 1, which is no expert, where there is none."""
    expert = tl.load(ids + slot, mask=slot < slots, other=-1).to(tl.int32)
    if HAS_MAP:
        known = (expert >= 0) & (expert < global_experts)
        expert = tl.load(expert_map + expert, mask=known, other=-1).to(tl.int32)
    return tl.where((expert >= 0) & (expert < experts), expert, BINS - 1)


@triton.jit(do_not_specialize=["slots"])
def count_kernel(
    ids, expert_map, counts, slots, experts, global_experts, HAS_MAP: tl.constexpr, BINS: tl.constexpr, STEP: tl.constexpr
):  # fmt: skip
    """counts[program, :] = slots of each expert in the program's chunk of STEP."""
    slot = tl.program_id(0) * STEP + tl.arange(0, STEP)
    count = tl.histogram(_load_experts(ids, expert_map, slot, slots, experts, global_experts, HAS_MAP, BINS), BINS)
    tl.store(counts + tl.program_id(0) * BINS + tl.arange(0, BINS), count)


@triton.jit(do_not_specialize=["chunks"])
def scan_kernel(counts, totals, chunks, BINS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr):
    """counts [chunks, BINS] become sums over the chunks before, those over all go to totals [BINS]. A program: WIDTH bins."""
    bin = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.int32)
    for start in range(0, chunks, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        at = counts + chunk[:, None] * BINS + bin[None, :]
        count = tl.load(at, mask=(chunk < chunks)[:, None], other=0)
        tl.store(at, total[None, :] + tl.cumsum(count, axis=0) - count, mask=(chunk < chunks)[:, None])
        total += tl.sum(count, axis=0)
    tl.store(totals + bin, total)


@triton.jit(do_not_specialize=["slots", "chunks", "tiles"])
def place_kernel(
    ids, expert_map, counts, totals, expanded_to_permuted, permuted_to_token, expert_offsets, tile_to_expert,
    slots, chunks, experts, global_experts, tiles,
    TOP_K: tl.constexpr, BLOCK_M: tl.constexpr, ALL_SLOTS: tl.constexpr, HAS_MAP: tl.constexpr, BINS: tl.constexpr,
    STEP: tl.constexpr, TILES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write all four tensors of `Routing`. counts: int32 [chunks, BINS] of `count_kernel`, unused if ALL_SLOTS > 0; with totals
    both are of `scan_kernel`.

    Programs from `chunks` on have no slots of their own and only write parts of the tile map.
    """
    if PDL:
        gdc_launch_dependents()  # the next kernel waits for this one's results, and only its launch overlaps
    program = tl.program_id(0)
    bins = tl.arange(0, BINS)
    if ALL_SLOTS > 0:
        any_slot = tl.arange(0, ALL_SLOTS)
        chosen = _load_experts(ids, expert_map, any_slot, slots, experts, global_experts, HAS_MAP, BINS)
        total = tl.histogram(chosen, BINS)
        before = tl.histogram(tl.where(any_slot < program * STEP, chosen, BINS - 1), BINS)
    elif totals is not None:
        total = tl.load(totals + bins)
        before = tl.load(counts + tl.minimum(program, chunks - 1) * BINS + bins)
    else:
        total = tl.zeros([BINS], tl.int32)
        before = tl.zeros([BINS], tl.int32)
        AT_ONCE: tl.constexpr = 8192 // BINS  # what the registers hold
        for start in range(0, chunks, AT_ONCE):
            other = start + tl.arange(0, AT_ONCE)[:, None]
            part = tl.load(counts + other * BINS + bins[None, :], mask=other < chunks, other=0)
            total += tl.sum(part, axis=0)
            before += tl.sum(tl.where(other < program, part, 0), axis=0)
    total = tl.where(bins < experts, total, 0)
    expert_tiles = (total + (BLOCK_M - 1)) // BLOCK_M
    tile_end = tl.cumsum(expert_tiles, axis=0)
    first_tile = tile_end - expert_tiles
    if program == 0:
        # The bins past the last expert are empty: they hold the end.
        tl.store(expert_offsets + bins, first_tile * BLOCK_M, mask=bins <= experts)

    if program < chunks:
        lane = tl.arange(0, STEP)
        slot = program * STEP + lane
        expert = _load_experts(ids, expert_map, slot, slots, experts, global_experts, HAS_MAP, BINS)
        earlier = (expert[:, None] == expert[None, :]) & (lane[:, None] > lane[None, :])
        row = tl.gather(first_tile * BLOCK_M + before, expert, 0) + tl.sum(earlier.to(tl.int32), axis=1)
        live = (expert < experts) & (slot < slots)
        tl.store(expanded_to_permuted + slot, tl.where(live, row, -1), mask=slot < slots)
        tl.store(permuted_to_token + row, slot // TOP_K, mask=live)

    num_tiles = tl.sum(expert_tiles, axis=0)
    for start in range(program * TILES, tiles, tl.num_programs(0) * TILES):
        tile = start + tl.arange(0, TILES)
        owner = tl.sum((tile_end[None, :] <= tile[:, None]).to(tl.int32), axis=1)
        used = tile < num_tiles
        tl.store(tile_to_expert + tile, tl.where(used, owner, -1), mask=tile < tiles)
        end = tl.gather(first_tile * BLOCK_M + total, tl.minimum(owner, BINS - 1), 0)
        tile_row = tile[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        padding = (tile < tiles)[:, None] & ((used == 0)[:, None] | (tile_row >= end[:, None]))
        tl.store(permuted_to_token + tile_row, tl.full(tile_row.shape, -1, tl.int32), mask=padding)


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
    expert_map = None if expert_map is None else expert_map.contiguous()
    bins = max(16, next_power_of_2(experts + 1))
    # Few slots: fewer warps have less to agree on, as measured on an H100.
    few = slots <= 128
    if slots <= _ONE_LAUNCH:
        step, warps = _FEW_STEP, 1 if slots <= 32 and bins <= 256 else 2 if few else 4
    else:
        step, warps = _STEP, 8
    at_once = _TILES // 2 if few else _TILES
    shared = {"HAS_MAP": expert_map is not None, "BINS": bins, "STEP": step, "num_warps": warps}
    global_experts = 0 if expert_map is None else expert_map.numel()
    chunks = cdiv(slots, step)
    counts, totals = None, None
    if slots > _ONE_LAUNCH:
        counts = topk_ids.new_empty((chunks, bins), dtype=torch.int32)
        launch(count_kernel, (chunks,), topk_ids, expert_map, counts, slots, experts, global_experts, **shared)
    if chunks > _MAX_CHUNKS:
        totals = topk_ids.new_empty((bins,), dtype=torch.int32)
        launch(
            scan_kernel, (cdiv(bins, _SCAN_BINS),), counts, totals, chunks,
            BINS=bins, WIDTH=_SCAN_BINS, CHUNKS=_SCAN_CHUNKS, num_warps=4,
        )  # fmt: skip
    launch(
        place_kernel,
        (max(chunks, min(_MAP_PROGRAMS, cdiv(tiles, at_once))),),
        topk_ids,
        expert_map,
        counts,
        totals,
        *result,
        slots,
        chunks,
        experts,
        global_experts,
        tiles,
        TOP_K=top_k,
        BLOCK_M=block_m,
        ALL_SLOTS=0 if counts is not None else max(step, next_power_of_2(slots)),
        TILES=at_once,
        PDL=arch_of(topk_ids.device) >= 90,
        **shared,
    )
    return result
