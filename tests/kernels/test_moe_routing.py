"""Routing metadata: the twin by its properties, the kernels (under Triton's interpreter) by equality with the twin."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvfp4_kernels.reference import moe_routing as reference
from nvfp4_kernels.reference.moe_routing import Routing
from nvfp4_kernels.triton import moe_routing as kernels


@st.composite
def routings(draw: st.DrawFn) -> tuple[torch.Tensor, int, int, torch.Tensor | None]:
    """(topk_ids, experts, block_m, expert_map): from no token to a few hundred, evenly spread or all on a few experts."""
    experts = draw(st.sampled_from([1, 2, 5, 16, 60, 128]))
    tokens = draw(st.integers(0, 40))
    top_k = draw(st.integers(1, 16))
    block_m = draw(st.sampled_from([8, 16, 64]))
    mapped = draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    everywhere = 2 * experts if mapped else experts
    few = draw(st.integers(1, everywhere))
    ids = torch.randint(-1 if draw(st.booleans()) else 0, few, (tokens, top_k), generator=generator)
    expert_map = None
    if mapped:
        expert_map = torch.full((everywhere,), -1, dtype=torch.int32)
        expert_map[torch.randperm(everywhere, generator=generator)[:experts]] = torch.arange(experts, dtype=torch.int32)
    return ids.to(draw(st.sampled_from([torch.int32, torch.int64]))), experts, block_m, expert_map


def check_properties(routing: Routing, ids: torch.Tensor, experts: int, block_m: int, expert_map: torch.Tensor | None) -> None:
    """What a grouped GEMM relies on, slot by slot in plain Python."""
    tokens, top_k = ids.shape
    expanded = routing.expanded_idx_to_permuted_idx.flatten().tolist()
    token_of = routing.permuted_idx_to_token.tolist()
    tile_to_expert = routing.tile_to_expert.tolist()
    offsets = routing.expert_offsets.tolist()
    assert all(t.dtype == torch.int32 for t in routing)
    assert routing.expanded_idx_to_permuted_idx.shape == (tokens, top_k)
    assert len(token_of) == len(tile_to_expert) * block_m
    assert offsets[0] == 0
    assert len(offsets) == experts + 1
    last_row: dict[int, int] = {}
    counts = [0] * experts
    for slot, expert in enumerate(ids.flatten().tolist()):
        if expert >= 0 and expert_map is not None:
            expert = int(expert_map[expert])
        row = expanded[slot]
        if expert < 0:
            assert row == -1
            continue
        counts[expert] += 1
        assert token_of[row] == slot // top_k
        assert tile_to_expert[row // block_m] == expert
        assert offsets[expert] <= row < offsets[expert + 1]
        assert row == last_row.get(expert, offsets[expert] - 1) + 1  # in order, without holes
        last_row[expert] = row
    for expert, count in enumerate(counts):
        assert offsets[expert + 1] - offsets[expert] == -(-count // block_m) * block_m
    rows = [row for row in expanded if row >= 0]
    assert len(set(rows)) == len(rows)
    assert sum(token >= 0 for token in token_of) == len(rows)  # all else is padding
    used = offsets[-1] // block_m
    assert all(expert >= 0 for expert in tile_to_expert[:used])
    assert all(expert == -1 for expert in tile_to_expert[used:])


@settings(max_examples=150, deadline=None)
@given(routings())
def test_twin_is_a_padded_permutation(case):
    ids, experts, block_m, expert_map = case
    check_properties(reference.route(ids, experts, block_m, expert_map), *case)


@settings(max_examples=60, deadline=None)
@given(routings())
def test_kernels_equal_the_twin(case):
    for got, want in zip(kernels.route(*case), reference.route(*case), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(600, 2, 8), (150, 9, 128), (2100, 1, 3)])
def test_two_launches_equal_the_twin(tokens, top_k, experts):
    assert tokens * top_k > kernels._ONE_LAUNCH
    ids = torch.randint(-1, experts, (tokens, top_k), dtype=torch.int32)
    for got, want in zip(kernels.route(ids, experts, 16), reference.route(ids, experts, 16), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(600, 2, 8), (150, 9, 128), (2100, 1, 3)])
def test_three_launches_equal_the_twin(tokens, top_k, experts, monkeypatch):
    monkeypatch.setattr(kernels, "_MAX_CHUNKS", 4)
    monkeypatch.setattr(kernels, "_SCAN_CHUNKS", 8)
    test_two_launches_equal_the_twin(tokens, top_k, experts)


def test_so_many_slots_that_there_are_three_launches():
    assert 129 * kernels._STEP > kernels._MAX_CHUNKS * kernels._STEP
    test_two_launches_equal_the_twin(129 * kernels._STEP - 5, 1, 40)


def test_a_hand_worked_case():
    routing = reference.route(torch.tensor([[2, 0], [2, -1], [0, 2]]), 3, 4)
    assert routing.expanded_idx_to_permuted_idx.tolist() == [[4, 0], [5, -1], [1, 6]]
    assert routing.expert_offsets.tolist() == [0, 4, 4, 8]
    assert routing.tile_to_expert.tolist() == [0, 2, -1]
    assert routing.permuted_idx_to_token.tolist() == [0, 2, -1, -1, 0, 1, 2, -1, -1, -1, -1, -1]


@pytest.mark.parametrize(("slots", "experts", "block_m"), [(0, 8, 16), (1, 8, 16), (7, 3, 4), (100, 8, 16), (64, 512, 16)])
def test_max_tiles_is_the_worst_case(slots, experts, block_m):
    # The most tiles: one slot on every expert that can have one, the rest filling tiles of one expert and one more slot.
    hit = min(slots, experts)
    worst = hit + max(0, (slots - hit) // block_m) if hit else 0
    ids = torch.cat([torch.arange(hit), torch.zeros(slots - hit, dtype=torch.long)])[:, None]
    filled = int((reference.route(ids, experts, block_m).tile_to_expert >= 0).sum())
    assert filled <= reference.max_tiles(slots, experts, block_m) == worst
    assert filled == worst
