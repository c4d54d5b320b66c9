"""The frame of `nvfp4 bench`: times callables and shows the times as a table, as JSON and as a plot.

A benchmark is a typer command (registered in `bench.py`) that makes `Case`s and gives them to `run`:

    def quantize(json: JsonOption = False, plot: PlotOption = None, device: DeviceOption = "auto",
                 repeats: RepeatsOption = 30) -> None:
        where = benchmark.pick_device(device)
        cases = [Case({"M": m, "K": 4096}, name, setup=partial(_setup, name, m, where), bytes=...) for m in ... for name in ...]
        benchmark.run("Per-token quantization", cases, where, json=json, plot=plot, repeats=repeats)

A case is one cell of the table: its `point` makes the row, its `name` the column, in the order in which they first come
up. `setup` runs just before its case is timed and gives callables that do the same work over *distinct* buffers; a cycle
over them keeps the caches as cold as in a model (`rotation` says how many buffers that takes). What a setup allocates
is freed before the next one runs. A setup that cannot serve its point raises `Unavailable("why")`: the cell stays
empty and the reason stands under the table.

Times are medians. On a GPU: CUDA-graph replays between CUDA events, so that launches cost nothing (a call that cannot
be captured is timed eagerly, and the result says so); on the CPU: time.perf_counter.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json as json_module
import re
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from nvfp4_plugin.cli.processes import interrupt_on_termination

if TYPE_CHECKING:
    import torch

Call = Callable[[], object]
Row = Mapping[str, Any]  # an entry of a document's "measurements"
RATES = ("GB/s", "TFLOP/s")


def _plot_file(path: Path | None) -> Path | None:
    """Refuse what cannot be drawn before minutes of timing, and not after."""
    if path is None:
        return None
    if importlib.util.find_spec("matplotlib") is None:
        raise typer.BadParameter("needs matplotlib: pip install 'nvfp4-plugin[bench]'")
    if path.suffix != ".png":
        raise typer.BadParameter(f"got {str(path)!r}; allowed: a file that ends in .png")
    there = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise typer.BadParameter(f"got {str(path)!r}; allowed: a file that can be written ({error.strerror})") from None
    if not there:
        path.unlink()
    return path


JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on standard output instead of a table.")]
PlotOption = Annotated[Path | None, typer.Option("--plot", help="Write a plot to this PNG file.", callback=_plot_file)]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
RepeatsOption = Annotated[int, typer.Option("--repeats", min=1, help="Timed repetitions; the median counts.")]
HostOption = Annotated[bool, typer.Option("--host", help="Time how long a call keeps the host, not how long it takes.")]


WARM_UP_SECONDS = 1.5
"""Until a card's clocks are what they stay at. It averages its power over a second: after a pause it runs at full speed at
first, too slow when the mean reaches the limit, and settles then."""


class Unavailable(Exception):
    """A case that cannot run here; the message says why."""


@dataclass(frozen=True)
class Case:
    """One thing to time."""

    point: Mapping[str, str | int]
    """The row: what varies over the table, `{"layer": "qkv", "M": 16}`."""
    name: str
    """The column: which implementation."""
    setup: Callable[[], Sequence[Call]]
    """Makes the callables, each over its own buffers. Raises Unavailable."""
    bytes: int = 0
    """Bytes that one call has to move; 0 where bandwidth says nothing."""
    flops: int = 0
    """Floating-point operations of one call; 0 where throughput says nothing."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, and how they were taken: "cuda graph", "cuda events", "perf_counter" or "host"."""

    seconds: float
    timer: str


@dataclass(frozen=True)
class Measurement:
    """The outcome of a case: a timing, or the reason why there is none."""

    case: Case
    timing: Timing | None
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The case's point and name, microseconds, and GB/s and TFLOP/s where the case tells bytes and flops."""
        result: dict[str, Any] = {**self.case.point, "name": self.case.name}
        if self.timing is None:
            return result | {"unavailable": self.reason}
        result |= {"microseconds": self.timing.seconds * 1e6, "timer": self.timing.timer}
        if self.timing.timer == "host":
            return result
        if self.case.bytes:
            result["GB/s"] = self.case.bytes / self.timing.seconds / 1e9
        if self.case.flops:
            result["TFLOP/s"] = self.case.flops / self.timing.seconds / 1e12
        return result


def check_words(option: str, words: Iterable[str], allowed: Collection[str]) -> None:
    """BadParameter for a word that is not `allowed`."""
    for word in words:
        if word not in allowed:
            raise typer.BadParameter(f"got {word!r}; allowed: {', '.join(allowed)}", param_hint=option)


def check_least(option: str, numbers: Iterable[int], least: int) -> None:
    """BadParameter for a number below `least`."""
    for number in numbers:
        if number < least:
            raise typer.BadParameter(f"got {number}; allowed: {least} or more", param_hint=option)


def sizes(text: str, count: int) -> tuple[int, ...] | None:
    """So many positive numbers joined by x, as in "48x64"; None where `text` is no such thing."""
    numbers = [int(part) if part.isdecimal() else 0 for part in text.split("x")]
    return tuple(numbers) if len(numbers) == count and all(numbers) else None


def pick_device(name: str) -> torch.device:
    """The device that a --device option names; "auto" is the current CUDA device, or the CPU where there is none."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    # Read here: torch.device knows other devices, which nothing here runs on, and takes "cuda:256" for "cuda:0".
    cuda = re.fullmatch(r"cuda(:\d+)?", name)
    if name != "cpu" and not cuda:
        raise typer.BadParameter(f"got {name!r}; allowed: auto, cpu, cuda, cuda:N", param_hint="--device")
    if cuda and int((cuda[1] or ":0")[1:]) >= torch.cuda.device_count():
        raise typer.BadParameter(
            f"got {name!r}, but PyTorch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices here",
            param_hint="--device",
        )
    return torch.device(name)


def need(device: torch.device, module: str) -> None:
    """Unavailable unless `module` can be imported and the device is a CUDA GPU."""
    if device.type != "cuda":
        raise Unavailable(f"needs a CUDA device, this is {device.type}")
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise Unavailable(f"{module.partition('.')[0]} is not installed here, or has no {module}")


def device_name(device: torch.device) -> str:
    """The device in words: "NVIDIA H100 80GB HBM3", or the processor's model name."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = device.type
    return f"{model}, {torch.get_num_threads()} threads"


def rotation(nbytes: int, device: torch.device, limit: int = 64) -> int:
    """How many copies of a buffer of `nbytes` a cycle needs so that each is cold when its turn comes: 4 x the L2 cache."""
    import torch

    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 32 << 20
    return max(1, min(limit, -(-4 * cache // max(nbytes, 1))))


def time_calls(
    calls: Sequence[Call], device: torch.device, repeats: int = 30, *, host: bool = False, warm_up: float = WARM_UP_SECONDS
) -> Timing:
    """Median time of one call out of a cycle over `calls`, after a warm-up of one cycle.

    warm_up: seconds of work before, on a GPU.
    host: until it returns, on a device that has nothing else to do: what an eager model waits for.
    """
    if host:
        return Timing(_time_to_return(calls, device, repeats, 3), "host")  # what a layer launches is settled by its third call
    if device.type == "cuda":
        return _time_cuda(calls, device, repeats, warm_up)
    return Timing(_time_to_return(calls, device, repeats, 1), "perf_counter")


def _time_to_return(calls: Sequence[Call], device: torch.device, repeats: int, cycles: int) -> float:
    """Median seconds until a call returns, after a warm-up of so many cycles."""
    import torch

    seconds = []
    for repeat in range(-cycles * len(calls), repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        call = calls[repeat % len(calls)]
        start = time.perf_counter()
        call()
        if repeat >= 0:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _warm_up(replay: Call, device: torch.device, seconds: float) -> None:
    import torch

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        replay()
        torch.cuda.synchronize(device)


def _time_cuda(calls: Sequence[Call], device: torch.device, repeats: int, warm_up: float) -> Timing:
    import torch

    # A replay holds at least 16 calls, so that the events' own resolution does not count.
    cycles = max(1, 16 // len(calls))

    def cycle() -> None:
        for _ in range(cycles):
            for call in calls:
                call()

    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # capture wants a warm-up (compilation, workspaces) off the default stream
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                cycle()
            replay, timer = graph.replay, "cuda graph"
        except RuntimeError as error:
            if isinstance(error.__context__, KeyboardInterrupt):  # what ends the capture may fail over it
                raise error.__context__ from None
            torch.cuda.synchronize()
            replay, timer = cycle, "cuda events"
        _warm_up(replay, device, warm_up)
        milliseconds = []
        for _ in range(repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            replay()
            end.record()
            end.synchronize()
            milliseconds.append(start.elapsed_time(end))
    return Timing(statistics.median(milliseconds) * 1e-3 / (cycles * len(calls)), timer)


def run(
    title: str,
    cases: Iterable[Case],
    device: torch.device,
    *,
    json: bool = False,
    plot: Path | None = None,
    repeats: int = 30,
    host: bool = False,
) -> list[Measurement]:
    """Time the cases, print them, write the plot. Progress goes to standard error: a bar, or where that is a file each time as
    soon as it is known. host: only the host's part of a call.

    A run that is stopped (Ctrl-C, SIGTERM) prints what it has, and exits with 130.
    """
    from nvfp4_plugin.cli.environment import versions

    cases = list(cases)
    measurements: list[Measurement] = []
    interrupt_on_termination()
    with contextlib.suppress(KeyboardInterrupt), Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=len(cases))
        for case in cases:
            progress.update(task, description=f"{_label(case.point)} {case.name}")
            measurements.append(_measure(case, device, repeats, host))
            progress.advance(task)
            if not progress.console.is_terminal:
                timing = measurements[-1].timing
                found = f"{timing.seconds * 1e6:.2f} us" if timing else measurements[-1].reason
                sys.stderr.write(f"{_label(case.point)} {case.name}: {found}\n")
    document = {
        "title": f"{title}, what a call keeps the host" if host else title,
        "device": device_name(device),
        "versions": versions(),
        "repeats": repeats,
        "measurements": [m.as_dict() for m in measurements],
    }
    if json:
        json_module.dump(document, sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        show(document)
    if plot is not None:
        draw(document, plot)
    if len(measurements) < len(cases):
        sys.stderr.write(f"stopped after {len(measurements)} of {len(cases)} cases\n")
        raise typer.Exit(130)
    return measurements


def _measure(case: Case, device: torch.device, repeats: int, host: bool) -> Measurement:
    import torch

    try:
        return Measurement(case, time_calls(case.setup(), device, repeats, host=host))
    except Unavailable as reason:
        return Measurement(case, None, str(reason))
    except torch.OutOfMemoryError:
        return Measurement(case, None, "out of memory")
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


# What --json prints, the document, is also what tables and plots are made of.


def _point(row: Row) -> dict[str, str | int]:
    return {key: value for key, value in row.items() if key not in ("name", "unavailable", "microseconds", "timer", *RATES)}


def _label(point: Mapping[str, str | int]) -> str:
    return " ".join(value if isinstance(value, str) else f"{key}={value}" for key, value in point.items())


def show(document: Mapping[str, Any]) -> None:
    """Print the table of a run's document, why cells are empty, and which times hold launches."""
    console = Console(width=None if sys.stdout.isatty() else 240)  # a file has no edge to wrap at
    console.print(table(document))
    rows = document["measurements"]
    reasons = [f"- {row['name']}: {row['unavailable']}" for row in rows if "unavailable" in row]
    eager = [
        f"* {row['name']}: cannot be captured into a CUDA graph, timed with its launches"
        for row in rows
        if row.get("timer") == "cuda events"
    ]
    for note in dict.fromkeys(reasons + eager):
        console.print(note, style="dim", markup=False, highlight=False)


def table(document: Mapping[str, Any]) -> Table:
    """Rows by point, columns by name, microseconds; the fastest of a row is bold. The first column's rate stands last."""
    measured: list[Row] = document["measurements"]
    names = list(dict.fromkeys(row["name"] for row in measured))
    points: dict[str, dict[str, Row]] = {}
    for row in measured:
        points.setdefault(_label(_point(row)), {})[row["name"]] = row
    result = Table(title=f"{document['title']} - {document['device']}", caption="microseconds, medians", title_justify="left")
    for key in _point(measured[0]) if measured else ():
        result.add_column(key, justify="left")
    for name in names:
        result.add_column(name, justify="right", overflow="fold")
    rates = [rate for rate in RATES if any(rate in row for row in measured)]
    for rate in rates:
        result.add_column(f"{rate} ({names[0]})", justify="right", overflow="fold", style="dim")
    for rows in points.values():
        times = {name: row["microseconds"] for name, row in rows.items() if "microseconds" in row}
        cells = [str(value) for value in _point(next(iter(rows.values()))).values()]
        for name in names:
            text = f"{times[name]:,.1f}" if name in times else "-"
            cells.append(f"[bold]{text}[/bold]" if name in times and times[name] == min(times.values()) else text)
        cells += [f"{rows[names[0]][rate]:,.3g}" if rate in rows.get(names[0], ()) else "-" for rate in rates]
        result.add_row(*cells)
    return result


def _stretches(xs: Iterable[int]) -> list[list[int]]:
    """Values in order, cut wherever they leap by more than a factor of 32."""
    result: list[list[int]] = []
    for x in sorted(set(xs)):
        if result and x <= 32 * result[-1][-1]:
            result[-1].append(x)
        else:
            result.append([x])
    return result


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Plot a run's document into a PNG file.

    The last integer key of the points runs along x. There is a panel for each value of the other keys, several where x leaps
    by more than a factor of 32; a panel of one point has bars.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed: list[Row] = [row for row in document["measurements"] if "microseconds" in row]
    axis = next((key for row in timed for key, value in reversed(_point(row).items()) if isinstance(value, int)), None)
    palette = pyplot.get_cmap("tab20")
    colors = {name: palette(i % palette.N) for i, name in enumerate(dict.fromkeys(row["name"] for row in timed))}
    groups: dict[str, dict[str, dict[int, float]]] = {}
    for row in timed:
        label = _label({key: value for key, value in _point(row).items() if key != axis})
        x = row[axis] if axis is not None else 0
        groups.setdefault(label, {}).setdefault(row["name"], {})[x] = row["microseconds"]
    panels = [
        (
            label,
            ticks,
            {name: [(x, line[x]) for x in ticks if x in line] for name, line in lines.items() if line.keys() & set(ticks)},
        )
        for label, lines in groups.items()
        for ticks in _stretches(x for line in lines.values() for x in line)
    ]
    columns = max(1, min(3, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    figure, axes = pyplot.subplots(rows, columns, figsize=(5.5 * columns, 4 * rows), squeeze=False)
    for unused in axes.flat[len(panels) :]:
        unused.set_visible(False)
    for panel, (label, ticks, lines) in zip(axes.flat, panels, strict=False):
        if len(ticks) == 1:
            bars = panel.barh(list(lines), [points[0][1] for points in lines.values()], color=[colors[name] for name in lines])
            panel.bar_label(bars, fmt="%.4g", padding=2)
            panel.margins(x=0.15)
            panel.invert_yaxis()
            panel.set_xlabel("microseconds")
            label += f" {axis}={ticks[0]:,}" if axis is not None else ""
        else:
            for name, points in lines.items():
                panel.plot(*zip(*points, strict=True), marker="o", label=name, color=colors[name])
            panel.set_xscale("log", base=2)
            panel.set_xticks(ticks, labels=[f"{x:,}" for x in ticks], rotation=45 if len(ticks) > 6 else 0)
            panel.minorticks_off()
            panel.set_yscale("log")
            panel.set_xlabel(axis or "")
            panel.set_ylabel("microseconds")
            panel.grid(True, which="both", alpha=0.3)
        panel.set_title(label)
    figure.suptitle(f"{document['title']} - {document['device']}")
    figure.tight_layout()
    handles = {label: handle for panel in axes.flat for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="center left", bbox_to_anchor=(1, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, bbox_inches="tight")
    pyplot.close(figure)
    Console(stderr=True).print(f"Plot written to {path}", markup=False, highlight=False)
