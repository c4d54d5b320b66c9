"""What kernels and their choice have to know of a device. torch is asked once: its answer takes several microseconds a call."""

from __future__ import annotations

import functools

import torch


@functools.cache
def cuda_device(index: int) -> tuple[str, int, int]:
    """Name, compute capability as major * 10 + minor, and multiprocessors of a CUDA device."""
    properties = torch.cuda.get_device_properties(index)
    return properties.name, properties.major * 10 + properties.minor, properties.multi_processor_count


def arch_of(device: torch.device) -> int:
    """The `ARCH` of a device, major * 10 + minor; 0 for the CPU (the interpreter)."""
    if device.type != "cuda":
        return 0
    return cuda_device(torch.cuda.current_device() if device.index is None else device.index)[1]


def hopper_problem(k: int) -> str | None:
    """What keeps a dense layer with K values a row from Hopper's kernels; None if nothing does."""
    if k % 32 == 0:
        return None
    return f"K = {k} is no multiple of 32: the rows of the weight are not 16-byte aligned, as bulk copies are"


def hopper_serves(device: torch.device, k: int) -> bool:
    """Whether Hopper's kernels serve a dense layer with K values a row on this device."""
    return arch_of(device) == 90 and hopper_problem(k) is None


def processors_of(device: torch.device) -> int:
    """Multiprocessors of a CUDA device."""
    return cuda_device(torch.cuda.current_device() if device.index is None else device.index)[2]
