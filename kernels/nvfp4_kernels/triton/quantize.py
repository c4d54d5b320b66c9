"""Activation quantization on the GPU: the Triton twins of `reference/quantize.py`.

One kernel serves every form. A program takes BLOCK_M rows by BLOCKS blocks of 16 along K; per token it takes whole rows and
keeps them in registers (very long ones are read a second time, then from L2). Values are loaded as words of two neighbours,
16 bytes at once: a block of 16 belongs to one thread, or to two where rows are few.
"""

from __future__ import annotations

import contextlib
import dataclasses

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..devices import arch_of
from ..formats import GROUP_SIZE, SfLayout, ceil_to, sf_shape
from .launch import cdiv, launch, next_power_of_2
from .numerics import (
    block_scale,
    e2m1_decode,
    e4m3_decode,
    encode_pair,
    max_magnitude_of_words,
    quotient,
    reciprocal,
    round_pair,
    token_base,
    token_scales,
    unpack_pair,
    word_pointer,
)

Quantized = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

_LAYOUT_128X4 = tl.constexpr(int(SfLayout.layout_128x4))
_LAYOUT_8X4 = tl.constexpr(int(SfLayout.layout_8x4))
_LAYOUT_LINEAR = tl.constexpr(int(SfLayout.layout_linear))
_PAD_WORDS = 1024  # four-byte words of padding scales that a program zeroes
_PLACE_BLOCKS = 64  # blocks of 16, of 128 rows, whose scales a program takes to their rows
_FEW_ROWS = 132  # up to here each row can have a multiprocessor to itself
_MAX_BLOCKS = 1024  # blocks of 16 that a program holds in registers: K up to 16384


@triton.jit
def scale_offset(row, block, padded_blocks, LAYOUT: tl.constexpr):
    """Offset (int64) of the scale of `row` (int64) and K-block `block` (int32) in a scale tensor of this layout."""
    if LAYOUT == _LAYOUT_128X4:
        in_row = (row // 128) * (padded_blocks * 128) + (row % 32) * 16 + (row % 128) // 32 * 4
        return in_row + ((block // 4) * 512 + block % 4)
    elif LAYOUT == _LAYOUT_8X4:
        in_row = (row // 8) * (padded_blocks * 8) + (row % 8) * 4
        return in_row + ((block // 4) * 32 + block % 4)
    return row * padded_blocks + block


@triton.jit
def _silu_and_mul(gate, up, ARCH: tl.constexpr):
    """silu(gate) * up in fp32, with CUDA's expf and the nearest quotient, as torch has it."""
    exponential = tl.exp(-gate) if ARCH == 0 else libdevice.exp(-gate)
    return quotient(gate, 1.0 + exponential, ARCH) * up


@triton.jit
def _load_words(x, row_offset, live, block, blocks, SILU: tl.constexpr, ARCH: tl.constexpr):
    """Words of two neighbours [rows, blocks, 8]; zeros for rows that are not live and past K."""
    dtype: tl.constexpr = x.dtype.element_ty
    offset = row_offset[:, None, None] + (block[:, None] * 8 + tl.arange(0, 8))[None, :, :]
    mask = (live[:, None] & (block < blocks))[:, :, None]
    words = tl.load(word_pointer(x) + offset, mask=mask, other=0)
    if SILU:
        low, high = unpack_pair(words, dtype)
        up_low, up_high = unpack_pair(tl.load(word_pointer(x) + (offset + blocks * 8), mask=mask, other=0), dtype)
        words = round_pair(_silu_and_mul(low, up_low, ARCH), _silu_and_mul(high, up_high, ARCH), dtype, ARCH)
    return words


@triton.jit
def _zero_padding(sf, program, out_rows, padded_blocks, LAYOUT: tl.constexpr, WORDS: tl.constexpr):
    """Zero the scales of the rows that fill up the last tile of rows; a word is four blocks of a row."""
    word = program * WORDS + tl.arange(0, WORDS)
    tile_rows: tl.constexpr = 128 if LAYOUT == _LAYOUT_128X4 else 8
    row = word % 4 * 32 + word % 128 // 4 if LAYOUT == _LAYOUT_128X4 else word % 8
    tile_words = padded_blocks * (tile_rows // 4)
    words = sf.to(tl.pointer_type(tl.int32), bitcast=True) + (out_rows // tile_rows).to(tl.int64) * tile_words
    tl.store(words + word, tl.zeros((WORDS,), tl.int32), mask=(word < tile_words) & (row >= out_rows % tile_rows))


@triton.jit
def _target_rows(row, live, index, j, out_rows, SHUFFLE: tl.constexpr, ROWS: tl.constexpr, TOP_K: tl.constexpr):
    """Where rows go (int64) and which of them are written."""
    if ROWS == "scattered":
        target = tl.load(index + row * TOP_K + j, mask=live, other=-1).to(tl.int64)
        return target, (target >= 0) & (target < out_rows)
    elif ROWS == "listed":
        return row, live
    elif SHUFFLE:
        # Within each 32 rows new[d] = old[4 * (d % 8) + d // 8].
        return (row // 32) * 32 + row % 4 * 8 + row % 32 // 4, row < out_rows
    else:
        return row, row < out_rows


@triton.jit
def _quantize_tile(
    words, amax, g, inverse_g, x_q, sf, row, live, index, block, out_rows, blocks, padded_blocks,
    DTYPE: tl.constexpr, LAYOUT: tl.constexpr, SHUFFLE: tl.constexpr, ROWS: tl.constexpr, TOP_K: tl.constexpr,
    FAST: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """Quantize one tile of words [rows, blocks, 8] with block maxima [rows, blocks] and store its codes and scales."""
    scale, factor = block_scale(amax, g[:, None], inverse_g[:, None], FAST, ARCH)
    # Past K, and in rows that nobody named: 0 whatever g is.
    scale = tl.where(live[:, None] & (block < blocks), scale, 0)
    keep = tl.where(scale == 0, 0, -1)[:, :, None]
    low, high = unpack_pair(words, DTYPE)
    codes = encode_pair(low * factor[:, :, None], high * factor[:, :, None], keep, ARCH)
    scale = scale.to(tl.uint8)
    for j in tl.static_range(TOP_K):
        target, written = _target_rows(row, live, index, j, out_rows, SHUFFLE, ROWS, TOP_K)
        at = (target[:, None] * blocks + block) * 8
        mask = (written[:, None] & (block < blocks))[:, :, None]
        tl.store(x_q + (at[:, :, None] + tl.arange(0, 8)), codes, mask=mask)
        if ROWS != "scattered":
            at = scale_offset(target[:, None], block, padded_blocks, LAYOUT)
            tl.store(sf + at, scale, mask=written[:, None] & (block < padded_blocks))
    if ROWS == "scattered":
        tl.store(sf + (row[:, None] * padded_blocks + block), scale, mask=live[:, None] & (block < padded_blocks))


@triton.jit(do_not_specialize=["m", "out_rows", "pad_start", "blocks", "x_stride", "g_stride"])
def quantize_kernel(
    x, a_global_sf, index, named, x_q, sf, token_scale, m, out_rows, pad_start, blocks, padded_blocks, x_stride, g_stride,
    LAYOUT: tl.constexpr, PER_TOKEN: tl.constexpr, SHUFFLE: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr,
    TOP_K: tl.constexpr, FAST: tl.constexpr, PDL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCKS: tl.constexpr,
    CHUNKS: tl.constexpr, SHARED: tl.constexpr, PAD_WORDS: tl.constexpr, ARCH: tl.constexpr, DECODE: tl.constexpr,
):  # fmt: skip
    """x [m, K] (or [m, 2K] with SILU) to x_q [out_rows, K/2], its scales in sf and token_scale [out_rows].

    `x_stride` counts words of two values. A program takes BLOCK_M rows by BLOCKS blocks, with PER_TOKEN whole rows: CHUNKS
    times BLOCKS blocks stay in registers, CHUNKS = 0 reads a row twice. With SHARED a row has CHUNKS programs: each takes the
    maximum of the whole row and quantizes one chunk of it. ROWS says which rows:
    "all"; "named": those whose flag in `named` is set, zeros for the others; "listed": the m entries of `index`, other rows
    stay as they are; "scattered": the codes of row i go to rows index[i, :TOP_K], each of which gets i in `named`; scales stay
    in the order of x, [m, padded_blocks] and [m], for `place_kernel`. An entry outside [0, out_rows) is skipped. Programs from
    pad_start on zero padding scales. DECODE: a_global_sf holds decode scales.
    """
    if PDL:
        gdc_wait()
        # Every program that may start now waits as this one did: nothing it does overtakes what is written here.
        gdc_launch_dependents()
    program = tl.program_id(0)
    if LAYOUT != _LAYOUT_LINEAR and (ROWS == "all" or ROWS == "named"):  # noqa: SIM102 (known when compiling; the next one is not)
        if program >= pad_start:
            _zero_padding(sf, program - pad_start, out_rows, padded_blocks, LAYOUT, PAD_WORDS)
            return
    first_block = 0
    if not PER_TOKEN:
        parts = tl.cdiv(padded_blocks, BLOCKS)
        first_block = (program % parts) * BLOCKS
        program = program // parts
    part = 0
    if SHARED:
        part = program % CHUNKS
        program = program // CHUNKS
    row = program.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)

    if ROWS == "listed":
        row = tl.load(index + row, mask=row < m, other=-1).to(tl.int64)
        live = (row >= 0) & (row < out_rows)
    elif ROWS == "named":
        live = tl.load(named + row, mask=row < m, other=0) != 0
    else:
        live = row < m
    dtype: tl.constexpr = x.dtype.element_ty
    row_offset = tl.multiple_of(row * x_stride, 64 // dtype.primitive_bitwidth)  # 16 bytes
    block = first_block + tl.arange(0, BLOCKS)
    # The scale is asked for ahead of the row, so that it is there when the row's maximum is.
    if PER_TOKEN:
        base = token_base(tl.load(a_global_sf), FAST, ARCH)
    else:
        g = tl.load(a_global_sf + row * g_stride, mask=live, other=1.0 if DECODE else 0.0)
        if DECODE:
            g = reciprocal(g, False, ARCH)

    # A row that fits is held as it was loaded (words), not as the fp32 values that it unpacks to.
    words = ()  # type: tuple
    maxima = ()  # type: tuple
    for i in tl.static_range(CHUNKS):
        words += (_load_words(x, row_offset, live, block + (part + i) % CHUNKS * BLOCKS, blocks, SILU, ARCH),)
    for i in tl.static_range(CHUNKS):
        maxima += (max_magnitude_of_words(words[i], dtype, ARCH),)
    if PER_TOKEN:
        # Patterns of magnitudes order as integers do, a NaN on top.
        bits = tl.zeros((BLOCK_M, BLOCKS), tl.int32)
        for i in tl.static_range(CHUNKS):
            bits = tl.maximum(bits, maxima[i].to(tl.int32, bitcast=True))
        if CHUNKS == 0:
            for start in range(0, padded_blocks, BLOCKS):
                tile = _load_words(x, row_offset, live, start + block, blocks, SILU, ARCH)
                bits = tl.maximum(bits, max_magnitude_of_words(tile, dtype, ARCH).to(tl.int32, bitcast=True))
        row_amax = tl.max(bits, 1).to(tl.float32, bitcast=True)
        g, scale = token_scales(row_amax, base, FAST, ARCH)
        scale = tl.where(live, scale, 0.0)
        for j in tl.static_range(TOP_K):
            target, written = _target_rows(row, live, index, j, out_rows, SHUFFLE, ROWS, TOP_K)
            if ROWS == "scattered":
                tl.store(named + target, row.to(tl.int32), mask=written)
            else:
                # No `& (part == 0)`: Triton 3.9's interpreter refuses masks of a tensor and a scalar.
                tl.store(token_scale + target, scale, mask=written & (tl.zeros_like(row) == part))
        if ROWS == "scattered":
            tl.store(token_scale + row, scale, mask=live)
    inverse_g = reciprocal(g, FAST, ARCH)
    for i in tl.static_range(1 if SHARED else CHUNKS):
        _quantize_tile(
            words[i], maxima[i], g, inverse_g, x_q, sf, row, live, index, block + (part + i) % CHUNKS * BLOCKS, out_rows,
            blocks, padded_blocks, dtype, LAYOUT, SHUFFLE, ROWS, TOP_K, FAST, ARCH,
        )  # fmt: skip
    if CHUNKS == 0:
        for start in range(0, padded_blocks, BLOCKS):
            tile = _load_words(x, row_offset, live, start + block, blocks, SILU, ARCH)
            amax = max_magnitude_of_words(tile, dtype, ARCH)
            _quantize_tile(
                tile, amax, g, inverse_g, x_q, sf, row, live, index, start + block, out_rows, blocks, padded_blocks, dtype,
                LAYOUT, SHUFFLE, ROWS, TOP_K, FAST, ARCH,
            )  # fmt: skip


@triton.jit(do_not_specialize=["out_rows", "blocks"])
def place_kernel(
    token_of, scales, scale, x_q, sf, token_scale, out_rows, blocks, padded_blocks,
    LAYOUT: tl.constexpr, BLOCKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Take the scales of tokens, scales [T, padded_blocks] and scale [T], to the rows that token_of [out_rows] names them for.

    A program takes 128 rows by BLOCKS blocks. Rows without a token (-1) get zeros, codes included; padding gets zeros.
    Scattered by the tokens themselves, four bytes of a row at a time, the scales of a tile would reach memory as many partial
    writes: here they leave as whole tiles.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    parts = tl.cdiv(padded_blocks, BLOCKS)
    first_row = (tl.program_id(0) // parts).to(tl.int64) * 128
    part = tl.program_id(0) % parts
    row = first_row + tl.arange(0, 128)
    token = tl.load(token_of + row, mask=row < out_rows, other=-1).to(tl.int64)
    named = token >= 0
    WORDS: tl.constexpr = BLOCKS // 4
    if LAYOUT == _LAYOUT_LINEAR:
        block = part * BLOCKS + tl.arange(0, BLOCKS)
        at = token[:, None] * padded_blocks + block
        values = tl.load(scales + at, mask=named[:, None] & (block < padded_blocks), other=0)
        tl.store(sf + row[:, None] * padded_blocks + block, values, mask=(row < out_rows)[:, None] & (block < padded_blocks))
    else:
        word = part * WORDS + tl.arange(0, WORDS)
        row_words = padded_blocks // 4
        at = token[:, None] * row_words + word
        scale_words = scales.to(tl.pointer_type(tl.int32), bitcast=True)
        values = tl.load(scale_words + at, mask=named[:, None] & (word < row_words), other=0)
        # In the order of the scale tensor: [tile of rows, word along K, row of the tile].
        sf_words = sf.to(tl.pointer_type(tl.int32), bitcast=True)
        if LAYOUT == _LAYOUT_128X4:
            values = values.reshape(4, 32, WORDS).permute(2, 1, 0).reshape(WORDS, 128)
            at = first_row * row_words + (word * 128)[:, None] + tl.arange(0, 128)
            tl.store(sf_words + at, values, mask=(word < row_words)[:, None])
        else:
            values = values.reshape(16, 8, WORDS).permute(0, 2, 1)
            tile = first_row // 8 + tl.arange(0, 16)
            at = tile[:, None, None] * (row_words * 8) + (word * 8)[None, :, None] + tl.arange(0, 8)
            mask = (tile * 8 < out_rows)[:, None, None] & (word < row_words)[None, :, None]
            tl.store(sf_words + at, values, mask=mask)
    if part == 0:
        tl.store(token_scale + row, tl.load(scale + token, mask=named, other=0.0), mask=row < out_rows)
    if tl.min(tl.where(row < out_rows, token, 0), 0) < 0:
        block = part * BLOCKS + tl.arange(0, BLOCKS)
        for start in range(0, 128, 8):
            few = first_row + start + tl.arange(0, 8)
            empty = tl.load(token_of + few, mask=few < out_rows, other=0) < 0
            codes = x_q + (((few[:, None] * blocks + block) * 8)[:, :, None] + tl.arange(0, 8))
            tl.store(codes, tl.zeros(codes.shape, tl.uint8), mask=(empty[:, None] & (block < blocks))[:, :, None])


@triton.jit(do_not_specialize=["entries", "rows"])
def mark_kernel(index, named, entries, rows, BLOCK: tl.constexpr):
    """Set the flag (uint8) of every row in [0, rows) that `index` names."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(index + at, mask=at < entries, other=-1)
    tl.store(named + row, tl.full((BLOCK,), 1, tl.uint8), mask=(row >= 0) & (row < rows))


@triton.jit(do_not_specialize=["m", "blocks", "padded_blocks", "g_stride"])
def dequantize_kernel(
    x_q, sf, global_scale, out, m, blocks, padded_blocks, g_stride,
    LAYOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCKS: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """e2m1 * SF * scale: x_q [m, K/2] and sf in LAYOUT to out [m, K], stored as words of two neighbours."""
    dtype: tl.constexpr = out.dtype.element_ty
    chunks = tl.cdiv(blocks, BLOCKS)
    program = tl.program_id(0)
    row = (program // chunks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    block = (program % chunks) * BLOCKS + tl.arange(0, BLOCKS)
    mask = (row < m)[:, None] & (block < blocks)
    codes = ((row[:, None] * blocks + block) * 8)[:, :, None] + tl.arange(0, 8)
    pair = tl.load(x_q + codes, mask=mask[:, :, None], other=0).to(tl.int32)
    scale = e4m3_decode(tl.load(sf + scale_offset(row[:, None], block, padded_blocks, LAYOUT), mask=mask, other=0).to(tl.int32))
    g = tl.load(global_scale + row * g_stride, mask=row < m, other=0.0)[:, None, None]
    low = e2m1_decode(pair & 0xF) * scale[:, :, None] * g
    high = e2m1_decode(pair >> 4) * scale[:, :, None] * g
    tl.store(word_pointer(out) + codes, round_pair(low, high, dtype, ARCH), mask=mask[:, :, None])


# ---------------------------------------------------------------------------------------------------------------------
# Launching


def on_device(t: torch.Tensor) -> contextlib.AbstractContextManager:
    """Make the tensor's GPU the current one, which is where Triton launches; nothing to do on the CPU (the interpreter)."""
    return torch.cuda.device(t.device) if t.device.type == "cuda" else contextlib.nullcontext()


def aligned_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` [M, K] as the kernels read it: neighbours in a row adjacent, every row at a multiple of 16 bytes.

    Row-strided views of whole rows pass as they are. Anything else costs one copy (K is a multiple of 16, so a contiguous
    matrix has aligned rows).
    """
    stride = x.stride(0) if x.shape[0] > 1 else x.shape[1]
    if x.stride(1) != 1 or (stride * x.element_size()) % 16 or x.data_ptr() % 16 or stride < x.shape[1]:
        return x.clone(memory_format=torch.contiguous_format)
    return x


@dataclasses.dataclass(frozen=True)
class Tile:
    """What a program takes: `rows` rows by `chunks` * `blocks` blocks of 16 (0 chunks: rows in two passes), and its warps.

    shared: `chunks` programs share a row. Each reads all of it for its maximum and quantizes a chunk.
    """

    rows: int
    blocks: int
    chunks: int
    warps: int
    shared: bool = False


def tile(rows: int, blocks: int, per_token: bool, silu: bool = False, shared: bool = False) -> Tile:
    """The tile for `rows` rows of `blocks` blocks, as measured on an H100 (docs/kernel-notes.md).

    shared: programs may share a row.
    """
    width = next_power_of_2(blocks)
    few = rows <= _FEW_ROWS
    if not per_token:
        # One block of 16 a thread for silu; two threads a block for few rows; else two blocks a thread.
        width = min(width, 64 if few and not silu else 128)
        return Tile(max(1, (64 if few and not silu else 128) // width), width, 1, 4 if silu or few else 2)
    if width > _MAX_BLOCKS:
        return Tile(1, 512, 0, 16 if silu else 8)
    if width <= 128:
        return Tile(max(1, 64 // width), width, 1, max(1, width * (2 if silu or few else 1) // 64))
    if few and shared:
        # Reading a row again costs little while there are more multiprocessors than rows.
        parts = cdiv(blocks, 128)
        if rows * parts <= _FEW_ROWS // 2:
            return Tile(1, 128, parts, 4 if parts == 2 else 8, shared=True)
        parts = cdiv(blocks, 256)
        if rows * parts <= _FEW_ROWS:
            return Tile(1, 256, parts, 8, shared=parts > 1)
    if few:
        # A program has a multiprocessor to itself: as many warps as there is work for.
        chunks = 1 if width == 256 else 2
        return Tile(1, width // chunks, chunks, width // chunks // 32)
    # Several small programs on a multiprocessor: while one waits for its row, others compute and store.
    chunk = 128 if width <= 512 or not silu else 256
    return Tile(1, chunk, cdiv(blocks, chunk), chunk // 32)


def _empty(x: torch.Tensor, rows: int, k: int, layout: int, per_token: bool) -> Quantized:
    return (
        torch.empty(rows, k // 2, dtype=torch.uint8, device=x.device),
        torch.empty(sf_shape(rows, k, layout), dtype=torch.uint8, device=x.device),
        torch.empty(rows if per_token else 0, dtype=torch.float32, device=x.device),
    )


def _flags(index: torch.Tensor, rows: int) -> torch.Tensor:
    """uint8 [rows], 1 for the rows that `index` names."""
    named = torch.zeros(rows, dtype=torch.uint8, device=index.device)
    if index.numel():
        launch(mark_kernel, (cdiv(index.numel(), 1024),), index, named, index.numel(), rows, BLOCK=1024)
    return named


def _launch(
    x: torch.Tensor,
    k: int,
    a_global_sf: torch.Tensor,
    out: Quantized,
    *,
    layout: int,
    per_token: bool,
    rows_mode: str = "all",
    index: torch.Tensor | None = None,
    named: torch.Tensor | None = None,
    top_k: int = 1,
    shuffle: bool = False,
    silu: bool = False,
    fast: bool = False,
    pdl: bool = True,
    decode_scale: bool = False,
) -> None:
    x_q, sf, token_scale = out
    blocks = k // GROUP_SIZE
    padded_blocks = blocks if layout == SfLayout.layout_linear else ceil_to(blocks, 4)
    m = index.numel() if rows_mode == "listed" and index is not None else x.shape[0]
    config = tile(m, padded_blocks, per_token, silu, shared=not silu and rows_mode != "scattered")
    programs = cdiv(m, config.rows)
    if not per_token:
        programs *= cdiv(padded_blocks, config.blocks)
    elif config.shared:
        programs *= config.chunks
    pad_start = programs
    if rows_mode in ("all", "named") and sf.shape[0] > x_q.shape[0]:
        tile_words = padded_blocks * (128 if layout == SfLayout.layout_128x4 else 8) // 4
        programs += cdiv(tile_words, _PAD_WORDS)
    if not programs:
        return
    arch = arch_of(x.device)
    pdl = pdl and arch >= 90
    x = aligned_rows(x)
    if x.dtype == torch.float8_e4m3fn:
        x = x.view(torch.uint8)  # Triton refuses pointers to e4m3 before SM89
    launch(
        quantize_kernel,
        (programs,),
        x,
        a_global_sf,
        index,
        named,
        x_q,
        sf,
        token_scale,
        m,
        x_q.shape[0],
        pad_start,
        blocks,
        padded_blocks,
        x.stride(0) // 2 if x.shape[0] > 1 else x.shape[1] // 2,
        0 if a_global_sf.numel() == 1 else 1,
        LAYOUT=layout,
        PER_TOKEN=per_token,
        SHUFFLE=shuffle,
        SILU=silu,
        ROWS=rows_mode,
        TOP_K=top_k,
        FAST=fast,
        PDL=pdl,
        BLOCK_M=config.rows,
        BLOCKS=config.blocks,
        CHUNKS=config.chunks,
        SHARED=config.shared,
        PAD_WORDS=_PAD_WORDS,
        ARCH=arch,
        DECODE=decode_scale,
        num_warps=config.warps,
        enable_fp_fusion=False,
        launch_pdl=pdl,
    )


def _quantize(
    x: torch.Tensor,
    k: int,
    a_global_sf: torch.Tensor,
    *,
    layout: int,
    per_token: bool,
    row_index: torch.Tensor | None,
    out: Quantized | None,
    **options: bool,
) -> Quantized:
    index = None if row_index is None else row_index.reshape(-1)
    with on_device(x):
        if index is None:
            mode, named = "all", None
        elif out is None:
            mode, named = "named", _flags(index, x.shape[0])
        else:
            mode, named = "listed", None
        out = _empty(x, x.shape[0], k, layout, per_token) if out is None else out
        _launch(x, k, a_global_sf, out, layout=layout, per_token=per_token, rows_mode=mode, index=index, named=named, **options)
    return out


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
    decode_scale: bool = False,
    out: Quantized | None = None,
) -> Quantized:
    """Quantize [M, K] to (x_q uint8 [M, K/2], sf uint8 in `layout`, per_token_scale fp32 [M], empty unless `per_token`).

    As `reference.quantize.quantize`; entries of `row_index` at M or above are skipped, and `out` holds contiguous tensors.
    With `row_index` and `out`, only the rows that it names are written, padding bytes neither. decode_scale: a_global_sf is
    the reciprocal of what it is otherwise.
    """
    return _quantize(
        a,
        a.shape[1],
        a_global_sf,
        layout=layout,
        per_token=per_token,
        row_index=row_index,
        out=out,
        shuffle=shuffle,
        fast=fast,
        pdl=pdl,
        decode_scale=decode_scale,
    )


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
    """`quantize` of silu(gate) * up, which is never written; x is [M, 2K], fp16 or bf16, gate first."""
    return _quantize(
        x,
        x.shape[1] // 2,
        a_global_sf,
        layout=layout,
        per_token=per_token,
        row_index=row_index,
        out=out,
        fast=fast,
        silu=True,
    )


def permute_quantize(
    x: torch.Tensor, index: torch.Tensor, rows: int, a_global_sf: torch.Tensor, *, layout: int, fast: bool = False
) -> Quantized:
    """Quantize each token of [T, K] once, per token, and write it to every row that `index` [T, top_k] names for it.

    As `reference.quantize.permute_quantize`; entries at `rows` or above are skipped.
    """
    tokens, k = x.shape
    out = _empty(x, rows, k, layout, True)
    blocks = k // GROUP_SIZE
    padded_blocks = blocks if layout == SfLayout.layout_linear else ceil_to(blocks, 4)
    scales = torch.empty(tokens, padded_blocks, dtype=torch.uint8, device=x.device)
    scale = torch.empty(tokens, dtype=torch.float32, device=x.device)
    token_of = torch.full((rows,), -1, dtype=torch.int32, device=x.device)
    index = index.contiguous()
    with on_device(x):
        _launch(
            x,
            k,
            a_global_sf,
            (out[0], scales, scale),
            layout=layout,
            per_token=True,
            rows_mode="scattered",
            index=index,
            named=token_of,
            top_k=index.shape[1],
            fast=fast,
        )
        if rows:
            pdl = arch_of(x.device) >= 90
            launch(
                place_kernel,
                (cdiv(rows, 128) * cdiv(padded_blocks, _PLACE_BLOCKS),),
                token_of,
                scales,
                scale,
                *out,
                rows,
                blocks,
                padded_blocks,
                LAYOUT=layout,
                BLOCKS=_PLACE_BLOCKS,
                PDL=pdl,
                num_warps=4,
                launch_pdl=pdl,
            )
    return out


def dequantize(
    x_q: torch.Tensor,
    sf: torch.Tensor,
    global_scale: torch.Tensor,
    *,
    layout: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """e2m1 * SF * scale in fp32, then `dtype` (fp32, fp16, bf16).

    x_q [M, K/2], sf in `layout`, global_scale fp32 [1] or [M].
    """
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"dtype: got {dtype}, allowed are float32, float16 and bfloat16")
    m, k = x_q.shape[0], 2 * x_q.shape[1]
    out = torch.empty(m, k, dtype=dtype, device=x_q.device)
    blocks = k // GROUP_SIZE
    if out.numel():
        config = tile(m, blocks, False)
        with on_device(x_q):
            launch(
                dequantize_kernel,
                (cdiv(m, config.rows) * cdiv(blocks, config.blocks),),
                x_q.contiguous(),
                sf.view(torch.uint8).contiguous(),
                global_scale,
                out,
                m,
                blocks,
                blocks if layout == SfLayout.layout_linear else ceil_to(blocks, 4),
                0 if global_scale.numel() == 1 else 1,
                LAYOUT=layout,
                BLOCK_M=config.rows,
                BLOCKS=config.blocks,
                ARCH=arch_of(x_q.device),
                num_warps=config.warps,
                enable_fp_fusion=False,
            )
    return out
