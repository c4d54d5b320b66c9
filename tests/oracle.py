"""The numeric rules in plain numpy and Python, written apart from the library: tests hold both against each other."""

from __future__ import annotations

import numpy as np

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float64)
# Every finite, non-negative e4m3 value by its byte: exponent bias 7, subnormals below 2^-6.
E4M3 = np.array(
    [(b & 7) * 2.0**-9 if b < 8 else (1 + (b & 7) / 8) * 2.0 ** ((b >> 3) - 7) for b in range(0x7F)], dtype=np.float64
)


def nearest_even(grid: np.ndarray, value: float) -> int:
    """Index of the grid value nearest to `value` >= 0, ties to the even index, saturating at the last."""
    if value >= grid[-1]:
        return len(grid) - 1
    above = int(np.searchsorted(grid, value, side="right"))
    low, high = value - grid[above - 1], grid[above] - value
    if low == high:
        return above - 1 if (above - 1) % 2 == 0 else above
    return above - 1 if low < high else above


def e2m1(value: float) -> int:
    if np.isnan(value):
        return 7
    return nearest_even(E2M1, abs(float(value))) | (8 if np.signbit(value) else 0)


def e4m3(value: float) -> int:
    return 0x7F if np.isnan(value) else nearest_even(E4M3, float(value))


def e4m3_value(code: int) -> np.float32:
    return np.float32(np.nan) if code == 0x7F else np.float32(E4M3[code])


def quantize_block(block: np.ndarray, g: np.float32) -> tuple[list[int], int]:
    """The strict block rule on 16 fp32 values: (codes, scale byte)."""
    with np.errstate(all="ignore"):
        one = np.float32(1)
        amax = np.max(np.abs(block))
        sf = e4m3(amax * (g * np.float32(one / np.float32(6))))
        if sf == 0:
            return [0] * 16, 0
        scale = np.minimum(one / (e4m3_value(sf) * (one / g)), np.finfo(np.float32).max)
        return [e2m1(np.float32(v) * scale) for v in block], sf


def quantize(x: np.ndarray, g: np.ndarray | None, c: np.float32 | None = None):
    """Strict quantization of fp32 [M, K]: (codes [M, K], scale bytes [M, K/16], per-token scales [M] or None)."""
    m, k = x.shape
    codes, sf = np.zeros((m, k), np.uint8), np.zeros((m, k // 16), np.uint8)
    scales = np.zeros(m, np.float32)
    with np.errstate(all="ignore"):
        for i in range(m):
            if c is not None:
                amax = np.max(np.abs(x[i]))
                row_g = np.float32(0)
                if amax != 0:
                    row_g = np.minimum((np.float32(1) / c) / amax, np.finfo(np.float32).max)
                    scales[i] = np.float32(1) / row_g
            else:
                row_g = g[i] if len(g) > 1 else g[0]
            for b in range(k // 16):
                codes[i, 16 * b : 16 * b + 16], sf[i, b] = quantize_block(x[i, 16 * b : 16 * b + 16], row_g)
    return codes, sf, scales if c is not None else None


def sf_offset(layout: int, m: int, k: int, blocks: int) -> int:
    """Byte offset of the scale of row m, K-block k."""
    kt = -(-blocks // 4)
    if layout == 0:
        return ((m // 128) * kt + k // 4) * 512 + (m % 32) * 16 + ((m % 128) // 32) * 4 + k % 4
    if layout == 1:
        return ((m // 8) * kt + k // 4) * 32 + (m % 8) * 4 + k % 4
    return m * blocks + k


def sf_bytes(layout: int, rows: int, blocks: int) -> int:
    kt = -(-blocks // 4)
    return {0: -(-rows // 128) * 128 * 4 * kt, 1: -(-rows // 8) * 8 * 4 * kt, 2: rows * blocks}[layout]


def place_scales(sf: np.ndarray, layout: int) -> np.ndarray:
    """Linear scale bytes [M, K/16] as the flat bytes of `layout`, padding 0."""
    rows, blocks = sf.shape
    flat = np.zeros(sf_bytes(layout, rows, blocks), np.uint8)
    for m in range(rows):
        for k in range(blocks):
            flat[sf_offset(layout, m, k, blocks)] = sf[m, k]
    return flat


def pack(codes: np.ndarray) -> np.ndarray:
    return codes[:, 0::2] | (codes[:, 1::2] << 4)
