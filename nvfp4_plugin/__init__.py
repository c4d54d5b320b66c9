"""NVFP4 quantization for vLLM and SGLang: `--quantization nvfp4`. The public names live in the kernel library and configs.

They are imported on first use, so that a framework's plugin loader, which runs in every process, pays for none of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nvfp4_configs import Nvfp4Config
    from nvfp4_kernels import (
        Nvfp4Weight,
        SfLayout,
        nvfp4_dequantize,
        nvfp4_fused_moe,
        nvfp4_linear,
        nvfp4_permute_quantize,
        nvfp4_quantize,
        quantize_weight,
        silu_and_mul_nvfp4_quantize,
    )

__all__ = [
    "Nvfp4Config",
    "Nvfp4Weight",
    "SfLayout",
    "nvfp4_dequantize",
    "nvfp4_fused_moe",
    "nvfp4_linear",
    "nvfp4_permute_quantize",
    "nvfp4_quantize",
    "quantize_weight",
    "silu_and_mul_nvfp4_quantize",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module("nvfp4_configs" if name == "Nvfp4Config" else "nvfp4_kernels")
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
