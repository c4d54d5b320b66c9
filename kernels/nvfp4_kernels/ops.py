"""The torch ops `nvfp4::*`: what torch.compile and CUDA graphs see of this library.

An op takes tensors that `api.py` has checked, asks `dispatch` which implementation serves the device, and has a fake
kernel that gives shapes and dtypes alone. They are defined with torch.library.Library, which adds the least per call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import dispatch
from .formats import GROUP_SIZE, sf_shape
from .reference.source import PLAIN, Source
from .replay import replayed

_LIBRARY = torch.library.Library("nvfp4", "DEF")
_Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _define(schema: str, fake: Callable, *, layer: bool = False) -> Callable[[Callable], Callable]:
    """Register the decorated function as the op of `schema`, with `fake` for meta tensors, and return the op itself.

    layer: a model calls it over and over with the same shapes.
    """
    name = schema.split("(")[0]

    def register(function: Callable) -> Callable:
        _LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
        _LIBRARY.impl(name, replayed(function) if layer else function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"nvfp4::{name}", fake, lib=_LIBRARY)
        return getattr(torch.ops.nvfp4, name).default

    return register


def _fake_quantized(like: torch.Tensor, rows: int, k: int, layout: int, per_token: bool) -> _Triple:
    return (
        like.new_empty((rows, k // 2), dtype=torch.uint8),
        like.new_empty(sf_shape(rows, k, layout), dtype=torch.uint8),
        like.new_empty((rows if per_token else 0,), dtype=torch.float32),
    )


def _quantize_fake(a, a_global_sf, layout, shuffle, per_token, row_index, fast, pdl, backend) -> _Triple:
    return _fake_quantized(a, a.shape[0], a.shape[1], layout, per_token)


@_define(
    "quantize(Tensor a, Tensor a_global_sf, int layout, bool shuffle, bool per_token, Tensor? row_index, bool fast,"
    " bool pdl, str backend) -> (Tensor, Tensor, Tensor)",
    _quantize_fake,
)
def quantize(a, a_global_sf, layout, shuffle, per_token, row_index, fast, pdl, backend) -> _Triple:
    return dispatch.implementation("quantize", a.device, backend)(
        a,
        a_global_sf,
        layout=layout,
        shuffle=shuffle,
        per_token=per_token,
        row_index=row_index,
        fast=fast,
        pdl=pdl,
    )


def _permute_quantize_fake(x, index, rows, a_global_sf, layout, fast, backend) -> _Triple:
    return _fake_quantized(x, rows, x.shape[1], layout, True)


@_define(
    "permute_quantize(Tensor x, Tensor index, SymInt rows, Tensor a_global_sf, int layout, bool fast, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _permute_quantize_fake,
)
def permute_quantize(x, index, rows, a_global_sf, layout, fast, backend) -> _Triple:
    function = dispatch.implementation("permute_quantize", x.device, backend)
    return function(x, index, rows, a_global_sf, layout=layout, fast=fast)


def _silu_and_mul_quantize_fake(x, a_global_sf, layout, per_token, row_index, fast, backend) -> _Triple:
    return _fake_quantized(x, x.shape[0], x.shape[1] // 2, layout, per_token)


@_define(
    "silu_and_mul_quantize(Tensor x, Tensor a_global_sf, int layout, bool per_token, Tensor? row_index, bool fast,"
    " str backend) -> (Tensor, Tensor, Tensor)",
    _silu_and_mul_quantize_fake,
)
def silu_and_mul_quantize(x, a_global_sf, layout, per_token, row_index, fast, backend) -> _Triple:
    function = dispatch.implementation("silu_and_mul_quantize", x.device, backend)
    return function(x, a_global_sf, layout=layout, per_token=per_token, row_index=row_index, fast=fast)


def _dequantize_fake(x_q, sf, global_scale, layout, dtype, backend) -> torch.Tensor:
    return x_q.new_empty((x_q.shape[0], x_q.shape[1] * 2), dtype=dtype)


@_define(
    "dequantize(Tensor x_q, Tensor sf, Tensor global_scale, int layout, ScalarType dtype, str backend) -> Tensor",
    _dequantize_fake,
)
def dequantize(x_q, sf, global_scale, layout, dtype, backend) -> torch.Tensor:
    function = dispatch.implementation("dequantize", x_q.device, backend)
    return function(x_q, sf, global_scale, layout=layout, dtype=dtype)


def _search_scales_fake(weight, encode_scale, scale_search) -> tuple[torch.Tensor, torch.Tensor]:
    *rows, k = weight.shape
    return (
        weight.new_empty((*rows, k // 2), dtype=torch.uint8),
        weight.new_empty((*rows, k // GROUP_SIZE), dtype=torch.float8_e4m3fn),
    )


@_define("search_scales(Tensor weight, Tensor encode_scale, str scale_search) -> (Tensor, Tensor)", _search_scales_fake)
def search_scales(weight, encode_scale, scale_search) -> tuple[torch.Tensor, torch.Tensor]:
    return dispatch.implementation("search_scales", weight.device)(weight, encode_scale, scale_search=scale_search)


_LAYER = (
    "Tensor data, Tensor scales, Tensor row_scale, str activation, Tensor? fp8_fold, Tensor? input_scale, Tensor? bias,"
    " str backend"
)


def _linear(source: Source, x, data, scales, row_scale, activation, fp8_fold, input_scale, bias, backend) -> torch.Tensor:
    mode = dispatch.resolve_activation(activation, x.device, x.shape[0], data.shape[0], data.shape[1] * 2)
    return dispatch.implementation("linear", x.device, backend)(
        x,
        data,
        scales,
        row_scale,
        activation=mode,
        fp8_fold=_fold(fp8_fold, scales, mode),
        input_scale=input_scale,
        bias=bias,
        source=source,
    )


def _linear_fake(x, data, *layer) -> torch.Tensor:
    return x.new_empty((x.shape[0], data.shape[0]))


@_define(f"linear(Tensor x, {_LAYER}) -> Tensor", _linear_fake, layer=True)
def linear(x, *layer) -> torch.Tensor:
    return _linear(PLAIN, x, *layer)


# Layers together with what models compute right before them (reference/source.py). vLLM's graphs are rewritten to these.


@_define(f"silu_and_mul_linear(Tensor x, {_LAYER}) -> Tensor", _linear_fake, layer=True)
def silu_and_mul_linear(x, *layer) -> torch.Tensor:
    return _linear(Source("silu_and_mul"), x, *layer)


def _rms_norm_linear_fake(x, norm_weight, eps, data, *layer) -> torch.Tensor:
    return _linear_fake(x, data)


@_define(f"rms_norm_linear(Tensor x, Tensor norm_weight, float eps, {_LAYER}) -> Tensor", _rms_norm_linear_fake, layer=True)
def rms_norm_linear(x, norm_weight, eps, *layer) -> torch.Tensor:
    return _linear(Source("rms_norm", norm_weight, eps), x, *layer)


def _add_rms_norm_linear_fake(x, residual, norm_weight, eps, data, *layer) -> tuple[torch.Tensor, torch.Tensor]:
    return _linear_fake(x, data), x.new_empty(x.shape)


@_define(
    f"add_rms_norm_linear(Tensor x, Tensor residual, Tensor norm_weight, float eps, {_LAYER}) -> (Tensor, Tensor)",
    _add_rms_norm_linear_fake,
    layer=True,
)
def add_rms_norm_linear(x, residual, norm_weight, eps, *layer) -> tuple[torch.Tensor, torch.Tensor]:
    total = x.new_empty(x.shape)
    return _linear(Source("add_rms_norm", norm_weight, eps, residual, total), x, *layer), total


def _fold(fp8_fold: torch.Tensor | None, scales: torch.Tensor, mode: str) -> torch.Tensor | None:
    """The per-row FP8 fold, worked out here for a weight that was not prepared."""
    if mode != "fp8_per_token" or fp8_fold is not None:
        return fp8_fold
    from .weight import fp8_fold as derive

    return derive(scales)


def _fused_moe_fake(x, *args) -> torch.Tensor:
    return torch.empty_like(x)


@_define(
    "fused_moe(Tensor x, Tensor w13_data, Tensor w13_scales, Tensor w13_row_scale, Tensor? w13_fp8_fold, Tensor w2_data,"
    " Tensor w2_scales, Tensor w2_row_scale, Tensor? w2_fp8_fold, Tensor topk_weights, Tensor topk_ids, str activation,"
    " str act_fn, Tensor? w13_input_scale, Tensor? w2_input_scale, Tensor? w13_bias, Tensor? w2_bias,"
    " Tensor? expert_map, int? num_experts, bool apply_router_weight_on_input, str backend) -> Tensor",
    _fused_moe_fake,
    layer=True,
)
def fused_moe(
    x,
    w13_data,
    w13_scales,
    w13_row_scale,
    w13_fp8_fold,
    w2_data,
    w2_scales,
    w2_row_scale,
    w2_fp8_fold,
    topk_weights,
    topk_ids,
    activation,
    act_fn,
    w13_input_scale,
    w2_input_scale,
    w13_bias,
    w2_bias,
    expert_map,
    num_experts,
    apply_router_weight_on_input,
    backend,
) -> torch.Tensor:
    _, hidden, half_inner = w2_data.shape
    mode = dispatch.resolve_moe_activation(activation, x.device, hidden, 2 * half_inner)
    return dispatch.implementation("fused_moe", x.device, backend)(
        x,
        w13_data,
        w13_scales,
        w13_row_scale,
        w2_data,
        w2_scales,
        w2_row_scale,
        topk_weights,
        topk_ids,
        activation=mode,
        act_fn=act_fn,
        w13_fp8_fold=_fold(w13_fp8_fold, w13_scales, mode),
        w2_fp8_fold=_fold(w2_fp8_fold, w2_scales, mode),
        w13_input_scale=w13_input_scale,
        w2_input_scale=w2_input_scale,
        w13_bias=w13_bias,
        w2_bias=w2_bias,
        expert_map=expert_map,
        num_experts=num_experts,
        apply_router_weight_on_input=apply_router_weight_on_input,
    )
