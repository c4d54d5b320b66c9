"""Measures which GEMM and tile serve a dense layer best on a device, for the tables that linear.py reads."""

from __future__ import annotations

import functools
import itertools
import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..devices import cuda_device
from ..formats import align_scale_rows
from ..reference.source import Source
from . import linear
from .launch import cdiv
from .linear import Plan

DECODE_ROWS = (8, 16, 32, 64)
"""The M at which layers of a block are chosen together."""
ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""The M that tables hold; which calls an entry serves `linear.plan` says."""
MODES = ("none", "fp8_per_token")
"""What is measured. The W4A4 modes run the GEMM of "none" over decoded activations."""

# Seconds of work before a measurement. Hundreds of rows, and large layers, draw all the power that a card may, and slow it down
# after a second: from _HOT_ROWS or _LONG seconds on, plans this close to the fastest are measured once more, one right after
# the other.
_QUICK, _HEATING, _HOT = 0.05, 1.5, 0.5
_HOT_ROWS, _LONG, _CLOSE = 512, 25e-6, 1.06
# The same of blocks, and by how much a plan has to be faster there than the one that the layer has.
_CLOSE_IN_BLOCK, _GAIN_IN_BLOCK = 1.01, 0.997

Call = Callable[[], object]
TimeCalls = Callable[[list[Call], float], float]
Log = Callable[[str], None]
Weight = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
# (BM, warps of a group, groups, stages, resident blocks) of the decode GEMM by what it multiplies. Longer rings hold up x,
# which waits behind their weights.
_DECODE_TILES = {
    "none": (
        *((8, 4, *tile) for tile in ((1, 3, 4), (1, 4, 4), (2, 2, 2), (2, 3, 2))),
        *((16, 4, *tile) for tile in ((1, 2, 4), (1, 3, 4), (1, 4, 3), (2, 2, 2))),
        *((32, 4, *tile) for tile in ((1, 2, 3), (1, 3, 2), (2, 2, 1), (2, 3, 1))),
        *((64, *tile) for tile in ((8, 1, 2, 2), (4, 1, 2, 2), (4, 2, 2, 1))),
        *((128, *tile) for tile in ((4, 1, 2, 1), (4, 1, 3, 1), (8, 1, 2, 1))),
    ),
    "fp8_per_token": (
        *((8, 4, *tile) for tile in ((1, 2, 4), (1, 3, 4), (1, 4, 4), (2, 2, 2), (2, 3, 2), (2, 3, 1))),
        *((16, 4, *tile) for tile in ((1, 2, 4), (1, 3, 4), (1, 4, 4), (1, 3, 2), (2, 2, 2), (2, 3, 2), (2, 3, 1), (2, 4, 1))),
        *((32, 4, *tile) for tile in ((1, 2, 4), (1, 3, 3), (1, 4, 3), (1, 3, 2), (2, 2, 2), (2, 3, 1), (2, 4, 1))),
        *((64, *tile) for tile in ((4, 1, 2, 4), (4, 1, 2, 3), (4, 1, 3, 2), (4, 2, 2, 1), (4, 2, 3, 1), (8, 1, 3, 2))),
        *((128, *tile) for tile in ((4, 1, 2, 2), (4, 1, 3, 1), (4, 2, 2, 1), (8, 1, 3, 1))),
    ),
}


def _splits(k: int, tiles: int, groups: int, blocks: int) -> list[int]:
    """Shares of a tile's K worth a try: the largest that leave every block at most one unit of work, one less, and the next."""
    if tiles >= blocks:
        return [1]
    wanted = blocks // tiles
    most = max(1, linear.most_shares(k) // groups)
    return sorted({min(max(split, 1), most) for split in (wanted - 1, wanted, wanted + 1)})


def _decode_plans(mode: str, m: int, n: int, k: int, processors: int) -> list[Plan]:
    plans = []
    for bm, warps, groups, stages, resident in _DECODE_TILES[mode]:
        tiles = cdiv(n, 16 * warps) * cdiv(m, bm)
        if (
            bm not in linear.rows_of_decode_tiles(m)
            or groups > linear.stages_of(k)
            or (m > 256 and (bm == 64 or tiles > processors * resident))
        ):
            continue
        tile = {"bm": bm, "warps": warps, "groups": groups, "stages": stages, "resident": resident}
        for split in _splits(k, tiles, groups, processors * resident):
            plans.append(Plan("decode", {**tile, "split": split}))
    return plans


def candidates(mode: str, m: int, n: int, k: int, processors: int) -> list[Plan]:
    """The plans to measure for x [m, k] under "none" or "fp8_per_token" and a weight [n, k] on Hopper."""
    fp8 = mode == "fp8_per_token"
    plans = []
    if m <= 8 and not fp8:
        for warps, apart in itertools.product((2, 4, 8), (1,) if k % linear.K_STEP else {1: (0,), 4: (0, 1)}.get(m, (1,))):
            plans.append(Plan("few", {"warps": warps, "apart": apart}))
    if m <= 512 and (fp8 or m >= 4 or k % linear.K_STEP):
        plans += _decode_plans(mode, m, n, k, processors)
    if m >= 128 or (m == 64 and not fp8):
        listed = [(plan.kernel, plan.parameters) for plan in plans]
        tiled = linear.tiled_plans(m, n, k, fp8, processors)
        tiled = [plan for plan in tiled if (plan.kernel, plan.parameters) not in listed]
        plans += tiled[:6] + [plan for plan in tiled[6:12] if not plan.parameters["split"]]
    if fp8 and m >= 1024 and n % 16 == 0:
        plans.append(Plan("widen"))
    return plans


def operands(n: int, k: int, device: torch.device) -> Weight:
    """A random weight [n, k] as `Nvfp4Weight.prepared` lays it out: codes, scales, FP8 fold."""
    from ..weight import fp8_fold

    data = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device)
    scales = (torch.rand(n, k // 16, device=device) * 200 + 1).to(torch.float8_e4m3fn)
    return data, align_scale_rows(scales), fp8_fold(scales)


def calls(plan: Plan, mode: str, m: int, weights: Sequence[Weight]) -> list[Call]:
    """The whole layer by `plan` over each of the weights."""
    device, n, k = weights[0][0].device, weights[0][0].shape[0], weights[0][0].shape[1] * 2
    x = torch.randn(m, k, dtype=torch.bfloat16, device=device)
    row_scale = torch.ones(1, device=device)
    out = torch.empty(m, n, dtype=x.dtype, device=device)

    def call(data: torch.Tensor, scales: torch.Tensor, fold: torch.Tensor) -> Call:
        return lambda: linear.run(plan, x, data, scales, row_scale, out, mode, fold, None, None)

    return [call(*weight) for weight in weights]


SOURCES = {"qkv": "add_rms_norm", "o": "plain", "gate_up": "add_rms_norm", "down": "silu_and_mul"}
"""Layer of a block -> what comes right before it, as in reference/source.py."""


@dataclass(frozen=True)
class Block:
    """The dense layers of a decoder block, as each of `ranks` GPUs has them."""

    hidden: int
    heads: int
    """Values of a token that attention gives."""
    kv: int
    """Values of its keys; as many of its values."""
    intermediate: int
    ranks: int = 1

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """Layer -> (N, K), in order."""
        heads, kv, intermediate = (size // self.ranks for size in (self.heads, self.kv, self.intermediate))
        return {
            "qkv": (heads + 2 * kv, self.hidden),
            "o": (self.hidden, heads),
            "gate_up": (2 * intermediate, self.hidden),
            "down": (self.hidden, intermediate),
        }

    def run(self, layer: InBlock, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(x, residual) after the block, of x, residual [M, hidden].

        A copy stands for attention, and for the sum over several ranks: kernels that, as those, start when others have ended.
        """

        def summed(x: torch.Tensor) -> torch.Tensor:
            return x.clone() if self.ranks > 1 else x

        qkv, residual = layer("qkv", x, residual)
        o, _ = layer("o", qkv[:, : self.layers["o"][1]].clone(memory_format=torch.contiguous_format), None)
        gate_up, residual = layer("gate_up", summed(o), residual)
        down, _ = layer("down", gate_up, None)
        return summed(down), residual


InBlock = Callable[[str, torch.Tensor, Any], tuple[torch.Tensor, Any]]
"""(name, x, residual or None) -> the layer's output of what comes before it, and x + residual or None."""


def block_calls(block: Block, choices: dict[str, tuple[str, Plan]], m: int, weights: Sequence[dict[str, Weight]]) -> list[Call]:
    """A whole block by (activation mode, plan) of its layers, over each of the weights."""
    device = weights[0]["qkv"][0].device
    x, residual = (torch.randn(m, block.hidden, dtype=torch.bfloat16, device=device) for _ in range(2))
    norm = torch.ones(block.hidden, dtype=x.dtype, device=device)
    row_scale = torch.full((1,), 1e-6, device=device)

    def call(weights: dict[str, Weight]) -> Call:
        def layer(name: str, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
            data, scales, fold = weights[name]
            mode, plan = choices[name]
            out = torch.empty(m, data.shape[0], dtype=x.dtype, device=device)
            total = None if residual is None else torch.empty_like(residual)
            source = Source(SOURCES[name], norm, 1e-5, residual, total)
            return linear.run(plan, x, data, scales, row_scale, out, mode, fold, None, None, source), total

        return lambda: block.run(layer, x, residual)

    return [call(one) for one in weights]


def _compile(job: tuple[Plan, str, int, int, int]) -> str | None:
    plan, mode, m, tail, index = job
    device = torch.device("cuda", index)
    # Sizes that divide as those of real layers do, Triton compiles for that; and of which tiles share their K, or are helped.
    split = plan.parameters.get("split", 1)
    if split:
        m, n, k = min(m, 512), 256, 1024 * split + tail
    else:
        m, n, k = 256, 128 * (cuda_device(index)[2] * 2 // 3), 8192 + tail
    try:
        for call in calls(plan, mode, m, [operands(n, k, device)]):
            call()
        torch.cuda.synchronize(device)
    except Exception as error:  # a worker reports what it cannot build, the others go on
        return f"{plan.kernel} {plan.parameters}: {type(error).__name__}: {error}"
    return None


def compile_all(jobs: Iterable[tuple[Plan, str, int, int]], device: torch.device) -> list[str]:
    """Compile the kernels of all jobs, see `jobs_of`, into Triton's cache, in parallel processes; returns what failed."""
    distinct = {}
    for plan, mode, m, k in jobs:
        tail = k % linear.K_STEP
        distinct[mode, plan.variant, tail > 0] = (plan, mode, m, tail, device.index or 0)
    processes = min(14, os.cpu_count() or 1, len(distinct))
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return [message for message in pool.imap_unordered(_compile, distinct.values()) if message]


def tune(
    shapes: Sequence[tuple[int, int]],
    device: torch.device,
    time_calls: TimeCalls,
    *,
    copies_of: Callable[[int], int],
    log: Log = print,
    compiled: bool = False,
) -> dict[str, Any]:
    """Measure all plans for each (N, K) and return their table: {"device", "linear": {mode: {NxK: {M: plan}}}, "us": times}.

    Under "auto" the table holds the first M at which fp8_per_token is the faster. time_calls: median seconds of one of a
    list of calls, after so many seconds of work; copies_of(bytes): how many weights of that size to rotate; compiled: the cache
    holds all kernels.
    """
    name = torch.cuda.get_device_name(device)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    if not compiled:
        for message in compile_all(jobs_of(shapes, processors), device):
            log(message)
    table: dict[str, Any] = {mode: {} for mode in (*MODES, "auto")}
    times: dict[str, dict[str, dict[str, float]]] = {mode: {} for mode in MODES}
    for n, k in shapes:
        shape = f"{n}x{k}"
        weights = [operands(n, k, device) for _ in range(copies_of(n * k * 9 // 16))]
        for mode, m in itertools.product(MODES, ROWS):
            plans, calls_of = candidates(mode, m, n, k, processors), functools.partial(calls, mode=mode, m=m, weights=weights)
            measured = _measured(plans, calls_of, f"{shape} M={m} {mode}", m >= _HOT_ROWS, _CLOSE, time_calls, log)
            if measured:
                # The last entry serves all larger M, too, where widening pays more: it wins a tie there.
                tie = 0.97 if m == ROWS[-1] else 1.0
                seconds, best = min(measured, key=lambda pair: pair[0] * (tie if pair[1].kernel == "widen" else 1.0))
                table[mode].setdefault(shape, {})[str(m)] = {"kernel": best.kernel, **best.parameters}
                times[mode].setdefault(shape, {})[str(m)] = round(seconds * 1e6, 2)
        table["auto"][shape] = _first_fp8(times["none"].get(shape, {}), times["fp8_per_token"].get(shape, {}))
        log(f"{shape}: { ({mode: times[mode].get(shape) for mode in MODES}) }, fp8 from M = {table['auto'][shape]}")
    return {"device": name, "linear": table, "us": times}


def _measured(
    plans: Sequence[Plan],
    calls_of: Callable[[Plan], list[Call]],
    what: str,
    hot: bool,
    close: float,
    time_calls: TimeCalls,
    log: Log,
) -> list[tuple[float, Plan]]:
    """(seconds, plan) of the plans that run; of long work, and where it is `hot`, those close to the fastest, with clocks that
    the card settles at."""

    def seconds_of(plan: Plan, warm_up: float) -> float:
        try:
            return time_calls(calls_of(plan), warm_up)
        except Exception as error:  # a plan that does not run is left out, and said
            log(f"{what} {plan.kernel} {plan.parameters}: {type(error).__name__}: {error}")
            return math.inf

    measured = [(seconds_of(plan, _QUICK), plan) for plan in plans]
    fastest = min((seconds for seconds, _ in measured), default=math.inf)
    if hot or fastest >= _LONG:
        nearly = [plan for seconds, plan in measured if seconds <= close * fastest < math.inf]
        measured = [(seconds_of(plan, _HOT if i else _HEATING), plan) for i, plan in enumerate(nearly)]
    return [(seconds, plan) for seconds, plan in measured if seconds < math.inf]


def tune_block(
    block: Block, device: torch.device, time_calls: TimeCalls, *, copies_of: Callable[[int], int], log: Log = print
) -> dict[str, Any]:
    """Measure, at each M of DECODE_ROWS, the plans of gemm_few and gemm_decode for the layers of a block while the whole block
    runs, one layer after the other, in the mode that "auto" takes; returns a table of those that make the block faster.

    What `tune` finds for a layer alone fills the processors; in a block the kernels after it find no room there to start.
    The arguments are those of `tune`.
    """
    _, _, processors = cuda_device(device.index or 0)
    copies = max(2, copies_of(sum(n * k * 9 // 16 for n, k in block.layers.values())))
    weights = [{name: operands(n, k, device) for name, (n, k) in block.layers.items()} for _ in range(copies)]
    chosen: dict[int, dict[str, tuple[str, Plan]]] = {}
    tried: dict[tuple[int, str], list[Plan]] = {}
    for m, (name, (n, k)) in itertools.product(DECODE_ROWS, block.layers.items()):
        mode = linear.faster_mode(device, m, n, k)
        chosen.setdefault(m, {})[name] = mode, linear.plan(device, mode, m, n, k)
        tried[m, name] = [plan for plan in candidates(mode, m, n, k, processors) if plan.kernel in ("few", "decode")]
    jobs = [
        (plan, chosen[m][name][0], m, block.layers[name][1])
        for (m, name), plans in tried.items()
        for plan in (chosen[m][name][1], *plans)
    ]
    for message in compile_all(jobs, device):
        log(message)
    table: dict[str, Any] = {mode: {} for mode in MODES}
    times: dict[str, dict[str, dict[str, float]]] = {mode: {} for mode in MODES}
    for (m, name), plans in tried.items():
        mode, before = chosen[m][name]
        n, k = block.layers[name]
        shape = f"{n}x{k}"

        def calls_of(plan: Plan, m: int = m, name: str = name, mode: str = mode) -> list[Call]:
            return block_calls(block, chosen[m] | {name: (mode, plan)}, m, weights)

        measured = _measured(plans, calls_of, f"{shape} M={m} {mode}", False, _CLOSE_IN_BLOCK, time_calls, log)
        if not measured:
            continue
        seconds, best = min(measured, key=lambda pair: pair[0])
        old = time_calls(calls_of(before), _HOT)
        if seconds < _GAIN_IN_BLOCK * old:
            chosen[m][name] = mode, best
            alone = time_calls(
                calls(best, mode, m, [operands(n, k, device) for _ in range(copies_of(n * k * 9 // 16))]), _QUICK
            )
            table[mode].setdefault(shape, {})[str(m)] = {"kernel": best.kernel, **best.parameters}
            times[mode].setdefault(shape, {})[str(m)] = round(alone * 1e6, 2)
            log(f"{shape} M={m} {mode}: {best.kernel} {best.parameters}, the block {old * 1e6:.1f} to {seconds * 1e6:.1f} us")
    return {"device": torch.cuda.get_device_name(device), "linear": table, "us": times}


def jobs_of(shapes: Sequence[tuple[int, int]], processors: int) -> list[tuple[Plan, str, int, int]]:
    """(plan, mode, M, K) of everything that `tune` measures."""
    points = itertools.product(shapes, MODES, ROWS)
    return [(plan, mode, m, k) for (n, k), mode, m in points for plan in candidates(mode, m, n, k, processors)]


def _first_fp8(none: dict[str, float], fp8: dict[str, float]) -> int:
    """From which M on fp8_per_token serves: it is 2 % faster at the next M that was measured, and 5 % slower nowhere above.

    One more than the largest M that was measured, where it never is.
    """
    rows = [m for m in ROWS if str(m) in none and str(m) in fp8]
    ratio = {m: fp8[str(m)] / none[str(m)] for m in rows}
    ahead = (i for i, m in enumerate(rows) if ratio[m] <= 0.98 and all(ratio[more] <= 1.05 for more in rows[i:]))
    first = next(ahead, len(rows))
    return rows[first - 1] + 1 if first else 1
