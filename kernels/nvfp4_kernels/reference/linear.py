"""Twin of the dense layer's kernels: fp32 arithmetic over the decoded operands, one rounding at the end."""

from __future__ import annotations

import torch

from ..formats import GROUP_SIZE, SfLayout, decode_packed, e4m3_decode
from .quantize import dequantize, quantize, row_chunks
from .source import PLAIN, Source, apply

ACTIVATIONS = ("nvfp4_per_token", "nvfp4_per_tensor", "fp8_per_token", "none")
INVERSE_BASE = 1.0 / (448.0 * 6.0)


def quantize_fp8_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[M, K] to e4m3 [M, K] and fp32 decode scales [M] = amax / 448 (a row of zeros: scale 0, codes 0)."""
    x = x.to(torch.float32)
    amax = x.abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[0])
    # A tensor on both sides: torch divides a CUDA tensor by a number through its reciprocal, which rounds twice.
    scale = amax / torch.full_like(amax, 448.0)
    values = torch.where((amax > 0).unsqueeze(-1), x / scale.unsqueeze(-1), x * 0.0)
    return values.clamp(-448.0, 448.0).to(torch.float8_e4m3fn), scale


def activation_operand(
    x: torch.Tensor, activation: str, input_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The values that enter the matrix product, fp32 [M, K], and the scale [M] or [1] that its rows are then multiplied by."""
    if activation == "none":
        return x.to(torch.float32), None
    if activation == "fp8_per_token":
        values, scale = quantize_fp8_per_token(x)
        return values.to(torch.float32), scale
    per_token = activation == "nvfp4_per_token"
    if per_token:
        encode = torch.tensor([INVERSE_BASE], dtype=torch.float32, device=x.device)
    else:
        assert input_scale is not None  # api.py refuses this mode without one
        encode = 1.0 / input_scale.reshape(1)
    codes, sf, scale = quantize(x, encode, layout=SfLayout.layout_linear, per_token=per_token)
    one = torch.ones(1, dtype=torch.float32, device=x.device)
    values = dequantize(codes, sf, one, layout=SfLayout.layout_linear)
    return values, scale if per_token else input_scale


def weight_operand(data: torch.Tensor, scales: torch.Tensor, fp8_fold: torch.Tensor | None) -> torch.Tensor:
    """e2m1 * SF of [N, K/2] codes in fp32 [N, K]; with `fp8_fold` [N] rounded to e4m3 after the fold, and unfolded again."""
    blocks = decode_packed(data).unflatten(-1, (-1, GROUP_SIZE))
    values = blocks.mul_(e4m3_decode(scales).unsqueeze(-1)).flatten(-2)
    if fp8_fold is None:
        return values
    fold = fp8_fold.unsqueeze(-1)
    return (values / fold).to(torch.float8_e4m3fn).to(torch.float32) * fold


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
    """x [M, K] @ weight^T [K, N] -> [M, N] in x's dtype.

    data uint8 [N, K/2], scales float8_e4m3fn [N, K/16], row_scale fp32 [1] or [N]; fp8_fold fp32 [N] for
    "fp8_per_token"; input_scale fp32 [1] for "nvfp4_per_tensor"; bias [N]. `source`: what x becomes before all this.
    """
    x = apply(x, source)
    operand, token_scale = activation_operand(x, activation, input_scale)
    fold = fp8_fold if activation == "fp8_per_token" else None
    out = torch.empty(x.shape[0], data.shape[0], dtype=x.dtype, device=x.device)
    for rows in row_chunks(data.shape[0], x.shape[1]):
        product = operand @ weight_operand(data[rows], scales[rows], None if fold is None else fold[rows]).t()
        if token_scale is not None:
            product *= token_scale.reshape(-1, 1)
        product *= row_scale[rows] if row_scale.numel() > 1 else row_scale
        if bias is not None:
            product += bias[rows].to(torch.float32)
        out[:, rows] = product.to(x.dtype)
    return out
