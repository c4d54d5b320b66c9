"""Twins of the activation quantization kernels. Plain fp32 IEEE arithmetic in a fixed order: these are the bits.

Every function works on rows in chunks, so that the fp32 copies stay small beside the input.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ..formats import (
    FLOAT32_MAX,
    GROUP_SIZE,
    decode_packed,
    e2m1_encode,
    e4m3_decode,
    e4m3_encode,
    from_layout,
    pack_codes,
    shuffle_rows,
    to_layout,
)

_CHUNK_ELEMENTS = 1 << 20
_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny

Quantized = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def row_chunks(rows: int, k: int) -> Iterator[slice]:
    """Slices over `rows` rows of `k` values, each about a million values."""
    step = max(1, _CHUNK_ELEMENTS // max(k, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _reciprocal(x: torch.Tensor, fast: bool) -> torch.Tensor:
    """1/x in IEEE fp32; `fast` flushes subnormals as `rcp.approx.ftz.f32` does (its last bit is the hardware's own)."""
    if not fast:
        return 1.0 / x
    result = 1.0 / torch.where(x.abs() < _SMALLEST_NORMAL, torch.zeros_like(x).copysign(x), x)
    return torch.where(result.abs() < _SMALLEST_NORMAL, torch.zeros_like(x), result)


def quantize_blocks(x: torch.Tensor, g: torch.Tensor, fast: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The block rule: fp32 [M, K] and encode scales fp32 [1] or [M] to packed codes [M, K/2] and linear scales [M, K/16]."""
    blocks = x.unflatten(-1, (-1, GROUP_SIZE))
    g = g.reshape(-1, 1)
    amax = blocks.abs().amax(-1)
    sixth = torch.tensor(1.0 / 6.0, dtype=torch.float32, device=x.device)
    sf = e4m3_encode(g * (amax * sixth) if fast else amax * (g * sixth))
    scale = _reciprocal(e4m3_decode(sf) * _reciprocal(g, fast), fast)
    if not fast:
        scale = scale.clamp(max=FLOAT32_MAX)
    codes = e2m1_encode((blocks * scale.unsqueeze(-1)).flatten(-2))
    # A block whose scale byte is 0 decodes to 0 whatever its codes: they are written as 0, sign bits too.
    live = (sf != 0).repeat_interleave(GROUP_SIZE, dim=-1)
    return pack_codes(torch.where(live, codes, 0)), sf


def token_scales(x: torch.Tensor, inverse_base: torch.Tensor, fast: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-token encode scale G [M] and per_token_scale [M] of fp32 rows [M, K]."""
    amax = x.abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[0])
    if fast:
        scale = amax * inverse_base
        return torch.where(amax == 0, 0.0, _reciprocal(scale, fast)), scale
    g = ((1.0 / inverse_base) / amax).clamp(max=FLOAT32_MAX)
    zero = amax == 0
    return torch.where(zero, 0.0, g), torch.where(zero, 0.0, 1.0 / g)


def _quantize_linear(rows: torch.Tensor, a_global_sf: torch.Tensor, per_token: bool, fast: bool) -> Quantized:
    """Rows in any input dtype to packed codes, linear scales and per-token scales ([0] unless per_token), chunk by chunk."""
    m, k = rows.shape
    x_q = torch.empty(m, k // 2, dtype=torch.uint8, device=rows.device)
    sf = torch.empty(m, k // GROUP_SIZE, dtype=torch.uint8, device=rows.device)
    per_token_scale = torch.empty(m if per_token else 0, dtype=torch.float32, device=rows.device)
    for chunk in row_chunks(m, k):
        x = rows[chunk].to(torch.float32)
        if per_token:
            g, per_token_scale[chunk] = token_scales(x, a_global_sf, fast)
        else:
            g = a_global_sf if a_global_sf.numel() == 1 else a_global_sf[chunk]
        x_q[chunk], sf[chunk] = quantize_blocks(x, g, fast)
    return x_q, sf, per_token_scale


def _checked_rows(index: torch.Tensor, rows: int, name: str) -> torch.Tensor:
    """The non-negative entries of a flattened index, as int64; an entry at or above `rows` is an error."""
    index = index.flatten().long()
    index = index[index >= 0]
    if index.numel() and int(index.max()) >= rows:
        raise ValueError(f"{name}: the largest entry is {int(index.max())}, allowed are entries below {rows} rows")
    return index


def quantize(
    a: torch.Tensor,
    a_global_sf: torch.Tensor,
    *,
    layout: int,
    shuffle: bool = False,
    per_token: bool = False,
    row_index: torch.Tensor | None = None,
    fast: bool = False,
    pdl: bool = False,
    out: Quantized | None = None,
) -> Quantized:
    """Quantize [M, K] to (x_q uint8 [M, K/2], sf uint8 in `layout`, per_token_scale fp32 [M], empty unless `per_token`).

    `a_global_sf`: fp32 [1] or [M] encode scales; with `per_token` the inverse base c [1]. `row_index` (int32, any shape)
    names the rows to quantize, negative entries are skipped; the other rows come back zero, or untouched in `out`.
    `shuffle` permutes rows for TRT-LLM's transposed epilogue. `pdl` means nothing here.
    """
    m, k = a.shape
    if row_index is None:
        x_q, sf, per_token_scale = _quantize_linear(a, a_global_sf, per_token, fast)
    else:
        rows = _checked_rows(row_index, m, "expanded_idx_to_permuted_idx").unique()
        if out is None:
            x_q = a.new_zeros(m, k // 2, dtype=torch.uint8)
            sf = a.new_zeros(m, k // GROUP_SIZE, dtype=torch.uint8)
            per_token_scale = a.new_zeros(m if per_token else 0, dtype=torch.float32)
        else:
            x_q, per_token_scale = out[0].clone(), out[2].clone()
            sf = from_layout(out[1], m, k, layout).clone()
        g = a_global_sf if a_global_sf.numel() == 1 else a_global_sf[rows]
        x_q[rows], sf[rows], scales = _quantize_linear(a[rows], g, per_token, fast)
        if per_token:
            per_token_scale[rows] = scales
    if shuffle:
        x_q, sf = shuffle_rows(x_q), shuffle_rows(sf)
        per_token_scale = shuffle_rows(per_token_scale) if per_token else per_token_scale
    result = x_q, to_layout(sf, layout), per_token_scale
    if out is None:
        return result
    for target, value in zip(out, result, strict=True):
        target.copy_(value)
    return out


def permute_quantize(
    x: torch.Tensor, index: torch.Tensor, rows: int, a_global_sf: torch.Tensor, *, layout: int, fast: bool = False
) -> Quantized:
    """Quantize each token of [T, K] once, per token, and write it to every row that `index` [T, top_k] names for it.

    Returns (x_q [rows, K/2], sf of [rows, K] in `layout`, per_token_scale [rows]); rows that nothing names are zero.
    """
    k = x.shape[1]
    targets = index.flatten().long()
    _checked_rows(targets, rows, "expanded_idx_to_permuted_idx")
    token = torch.arange(x.shape[0], device=x.device).repeat_interleave(index.shape[1])[targets >= 0]
    targets = targets[targets >= 0]
    outputs = (
        x.new_zeros(rows, k // 2, dtype=torch.uint8),
        x.new_zeros(rows, k // GROUP_SIZE, dtype=torch.uint8),
        x.new_zeros(rows, dtype=torch.float32),
    )
    for target, value in zip(outputs, _quantize_linear(x, a_global_sf, True, fast), strict=True):
        target[targets] = value[token]
    return outputs[0], to_layout(outputs[1], layout), outputs[2]


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of [M, 2K], gate first, in fp32, rounded once to x's dtype (fp8 input: to bf16)."""
    gate, up = x.to(torch.float32).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype if x.dtype.itemsize > 1 else torch.bfloat16)


def silu_and_mul_quantize(
    x: torch.Tensor,
    a_global_sf: torch.Tensor,
    *,
    layout: int,
    per_token: bool = False,
    row_index: torch.Tensor | None = None,
    fast: bool = False,
    out: Quantized | None = None,
) -> Quantized:
    """`quantize` of silu(gate) * up; x is [M, 2K], gate first."""
    return quantize(silu_and_mul(x), a_global_sf, layout=layout, per_token=per_token, row_index=row_index, fast=fast, out=out)


def dequantize(
    x_q: torch.Tensor,
    sf: torch.Tensor,
    global_scale: torch.Tensor,
    *,
    layout: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """e2m1 * SF * scale in fp32, then `dtype`. x_q [M, K/2], sf in `layout`, global_scale fp32 [1] or one a row [M]."""
    m, half = x_q.shape
    linear = from_layout(sf.view(torch.uint8), m, 2 * half, layout)
    scale = global_scale.reshape(-1, 1).expand(m, 1)
    result = torch.empty(m, 2 * half, dtype=dtype, device=x_q.device)
    for chunk in row_chunks(m, 2 * half):
        values = decode_packed(x_q[chunk]).unflatten(-1, (-1, GROUP_SIZE))
        values = (values * e4m3_decode(linear[chunk].contiguous()).unsqueeze(-1)).flatten(-2)
        result[chunk] = (values * scale[chunk]).to(dtype)
    return result
