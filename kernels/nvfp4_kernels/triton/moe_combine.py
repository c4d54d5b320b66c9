"""What surrounds the products: activation functions as device functions, and the weighted un-permute."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from ..devices import arch_of
from ..reference.moe import SWIGLU_OAI_ALPHA, SWIGLU_OAI_LIMIT
from ..reference.moe_routing import Routing
from .launch import cdiv, launch, next_power_of_2

_ALPHA = tl.constexpr(SWIGLU_OAI_ALPHA)
_LIMIT = tl.constexpr(SWIGLU_OAI_LIMIT)


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _gelu_tanh(x):
    # tanh(z) = 2 * sigmoid(2z) - 1, so 0.5 * (1 + tanh(z)) = sigmoid(2z).
    return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


@triton.jit
def _relu2(x):
    positive = tl.where(x < 0, 0.0, x)  # NaN stays NaN
    return positive * positive


@triton.jit
def gated(gate, up, ACT_FN: tl.constexpr):
    """act_fn(gate, up) in fp32, for the names in `reference.moe.GATED`."""
    if ACT_FN == "silu":
        return _silu(gate) * up
    elif ACT_FN == "gelu":
        return _gelu(gate) * up
    elif ACT_FN == "gelu_tanh":
        return _gelu_tanh(gate) * up
    elif ACT_FN == "relu2":
        return _relu2(gate) * up
    else:
        tl.static_assert(ACT_FN == "swigluoai" or ACT_FN == "swigluoai_uninterleave")
        gate = tl.where(gate > _LIMIT, _LIMIT, gate)
        up = tl.where(up > _LIMIT, _LIMIT, tl.where(up < -_LIMIT, -_LIMIT, up))
        return (up + 1.0) * (gate / (1.0 + tl.exp(gate * -_ALPHA)))


@triton.jit
def ungated(x, ACT_FN: tl.constexpr):
    """act_fn(x) in fp32, for the names in `reference.moe.UNGATED`."""
    if ACT_FN == "silu_no_mul":
        return _silu(x)
    elif ACT_FN == "gelu_no_mul":
        return _gelu(x)
    elif ACT_FN == "gelu_tanh_no_mul":
        return _gelu_tanh(x)
    else:
        tl.static_assert(ACT_FN == "relu2_no_mul")
        return _relu2(x)


@triton.jit
def combine_kernel(
    y, index, topk_weights, out, hidden,
    TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for slot in range(TOP_K):
        row = tl.load(index + token * TOP_K + slot).to(tl.int64)
        # A slot without an expert adds nothing, whatever its weight holds.
        term = tl.load(y + row * hidden + column, mask=column < tl.where(row >= 0, hidden, 0), other=0.0).to(tl.float32)
        if WEIGHTED:
            term *= tl.load(topk_weights + token * TOP_K + slot, mask=row >= 0, other=0.0).to(tl.float32)
        total += term
    tl.store(out + token * hidden + column, total.to(out.dtype.element_ty), mask=column < hidden)


def combine(y: torch.Tensor, routing: Routing, topk_weights: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    """out[t] = sum over slots, in order and in fp32, of topk_weights[t, slot] * y[row of the slot]; no weights: plain sum."""
    tokens, top_k = routing.expanded_idx_to_permuted_idx.shape
    hidden = y.shape[1]
    block = min(next_power_of_2(hidden), 1024)
    pdl = arch_of(y.device) >= 90  # the launch overlaps the end of the one before
    launch(
        combine_kernel,
        (tokens, cdiv(hidden, block)),
        y,
        routing.expanded_idx_to_permuted_idx,
        topk_weights,
        out,
        hidden,
        TOP_K=top_k,
        WEIGHTED=topk_weights is not None,
        BLOCK=block,
        PDL=pdl,
        num_warps=4,
        enable_fp_fusion=False,  # the twin rounds the product and the sum
        **({"launch_pdl": True} if pdl else {}),
    )
    return out
