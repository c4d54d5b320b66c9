"""`nvfp4 bench`: the benchmarks by name. Each is a command in a module of its own, over the frame in `benchmark.py`."""

from __future__ import annotations

import typer

from nvfp4_plugin.cli.bench_linear import linear
from nvfp4_plugin.cli.bench_moe import moe
from nvfp4_plugin.cli.bench_quantize import quantize
from nvfp4_plugin.cli.bench_vllm import vllm

app = typer.Typer(help="Time the kernels beside their peers on this device.", no_args_is_help=True)
app.command()(quantize)
app.command()(vllm)
app.command()(linear)
app.command()(moe)
