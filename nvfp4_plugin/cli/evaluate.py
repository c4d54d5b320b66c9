"""`nvfp4 eval`: what quantization costs each layer of a folder."""

from __future__ import annotations

import json as json_module
import math
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from nvfp4_plugin.cli.benchmark import DeviceOption, pick_device
from nvfp4_plugin.cli.model_folder import ModelFolder, mean_finite, sqnr
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
    where = pick_device(device)
    layers: list[dict[str, Any]] = []
    folder = ModelFolder(model)
    folder.warn(config)
    for module in track(folder.linear_layers(config), "quantizing", console=Console(stderr=True), transient=True):
        weight = folder.tensor(f"{module}.weight").to(where)
        quantized = folder.quantize(module, config, weight)
        layers.append({"layer": module, "shape": list(weight.shape), "sqnr_db": sqnr(weight, quantized)})
    mean = mean_finite([layer["sqnr_db"] for layer in layers])
    if json:
        document = {"scale_search": config.scale_search, "mean_sqnr_db": mean, "layers": layers}
        # JSON has no infinity: null stands for a layer that lost nothing.
        json_module.dump(_nulls(document), sys.stdout, indent=2)
        sys.stdout.write("\n")
        return
    table = Table("layer", "shape", title=f"Weight SQNR, scale_search {config.scale_search}", title_justify="left")
    table.add_column("dB", justify="right")
    for layer in layers:
        table.add_row(layer["layer"], "x".join(map(str, layer["shape"])), f"{layer['sqnr_db']:.2f}")
    console = Console()
    console.print(table)
    lowest = min(layers, key=lambda layer: layer["sqnr_db"])
    text = f"mean {mean:.2f} dB over {len(layers)} layers, lowest {lowest['sqnr_db']:.2f} dB ({lowest['layer']})"
    console.print(text, highlight=False, soft_wrap=True)


def _nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _nulls(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_nulls(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
