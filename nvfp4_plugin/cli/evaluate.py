"""`nvfp4 eval`: what quantization costs each layer of a checkpoint."""

from __future__ import annotations

import json as json_module
import math
import statistics
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from nvfp4_plugin.cli.benchmark import DeviceOption, pick_device
from nvfp4_plugin.cli.checkpoint import Checkpoint, CheckpointError, sqnr, warn_unmatched
from nvfp4_plugin.cli.quantize import HeadOption, IgnoreOption, ModelArgument, RecipeOption, SearchOption, options


def evaluate(
    model: ModelArgument,
    recipe: RecipeOption = None,
    scale_search: SearchOption = None,
    ignore: IgnoreOption = None,
    lm_head: HeadOption = False,
    device: DeviceOption = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """SQNR of each linear layer's weight under a configuration, in dB (higher is better)."""
    config = options(recipe, scale_search, ignore, lm_head)
    errors = Console(stderr=True)
    where = pick_device(device)
    layers: list[dict[str, Any]] = []
    try:
        checkpoint = Checkpoint(model)
        for warning in warn_unmatched(config, checkpoint):
            errors.print(f"warning: {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)
        names = checkpoint.linear_weights(config)
        for module in track(names, "quantizing", console=errors, transient=True):
            weight = checkpoint.tensor(f"{module}.weight").to(where)
            quantized = checkpoint.quantize(module, config, weight)
            layers.append({"layer": module, "shape": list(weight.shape), "sqnr_db": sqnr(weight, quantized)})
    except CheckpointError as error:
        errors.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    finite = [layer["sqnr_db"] for layer in layers if math.isfinite(layer["sqnr_db"])]
    mean = statistics.fmean(finite) if finite else None
    if json:
        # JSON has no infinity: a layer that lost nothing has null.
        rows = [layer | {"sqnr_db": layer["sqnr_db"] if math.isfinite(layer["sqnr_db"]) else None} for layer in layers]
        json_module.dump({"scale_search": config.scale_search, "mean_sqnr_db": mean, "layers": rows}, sys.stdout, indent=2)
        sys.stdout.write("\n")
        return
    table = Table("layer", "shape", title=f"Weight SQNR, scale_search {config.scale_search}", title_justify="left")
    table.add_column("dB", justify="right")
    for layer in layers:
        table.add_row(layer["layer"], "x".join(map(str, layer["shape"])), f"{layer['sqnr_db']:.2f}")
    console = Console()
    console.print(table)
    if mean is not None:
        console.print(f"mean {mean:.2f} dB, lowest {min(finite):.2f} dB over {len(layers)} layers", highlight=False)
