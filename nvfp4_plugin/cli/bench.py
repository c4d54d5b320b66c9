"""`nvfp4 bench`: the benchmarks by name. Each is a command in a module of its own, over the frame in `benchmark.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from nvfp4_plugin.cli import benchmark
from nvfp4_plugin.cli.bench_block import block
from nvfp4_plugin.cli.bench_linear import linear
from nvfp4_plugin.cli.bench_moe import moe
from nvfp4_plugin.cli.bench_quantize import quantize
from nvfp4_plugin.cli.bench_vllm import vllm

app = typer.Typer(help="Time the kernels beside their peers on this device.", no_args_is_help=True)
app.command()(quantize)
app.command()(vllm)
app.command()(linear)
app.command()(block)
app.command()(moe)


@app.command()
def show(
    file: Annotated[
        Path, typer.Argument(help="What --json of quantize, linear, block or moe printed.", exists=True, dir_okay=False)
    ],
    plot: benchmark.PlotOption = None,
) -> None:
    """Print the table of a saved run, and plot it."""
    try:
        document = json.loads(file.read_text())
        benchmark.show(document)
    except (ValueError, KeyError, TypeError) as error:
        raise typer.BadParameter(f"{file} is not a benchmark's JSON ({type(error).__name__}: {error})") from None
    if plot is not None:
        benchmark.draw(document, plot)
