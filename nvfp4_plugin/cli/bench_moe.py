"""`nvfp4 bench moe`: mixture-of-experts layers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from nvfp4_configs import Activation
from nvfp4_plugin.cli.benchmark import (
    Call,
    Case,
    DeviceOption,
    HostOption,
    JsonOption,
    PlotOption,
    RepeatsOption,
    Unavailable,
    check_least,
    check_words,
    need,
    pick_device,
    rotation,
    run,
    sizes,
)

if TYPE_CHECKING:
    import torch

Shape = tuple[int, int, int, int]
Layer = Callable[..., object]

SHAPES = {
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "mixtral-8x7b": (8, 2, 4096, 14336),
    "deepseek-v3-tp8": (256, 8, 7168, 256),
    "gpt-oss-120b": (128, 4, 2880, 2880),
    "glm-4.5-air": (128, 8, 4096, 1408),
}
"""Model -> (experts, top_k, hidden size, intermediate size of a rank)."""
PEERS: dict[str, Any] = {"marlin": "marlin", "humming": "humming", "bf16": "triton"}
"""Peer -> what vLLM calls its kernels; bf16 has weights that were never quantized."""
_VLLM_LAYER = "vllm.model_executor.layers.fused_moe.routed_experts"


def moe(
    model: Annotated[list[str], typer.Option("--model", help="A model's layer by name, or EXPERTSxTOP_KxHIDDENxINNER.")] = [  # noqa: B006
        "qwen3-30b-a3b"
    ],
    m: Annotated[list[int], typer.Option("--m", help="Tokens; repeatable.")] = [1, 16, 64, 256, 1024],  # noqa: B006
    mode: Annotated[list[str], typer.Option("--mode", help="Activation modes to time; repeatable.")] = [  # noqa: B006
        "none",
        "fp8_per_token",
        "nvfp4_per_token",
    ],
    peer: Annotated[
        list[str], typer.Option("--peer", help="Peers to time beside them: marlin, humming and bf16, in vLLM; repeatable.")
    ] = list(PEERS),  # noqa: B006
    json: JsonOption = False,
    plot: PlotOption = None,
    device: DeviceOption = "auto",
    repeats: RepeatsOption = 30,
    host: HostOption = False,
) -> None:
    """One fused layer of routed experts (silu, evenly spread routing) in each activation mode, beside its peers."""
    where = pick_device(device)
    check_least("--m", m, 1)
    check_words("--mode", mode, get_args(Activation))
    check_words("--peer", peer, PEERS)
    cases = []
    for name in model:
        experts, top_k, hidden, inner = shape = _shape(name)
        for column in (*mode, *peer):
            for tokens in m:
                # A token's experts are distinct and independent of the other tokens'.
                hit = experts * (1 - (1 - top_k / experts) ** tokens)
                weight_bits = 16 if column == "bf16" else 4.5
                cases.append(
                    Case(
                        {"model": name, "M": tokens},
                        column,
                        partial(_setup, column, tokens, shape, where),
                        bytes=int(hit * 3 * hidden * inner * weight_bits / 8) + 4 * tokens * hidden,
                        flops=6 * tokens * top_k * hidden * inner,
                    )
                )
    run("Mixture-of-experts layers", cases, where, json=json, plot=plot, repeats=repeats, host=host)


def _shape(name: str) -> Shape:
    if name in SHAPES:
        return SHAPES[name]
    shape = sizes(name, 4)
    if not shape:
        raise typer.BadParameter(
            f"got {name!r}; allowed: {', '.join(SHAPES)}, or EXPERTSxTOP_KxHIDDENxINNER", param_hint="--model"
        )
    experts, top_k, hidden, inner = shape
    if hidden % 16 or inner % 16 or top_k > experts:
        raise typer.BadParameter(
            f"got {name!r}; allowed are sizes that are multiples of 16, and top_k up to the experts", param_hint="--model"
        )
    return experts, top_k, hidden, inner


def _setup(column: str, tokens: int, shape: Shape, device: torch.device) -> Sequence[Call]:
    import torch

    experts, top_k, hidden, _ = shape
    if column in PEERS:
        need(device, _VLLM_LAYER)
    layers = _layers(column, shape, device)
    # Every column meets the same tokens and experts; small batches meet others in every call, as they do in a model.
    torch.manual_seed(tokens)
    inputs = []
    for _ in range(max(len(layers), 4 if tokens <= 64 else 1)):
        x = torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16)
        scores = torch.rand(tokens, experts, device=device).topk(top_k, dim=-1)
        inputs.append((x, scores.values, scores.indices.to(torch.int32)))
    return [partial(layers[i % len(layers)], *inputs[i]) for i in range(len(inputs))]


@functools.lru_cache(maxsize=1)  # for all numbers of tokens: Marlin takes seconds to prepare hundreds of experts
def _layers(column: str, shape: Shape, device: torch.device) -> list[Layer]:
    experts, _, hidden, inner = shape
    copies = rotation(experts * 3 * hidden * inner * 9 // 16, device, limit=4)
    make = _vllm if column in PEERS else _ours
    return [make(column, shape, device) for _ in range(copies)]


def _ours(mode: str, shape: Shape, device: torch.device) -> Layer:
    import torch

    from nvfp4_kernels import nvfp4_fused_moe

    experts, _, hidden, inner = shape
    w13 = _weight(experts, 2 * inner, hidden, device).prepared(mode)
    w2 = _weight(experts, hidden, inner, device).prepared(mode)
    scale = torch.full((1,), 4 / (448 * 6), device=device)

    def call(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return nvfp4_fused_moe(x, w13, w2, weights, ids, activation=mode, input_scales=(scale, scale))

    return call


def _weight(experts: int, n: int, k: int, device: torch.device) -> Any:
    """Random codes and scales, as a quantized Gaussian weight has them in size: no expert is ever stacked in bf16."""
    import torch

    from nvfp4_kernels import Nvfp4Weight

    data = torch.randint(0, 256, (experts, n, k // 2), device=device, dtype=torch.uint8)
    scales = torch.rand(experts, n, k // 16, device=device).mul_(128).add_(64).to(torch.float8_e4m3fn)
    return Nvfp4Weight(data, scales, torch.full((experts,), 1 / (400 * k**0.5), device=device))


def _vllm(peer: str, shape: Shape, device: torch.device) -> Layer:
    """vLLM's layer over random weights of the same sizes, as its ModelOpt method sets it up (bf16: its unquantized one)."""
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType
    from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config
    from vllm.v1.worker.workspace import init_workspace_manager, is_workspace_manager_initialized

    experts, top_k, hidden, inner = shape
    config = VllmConfig()
    with set_current_vllm_config(config), torch.device(device):
        _one_rank()
        if not is_workspace_manager_initialized():
            init_workspace_manager(device)
        parallel = FusedMoEParallelConfig.make_no_parallel()
        sizes = FusedMoEConfig(
            num_experts=experts,
            experts_per_token=top_k,
            hidden_dim=hidden,
            intermediate_size=inner,
            num_local_experts=experts,
            num_logical_experts=experts,
            activation=MoEActivation.SILU,
            device=device,
            routing_method=RoutingMethodType.Renormalize,
            moe_parallel_config=parallel,
            in_dtype=torch.bfloat16,
            moe_backend=PEERS[peer],
        )
        placement = ExpertMapManager(1 << 15, top_k, experts, 0, None, parallel, "linear", False)
        checkpoint = None if peer == "bf16" else ModelOptNvFp4Config(is_checkpoint_nvfp4_serialized=True)
        try:
            layer = RoutedExperts("experts", torch.bfloat16, sizes, checkpoint, placement)
            for name, n, k in (("w13", 2 * inner, hidden), ("w2", hidden, inner)):
                if peer == "bf16":
                    getattr(layer, f"{name}_weight").data.normal_(std=k**-0.5)
                else:
                    weight = _weight(experts, n, k, device)
                    getattr(layer, f"{name}_weight").data.copy_(weight.data)
                    getattr(layer, f"{name}_weight_scale").data.copy_(weight.scales)
                    scale = getattr(layer, f"{name}_weight_scale_2").data
                    scale.copy_(weight.global_scale.view(-1, *[1] * (scale.ndim - 1)).expand_as(scale))
                    getattr(layer, f"{name}_input_scale").data.fill_(4 / (448 * 6))
            layer.quant_method.process_weights_after_loading(layer)
        except (AssertionError, ValueError, NotImplementedError) as error:
            raise Unavailable(f"vLLM's {peer} does not take this shape: {error}") from None

    def call(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> object:
        with set_forward_context(None, config):
            return layer.quant_method.apply(layer, x, weights, ids, None, None)

    return call


def _one_rank() -> None:
    """vLLM's process groups, of this process alone: its parameters ask them for their rank."""
    import tempfile

    from vllm.distributed import init_distributed_environment, initialize_model_parallel, model_parallel_is_initialized

    if not model_parallel_is_initialized():
        with tempfile.TemporaryDirectory() as folder:
            init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
            initialize_model_parallel()
