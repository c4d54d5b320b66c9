"""Twin of the routing metadata: where every (token, slot) pair goes in the permuted order, and which expert owns a tile."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Routing(NamedTuple):
    """Slots sorted by expert, stably, each expert's rows padded to whole tiles of `block_m` rows. All int32.

    expanded_idx_to_permuted_idx: [tokens, top_k], the permuted row of each slot, -1 where no local expert serves it.
    permuted_idx_to_token: [tiles * block_m], the token of each permuted row, -1 for padding.
    expert_offsets: [experts + 1], the first permuted row of each expert, then the end of the last one.
    tile_to_expert: [tiles], the expert of each tile of `block_m` rows, -1 for tiles beyond the last expert.
    """

    expanded_idx_to_permuted_idx: torch.Tensor
    permuted_idx_to_token: torch.Tensor
    expert_offsets: torch.Tensor
    tile_to_expert: torch.Tensor


def max_tiles(slots: int, experts: int, block_m: int) -> int:
    """The most tiles that `slots` slots over `experts` experts can fill: known without reading the routing back."""
    return (slots + min(experts, slots) * (block_m - 1)) // block_m


def local_experts(topk_ids: torch.Tensor, experts: int, expert_map: torch.Tensor | None) -> torch.Tensor:
    """topk_ids as local experts, int64; -1 where the id names no expert, or is mapped to no local one."""
    ids = topk_ids.long()
    if expert_map is not None:
        known = (ids >= 0) & (ids < expert_map.numel())
        ids = torch.where(known, expert_map.long()[torch.where(known, ids, 0)], -1)
    return torch.where((ids >= 0) & (ids < experts), ids, -1)


def route(topk_ids: torch.Tensor, experts: int, block_m: int, expert_map: torch.Tensor | None = None) -> Routing:
    """Routing metadata of integer topk_ids [tokens, top_k] over `experts` local experts."""
    tokens, top_k = topk_ids.shape
    device = topk_ids.device
    ids = local_experts(topk_ids, experts, expert_map).flatten()
    tiles = max_tiles(ids.numel(), experts, block_m)
    present = (ids >= 0).nonzero().squeeze(-1)
    order = present[torch.argsort(ids[present], stable=True)]
    owners = ids[order]
    counts = torch.bincount(owners, minlength=experts)
    expert_tiles = (counts + block_m - 1) // block_m
    offsets = torch.zeros(experts + 1, dtype=torch.int64, device=device)
    offsets[1:] = (expert_tiles * block_m).cumsum(0)
    rank = torch.arange(len(order), device=device) - (counts.cumsum(0) - counts)[owners]
    rows = offsets[owners] + rank
    expanded = torch.full((tokens * top_k,), -1, dtype=torch.int32, device=device)
    expanded[order] = rows.to(torch.int32)
    token = torch.full((tiles * block_m,), -1, dtype=torch.int32, device=device)
    token[rows] = (order // top_k).to(torch.int32)
    tile_to_expert = torch.full((tiles,), -1, dtype=torch.int32, device=device)
    filled = torch.arange(experts, dtype=torch.int32, device=device).repeat_interleave(expert_tiles)
    tile_to_expert[: len(filled)] = filled
    return Routing(expanded.view(tokens, top_k), token, offsets.to(torch.int32), tile_to_expert)
