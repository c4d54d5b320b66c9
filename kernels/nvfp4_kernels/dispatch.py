"""Which implementation serves an operation on a device, and why.

Every operation of `ops.py` has a torch twin in `reference/`; most have GPU kernels of the same name and signature in
`triton/`. The choice depends on the device, the backend that was asked for, and for matrix products on the shape.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .devices import arch_of

logger = logging.getLogger("nvfp4")

_OWN = ("cuda", "reference")
_VENDORS = ("cublas", "cute-dsl", "flashinfer")
"""Kernels of others, on Blackwell: cuBLAS's, and FlashInfer's in its two forms."""
_SERVE = {"quantize": ("cute-dsl", "flashinfer"), "linear": _VENDORS}
"""Operation -> the vendors that have it; the others have kernels and twins of this library alone."""
_MODULE_OF = {
    "quantize": "quantize",
    "permute_quantize": "quantize",
    "silu_and_mul_quantize": "quantize",
    "dequantize": "quantize",
    "search_scales": "weight",
    "linear": "linear",
    "fused_moe": "moe",
}


@dataclass(frozen=True)
class Choice:
    """One line of `nvfp4 doctor`: the kernel that serves an operation (in an activation mode) on a device, and why."""

    operation: str
    mode: str
    kernel: str
    reason: str


def _vendor_problem(backend: str, device: torch.device) -> str | None:
    """What keeps the functions of a vendor from serving `device`; None if nothing does."""
    if device.type != "cuda":
        return f"the tensor is on {device.type}, it needs a CUDA device of SM100 or newer"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 10:
        return f"this device is SM{major}{minor}, it needs SM100 or newer"
    if backend == "cublas":
        return None
    try:
        version("flashinfer-python")
    except PackageNotFoundError:
        return "the package flashinfer-python is not installed"
    return None


@functools.cache
def _gpu_function(operation: str) -> Callable[..., Any] | None:
    """The Triton function of `operation`, None where there is none."""
    try:
        module = importlib.import_module(f"nvfp4_kernels.triton.{_MODULE_OF[operation]}")
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("nvfp4_kernels"):
            logger.warning("nvfp4: no GPU kernel for %s, the torch reference serves it", operation)
            return None
        raise
    return getattr(module, operation)


def _reference_function(operation: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"nvfp4_kernels.reference.{_MODULE_OF[operation]}"), operation)


def implementation(operation: str, device: torch.device, backend: str = "cuda") -> Callable[..., Any]:
    """The function that serves `operation` for tensors on `device`.

    Raises ValueError for a backend that is unknown or cannot serve the device: nothing falls back in silence.
    """
    check_backend(backend, operation)
    if backend in _VENDORS:
        problem = _vendor_problem(backend, device)
        if problem is not None:
            raise ValueError(f"backend: {backend!r} cannot serve this call: {problem}")
        if operation == "linear":
            from .triton.gemm_vendor import linear

            return functools.partial(linear, backend=backend)
        from .flashinfer import quantize

        return functools.partial(quantize, backend="cute-dsl" if backend == "cute-dsl" else "cuda")
    if backend == "cuda" and device.type == "cuda":
        gpu = _gpu_function(operation)
        if gpu is not None:
            return gpu
    return _reference_function(operation)


def backends(operation: str) -> tuple[str, ...]:
    """The backends that have `operation`."""
    return (*_OWN, *_SERVE.get(operation, ()))


def check_backend(backend: str, operation: str) -> None:
    """ValueError unless `backend` has `operation`."""
    if backend not in backends(operation):
        raise ValueError(f"backend: got {backend!r} for {operation}, allowed are {', '.join(map(repr, backends(operation)))}")


def _settled(activation: str, device: torch.device, operation: str) -> str | None:
    """The mode that an activation stands for on `device` at any shape; None where the operation's own kernels decide."""
    if activation != "auto":
        return activation
    if device.type != "cuda":
        return "none"
    arch = arch_of(device)
    if arch >= 100:
        # Experts have no GEMM on FP4 tensor cores here: rounding their inputs to FP4 would cost accuracy and gain nothing.
        return "nvfp4_per_token" if operation == "linear" else "none"
    if arch < 89 or _gpu_function(operation) is None:
        return "none"
    return None


def resolve_activation(activation: str, device: torch.device, m: int, n: int, k: int) -> str:
    """The mode that "auto" stands for on `device` for a product [m, k] x [k, n]; any other mode is returned as it is."""
    settled = _settled(activation, device, "linear")
    return settled or importlib.import_module("nvfp4_kernels.triton.linear").faster_mode(device, m, n, k)


def resolve_moe_activation(activation: str, device: torch.device, hidden: int, inner: int) -> str:
    """As `resolve_activation` for experts from `hidden` to `inner` features and back."""
    settled = _settled(activation, device, "fused_moe")
    return settled or importlib.import_module("nvfp4_kernels.triton.moe").faster_mode(device, hidden, inner)


def fuses(device: torch.device, activation: str, backend: str = "cuda") -> bool:
    """Whether a dense layer is faster by the ops of `ops.py` that take in the norm or the SiLU before it.

    That is where its input is made ready by a kernel of its own, which then does both.
    """
    if backend != "cuda" or activation not in ("auto", "fp8_per_token") or device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) == (9, 0) and _gpu_function("linear") is not None


def explain(device: torch.device | str) -> list[Choice]:
    """What runs on `device` for every operation and activation mode, as `nvfp4 doctor` prints it."""
    device = torch.device(device)
    choices = []
    for operation in ("quantize", "permute_quantize", "silu_and_mul_quantize", "dequantize", "search_scales"):
        kernel, reason = _describe(operation, device)
        choices.append(Choice(operation, "-", kernel, reason))
    for operation in ("linear", "fused_moe"):
        for mode in ("auto", "nvfp4_per_token", "nvfp4_per_tensor", "fp8_per_token", "none"):
            kernel, reason = _describe(operation, device)
            if device.type == "cuda" and kernel.startswith("triton"):
                module = importlib.import_module(f"nvfp4_kernels.triton.{_MODULE_OF[operation]}")
                if hasattr(module, "describe"):
                    kernel, reason = module.describe(mode, device)
            elif mode == "auto":
                reason = f"auto is {resolve_activation('auto', device, 1, 4096, 4096)!r} here; {reason}"
            choices.append(Choice(operation, mode, kernel, reason))
    return choices


def _linear_plans(
    device: torch.device, activation: str, n: int, k: int, dtype: torch.dtype, rows: Iterable[int]
) -> Iterator[tuple[int, str, Any]]:
    """(rows, mode, plan) of a dense layer [n, k] on a CUDA device for each of these numbers of rows in x."""
    plan = importlib.import_module("nvfp4_kernels.triton.linear").plan
    for m in rows:
        mode = resolve_activation(activation, device, m, n, k)
        yield m, mode, plan(device, mode, m, n, k, dtype)


def rows_to_compile(
    device: torch.device, activation: str, n: int, k: int, dtype: torch.dtype, rows: Iterable[int]
) -> list[int]:
    """Of these numbers of rows in x, the first for each kernel that serves a dense layer [n, k] on a CUDA device."""
    first: dict[tuple[Any, ...], int] = {}
    for m, mode, plan in _linear_plans(device, activation, n, k, dtype, rows):
        first.setdefault((mode, plan.variant), m)
    return list(first.values())


def explain_linear(device: torch.device, activation: str, n: int, k: int, dtype: torch.dtype, rows: Sequence[int]) -> str:
    """What serves a dense layer [n, k] on a CUDA device, for these numbers of rows in x: "1: none by few, 2 to 64: ..."."""
    spans: list[tuple[str, int, int]] = []
    for m, mode, plan in _linear_plans(device, activation, n, k, dtype, sorted(rows)):
        what = f"{mode} by {plan.kernel}"
        if spans and spans[-1][0] == what:
            spans[-1] = (what, spans[-1][1], m)
        else:
            spans.append((what, m, m))
    return ", ".join(f"{first}: {what}" if first == last else f"{first} to {last}: {what}" for what, first, last in spans)


def _describe(operation: str, device: torch.device) -> tuple[str, str]:
    if device.type != "cuda":
        return f"torch reference ({operation})", f"tensors on {device.type} are served by the torch twin"
    if _gpu_function(operation) is None:
        return f"torch reference ({operation})", "there is no GPU kernel for it"
    major, minor = torch.cuda.get_device_capability(device)
    return f"triton {_MODULE_OF[operation]}.{operation}", f"a CUDA device of SM{major}{minor}"
