"""Twin of the mixture-of-experts layer: one expert after the other, every token's sum in the order of its top-k list."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .linear import linear
from .moe_routing import local_experts

SWIGLU_OAI_ALPHA = 1.702
SWIGLU_OAI_LIMIT = 7.0


def _swiglu_oai(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    gate = gate.clamp(max=SWIGLU_OAI_LIMIT)
    up = up.clamp(-SWIGLU_OAI_LIMIT, SWIGLU_OAI_LIMIT)
    return (up + 1.0) * gate * torch.sigmoid(SWIGLU_OAI_ALPHA * gate)


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def _relu2(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x).square()


UNGATED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu_no_mul": F.silu,
    "gelu_no_mul": F.gelu,
    "gelu_tanh_no_mul": _gelu_tanh,
    "relu2_no_mul": _relu2,
}
GATED: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "silu": lambda gate, up: F.silu(gate) * up,
    "gelu": lambda gate, up: F.gelu(gate) * up,
    "gelu_tanh": lambda gate, up: _gelu_tanh(gate) * up,
    "relu2": lambda gate, up: _relu2(gate) * up,
    "swigluoai": _swiglu_oai,
    "swigluoai_uninterleave": _swiglu_oai,
}
ACT_FNS = (*GATED, *UNGATED)
"""Names as in vLLM's MoEActivation. Gated: w13 is [gate; up] along its rows, but gate and up alternate for "swigluoai"."""


def apply_act_fn(h: torch.Tensor, act_fn: str) -> torch.Tensor:
    """The activation of GEMM 1's output [P, 2I] (gated) or [P, I], in fp32, rounded once to h's dtype: [P, I]."""
    x = h.to(torch.float32)
    if act_fn in UNGATED:
        return UNGATED[act_fn](x).to(h.dtype)
    gate, up = (x[:, 0::2], x[:, 1::2]) if act_fn == "swigluoai" else x.chunk(2, dim=-1)
    return GATED[act_fn](gate, up).to(h.dtype)


def _of_expert(t: torch.Tensor | None, expert: int) -> torch.Tensor | None:
    """Row `expert` of a tensor [E, ...], or a tensor [1] that all experts share."""
    if t is None or (t.dim() == 1 and t.numel() == 1):
        return t
    return t[expert].reshape(-1)


def fused_moe(
    x: torch.Tensor,
    w13_data: torch.Tensor,
    w13_scales: torch.Tensor,
    w13_row_scale: torch.Tensor,
    w2_data: torch.Tensor,
    w2_scales: torch.Tensor,
    w2_row_scale: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    activation: str,
    act_fn: str = "silu",
    w13_fp8_fold: torch.Tensor | None = None,
    w2_fp8_fold: torch.Tensor | None = None,
    w13_input_scale: torch.Tensor | None = None,
    w2_input_scale: torch.Tensor | None = None,
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    num_experts: int | None = None,
    apply_router_weight_on_input: bool = False,
) -> torch.Tensor:
    """Routed experts of [M, H] -> [M, H]. Each of the two products rounds to x's dtype, the weighted sum runs in fp32.

    w13 uint8 [E, 2I, H/2] (ungated: [E, I, H/2]), w2 uint8 [E, H, I/2], row scales fp32 [E, 1] or [E, rows], FP8 folds
    fp32 [E, rows], input scales fp32 [1] or [E], biases [E, rows]; topk_weights fp32 and topk_ids integer [M, top_k], an
    id below 0, or beyond the experts, names none; expert_map int32 [global experts] to local ones, -1 where remote.
    num_experts has no say in the result.
    """
    m, top_k = topk_ids.shape
    ids = local_experts(topk_ids, w13_data.shape[0], expert_map)
    outputs = torch.zeros(m * top_k, w2_data.shape[1], dtype=torch.float32, device=x.device)
    weights = topk_weights.to(torch.float32)
    flat_ids = ids.flatten()
    for expert in flat_ids.unique().tolist():
        if expert < 0:
            continue
        expanded = (flat_ids == expert).nonzero().squeeze(-1)
        rows = x[expanded // top_k]
        if apply_router_weight_on_input:
            rows = (rows.to(torch.float32) * weights.flatten()[expanded, None]).to(x.dtype)
        h = linear(
            rows,
            w13_data[expert],
            w13_scales[expert],
            w13_row_scale[expert],
            activation=activation,
            fp8_fold=_of_expert(w13_fp8_fold, expert),
            input_scale=_of_expert(w13_input_scale, expert),
            bias=_of_expert(w13_bias, expert),
        )
        y = linear(
            apply_act_fn(h, act_fn),
            w2_data[expert],
            w2_scales[expert],
            w2_row_scale[expert],
            activation=activation,
            fp8_fold=_of_expert(w2_fp8_fold, expert),
            input_scale=_of_expert(w2_input_scale, expert),
            bias=_of_expert(w2_bias, expert),
        )
        outputs[expanded] = y.to(torch.float32)
    outputs = outputs.view(m, top_k, w2_data.shape[1])
    result = torch.zeros(m, outputs.shape[-1], dtype=torch.float32, device=x.device)
    for slot in range(top_k):
        term = outputs[:, slot]
        if not apply_router_weight_on_input:
            # A slot without an expert adds nothing, whatever its weight holds.
            term = torch.where((ids[:, slot] >= 0)[:, None], term * weights[:, slot, None], 0.0)
        result += term
    return result.to(x.dtype)
