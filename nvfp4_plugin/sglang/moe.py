"""Routed experts in SGLang. Tokens come with their experts chosen; with expert parallelism the dispatcher has turned global
into local ids already, -1 where another rank holds the expert, and what the ranks give is added up outside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.moe import get_moe_a2a_backend, get_moe_runner_backend
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoeWeightScaleSupported
from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput
from sglang.srt.layers.moe.topk import TopKOutputChecker
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase
from sglang.srt.utils import set_weight_attrs

from nvfp4_kernels import Nvfp4Weight, nvfp4_fused_moe
from nvfp4_kernels.formats import GROUP_SIZE
from nvfp4_kernels.reference.moe import ACT_FNS, SWIGLU_OAI_ALPHA, SWIGLU_OAI_LIMIT

from .. import layers
from ..warmup import warm_up_moe
from .loading import INPUT_SCALE, Layer, LayerWeights, MakeParameter, Slot, Tensors

if TYPE_CHECKING:
    from sglang.srt.layers.moe import MoeRunnerConfig
    from sglang.srt.layers.moe.token_dispatcher import CombineInput, DispatchOutput

    from .config import Nvfp4QuantizationConfig

Parts = Callable[[int], list[str]]

_PARTED_BIAS = "w13_weight_bias_parted"


def activation_function(name: str, config: MoeRunnerConfig) -> str:
    """The kernels' name for what SGLang asks for between the two products. ValueError where they have none."""
    act_fn = config.activation
    given = {
        "gemm1_alpha": config.gemm1_alpha,
        "gemm1_clamp_limit": config.gemm1_clamp_limit,
        "swiglu_limit": config.swiglu_limit,
    }
    served: dict[str, float | None] = dict.fromkeys(given)
    if act_fn == "silu" and config.is_gated and config.gemm1_alpha is not None:
        act_fn = "swigluoai" if config.gate_up_interleaved else "swigluoai_uninterleave"
        served |= {"gemm1_alpha": SWIGLU_OAI_ALPHA, "gemm1_clamp_limit": SWIGLU_OAI_LIMIT}
    elif not config.is_gated:
        act_fn += "_no_mul"
    if act_fn not in ACT_FNS:
        raise ValueError(f"{name}: got the activation {act_fn!r}; allowed: {', '.join(map(repr, ACT_FNS))}")
    if given != served:
        raise ValueError(f"{name}: got {given} for the activation {act_fn!r}; allowed: {served}")
    return act_fn


def _parameter(kind: FusedMoeWeightScaleSupported | None = None) -> MakeParameter:
    """A parameter of FusedMoE, whose weight loader wants to know what `kind` of scale it holds."""

    def make(data: torch.Tensor, loader: Callable[..., None]) -> torch.nn.Parameter:
        parameter = torch.nn.Parameter(data, requires_grad=False)
        set_weight_attrs(parameter, {"weight_loader": loader})
        if kind is not None:
            set_weight_attrs(parameter, {"quant_method": kind.value})
        return parameter

    return make


_WEIGHT = _parameter()
_BLOCK_SCALES = _parameter(FusedMoeWeightScaleSupported.BLOCK)
_SCALARS = _parameter(FusedMoeWeightScaleSupported.TENSOR)


def _scalar_loader(weight_loader: Callable[..., None], input_scale: str) -> Callable[..., None]:
    """FusedMoE's loader writes an input scale over the whole row of its expert, that of w3 over that of w1; by another name
    it is one scalar for each matrix, as it should be."""

    def load(param: torch.nn.Parameter, loaded_weight: torch.Tensor, weight_name: str, *args: Any, **kwargs: Any) -> None:
        if loaded_weight.dim() == 0:
            loaded_weight = loaded_weight.reshape(1)  # written by a copy, which `LayerWeights` counts, and not by a fill
        weight_loader(param, loaded_weight, weight_name.replace(input_scale, "scale"), *args, **kwargs)

    return load


class _MoEMethod(FusedMoEMethodBase):
    """What both methods share: the parameters that the forward pass reads, and how they get there."""

    runner = None  # experts run here, not in one of SGLang's

    def __init__(self, config: Nvfp4QuantizationConfig, prefix: str, projections: Sequence[str]) -> None:
        self.quant_config = config
        self.plan = config.plan
        self.prefix = prefix
        self._projections = projections
        self._names = {prefix: layers.parameter_names(config.plan.names, f"{prefix}_") for prefix in ("w13", "w2")}
        # Plain strings: torch.compile traces what `apply` reads.
        self._activation: str = config.plan.options.activation
        self._backend = layers.experts_backend(config.plan.options)

    def create_weights(
        self,
        layer: Layer,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        with_bias: bool = False,
        **extra_weight_attrs: Any,
    ) -> None:
        config = layer.moe_runner_config
        self._check_flags(config)
        act_fn = activation_function(self.prefix, config)
        # Rows of gate and up that take turns in the checkpoint are put below each other once they are quantized.
        self._in_turns = act_fn == "swigluoai"
        self._act_fn = "swigluoai_uninterleave" if self._in_turns else act_fn
        self._dtype = params_dtype
        inner = intermediate_size_per_partition
        layers.check_input_size(f"{self.prefix} (hidden size)", hidden_size)
        layers.check_input_size(f"{self.prefix} (intermediate size)", inner, layer.moe_tp_size)
        # The rows of w13: gate and up below each other, or taking turns, which is one matrix to a quantizer.
        gated = config.is_gated and not self._in_turns
        rows = 2 * inner if config.is_gated else inner
        widths = {"w13": [inner] * 2 if gated else [rows], "w2": [hidden_size]}
        sizes = {"w13": (num_experts, rows, hidden_size), "w2": (num_experts, hidden_size, inner)}
        parts = self._parts(layer)

        def process(loaded: Tensors, describe: layers.Describe) -> dict[str, torch.Tensor | None]:
            out: dict[str, torch.Tensor | None] = {}
            for prefix in sizes:
                weight, input_scale = self._make(loaded, prefix, widths[prefix], parts[prefix], describe)
                if prefix == "w13" and self._in_turns:
                    layers.part_rows(weight.data, weight.scales.view(torch.uint8))
                weight = weight.prepared(self._activation)
                out |= {name: getattr(weight, field) for field, name in self._names[prefix].items()}
                out[f"{prefix}_{INPUT_SCALE}"] = input_scale
            return out

        layer.nvfp4_weights = LayerWeights(
            layer,
            self.prefix,
            {name: slot for prefix, size in sizes.items() for name, slot in self._slots(prefix, size, params_dtype).items()},
            process,
            self._weight_loader(extra_weight_attrs["weight_loader"]),
            describe=self.plan.describe,
            dummy=self.quant_config.dummy,
        )
        if with_bias:
            for prefix, (experts, n, _) in sizes.items():
                bias = torch.nn.Parameter(torch.zeros(experts, n, dtype=torch.float32), requires_grad=False)
                layer.register_parameter(f"{prefix}_weight_bias", bias)
                set_weight_attrs(bias, extra_weight_attrs)

    def _check_flags(self, config: MoeRunnerConfig) -> None:
        a2a, runner = get_moe_a2a_backend(), get_moe_runner_backend()
        if not a2a.is_none():
            raise ValueError(
                f"--moe-a2a-backend: got {a2a.value!r}; with --quantization nvfp4 allowed: 'none' (expert parallelism works "
                "without, --ep)"
            )
        if not (runner.is_auto() or runner.is_triton()):
            # Other runners have the router hand over something else than expert ids.
            raise ValueError(
                f"--moe-runner-backend: got {runner.value!r}; --quantization nvfp4 brings its own kernels, allowed: 'auto', "
                "and 'triton' for models for which SGLang chooses another by itself"
            )
        if config.no_combine:
            raise ValueError(f"{self.prefix}: got no_combine, which asks for every expert's output; allowed: their sum")

    def _parts(self, layer: Layer) -> dict[str, Parts]:
        """The checkpoint's names of a local expert's matrices."""
        gate, up, down = self._projections
        first = layer.moe_ep_rank * layer.num_local_experts

        def names(*projections: str) -> Parts:
            return lambda expert: [f"{self.prefix}.{first + expert}.{projection}" for projection in projections]

        return {"w13": names(gate, up), "w2": names(down)}

    def _weight_loader(self, weight_loader: Callable[..., None]) -> Callable[..., None]:
        return weight_loader

    def _slots(self, prefix: str, size: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Slot]:
        raise NotImplementedError

    def _make(
        self, loaded: Tensors, prefix: str, widths: list[int], parts: Parts, describe: layers.Describe
    ) -> tuple[Nvfp4Weight, torch.Tensor | None]:
        """The weight, and the static input scales where they are used."""
        raise NotImplementedError

    def create_moe_runner(self, layer: Layer, moe_runner_config: MoeRunnerConfig) -> None:
        self.moe_runner_config = moe_runner_config

    def restore_weights_before_loading(self, layer: Layer) -> None:
        layer.nvfp4_weights.open(layer)

    def process_weights_after_loading(self, layer: Layer) -> None:
        self.plan.warn_unmatched()
        layer.nvfp4_weights.finish(layer)
        if self._in_turns and hasattr(layer, "w13_weight_bias"):
            # Of a copy, so that SGLang may load other biases, or none; in place the next time, for CUDA graphs hold on to it.
            if not hasattr(layer, _PARTED_BIAS):
                layer.register_buffer(_PARTED_BIAS, torch.empty_like(layer.w13_weight_bias), persistent=False)
            parted = getattr(layer, _PARTED_BIAS)
            parted.copy_(layer.w13_weight_bias)
            layers.part_rows(parted)
        w13 = layer.nvfp4_weights.weight(layer, self._names["w13"])
        warm_up_moe(
            w13.shape,
            self._dtype,
            w13.data.device,
            lambda x, topk_weights, topk_ids: self._experts(layer, x, topk_weights, topk_ids),
            self._activation,
            self._backend,
            self._act_fn,
            w13.global_scale.dim(),
            hasattr(layer, "w13_weight_bias"),
            self.moe_runner_config.apply_router_weight_on_input,
            experts=layer.num_local_experts,
            top_k=layer.top_k,
        )

    def apply(self, layer: Layer, dispatch_output: DispatchOutput) -> CombineInput:
        x, topk_output = dispatch_output.hidden_states, dispatch_output.topk_output
        if not TopKOutputChecker.format_is_standard(topk_output):
            raise ValueError(f"{self.prefix}: got a {type(topk_output).__name__} from the router; allowed: StandardTopKOutput")
        topk_weights, topk_ids, _ = topk_output
        factor = self.moe_runner_config.routed_scaling_factor
        if factor is not None and x.is_cuda:
            # SGLang's convention: experts apply it on CUDA, the models themselves everywhere else.
            topk_weights = topk_weights * factor
        return StandardCombineInput(hidden_states=self._experts(layer, x, topk_weights, topk_ids))

    def _experts(self, layer: Layer, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        weights: LayerWeights = layer.nvfp4_weights
        scale13, scale2 = (weights.parameter(layer, f"{prefix}_{INPUT_SCALE}") for prefix in ("w13", "w2"))
        return nvfp4_fused_moe(
            x,
            weights.weight(layer, self._names["w13"]),
            weights.weight(layer, self._names["w2"]),
            topk_weights,
            topk_ids,
            activation=self._activation,
            act_fn=self._act_fn,
            input_scales=None if scale13 is None or scale2 is None else (scale13, scale2),
            w13_bias=getattr(layer, _PARTED_BIAS if self._in_turns else "w13_weight_bias", None),
            w2_bias=getattr(layer, "w2_weight_bias", None),
            num_experts=layer.num_experts,
            apply_router_weight_on_input=self.moe_runner_config.apply_router_weight_on_input,
            backend=self._backend,
        )


class Nvfp4MoEMethod(_MoEMethod):
    """Experts that the checkpoint holds in NVFP4."""

    def create_weights(self, layer: Layer, *args: Any, **kwargs: Any) -> None:
        super().create_weights(layer, *args, **kwargs)
        if self._in_turns:
            raise ValueError(
                f"{self.prefix}: experts with gate and up rows in turn (swigluoai) can be quantized while they load, but "
                "not loaded from an NVFP4 checkpoint, whose scales are gate's and up's own"
            )

    def _weight_loader(self, weight_loader: Callable[..., None]) -> Callable[..., None]:
        return _scalar_loader(weight_loader, self.plan.names.input_scale)

    def _slots(self, prefix: str, size: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Slot]:
        names = self.plan.names
        experts, n, k = size
        shards = 1
        if prefix == "w13":
            shards = 1 if self._act_fn.endswith("_no_mul") else 2
        scalar = Slot((experts, shards), torch.float32, _SCALARS, dummy=names.dummy_scale)
        slots = {
            f"{prefix}_{names.weight}": Slot((experts, n, k // 2), torch.uint8, _WEIGHT),
            f"{prefix}_{names.scale}": Slot((experts, n, k // GROUP_SIZE), torch.float8_e4m3fn, _BLOCK_SCALES, dummy=1.0),
            f"{prefix}_{names.global_scale}": scalar,
        }
        return {**slots, f"{prefix}_{names.input_scale}": scalar} if self.plan.static_activations else slots

    def _make(
        self, loaded: Tensors, prefix: str, widths: list[int], parts: Parts, describe: layers.Describe
    ) -> tuple[Nvfp4Weight, torch.Tensor | None]:
        names = self.plan.names
        weight = layers.load_experts(
            loaded[f"{prefix}_{names.weight}"],
            loaded[f"{prefix}_{names.scale}"],
            loaded[f"{prefix}_{names.global_scale}"],
            widths,
            parts,
            names,
            describe=describe,
        )
        if not self.plan.uses_input_scales:
            return weight, None
        return weight, layers.load_input_scales(loaded[f"{prefix}_{names.input_scale}"], parts, names, describe=describe)


class Nvfp4OnlineMoEMethod(_MoEMethod):
    """Experts whose plain weights are quantized as soon as a layer's are whole; each rank scales its shards by itself."""

    def _slots(self, prefix: str, size: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Slot]:
        return {f"{prefix}_weight": Slot(size, dtype, _WEIGHT)}

    def _make(
        self, loaded: Tensors, prefix: str, widths: list[int], parts: Parts, describe: layers.Describe
    ) -> tuple[Nvfp4Weight, torch.Tensor | None]:
        search = self.plan.options.scale_search
        weight = loaded[f"{prefix}_weight"]
        return layers.quantize_experts(weight, widths, parts, scale_search=search, describe=describe), None
