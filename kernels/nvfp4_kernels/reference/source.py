"""What a dense layer's input is made of: x as it comes, or what models compute right before a layer, in one pass with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .quantize import silu_and_mul


@dataclass(frozen=True, eq=False)
class Source:
    """How the input [M, K] of a layer comes from what the layer is given, x.

    kind: "plain": x; "rms_norm": rms_norm(x); "add_rms_norm": rms_norm(x + residual), and the sum, rounded, is written to
        `total`; "silu_and_mul": silu(gate) * up of x [M, 2K], gate first.
    norm_weight: [K] in any floating dtype.
    eps: added to the mean of squares.
    residual, total: [M, K] in x's dtype.
    """

    kind: str = "plain"
    norm_weight: torch.Tensor | None = None
    eps: float = 0.0
    residual: torch.Tensor | None = None
    total: torch.Tensor | None = None


PLAIN = Source()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) of fp32 rows [M, K], rounded to weight's dtype, times weight [K], in `dtype`.

    As Hugging Face and vLLM define it (vllm/ir/ops/layernorm.py): what is rounded in between is the norm, by weight's dtype.
    """
    normalized = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (normalized.to(weight.dtype) * weight).to(dtype)


def apply(x: torch.Tensor, source: Source) -> torch.Tensor:
    """The layer's input [M, K] in x's dtype; `source.total` is filled."""
    if source.kind == "plain":
        return x
    if source.kind == "silu_and_mul":
        return silu_and_mul(x)
    values = x.to(torch.float32)
    if source.kind == "add_rms_norm":
        assert source.residual is not None
        assert source.total is not None
        # The norm takes the sum as it is before it is rounded.
        values = values + source.residual.to(torch.float32)
        source.total.copy_(values)
    assert source.norm_weight is not None
    return rms_norm(values, source.norm_weight, source.eps, x.dtype)
