"""NVFP4 kernels for every device: quantization, dense layers and mixture-of-experts layers. Needs torch and triton alone."""

from .api import (
    nvfp4_dequantize,
    nvfp4_fused_moe,
    nvfp4_linear,
    nvfp4_permute_quantize,
    nvfp4_quantize,
    silu_and_mul_nvfp4_quantize,
)
from .formats import SfLayout, sf_shape
from .weight import Nvfp4Weight, quantize_weight

__all__ = [
    "Nvfp4Weight",
    "SfLayout",
    "nvfp4_dequantize",
    "nvfp4_fused_moe",
    "nvfp4_linear",
    "nvfp4_permute_quantize",
    "nvfp4_quantize",
    "quantize_weight",
    "sf_shape",
    "silu_and_mul_nvfp4_quantize",
]
