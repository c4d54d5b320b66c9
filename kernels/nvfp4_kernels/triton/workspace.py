"""What split-K kernels share between their blocks: fp32 partial sums, and counters that every user leaves zero.

A counter that a graph zeroes for itself would cost a launch at every call. So zeros are made outside of captures alone: a
buffer a stream for eager calls, and for captured ones a pool of which each call takes a part of its own, so that graphs may
run beside each other.
"""

from __future__ import annotations

import torch

from ..replay import asked

_POOL = 1 << 18
_MIN_BUFFER = 4096
_eager: dict[tuple[int, int], torch.Tensor] = {}
_pools: dict[int, list[torch.Tensor]] = {}  # the last one is in use; graphs hold addresses in the ones before
_taken: dict[int, int] = {}


def counters(device: torch.device, count: int) -> torch.Tensor:
    """int32 zeros [>= count] on a CUDA device, for kernels that leave them zero."""
    return asked(lambda: _counters(device, count))


def _counters(device: torch.device, count: int) -> torch.Tensor:
    index = device.index or 0
    if torch.cuda.is_current_stream_capturing():
        start = _taken.get(index, _POOL)
        if start + count > _POOL:  # nothing ran before the capture, or very much was captured at once
            return torch.zeros(count, dtype=torch.int32, device=device)
        _taken[index] = start + count
        return _pools[index][-1][start : start + count]
    if _taken.get(index, _POOL) > _POOL // 2:
        _pools.setdefault(index, []).append(torch.zeros(_POOL, dtype=torch.int32, device=device))
        _taken[index] = 0
    stream = (index, torch._C._cuda_getCurrentRawStream(index))
    kept = _eager.get(stream)
    if kept is None or kept.numel() < count:
        kept = _eager[stream] = torch.zeros(max(count, _MIN_BUFFER), dtype=torch.int32, device=device)
    return kept


def split_k(device: torch.device, values: int, tiles: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for `values` fp32 partial sums, and the counters of their tiles."""
    return torch.empty(values, dtype=torch.float32, device=device), counters(device, tiles)
