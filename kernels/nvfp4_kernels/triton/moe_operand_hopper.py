"""FP8 operands of the Hopper grouped GEMMs: rows to e4m3 in the order of hopper.py, one pass, 16-byte loads and stores.

A thread takes 8 neighbours at each of the four t of hopper.py, which are 32 neighbours of the reordered row, once or twice.
A short row is a warp's own, which finds its maximum without a barrier.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .gluon_compat import let_next_kernel_start, wait_for_previous_kernel
from .launch import cdiv, launch, next_power_of_2

MAX_K = 1 << 15


@gluon.constexpr_function
def _layout(registers, lanes, block, share, warps):
    """A layout of [rows, block]: `registers` and `lanes` within 1024 columns of a warp's `share`, 1024 or 2048; then columns,
    then rows, over the warps."""
    values = [[0, i] for i in registers] + ([[0, 1024]] if share == 2048 else [])
    within = [[0, i] for i in lanes if i < block]
    row = 1
    while len(within) < 5:
        within.append([row, 0])
        row *= 2
    column = share
    across = []
    for _ in range(warps.bit_length() - 1):
        if column < block:
            across.append([0, column])
            column *= 2
        else:
            across.append([row, 0])
            row *= 2
    return gl.DistributedLinearLayout(values, within, across, [], [row, block])


@gluon.jit(do_not_specialize=["count"])
def operand_fp8_kernel(
    x_ptr, index_ptr, q_ptr, scale_ptr, stride, count, K, width,
    SCATTER: gl.constexpr, TOP_K: gl.constexpr, ROWS: gl.constexpr, BLOCK: gl.constexpr, SHARE: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """Rows of x to e4m3, zeros behind them up to `width`, and their decode scales. `width` is a multiple of 128, at most BLOCK.

    SCATTER: x is [count, K]; its row t goes to rows index[t, :] (none where negative). Otherwise rows index[0 .. count] of x
    stay in their places, without an index its first `count` rows. What the division and a NaN do: see activation_hopper.py.
    """
    wait_for_previous_kernel()
    let_next_kernel_start()  # not earlier: the next kernel takes the routing for complete
    NATURAL: gl.constexpr = _layout([1, 2, 4, 32, 64], [8, 16, 128, 256, 512], BLOCK, SHARE, WARPS)
    REORDERED: gl.constexpr = _layout([1, 2, 4, 8, 16], [32, 64, 128, 256, 512], BLOCK, SHARE, WARPS)
    column = gl.arange(0, BLOCK, gl.SliceLayout(0, NATURAL))
    source = gl.program_id(0) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, NATURAL))
    live = source < count
    if not SCATTER and index_ptr is not None:
        source = gl.load(index_ptr + source, mask=live, other=-1)
        live = source >= 0
    at = source.to(gl.int64)[:, None] * stride + column[None, :]
    x = gl.load(x_ptr + at, mask=live[:, None] & (column < K)[None, :], other=0.0)
    # A NaN counts as infinite: the scale is then infinite and the layer's row comes out NaN.
    amax = gl.max(gl.where(x != x, float("inf"), gl.abs(x.to(gl.float32))), axis=1)
    scale = gl.div_rn(amax, 448.0)
    # Very small and very large rows are moved by a power of two, where every step of the division stays normal.
    factor = gl.where(amax < 1e-25, 2.0**96, gl.where(amax > 1e30, 2.0**-60, 1.0))
    divisor = (scale * factor)[:, None]
    inverse = gl.where(amax > 0, gl.div_rn(1.0, scale * factor), 0.0)[:, None]
    values = x.to(gl.float32) * factor[:, None]
    # A product with the rounded reciprocal, corrected twice by the exact remainder (Markstein).
    quotient = values * inverse
    quotient = gl.fma(gl.fma(-quotient, divisor, values), inverse, quotient)
    quotient = gl.fma(gl.fma(-quotient, divisor, values), inverse, quotient)
    q = gl.where(values == 0, values, quotient).to(gl.float8e4nv)  # the corrections lose the sign of -0
    q = gl.permute(gl.reshape(q, [ROWS, BLOCK // 128, 4, 4, 2, 4]), [0, 1, 3, 4, 2, 5])  # t word half q -> word half t q
    q = gl.convert_layout(gl.reshape(q, [ROWS, BLOCK]), REORDERED, assert_trivial=True)

    to_column = gl.arange(0, BLOCK, gl.SliceLayout(0, REORDERED))
    to_row = gl.program_id(0) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, REORDERED))
    in_range = to_row < count
    for slot in gl.static_range(TOP_K):
        if index_ptr is None:
            target = gl.where(in_range, to_row, -1)
        else:
            target = gl.load(index_ptr + to_row * TOP_K + slot, mask=in_range, other=-1)
        named = target >= 0
        to = target.to(gl.int64)[:, None] * width + to_column[None, :]
        gl.store(q_ptr + to, q, mask=named[:, None] & (to_column < width)[None, :])
        gl.store(scale_ptr + target, gl.convert_layout(scale, gl.SliceLayout(1, REORDERED)), mask=named)


def shape_of(k: int, permute: bool) -> dict[str, int]:
    """How programs and warps divide rows of `k` values: the kernel's constants."""
    block = max(128, next_power_of_2(k))
    # A row that goes to many places is spread over more warps: most of its time it is stored.
    share = 2048 if block > 1024 and not permute else 1024
    warps_of_row = max(1, block // share)
    warps = warps_of_row if permute else max(4, warps_of_row)
    rows = warps // warps_of_row * max(1, 1024 // block)
    return {"ROWS": rows, "BLOCK": block, "SHARE": share, "WARPS": warps}


def operand_fp8(x: torch.Tensor, index: torch.Tensor | None, out: torch.Tensor, scale: torch.Tensor, permute: bool) -> None:
    """As `moe_operand.operand` for "fp8_per_token" with `reorder` and without router weights, into out uint8 and scale.

    `index`: expanded_idx_to_permuted_idx, or None for rows that stay where they are, all of them.
    """
    count, top_k = (len(x), 1) if index is None else index.shape if permute else (index.numel(), 1)
    shape = shape_of(out.shape[1], permute)
    launch(
        operand_fp8_kernel,
        (cdiv(count, shape["ROWS"]),),
        x,
        index,
        out.view(torch.float8_e4m3fn),
        scale,
        x.stride(0),
        count,
        x.shape[1],
        out.shape[1],
        SCATTER=permute,
        TOP_K=top_k,
        **shape,
        num_warps=shape["WARPS"],
        launch_pdl=True,
        enable_fp_fusion=False,
    )
