"""`nvfp4 bench moe`: mixture-of-experts layers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nvfp4_plugin.cli.benchmark import (
    Call,
    Case,
    DeviceOption,
    JsonOption,
    PlotOption,
    RepeatsOption,
    Unavailable,
    need,
    pick_device,
    rotation,
    run,
)

if TYPE_CHECKING:
    import torch

SHAPES = {
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "mixtral-8x7b": (8, 2, 4096, 14336),
    "deepseek-v3-tp8": (256, 8, 7168, 256),
    "gpt-oss-120b": (128, 4, 2880, 2880),
    "glm-4.5-air": (128, 8, 4096, 1408),
}
"""Model -> (experts, top_k, hidden size, intermediate size of a rank)."""
PEERS = ("marlin",)


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
    peer: Annotated[list[str], typer.Option("--peer", help="Peers to time beside them: marlin (vLLM's).")] = list(PEERS),  # noqa: B006
    json: JsonOption = False,
    plot: PlotOption = None,
    device: DeviceOption = "auto",
    repeats: RepeatsOption = 30,
) -> None:
    """One fused layer of routed experts (silu, evenly spread routing) in each activation mode, beside its peers."""
    where = pick_device(device)
    for name in peer:
        if name not in PEERS:
            raise typer.BadParameter(f"got {name!r}; allowed: {', '.join(PEERS)}", param_hint="--peer")
    cases = []
    for name in model:
        experts, top_k, hidden, inner = shape = _shape(name)
        for tokens in m:
            # A token's experts are distinct and independent of the other tokens'.
            hit = experts * (1 - (1 - top_k / experts) ** tokens)
            for column in (*mode, *peer):
                cases.append(
                    Case(
                        {"model": name, "M": tokens},
                        column,
                        partial(_setup, column, tokens, shape, where),
                        bytes=int(hit * 3 * hidden * inner * 9 / 16) + 4 * tokens * hidden,
                        flops=6 * tokens * top_k * hidden * inner,
                    )
                )
    run("Mixture-of-experts layers", cases, where, json=json, plot=plot, repeats=repeats)


def _shape(name: str) -> tuple[int, int, int, int]:
    if name in SHAPES:
        return SHAPES[name]
    sizes = name.split("x")
    if len(sizes) != 4 or not all(size.isdigit() for size in sizes):
        raise typer.BadParameter(
            f"got {name!r}; allowed: {', '.join(SHAPES)}, or EXPERTSxTOP_KxHIDDENxINNER", param_hint="--model"
        )
    experts, top_k, hidden, inner = map(int, sizes)
    if hidden % 16 or inner % 16 or not 0 < top_k <= experts:
        raise typer.BadParameter(
            f"got {name!r}; allowed are sizes that are multiples of 16, and top_k up to the experts", param_hint="--model"
        )
    return experts, top_k, hidden, inner


def _setup(column: str, tokens: int, shape: tuple[int, int, int, int], device: torch.device) -> Sequence[Call]:
    import torch

    from nvfp4_kernels import nvfp4_fused_moe

    experts, top_k, hidden, inner = shape
    if column in PEERS:
        need(device, "vllm.model_executor.layers.fused_moe.experts.marlin_moe")
    weight_bytes = experts * 3 * hidden * inner * 9 // 16
    layers = [
        (_weight(experts, 2 * inner, hidden, device), _weight(experts, hidden, inner, device))
        for _ in range(rotation(weight_bytes, device, limit=4))
    ]
    # Small batches meet other experts in every call, as they do in a model.
    inputs = []
    for _ in range(max(len(layers), 4 if tokens <= 64 else 1)):
        x = torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16)
        scores = torch.rand(tokens, experts, device=device).topk(top_k, dim=-1)
        inputs.append((x, scores.values, scores.indices.to(torch.int32)))
    if column in PEERS:
        prepared = [_marlin(w13, w2, shape) for w13, w2 in layers]
        return [partial(prepared[i % len(prepared)], *inputs[i]) for i in range(len(inputs))]
    scale = torch.full((1,), 4 / (448 * 6), device=device)
    ours = [(w13.prepared(column), w2.prepared(column)) for w13, w2 in layers]
    return [
        partial(nvfp4_fused_moe, x, *ours[i % len(ours)], weights, ids, activation=column, input_scales=(scale, scale))
        for i, (x, weights, ids) in enumerate(inputs)
    ]


def _weight(experts: int, n: int, k: int, device: torch.device) -> Any:
    """Random codes and scales, as a quantized Gaussian weight has them in size: no expert is ever stacked in bf16."""
    import torch

    from nvfp4_kernels import Nvfp4Weight

    data = torch.randint(0, 256, (experts, n, k // 2), device=device, dtype=torch.uint8)
    scales = torch.rand(experts, n, k // 16, device=device).mul_(128).add_(64).to(torch.float8_e4m3fn)
    return Nvfp4Weight(data, scales, torch.full((experts,), 1 / (400 * k**0.5), device=device))


def _marlin(w13: Any, w2: Any, shape: tuple[int, int, int, int]) -> Any:
    """vLLM's Marlin layer over the same weights, as vLLM's ModelOpt method sets it up."""
    from types import SimpleNamespace

    import torch
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe
    from vllm.model_executor.layers.quantization.utils.marlin_utils_fp4 import prepare_nvfp4_moe_layer_for_marlin
    from vllm.scalar_type import scalar_types

    experts, _, hidden, inner = shape
    layer: Any = SimpleNamespace(
        num_experts=experts,
        hidden_size=hidden,
        intermediate_size_per_partition=inner,
        params_dtype=torch.bfloat16,
    )
    try:
        d13, s13, g13, d2, s2, g2 = prepare_nvfp4_moe_layer_for_marlin(
            layer, w13.data, w13.scales, w13.global_scale, w2.data, w2.scales, w2.global_scale, is_act_and_mul=True
        )
    except AssertionError as error:
        raise Unavailable(f"Marlin does not take this shape: {error}") from None

    def call(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return fused_marlin_moe(
            x,
            d13,
            d2,
            None,
            None,
            s13,
            s2,
            weights,
            ids,
            quant_type_id=scalar_types.float4_e2m1f.id,
            global_scale1=g13,
            global_scale2=g2,
        )

    return call
