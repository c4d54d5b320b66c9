"""What NVFP4 checkpoints call their tensors, and a look at a checkpoint's safetensors headers before it is loaded.

The frameworks' weight loaders answer a missing or misshapen scale with a bare assertion, or not at all. The headers say
what is wrong, in which tensor and which file, before a single weight has been read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from nvfp4_configs import CheckpointFormat
from nvfp4_kernels.formats import GROUP_SIZE

INDEX_FILE = "model.safetensors.index.json"

PACKED = "U8"
"""What headers call the type of NVFP4 codes, two in a byte."""
PLAIN = ("BF16", "F16", "F32", "F64")
"""What headers call the types of weights that need no scales, and of scales themselves but for those of blocks."""


@dataclass(frozen=True)
class TensorNames:
    """The last components of a quantized module's tensor names, and what its global scales mean."""

    weight: str
    scale: str
    global_scale: str
    input_scale: str
    divides: bool
    """Whether the two global scales are encode scales (the value is divided by them) instead of decode scales."""

    @property
    def dummy_scale(self) -> float:
        """What stands for a global or input scale where weights are random: outputs stay finite through many layers."""
        return 100.0 if self.divides else 0.01

    def decode(self, global_scale: torch.Tensor) -> torch.Tensor:
        """Stored global scales as fp32 decode scales."""
        global_scale = global_scale.to(torch.float32)
        return 1.0 / global_scale if self.divides else global_scale


MODELOPT = TensorNames("weight", "weight_scale", "weight_scale_2", "input_scale", divides=False)
COMPRESSED_TENSORS = TensorNames("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale", divides=True)


def tensor_names(checkpoint: CheckpointFormat) -> TensorNames:
    """The tensor names of a quantized checkpoint of this format."""
    return {"modelopt": MODELOPT, "compressed-tensors": COMPRESSED_TENSORS}[checkpoint.kind]


class TensorInfo(NamedTuple):
    """One entry of a safetensors header."""

    file: str
    dtype: str
    shape: tuple[int, ...]


class CheckpointIndex:
    """Where each tensor of a checkpoint lies, its dtype and shape."""

    def __init__(self, tensors: dict[str, TensorInfo]) -> None:
        self.tensors = tensors

    @classmethod
    def find(cls, model: str, revision: str | None = None) -> CheckpointIndex | None:
        """The index of a local folder, or of a hub model that lies whole in the local cache; None where there is neither.

        Raises ValueError naming the file if one of a folder is truncated or missing.
        """
        folder = Path(model)
        local = folder.is_dir()
        if not local:
            import huggingface_hub

            cached = huggingface_hub.try_to_load_from_cache(model, "config.json", revision=revision)
            if not isinstance(cached, str):
                return None
            folder = Path(cached).parent
        files = _weight_files(folder)
        missing = [file for file in files if not file.is_file()]
        if missing and local:
            raise ValueError(f"{folder / INDEX_FILE} names {missing[0].name}, which is missing")
        if missing or not files:
            return None
        return _read(tuple((file, file.stat().st_mtime_ns) for file in files))

    def file_of(self, tensor: str) -> str | None:
        """The file that holds `tensor`."""
        info = self.tensors.get(tensor)
        return info.file if info is not None else None

    def describe(self, tensor: str) -> str:
        """`tensor` with its file, for a message."""
        file = self.file_of(tensor)
        return f"{tensor} ({file})" if file else tensor

    def weight_of(self, module: str) -> TensorInfo | None:
        """The weight of `module`, quantized or not; None where the checkpoint has none under this name."""
        found = (self.tensors.get(f"{module}.{names.weight}") for names in (MODELOPT, COMPRESSED_TENSORS))
        return next((info for info in found if info is not None), None)

    def is_quantized(self, module: str) -> bool:
        """Whether the checkpoint holds `module` in NVFP4."""
        weight, scale = self.weight_of(module), self.tensors.get(f"{module}.{MODELOPT.scale}")
        return weight is not None and weight.dtype == PACKED and scale is not None and scale.dtype == "F8_E4M3"

    def quantized_modules(self) -> list[str]:
        """The modules that the checkpoint holds in NVFP4."""
        suffix = f".{MODELOPT.scale}"  # the one name that both formats share
        modules = (name.removesuffix(suffix) for name in self.tensors if name.endswith(suffix))
        return [module for module in modules if self.is_quantized(module)]

    def check(self, names: TensorNames) -> None:
        """ValueError naming tensor and file where a quantized module lacks one of its tensors or has one of another shape."""
        for tensor, info in self.tensors.items():
            module, _, last = tensor.rpartition(".")
            if last == names.weight and info.dtype == PACKED:
                self._check_module(module, info, names)
            elif last == names.scale and info.dtype == "F8_E4M3" and f"{module}.{names.weight}" not in self.tensors:
                raise ValueError(f"{tensor} in {info.file} has no weight beside it: {module}.{names.weight} is missing")

    def _check_module(self, module: str, weight: TensorInfo, names: TensorNames) -> None:
        scale = self._required(f"{module}.{names.scale}", weight)
        expected = (*weight.shape[:-1], weight.shape[-1] * 2 // GROUP_SIZE)
        if scale.dtype != "F8_E4M3" or scale.shape != expected:
            raise ValueError(
                f"{module}.{names.scale} in {scale.file} is {scale.dtype} {list(scale.shape)}, but "
                f"{module}.{names.weight} {list(weight.shape)} in NVFP4 needs F8_E4M3 {list(expected)}"
            )
        if weight.shape[-1] * 2 % GROUP_SIZE:
            raise ValueError(
                f"{module}.{names.weight} in {weight.file} has K = {weight.shape[-1] * 2}, "
                f"NVFP4 needs a multiple of {GROUP_SIZE}"
            )
        global_scale = self._required(f"{module}.{names.global_scale}", weight)
        if global_scale.shape not in ((), (1,), weight.shape[:-2]):
            raise ValueError(
                f"{module}.{names.global_scale} in {global_scale.file} has the shape {list(global_scale.shape)}, "
                "allowed is one value for each matrix"
            )
        for name in (names.global_scale, names.input_scale):
            info = self.tensors.get(f"{module}.{name}")
            if info is not None and info.dtype not in PLAIN:
                raise ValueError(f"{module}.{name} in {info.file} is {info.dtype}; allowed: {', '.join(PLAIN)}")

    def _required(self, tensor: str, weight: TensorInfo) -> TensorInfo:
        info = self.tensors.get(tensor)
        if info is None:
            raise ValueError(f"{tensor} is missing from the checkpoint; its weight is in {weight.file}")
        return info


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    return sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})


@lru_cache(maxsize=4)
def _read(files: tuple[tuple[Path, int], ...]) -> CheckpointIndex:
    """The headers of `files`; their modification times are there for the cache."""
    tensors: dict[str, TensorInfo] = {}
    for file, _ in files:
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 (not a dict)
                    view = handle.get_slice(name)
                    tensors[name] = TensorInfo(str(file), view.get_dtype(), tuple(view.get_shape()))
        except SafetensorError as error:
            raise ValueError(f"{file} is not a whole safetensors file ({error}): truncated, or not fully downloaded") from None
    return CheckpointIndex(tensors)
