"""`nvfp4 bench linear`: dense layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from nvfp4_plugin.cli.benchmark import (
    Call,
    Case,
    DeviceOption,
    JsonOption,
    PlotOption,
    RepeatsOption,
    pick_device,
    rotation,
    run,
)

if TYPE_CHECKING:
    import torch

SHAPES = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "70b_down": (8192, 28672),
}
"""Layer -> (N, K): the linear layers of Llama-3-8B, and one of 70B."""


def linear(
    layer: Annotated[list[str], typer.Option("--layer", help="A layer of Llama-3 by name, or NxK; repeatable.")] = ["qkv"],  # noqa: B006
    m: Annotated[list[int], typer.Option("--m", help="Rows (tokens); repeatable.")] = [1, 16, 64, 256, 1024],  # noqa: B006
    mode: Annotated[list[str], typer.Option("--mode", help="Activation modes to time; repeatable.")] = [  # noqa: B006
        "none",
        "fp8_per_token",
        "nvfp4_per_token",
    ],
    json: JsonOption = False,
    plot: PlotOption = None,
    device: DeviceOption = "auto",
    repeats: RepeatsOption = 30,
) -> None:
    """x @ weight^T over an NVFP4 weight in each activation mode, beside the bf16 layer."""
    where = pick_device(device)
    cases = []
    for name in layer:
        n, k = _shape(name)
        for rows in m:
            point: dict[str, str | int] = {"layer": f"{name} {n}x{k}" if name in SHAPES else name, "M": rows}
            for column in (*mode, "bf16"):
                weight_bytes = n * k * 2 if column == "bf16" else n * k * 9 // 16
                cases.append(
                    Case(
                        point,
                        column,
                        partial(_setup, column, rows, n, k, where),
                        bytes=weight_bytes + 2 * rows * (n + k),
                        flops=2 * rows * n * k,
                    )
                )
    run("Linear layers", cases, where, json=json, plot=plot, repeats=repeats)


def _shape(name: str) -> tuple[int, int]:
    if name in SHAPES:
        return SHAPES[name]
    n, _, k = name.partition("x")
    if not (n.isdigit() and k.isdigit()) or int(k) % 16:
        raise typer.BadParameter(
            f"got {name!r}; allowed: {', '.join(SHAPES)}, or NxK with K a multiple of 16", param_hint="--layer"
        )
    return int(n), int(k)


def _setup(mode: str, rows: int, n: int, k: int, device: torch.device) -> Sequence[Call]:
    import torch

    from nvfp4_kernels import nvfp4_linear, quantize_weight

    x = torch.randn(rows, k, device=device, dtype=torch.bfloat16)
    weight = torch.randn(n, k, device=device, dtype=torch.bfloat16)
    if mode == "bf16":
        weights = [weight.clone() for _ in range(rotation(n * k * 2, device, limit=16))]
        return [partial(torch.nn.functional.linear, x, w) for w in weights]
    quantized = quantize_weight(weight, scale_search="absmax").prepared(mode)
    tensors = {key: value for key, value in vars(quantized).items() if value is not None}
    copies = [
        replace(quantized, **{key: value.clone() for key, value in tensors.items()})
        for _ in range(rotation(quantized.nbytes, device, limit=32))
    ]
    scale = torch.full((1,), 4 / (448 * 6), device=device)
    return [partial(nvfp4_linear, x, w, activation=mode, input_scale=scale) for w in copies]
