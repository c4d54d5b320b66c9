"""W4A4 by the GEMMs of others, on Blackwell's FP4 tensor cores: cuBLAS's through torch, and FlashInfer's `mm_fp4`.

The activations are quantized by our own kernel, so that every backend multiplies the same codes. Both products take the block
scales of weight and activations in the 128x4 layout, so that a weight's, which a checkpoint holds row-major, are brought into
it at each call: a ninth of the weight's bytes, read and written. Scales of tokens and rows and the bias follow in a kernel of
ours. cuBLAS hands it fp32, and the output is rounded once; FlashInfer's product is bf16 already, and rounded a second time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..formats import SfLayout, to_layout
from ..reference.source import PLAIN, Source
from ..replay import unrepeatable
from .activation import sourced
from .launch import cdiv, launch, scale_stride
from .linear import check_dtype, quantize_nvfp4

_BLOCK = 1024


def linear(
    x: torch.Tensor,
    data: torch.Tensor,
    scales: torch.Tensor,
    row_scale: torch.Tensor,
    *,
    backend: str,
    activation: str,
    fp8_fold: torch.Tensor | None = None,
    input_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    source: Source = PLAIN,
) -> torch.Tensor:
    """x [M, K] fp16 or bf16 @ weight^T [K, N] -> [M, N] in x's dtype; as `reference.linear.linear` in a mode nvfp4_*.

    backend: "cublas", "flashinfer" or "cute-dsl". Raises TypeError for another dtype of x, ValueError for another mode and for
    a shape they do not take.
    """
    check_dtype(x)
    n, k = data.shape[0], data.shape[1] * 2
    if n % 16 or k % 32:
        raise ValueError(f"backend: {backend!r} cannot serve a weight [{n}, {k}]; N has to be a multiple of 16 and K one of 32")
    if not activation.startswith("nvfp4"):
        raise ValueError(f"backend: {backend!r} multiplies FP4 alone, allowed with it are nvfp4_per_token and nvfp4_per_tensor")
    out = torch.empty(x.shape[0], n, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    x = sourced(x, source, k).contiguous()
    codes, sf, token_scale = quantize_nvfp4(x, activation, input_scale, SfLayout.layout_128x4)
    weight_sf = to_layout(scales.contiguous().view(torch.uint8), SfLayout.layout_128x4)
    product = multiply(backend, codes, sf, data.contiguous(), weight_sf)
    return scale_product(product, token_scale, row_scale, bias, out)


def multiply(backend: str, codes: torch.Tensor, sf: torch.Tensor, data: torch.Tensor, weight_sf: torch.Tensor) -> torch.Tensor:
    """(codes [M, K/2] * sf) @ (data [N, K/2] * weight_sf)^T: [M, N], fp32 of cuBLAS and bf16 of FlashInfer."""
    if backend == "cublas":
        fp4, e4m3 = torch.float4_e2m1fn_x2, torch.float8_e4m3fn
        return torch._scaled_mm(
            codes.view(fp4), data.view(fp4).t(), scale_a=sf.view(e4m3), scale_b=weight_sf.view(e4m3), out_dtype=torch.float32
        )
    import flashinfer

    unrepeatable("FlashInfer launches kernels of its own")
    # bf16 whatever x is: unscaled products leave the range of fp16.
    kind = "cute-dsl" if backend == "cute-dsl" else "auto"
    one = torch.ones(1, dtype=torch.float32, device=codes.device)
    return flashinfer.mm_fp4(codes, data.t(), sf, weight_sf.t(), one, torch.bfloat16, backend=kind)


@triton.jit
def scale_product_kernel(
    product_ptr, token_ptr, row_ptr, bias_ptr, out_ptr, N, token_stride, row_stride, BIAS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out [M, N] = product [M, N] * token [M] * row [N] + bias [N], in fp32. A program: BLOCK values of a row."""
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    value = tl.load(product_ptr + m * N + n, mask=inside, other=0.0).to(tl.float32)
    value = value * tl.load(token_ptr + m * token_stride) * tl.load(row_ptr + n * row_stride, mask=inside, other=0.0)
    if BIAS:
        value += tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + m * N + n, value.to(out_ptr.dtype.element_ty), mask=inside)


def scale_product(
    product: torch.Tensor, token_scale: torch.Tensor, row_scale: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> torch.Tensor:
    """product [M, N] fp32 or bf16, times fp32 scales of tokens [M] or [1] and rows [N] or [1], plus bias [N], into out."""
    m, n = out.shape
    launch(
        scale_product_kernel, (m, cdiv(n, _BLOCK)), product, token_scale, row_scale, bias, out,
        n, scale_stride(token_scale), scale_stride(row_scale), BIAS=bias is not None, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    return out
