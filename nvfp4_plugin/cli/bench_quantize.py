"""`nvfp4 bench quantize`: activation quantization."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from nvfp4_plugin.cli.benchmark import (
    Call,
    Case,
    DeviceOption,
    HostOption,
    JsonOption,
    PlotOption,
    RepeatsOption,
    Unavailable,
    check_words,
    pick_device,
    rotation,
    run,
    sizes,
)

if TYPE_CHECKING:
    import torch

LARGE = ("16384x4096", "16384x8192", "8192x14336", "65536x2048")
SMALL = tuple(f"{m}x{k}" for k in (4096, 14336) for m in (1, 4, 16, 64))
TOP_K = 4
"""Rows that each token goes to in the permuted form."""

# What a call moves, in bytes for each value of the [M, K] matrix: bf16 in; codes and block scales out.
_QUANTIZE = 2 + 0.5625
BYTES: dict[str, float] = {
    "per_token": _QUANTIZE,
    "per_token_8x4": _QUANTIZE,
    "per_token_linear": _QUANTIZE,
    "per_token_no_pdl": _QUANTIZE,
    "per_tensor": _QUANTIZE,
    "per_tensor_8x4": _QUANTIZE,
    "per_tensor_linear": _QUANTIZE,
    "per_tensor_no_pdl": _QUANTIZE,
    "silu_per_token": 4 + 0.5625,
    "silu_per_tensor": 4 + 0.5625,
    "permuted": 2 + TOP_K * 0.5625,
    "dequantize": _QUANTIZE,
    "copy": _QUANTIZE,
    "elementwise": 4,
    "compiled_reference": _QUANTIZE,
    "flashinfer": _QUANTIZE,
    "cute-dsl": _QUANTIZE,
}
"""What can be timed; "copy" moves the bytes of a quantization, half of them each way."""
COLUMNS = ("per_token", "per_tensor", "silu_per_token", "permuted", "copy", "elementwise", "compiled_reference", "flashinfer")


def quantize(
    shape: Annotated[list[str], typer.Option("--shape", help="MxK; may be given several times.")] = [*LARGE, *SMALL],  # noqa: B006
    only: Annotated[list[str], typer.Option("--only", help=f"A column, of {', '.join(BYTES)}.")] = [*COLUMNS],  # noqa: B006
    json: JsonOption = False,
    plot: PlotOption = None,
    device: DeviceOption = "auto",
    repeats: RepeatsOption = 30,
    host: HostOption = False,
) -> None:
    """Quantize bf16 activations [M, K] to NVFP4, beside copies of the same bytes, torch.compile and FlashInfer."""
    where = pick_device(device)
    check_words("--only", only, BYTES)
    cases = []
    for m, k in map(_shape, shape):
        for name in only:
            cases.append(Case({"K": k, "M": m}, name, partial(_setup, name, m, k, where), bytes=int(m * k * BYTES[name])))
    run("Quantize activations", cases, where, json=json, plot=plot, repeats=repeats, host=host)


def _shape(text: str) -> tuple[int, int]:
    shape = sizes(text, 2)
    if not shape or shape[1] % 16:
        raise typer.BadParameter(f"got {text!r}; allowed: MxK with K a multiple of 16", param_hint="--shape")
    return shape[0], shape[1]


def _setup(name: str, rows: int, k: int, device: torch.device) -> Sequence[Call]:
    import torch

    buffers = rotation(int(rows * k * BYTES[name]), device, limit=16)
    columns = 2 * k if name.startswith("silu") else k
    inputs = [torch.randn(rows, columns, device=device, dtype=torch.bfloat16) for _ in range(buffers)]
    if name == "copy":
        half = int(rows * k * BYTES[name]) // 2
        sources = [torch.randint(256, (half,), dtype=torch.uint8, device=device) for _ in range(buffers)]
        return [partial(torch.empty_like(source).copy_, source) for source in sources]
    if name == "elementwise":
        return [partial(torch.mul, x, 2.0, out=torch.empty_like(x)) for x in inputs]
    call = _call(name, rows, inputs[0])
    return [partial(call, x) for x in inputs]


def _call(name: str, rows: int, x: torch.Tensor) -> Callable[[torch.Tensor], object]:
    """What the column `name` does with an input like `x`."""
    import torch

    import nvfp4_kernels as nvfp4
    from nvfp4_kernels import SfLayout

    base = torch.full((1,), 1 / (448 * 6), device=x.device)
    scale = torch.full((1,), 448 * 6 / 5, device=x.device)
    layouts = {"linear": SfLayout.layout_linear, "8x4": SfLayout.layout_8x4}
    layout = layouts.get(name.rpartition("_")[2], SfLayout.layout_128x4)
    per_token = "per_tensor" not in name
    if name.startswith("silu"):
        return lambda x: nvfp4.silu_and_mul_nvfp4_quantize(x, base if per_token else scale, per_token_activation=per_token)
    if name.startswith("per_"):
        pdl = False if name.endswith("no_pdl") else None
        return lambda x: nvfp4.nvfp4_quantize(
            x, base if per_token else scale, layout, enable_pdl=pdl, per_token_activation=per_token
        )
    if name == "permuted":
        index = torch.randperm(rows * TOP_K, device=x.device).view(rows, TOP_K).int()
        return lambda x: nvfp4.nvfp4_permute_quantize(x, index, rows=rows * TOP_K)
    if name == "dequantize":
        x_q, sf = nvfp4.nvfp4_quantize(x, scale)
        inverse = 1 / scale
        return lambda x: nvfp4.nvfp4_dequantize(x_q, sf, inverse, dtype=torch.bfloat16)
    if name == "compiled_reference":
        return partial(_compiled_reference(), base)
    if x.device.type != "cuda" or torch.cuda.get_device_capability(x.device)[0] < 10:
        raise Unavailable("FlashInfer's nvfp4_quantize gives no result here: it needs SM100 or newer")
    try:
        nvfp4.nvfp4_quantize(x[:1], base, backend=name, per_token_activation=True)
    except (ValueError, ImportError) as error:
        raise Unavailable(str(error)) from None
    return lambda x: nvfp4.nvfp4_quantize(x, base, backend=name, per_token_activation=True)


def _compiled_reference() -> Callable[[torch.Tensor, torch.Tensor], object]:
    """torch.compile of the reference's per-token rules over the whole matrix, 128x4 scales included."""
    import torch

    from nvfp4_kernels.formats import to_layout
    from nvfp4_kernels.reference.quantize import quantize_blocks, token_scales

    def reference(inverse_base: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = x.to(torch.float32)
        g, scales = token_scales(values, inverse_base)
        x_q, sf = quantize_blocks(values, g)
        return x_q, to_layout(sf, 0), scales

    torch.compiler.reset()
    return torch.compile(reference, dynamic=False)
