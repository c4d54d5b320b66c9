"""From what a framework has loaded to an `Nvfp4Weight`, and from there to a layer's parameters. No framework is imported.

A fused layer (qkv, gate and up) keeps the global scale of each of its logical matrices, as a factor per row.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from nvfp4_configs import Nvfp4Config
from nvfp4_kernels import Nvfp4Weight, quantize_weight
from nvfp4_kernels.dispatch import backends
from nvfp4_kernels.formats import E2M1_MAX, GROUP_SIZE
from nvfp4_kernels.reference.weight import SCALE_BASE

from .checkpoint import TensorNames

logger = logging.getLogger("nvfp4_plugin")

ReduceMax = Callable[[torch.Tensor], torch.Tensor]
"""Takes amax values, fp32, to their maximum over the ranks that hold shards of the same matrix."""
Describe = Callable[[str], str]
"""Adds to a tensor's name the file that it came from."""


def check_input_size(name: str, k: int, ranks: int = 1) -> None:
    """ValueError unless a layer of K = `k` per rank can be quantized."""
    if k % GROUP_SIZE:
        shard = f" on each of {ranks} ranks" if ranks > 1 else ""
        remedy = "lower the tensor-parallel size or add" if ranks > 1 else "add"
        raise ValueError(
            f"{name}: K is {k}{shard}, NVFP4 needs a multiple of {GROUP_SIZE}; {remedy} the layer to `ignore` "
            "to leave it unquantized"
        )


def experts_backend(options: Nvfp4Config) -> str:
    """The backend of a model's experts: that of its options, or "cuda" where that has dense layers alone."""
    if options.backend in backends("fused_moe"):
        return options.backend
    _log_once(f"experts are served by the backend 'cuda': {options.backend!r} has dense layers alone")
    return "cuda"


@functools.cache
def _log_once(message: str) -> None:
    logger.warning(message)


# ---------------------------------------------------------------------------------------------------------------------
# Quantizing plain weights


def _decode_scales(weights: Sequence[torch.Tensor], scale_search: str, reduce_max: ReduceMax) -> torch.Tensor:
    """The global scales that `quantize_weight` would choose for whole matrices of which `weights` are this rank's shards."""
    zero = torch.zeros((), dtype=torch.float32, device=weights[0].device)
    amax = torch.stack([weight.abs().amax().to(torch.float32) if weight.numel() else zero for weight in weights])
    amax = reduce_max(amax)
    encode = torch.where(amax > 0, SCALE_BASE[scale_search] * E2M1_MAX / amax, 1.0)
    return 1.0 / encode.clamp(max=torch.finfo(torch.float32).max)


def _quantize_into(
    data: torch.Tensor, scales: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, search: str, tensor: str
) -> torch.Tensor:
    """Quantize `weight` [N, K] into `data` and `scales`; returns its global scale, fp32 []."""
    try:
        quantized = quantize_weight(weight, scale_search=search, global_scale=scale)
    except ValueError as error:
        raise ValueError(f"{tensor}: {error}") from None
    data.copy_(quantized.data)
    scales.copy_(quantized.scales)
    return quantized.global_scale


def quantize_linear(
    weight: torch.Tensor,
    widths: Sequence[int],
    parts: Sequence[str],
    *,
    scale_search: str,
    describe: Describe = str,
    reduce_max: ReduceMax | None = None,
) -> Nvfp4Weight:
    """Quantize a layer's weight [N, K] whose rows are `widths` of the logical matrices `parts` (module names, for messages).

    reduce_max: given where other ranks hold shards of the same matrices, so that all of them get the scales of the whole.
    ValueError naming the tensor and its file if the weight holds a NaN or an infinity.
    """
    return _quantize_stack(
        weight[None],
        widths,
        [parts],
        scale_search=scale_search,
        describe=describe,
        reduce_max=reduce_max,
        stacked=False,
    )


def quantize_experts(
    weight: torch.Tensor,
    widths: Sequence[int],
    parts: Callable[[int], Sequence[str]],
    *,
    scale_search: str,
    describe: Describe = str,
    reduce_max: ReduceMax | None = None,
    load: Callable[[int], None] | None = None,
) -> Nvfp4Weight:
    """`quantize_linear` for a stack of experts [E, N, K], one expert after the other: nothing of the stack is copied.

    parts: the logical matrices of a local expert, by its index.
    reduce_max: is called once for each expert, in their order.
    load: is called with an expert's index before that expert is read, for a stack that holds one expert at a time (stride 0).
    """
    return _quantize_stack(
        weight,
        widths,
        [parts(expert) for expert in range(weight.shape[0])],
        scale_search=scale_search,
        describe=describe,
        reduce_max=reduce_max,
        load=load,
        stacked=True,
    )


def part_rows(*stacks: torch.Tensor) -> None:
    """Put the rows of gate and up, which take turns in each stack [E, 2N, ...], below each other, in place."""
    for stack in stacks:
        for expert in stack:
            expert.copy_(torch.cat([expert[0::2], expert[1::2]]))


def _quantize_stack(
    weight: torch.Tensor,
    widths: Sequence[int],
    parts: Sequence[Sequence[str]],
    *,
    scale_search: str,
    describe: Describe,
    reduce_max: ReduceMax | None,
    load: Callable[[int], None] | None = None,
    stacked: bool,
) -> Nvfp4Weight:
    experts, n, k = weight.shape
    data = torch.empty(experts, n, k // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(experts, n, k // GROUP_SIZE, dtype=torch.float8_e4m3fn, device=weight.device)
    rows = list(_row_slices(widths))
    assert sum(widths) == n, (widths, n)
    global_scales = []
    for expert in range(experts):
        if load is not None:
            load(expert)
        shared = None
        if reduce_max is not None:
            shared = _decode_scales([weight[expert, part] for part in rows], scale_search, reduce_max)
        for i, part in enumerate(rows):
            where = expert, part
            scale = None if shared is None else shared[i]
            tensor = describe(f"{parts[expert][i]}.weight")
            global_scales.append(_quantize_into(data[where], scales[where], weight[where], scale, scale_search, tensor))
    per_part = torch.stack(global_scales).view(experts, len(widths))
    return _assemble(data, scales, per_part, widths, stacked)


def _row_slices(widths: Sequence[int]) -> Iterator[slice]:
    start = 0
    for width in widths:
        yield slice(start, start + width)
        start += width


def _assemble(
    data: torch.Tensor, scales: torch.Tensor, global_scales: torch.Tensor, widths: Sequence[int], stacked: bool
) -> Nvfp4Weight:
    """Codes [E, N, K/2] and fp32 decode scales [E, P] of P logical matrices to a weight; not `stacked`: E is 1 and goes."""
    if len(widths) == 1:
        global_scale = global_scales[:, 0].contiguous()
    else:
        repeats = torch.tensor(widths, device=global_scales.device)
        global_scale = global_scales.repeat_interleave(repeats, dim=1, output_size=sum(widths))
    if not stacked:
        data, scales, global_scale = data[0], scales[0], global_scale[0]
    return Nvfp4Weight(data, scales, global_scale)


# ---------------------------------------------------------------------------------------------------------------------
# Taking over quantized tensors


def load_linear(
    data: torch.Tensor,
    scales: torch.Tensor,
    global_scales: torch.Tensor,
    widths: Sequence[int],
    parts: Sequence[str],
    names: TensorNames,
    *,
    describe: Describe = str,
) -> Nvfp4Weight:
    """The weight of a layer from a checkpoint's tensors: codes [N, K/2], scales [N, K/16], stored global scales [P].

    ValueError naming the tensor if a scale is not finite, or a global one not above 0. Whether all values came is for the
    frameworks' sides to count: codes do not show it, and scales only in storage that was `unloaded`.
    """
    decode = _checked_scales(scales[None], global_scales[None], widths, [parts], names, describe)
    return _assemble(data[None], scales[None], decode, widths, stacked=False)


def load_experts(
    data: torch.Tensor,
    scales: torch.Tensor,
    global_scales: torch.Tensor,
    widths: Sequence[int],
    parts: Callable[[int], Sequence[str]],
    names: TensorNames,
    *,
    describe: Describe = str,
) -> Nvfp4Weight:
    """`load_linear` for a stack of experts: codes [E, N, K/2], scales [E, N, K/16], stored global scales [E, P]."""
    every = [parts(expert) for expert in range(data.shape[0])]
    decode = _checked_scales(scales, global_scales, widths, every, names, describe)
    return _assemble(data, scales, decode, widths, stacked=True)


def _checked_scales(
    scales: torch.Tensor,
    global_scales: torch.Tensor,
    widths: Sequence[int],
    parts: Sequence[Sequence[str]],
    names: TensorNames,
    describe: Describe,
) -> torch.Tensor:
    """Stored global scales [E, P] as decode scales, after a look for what is missing, not finite or negative."""
    decode = names.decode(global_scales)
    # By their codes, as isnan has no float8 kernel on every device: NaN is 0x7F, and from 0x80 on there is a sign.
    codes = scales.view(torch.uint8)
    wrong = (codes >= 0x7F).flatten(1).any(-1)
    bad = ~(decode.isfinite() & (decode > 0)).all(-1)
    if bool((wrong | bad).any()):  # one read from the device for each layer
        for expert, matrices in enumerate(parts):
            for part, rows in enumerate(_row_slices(widths)):
                if not bool(decode[expert, part].isfinite() & (decode[expert, part] > 0)):
                    value = float(global_scales[expert, part])
                    _refuse(describe(f"{matrices[part]}.{names.global_scale}"), value, "a finite number above 0")
                found = codes[expert, rows].flatten()
                found = found[found >= 0x7F]
                if len(found):
                    value = float(found[:1].view(torch.float8_e4m3fn).float())
                    _refuse(describe(f"{matrices[part]}.{names.scale}"), value, "e4m3 numbers without a sign")
    return decode


def load_input_scales(
    stored: torch.Tensor, parts: Callable[[int], Sequence[str]], names: TensorNames, *, describe: Describe = str
) -> torch.Tensor:
    """Static input scales [E, P] as stored to decode scales fp32 [E]: the logical matrices of a layer read the same input,
    so the largest of theirs serves all of them. ValueError naming the tensor of one that is not a finite number above 0."""
    decode = names.decode(stored)
    good = decode.isfinite() & (decode > 0)
    if not bool(good.all()):
        expert, part = (~good).nonzero()[0].tolist()
        tensor = describe(f"{parts(expert)[part]}.{names.input_scale}")
        _refuse(tensor, float(stored[expert, part]), "a finite number above 0")
    return decode.amax(-1)


def _refuse(tensor: str, value: float, allowed: str) -> None:
    # NaN is also what `unloaded` leaves where no tensor arrived.
    got = "it is missing from the checkpoint, or NaN" if value != value else f"got {value}"
    raise ValueError(f"{tensor}: {got}; allowed: {allowed}")


def unloaded(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Storage for a tensor of the checkpoint; a float8 or float tensor holds NaN until something is loaded into it. vLLM makes
    storage of its own when it reloads, which holds anything."""
    if dtype == torch.float8_e4m3fn:
        return torch.full(shape, 0x7F, dtype=torch.uint8).view(dtype)
    if dtype.is_floating_point:
        return torch.full(shape, float("nan"), dtype=dtype)
    return torch.empty(shape, dtype=dtype)


# ---------------------------------------------------------------------------------------------------------------------
# A layer's parameters


def parameter_names(names: TensorNames, prefix: str = "") -> dict[str, str]:
    """Field of Nvfp4Weight -> parameter of a layer. Codes and scales keep the names that they have in the checkpoint, so that
    a framework finds them there again when it reloads; what is derived from them gets names of its own."""
    own = {"data": names.weight, "scales": names.scale, "global_scale": "weight_decode_scale"}
    return {field.name: prefix + own.get(field.name, f"weight_{field.name}") for field in dataclasses.fields(Nvfp4Weight)}


def install(layer: torch.nn.Module, weight: Nvfp4Weight, names: Mapping[str, str]) -> None:
    """Make the tensors of `weight` parameters of `layer`, called as `parameter_names` says.

    As parameters they move, are counted and are refreshed on a reload as any other weight of the framework is.
    """
    for field, name in names.items():
        set_parameter(layer, name, getattr(weight, field))


def set_parameter(layer: torch.nn.Module, name: str, tensor: torch.Tensor | None) -> None:
    """Replace the parameter `name` of `layer`, but for its weight loader; a parameter that holds `tensor` already stays.

    Unless it is one of the frameworks' own kinds, through whose Python every op that reads it would go.
    """
    old = layer._parameters.get(name)
    if tensor is None:
        layer.register_parameter(name, None)
        return
    if (
        old is not None
        and type(old).__torch_function__ is torch.nn.Parameter.__torch_function__
        and (old.shape, old.is_meta) == (tensor.shape, False)
        and old.data_ptr() == tensor.data_ptr()
    ):
        return
    parameter = torch.nn.Parameter(tensor, requires_grad=False)
    if hasattr(old, "weight_loader"):
        # More may come for a layer that is whole: the experts of other ranks, which the loader passes over.
        parameter.weight_loader = old.weight_loader  # type: ignore[union-attr,attr-defined]
    if old is not None:
        delattr(layer, name)
    layer.register_parameter(name, parameter)


def installed(parameters: Mapping[str, Any], names: Mapping[str, str]) -> Nvfp4Weight:
    """The weight that `install` took apart, of a layer's `_parameters`: its attributes are ten times as slow, and experts are
    called without a compiler."""
    return Nvfp4Weight(**{field: parameters[name] for field, name in names.items()})
