"""Compiles a layer's kernels while the model loads, so that no request has to wait for a compiler."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

logger = logging.getLogger("nvfp4_plugin")

# Where kernels of up to 64 rows differ, and what the log names.
_LINEAR_ROWS = [1 << i for i in range(13)]
# From there on they differ with the number of tiles, of 64 rows and more; so many rows are in a step at the most, as a rule.
_TILED_ROWS = range(64, (1 << 14) + 1, 64)
_MOE_ROWS = [1 << i for i in range(15)]
_done: set[tuple[Hashable, ...]] = set()


def _warm_up(
    what: str, device: torch.device, numbers: Sequence[int], call: Callable[[int], object], *variant: Hashable
) -> bool:
    """Make `call` for these numbers of rows, once for each `what` and `variant`; whether this was the time.

    Kernels differ with the number of rows, and Triton compiles each at its first call, here several at once. On a CPU there
    is nothing to compile.
    """
    key = (device, what, *variant)
    if device.type != "cuda" or key in _done:
        return False
    _done.add(key)
    start = time.perf_counter()

    def run(rows: int) -> None:
        with torch.cuda.device(device), torch.inference_mode():
            try:
                call(rows)
            except torch.OutOfMemoryError:
                logger.warning("nvfp4: %s: no memory to compile for %d rows, requests of that size may wait for it", what, rows)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(run, numbers))
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    logger.info("nvfp4: %s: kernels compiled in %.1f s", what, time.perf_counter() - start)
    return True


def warm_up_linear(
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    activation: str,
    call: Callable[[torch.Tensor], object],
    *variant: Hashable,
) -> None:
    """Compile what a dense layer of `shape` [N, K] runs, which `call` takes x [rows, K] through; log which kernels these are.

    `variant`: what else tells layers of this shape apart for the kernels, and the options that choose kernels: another model
    in this process may have others.
    """
    n, k = shape
    what = f"layers of {n} x {k}"

    def run(rows: int) -> object:
        return call(torch.zeros(rows, k, dtype=dtype, device=device))

    if device.type != "cuda":
        return
    from nvfp4_kernels.dispatch import explain_linear, rows_to_compile

    rows = {*_LINEAR_ROWS, *rows_to_compile(device, activation, n, k, dtype, (*_LINEAR_ROWS, *_TILED_ROWS))}
    if _warm_up(what, device, sorted(rows), run, dtype, *variant):
        logger.info("nvfp4: %s: rows %s", what, explain_linear(device, activation, n, k, dtype, _LINEAR_ROWS))


def warm_up_fused_linear(
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    kind: str,
    call: Callable[..., object],
    *variant: Hashable,
) -> None:
    """As `warm_up_linear`, for a layer and what comes before it: "rms_norm", of a sum or not, or "silu_and_mul".

    `call` takes one of the ops of `nvfp4_kernels.ops` for it, and the arguments of that op that come before the layer's.
    """
    n, k = shape

    def run(rows: int) -> None:
        from nvfp4_kernels import ops

        x = torch.zeros(rows, 2 * k if kind == "silu_and_mul" else k, dtype=dtype, device=device)
        if kind == "silu_and_mul":
            call(ops.silu_and_mul_linear, x)
            return
        weight = torch.ones(k, dtype=dtype, device=device)
        call(ops.rms_norm_linear, x, weight, 1e-6)
        call(ops.add_rms_norm_linear, x, torch.zeros_like(x), weight, 1e-6)

    _warm_up(f"layers of {n} x {k} behind {kind}", device, _LINEAR_ROWS, run, dtype, *variant)


def warm_up_moe(
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    call: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object],
    *variant: Hashable,
    experts: int,
    top_k: int,
) -> None:
    """Compile what experts run, of `shape` [E, 2I, K], of which a token takes `top_k` of `experts`, those of all ranks.

    `call` takes x [rows, K], the router's weights fp32 [rows, top_k] and its choices int32 [rows, top_k] through them.
    `variant` as in `warm_up_linear`.
    """

    def run(rows: int) -> object:
        ids = torch.arange(rows * top_k, dtype=torch.int32, device=device).view(rows, top_k) % experts
        x = torch.zeros(rows, shape[-1], dtype=dtype, device=device)
        return call(x, torch.ones_like(ids, dtype=torch.float32), ids)

    what = f"experts of {' x '.join(map(str, shape))}, {top_k} a token"
    _warm_up(what, device, _MOE_ROWS, run, dtype, *variant)
