"""Dense layers in SGLang: one method for plain weights, which are quantized while they load, one for NVFP4 checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.parameter import ModelWeightParameter, PerTensorScaleParameter
from sglang.srt.layers.quantization.base_config import LinearMethodBase

from nvfp4_kernels import Nvfp4Weight, nvfp4_linear
from nvfp4_kernels.formats import GROUP_SIZE

from .. import layers
from ..warmup import warm_up_linear
from .loading import INPUT_SCALE, Layer, LayerWeights, Slot, Tensors

if TYPE_CHECKING:
    from .config import Nvfp4QuantizationConfig

LINEAR_METHODS = ("Nvfp4LinearMethod", "Nvfp4OnlineLinearMethod")
"""Class names by which SGLang picks the weight loader that knows of one scale for each logical matrix."""


def _matrix(data: torch.Tensor, loader: Callable[..., None]) -> torch.nn.Parameter:
    return ModelWeightParameter(data=data, input_dim=1, output_dim=0, weight_loader=loader)


def _scalars(data: torch.Tensor, loader: Callable[..., None]) -> torch.nn.Parameter:
    return PerTensorScaleParameter(data=data, weight_loader=loader)


class _LinearMethod(LinearMethodBase):
    """What both methods share: the parameters that the forward pass reads, and how they get there."""

    def __init__(self, config: Nvfp4QuantizationConfig, prefix: str) -> None:
        self.quant_config = config
        self.plan = config.plan
        self.prefix = prefix
        self._names = layers.parameter_names(config.plan.names)
        # Plain strings: torch.compile traces what `apply` reads.
        self._activation: str = config.plan.options.activation
        self._backend: str = config.plan.options.backend

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
        k, widths = input_size_per_partition, output_partition_sizes
        self._dtype = params_dtype
        layers.check_input_size(self.prefix, k, input_size // k)
        # What SGLang expects to find on a layer.
        layer.logical_widths = widths
        layer.input_size_per_partition = k
        layer.output_size_per_partition = sum(widths)
        parts = self.plan.part_names(self.prefix, len(widths), self.quant_config.packed_modules_mapping)

        def process(loaded: Tensors, describe: layers.Describe) -> dict[str, torch.Tensor | None]:
            weight, input_scale = self._make(loaded, widths, parts, describe)
            weight = weight.prepared(self._activation)
            return {**{name: getattr(weight, field) for field, name in self._names.items()}, INPUT_SCALE: input_scale}

        layer.nvfp4_weights = LayerWeights(
            layer,
            self.prefix,
            self._slots(layer, sum(widths), k, len(widths), params_dtype),
            process,
            extra_weight_attrs["weight_loader"],
            describe=self.plan.describe,
            dummy=self.quant_config.dummy,
        )

    def _slots(self, layer: Layer, n: int, k: int, matrices: int, dtype: torch.dtype) -> dict[str, Slot]:
        raise NotImplementedError

    def _make(
        self, loaded: Tensors, widths: list[int], parts: list[str], describe: layers.Describe
    ) -> tuple[Nvfp4Weight, torch.Tensor | None]:
        """The weight, and the static input scale where it is used."""
        raise NotImplementedError

    def restore_weights_before_loading(self, layer: Layer) -> None:
        layer.nvfp4_weights.open(layer)

    def process_weights_after_loading(self, layer: Layer) -> None:
        self.plan.warn_unmatched()
        layer.nvfp4_weights.finish(layer)
        weight, bias = layer.nvfp4_weights.weight(layer, self._names), getattr(layer, "bias", None)
        warm_up_linear(
            weight.shape,
            self._dtype,
            weight.data.device,
            self._activation,
            lambda x: self.apply(layer, x, bias),
            self._activation,
            self._backend,
            bias is not None,
            weight.global_scale.dim(),
        )

    def apply(self, layer: Layer, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        weights: LayerWeights = layer.nvfp4_weights
        return nvfp4_linear(
            x,
            weights.weight(layer, self._names),
            activation=self._activation,
            input_scale=weights.parameter(layer, INPUT_SCALE),
            bias=bias,
            backend=self._backend,
        )


class Nvfp4LinearMethod(_LinearMethod):
    """A layer that the checkpoint holds in NVFP4."""

    def _slots(self, layer: Layer, n: int, k: int, matrices: int, dtype: torch.dtype) -> dict[str, Slot]:
        names = self.plan.names
        scalar = Slot((matrices,), torch.float32, _scalars, dummy=names.dummy_scale)
        slots = {
            names.weight: Slot((n, k // 2), torch.uint8, _matrix),
            names.scale: Slot((n, k // GROUP_SIZE), torch.float8_e4m3fn, _matrix, dummy=1.0),
            names.global_scale: scalar,
        }
        return {**slots, names.input_scale: scalar} if self.plan.static_activations else slots

    def _make(
        self, loaded: Tensors, widths: list[int], parts: list[str], describe: layers.Describe
    ) -> tuple[Nvfp4Weight, torch.Tensor | None]:
        names = self.plan.names
        weight = layers.load_linear(
            loaded[names.weight], loaded[names.scale], loaded[names.global_scale], widths, parts, names, describe=describe
        )
        if not self.plan.uses_input_scales:
            return weight, None
        stored = loaded[names.input_scale][None]
        return weight, layers.load_input_scales(stored, lambda _: parts, names, describe=describe)


class Nvfp4OnlineLinearMethod(_LinearMethod):
    """A layer whose plain weight is quantized as soon as it is whole.

    Every rank chooses the global scales of its shard by itself: what a rank has loaded when differs between ranks, so there
    is no moment at which they could all agree.
    """

    def _slots(self, layer: Layer, n: int, k: int, matrices: int, dtype: torch.dtype) -> dict[str, Slot]:
        # The end of a vocabulary is padding.
        rows = getattr(layer, "num_org_embeddings_per_partition", n)
        return {"weight": Slot((n, k), dtype, _matrix, padding=(n - rows) * k)}

    def _make(
        self, loaded: Tensors, widths: list[int], parts: list[str], describe: layers.Describe
    ) -> tuple[Nvfp4Weight, torch.Tensor | None]:
        search = self.plan.options.scale_search
        return layers.quantize_linear(loaded["weight"], widths, parts, scale_search=search, describe=describe), None
