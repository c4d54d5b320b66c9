"""How gemm_large's blocks help each other with the last wave's tiles: the device's own functions, run on the host."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported, for the tests beside this one

import itertools
from types import SimpleNamespace

import pytest
import torch

from nvfp4_kernels.triton import hopper


@pytest.mark.parametrize("blocks", [7, 132])
def test_helped_tiles(monkeypatch: pytest.MonkeyPatch, blocks: int) -> None:
    """Every stage is multiplied once, and a tile's block knows how many parts there are, and where."""
    gl = SimpleNamespace(where=torch.where, constexpr=int, num_programs=lambda axis: torch.tensor(blocks))
    gl.minimum = lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b))
    gl.maximum = lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b))
    monkeypatch.setattr(hopper, "gl", gl)
    inner = ("_helpers", "_lent_to", "_helped_tile", "tile_of")
    for name in (*inner, "helped_share_of", "helped_units", "lent_part", "lent_parts"):
        monkeypatch.setattr(hopper, name, getattr(hopper, name).fn)
    for tiles, stages, lent in itertools.product((1, 2, 5, 6, 13, 80, 131, 133, 192, 213), (2, 5, 16, 57), (1, 2, 5, 20)):
        rest = tiles % blocks
        if not rest or lent >= stages or rest * lent < blocks - rest:
            continue
        whole, helpers = tiles - rest, blocks - rest
        seen: set[tuple[int, int]] = set()  # (tile, stage)
        places: dict[int, set[int]] = {}  # of the sums of a tile's parts
        for block in range(blocks):
            gl.program_id = lambda axis, block=block: torch.tensor(block)
            for unit in range(block, int(hopper.helped_units(whole, lent, tiles)), blocks):
                n, m, first, count = map(int, hopper.helped_share_of(torch.tensor(unit), whole, lent, stages, tiles, 1, 8))
                assert m == 0
                assert count > 0
                assert first + count <= stages
                found = {(n, stage) for stage in range(first, first + count)}
                assert not found & seen
                seen |= found
                if unit >= whole and block < helpers:
                    tile, place = map(int, hopper.lent_part(torch.tensor(unit), whole, lent, tiles))
                    assert first >= stages - lent
                    assert tile == n - whole
                    assert 0 <= place < blocks
                    assert place not in {p for others in places.values() for p in others}
                    places.setdefault(tile, set()).add(place)
                else:
                    assert first == 0
        assert len(seen) == tiles * stages
        for block in range(helpers, blocks):
            gl.program_id = lambda axis, block=block: torch.tensor(block)
            tile, place, parts = map(int, hopper.lent_parts(lent, whole, tiles))
            assert tile == block - helpers
            assert places[tile] == set(range(place, place + parts))
