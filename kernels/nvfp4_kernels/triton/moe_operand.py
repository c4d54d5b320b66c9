"""Rows of activations as the operand of a grouped GEMM: permuted by expert, quantized and decoded again, in one pass.

Off Blackwell an NVFP4 activation meets the tensor cores as e2m1 * SF, which bf16 and fp16 hold exactly, so it is written
like that; FP8 ones are e4m3 (on devices without FP8 tensor cores: their values in 16 bits). A row's fp32 scale goes to
the GEMM's epilogue.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..devices import arch_of
from ..reference.linear import INVERSE_BASE
from ..reference.moe_routing import Routing
from . import moe_operand_hopper
from .launch import cdiv, launch, next_power_of_2
from .numerics import (
    block_scale,
    clamp_finite,
    divide,
    e2m1_magnitude,
    e4m3_decode,
    e4m3_encode,
    max_positive,
    reciprocal,
)

_BASE = tl.constexpr(float(1.0 / torch.tensor(INVERSE_BASE, dtype=torch.float32)))
_MAX_BLOCK = 8192


@triton.jit
def _load_row(x, column, K, weight, WEIGHTED: tl.constexpr):
    """fp32 values of a row; multiplied by the router's weight and rounded to x's dtype first if WEIGHTED."""
    values = tl.load(x + column, mask=column < K, other=0.0).to(tl.float32)
    if WEIGHTED:
        values = (values * weight).to(x.dtype.element_ty).to(tl.float32)
    return values


@triton.jit
def _nvfp4_values(values, g, inverse_g, BLOCK: tl.constexpr, ARCH: tl.constexpr):
    """fp32 [BLOCK] to e2m1 * SF under the encode scale g."""
    blocks = tl.reshape(values, [BLOCK // 16, 16])
    scale, factor = block_scale(max_positive(tl.abs(blocks), 1), g, inverse_g, False, ARCH)
    scaled = blocks * factor[:, None]
    magnitude = e2m1_magnitude(tl.abs(scaled)) * e4m3_decode(scale)[:, None]
    return tl.reshape(tl.where(scaled < 0, -magnitude, magnitude), [BLOCK])


@triton.jit
def _fp8_codes(values, scale, ARCH: tl.constexpr):
    """fp32 to e4m3 codes (int32) of values / scale; a row of zeros (scale 0) gives zeros."""
    return e4m3_encode(tl.where(scale == 0, values * 0.0, divide(values, scale, ARCH)), ARCH)


@triton.jit
def operand_kernel(
    x, index, topk_weights, input_scale, tile_to_expert, out, out_scale, x_stride, K, width, block_m,
    MODE: tl.constexpr, SCATTER: tl.constexpr, TOP_K: tl.constexpr, COPIES: tl.constexpr, WEIGHTED: tl.constexpr,
    PER_EXPERT: tl.constexpr, REORDER: tl.constexpr, BLOCK: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """One row of x [rows, K] to `out` [.., width], with zeros behind it, and its scale to `out_scale`.

    SCATTER: row t goes to rows index[t, slot] for COPIES slots from program_id(1) on (none where negative). Otherwise it
    stays in its row, and is left out if index[row] is negative; without index every row is taken. REORDER: K in the order
    that the Hopper GEMM reads.
    """
    if ARCH >= 90:
        gdc_wait()
        gdc_launch_dependents()
    source = tl.program_id(0).to(tl.int64)
    slot = source * TOP_K + tl.program_id(1)
    row = source
    live = True
    if SCATTER and COPIES == 1:
        row = tl.load(index + slot).to(tl.int64)
        live = row >= 0
    elif not SCATTER and index is not None:
        live = tl.load(index + row) >= 0
    if live:
        weight = 1.0
        if WEIGHTED:
            weight = tl.load(topk_weights + slot).to(tl.float32)
        x += source * x_stride
        # Scalars of the row are tensors [1]: the exact divisions are inline PTX, which takes tensors.
        one = tl.full([1], 1.0, tl.float32)
        g = one
        inverse_g = one
        scale = one
        if MODE == "nvfp4_per_token" or MODE == "fp8_per_token":
            # Magnitudes order as their bit patterns do, a NaN above all: it reaches every value of its row.
            bits = tl.zeros([1], tl.int32)
            for start in range(0, K, BLOCK):
                values = _load_row(x, start + tl.arange(0, BLOCK), K, weight, WEIGHTED)
                bits = tl.maximum(bits, tl.max(tl.abs(values).to(tl.int32, bitcast=True), 0))
            amax = bits.to(tl.float32, bitcast=True)
            if MODE == "fp8_per_token":
                scale = divide(amax, one * 448.0, ARCH)
            else:
                g = tl.where(amax == 0, 0.0, clamp_finite(divide(one * _BASE, amax, ARCH)))
                inverse_g = reciprocal(g, False, ARCH)
                scale = tl.where(amax == 0, 0.0, inverse_g)
        elif MODE == "nvfp4_per_tensor":
            which = 0
            if PER_EXPERT:
                which = tl.load(tile_to_expert + row // block_m)
            g = reciprocal(one * tl.load(input_scale + which), False, ARCH)
            inverse_g = reciprocal(g, False, ARCH)
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            values = _load_row(x, column, K, weight, WEIGHTED)
            if MODE == "fp8_per_token":
                codes = _fp8_codes(values, scale, ARCH)
                values = codes.to(tl.uint8) if out.dtype.element_ty == tl.uint8 else e4m3_decode(codes)
            elif MODE != "none":
                values = _nvfp4_values(values, g, inverse_g, BLOCK, ARCH)
            values = values.to(out.dtype.element_ty)
            if REORDER:
                # K as (chunk of 128, t, word, half, code): 16-bit operands come in the order (word, code, t, half), e4m3
                # ones in (word, half, t, code); see hopper.py.
                parts = tl.reshape(values, [BLOCK // 128, 4, 4, 2, 4])
                if out.dtype.element_ty == tl.uint8:
                    parts = tl.permute(parts, [0, 2, 3, 1, 4])
                else:
                    parts = tl.permute(parts, [0, 2, 4, 1, 3])
                values = tl.reshape(parts, [BLOCK])
            for copy in range(COPIES):
                target = row
                if SCATTER and COPIES > 1:
                    target = tl.load(index + slot + copy).to(tl.int64)
                tl.store(out + target * width + column, values, mask=column < tl.where(target >= 0, width, 0))
        if MODE == "nvfp4_per_token" or MODE == "fp8_per_token":
            for copy in range(COPIES):
                target = row
                if SCATTER and COPIES > 1:
                    target = tl.load(index + slot + copy).to(tl.int64)
                at = target + tl.arange(0, 1)
                tl.store(out_scale + at, scale, mask=at >= 0)


def has_fp8_tensor_cores(arch: int) -> bool:
    """Whether e4m3 operands stay e4m3 up to the tensor cores: SM89 and newer (and the interpreter, arch 0)."""
    return arch == 0 or arch >= 89


def whole_stages(k: int) -> int:
    """Columns of an operand that the Hopper GEMMs read: their K goes in stages of 256."""
    return cdiv(k, 256) * 256


def operand(
    x: torch.Tensor,
    activation: str,
    *,
    input_scale: torch.Tensor | None = None,
    routing: Routing | None = None,
    permute: bool = False,
    topk_weights: torch.Tensor | None = None,
    block_m: int = 1,
    reorder: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Operand [rows, K] (x's dtype; float8_e4m3fn for "fp8_per_token" where tensor cores take it) and fp32 row scales.

    `routing` with `permute`: x is [tokens, K], rows go to their permuted places, multiplied by `topk_weights` first if
    given. `routing` alone: x is permuted already, and padding rows are left out. Rows that nothing names stay unwritten.
    Neither: rows stay where they are.
    `reorder`: K in the order of hopper.py, with zeros up to `whole_stages(K)`.
    """
    arch = arch_of(x.device)
    rows, k = x.shape
    fp8 = activation == "fp8_per_token" and has_fp8_tensor_cores(arch)
    per_token = activation in ("fp8_per_token", "nvfp4_per_token")
    per_expert = activation == "nvfp4_per_tensor" and input_scale is not None and input_scale.numel() > 1
    index, tile_to_expert, top_k = None, None, 1
    if routing is not None:
        index = routing.expanded_idx_to_permuted_idx if permute else routing.permuted_idx_to_token
        tile_to_expert = routing.tile_to_expert
        top_k = routing.expanded_idx_to_permuted_idx.shape[1] if permute else 1
    out_rows = len(routing.permuted_idx_to_token) if routing is not None else rows
    width = whole_stages(k) if reorder else k
    out = x.new_empty((out_rows, width), dtype=torch.uint8 if fp8 else x.dtype)
    scale = x.new_empty((out_rows,), dtype=torch.float32) if per_token else None
    # A slot's own weight or scale makes its row differ from the token's other slots.
    slots_differ = permute and (topk_weights is not None or per_expert)
    hopper = arch == 90 and fp8 and reorder and not slots_differ and k <= moe_operand_hopper.MAX_K
    if hopper and scale is not None:
        # By slots, which are fewer than permuted rows.
        slots = None if routing is None else routing.expanded_idx_to_permuted_idx
        moe_operand_hopper.operand_fp8(x, slots, out, scale, permute)
        return out.view(torch.float8_e4m3fn), scale
    block = min(next_power_of_2(width), _MAX_BLOCK)
    launch(
        operand_kernel,
        (rows, top_k if slots_differ else 1),
        x,
        index,
        topk_weights,
        input_scale,
        tile_to_expert,
        out,
        scale,
        x.stride(0),
        k,
        width,
        block_m,
        MODE=activation,
        SCATTER=permute,
        TOP_K=top_k,
        COPIES=1 if slots_differ else top_k,
        WEIGHTED=topk_weights is not None,
        PER_EXPERT=per_expert,
        REORDER=reorder,
        BLOCK=block,
        ARCH=arch,
        num_warps=4 if block <= 2048 else 8,
        enable_fp_fusion=False,
        **({"launch_pdl": True} if arch >= 90 else {}),
    )
    return out.view(torch.float8_e4m3fn) if fp8 else out, scale
