"""vLLM's `QuantizationConfig` for `--quantization nvfp4`: which layer gets which method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.platforms import current_platform

from nvfp4_kernels.dispatch import fuses

from ..plan import RESOLVED_KEY, QuantizationPlan, expert_parts, is_router, warn_misnamed

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper


class Nvfp4QuantizationConfig(QuantizationConfig):
    """Quantizes plain checkpoints while they load, and loads ModelOpt's and compressed-tensors' NVFP4 as they are."""

    def __init__(self, quantization_config: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.plan = QuantizationPlan(quantization_config)
        self._fused = False
        if not self.plan.online and self.plan.format.kind == "compressed-tensors":
            # vLLM's attention layer reads this attribute and stores the KV cache accordingly.
            self.kv_cache_scheme = (quantization_config or {}).get("kv_cache_scheme")

    def get_name(self) -> str:  # type: ignore[override]
        return "nvfp4"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        dtypes = [torch.bfloat16, torch.float16]
        return [*dtypes, torch.float32] if current_platform.is_cpu() else dtypes

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        # None to look for: a checkpoint without a quantization config is quantized online.
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Nvfp4QuantizationConfig:
        return cls(config)

    @classmethod
    def override_quantization_method(  # type: ignore[override]
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        # Claims ModelOpt's and compressed-tensors' checkpoints, but only for those who ask for it.
        return "nvfp4" if user_quant == "nvfp4" else None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        if (options := getattr(hf_config, "nvfp4", None)) is not None:
            # SGLang reads it there.
            raise ValueError(
                f"--hf-overrides nvfp4, or that key of config.json: got {options!r}, which nothing in vLLM reads; "
                "give options through --additional-config nvfp4"
            )
        self.plan.inspect(model_name, revision)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        self.plan.rename(hf_to_vllm_mapper.apply_list)

    def _configure(self) -> None:
        # Here and not in __init__: there is no current vLLM config when this object is made.
        config = get_current_vllm_config()
        additional = config.additional_config
        self.plan.configure(additional.get("nvfp4") if isinstance(additional, dict) else None)
        if isinstance(additional, dict):
            warn_misnamed(additional, "--additional-config")
            # vLLM reuses compiled graphs by a hash of its config, which covers this dictionary but neither the environment
            # nor a checkpoint's options.
            additional[RESOLVED_KEY] = self.plan.options.model_dump(mode="json")
        options = self.plan.options
        if fuses(torch.device(current_platform.device_type), options.activation, options.backend):
            from .fusion import install

            self._fused = install(config)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from vllm.model_executor.layers.attention import Attention, MLAAttention
        from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
        from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        from .linear import Nvfp4LinearMethod, Nvfp4OnlineLinearMethod
        from .moe import Nvfp4MoEMethod, Nvfp4OnlineExpertsMethod

        if not self.plan.configured:
            self._configure()
        if isinstance(layer, RoutedExperts):
            names = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
            parts = expert_parts(layer.moe_config.num_logical_experts, [name for name in names if name])
            packed = {prefix.rpartition(".")[2]: parts}
            if not self.plan.quantizes(prefix, packed):
                return None
            method = Nvfp4OnlineExpertsMethod if self.plan.online else Nvfp4MoEMethod
            return method(self.plan, layer.moe_config)
        if isinstance(layer, LinearBase | ParallelLMHead):
            quantized = self.plan.quantizes(
                prefix,
                self.packed_modules_mapping,
                lm_head=isinstance(layer, ParallelLMHead),
                router=isinstance(layer, GateLinear) or is_router(prefix),
            )
            if not quantized:
                # None lets an LM head use the method of embeddings.
                return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
            linear = Nvfp4OnlineLinearMethod if self.plan.online else Nvfp4LinearMethod
            return linear(self.plan, prefix, self.packed_modules_mapping, self._fused)
        if isinstance(layer, Attention | MLAAttention) and not self.plan.online and self.plan.format.kv_cache:
            return BaseKVCacheMethod(self)
        return None
