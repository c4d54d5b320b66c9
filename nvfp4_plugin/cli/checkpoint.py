"""Checkpoints on disk: safetensors files of a Hugging Face model folder, read tensor by tensor."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvfp4_configs import Nvfp4Config

if TYPE_CHECKING:
    import torch

    from nvfp4_kernels import Nvfp4Weight

# What vLLM and SGLang run unquantized whatever the checkpoint says, or never as a linear layer: a router's choice of
# experts is discrete, and embeddings and normalizations are no matrix products.
NEVER_QUANTIZED = re.compile(r"(.*[._])?(gate|router|[^.]*norm[^.]*|[^.]*(embed|embedding)[^.]*|wte|wpe|rotary)(\.|$).*")
# Encoders of other modalities stay as they are, as in ModelOpt and in the serving frameworks.
OTHER_MODALITIES = re.compile(r".*(vision|visual|image|audio|speech|multi_modal_projector|mm_projector).*")
FUSED_GROUPS: tuple[tuple[str, ...], ...] = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Projections that serving frameworks run as one matrix."""
# Their linear layers keep [K, N], transposed: blocks of 16 would run along the wrong side.
TRANSPOSED_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or quantized; the message names the file, and the tensor if it is one's fault."""


class Checkpoint:
    """A folder with config.json and *.safetensors, none of it read before it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder}: got no config.json; allowed: a folder with a Hugging Face checkpoint")
        try:
            self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{folder / 'config.json'} is not JSON: {error}") from None
        self.files = sorted(folder.glob("*.safetensors"))
        if not self.files:
            raise CheckpointError(f"{folder}: got no *.safetensors files; allowed: weights in safetensors")
        quantization = self.config.get("quantization_config")
        if quantization or (folder / "hf_quant_config.json").is_file():
            method = (quantization or {}).get("quant_method", "hf_quant_config.json")
            raise CheckpointError(f"{folder} is quantized already ({method}); allowed: a bf16, fp16 or fp32 checkpoint")
        if self.config.get("model_type") in TRANSPOSED_MODELS:
            raise CheckpointError(
                f"{folder / 'config.json'}: model_type: got {self.config['model_type']!r}, which keeps linear weights "
                "transposed; allowed: models of nn.Linear layers"
            )

    @cached_property
    def file_of(self) -> dict[str, Path]:
        """Tensor name -> file."""
        from safetensors import SafetensorError, safe_open

        result: dict[str, Path] = {}
        for file in self.files:
            try:
                with safe_open(file, framework="pt") as tensors:
                    result |= dict.fromkeys(tensors.keys(), file)
            except SafetensorError as error:
                raise CheckpointError(f"{file} is not a whole safetensors file: {error}") from None
        return result

    def tensors(self, file: Path) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of one file, one at a time, on the CPU."""
        from safetensors import safe_open

        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                yield name, tensors.get_tensor(name)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor by name, on the CPU."""
        from safetensors import safe_open

        with safe_open(self.file_of[name], framework="pt") as tensors:
            return tensors.get_tensor(name)

    def linear_weights(self, config: Nvfp4Config) -> dict[str, str]:
        """Module -> shape as text, of the linear layers that `config` quantizes, by what names and shapes tell."""
        return {name: text for name, (text, reason) in self._candidates(config).items() if not reason}

    def left_alone(self, config: Nvfp4Config) -> dict[str, str]:
        """Module -> why, of the other two- and three-dimensional weights."""
        return {name: reason for name, (_, reason) in self._candidates(config).items() if reason}

    def _candidates(self, config: Nvfp4Config) -> dict[str, tuple[str, str]]:
        from safetensors import safe_open

        result = {}
        for file in self.files:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    shape = tensors.get_slice(name).get_shape()
                    if len(shape) < 2:
                        continue
                    module = name.removesuffix(".weight")
                    result[module] = (f"{list(shape)}", self._reason(name, shape, config))
        return result

    @staticmethod
    def _reason(name: str, shape: Sequence[int], config: Nvfp4Config) -> str:
        module = name.removesuffix(".weight")
        last = module.rpartition(".")[2]
        if not name.endswith(".weight") or len(shape) != 2:
            return "not a linear layer's weight"
        if last in ("lm_head", "output") and not config.lm_head:
            return "the head stays in bf16 unless asked (lm_head)"
        if NEVER_QUANTIZED.fullmatch(module):
            return "an embedding, a normalization or a router"
        if OTHER_MODALITIES.fullmatch(module):
            return "an encoder of another modality"
        if config.ignores(module):
            return "ignored"
        if shape[1] % 16:
            return f"K = {shape[1]} is not a multiple of 16"
        return ""

    def partners(self, module: str) -> list[str]:
        """The modules that run fused with `module`, itself included: q, k and v; gate and up."""
        parent, dot, last = module.rpartition(".")
        group = next((group for group in FUSED_GROUPS if last in group), (last,))
        every = [f"{parent}{dot}{part}" for part in group]
        return [module for module in every if f"{module}.weight" in self.file_of]

    def quantize(self, module: str, config: Nvfp4Config, weight: torch.Tensor, global_scale: Any = None) -> Nvfp4Weight:
        """`quantize_weight` whose errors name the tensor and its file."""
        from nvfp4_kernels import quantize_weight

        try:
            return quantize_weight(weight, scale_search=config.scale_search, global_scale=global_scale)
        except (TypeError, ValueError) as error:
            name = f"{module}.weight"
            raise CheckpointError(f"{name} in {self.file_of[name]}: {error}") from None


def sqnr(weight: torch.Tensor, quantized: Nvfp4Weight) -> float:
    """Signal to quantization noise, dB: 10 log10(sum w^2 / sum (w - q)^2); infinite where nothing was lost."""
    import math

    import torch

    reference = weight.to(torch.float32)
    noise = (reference - quantized.dequantize(torch.float32)).square_().sum(dtype=torch.float64).item()
    signal = reference.square().sum(dtype=torch.float64).item()
    return 10 * math.log10(signal / noise) if noise else math.inf


def warn_unmatched(config: Nvfp4Config, checkpoint: Checkpoint) -> list[str]:
    """A sentence for each `ignore` pattern that names no module of the checkpoint."""
    modules = [name.removesuffix(".weight") for name in checkpoint.file_of]
    return [f"ignore: {pattern!r} matches no module of {checkpoint.folder}" for pattern in config.unmatched(modules)]
