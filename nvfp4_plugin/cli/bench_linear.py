"""`nvfp4 bench linear`: dense layers."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
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
    time_calls,
)

if TYPE_CHECKING:
    import torch

    from nvfp4_kernels import Nvfp4Weight

Layer = Callable[["torch.Tensor"], object]

SHAPES = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "70b_qkv": (10240, 8192),
    "70b_o": (8192, 8192),
    "70b_gate_up": (57344, 8192),
    "70b_down": (8192, 28672),
    "qwen3_32b_qkv": (10240, 5120),
    "qwen3_32b_o": (5120, 8192),
    "qwen3_32b_gate_up": (51200, 5120),
    "qwen3_32b_down": (5120, 25600),
}
"""Layer -> (N, K): the linear layers of Llama-3-8B and -70B and of Qwen3-32B."""
PEERS = {"marlin": "MarlinNvFp4LinearKernel", "humming": "HummingNvFp4LinearKernel"}
"""Peer, a module of vLLM's NVFP4 kernels -> its class."""
TableOption = Annotated[Path | None, typer.Option("--output", help="Where --tune writes; by default the user's cache.")]
_VLLM_KERNELS = "vllm.model_executor.kernels.linear.nvfp4"


def linear(
    layer: Annotated[list[str], typer.Option("--layer", help="A layer of Llama-3 by name, or NxK; repeatable.")] = ["qkv"],  # noqa: B006
    m: Annotated[list[int], typer.Option("--m", help="Rows (tokens); repeatable.")] = [1, 16, 64, 256, 1024],  # noqa: B006
    mode: Annotated[list[str], typer.Option("--mode", help="Activation modes to time; repeatable.")] = [  # noqa: B006
        "none",
        "fp8_per_token",
        "nvfp4_per_token",
    ],
    peer: Annotated[
        list[str], typer.Option("--peer", help="Peers to time beside them: marlin and humming, in vLLM; repeatable.")
    ] = list(PEERS),  # noqa: B006
    backend: Annotated[
        str, typer.Option(help="Who serves the modes: cuda, reference; on Blackwell also cublas, flashinfer, cute-dsl.")
    ] = "cuda",
    tune: Annotated[
        bool, typer.Option("--tune", help="Measure every GEMM and tile for these layers and keep the best for this device.")
    ] = False,
    output: TableOption = None,
    json: JsonOption = False,
    plot: PlotOption = None,
    device: DeviceOption = "auto",
    repeats: RepeatsOption = 30,
    host: HostOption = False,
) -> None:
    """x @ weight^T over an NVFP4 weight in each activation mode, beside its peers, the bf16 layer and cuBLAS's FP8 product."""
    from nvfp4_kernels.dispatch import backends

    check_least("--m", m, 1)
    check_words("--mode", mode, get_args(Activation))
    check_words("--peer", peer, PEERS)
    check_words("--backend", [backend], backends("linear"))
    where = pick_device(device)
    if tune:
        _tune([_shape(name) for name in layer], where, output, repeats)
        return
    cases = []
    for name in layer:
        n, k = _shape(name)
        for column in (*mode, *peer, "bf16", *(("fp8 cuBLAS",) if where.type == "cuda" else ())):
            weight_bytes = {"bf16": n * k * 2, "fp8 cuBLAS": n * k}.get(column, n * k * 9 // 16)
            for rows in m:
                point: dict[str, str | int] = {"layer": f"{name} {n}x{k}" if name in SHAPES else name, "M": rows}
                cases.append(
                    Case(
                        point,
                        column,
                        partial(_setup, column, rows, n, k, where, backend),
                        bytes=weight_bytes + 2 * rows * (n + k),
                        flops=2 * rows * n * k,
                    )
                )
    run("Linear layers", cases, where, json=json, plot=plot, repeats=repeats, host=host)


def _shape(name: str) -> tuple[int, int]:
    if name in SHAPES:
        return SHAPES[name]
    shape = sizes(name, 2)
    if not shape or shape[1] % 16:
        raise typer.BadParameter(
            f"got {name!r}; allowed: {', '.join(SHAPES)}, or NxK with K a multiple of 16", param_hint="--layer"
        )
    return shape[0], shape[1]


def _tune(shapes: list[tuple[int, int]], device: torch.device, output: Path | None, repeats: int) -> None:
    """Measure all plans for the shapes and keep the best."""
    from nvfp4_kernels.triton import tuning

    check_tunable(shapes, device, "--layer")
    keep_table(tuning.tune(shapes, device, **tuning_means(device, repeats)), output)


def check_tunable(shapes: Iterable[tuple[int, int]], device: torch.device, option: str) -> None:
    """BadParameter where the device, or a shape that `option` gave, has no plans to choose among."""
    import torch

    from nvfp4_kernels.devices import hopper_problem

    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        raise typer.BadParameter("--tune chooses among Hopper's kernels: it needs an SM90 GPU", param_hint="--tune")
    for n, k in shapes:
        problem = hopper_problem(k)
        if problem:
            raise typer.BadParameter(f"{n}x{k}: {problem}", param_hint=option)


def tuning_means(device: torch.device, repeats: int) -> dict[str, Any]:
    """How `tuning` measures, and where it says what it found."""
    return {
        "time_calls": lambda calls, warm_up: time_calls(calls, device, repeats, warm_up=warm_up).seconds,
        "copies_of": lambda nbytes: rotation(nbytes, device, limit=32),
        "log": lambda line: typer.echo(line, err=True),
    }


def keep_table(table: dict[str, Any], output: Path | None) -> None:
    """Merge what was measured into the table at `output`, by default the user's, and say where that is."""
    import json

    from nvfp4_kernels.triton.linear import user_table_path

    path = output or user_table_path(table["device"])
    if path.is_file():
        kept = json.loads(path.read_text())
        for part in ("linear", "us"):
            for mode, entries in table[part].items():
                kept.setdefault(part, {}).setdefault(mode, {}).update(entries)
        table = kept
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n")
    typer.echo(f"wrote {path}")


def _setup(column: str, rows: int, n: int, k: int, device: torch.device, backend: str) -> Sequence[Call]:
    import torch

    x = torch.randn(rows, k, device=device, dtype=torch.bfloat16)
    if column == "fp8 cuBLAS":  # the product alone: its activations are e4m3 already
        x = x.to(torch.float8_e4m3fn)
    return [partial(layer, x) for layer in layer_copies(column, n, k, device, backend)]


@functools.lru_cache(maxsize=1)  # for all numbers of rows: peers take seconds to prepare a large weight
def layer_copies(column: str, n: int, k: int, device: torch.device, backend: str) -> list[Layer]:
    """The layer over as many copies of a weight as it takes for each to be cold when its turn comes."""
    import torch

    from nvfp4_kernels import nvfp4_linear, quantize_weight
    from nvfp4_kernels.dispatch import implementation

    weight = torch.randn(n, k, device=device, dtype=torch.bfloat16)
    if column == "bf16":
        weights = [weight.clone() for _ in range(rotation(n * k * 2, device, limit=16))]
        return [partial(_unquantized, w) for w in weights]
    if column == "fp8 cuBLAS":
        if torch.cuda.get_device_capability(device) < (8, 9):
            raise Unavailable("fp8 cuBLAS: the device has no FP8 tensor cores")
        scales = torch.ones(1 << 20, 1, device=device), torch.ones(1, n, device=device)
        weights = [weight.to(torch.float8_e4m3fn) for _ in range(rotation(n * k, device, limit=16))]
        return [partial(_fp8_product, w, *scales) for w in weights]
    if column in PEERS:
        need(device, f"{_VLLM_KERNELS}.{column}")
        quantized = quantize_weight(weight, scale_search="absmax")
        return [_peer(column, quantized) for _ in range(rotation(quantized.nbytes, device, limit=32))]
    try:
        implementation("linear", device, backend)
    except ValueError as error:
        raise Unavailable(f"{column}: {error}") from None
    quantized = quantize_weight(weight, scale_search="absmax")
    tensors = {key: value for key, value in vars(quantized).items() if value is not None}
    copies = [
        replace(quantized, **{key: value.clone() for key, value in tensors.items()}).prepared(column)
        for _ in range(rotation(quantized.nbytes, device, limit=32))
    ]
    scale = torch.full((1,), 4 / (448 * 6), device=device)
    return [partial(nvfp4_linear, weight=w, activation=column, input_scale=scale, backend=backend) for w in copies]


def _unquantized(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x @ weight.t()


def _fp8_product(weight: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    import torch

    scales = {"scale_a": rows[: len(x)], "scale_b": columns}
    return torch._scaled_mm(x, weight.t(), **scales, out_dtype=torch.bfloat16, use_fast_accum=True)


def _peer(name: str, weight: Nvfp4Weight) -> Layer:
    """vLLM's own kernel over a copy of the weight, as vLLM's layer for a compressed-tensors checkpoint sets it up."""
    import torch

    n, k = weight.shape
    layer: Any = torch.nn.Module()
    for parameter, value in (
        ("weight", weight.data),
        ("weight_scale", weight.scales),
        ("weight_global_scale", weight.global_scale),
    ):
        layer.register_parameter(parameter, torch.nn.Parameter(value.clone(), requires_grad=False))
    layer.input_size_per_partition, layer.output_size_per_partition, layer.output_partition_sizes = k, n, [n]
    layer.params_dtype, layer.has_bias, layer.bias = torch.bfloat16, False, None
    kernel = getattr(importlib.import_module(f"{_VLLM_KERNELS}.{name}"), PEERS[name])
    supported, reason = kernel.is_supported()
    if not supported:
        raise Unavailable(f"{name}: {reason}")
    prepared = kernel(importlib.import_module(_VLLM_KERNELS).NvFp4LinearLayerConfig())
    prepared.process_weights_after_loading(layer)
    return partial(prepared.apply_weights, layer)
