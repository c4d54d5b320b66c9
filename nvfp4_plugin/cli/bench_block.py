"""`nvfp4 bench block`: the dense layers of a decoder block, one after the other, with the norms and SiLU between them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nvfp4_plugin.cli.bench_linear import PEERS, Layer, TableOption, check_tunable, keep_table, layer_copies, tuning_means
from nvfp4_plugin.cli.benchmark import (
    Call,
    Case,
    DeviceOption,
    HostOption,
    JsonOption,
    PlotOption,
    RepeatsOption,
    check_least,
    check_words,
    need,
    pick_device,
    rotation,
    run,
)

if TYPE_CHECKING:
    import torch

    from nvfp4_kernels.triton.tuning import Block, InBlock

# Hidden size, values of attention, of its keys, intermediate size.
BLOCKS = {
    "llama-3-8b": (4096, 4096, 1024, 14336),
    "llama-3-70b": (8192, 8192, 1024, 28672),
    "qwen3-32b": (5120, 8192, 1024, 25600),
}


def block(
    model: Annotated[list[str], typer.Option(help=f"{', '.join(BLOCKS)}; repeatable.")] = ["llama-3-8b"],  # noqa: B006
    ranks: Annotated[list[int], typer.Option(help="GPUs that share a block by tensor parallelism; repeatable.")] = [1],  # noqa: B006
    m: Annotated[list[int], typer.Option("--m", help="Rows (tokens); repeatable.")] = [1, 16, 64],  # noqa: B006
    peer: Annotated[
        list[str], typer.Option("--peer", help="Peers to time beside ours: marlin, humming and bf16, with vLLM's norms.")
    ] = [*PEERS, "bf16"],  # noqa: B006
    tune: Annotated[
        bool,
        typer.Option(
            "--tune", help="Choose GEMMs and tiles for 8 to 64 rows by the time of the block; after bench linear --tune."
        ),
    ] = False,
    output: TableOption = None,
    json: JsonOption = False,
    plot: PlotOption = None,
    device: DeviceOption = "auto",
    repeats: RepeatsOption = 30,
    host: HostOption = False,
) -> None:
    """The four dense layers of a decoder block, norms and SiLU included; a copy stands for attention."""
    from nvfp4_kernels.triton import tuning

    check_words("--model", model, BLOCKS)
    check_least("--ranks", ranks, 1)
    check_least("--m", m, 1)
    check_words("--peer", peer, (*PEERS, "bf16"))
    shared = [(name, among) for name in model for among in ranks]
    for name, among in shared:
        if any(size % (16 * among) for size in BLOCKS[name]):
            raise typer.BadParameter(f"got {among}, which {name} cannot be divided among", param_hint="--ranks")
    where = pick_device(device)
    blocks = {name if among == 1 else f"{name} on {among} GPUs": tuning.Block(*BLOCKS[name], among) for name, among in shared}
    if tune:
        check_tunable((shape for one in blocks.values() for shape in one.layers.values()), where, "--ranks")
        for one in blocks.values():
            keep_table(tuning.tune_block(one, where, **tuning_means(where, repeats)), output)
        return
    cases = []
    for label, one in blocks.items():
        values = sum(n * k for n, k in one.layers.values())
        for column in ("auto", *peer):
            weight_bytes = values * 2 if column == "bf16" else values * 9 // 16
            for rows in m:
                setup = partial(_setup, column, rows, one, where)
                cases.append(Case({"block": label, "M": rows}, column, setup, bytes=weight_bytes, flops=2 * rows * values))
    run("Dense layers of a block", cases, where, json=json, plot=plot, repeats=repeats, host=host)


def _setup(column: str, rows: int, block: Block, device: torch.device) -> Sequence[Call]:
    import torch

    x, residual = (torch.randn(rows, block.hidden, device=device, dtype=torch.bfloat16) for _ in range(2))
    return [partial(block.run, layer, x, residual) for layer in _blocks(column, block, device)]


@lru_cache(maxsize=1)
def _blocks(column: str, block: Block, device: torch.device) -> list[InBlock]:
    """The layers of a block over so many copies of their weights that each is cold when its turn comes."""
    import torch

    if column != "auto":
        need(device, "vllm._custom_ops")
    norm = torch.ones(block.hidden, device=device, dtype=torch.bfloat16)
    copies = {layer: layer_copies(column, *shape, device, "cuda") for layer, shape in block.layers.items()}
    count = max(2, rotation(sum(n * k * 9 // 16 for n, k in block.layers.values()), device))
    in_block = _ours if column == "auto" else _theirs
    return [partial(in_block, {layer: made[i % len(made)] for layer, made in copies.items()}, norm) for i in range(count)]


def _ours(
    layers: dict[str, Layer], norm: torch.Tensor, name: str, x: torch.Tensor, residual: torch.Tensor | None
) -> tuple[torch.Tensor, Any]:
    import torch

    from nvfp4_kernels.triton.tuning import SOURCES

    if SOURCES[name] == "plain":
        out: Any = layers[name](x)
        return out, None
    weight: Any = layers[name].keywords["weight"]  # type: ignore[attr-defined]
    layer = (weight.data, weight.scales, weight.row_scale(), "auto", weight.fp8_fold, None, None, "cuda")
    if residual is None:
        return torch.ops.nvfp4.silu_and_mul_linear(x, *layer), None
    return torch.ops.nvfp4.add_rms_norm_linear(x, residual, norm, 1e-5, *layer)


def _theirs(layers: dict[str, Layer], norm: torch.Tensor, name: str, x: torch.Tensor, residual: Any) -> tuple[Any, Any]:
    import torch
    from vllm import _custom_ops

    from nvfp4_kernels.triton.tuning import SOURCES

    if SOURCES[name] == "add_rms_norm":
        _custom_ops.fused_add_rms_norm(x, residual, norm, 1e-5)  # in place: x and the sum
    elif SOURCES[name] == "silu_and_mul":
        product = x.new_empty(x.shape[0], x.shape[1] // 2)
        torch.ops._C.silu_and_mul(product, x)
        x = product
    return layers[name](x), residual
