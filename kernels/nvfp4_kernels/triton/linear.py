"""The dense layer on a GPU: one entry that makes the activations ready, picks a GEMM and its tile, and launches it.

Six GEMMs serve it:

- "few": Hopper, up to 8 rows of 16-bit values; bound by the bytes of the weights (gemm_few.py).
- "decode": Hopper, tens of rows; likewise bound (gemm_decode.py).
- "large": Hopper, many rows; weights decoded in registers beside the products (gemm_large.py).
- "widen": fp8_per_token with very many rows; weights widened to e4m3 in a scratch, then the FP8 GEMM of cuBLAS (widen.py).
- "dot_scaled": Blackwell's FP4 tensor cores (gemm_dot_scaled.py).
- "portable": everything else (gemm_portable.py).

`plan` chooses. Tables of measured choices by device name lie in ../tables (`nvfp4 bench linear --tune` writes them);
what no table holds goes by a rule of thumb.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..devices import cuda_device
from ..formats import SfLayout
from ..reference.linear import INVERSE_BASE
from ..reference.source import PLAIN, Source
from . import gemm_portable
from .activation import decode, permute, quantize_fp8, sourced
from .launch import cdiv, launch, next_power_of_2
from .quantize import quantize
from .widen import widen_fp8
from .workspace import split_k

_TABLES = Path(__file__).parent.parent / "tables"
_FALLBACK = "NVIDIA H100 80GB HBM3"
_TILE_N = 128
_K_STEP = 256
_SMALL = 6144 * 4096  # weights of a layer whose tiles of 128 tokens are too few for the processors


@dataclass(frozen=True)
class Plan:
    """A GEMM, its parameters, and why it was chosen."""

    kernel: str
    parameters: dict[str, int] = field(default_factory=dict)
    reason: str = ""


# ---------------------------------------------------------------------------------------------------------------------
# Choosing


def user_table_path(name: str) -> Path:
    """Where `nvfp4 bench linear --tune` stores what it measured on a device of this name."""
    cache = os.environ.get("NVFP4_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "nvfp4")
    return Path(cache) / "linear" / f"{name.replace(' ', '_')}.json"


def shipped_table_path(name: str) -> Path:
    """Where this package keeps its table for a device of this name."""
    return _TABLES / f"{name.replace(' ', '_')}.json"


@functools.cache
def _table(name: str) -> tuple[dict[str, Any], str]:
    """The tuning table for a Hopper GPU, and where it was measured: what the user measured over what is shipped for the
    device; for a name without a shipped table the H100's, whose processors are the same."""
    shipped = shipped_table_path(name)
    origin = name if shipped.is_file() or user_table_path(name).is_file() else _FALLBACK
    merged: dict[str, Any] = {}
    for path in (shipped if shipped.is_file() else shipped_table_path(_FALLBACK), user_table_path(name)):
        if path.is_file():
            for mode, shapes in json.loads(path.read_text())["linear"].items():
                merged.setdefault(mode, {}).update(shapes)
    return merged, origin


def _measured(device: torch.device, mode: str, m: int, n: int, k: int) -> Plan | None:
    """What a table says: the entry of the first M there that is no smaller than m nor over twice as large, or of the last."""
    table, origin = _table(cuda_device(device.index or 0)[0])
    entries = table.get("none" if mode.startswith("nvfp4") else mode, {}).get(f"{n}x{k}")
    if not entries:
        return None
    rows = sorted(map(int, entries))
    at = next((row for row in rows if row >= m), rows[-1])
    if at > 2 * m:
        return None
    parameters = dict(entries[str(at)])
    return Plan(parameters.pop("kernel"), parameters, f"measured on {origin} for {n} x {k} at M = {at}")


def hopper_problem(n: int, k: int) -> str | None:
    """What keeps a shape from the Hopper GEMMs; None if nothing does."""
    if k % _K_STEP:
        return f"K = {k} is no multiple of {_K_STEP}, the step of the Hopper GEMMs"
    return None


def split_of(stages: int, tiles: int, blocks: int) -> int:
    """How many blocks share a tile's K: the largest divisor of `stages` up to blocks / tiles that leaves two stages each."""
    wanted = max(1, blocks // max(tiles, 1))
    return max((d for d in range(1, wanted + 1) if stages % d == 0 and stages // d >= 2), default=1)


def _rule_few(n: int, processors: int) -> Plan:
    # Measured best with 11 warps and more on every processor.
    warps = 4 if cdiv(n, 16) * 4 >= processors * 11 else 8
    return Plan("few", {"warps_k": warps, "warps_n": 1}, "a few rows are bound by the weights' bytes")


def _rule_decode(m: int, n: int, k: int, fp8: bool, processors: int) -> Plan:
    bm = min(64, max(16 if fp8 else 8, next_power_of_2(m)))
    shapes = {8: (4, 3, 4), 16: (4, 3, 4), 32: (4, 3, 4 if fp8 else 2), 64: (4, 3, 3) if fp8 else (8, 2, 2)}
    warps, stages, resident = shapes[bm]
    tiles = cdiv(n, 16 * warps) * cdiv(m, bm)
    # More shares than these cost more to add up than they gain.
    blocks = processors * 7 // 2 if bm <= 16 else processors * 2
    split = split_of(k // _K_STEP, tiles, blocks)
    return Plan(
        "decode",
        {"bm": bm, "warps": warps, "stages": stages, "resident": resident, "split": split},
        "tens of rows are bound by the weights' bytes",
    )


def _rule_large(m: int, n: int, k: int, processors: int) -> Plan:
    """The tile and split of the least time by a fit to measurements, in units of a step of a 128-token tile."""
    stages = k // _K_STEP
    best = (float("inf"), 0, 0)
    for bm, step, add in ((128, 1.0, 2.0), (256, 1.45, 3.0)):
        tiles = cdiv(n, _TILE_N) * cdiv(m, bm)
        for split in (d for d in range(1, 9) if d == 1 or (stages % d == 0 and stages // d >= 2 and tiles < processors)):
            waves = cdiv(tiles * split, processors)
            best = min(best, (waves * stages // split * step + (add * split if split > 1 else 0), bm, split))
    return Plan(
        "large",
        {"bm": best[1], "weight_stages": 3, "x_stages": 4, "group": 8, "split": best[2]},
        "weights decoded in registers beside the products",
    )


@functools.lru_cache(4096)
def plan(device: torch.device, mode: str, m: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> Plan:
    """The GEMM for x [m, k] in `dtype` under an activation mode (not "auto") and a weight [n, k] on `device`."""
    _, arch, processors = cuda_device(device.index or 0)
    if arch >= 100:
        from .gemm_dot_scaled import problem

        why = problem(mode, n, k)
        return Plan("portable", {}, why) if why else Plan("dot_scaled", {}, f"SM{arch} has FP4 tensor cores")
    if arch != 90:
        return Plan("portable", {}, f"SM{arch} has no wgmma")
    why = hopper_problem(n, k)
    if why:
        return Plan("portable", {}, why)
    measured = _measured(device, mode, m, n, k)
    if measured is not None and (measured.kernel != "widen" or _widen_serves(n, dtype)):
        return measured
    if m <= 4 and mode != "fp8_per_token":
        return _rule_few(n, processors)
    fp8 = mode == "fp8_per_token"
    if m <= 64 or (fp8 and m <= 128 and n * k <= _SMALL):
        return _rule_decode(m, n, k, fp8, processors)
    if fp8 and m > 2048 and _widen_serves(n, dtype):
        return Plan("widen", {}, "so many rows pay for a pass over the weights")
    return _rule_large(m, n, k, processors)


def _widen_serves(n: int, dtype: torch.dtype) -> bool:
    return n % 16 == 0 and dtype == torch.bfloat16  # torch._scaled_mm with row-wise scales


def faster_mode(device: torch.device, m: int, n: int, k: int) -> str:
    """What "auto" stands for on Ada and Hopper at this shape: "fp8_per_token" or "none"."""
    name, arch, _ = cuda_device(device.index or 0)
    if arch != 90 or hopper_problem(n, k):
        return "none"
    first = _table(name)[0].get("auto", {}).get(f"{n}x{k}")
    return "fp8_per_token" if m >= (9 if first is None else first) else "none"


def describe(mode: str, device: torch.device) -> tuple[str, str]:
    """(kernel, reason) for `nvfp4 doctor`: what serves a mode at 4096 x 4096, for one row and for many."""
    parts = []
    for m in (1, 256, 4096):
        resolved = mode
        if mode == "auto":
            from ..dispatch import resolve_activation

            resolved = resolve_activation(mode, device, m, 4096, 4096)
        chosen = plan(device, resolved, m, 4096, 4096)
        parts.append((chosen.kernel, f"M={m}: {f'{resolved}, ' if mode == 'auto' else ''}{chosen.reason}"))
    return "triton " + "/".join(dict.fromkeys(kernel for kernel, _ in parts)), "; ".join(reason for _, reason in parts)


# ---------------------------------------------------------------------------------------------------------------------
# Running


def _launch_few(
    options: dict[str, int],
    x: torch.Tensor,
    data: torch.Tensor,
    scales: torch.Tensor,
    row_scale: torch.Tensor,
    out: torch.Tensor,
    token_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> None:
    from .gemm_few import gemm_few

    m, k = x.shape
    n = data.shape[0]
    warps_k, warps_n = options["warps_k"], options["warps_n"]
    launch(
        gemm_few, (cdiv(n, 16 * warps_n),),
        data.view(torch.int32), scales.view(torch.int32), x, out, row_scale, token_scale, bias,
        n, m, k // _K_STEP, k // 8, k // 64, x.stride(0), 1 if row_scale.numel() > 1 else 0,
        KW=warps_k, NW=warps_n, TOKEN=token_scale is not None, BIAS=bias is not None,
        num_warps=warps_k * warps_n, launch_pdl=True,
    )  # fmt: skip


def _launch_wgmma(
    chosen: Plan,
    x: torch.Tensor,
    data: torch.Tensor,
    scales: torch.Tensor,
    row_scale: torch.Tensor,
    out: torch.Tensor,
    fold: torch.Tensor | None,
    token_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> None:
    """Launch "decode" or "large" on the operand x, K in the permuted order."""
    from .descriptors import descriptor

    m, k = x.shape
    n = data.shape[0]
    _, _, processors = cuda_device(x.device.index or 0)
    options = chosen.parameters
    bm = options["bm"]
    few = chosen.kernel == "decode"
    bn = 16 * options["warps"] if few else _TILE_N
    tiles = cdiv(n, bn) * cdiv(m, bm)
    words = descriptor(data, (bn, 32 if few else 16), torch.int32)
    pairs = descriptor(scales, (bn, 8), torch.int16)
    row_stride = 1 if row_scale.numel() > 1 else 0
    stages, split = k // _K_STEP, options["split"]
    partial, counters = split_k(x.device, tiles * split * bn * bm, tiles) if split > 1 else (None, None)
    if few:
        from .gemm_decode import gemm_decode

        registers = min(255, 65536 // (32 * options["warps"] * options["resident"]) // 8 * 8)
        launch(
            gemm_decode, (min(tiles * split, processors * options["resident"]),),
            words, pairs, descriptor(x, (bm, _K_STEP)), out,
            fold, row_scale, token_scale, bias, partial, counters, n, m, stages // split, split, row_stride,
            BM=bm, WARPS=options["warps"], STAGES=options["stages"],
            TOKEN=token_scale is not None, BIAS=bias is not None, REDUCE=split > 1,
            num_warps=options["warps"], maxnreg=registers, launch_pdl=True,
        )  # fmt: skip
        return
    from .gemm_large import gemm_large

    bulk = n % 8 == 0
    launch(
        gemm_large, (min(processors, tiles * split),),
        words, pairs, descriptor(x, (bm, 128 // x.element_size())),
        descriptor(out, (bm // 2, bn)) if bulk else None, out,
        fold, row_scale, token_scale, bias, partial, counters, n, m, stages // split, split, row_stride,
        BM=bm, WEIGHT_STAGES=options["weight_stages"], X_STAGES=options["x_stages"], GROUP=options["group"],
        TOKEN=token_scale is not None, BIAS=bias is not None, REDUCE=split > 1, BULK_STORE=bulk, num_warps=8,
        launch_pdl=True,
    )  # fmt: skip


def linear(
    x: torch.Tensor,
    data: torch.Tensor,
    scales: torch.Tensor,
    row_scale: torch.Tensor,
    *,
    activation: str,
    fp8_fold: torch.Tensor | None = None,
    input_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    source: Source = PLAIN,
) -> torch.Tensor:
    """x [M, K] fp16 or bf16 @ weight^T [K, N] -> [M, N] in x's dtype; as `reference.linear.linear`.

    Captures into CUDA graphs and never waits for the device. Raises TypeError for another dtype of x.
    """
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"x: got {x.dtype} on {x.device}, allowed on a GPU are float16 and bfloat16")
    m, k = x.shape[0], data.shape[1] * 2
    n = data.shape[0]
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if not m or not n:
        return out
    x = _aligned(x)
    if source.residual is not None:
        source = replace(source, residual=_aligned(source.residual))
    data, scales = data.contiguous(), scales.contiguous()
    chosen = plan(x.device, activation, m, n, k, x.dtype)
    if chosen.kernel == "widen" and bias is not None and bias.dtype != x.dtype:
        # cuBLAS adds a bias of the output's dtype alone.
        chosen = _rule_large(m, n, k, cuda_device(x.device.index or 0)[2])
    return run(chosen, x, data, scales, row_scale, out, activation, fp8_fold, input_scale, bias, source)


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x [M, K] with rows that 16-byte accesses can read."""
    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        return x.clone(memory_format=torch.contiguous_format)
    return x


def run(
    chosen: Plan,
    x: torch.Tensor,
    data: torch.Tensor,
    scales: torch.Tensor,
    row_scale: torch.Tensor,
    out: torch.Tensor,
    activation: str,
    fp8_fold: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    source: Source = PLAIN,
) -> torch.Tensor:
    """`linear` by a given plan, into out."""
    wgmma = chosen.kernel in ("decode", "large")
    token_scale: torch.Tensor | None = None
    fold: torch.Tensor | None = None
    if activation != "fp8_per_token":
        x, source = sourced(x, source, data.shape[1] * 2), PLAIN
    operand = x
    if chosen.kernel == "dot_scaled":
        from .gemm_dot_scaled import run as run_dot_scaled

        return run_dot_scaled(x, data, scales, row_scale, out, activation, input_scale, bias)
    if activation == "fp8_per_token":
        assert fp8_fold is not None  # ops.py derives it
        fold = fp8_fold
        operand, token_scale = quantize_fp8(x, "fp8" if wgmma else "natural", source)
    elif activation != "none":
        codes, sf, token_scale = quantize_nvfp4(x, activation, input_scale)
        operand = decode(codes, sf, x.dtype, "16" if wgmma else "natural")
    elif wgmma:
        operand = permute(x, "16")
    if wgmma:
        _launch_wgmma(chosen, operand, data, scales, row_scale, out, fold, token_scale, bias)
    elif chosen.kernel == "few":
        _launch_few(chosen.parameters, operand, data, scales, row_scale, out, token_scale, bias)
    elif chosen.kernel == "widen":
        assert fold is not None
        assert token_scale is not None
        wide, columns = widen_fp8(data, scales, fold, row_scale)
        return torch._scaled_mm(
            operand, wide.t(), scale_a=token_scale[:, None], scale_b=columns, bias=bias, out_dtype=out.dtype,
            use_fast_accum=True,
        )  # fmt: skip
    else:
        gemm_portable.run(operand, data, scales, row_scale, out, fp8_fold=fold, token_scale=token_scale, bias=bias)
    return out


def quantize_nvfp4(
    x: torch.Tensor, activation: str, input_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x to W4A4 codes, linear scales and the scale of each row, fp32 [M]."""
    if activation == "nvfp4_per_token":
        base = torch.full((1,), INVERSE_BASE, dtype=torch.float32, device=x.device)
        return quantize(x, base, layout=SfLayout.layout_linear, per_token=True)
    assert input_scale is not None  # api.py refuses this mode without one
    codes, sf, _ = quantize(x, 1.0 / input_scale.reshape(1), layout=SfLayout.layout_linear)
    return codes, sf, input_scale.reshape(1).expand(x.shape[0]).contiguous()
