"""What compiles kernels while a model loads. Which kernels these are shows on a GPU alone; a CPU has none."""

from __future__ import annotations

from typing import Any

import torch

from nvfp4_plugin import warmup


def test_nothing_is_called_on_a_cpu() -> None:
    calls: list[tuple[Any, ...]] = []

    def call(*args: Any) -> None:
        calls.append(args)

    device, done = torch.device("cpu"), set(warmup._done)
    warmup.warm_up_linear(torch.Size((64, 32)), torch.bfloat16, device, "none", call, "none")
    warmup.warm_up_fused_linear(torch.Size((64, 32)), torch.bfloat16, device, "rms_norm", call, "none")
    warmup.warm_up_moe(torch.Size((4, 64, 32)), torch.bfloat16, device, call, "none", experts=4, top_k=2)
    assert not calls
    assert warmup._done == done
