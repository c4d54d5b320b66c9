"""SGLang's `QuantizationConfig` for `--quantization nvfp4`: which layer gets which method."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from sglang.srt.model_loader.checkpoint_quantization import resolve_checkpoint_quant_spec

from ..plan import QuantizationPlan, expert_parts, is_router, warn_misnamed

if TYPE_CHECKING:
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.models.utils import WeightsMapper

logger = logging.getLogger("nvfp4_plugin")

LEGACY_FILE = "hf_quant_config.json"
OPTIONS_KEY = "nvfp4"
"""Key of the model's config that holds options: `--json-model-override-args '{"nvfp4": {...}}'` sets it."""
OPTIONS_CHANNEL = f"--json-model-override-args {OPTIONS_KEY}"

PACKED_MODULES = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    "fused_qkv_a_proj_with_mqa": ["q_a_proj", "kv_a_proj_with_mqa"],
}
"""Fused modules that many of SGLang's models build without a `packed_modules_mapping` that says so."""

_READ_DIRECTLY = ("kv_b_proj",)
"""Layers whose weight SGLang's models multiply themselves (MLA's absorbed projection) instead of calling the layer."""


class Nvfp4QuantizationConfig(QuantizationConfig):
    """Quantizes plain checkpoints while they load, and loads ModelOpt's and compressed-tensors' NVFP4 as they are.

    `quantization_config` is the checkpoint's dict, None for one that is not quantized. `additional` holds options from the
    command line; `dummy` says that random weights take the place of a checkpoint's.
    """

    def __init__(
        self,
        quantization_config: Mapping[str, Any] | None = None,
        *,
        packed_modules: Mapping[str, Sequence[str]] | None = None,
        additional: Mapping[str, Any] | None = None,
        dummy: bool = False,
    ) -> None:
        super().__init__()
        self.plan = QuantizationPlan(quantization_config, OPTIONS_CHANNEL)
        self.plan.configure(additional)
        self.dummy = dummy
        self.packed_modules_mapping = {**PACKED_MODULES, **(packed_modules or {})}
        # SGLang chooses the type of the KV cache by this attribute.
        self.kv_cache_quant_algo = None if self.plan.online else self.plan.format.kv_cache

    def get_name(self) -> str:
        return "nvfp4"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        dtypes = [torch.bfloat16, torch.float16]
        return dtypes if torch.cuda.is_available() else [*dtypes, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        # None to look for: `make_config` finds the file of older ModelOpt checkpoints, and its absence is no error.
        return []

    def get_scaled_act_names(self) -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Nvfp4QuantizationConfig:
        # SGLang adds keys of its own to the checkpoint's.
        own = {key: value for key, value in config.items() if key not in ("packed_modules_mapping", "hf_config")}
        return cls(own, packed_modules=config.get("packed_modules_mapping"))

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: dict[str, Any] | None, user_quant: str | None) -> str | None:
        # Claims ModelOpt's and compressed-tensors' checkpoints, but only for those who ask for it.
        return "nvfp4" if user_quant == "nvfp4" else None

    def update_packed_modules_mapping(self, mapping: dict[str, list[str]]) -> None:
        self.packed_modules_mapping = {**self.packed_modules_mapping, **mapping}

    def apply_weight_name_mapper(self, hf_to_sglang_mapper: WeightsMapper) -> None:
        self.plan.rename(hf_to_sglang_mapper.apply_list)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from sglang.srt.layers.linear import LinearBase
        from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
        from sglang.srt.layers.quantization.kv_cache import BaseKVCacheMethod
        from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
        from sglang.srt.layers.radix_attention import RadixAttention
        from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead

        from .linear import Nvfp4LinearMethod, Nvfp4OnlineLinearMethod
        from .moe import Nvfp4MoEMethod, Nvfp4OnlineMoEMethod

        if isinstance(layer, FusedMoE):
            projections = self.plan.expert_projections(prefix)
            packed = {prefix.rpartition(".")[2]: expert_parts(layer.num_experts, projections)}
            if not self.plan.quantizes(prefix, packed):
                return None
            return (Nvfp4OnlineMoEMethod if self.plan.online else Nvfp4MoEMethod)(self, prefix, projections)
        if isinstance(layer, LinearBase | ParallelLMHead):
            is_head = isinstance(layer, ParallelLMHead)
            packed_modules = self.packed_modules_mapping
            if not self._runs_as_layer(prefix) or not self.plan.quantizes(
                prefix, packed_modules, lm_head=is_head, router=is_router(prefix)
            ):
                # None lets an LM head use the method of embeddings.
                return None if is_head else UnquantizedLinearMethod()
            return (Nvfp4OnlineLinearMethod if self.plan.online else Nvfp4LinearMethod)(self, prefix)
        if isinstance(layer, RadixAttention) and self.kv_cache_quant_algo:
            return BaseKVCacheMethod(self)
        return None

    def _runs_as_layer(self, prefix: str) -> bool:
        """Whether the model calls the layer, so that it can be quantized."""
        if prefix.rpartition(".")[2] not in _READ_DIRECTLY:
            return True
        if not self.plan.online and self.plan.quantizes(prefix):
            raise ValueError(
                f"{prefix} is in NVFP4 in this checkpoint, but SGLang's model multiplies its weight itself; such checkpoints "
                "cannot be served"
            )
        return False


def make_config(
    get_quant_config: Callable[..., QuantizationConfig],
    model_config: ModelConfig,
    load_config: LoadConfig,
    packed_modules_mapping: dict[str, list[str]],
    remap_prefix: dict[str, str] | None = None,
) -> QuantizationConfig:
    """Hook around SGLang's function of that name, which knows only one of the places of a ModelOpt checkpoint's config:
    an `nvfp4` without any is online, and this one also looks into the checkpoint before it is loaded."""
    if model_config.quantization != "nvfp4":
        return get_quant_config(model_config, load_config, packed_modules_mapping, remap_prefix)
    warn_misnamed(vars(model_config.hf_config), "--json-model-override-args")
    spec = resolve_checkpoint_quant_spec(model_config.hf_config)
    config = Nvfp4QuantizationConfig(
        _legacy_config(model_config) if spec is None else spec.config,
        packed_modules=packed_modules_mapping,
        additional=getattr(model_config.hf_config, OPTIONS_KEY, None),
        dummy=str(getattr(load_config.load_format, "value", load_config.load_format)) == "dummy",
    )
    if remap_prefix:
        config.plan.rename(lambda names: [_replace_prefix(name, remap_prefix) for name in names])
    config.plan.inspect(model_config.model_path, model_config.revision)
    return config


def _replace_prefix(name: str, prefixes: Mapping[str, str]) -> str:
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _legacy_config(model_config: ModelConfig) -> dict[str, Any] | None:
    """hf_quant_config.json beside the weights, where older ModelOpt checkpoints say what they are; SGLang has fetched it."""
    path = Path(model_config.model_path) / LEGACY_FILE
    if not Path(model_config.model_path).is_dir():
        import huggingface_hub

        cached = huggingface_hub.try_to_load_from_cache(model_config.model_path, LEGACY_FILE, revision=model_config.revision)
        if not isinstance(cached, str):
            return None
        path = Path(cached)
    return json.loads(path.read_text()) if path.is_file() else None
