"""The dense layer on a GPU: one entry that makes the activations ready, picks a GEMM and its tile, and launches it.

Seven GEMMs serve it:

- "few": Hopper, up to 8 rows of 16-bit values; bound by the bytes of the weights (gemm_few.py).
- "decode": Hopper, tens of rows, and hundreds of small layers; likewise bound (gemm_decode.py).
- "medium": Hopper, hundreds of rows; weights decoded in registers beside the products (gemm_medium.py).
- "large": Hopper, many rows; likewise, in larger tiles (gemm_large.py).
- "widen": fp8_per_token with very many rows; weights widened to e4m3 in a scratch, then the FP8 GEMM of cuBLAS (widen.py).
- "dot_scaled": Blackwell's FP4 tensor cores (gemm_dot_scaled.py).
- "portable": everything else (gemm_portable.py).

`plan` chooses. Tables of measured choices by device name lie in ../tables (`nvfp4 bench linear --tune` writes them);
what no table holds goes by a rule of thumb.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..devices import cuda_device, hopper_problem
from ..formats import SfLayout, align_scale_rows
from ..reference.linear import INVERSE_BASE
from ..reference.source import PLAIN, Source
from ..replay import asked
from . import gemm_portable
from .activation import decode, operand_rows, permute, quantize_fp8, sourced
from .launch import cdiv, launch, next_power_of_2, scale_stride
from .quantize import quantize
from .widen import widen_fp8
from .workspace import split_k

_TABLES = Path(__file__).parent.parent / "tables"
_FALLBACK = "NVIDIA H100 80GB HBM3"
_LOG = logging.getLogger(__name__)
_TILE_N = 128
_FEW_ROWS = 8  # of gemm_few's tile
K_STEP = 256
_CHUNK = 128  # values of K that gemm_large's copies are made of

# Microseconds on an H100, by the GEMM, the tokens of its tile and whether it multiplies e4m3: a step of 256 values of K, a unit
# of work beside its steps, adding up the parts of a tile, and each part. A fit to 356 times of seven layers, M from 128 to
# 1024, 7 % off in the mean; what it names first is the fastest of these plans, or up to 4 % slower.
_COSTS = {
    ("medium", 128, True): (1.03, 1.1, 4.7, 0.75),
    ("large", 256, True): (1.57, 2.2, 6.1, 1.03),
    ("medium", 128, False): (1.67, 0.96, 4.3, 1.04),
    ("large", 256, False): (2.72, 3.0, 3.0, 1.9),
}
# The same for tiles that are helped (`_lent_stages`), whatever they lend: an H200, 41 cases, one to five helpers a tile. What
# is named first takes 0.1 % longer than the better plan in the mean.
_HELP_COST = 13.0
_MOST_HELPERS = 8  # of a tile; with 15, on an H200, ordinary shares were faster
# The same of gemm_decode in several tiles, by their tokens and whether it multiplies e4m3; blocks beside each other on a
# processor take as long as one by one. A fit to 46 shapes, of tiles of 128 tokens to 12.
_DECODE_COSTS = {
    (64, True): (0.4, 2.0, 1.2, 0.3),
    (64, False): (0.65, 1.9, 0.9, 0.48),
    (128, True): (0.52, 4.3, 0.9, 0.65),
    (128, False): (0.95, 3.4, 0.9, 0.9),
}
_LONG_K = 40  # steps; from 50 on tiles of 128 tokens fell 3 to 11 % behind gemm_medium's and gemm_large's wherever compared
# By the same and how many blocks lie beside each other: groups, stages, resident.
_DECODE_BESIDE = {
    (64, True, 1): (2, 3, 1),
    (64, True, 2): (1, 3, 2),
    (64, True, 3): (1, 2, 3),
    (64, False, 1): (2, 2, 1),
    (64, False, 2): (1, 2, 2),
    (128, True, 1): (2, 2, 1),
    (128, False, 1): (1, 2, 1),
}


class _DecodeTile(NamedTuple):
    """Of gemm_decode: warps of a group, groups, stages of a ring, resident blocks; and when it serves."""

    warps: int
    groups: int
    stages: int
    resident: int
    least: float  # share of these blocks that has to have work
    steps: int = 1 << 30  # over K, at the most
    shares: int = 1 << 30  # of K, at the most


# By (tokens of a tile, e4m3), the first that serves: what 46 shapes were fastest with, or nearly so, on an H100.
_DECODE_TILES = {
    (8, True): (_DecodeTile(4, 1, 4, 4, 0.86), _DecodeTile(4, 2, 2, 2, 0.75), _DecodeTile(4, 1, 4, 4, 0)),
    (8, False): (_DecodeTile(4, 2, 2, 2, 0.75), _DecodeTile(4, 1, 4, 4, 0)),
    # The first leaves room for the blocks of the next kernels, which start, and load their weights, before this one ends.
    (16, True): (_DecodeTile(4, 2, 3, 1, 0.7, shares=1), _DecodeTile(4, 2, 2, 2, 0.75), _DecodeTile(4, 1, 4, 4, 0)),
    (16, False): (_DecodeTile(4, 1, 3, 4, 0.86), _DecodeTile(4, 2, 2, 2, 0.75), _DecodeTile(4, 1, 3, 4, 0)),
    (32, True): (
        _DecodeTile(4, 2, 3, 1, 0.6, steps=20),
        _DecodeTile(4, 2, 3, 1, 0.7),
        _DecodeTile(4, 2, 2, 2, 0.75),
        _DecodeTile(4, 1, 4, 3, 0.7),
        _DecodeTile(4, 1, 2, 4, 0.75),
        _DecodeTile(4, 2, 2, 2, 0),
        _DecodeTile(4, 1, 4, 3, 0),
    ),
    (32, False): (
        _DecodeTile(4, 2, 3, 1, 0.7),
        _DecodeTile(4, 1, 3, 2, 0.75),
        _DecodeTile(4, 1, 2, 3, 0.7),
        _DecodeTile(4, 1, 3, 2, 0),
    ),
    (64, True): (
        _DecodeTile(4, 2, 2, 1, 0.3, steps=12),
        _DecodeTile(4, 2, 3, 1, 0.45, steps=20),
        _DecodeTile(4, 2, 3, 1, 0.7),
        _DecodeTile(4, 1, 3, 2, 0.5),
        _DecodeTile(4, 1, 2, 3, 0.7),
        _DecodeTile(4, 1, 2, 4, 0.75),
        _DecodeTile(4, 2, 3, 1, 0),
        _DecodeTile(4, 1, 3, 2, 0),
    ),
    (64, False): (
        _DecodeTile(4, 2, 2, 1, 0.45, steps=12),
        _DecodeTile(4, 2, 2, 1, 0.7),
        _DecodeTile(4, 1, 2, 2, 0.75),
        _DecodeTile(4, 2, 2, 1, 0.45),
        _DecodeTile(8, 1, 2, 2, 0),
    ),
}
# The parameters of Hopper's GEMMs.
_PARAMETERS: dict[str, set[str]] = {
    "few": {"warps", "apart"},
    "decode": {"bm", "warps", "groups", "stages", "resident", "split"},
    "medium": {"bm", "weight_stages", "x_stages", "group", "split"},
    "large": {"bm", "weight_stages", "group", "split"},
    "widen": set(),
}


@dataclass(frozen=True)
class Plan:
    """A GEMM, its parameters, and why it was chosen."""

    kernel: str
    parameters: dict[str, int] = field(default_factory=dict)
    reason: str = ""

    @property
    def variant(self) -> tuple[Any, ...]:
        """What a kernel is compiled for: not the number of shares that K is divided into, but whether and how it is."""
        return (self.kernel, *((key, min(value, 2) if key == "split" else value) for key, value in self.parameters.items()))


# ---------------------------------------------------------------------------------------------------------------------
# Choosing


def user_table_path(name: str) -> Path:
    """Where `nvfp4 bench linear --tune` stores what it measured on a device of this name."""
    cache = os.environ.get("NVFP4_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "nvfp4")
    return Path(cache) / "linear" / f"{name.replace(' ', '_')}.json"


def shipped_table_path(name: str) -> Path:
    """Where this package keeps its table for a device of this name."""
    return _TABLES / f"{name.replace(' ', '_')}.json"


@functools.cache
def _table(name: str) -> dict[str, Any]:
    """The tuning table for a Hopper GPU: {mode: {"NxK": {"M": (entry, where it was measured)}}, "auto": {"NxK": M}}.

    What the user measured goes before what is shipped for the device, and that before the H100's numbers: other Hoppers have
    the same processors.
    """
    merged: dict[str, Any] = {}
    shipped = dict.fromkeys((_FALLBACK, name))  # an H100's own comes once
    for path, origin in (*((shipped_table_path(origin), origin) for origin in shipped), (user_table_path(name), name)):
        if path.is_file():
            for mode, shapes in json.loads(path.read_text())["linear"].items():
                known = merged.setdefault(mode, {})
                if mode == "auto":
                    known.update(shapes)
                else:
                    for shape, rows in _current(shapes, path).items():
                        known.setdefault(shape, {}).update({m: (entry, origin) for m, entry in rows.items()})
    return merged


def _current(shapes: dict[str, Any], path: Path) -> dict[str, Any]:
    """The shapes whose kernels all have the parameters that they have today; tables of other versions hold others."""
    kept = {
        shape: rows
        for shape, rows in shapes.items()
        if all(plan.keys() - {"kernel"} == _PARAMETERS.get(plan["kernel"]) for plan in rows.values())
    }
    if len(kept) < len(shapes):
        _LOG.warning(
            "%s: %s are of another version and not used; measure them again with nvfp4 bench linear --tune",
            path,
            ", ".join(shapes.keys() - kept.keys()),
        )
    return kept


def _measured(device: torch.device, mode: str, m: int, n: int, k: int) -> Plan | None:
    """What a table says: the entry of the first M there that is no smaller than m, or the last.

    Up to 128 rows it serves more than half of its own, from there on those that fill as many tiles.
    """
    name, _, processors = cuda_device(device.index or 0)
    entries = _table(name).get("none" if mode.startswith("nvfp4") else mode, {}).get(f"{n}x{k}")
    if not entries:
        return None
    rows = sorted(map(int, entries))
    at = next((row for row in rows if row >= m), rows[-1])
    if at >= 2 * m or (at > max(m, 128) and cdiv(at, 64) > cdiv(m, 64)):
        return None
    entry, origin = entries[str(at)]
    if entry["kernel"] == "few" and m > _FEW_ROWS:
        return None
    parameters = dict(entry)
    kernel = parameters.pop("kernel")
    if kernel in ("medium", "large"):
        # What is launched for these rows, as `variant` shall say what is compiled.
        split, lent = _shares(kernel, parameters, m, n, k, mode == "fp8_per_token", processors)
        parameters["split"] = 0 if lent else split
    return Plan(kernel, parameters, f"measured on {origin} for {n} x {k} at M = {at}")


def stages_of(k: int) -> int:
    """Steps of the Hopper GEMMs over K; the last may go past its end, where bulk copies bring zeros."""
    return cdiv(k, K_STEP)


def _rows_of_few(n: int, k: int) -> int:
    """Up to how many rows gemm_few is the fastest: the others' pass over x and shares of K cost small layers too much."""
    return _FEW_ROWS if k <= 4096 and n * k <= 8192 * 4096 else 4


def _rule_few(m: int, n: int, k: int, processors: int) -> Plan:
    blocks = cdiv(n, 16)
    if blocks * 2 >= processors * 8 and 1 <= stages_of(k) % 8 <= 4:
        warps = 2  # four would leave half of their last turn over K empty
    elif blocks <= processors and 8 < stages_of(k) <= 16:
        warps = 8  # one turn
    else:
        warps = 4 if blocks * 4 >= processors * 9 or k <= 5120 else 8
    apart = m > (4 if warps == 2 else 2)
    return Plan("few", {"warps": warps, "apart": int(apart)}, "a few rows are bound by the weights' bytes")


def rows_of_decode_tiles(m: int) -> tuple[int, ...]:
    """Tokens that the tiles of gemm_decode may have for m of them."""
    return (64, 128) if m > 64 else (max(8, next_power_of_2(m)),)


def most_shares(k: int) -> int:
    """Among how many blocks K may be shared: parts of less than two stages cost more to add up than they gain."""
    return max(1, min(stages_of(k) // 2, 16))


def _rule_decode(m: int, n: int, k: int, fp8: bool, processors: int) -> Plan:
    (bm,) = rows_of_decode_tiles(m)
    for tile in _DECODE_TILES[bm, fp8]:
        tiles = cdiv(n, 16 * tile.warps) * cdiv(m, bm)
        blocks = processors * tile.resident
        # As many shares of K as keep all blocks busy at once.
        split = min(blocks // tiles, most_shares(k) // tile.groups, tile.shares)
        if tile.groups <= stages_of(k) <= tile.steps and split * tiles >= tile.least * blocks:
            break
    split = max(1, split)
    ring = tile.stages
    if bm <= 16 and tile.groups == 1 and stages_of(k) <= 8 * split:
        ring = 2  # what a longer one has on its way holds up x, which a short share does not get over
    return Plan(
        "decode",
        {"bm": bm, "warps": tile.warps, "groups": tile.groups, "stages": ring, "resident": tile.resident, "split": split},
        "tens of rows are bound by the weights' bytes",
    )


def _lent_stages(tiles: int, stages: int, fp8: bool, processors: int) -> int:
    """How many of its stages each tile of the last wave lends to the processors that have none: gemm_large's split of 0.

    All would have equally many, but each part costs a helper its sums: a tile keeps one stage more, in e4m3 two. 0 where not
    every helper would get one, or a tile too many helpers.
    """
    rest = tiles % processors
    helpers = processors - rest
    lent = stages - cdiv(rest * stages, processors) - (2 if fp8 else 1)
    return lent if helpers <= rest * min(lent, _MOST_HELPERS) else 0


def _shares(kernel: str, tile: dict[str, int], m: int, n: int, k: int, fp8: bool, processors: int) -> tuple[int, int]:
    """(shares of K, stages lent) of gemm_medium's or gemm_large's tiles of the last wave: what a plan's split comes to here."""
    tiles, stages, split = cdiv(n, _TILE_N) * cdiv(m, tile["bm"]), stages_of(k), tile["split"]
    rest = tiles % processors
    lent = _lent_stages(tiles, stages, fp8, processors) if kernel == "large" and split == 0 else 0
    return max(1, min(split, stages, processors // rest)) if rest else 1, lent


def tiled_plans(m: int, n: int, k: int, fp8: bool, processors: int) -> list[Plan]:
    """What serves x [m, k] and a weight [n, k] in several tiles of tokens, the fastest first by a fit to measurements."""
    stages = stages_of(k)
    found = _tiles_of_decode(m, n, k, fp8, processors)
    for (kernel, bm, e4m3), (step, unit, add, part) in _COSTS.items():
        if e4m3 != fp8 or (kernel == "large" and k % _CHUNK):
            continue
        waves, rest = divmod(cdiv(n, _TILE_N) * cdiv(m, bm), processors)
        us = waves * (stages * step + unit)
        _, lent = _shares(kernel, {"bm": bm, "split": 0}, m, n, k, fp8, processors)
        # As many shares of a tile as let the last wave's tiles run all at once, or fewer; or 0, where they are helped.
        most = min(stages // 2, processors // rest, 12) if rest else 1
        for split in range(0 if lent else 1, max(most, 1) + 1):
            if split:
                share, sums = cdiv(stages, split), add + split * part if split > 1 else 0.0
            else:
                share, sums = stages - lent, _HELP_COST
            tail = share * step + unit if rest else 0.0
            tile = {"bm": bm, "weight_stages": 3, "group": 8, "split": split}
            if kernel == "medium":
                tile["x_stages"] = 6 if fp8 else 8
            found.append((us + tail + sums, kernel, tile))
    found.sort(key=lambda one: one[0])
    return [Plan(kernel, tile, "weights decoded in registers beside the products") for _, kernel, tile in found]


def _tiles_of_decode(m: int, n: int, k: int, fp8: bool, processors: int) -> list[tuple[float, str, dict[str, int]]]:
    """(microseconds, "decode", tile) where the tiles are so few that all their blocks run at once."""
    stages = stages_of(k)
    found = []
    for bm in rows_of_decode_tiles(m):
        tiles = cdiv(n, 64) * cdiv(m, bm)
        beside = cdiv(tiles, processors)
        if (bm, fp8, beside) not in _DECODE_BESIDE or stages == 1 or (bm == 128 and stages > _LONG_K):
            continue
        groups, ring, resident = _DECODE_BESIDE[bm, fp8, beside]
        step, unit, add, part = _DECODE_COSTS[bm, fp8]
        for split in range(1, max(1, min(processors // tiles, most_shares(k) // groups, 4)) + 1):
            share = cdiv(stages, split)
            us = beside * share * step + unit + (add + split * part if split > 1 else 0.0)
            tile = {"bm": bm, "warps": 4, "groups": groups, "stages": ring, "resident": resident, "split": split}
            if groups == 2 and share <= 12:
                tile["stages"] = 2
            found.append((us, "decode", tile))
    return found


@functools.lru_cache(4096)
def plan(device: torch.device, mode: str, m: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> Plan:
    """The GEMM for x [m, k] in `dtype` under an activation mode (not "auto") and a weight [n, k] on `device`."""
    _, arch, processors = cuda_device(device.index or 0)
    if arch >= 100:
        from .gemm_dot_scaled import problem

        why = problem(mode, n, k)
        return Plan("portable", {}, why) if why else Plan("dot_scaled", {}, f"SM{arch} has FP4 tensor cores")
    if arch != 90:
        return Plan("portable", {}, f"SM{arch} has no wgmma")
    why = hopper_problem(k)
    if why:
        return Plan("portable", {}, why)
    measured = _measured(device, mode, m, n, k)
    if measured is not None and (measured.kernel != "widen" or _widen_serves(n, dtype)):
        return measured
    if m <= _rows_of_few(n, k) and mode != "fp8_per_token":
        return _rule_few(m, n, k, processors)
    fp8 = mode == "fp8_per_token"
    if m <= 64:
        return _rule_decode(m, n, k, fp8, processors)
    if fp8 and m > (1536 if k % _CHUNK else 3072) and _widen_serves(n, dtype):
        return Plan("widen", {}, "so many rows pay for a pass over the weights")
    return tiled_plans(m, n, k, fp8, processors)[0]


def _widen_serves(n: int, dtype: torch.dtype) -> bool:
    return n % 16 == 0 and dtype == torch.bfloat16  # torch._scaled_mm with row-wise scales


def faster_mode(device: torch.device, m: int, n: int, k: int) -> str:
    """What "auto" stands for on Ada and Hopper at this shape: "fp8_per_token" or "none"."""
    name, arch, _ = cuda_device(device.index or 0)
    if arch != 90 or hopper_problem(k):
        return "none"
    first = _table(name).get("auto", {}).get(f"{n}x{k}")
    return "fp8_per_token" if m >= (_rows_of_few(n, k) + 1 if first is None else first) else "none"


def describe(mode: str, device: torch.device) -> tuple[str, str]:
    """(kernel, reason) for `nvfp4 doctor`: what serves a mode at 4096 x 4096, for one row and for many."""
    parts = []
    for m in (1, 256, 4096):
        resolved = mode
        if mode == "auto":
            from ..dispatch import resolve_activation

            resolved = resolve_activation(mode, device, m, 4096, 4096)
        chosen = plan(device, resolved, m, 4096, 4096)
        parts.append((chosen.kernel, f"M={m}: {f'{resolved}, ' if mode == 'auto' else ''}{chosen.reason}"))
    return "triton " + "/".join(dict.fromkeys(kernel for kernel, _ in parts)), "; ".join(reason for _, reason in parts)


# ---------------------------------------------------------------------------------------------------------------------
# Running


def _launch_few(
    options: dict[str, int],
    x: torch.Tensor,
    data: torch.Tensor,
    scales: torch.Tensor,
    row_scale: torch.Tensor,
    out: torch.Tensor,
    token_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> None:
    from .gemm_few import gemm_few

    m, k = x.shape
    n = data.shape[0]
    tail = k % K_STEP > 0
    apart = tail or options["apart"] > 0  # else ptxas puts the loads of a K with a tail where they are used
    if tail:
        scales = scales.as_strided((n, stages_of(k) * 16), scales.stride())  # with what lies behind K
    scales = scales.view(torch.int16 if apart else torch.int32)
    launch(
        gemm_few, (cdiv(n, 16),),
        data.view(torch.int32), scales, x, out, row_scale, token_scale, bias,
        n, m, stages_of(k), k // 32, scales.stride(0), x.stride(0),
        scale_stride(row_scale), scale_stride(token_scale),
        KW=options["warps"], APART=apart, TAIL=tail, TOKEN=token_scale is not None, BIAS=bias is not None,
        num_warps=options["warps"], launch_pdl=True,
    )  # fmt: skip


def _launch_wgmma(
    chosen: Plan,
    x: torch.Tensor,
    data: torch.Tensor,
    scales: torch.Tensor,
    row_scale: torch.Tensor,
    out: torch.Tensor,
    fold: torch.Tensor | None,
    token_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> None:
    """Launch "decode", "medium" or "large" on the operand x, K in the permuted order, rows as `operand_rows` says."""
    from .descriptors import chunked, descriptor

    m, k = x.shape
    n = data.shape[0]
    rows = (operand_rows(m), k)
    _, _, processors = cuda_device(x.device.index or 0)
    options = chosen.parameters
    bm = options["bm"]
    few = chosen.kernel == "decode"
    bn = 16 * options["warps"] if few else _TILE_N
    tiles = cdiv(n, bn) * cdiv(m, bm)
    stages = k // K_STEP
    split, lent = (options["split"], 0) if few else _shares(chosen.kernel, options, m, n, k, fold is not None, processors)
    reduce = 2 if lent else int(split > 1)
    # Of large tiles whole waves first: those of the last, partial wave alone share their K, or lend of it. Blocks that share a
    # tile (split > 1) wait for each other, so none has two units of these.
    whole = 0 if few else tiles - (tiles % processors if reduce else 0)
    shares = processors if lent else (tiles - whole) * split
    count = (1 if few else 4) * (tiles - whole)  # of the large tiles, two for each half of the features
    partial, counters = split_k(x.device, shares * bn * bm, count) if reduce else (None, None)
    if few:
        from .gemm_decode import gemm_decode
        from .hopper import burst_of

        groups = options["groups"]
        registers = min(255, 65536 // (32 * options["warps"] * groups * options["resident"]) // 8 * 8)
        launch(
            gemm_decode, (min(tiles * split, processors * options["resident"]),),
            descriptor(data, (bn, 32), torch.int32), descriptor(scales, (bn, 8), torch.int16),
            descriptor(x, (bm, K_STEP), shape=rows),
            out, fold, row_scale, token_scale, bias, partial, counters, n, m, stages, split,
            scale_stride(row_scale), scale_stride(token_scale),
            BM=bm, WARPS=options["warps"], GROUPS=groups, REGISTERS=registers,
            STAGES=options["stages"], BURST=burst_of(options["stages"]),
            TOKEN=token_scale is not None, BIAS=bias is not None, REDUCE=split > 1,
            num_warps=options["warps"], maxnreg=registers, launch_pdl=True,
        )  # fmt: skip
        return
    from .gemm_large import gemm_large
    from .gemm_medium import gemm_medium

    bulk = n % 8 == 0
    common = (
        descriptor(x, (bm, 128 // x.element_size()), shape=rows), descriptor(out, (bm // 8, 64)) if bulk else None, out,
        fold, row_scale, token_scale, bias, partial, counters, n, m, stages, whole, lent or split,
        scale_stride(row_scale), scale_stride(token_scale),
    )  # fmt: skip
    constants = {
        "BM": bm, "WEIGHT_STAGES": options["weight_stages"], "GROUP": options["group"], "TOKEN": token_scale is not None,
        "BIAS": bias is not None, "REDUCE": reduce, "BULK_STORE": bulk, "num_warps": 4, "launch_pdl": True,
    }  # fmt: skip
    grid = (min(processors, whole + shares if reduce else tiles),)
    if chosen.kernel == "medium":
        constants["X_STAGES"] = options["x_stages"]
        words, pairs = descriptor(data, (bn, 16), torch.int32), descriptor(scales, (bn, 8), torch.int16)
        launch(gemm_medium, grid, words, pairs, *common, **constants)
    else:
        words, pairs = chunked(data, (2, bn // 2, 16), torch.int32), descriptor(scales, (bn // 2, 8), torch.int16)
        launch(gemm_large, grid, words, pairs, *common, **constants)


def linear(
    x: torch.Tensor,
    data: torch.Tensor,
    scales: torch.Tensor,
    row_scale: torch.Tensor,
    *,
    activation: str,
    fp8_fold: torch.Tensor | None = None,
    input_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    source: Source = PLAIN,
) -> torch.Tensor:
    """x [M, K] fp16 or bf16 @ weight^T [K, N] -> [M, N] in x's dtype; as `reference.linear.linear`.

    Captures into CUDA graphs and never waits for the device. Raises TypeError for another dtype of x.
    """
    check_dtype(x)
    m, k = x.shape[0], data.shape[1] * 2
    n = data.shape[0]
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if not m or not n:
        return out
    x = _aligned(x)
    if source.residual is not None:
        source = replace(source, residual=_aligned(source.residual))
    data = data.contiguous()
    chosen = plan(x.device, activation, m, n, k, x.dtype)
    if chosen.kernel == "widen" and bias is not None and bias.dtype != x.dtype:
        # cuBLAS adds a bias of the output's dtype alone.
        chosen = tiled_plans(m, n, k, True, cuda_device(x.device.index or 0)[2])[0]
    return run(chosen, x, data, scales, row_scale, out, activation, fp8_fold, input_scale, bias, source)


def check_dtype(x: torch.Tensor) -> None:
    """TypeError unless x is of a type that the GPU's dense layers take."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"x: got {x.dtype} on {x.device}, allowed on a GPU are float16 and bfloat16")


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x [M, K] with rows that 16-byte accesses can read."""
    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        return x.clone(memory_format=torch.contiguous_format)
    return x


def run(
    chosen: Plan,
    x: torch.Tensor,
    data: torch.Tensor,
    scales: torch.Tensor,
    row_scale: torch.Tensor,
    out: torch.Tensor,
    activation: str,
    fp8_fold: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    source: Source = PLAIN,
) -> torch.Tensor:
    """`linear` by a given plan, into out."""
    wgmma = chosen.kernel in ("decode", "medium", "large")
    scales = align_scale_rows(scales) if chosen.kernel in _PARAMETERS else scales.contiguous()
    token_scale: torch.Tensor | None = None
    fold: torch.Tensor | None = None
    if activation != "fp8_per_token":
        x, source = sourced(x, source, data.shape[1] * 2), PLAIN
    operand = x
    if chosen.kernel == "dot_scaled":
        from .gemm_dot_scaled import run as run_dot_scaled

        return run_dot_scaled(quantize_nvfp4(x, activation, input_scale), data, scales, row_scale, out, bias)
    if activation == "fp8_per_token":
        assert fp8_fold is not None  # ops.py derives it
        fold = fp8_fold
        operand, token_scale = quantize_fp8(x, "fp8" if wgmma else "natural", source)
    elif activation != "none":
        codes, sf, token_scale = quantize_nvfp4(x, activation, input_scale)
        operand = decode(codes, sf, x.dtype, "16" if wgmma else "natural")
    elif wgmma:
        operand = permute(x, "16")
    if wgmma:
        _launch_wgmma(chosen, operand, data, scales, row_scale, out, fold, token_scale, bias)
    elif chosen.kernel == "few":
        _launch_few(chosen.parameters, operand, data, scales, row_scale, out, token_scale, bias)
    elif chosen.kernel == "widen":
        assert fold is not None
        assert token_scale is not None
        wide, columns = widen_fp8(data, scales, fold, row_scale)
        return torch._scaled_mm(
            operand, wide.t(), scale_a=token_scale[:, None], scale_b=columns, bias=bias, out_dtype=out.dtype,
            use_fast_accum=True,
        )  # fmt: skip
    else:
        gemm_portable.run(operand, data, scales, row_scale, out, fp8_fold=fold, token_scale=token_scale, bias=bias)
    return out


def quantize_nvfp4(
    x: torch.Tensor, activation: str, input_scale: torch.Tensor | None, layout: SfLayout = SfLayout.layout_linear
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [M, K] to W4A4 codes, scale bytes in `layout` and the scale of each row, fp32 [M], or of all, [1]."""
    if activation == "nvfp4_per_token":
        return quantize(x, inverse_base(x.device), layout=layout, per_token=True)
    assert input_scale is not None  # api.py refuses this mode without one
    scale = input_scale.reshape(1)
    codes, sf, _ = quantize(x, scale, layout=layout, decode_scale=True)
    return codes, sf, scale


_inverse_bases: dict[torch.device, torch.Tensor] = {}


def inverse_base(device: torch.device) -> torch.Tensor:
    """INVERSE_BASE as fp32 [1]. Made once, but not within a capture: what a graph makes is there when the graph ran."""
    return asked(lambda: _inverse_base(device))


def _inverse_base(device: torch.device) -> torch.Tensor:
    base = _inverse_bases.get(device)
    if base is None:
        base = torch.full((1,), INVERSE_BASE, dtype=torch.float32, device=device)
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            _inverse_bases[device] = base
    return base
