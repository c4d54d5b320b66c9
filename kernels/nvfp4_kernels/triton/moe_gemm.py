"""Grouped GEMM in plain Triton: any device from SM80 on, any shape. The path for what the Hopper kernel does not take.

A program multiplies one tile of permuted rows by BLOCK_N rows of their expert's weight, decoded in registers. The epilogue
scales, adds the bias, rounds, and applies the activation function where the product is GEMM 1's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..devices import arch_of
from ..reference.moe import UNGATED
from ..reference.moe_routing import Routing
from .activation import round_e4m3
from .launch import cdiv, launch
from .moe_combine import gated, ungated
from .numerics import e4m3_decode

_GATED = 2
_UNGATED = 1


class ExpertWeights(NamedTuple):
    """A stack of experts as `reference.moe.fused_moe` takes it, contiguous but for the rows of `scales`, which may lie further
    apart; what its mode does not use is None."""

    data: torch.Tensor
    scales: torch.Tensor
    row_scale: torch.Tensor
    fp8_fold: torch.Tensor | None
    input_scale: torch.Tensor | None
    bias: torch.Tensor | None


@triton.jit
def decode_tile(packed, scale, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, dtype: tl.constexpr, ROUND: tl.constexpr):
    """Codes uint8 [BLOCK_N, BLOCK_K/2] times fp32 scales [BLOCK_N, BLOCK_K/16] to `dtype` [BLOCK_N, BLOCK_K].

    Exact in 16 bits; ROUND: to e4m3 values, also where `dtype` is wider.
    """
    code = tl.reshape(packed, [BLOCK_N, BLOCK_K // 16, 8]).to(tl.int32)
    # An e2m1 code in fp32's exponent and mantissa fields is its value times 2^-126.
    even = ((code & 0x7) << 22 | (code & 0x8) << 28).to(tl.float32, bitcast=True) * 8.507059173023462e37
    odd = ((code & 0x70) << 18 | (code & 0x80) << 24).to(tl.float32, bitcast=True) * 8.507059173023462e37
    even *= scale[:, :, None]
    odd *= scale[:, :, None]
    if ROUND and dtype != tl.float8e4nv:
        even = round_e4m3(even)
        odd = round_e4m3(odd)
    return tl.reshape(tl.join(even.to(dtype), odd.to(dtype)), [BLOCK_N, BLOCK_K])


@triton.jit(do_not_specialize=["n_blocks"])
def grouped_gemm_kernel(
    x, row_of, x_scale, data, scales, row_scale, fold, input_scale, bias, tile_to_expert, out,
    x_stride, scales_stride, N, K, n_blocks, row_scale_expert, row_scale_row, input_scale_expert,
    GATHER: tl.constexpr, ACT: tl.constexpr, ACT_FN: tl.constexpr, INTERLEAVED: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """out[row] = epilogue(x[row_of[row]] @ weight[expert of the row's tile]^T); without GATHER x is permuted already.

    ACT 2: the columns of a tile pair gate and up, out has N / 2 columns; 1: ungated activation; 0: none.
    """
    tile = tl.program_id(0) // n_blocks
    block = tl.program_id(0) % n_blocks
    expert = tl.load(tile_to_expert + tile).to(tl.int64)
    if expert >= 0:
        row = tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        source = row
        if GATHER:
            source = tl.load(row_of + row).to(tl.int64)
        column = block * BLOCK_N + tl.arange(0, BLOCK_N)
        weight_row = column
        if ACT == 2 and not INTERLEAVED:
            weight_row = (column % 2) * (N // 2) + column // 2
        in_n = column < N
        weight_row = tl.where(in_n, weight_row, 0)
        weight_row64 = expert * N + weight_row
        k = tl.arange(0, BLOCK_K)
        k_byte = tl.arange(0, BLOCK_K // 2)
        k_group = tl.arange(0, BLOCK_K // 16)
        x_at = x + source[:, None] * x_stride + k[None, :]
        data_at = data + weight_row64[:, None] * (K // 2) + k_byte[None, :]
        scale_at = scales + weight_row64[:, None] * scales_stride + k_group[None, :]
        inverse_fold = tl.full([BLOCK_N], 1.0, tl.float32)
        factor = tl.load(row_scale + expert * row_scale_expert + weight_row * row_scale_row)
        if fold is not None:
            fold_value = tl.load(fold + weight_row64)
            inverse_fold = 1.0 / fold_value  # a power of two
            factor *= fold_value
        # The interpreter multiplies no bf16, and its e4m3 conversion truncates: there products are of fp32 tensors.
        dtype: tl.constexpr = tl.float32 if ARCH == 0 else x.dtype.element_ty
        accumulator = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, K, BLOCK_K):
            if EVEN_K:
                packed = tl.load(data_at)
                scale = tl.load(scale_at)
            else:
                packed = tl.load(data_at, mask=k_byte[None, :] < (K - start) // 2, other=0)
                scale = tl.load(scale_at, mask=k_group[None, :] < (K - start) // 16, other=0)
            live = source[:, None] >= 0
            if not EVEN_K:
                live = live & (k[None, :] < K - start)
            a = tl.load(x_at, mask=live, other=0.0).to(dtype)
            scale = e4m3_decode(scale.to(tl.int32)) * inverse_fold[:, None]
            b = decode_tile(packed, scale, BLOCK_N, BLOCK_K, dtype, fold is not None)
            accumulator = tl.dot(a, tl.trans(b), accumulator, input_precision="ieee")
            x_at += BLOCK_K
            data_at += BLOCK_K // 2
            scale_at += BLOCK_K // 16
        if x_scale is not None:
            accumulator *= tl.load(x_scale + source, mask=source >= 0, other=0.0)[:, None]
        if input_scale is not None:
            accumulator *= tl.load(input_scale + expert * input_scale_expert)
        accumulator *= factor[None, :]
        if bias is not None:
            accumulator += tl.load(bias + weight_row64).to(tl.float32)[None, :]
        result = accumulator.to(out.dtype.element_ty)
        if ACT == 2:
            gate, up = tl.split(tl.reshape(result.to(tl.float32), [BLOCK_M, BLOCK_N // 2, 2]))
            half = block * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            value = gated(gate, up, ACT_FN).to(out.dtype.element_ty)
            tl.store(out + row[:, None] * (N // 2) + half[None, :], value, mask=half[None, :] < N // 2)
        else:
            if ACT == 1:
                result = ungated(result.to(tl.float32), ACT_FN).to(out.dtype.element_ty)
            tl.store(out + row[:, None] * N + column[None, :], result, mask=in_n[None, :])


def grouped_gemm(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weights: ExpertWeights,
    routing: Routing,
    *,
    dtype: torch.dtype,
    block_m: int,
    gather: bool,
    act_fn: str | None = None,
) -> torch.Tensor:
    """Rows of the operand x times their experts' weights [E, N, K]: [permuted rows, N] in `dtype`; padding rows hold anything.

    gather: x and x_scale are by token; otherwise in permuted order. act_fn: applied to the rounded product; the gated ones
    give [permuted rows, N / 2].
    """
    _, n, half_k = weights.data.shape
    k = 2 * half_k
    act = 0 if act_fn is None else _UNGATED if act_fn in UNGATED else _GATED
    tiles = len(routing.tile_to_expert)
    out = x.new_empty((tiles * block_m, n // 2 if act == _GATED else n), dtype=dtype)
    block_n = 64 if n <= 64 or block_m >= 128 else 128
    block_k = 64 if block_m >= 64 or k % 128 else 128
    n_blocks = cdiv(n, block_n)
    launch(
        grouped_gemm_kernel,
        (tiles * n_blocks,),
        x,
        routing.permuted_idx_to_token,
        x_scale,
        weights.data,
        weights.scales.view(torch.uint8),
        weights.row_scale,
        weights.fp8_fold,
        weights.input_scale,
        weights.bias,
        routing.tile_to_expert,
        out,
        x.stride(0),
        weights.scales.stride(1),
        n,
        k,
        n_blocks,
        weights.row_scale.shape[1],
        int(weights.row_scale.shape[1] > 1),
        int(weights.input_scale is not None and weights.input_scale.numel() > 1),
        GATHER=gather,
        ACT=act,
        ACT_FN=act_fn or "",
        INTERLEAVED=act_fn == "swigluoai",
        EVEN_K=k % block_k == 0,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        ARCH=arch_of(x.device),
        num_warps=4 if block_m <= 64 else 8,
        num_stages=3,
        enable_fp_fusion=False,
    )
    return out
