"""Routed experts in vLLM. Tokens come with their experts chosen, and every rank sees all of them: with tensor parallelism it
holds a slice of each expert, with expert parallelism some experts whole (`expert_map`), and vLLM adds up what the ranks give.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import FusedMoeWeightScaleSupported
from vllm.model_executor.layers.quantization.utils.quant_utils import amax_for_moe_weight_quant
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.utils import set_weight_attrs

from nvfp4_kernels import Nvfp4Weight, nvfp4_fused_moe
from nvfp4_kernels.formats import GROUP_SIZE
from nvfp4_kernels.reference.moe import ACT_FNS, SWIGLU_OAI_ALPHA, SWIGLU_OAI_LIMIT

from .. import layers
from ..plan import QuantizationPlan
from ..warmup import warm_up_moe
from .loading import Layer, Received, check_loaded, codes, counted, loads_dummy_weights


class _MoEMethod(FusedMoEMethodBase):
    """What both methods share: the forward pass, and the parameters that it reads."""

    def __init__(self, plan: QuantizationPlan, moe: FusedMoEConfig) -> None:
        super().__init__(moe)
        self.plan = plan
        self._dummy = loads_dummy_weights()
        self._names = {prefix: layers.parameter_names(plan.names, f"{prefix}_") for prefix in ("w13", "w2")}
        # Plain strings: torch.compile may trace what `apply` reads.
        self._activation: str = plan.options.activation
        self._backend = layers.experts_backend(plan.options)

    def get_fused_moe_quant_config(self, layer: Layer) -> FusedMoEQuantConfig | None:
        return None  # for vLLM's own kernels

    def _set_up(self, layer: Layer, hidden: int, intermediate: int, dtype: torch.dtype) -> None:
        """Check what the kernels need, and set what vLLM expects to find on a layer."""
        name, act_fn = layer.layer_name, layer.activation.value
        layers.check_input_size(f"{name} (hidden size)", hidden)
        layers.check_input_size(f"{name} (intermediate size)", intermediate, self.moe.tp_size)
        if act_fn not in ACT_FNS:
            raise ValueError(f"{name}: got the activation {act_fn!r}; allowed: {', '.join(map(repr, ACT_FNS))}")
        given = (layer.swiglu_limit, layer.swiglu_alpha, layer.swiglu_beta)
        served = (SWIGLU_OAI_LIMIT, SWIGLU_OAI_ALPHA, 1.0) if act_fn.startswith("swigluoai") else (None,) * 3
        if any(value not in (None, ours) for value, ours in zip(given, served, strict=True)):
            raise ValueError(
                f"{name}: got swiglu limit, alpha and beta {given} for the activation {act_fn!r}; allowed: {served}"
            )
        layer.orig_dtype = dtype
        # Rows that take turns in the checkpoint are put below each other once they are quantized.
        self._act_fn = "swigluoai_uninterleave" if act_fn == "swigluoai" else act_fn
        # The rows of w13: gate and up below each other, or taking turns, which is one matrix to a quantizer.
        gated = self.moe.is_act_and_mul and act_fn != "swigluoai"
        rows = intermediate * self.moe.w13_num_shards
        self._widths = {"w13": [intermediate] * 2 if gated else [rows], "w2": [hidden]}

    def _biases(self, layer: Layer, experts: int, dtype: torch.dtype, attrs: dict[str, Any]) -> None:
        for prefix, widths in self._widths.items():
            bias = None
            if self.moe.has_bias:
                bias = _OfAllExperts(torch.zeros(experts, sum(widths), dtype=dtype), requires_grad=False)
                set_weight_attrs(bias, attrs)
            layer.register_parameter(f"{prefix}_bias", bias)

    def _parts(self, layer: Layer, prefix: str) -> Callable[[int], list[str]]:
        """The checkpoint's names of a local expert's matrices."""
        w13 = [layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name]
        projections = (w13 if prefix == "w13" else [layer.ckpt_down_proj_name])[: len(self._widths[prefix])]
        global_ids: list[int] = list(range(layer.local_num_experts))
        if layer.expert_map is not None:
            local = layer.expert_map.tolist()
            global_ids = [local.index(expert) for expert in global_ids]
        return lambda expert: [f"{layer.layer_name}.{global_ids[expert]}.{name}" for name in projections]

    def _install(self, layer: Layer, prefix: str, weight: Nvfp4Weight, input_scale: torch.Tensor | None) -> None:
        layers.install(layer, weight.prepared(self._activation), self._names[prefix])
        layers.set_parameter(layer, f"{prefix}_input_decode_scale", input_scale)

    def _finish(self, layer: Layer) -> None:
        """Both weights are installed."""
        layer._already_called_process_weights_after_loading = True
        w13 = layers.installed(layer._parameters, self._names["w13"])
        warm_up_moe(
            w13.shape,
            layer.orig_dtype,
            w13.data.device,
            lambda x, topk_weights, topk_ids: self.apply(layer, x, topk_weights, topk_ids, None, None),
            self._activation,
            self._backend,
            self._act_fn,
            w13.global_scale.dim(),
            layer.w13_bias is not None,
            layer.expert_map is not None,
            layer.apply_router_weight_on_input,
            experts=layer.global_num_experts,
            top_k=layer.top_k,
        )

    def apply(  # type: ignore[override]
        self,
        layer: Layer,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: torch.nn.Module | None,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        # Shared experts are for kernels that overlap them with communication; vLLM runs them itself otherwise.
        input_scales = None
        if self.plan.uses_input_scales:
            input_scales = (layer.w13_input_decode_scale, layer.w2_input_decode_scale)
        return nvfp4_fused_moe(
            x,
            layers.installed(layer._parameters, self._names["w13"]),
            layers.installed(layer._parameters, self._names["w2"]),
            topk_weights,
            topk_ids,
            activation=self._activation,
            act_fn=self._act_fn,
            input_scales=input_scales,
            w13_bias=layer.w13_bias,
            w2_bias=layer.w2_bias,
            expert_map=layer.expert_map,
            apply_router_weight_on_input=layer.apply_router_weight_on_input,
            backend=self._backend,
        )


class Nvfp4MoEMethod(_MoEMethod):
    """Experts that the checkpoint holds in NVFP4."""

    def create_weights(  # type: ignore[override]
        self,
        layer: Layer,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        self._set_up(layer, hidden_size, intermediate_size_per_partition, params_dtype)
        if layer.activation.value == "swigluoai":
            raise ValueError(
                f"{layer.layer_name}: experts with gate and up rows in turn (swigluoai) can be quantized while they load, "
                "but not loaded from an NVFP4 checkpoint, whose scales are gate's and up's own"
            )
        self.received = Received()
        names, attrs = self.plan.names, {**extra_weight_attrs, "weight_loader": MethodType(_load_counted, layer)}
        for prefix, k in (("w13", hidden_size), ("w2", intermediate_size_per_partition)):
            n, shards = sum(self._widths[prefix]), self.moe.w13_num_shards if prefix == "w13" else 1
            # w2 has one value for each expert, w13 one for each of its matrices.
            scalars = (num_experts, shards) if prefix == "w13" else (num_experts,)
            self._parameter(layer, f"{prefix}_{names.weight}", codes(num_experts, n, k // 2), attrs)
            self._parameter(
                layer,
                f"{prefix}_{names.scale}",
                layers.unloaded(num_experts, n, k // GROUP_SIZE, dtype=torch.float8_e4m3fn),
                {**attrs, "quant_method": FusedMoeWeightScaleSupported.BLOCK.value, "dummy_weight_value": 1.0},
            )
            tensor_attrs = {
                **extra_weight_attrs,
                "weight_loader": MethodType(_load_scalar, layer),
                "dummy_weight_value": names.dummy_scale,
            }
            for name in [names.global_scale, *([names.input_scale] if self.plan.static_activations else [])]:
                scalar = layers.unloaded(*scalars, dtype=torch.float32)
                self._parameter(layer, f"{prefix}_{name}", scalar, tensor_attrs)
        self._biases(layer, num_experts, params_dtype, extra_weight_attrs)

    @staticmethod
    def _parameter(layer: Layer, name: str, data: torch.Tensor, attrs: dict[str, Any]) -> None:
        parameter = torch.nn.Parameter(data, requires_grad=False)
        layer.register_parameter(name, parameter)
        set_weight_attrs(parameter, attrs)

    def process_weights_after_loading(self, layer: Layer) -> None:
        if getattr(layer, "_already_called_process_weights_after_loading", False):
            return
        self.plan.warn_unmatched()
        required = [f"{prefix}_{name}" for prefix in self._widths for name in self.plan.required]
        self.received.check(layer, layer.layer_name, required, self._dummy)
        names = self.plan.names
        for prefix, widths in self._widths.items():
            parts = self._parts(layer, prefix)
            global_scales = getattr(layer, f"{prefix}_{names.global_scale}").data
            weight = layers.load_experts(
                getattr(layer, f"{prefix}_{names.weight}").data,
                getattr(layer, f"{prefix}_{names.scale}").data,
                global_scales.view(global_scales.shape[0], -1),
                widths,
                parts,
                names,
                describe=self.plan.describe,
            )
            input_scale = None
            if self.plan.uses_input_scales:
                stored = getattr(layer, f"{prefix}_{names.input_scale}").data
                stored = stored.view(stored.shape[0], -1)
                input_scale = layers.load_input_scales(stored, parts, names, describe=self.plan.describe)
            self._install(layer, prefix, weight, input_scale)
        self._finish(layer)


@counted
def _load_counted(
    layer: Layer, param: torch.nn.Parameter, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any
) -> bool | None:
    """The layer's own weight loader. A method of the layer: see `linear._load_plain`."""
    return layer.weight_loader(param, loaded_weight, *args, **kwargs)


@counted
def _load_scalar(
    layer: Layer,
    param: torch.nn.Parameter,
    loaded_weight: torch.Tensor,
    weight_name: str,
    shard_id: str,
    expert_id: int,
    return_success: bool = False,
) -> bool | None:
    """Load one value per matrix. The layer's own loader spreads w1's and w3's input scale over each other.

    A method of the layer: see `linear._load_plain`.
    """
    expert = layer._map_global_expert_id_to_local_expert_id(expert_id)
    if expert != -1:
        slot = param.data[expert]
        if shard_id != "w2":
            slot = slot[0 if shard_id == "w1" else 1]
        slot.copy_(loaded_weight.reshape(()))
    return expert != -1 if return_success else None


_load_counted.supports_moe_loading = True  # type: ignore[attr-defined]
_load_scalar.supports_moe_loading = True  # type: ignore[attr-defined]


class Nvfp4OnlineExpertsMethod(_MoEMethod):
    """Experts whose plain weights are quantized, one by one, as soon as a layer's have come; until then they take no memory.

    vLLM collects what the checkpoint holds for a layer, without copying it, makes memory for the layer's parameters, and loads.
    Here a parameter has the shape of all experts and the memory of one (stride 0), and loading an expert waits until its turn
    to be quantized: ranks with shards of the same experts take them in the same order, whatever the order they came in.
    """

    uses_meta_device = True

    def create_weights(  # type: ignore[override]
        self,
        layer: Layer,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        self._set_up(layer, hidden_size, intermediate_size_per_partition, params_dtype)
        self._loads = _no_loads()
        # vLLM's dummy loader cannot draw numbers for experts that share their memory, but fill it: see `_draw`.
        attrs = {**extra_weight_attrs, "weight_loader": MethodType(_load_later, layer), "dummy_weight_value": 0.0}
        for prefix, k in (("w13", hidden_size), ("w2", intermediate_size_per_partition)):
            data = torch.empty(1, sum(self._widths[prefix]), k, dtype=params_dtype, device="meta")
            weight = _OfAllExperts(data.expand(num_experts, -1, -1), requires_grad=False)
            layer.register_parameter(f"{prefix}_weight", weight)
            set_weight_attrs(weight, attrs)
        with torch.device("meta"):
            self._biases(layer, num_experts, params_dtype, attrs)
        initialize_online_processing(layer)

    def load_later(self, prefix: str, expert: int, load: Callable[[], Any]) -> None:
        """Call `load` when `expert`, a local one, is about to be quantized."""
        self._loads[prefix][expert].append(load)

    def process_weights_after_loading(self, layer: Layer) -> None:
        if getattr(layer, "_already_called_process_weights_after_loading", False):
            return
        self.plan.warn_unmatched()
        loads, self._loads = self._loads, _no_loads()
        dummy = self._dummy and not any(loads.values())
        check_loaded(layer, layer.layer_name, dummy)
        for prefix, widths in self._widths.items():
            stack = getattr(layer, f"{prefix}_weight").data
            weight = layers.quantize_experts(
                stack,
                widths,
                self._parts(layer, prefix),
                scale_search=self.plan.options.scale_search,
                describe=self.plan.describe,
                reduce_max=(lambda amax: amax_for_moe_weight_quant(amax, self.moe.tp_size)) if self.moe.tp_size > 1 else None,
                load=_draw(stack[0]) if dummy else _load(stack[0], loads[prefix]),
            )
            if prefix == "w13" and layer.activation.value == "swigluoai":
                bias = () if layer.w13_bias is None else (layer.w13_bias.data,)
                layers.part_rows(weight.data, weight.scales.view(torch.uint8), *bias)
            self._install(layer, prefix, weight, None)
        self._finish(layer)


_THIS_RANKS = "this rank's"
"""In place of a shard's name: the tensor holds just what the parameter is to hold."""


class _OfAllExperts(torch.nn.Parameter):
    """A parameter that has no memory yet and gets its values later, also from models that copy a tensor of all experts into it
    (gpt-oss) instead of calling its loader."""

    weight_loader: Callable[..., object]

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if not self.is_meta:
            return super().copy_(source, non_blocking)
        self.weight_loader(self, source, "", shard_id=_THIS_RANKS, expert_id=0)
        return self


def _no_loads() -> dict[str, dict[int, list[Callable[[], Any]]]]:
    return {"w13": defaultdict(list), "w2": defaultdict(list)}


def _load(memory: torch.Tensor, loads: dict[int, list[Callable[[], Any]]]) -> Callable[[int], None]:
    """Loads an expert into `memory` [N, K]."""

    def load(expert: int) -> None:
        memory.fill_(float("nan"))  # what does not come is refused, and not taken from the expert before
        for call in loads.pop(expert, ()):
            call()

    return load


def _draw(memory: torch.Tensor) -> Callable[[int], None]:
    """Fills `memory` with what vLLM's dummy loader gives other weights."""
    generator = torch.Generator(device=memory.device).manual_seed(0)

    def draw(expert: int) -> None:
        memory.uniform_(-1e-3, 1e-3, generator=generator)

    return draw


def _load_later(
    layer: Layer,
    param: torch.nn.Parameter,
    loaded_weight: torch.Tensor,
    weight_name: str,
    shard_id: str,
    expert_id: int,
    return_success: bool = False,
) -> bool | None:
    """The layer's own weight loader, put off where there is memory for one expert at a time.

    vLLM calls it on a meta tensor first, to count what it loads, and on a layer's real parameters once all has come. What may
    follow after that are the experts of other ranks, which the layer's loader passes over.

    A method of the layer: see `linear._load_plain`.
    """
    prefix = {id(layer.w13_weight): "w13", id(layer.w2_weight): "w2"}.get(id(param))
    if shard_id == _THIS_RANKS:
        for expert in range(param.shape[0]):
            copy = partial(param.data[expert].copy_, loaded_weight[expert])
            if param.is_meta or prefix is None:
                copy()
            else:
                layer.quant_method.load_later(prefix, expert, copy)
        return None
    local = layer._map_global_expert_id_to_local_expert_id(expert_id)
    if param.is_meta or local == -1 or prefix is None:
        return layer.weight_loader(param, loaded_weight, weight_name, shard_id, expert_id, return_success)
    # A tensor of all experts is taken apart: the layer's loader would write each over the one before.
    parts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {local: (param, loaded_weight)}
    if loaded_weight.dim() == 3:
        parts = {i: (param[:1], loaded_weight[i : i + 1]) for i in range(param.shape[0])}
    for expert, (memory, part) in parts.items():
        layer.quant_method.load_later(
            prefix, expert, partial(layer.weight_loader, memory, part, weight_name, shard_id, expert_id)
        )
    return True if return_success else None


_load_later.supports_moe_loading = True  # type: ignore[attr-defined]
