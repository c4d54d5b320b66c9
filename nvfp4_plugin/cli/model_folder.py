"""Folders of unquantized models: their linear layers, by what names and shapes tell, read tensor by tensor."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvfp4_configs import Nvfp4Config, PackedModules
from nvfp4_configs.patterns import first_names, matches_parts
from nvfp4_plugin.cli.errors import CommandError, say

if TYPE_CHECKING:
    import torch

    from nvfp4_kernels import Nvfp4Weight
    from nvfp4_plugin.checkpoint import CheckpointIndex

# No matrix products; checkpoints of some models keep them as plain 2-D `weight`s all the same.
NO_LINEAR_LAYER = re.compile(r"(.*[._])?(wte|wpe|[^.]*(norm|embed|rotary)[^.]*)(\..*)?")
# Encoders of other modalities stay as they are, as in ModelOpt.
OTHER_MODALITY = re.compile(r".*(vision|visual|image|audio|speech|multi_modal_projector|mm_projector).*")
HEADS = ("lm_head", "output", "embed_out")
FUSED: PackedModules = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "w13": ("w1", "w3"),
}
"""Projections that serving frameworks run as one matrix, by the name of that."""
EXPERT = re.compile(r"(.*\.experts)\.\d+\..*")
"""A routed expert's projection: serving frameworks run all experts of a block as one module."""
STACKED_EXPERTS = re.compile(r".*\.(experts\.(?!\d+\.)|block_sparse_moe\.(input|output)_linear).*")
"""A tensor of all routed experts of a block, in models such as gpt-oss, Llama 4 and Granite."""
STACKED = "stacked experts are quantized only while they load: serve the bf16 model itself with --quantization nvfp4"
ODD_K = "K = "
# Their linear layers keep [K, N], transposed: blocks of 16 would run along the wrong side.
TRANSPOSED_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")


class ModelError(CommandError):
    """A model that cannot be read or quantized; the message names the file, and the tensor if it is one's fault."""


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model; ModelError if there is none."""
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"{folder}: got no config.json; allowed: the folder of a Hugging Face model")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # that of text that is not UTF-8 is one, too
        raise ModelError(f"{file} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{file}: got {config!r}; allowed: a JSON object")
    return config


class ModelFolder:
    """A folder with config.json and *.safetensors of an unquantized model. ModelError if it is none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_config(folder)
        quantization = self.config.get("quantization_config")
        if quantization or (folder / "hf_quant_config.json").is_file():
            method = quantization or "hf_quant_config.json"
            if isinstance(method, dict):
                method = method.get("quant_method", "no quant_method")
            raise ModelError(f"{folder} is quantized already ({method}); allowed: a bf16, fp16 or fp32 model")
        if self.config.get("model_type") in TRANSPOSED_MODELS:
            raise ModelError(
                f"{folder / 'config.json'}: model_type: got {self.config['model_type']!r}, which keeps linear weights "
                "transposed; allowed: models of nn.Linear layers"
            )

    @cached_property
    def index(self) -> CheckpointIndex:
        """The headers of the safetensors files."""
        from nvfp4_plugin.checkpoint import CheckpointIndex

        try:
            index = CheckpointIndex.find(str(self.folder))
        except ValueError as error:
            raise ModelError(str(error)) from None
        if index is None:
            raise ModelError(f"{self.folder}: got no *.safetensors files; allowed: weights in safetensors")
        return index

    @property
    def files(self) -> list[Path]:
        """The files that hold the weights, in the order of their names."""
        return sorted({Path(info.file) for info in self.index.tensors.values()})

    def tensors(self, file: Path) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of one file, one at a time, on the CPU."""
        from safetensors import safe_open

        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                yield name, handle.get_tensor(name)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor by name, on the CPU."""
        from safetensors import safe_open

        with safe_open(self.index.tensors[name].file, framework="pt") as handle:
            return handle.get_tensor(name)

    def linear_layers(self, config: Nvfp4Config) -> list[str]:
        """The modules that `config` quantizes; ModelError if there are none."""
        layers = [module for module, reason in self._reasons(config).items() if not reason]
        if not layers:
            raise ModelError(f"{self.folder}: found no linear layer to quantize under {config}")
        return layers

    def left_alone(self, config: Nvfp4Config) -> dict[str, str]:
        """Module -> why it is not quantized, of the other weights of two dimensions and more."""
        return {module: reason for module, reason in self._reasons(config).items() if reason}

    def _reasons(self, config: Nvfp4Config) -> dict[str, str]:
        return {
            name.removesuffix(".weight"): _reason(name, info.shape, config)
            for name, info in self.index.tensors.items()
            if len(info.shape) > 1
        }

    def warn(self, config: Nvfp4Config) -> None:
        """Say what of `config` means nothing here, and which layers stay as they are though nobody asked for it."""
        modules = [name.rpartition(".")[0] for name in self.index.tensors]
        for pattern in config.unmatched(modules):
            say("warning", f"ignore: {pattern!r} matches no module of {self.folder}", "yellow")
        if config.lm_head and (
            self.config.get("tie_word_embeddings") or not any(module.rpartition(".")[2] in HEADS for module in modules)
        ):
            say("warning", f"lm_head: {self.folder} has no head of its own, its embeddings serve as one and stay", "yellow")
        left: dict[str, list[str]] = defaultdict(list)
        for module, reason in self.left_alone(config).items():
            if reason == STACKED or reason.startswith(ODD_K):
                left[reason].append(module)
        for reason, names in left.items():
            say("warning", f"not quantized: {first_names(names)}: {reason}", "yellow")

    def check(self, config: Nvfp4Config) -> None:
        """ModelError where frameworks could not serve what `nvfp4 quantize` would write.

        `ignore` or an odd K may leave only some of the layers that run as one and cannot be half quantized; beside experts
        in bf16 not every framework reads the other layers in NVFP4.
        """
        left_alone = self.left_alone(config)
        if stacked := next(filter(STACKED_EXPERTS.fullmatch, left_alone), None):
            raise ModelError(f"{self.index.describe(stacked)}: {STACKED}, whatever `ignore` says")
        fused: dict[str, list[str]] = defaultdict(list)
        for module in self.linear_layers(config.model_copy(update={"ignore": ()})):
            fused[_runs_as(module)].append(module)
        for name, parts in fused.items():
            try:
                matches_parts(config.ignore, name, parts)
            except ValueError as error:
                raise ModelError(f"ignore: {error}") from None
        quantized = {_runs_as(module): module for module in self.linear_layers(config)}
        for module, reason in left_alone.items():
            name = _runs_as(module)
            if reason.startswith(ODD_K) and name in quantized:
                raise ModelError(f"{module}: {reason}, and it runs as one with {quantized[name]}: add {name} to ignore")

    def partners(self, module: str) -> list[str]:
        """The modules that run fused with `module`, itself included: q, k and v; gate and up."""
        parent, dot, last = module.rpartition(".")
        group = next((parts for parts in FUSED.values() if last in parts), (last,))
        every = [f"{parent}{dot}{part}" for part in group]
        return [partner for partner in every if f"{partner}.weight" in self.index.tensors]

    def quantize(self, module: str, config: Nvfp4Config, weight: torch.Tensor, global_scale: Any = None) -> Nvfp4Weight:
        """`quantize_weight` of a module's weight; the ModelError names the tensor and its file."""
        from nvfp4_kernels import quantize_weight

        try:
            return quantize_weight(weight, scale_search=config.scale_search, global_scale=global_scale)
        except (TypeError, ValueError) as error:
            raise ModelError(f"{self.index.describe(f'{module}.weight')}: {error}") from None


def _runs_as(module: str) -> str:
    """The module that serving frameworks run `module` as, or as a part of."""
    if expert := EXPERT.fullmatch(module):
        return expert[1]
    parent, dot, last = module.rpartition(".")
    return parent + dot + next((fused for fused, parts in FUSED.items() if last in parts), last)


def _reason(name: str, shape: Sequence[int], config: Nvfp4Config) -> str:
    """Why the tensor is not quantized; empty if it is."""
    from nvfp4_plugin.plan import is_router

    module = name.removesuffix(".weight")
    if STACKED_EXPERTS.fullmatch(module):
        return "ignored" if config.ignores(module) else STACKED
    if name == module or len(shape) != 2:
        return "not a linear layer's weight"
    if module.rpartition(".")[2] in HEADS and not config.lm_head:
        return "the head stays as it is unless asked (lm_head)"
    if is_router(module):
        return "a router"
    if NO_LINEAR_LAYER.fullmatch(module) and module.rpartition(".")[2] not in HEADS:
        return "not a linear layer"
    if OTHER_MODALITY.fullmatch(module):
        return "an encoder of another modality"
    if config.ignores(module):
        return "ignored"
    if shape[1] % 16:
        return f"{ODD_K}{shape[1]} is not a multiple of 16"
    return ""


def sqnr(weight: torch.Tensor, quantized: Nvfp4Weight) -> float:
    """Signal to quantization noise, dB: 10 log10(sum w^2 / sum (w - q)^2); infinite where nothing was lost."""
    import torch

    reference = weight.to(torch.float32)
    noise = (reference - quantized.dequantize(torch.float32)).square_().sum(dtype=torch.float64).item()
    signal = reference.square().sum(dtype=torch.float64).item()
    return 10 * math.log10(signal / noise) if noise else math.inf


def mean_finite(values: Sequence[float]) -> float:
    """The mean of the finite values; infinite if there are none."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.inf
