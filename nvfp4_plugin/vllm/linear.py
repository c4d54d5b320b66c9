"""Dense layers in vLLM: one method for plain weights, which are quantized while they load, one for NVFP4 checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    RowParallelLinear,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import amax_for_tp_weight_quant
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info, initialize_online_processing
from vllm.model_executor.model_loader.reload.utils import get_layer_size
from vllm.model_executor.parameter import GroupQuantScaleParameter, ModelWeightParameter, PerTensorScaleParameter
from vllm.model_executor.utils import set_weight_attrs

from nvfp4_configs import PackedModules
from nvfp4_kernels import Nvfp4Weight, nvfp4_linear
from nvfp4_kernels.formats import GROUP_SIZE

from .. import layers
from ..plan import QuantizationPlan
from ..warmup import warm_up_fused_linear, warm_up_linear
from .loading import Layer, Received, check_loaded, codes, counted, loads_dummy_weights


def _load(layer: Layer, param: torch.Tensor, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """The layer's own weight loader. What it says of a tensor that does not fit names neither layer nor tensor."""
    method = layer.quant_method
    try:
        return getattr(layer, method.loader)(param, loaded_weight, *args, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, IndexError, RuntimeError) as error:
        part = f", {args[0]} of it" if args and args[0] is not None else ""
        raise ValueError(
            f"{method.plan.describe(f'{method.prefix}.weight')}{part}: the checkpoint has a tensor {list(loaded_weight.shape)} "
            f"for a parameter {list(param.shape)} of this rank: {error or 'it does not fit'}"
        ) from error


def _load_plain(layer: Layer, param: torch.Tensor, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """The layer's own weight loader, for a weight that is quantized when it is whole.

    vLLM waits for the layer's bias as well, of which it misses what comes before the weight, as it does in checkpoints that
    are sorted by name: the layer would keep its plain weight until all others are loaded. Nothing needs the bias.

    It is a method of the layer because vLLM keeps loaders for a reload, and of those it knows how not to keep the layer alive.
    """
    if layer.bias is not None:
        layer.bias.weight_loader_numel = 0
        info = get_layerwise_info(layer)
        if info.load_numel_total is not None:
            info.load_numel_total = get_layer_size(layer)
    return _load(layer, param, loaded_weight, *args, **kwargs)


@counted
def _load_counted(layer: Layer, param: torch.Tensor, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """The layer's own weight loader. A method of the layer: see `_load_plain`."""
    return _load(layer, param, loaded_weight, *args, **kwargs)


def _set_rows(layer: Layer, *parameters: torch.Tensor) -> None:
    """Tell vLLM how many values of these parameters a checkpoint holds: the padded end of a vocabulary is in none."""
    if isinstance(layer, ParallelLMHead):
        vocabulary = layer.shard_indices
        rows = vocabulary.org_vocab_end_index - vocabulary.org_vocab_start_index
        for parameter in parameters:
            set_weight_attrs(parameter, {"weight_loader_numel": rows * parameter.shape[1]})


class _LinearMethod(LinearMethodBase):
    """What both methods share: the forward pass, and the parameters that it reads."""

    loader: str
    """The name of the layer's own weight loader."""

    def __init__(self, plan: QuantizationPlan, prefix: str, packed: PackedModules, fused: bool) -> None:
        self.plan = plan
        self.prefix = prefix
        self._packed = packed
        self._fused = fused
        self._dummy = loads_dummy_weights()
        self._names = layers.parameter_names(plan.names)
        # Plain strings: torch.compile traces what `apply` reads.
        self._activation: str = plan.options.activation
        self._backend: str = plan.options.backend

    def _set_up(self, layer: Layer, k: int, widths: list[int], dtype: torch.dtype) -> None:
        """Check the shape, and set what vLLM expects to find on a layer."""
        layers.check_input_size(self.prefix, k, layer.tp_size if k != layer.input_size else 1)
        layer.logical_widths = widths
        layer.input_size_per_partition = k
        layer.output_size_per_partition = sum(widths)
        layer.orig_dtype = dtype

    def _parts(self, layer: Layer) -> list[str]:
        return self.plan.part_names(self.prefix, len(layer.logical_widths), self._packed)

    def _install(self, layer: Layer, weight: Nvfp4Weight, input_scale: torch.Tensor | None) -> None:
        layers.install(layer, weight.prepared(self._activation), self._names)
        layers.set_parameter(layer, "input_decode_scale", input_scale)
        layer._already_called_process_weights_after_loading = True
        self._warm_up(layer, layers.installed(layer._parameters, self._names))

    def _warm_up(self, layer: Layer, weight: Nvfp4Weight) -> None:
        def bias() -> torch.Tensor | None:
            # The bias itself may not be there yet.
            return None if layer.bias is None else torch.zeros_like(layer.bias, device=weight.data.device)

        def fused(op: Callable[..., object], *made: object) -> object:
            fold, scale = weight.fp8_fold, layer.input_decode_scale
            return op(
                *made, weight.data, weight.scales, weight.row_scale(), self._activation, fold, scale, bias(), self._backend
            )

        arguments = (weight.shape, layer.orig_dtype, weight.data.device)
        variant = (self._activation, self._backend, layer.bias is not None, weight.global_scale.dim())
        warm_up_linear(*arguments, self._activation, lambda x: self.apply(layer, x, bias()), *variant)
        if self._fused and isinstance(layer, LinearBase):
            # What torch.compile will find before this layer is not known here: most likely this.
            kind = "silu_and_mul" if isinstance(layer, RowParallelLinear) else "rms_norm"
            warm_up_fused_linear(*arguments, kind, fused, *variant)

    def apply(self, layer: Layer, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return nvfp4_linear(
            x,
            layers.installed(layer._parameters, self._names),
            activation=self._activation,
            input_scale=layer.input_decode_scale,
            bias=bias,
            backend=self._backend,
        )


@register_weight_loader_v2_supported_method
class Nvfp4LinearMethod(_LinearMethod):
    """A layer that the checkpoint holds in NVFP4."""

    def create_weights(
        self,
        layer: Layer,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        n, k = sum(output_partition_sizes), input_size_per_partition
        self._set_up(layer, k, output_partition_sizes, params_dtype)
        self.loader = extra_weight_attrs["weight_loader"].__name__
        self.received = Received()
        names, loader = self.plan.names, MethodType(_load_counted, layer)
        weight = ModelWeightParameter(data=codes(n, k // 2), input_dim=1, output_dim=0, weight_loader=loader)
        layer.register_parameter(names.weight, weight)
        scale = GroupQuantScaleParameter(
            data=layers.unloaded(n, k // GROUP_SIZE, dtype=torch.float8_e4m3fn),
            input_dim=1,
            output_dim=0,
            weight_loader=loader,
        )
        set_weight_attrs(scale, {"dummy_weight_value": 1.0})
        layer.register_parameter(names.scale, scale)
        _set_rows(layer, weight, scale)
        scalars = [names.global_scale, *([names.input_scale] if self.plan.static_activations else [])]
        for name in scalars:
            # One for each logical matrix.
            scalar = PerTensorScaleParameter(
                data=layers.unloaded(len(output_partition_sizes), dtype=torch.float32), weight_loader=loader
            )
            set_weight_attrs(scalar, {"dummy_weight_value": names.dummy_scale})
            layer.register_parameter(name, scalar)

    def process_weights_after_loading(self, layer: Layer) -> None:
        if getattr(layer, "_already_called_process_weights_after_loading", False):
            return
        self.plan.warn_unmatched()
        self.received.check(layer, self.prefix, self.plan.required, self._dummy)
        names, parts = self.plan.names, self._parts(layer)
        weight = layers.load_linear(
            getattr(layer, names.weight).data,
            getattr(layer, names.scale).data,
            getattr(layer, names.global_scale).data,
            layer.logical_widths,
            parts,
            names,
            describe=self.plan.describe,
        )
        input_scale = None
        if self.plan.uses_input_scales:
            stored = getattr(layer, names.input_scale).data[None]
            input_scale = layers.load_input_scales(stored, lambda _: parts, names, describe=self.plan.describe)
        self._install(layer, weight, input_scale)


@register_weight_loader_v2_supported_method
class Nvfp4OnlineLinearMethod(_LinearMethod):
    """A layer whose plain weight is quantized as soon as it is whole; until then it takes no memory."""

    uses_meta_device = True
    _tied = False

    def create_weights(
        self,
        layer: Layer,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        n, k = sum(output_partition_sizes), input_size_per_partition
        self._set_up(layer, k, output_partition_sizes, params_dtype)
        weight = ModelWeightParameter(
            data=torch.empty(n, k, dtype=params_dtype, device="meta"),
            input_dim=1,
            output_dim=0,
            weight_loader=MethodType(_load_plain, layer),
        )
        self.loader = extra_weight_attrs["weight_loader"].__name__
        _set_rows(layer, weight)
        layer.register_parameter("weight", weight)
        initialize_online_processing(layer)

    def tie_weights(self, layer: Layer, embed_tokens: Layer) -> Layer:
        # The embedding keeps its plain weight, of which the head makes its own once all is loaded.
        self._tied = True
        return super().tie_weights(layer, embed_tokens)

    def process_weights_after_loading(self, layer: Layer) -> None:
        if getattr(layer, "_already_called_process_weights_after_loading", False):
            return
        self.plan.warn_unmatched()
        if not self._tied:
            check_loaded(layer, self.prefix, self._dummy)
        sharded = layer.tp_size > 1 and (
            layer.input_size != layer.input_size_per_partition or layer.output_size != layer.output_size_per_partition
        )
        weight = layers.quantize_linear(
            layer.weight.data,
            layer.logical_widths,
            self._parts(layer),
            scale_search=self.plan.options.scale_search,
            describe=self.plan.describe,
            reduce_max=(lambda amax: amax_for_tp_weight_quant(amax, True)) if sharded else None,
        )
        self._install(layer, weight, None)
