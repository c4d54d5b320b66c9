"""The public functions: they check their arguments and call the torch ops of `ops.py`.

Tensors stay on their device. `backend`: "cuda" runs this library's GPU kernels (the torch reference for CPU tensors),
"reference" the torch twin on any device; on SM100 and newer "cute-dsl" and "flashinfer" FlashInfer's own quantizer and GEMM,
"cublas" torch's GEMM.
The numbers are the strict ones (equal to FlashInfer's with FLASHINFER_DISABLE_FP4_QUANT_FAST_MATH=1) unless
NVFP4_FAST_MATH=1 is set when the library is imported.
"""

from __future__ import annotations

import os
from numbers import Real

import torch

from . import ops
from .dispatch import check_backend
from .formats import FLOAT32_MAX, GROUP_SIZE, SfLayout, sf_shape
from .reference.linear import ACTIVATIONS
from .reference.moe import ACT_FNS, UNGATED
from .weight import Nvfp4Weight

FAST_MATH = os.environ.get("NVFP4_FAST_MATH", "0") == "1"
INPUT_DTYPES = (torch.float16, torch.bfloat16, torch.float8_e4m3fn)
LINEAR_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DEQUANTIZED_DTYPES = (torch.float64, *LINEAR_DTYPES)
_SMALLEST = 2.0**-149  # of float32


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _check_tensor(name: str, t: torch.Tensor, like: torch.Tensor | None = None) -> None:
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{name}: got {type(t).__name__}, allowed is a torch.Tensor")
    if like is not None and t.device != like.device:
        raise ValueError(f"{name}: it is on {t.device}, allowed is the input's device {like.device}")


def _check_matrix(name: str, t: torch.Tensor, multiple: int, dtypes: tuple[torch.dtype, ...] = INPUT_DTYPES) -> None:
    _check_tensor(name, t)
    if t.dtype not in dtypes:
        raise TypeError(f"{name}: got dtype {_names((t.dtype,))}, allowed are {_names(dtypes)}")
    if t.dim() != 2:
        raise ValueError(f"{name}: got shape {list(t.shape)}, allowed are two dimensions")
    if t.shape[1] % multiple or t.shape[1] == 0:
        raise ValueError(f"{name}: the last dimension is {t.shape[1]}, allowed are positive multiples of {multiple}")


def _check_layout(layout: int) -> SfLayout:
    try:
        return SfLayout(layout)
    except ValueError:
        allowed = ", ".join(f"SfLayout.{item.name}" for item in SfLayout)
        raise ValueError(f"sfLayout: got {layout!r}, allowed are {allowed}") from None


def _check_weight(name: str, weight: Nvfp4Weight) -> None:
    if not isinstance(weight, Nvfp4Weight):
        raise TypeError(f"{name}: got {type(weight).__name__}, allowed is an Nvfp4Weight, which `quantize_weight` makes")


def _check_bias(name: str, bias: torch.Tensor, like: torch.Tensor, shape: tuple[int, ...]) -> None:
    _check_tensor(name, bias, like)
    if bias.shape != shape:
        raise ValueError(f"{name}: got shape {list(bias.shape)}, allowed is {list(shape)}")
    if bias.dtype not in LINEAR_DTYPES:
        raise TypeError(f"{name}: got dtype {_names((bias.dtype,))}, allowed are {_names(LINEAR_DTYPES)}")


def _scalar_or_rows(name: str, scale: torch.Tensor | float, like: torch.Tensor, rows: int) -> torch.Tensor:
    """A scale as fp32 tensor [1] or [rows] on `like`'s device. A tensor is never read back, nor moved."""
    if not isinstance(scale, torch.Tensor):
        if not isinstance(scale, Real):
            raise TypeError(f"{name}: got {scale!r}, allowed is a number or a float32 tensor")
        if not _SMALLEST <= scale <= FLOAT32_MAX:
            raise ValueError(f"{name}: got {scale!r}, allowed are scales above 0 that float32 holds")
        return torch.full((1,), float(scale), dtype=torch.float32, device=like.device)
    if scale.dtype != torch.float32:
        raise TypeError(f"{name}: got dtype {_names((scale.dtype,))}, allowed is float32")
    _check_tensor(name, scale, like)
    if scale.numel() not in (1, rows):
        allowed = "1 element" if rows == 1 else f"1 or {rows} elements"
        raise ValueError(f"{name}: got {scale.numel()} elements, allowed are {allowed}")
    return scale.reshape(-1)


def _check_index(index: torch.Tensor | None, like: torch.Tensor, dims: tuple[int, ...]) -> None:
    name = "expanded_idx_to_permuted_idx"
    if index is None:
        return
    _check_tensor(name, index, like)
    if index.dtype != torch.int32:
        raise TypeError(f"{name}: got dtype {_names((index.dtype,))}, allowed is int32")
    if index.dim() not in dims:
        raise ValueError(f"{name}: got shape {list(index.shape)}, allowed are {' or '.join(map(str, dims))} dimensions")


def nvfp4_quantize(
    a: torch.Tensor,
    a_global_sf: torch.Tensor | float,
    sfLayout: SfLayout = SfLayout.layout_128x4,
    do_shuffle: bool = False,
    sf_vec_size: int = 16,
    enable_pdl: bool | None = None,
    backend: str = "cuda",
    per_token_activation: bool = False,
    expanded_idx_to_permuted_idx: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Quantize a matrix to NVFP4. Signature and bits follow FlashInfer's `nvfp4_quantize` (release 0.7.2).

    a: [M, K] fp16, bf16 or fp8 e4m3; K a multiple of 16; rows may be strided.
    a_global_sf: fp32, the encode scale 448 * 6 / amax, one for the matrix or one for each of the M rows; with
        per_token_activation the inverse base, 1 / (448 * 6), one element.
    sfLayout: where the block scales lie, see `SfLayout`; padding bytes are 0.
    do_shuffle: rows in the order of TRT-LLM's transposed epilogue; asks for layout_128x4 and M % 128 == 0; the scales
        come back in the linear shape [M, K/16] (K/16 rounded up to a multiple of 4).
    sf_vec_size: 16.
    enable_pdl: launch with programmatic dependent launch, so that the start of this kernel overlaps with the end of the one
        before it in the stream (it waits for that one before it reads or writes). None: on SM90 and newer, as FlashInfer
        has it; older devices ignore it.
    per_token_activation: one fp32 scale for each row, worked out here.
    expanded_idx_to_permuted_idx: int32, one or two dimensions: the rows of `a` to quantize, in place; negative entries
        are skipped, rows that no entry names come back as zeros. An entry of M or more is an error on the CPU and is
        skipped on a GPU.

    Returns x_q uint8 [M, K/2], sf uint8 (shape: `sf_shape`), and with per_token_activation per_token_scale fp32 [M].
    The value of an element is e2m1 * SF / a_global_sf, or e2m1 * SF * per_token_scale.
    """
    _check_matrix("a", a, GROUP_SIZE)
    check_backend(backend, "quantize")
    layout = _check_layout(sfLayout)
    if sf_vec_size != GROUP_SIZE:
        hint = " (blocks of 32 are the mxfp4 format, which this function does not write)" if sf_vec_size == 32 else ""
        raise ValueError(f"sf_vec_size: got {sf_vec_size}, allowed is 16{hint}")
    if do_shuffle and (layout != SfLayout.layout_128x4 or a.shape[0] % 128):
        raise ValueError(
            f"do_shuffle: got {layout.name} and M = {a.shape[0]}, allowed is layout_128x4 with M a multiple of 128"
        )
    _check_index(expanded_idx_to_permuted_idx, a, (1, 2))
    scale = _scalar_or_rows("a_global_sf", a_global_sf, a, 1 if per_token_activation else a.shape[0])
    row_index = None if expanded_idx_to_permuted_idx is None else expanded_idx_to_permuted_idx.reshape(-1)
    x_q, sf, per_token_scale = ops.quantize(
        a, scale, int(layout), do_shuffle, per_token_activation, row_index, FAST_MATH, enable_pdl is not False, backend
    )
    return (x_q, sf, per_token_scale) if per_token_activation else (x_q, sf)


def nvfp4_permute_quantize(
    x: torch.Tensor,
    expanded_idx_to_permuted_idx: torch.Tensor,
    *,
    rows: int,
    a_global_sf: torch.Tensor | float = 1 / (448 * 6),
    sfLayout: SfLayout = SfLayout.layout_128x4,
    backend: str = "cuda",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize each token once, per token, and write it to every permuted row that the index names for it.

    x: [T, K] fp16, bf16 or fp8 e4m3. expanded_idx_to_permuted_idx: int32 [T, top_k], entries below 0 name no row.
    rows: rows of the permuted outputs. a_global_sf: the inverse base, as in `nvfp4_quantize` per token.

    Returns x_q uint8 [rows, K/2], sf of [rows, K] in `sfLayout`, per_token_scale fp32 [rows]; rows that no entry names are
    zero. An entry of `rows` or more is an error on the CPU and is skipped on a GPU.
    """
    _check_matrix("x", x, GROUP_SIZE)
    layout = _check_layout(sfLayout)
    index = expanded_idx_to_permuted_idx
    _check_tensor("expanded_idx_to_permuted_idx", index)
    _check_index(index, x, (2,))
    if index.shape[0] != x.shape[0]:
        raise ValueError(f"expanded_idx_to_permuted_idx: got {index.shape[0]} tokens, allowed is x's {x.shape[0]}")
    if not isinstance(rows, int | torch.SymInt):
        raise TypeError(f"rows: got {rows!r}, allowed is an integer")
    if rows < 0:
        raise ValueError(f"rows: got {rows}, allowed are 0 and above")
    check_backend(backend, "permute_quantize")
    scale = _scalar_or_rows("a_global_sf", a_global_sf, x, 1)
    return ops.permute_quantize(x, index, rows, scale, int(layout), FAST_MATH, backend)


def silu_and_mul_nvfp4_quantize(
    x: torch.Tensor,
    a_global_sf: torch.Tensor | float,
    sfLayout: SfLayout = SfLayout.layout_128x4,
    per_token_activation: bool = False,
    expanded_idx_to_permuted_idx: torch.Tensor | None = None,
    backend: str = "cuda",
) -> tuple[torch.Tensor, ...]:
    """`nvfp4_quantize` of silu(gate) * up without writing that product to memory.

    x: [M, 2K] fp16 or bf16, the gate in the first K columns; the product is formed in fp32 and rounded once to x's dtype.
    The other arguments and the results are those of `nvfp4_quantize` for an [M, K] matrix.
    """
    _check_matrix("x", x, 2 * GROUP_SIZE, (torch.float16, torch.bfloat16))
    layout = _check_layout(sfLayout)
    check_backend(backend, "silu_and_mul_quantize")
    _check_index(expanded_idx_to_permuted_idx, x, (1, 2))
    scale = _scalar_or_rows("a_global_sf", a_global_sf, x, 1 if per_token_activation else x.shape[0])
    row_index = None if expanded_idx_to_permuted_idx is None else expanded_idx_to_permuted_idx.reshape(-1)
    x_q, sf, per_token_scale = ops.silu_and_mul_quantize(
        x, scale, int(layout), per_token_activation, row_index, FAST_MATH, backend
    )
    return (x_q, sf, per_token_scale) if per_token_activation else (x_q, sf)


def nvfp4_dequantize(
    x_q: torch.Tensor,
    sf: torch.Tensor,
    global_scale: torch.Tensor | float | None,
    sfLayout: SfLayout = SfLayout.layout_128x4,
    per_token_scale: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    backend: str = "cuda",
) -> torch.Tensor:
    """The values of a quantized matrix: e2m1 * SF * scale in fp32, rounded once to `dtype`.

    x_q: uint8 [M, K/2]. sf: uint8 or float8_e4m3fn in `sfLayout`. global_scale: fp32 *decode* scale (1 / a_global_sf), one
    or M elements; None where per_token_scale fp32 [M] is given. Returns [M, K].
    """
    _check_tensor("x_q", x_q)
    if x_q.dtype != torch.uint8 or x_q.dim() != 2 or x_q.shape[1] % (GROUP_SIZE // 2):
        raise ValueError(f"x_q: got {_names((x_q.dtype,))} {list(x_q.shape)}, allowed is uint8 [M, K/2], K a multiple of 16")
    layout = _check_layout(sfLayout)
    m, k = x_q.shape[0], 2 * x_q.shape[1]
    _check_tensor("sf", sf, x_q)
    expected = torch.Size(sf_shape(m, k, layout))
    if sf.dtype not in (torch.uint8, torch.float8_e4m3fn) or (
        sf.shape != expected and (sf.numel() != expected.numel() or sf.dim() == 2 or not sf.is_contiguous())
    ):
        raise ValueError(
            f"sf: got {_names((sf.dtype,))} {list(sf.shape)}, allowed is uint8 or float8_e4m3fn {list(expected)}, or flat"
            f" for x_q {list(x_q.shape)} in {layout.name}"
        )
    if dtype not in DEQUANTIZED_DTYPES:
        raise TypeError(f"dtype: got {dtype!r}, allowed are {_names(DEQUANTIZED_DTYPES)}")
    if (global_scale is None) == (per_token_scale is None):
        raise ValueError("global_scale: give it or per_token_scale, one of the two")
    if per_token_scale is not None:
        _check_tensor("per_token_scale", per_token_scale)
        if per_token_scale.numel() != m:
            raise ValueError(f"per_token_scale: got {per_token_scale.numel()} elements, allowed is one a row, {m}")
        scale = _scalar_or_rows("per_token_scale", per_token_scale, x_q, m)
    else:
        assert global_scale is not None
        scale = _scalar_or_rows("global_scale", global_scale, x_q, m)
    sf = sf.view(torch.uint8).reshape(expected)
    return ops.dequantize(x_q, sf, scale, int(layout), dtype, backend)


def _check_activation(activation: str, input_scale: object, name: str) -> None:
    if activation != "auto" and activation not in ACTIVATIONS:
        allowed = ", ".join(map(repr, (*ACTIVATIONS, "auto")))
        raise ValueError(f"activation: got {activation!r}, allowed are {allowed}")
    if activation == "nvfp4_per_tensor" and input_scale is None:
        raise ValueError(f"{name}: got None, activation 'nvfp4_per_tensor' needs the static decode scale of the input")


def nvfp4_linear(
    x: torch.Tensor,
    weight: Nvfp4Weight,
    *,
    activation: str = "none",
    input_scale: torch.Tensor | float | None = None,
    bias: torch.Tensor | None = None,
    backend: str = "cuda",
) -> torch.Tensor:
    """x @ weight^T + bias over an NVFP4 weight: [..., K] -> [..., N] in x's dtype.

    x: fp32 (CPU alone), fp16 or bf16. weight: [N, K], its global scale for the matrix or per row.
    activation: what x becomes before the product: "nvfp4_per_token" (W4A4), "nvfp4_per_tensor" (W4A4 with `input_scale`, the
        static fp32 decode scale amax / (448 * 6)), "fp8_per_token" (e4m3 with a scale per token; weights widened to e4m3),
        "none" (W4A16), or "auto": whichever of these is best for the device and shape.
    bias: [N].
    backend: "cuda", "reference", or for W4A4 on SM100 and newer the GEMMs of others: "cublas", "flashinfer", "cute-dsl".
    """
    _check_tensor("x", x)
    _check_weight("weight", weight)
    if x.dtype not in LINEAR_DTYPES:
        raise TypeError(f"x: got dtype {_names((x.dtype,))}, allowed are {_names(LINEAR_DTYPES)}")
    _check_activation(activation, input_scale, "input_scale")
    check_backend(backend, "linear")
    if weight.data.dim() != 2:
        raise ValueError(f"weight: got shape {list(weight.shape)}, allowed is [N, K]")
    n, k = weight.shape
    if x.dim() < 1 or x.shape[-1] != k:
        raise ValueError(f"x: got shape {list(x.shape)}, allowed is [..., {k}] for a weight {list(weight.shape)}")
    if x.device != weight.data.device:
        raise ValueError(f"x: it is on {x.device}, allowed is the weight's device {weight.data.device}")
    if bias is not None:
        _check_bias("bias", bias, x, (n,))
    scale = None if input_scale is None else _scalar_or_rows("input_scale", input_scale, x, 1)
    out = ops.linear(
        x.reshape(-1, k),
        weight.data,
        weight.scales,
        weight.row_scale(),
        activation,
        weight.fp8_fold,
        scale,
        bias,
        backend,
    )
    return out.view(*x.shape[:-1], n)


def nvfp4_fused_moe(
    x: torch.Tensor,
    w13: Nvfp4Weight,
    w2: Nvfp4Weight,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    activation: str = "none",
    act_fn: str = "silu",
    input_scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    num_experts: int | None = None,
    apply_router_weight_on_input: bool = False,
    backend: str = "cuda",
) -> torch.Tensor:
    """The routed experts of a mixture-of-experts layer over NVFP4 weights: [M, H] -> [M, H] in x's dtype.

    x: [M, H]. w13: [E, 2I, H], gate rows first ("swigluoai": gate and up alternate), [E, I, H] for an `act_fn` that ends in
    "_no_mul". w2: [E, H, I]. topk_weights: fp32 [M, top_k]; topk_ids: int32 or int64 [M, top_k], an id below 0 or
    beyond the last expert adds nothing.
    activation: as in `nvfp4_linear`, for the input of both products; input_scales: for "nvfp4_per_tensor" the static decode
        scales of the two inputs, each fp32 with 1 or E elements.
    act_fn: between the products, a name of vLLM's MoEActivation.
    w13_bias, w2_bias: [E, rows].
    expert_map: int32 [global experts] to local experts, -1 where another rank holds the expert.
    num_experts: the experts of all ranks, for topk_ids that name local ones already: kernels expect so many rows an expert.
    apply_router_weight_on_input: multiply the token instead of the expert's output.
    """
    _check_matrix("x", x, GROUP_SIZE, LINEAR_DTYPES)
    _check_weight("w13", w13)
    _check_weight("w2", w2)
    _check_activation(activation, input_scales, "input_scales")
    check_backend(backend, "fused_moe")
    if act_fn not in ACT_FNS:
        raise ValueError(f"act_fn: got {act_fn!r}, allowed are {', '.join(map(repr, ACT_FNS))}")
    if w13.data.dim() != 3 or w2.data.dim() != 3:
        raise ValueError(f"w13, w2: got shapes {list(w13.shape)} and {list(w2.shape)}, allowed are [E, 2I, H] and [E, H, I]")
    experts, hidden, inner = w2.shape
    expected = (experts, inner if act_fn in UNGATED else 2 * inner, hidden)
    if tuple(w13.shape) != expected:
        raise ValueError(f"w13: got shape {list(w13.shape)}, allowed is {list(expected)} for w2 {list(w2.shape)}, {act_fn!r}")
    if x.shape[1] != hidden:
        raise ValueError(f"x: got shape {list(x.shape)}, allowed is [M, {hidden}]")
    for name, t in (("w13", w13.data), ("w2", w2.data), ("topk_ids", topk_ids), ("topk_weights", topk_weights)):
        _check_tensor(name, t, x)
    if topk_ids.dim() != 2 or topk_ids.shape != topk_weights.shape or topk_ids.shape[0] != x.shape[0]:
        raise ValueError(
            f"topk_ids, topk_weights: got shapes {list(topk_ids.shape)} and {list(topk_weights.shape)}, allowed is"
            f" [{x.shape[0]}, top_k] for both"
        )
    if topk_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"topk_ids: got dtype {_names((topk_ids.dtype,))}, allowed are int32 and int64")
    scale13 = scale2 = None
    if input_scales is not None:
        if not isinstance(input_scales, tuple | list) or len(input_scales) != 2:
            raise TypeError(f"input_scales: got {input_scales!r}, allowed is one scale for each of the two products")
        scale13, scale2 = (_scalar_or_rows(f"input_scales[{i}]", s, x, experts) for i, s in enumerate(input_scales))
    if w13_bias is not None:
        _check_bias("w13_bias", w13_bias, x, expected[:2])
    if w2_bias is not None:
        _check_bias("w2_bias", w2_bias, x, (experts, hidden))
    if expert_map is not None:
        _check_tensor("expert_map", expert_map, x)
        if expert_map.dtype not in (torch.int32, torch.int64) or expert_map.dim() != 1:
            got = f"{_names((expert_map.dtype,))} {list(expert_map.shape)}"
            raise ValueError(f"expert_map: got {got}, allowed is int32 or int64 [global experts]")
    return ops.fused_moe(
        x,
        w13.data,
        w13.scales,
        w13.row_scale(),
        w13.fp8_fold,
        w2.data,
        w2.scales,
        w2.row_scale(),
        w2.fp8_fold,
        topk_weights.to(torch.float32),
        topk_ids,
        activation,
        act_fn,
        scale13,
        scale2,
        w13_bias,
        w2_bias,
        expert_map,
        num_experts,
        apply_router_weight_on_input,
        backend,
    )
