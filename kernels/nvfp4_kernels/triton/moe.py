"""Mixture-of-experts layer on the GPU: route, permute and quantize, grouped GEMM 1 with its activation function, quantize,
grouped GEMM 2, weighted un-permute. Every step's launch is known from shapes alone, so that the layer captures into CUDA
graphs; the routing decides which programs have work.
"""

from __future__ import annotations

import torch

from ..devices import arch_of
from ..formats import align_scale_rows
from . import moe_gemm, moe_gemm_hopper
from .moe_combine import combine
from .moe_gemm import ExpertWeights
from .moe_operand import has_fp8_tensor_cores, operand
from .moe_routing import route

_CHUNK_SLOTS = 1 << 17  # (token, slot) pairs served at once: bounds the permuted buffers


def _block_m(slots: int, experts: int, hidden: int, inner: int, hopper: bool, fp8: bool) -> int:
    """Rows of a tile: for twice the mean slots of an expert, as far as timings on an H100 bear it out."""
    mean = slots / experts
    if hopper and mean <= (4 if experts > 16 else 2):
        return 8
    # The shorter K is, the more of a large tile's time its epilogue takes, which only full tiles make up for. In 16 bits
    # products take twice as long and decoding does not: less to gain.
    shortest = min(hidden, inner)
    least = 512 if not fp8 else 128 if shortest >= 4096 else 192 if shortest >= 1024 else 224
    if hopper and shortest >= 512 and mean >= least:
        return 256
    return 16 if mean <= 8 else 32 if mean <= 20 else 64 if mean <= 48 else 128


def faster_mode(device: torch.device, hidden: int, inner: int) -> str:
    """What "auto" stands for on Ada and Hopper for experts of this shape: "fp8_per_token" or "none".

    On Hopper e4m3 is ahead for any number of tokens: for one by up to 6 %, and at most 3 % behind.
    """
    return "none" if arch_of(device) != 90 or hidden % 32 or inner % 32 else "fp8_per_token"


def describe(activation: str, device: torch.device) -> tuple[str, str]:
    """Kernel and reason of an activation mode, for `nvfp4 doctor`."""
    what = ""
    if activation == "auto":
        from ..dispatch import resolve_moe_activation

        activation = resolve_moe_activation(activation, device, 4096, 4096)
        what = f"auto is {activation!r} here; "
    if arch_of(device) == 90:
        return "gluon moe_gemm_hopper", what + "SM90, both K multiples of 32 (the portable Triton GEMM takes other shapes)"
    operands = "e4m3" if activation == "fp8_per_token" and has_fp8_tensor_cores(arch_of(device)) else "16-bit"
    return "triton moe_gemm", f"{what}weights decoded in registers, {operands} operands on the tensor cores"


def _expert_weights(
    activation: str,
    data: torch.Tensor,
    scales: torch.Tensor,
    row_scale: torch.Tensor,
    fp8_fold: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> ExpertWeights:
    return ExpertWeights(
        data.contiguous(),
        align_scale_rows(scales),
        row_scale.contiguous(),
        fp8_fold.contiguous() if fp8_fold is not None and activation == "fp8_per_token" else None,
        input_scale.contiguous() if input_scale is not None and activation == "nvfp4_per_tensor" else None,
        None if bias is None else bias.contiguous(),
    )


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
    """As `reference.moe.fused_moe`; x fp16 or bf16."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"x: got {x.dtype} on {x.device}, allowed are float16 and bfloat16; backend 'reference' takes float32")
    tokens, top_k = topk_ids.shape
    out = torch.empty((tokens, w2_data.shape[1]), dtype=x.dtype, device=x.device)
    if x.stride(-1) != 1:
        x = x.contiguous()
    w13 = _expert_weights(activation, w13_data, w13_scales, w13_row_scale, w13_fp8_fold, w13_input_scale, w13_bias)
    w2 = _expert_weights(activation, w2_data, w2_scales, w2_row_scale, w2_fp8_fold, w2_input_scale, w2_bias)
    topk_weights = topk_weights.contiguous()
    # Of what all ranks' experts serve, the local ones get their share.
    experts = num_experts or (w13_data.shape[0] if expert_map is None else expert_map.numel())
    rest = (activation, act_fn, expert_map, experts, apply_router_weight_on_input)
    step = max(1, _CHUNK_SLOTS // max(top_k, 1))
    if tokens <= step:
        _forward(x, w13, w2, topk_weights, topk_ids, out, *rest)
        return out
    for start in range(0, tokens, step):
        chunk = slice(start, start + step)
        _forward(x[chunk], w13, w2, topk_weights[chunk], topk_ids[chunk], out[chunk], *rest)
    return out


def _forward(
    x: torch.Tensor,
    w13: ExpertWeights,
    w2: ExpertWeights,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    out: torch.Tensor,
    activation: str,
    act_fn: str,
    expert_map: torch.Tensor | None,
    experts: int,
    weights_on_input: bool,
) -> None:
    """One chunk of tokens, whose slots are over `experts` of all ranks, into `out`."""
    hopper = moe_gemm_hopper.serves(x.device, (w13, w2), act_fn)
    fp8 = activation == "fp8_per_token"
    block_m = _block_m(topk_ids.numel(), experts, x.shape[1], 2 * w2.data.shape[-1], hopper, fp8)
    routing = route(topk_ids, w13.data.shape[0], block_m, expert_map)
    if len(routing.tile_to_expert) == 0:
        out.zero_()
        return
    # GEMM 1 gathers the rows of a token where they are all the same and that is faster; else they are copied to their places.
    per_expert = w13.input_scale is not None and w13.input_scale.numel() > 1
    same = not weights_on_input and not per_expert
    gather = same and (not hopper or moe_gemm_hopper.gathers(block_m, topk_ids.shape[1], w13.data.shape[1]))
    a, a_scale = x, None
    if hopper or not gather or activation != "none":
        a, a_scale = operand(
            x,
            activation,
            input_scale=w13.input_scale,
            routing=None if gather else routing,
            permute=not gather,
            topk_weights=topk_weights if weights_on_input else None,
            block_m=block_m,
            reorder=hopper,
        )
    if hopper:
        h = moe_gemm_hopper.grouped_gemm(
            a, a_scale, w13, routing, dtype=x.dtype, block_m=block_m, gather=gather, act_fn=act_fn,
            operand_order=activation == "none",
        )  # fmt: skip
    else:
        h = moe_gemm.grouped_gemm(a, a_scale, w13, routing, dtype=x.dtype, block_m=block_m, gather=gather, act_fn=act_fn)
    h_scale = None
    if activation != "none":
        h, h_scale = operand(h, activation, input_scale=w2.input_scale, routing=routing, block_m=block_m, reorder=hopper)
    if hopper:
        y = moe_gemm_hopper.grouped_gemm(h, h_scale, w2, routing, dtype=x.dtype, block_m=block_m)
    else:
        y = moe_gemm.grouped_gemm(h, h_scale, w2, routing, dtype=x.dtype, block_m=block_m, gather=False)
    combine(y, routing, None if weights_on_input else topk_weights, out)
