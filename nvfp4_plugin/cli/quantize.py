"""`nvfp4 quantize`: a bf16 checkpoint to an NVFP4 checkpoint in ModelOpt's form."""

from __future__ import annotations

import json
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nvfp4_configs import Nvfp4Config, recipe_names
from nvfp4_plugin.cli.benchmark import DeviceOption, pick_device
from nvfp4_plugin.cli.model_folder import ModelError, ModelFolder, mean_finite, sqnr

RecipeOption = Annotated[
    str | None, typer.Option("--recipe", help=f"{', '.join(recipe_names())}, or a .yaml file; else NVFP4_CONFIG.")
]
SearchOption = Annotated[str | None, typer.Option("--scale-search", help="mse, four_over_six or absmax.")]
IgnoreOption = Annotated[
    list[str] | None, typer.Option("--ignore", help="A module to leave alone: name, glob or re:...; repeatable.")
]
HeadOption = Annotated[bool, typer.Option("--lm-head", help="Quantize the language-model head too.")]
ModelArgument = Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a bf16 checkpoint.", exists=True)]


def options(recipe: str | None, scale_search: str | None, ignore: list[str] | None, lm_head: bool) -> Nvfp4Config:
    """The options of a command: those given win over the recipe, which wins over NVFP4_CONFIG."""
    given: dict[str, Any] = {"recipe": recipe, "scale_search": scale_search, "ignore": ignore, "lm_head": lm_head or None}
    given = {key: value for key, value in given.items() if value is not None}
    try:
        return Nvfp4Config.resolve(additional=given)
    except ValueError as error:
        raise typer.BadParameter(str(error).replace("--additional-config nvfp4: ", "")) from None


@dataclass(frozen=True)
class Summary:
    """What `quantize_checkpoint` did. Bytes are those of the quantized layers alone."""

    layers: int
    bytes_before: int
    bytes_after: int
    mean_sqnr: float
    """dB, over the layers that lost anything."""


def quantize(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist, or be empty.")],
    recipe: RecipeOption = None,
    scale_search: SearchOption = None,
    ignore: IgnoreOption = None,
    lm_head: HeadOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Quantize a checkpoint once, to serve it many times: ModelOpt's form, which vLLM and SGLang load as it is."""
    config = options(recipe, scale_search, ignore, lm_head)
    summary = quantize_checkpoint(model, out, config, pick_device(device), Console(stderr=True))
    Console().print(
        f"{summary.layers} layers, {_size(summary.bytes_before)} -> {_size(summary.bytes_after)}, "
        f"mean SQNR {summary.mean_sqnr:.2f} dB. Written to {out}; serve it with --quantization nvfp4",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.1f} MiB" if nbytes >= 2**20 else f"{nbytes / 2**10:,.1f} KiB"


def quantize_checkpoint(model: Path, out: Path, config: Nvfp4Config, device: Any, console: Console) -> Summary:
    """Write `model` quantized under `config` to `out`, one safetensors file at a time; nothing is left of a failed try.

    Projections that run fused (q, k and v; gate and up) share one global scale, so that frameworks that keep a single one
    for the fused matrix load the checkpoint without loss. Raises ModelError naming tensor and file.
    """
    source = ModelFolder(model)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"{out} exists; allowed: a folder that does not, or an empty one")
    source.check(config)
    source.warn(config)
    layers = source.linear_layers(config)
    out = out.resolve()  # "." has no name
    # A name that nobody else has: what we did not make is not ours to delete. Where OUT is there it is filled and not replaced:
    # it may be the working directory, or a volume.
    there = out.exists()
    partial = (out if there else out.parent) / f"{out.name}.{secrets.token_hex(4)}"
    partial.mkdir(parents=True)
    try:
        summary = _write(source, partial, config, layers, device, console)
        if there:
            for path in list(partial.iterdir()):
                path.rename(out / path.name)
        else:
            partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return summary


def _write(source: ModelFolder, out: Path, config: Nvfp4Config, layers: list[str], device: Any, console: Console) -> Summary:
    from safetensors.torch import save_file

    from nvfp4_plugin.checkpoint import INDEX_FILE, MODELOPT

    quantized_modules = set(layers)
    before = after = total = 0
    noise: list[float] = []
    weight_map: dict[str, str] = {}
    global_scales: dict[str, Any] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("quantizing", total=len(layers))
        for file in source.files:
            shard: dict[str, Any] = {}
            for name, tensor in source.tensors(file):
                module = name.removesuffix(".weight")
                if module not in quantized_modules or name == module:
                    shard[name] = tensor
                    continue
                weight = tensor.to(device)
                if module not in global_scales:
                    global_scales |= _shared_global_scale(source, module, config, device)
                quantized = source.quantize(module, config, weight, global_scales[module])
                shard[f"{module}.{MODELOPT.weight}"] = quantized.data.cpu()
                shard[f"{module}.{MODELOPT.scale}"] = quantized.scales.cpu()
                shard[f"{module}.{MODELOPT.global_scale}"] = quantized.global_scale.cpu()
                before += tensor.nbytes
                after += quantized.nbytes
                noise.append(sqnr(weight, quantized))
                progress.update(task, advance=1, description=module)
            save_file(shard, out / file.name, metadata={"format": "pt"})
            shutil.copymode(file, out / file.name)  # safetensors writes files for their owner alone
            weight_map |= dict.fromkeys(shard, file.name)
            total += sum(tensor.nbytes for tensor in shard.values())
    for path in source.folder.iterdir():  # the tokenizer and whatever else belongs to the model
        if path.is_file() and path.suffix != ".safetensors" and not path.name.endswith(".safetensors.index.json"):
            shutil.copy2(path, out / path.name)
    if len(source.files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    model_config = source.config | {"quantization_config": quantization_config(source, config)}
    (out / "config.json").write_text(json.dumps(model_config, indent=2) + "\n")
    return Summary(len(layers), before, after, mean_finite(noise))


def quantization_config(source: ModelFolder, config: Nvfp4Config) -> dict[str, Any]:
    """ModelOpt's entry for config.json: weights in NVFP4, no static activation scales."""
    left_alone = set(source.left_alone(config))
    if not config.lm_head:
        left_alone.add("lm_head")  # a tied head has no tensor of its own
    weights = {"num_bits": 4, "type": "float", "group_size": 16, "dynamic": False}
    return {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": sorted(left_alone),
        "producer": {"name": "nvfp4-plugin"},
    }


def _shared_global_scale(source: ModelFolder, module: str, config: Nvfp4Config, device: Any) -> dict[str, Any]:
    """Module -> global scale, for `module` and those that run fused with it; None (its own) where it runs alone."""
    import torch

    partners = source.partners(module)
    if len(partners) < 2:
        return {module: None}
    # The scale that `quantize_weight` gives the largest of them: its rule then lives in one place.
    largest: torch.Tensor | None = None
    for partner in partners:
        weight = source.tensor(f"{partner}.weight")
        extreme = torch.zeros(1, 16)
        extreme[0, 0] = weight.abs().amax().to(torch.float32)
        # What is not finite is refused, by its place in the weight itself.
        scale = source.quantize(partner, config, extreme if extreme.isfinite().all() else weight).global_scale
        # A matrix of zeros has the scale 1, which says nothing.
        if extreme.any() and (largest is None or scale > largest):
            largest = scale
    # Tensors of their own: safetensors writes no two names for one piece of memory.
    return {partner: None if largest is None else largest.to(device, copy=True) for partner in partners}
