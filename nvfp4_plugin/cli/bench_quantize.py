"""`nvfp4 bench quantize`: activation quantization."""

from __future__ import annotations

from collections.abc import Sequence
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


def quantize(
    m: Annotated[list[int], typer.Option("--m", help="Rows (tokens); may be given several times.")] = [1, 16, 256, 4096],  # noqa: B006
    k: Annotated[int, typer.Option("--k", help="Columns, a multiple of 16.")] = 4096,
    json: JsonOption = False,
    plot: PlotOption = None,
    device: DeviceOption = "auto",
    repeats: RepeatsOption = 30,
) -> None:
    """Quantize bf16 activations [M, K] to NVFP4: per tensor and per token, beside a copy of the input."""
    where = pick_device(device)
    cases = [
        # Codes are half a byte a value, block scales a sixteenth.
        Case({"K": k, "M": rows}, name, partial(_setup, name, rows, k, where), bytes=int(rows * k * (2 + written)))
        for rows in m
        for name, written in (("per_token", 0.5625), ("per_tensor", 0.5625), ("copy", 2))
    ]
    run("Quantize activations", cases, where, json=json, plot=plot, repeats=repeats)


def _setup(name: str, rows: int, k: int, device: torch.device) -> Sequence[Call]:
    import torch

    from nvfp4_kernels import nvfp4_quantize

    inputs = [
        torch.randn(rows, k, device=device, dtype=torch.bfloat16) for _ in range(rotation(rows * k * 2, device, limit=16))
    ]
    if name == "copy":
        return [x.clone for x in inputs]
    if name == "per_token":
        base = torch.full((1,), 1 / (448 * 6), device=device)
        return [partial(nvfp4_quantize, x, base, per_token_activation=True) for x in inputs]
    return [partial(nvfp4_quantize, x, 448 * 6 / x.abs().amax().float().reshape(1)) for x in inputs]
