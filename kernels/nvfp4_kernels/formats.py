"""Codes, scales and layouts of NVFP4: the vocabulary that every kernel and every twin shares.

NVFP4 keeps a matrix as 4-bit e2m1 codes, one e4m3 scale for every 16 values along K, and one fp32 scale above them (for
the tensor, a logical matrix or a token). Source of the element formats: OCP Microscaling Formats v1.0 (e2m1) and OCP
8-bit Floating Point Specification v1.0 (e4m3); of the scale layouts: the block-scaling factor layouts of cuBLAS and of
FlashInfer's `SfLayout`.
"""

from __future__ import annotations

import functools
from enum import IntEnum

import torch
import torch.nn.functional as F

GROUP_SIZE = 16
"""Values along K that share one e4m3 scale."""
E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_MAX_CODE = 0x7E
E4M3_NAN_CODE = 0x7F
E2M1_NAN_CODE = 0x7
FLOAT32_MAX = torch.finfo(torch.float32).max

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The value of each 4-bit code."""


class SfLayout(IntEnum):
    """Where the scale of row m and K-block k lies in memory (names and values as in FlashInfer)."""

    layout_128x4 = 0
    layout_8x4 = 1
    layout_linear = 2


_ROWS_PER_TILE = {SfLayout.layout_128x4: 128, SfLayout.layout_8x4: 8}


def ceil_to(value: int, multiple: int) -> int:
    """`value` rounded up to a multiple of `multiple`."""
    return -(-value // multiple) * multiple


def align_scale_rows(scales: torch.Tensor) -> torch.Tensor:
    """Scales [..., N, K/16] such that every row begins at a multiple of 16 bytes, as bulk copies on a GPU ask for.

    The same tensor where that is so, else a view of a copy that has zeros behind each row. Kernels may read what lies behind a
    row, up to the next multiple of 16, together with codes that are zero.
    """
    rows, width = scales.shape[-2:]
    *expert_stride, row_stride, stride = scales.stride()
    even = all(apart == rows * row_stride for apart in expert_stride)
    aligned = row_stride % 16 == 0
    if width % 16:  # such a view, and all of its rows lie within their memory
        end = scales.storage_offset() + scales.numel() // width * row_stride
        aligned = row_stride == ceil_to(width, 16) and end <= scales.untyped_storage().nbytes()
    if stride == 1 and aligned and even and scales.data_ptr() % 16 == 0:
        return scales
    # Copies and fills of 8-bit floats are not there on every device.
    padded = F.pad(scales.view(torch.uint8), (0, -width % 16))
    return padded.contiguous().view(scales.dtype)[..., :width]


# ---------------------------------------------------------------------------------------------------------------------
# e2m1


def e2m1_magnitude(x: torch.Tensor) -> torch.Tensor:
    """|x| rounded to the nearest e2m1 value (ties to the even code), saturating at 6; fp32 in, fp32 out, NaN stays NaN."""
    magnitude = x.abs()
    # In the binade of p the e2m1 grid has the step p/2 (and 1/2 below 1). Adding and taking away 1.5 * 2^22 * p leaves
    # just those bits: fp32 addition itself rounds to nearest even.
    binade = (magnitude.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(1.0, 4.0).mul_(1.5 * 2**22)
    return magnitude.add_(binade).sub_(binade).clamp_(max=E2M1_MAX)


def e2m1_encode(x: torch.Tensor) -> torch.Tensor:
    """fp32 values to e2m1 codes (uint8, 0..15). Saturating; the sign stays where the magnitude rounds to 0; NaN is 0x7."""
    magnitude = e2m1_magnitude(x)
    # 0 .5 1 1.5 2 3 4 6 -> 0..7: the codes below 4 count halves, above they are the top bits of the fp32 pattern.
    code = torch.where(
        magnitude < 2.0, magnitude * 2.0, ((magnitude.view(torch.int32) >> 22) - 252).to(torch.float32)
    ).nan_to_num_(nan=0.0)
    code = code.to(torch.uint8) | (torch.signbit(x).to(torch.uint8) << 3)
    return torch.where(x.isnan(), E2M1_NAN_CODE, code)


def e2m1_decode(codes: torch.Tensor) -> torch.Tensor:
    """e2m1 codes (uint8, 0..15) to fp32 values."""
    return torch.tensor(E2M1_VALUES, dtype=torch.float32, device=codes.device)[codes.int()]


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes [..., K] to packed uint8 [..., K/2]; the low nibble is the even index."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_codes(packed: torch.Tensor) -> torch.Tensor:
    """Packed uint8 [..., K/2] to uint8 codes [..., K]."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


@functools.cache
def _pair_table(device: torch.device) -> torch.Tensor:
    """The two fp32 values of every packed byte, each pair as one int64 [256]: a gather then moves whole pairs."""
    return e2m1_decode(unpack_codes(torch.arange(256, dtype=torch.uint8, device=device)[:, None])).view(torch.int64).flatten()


def decode_packed(packed: torch.Tensor) -> torch.Tensor:
    """Packed codes uint8 [..., K/2] to their fp32 values [..., K]."""
    pairs = torch.index_select(_pair_table(packed.device), 0, packed.flatten().int())
    return pairs.view(torch.float32).view(*packed.shape[:-1], 2 * packed.shape[-1])


# ---------------------------------------------------------------------------------------------------------------------
# e4m3


def e4m3_encode(x: torch.Tensor) -> torch.Tensor:
    """fp32 values to e4m3 bytes (uint8): round to nearest even, saturating at 448, NaN is 0x7F."""
    code = x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.where(x.isnan(), E4M3_NAN_CODE, code)


def e4m3_decode(code: torch.Tensor) -> torch.Tensor:
    """e4m3 bytes (uint8 or float8_e4m3fn) to fp32 values."""
    return code.view(torch.float8_e4m3fn).to(torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Scale layouts


def sf_shape(rows: int, k: int, layout: int) -> tuple[int, int]:
    """Shape of the scale tensor of an [rows, k] matrix: [rows, k/16] linear; tiles padded to whole 128x4 or 8x4 otherwise."""
    blocks = k // GROUP_SIZE
    if layout == SfLayout.layout_linear:
        return rows, blocks
    return ceil_to(rows, _ROWS_PER_TILE[SfLayout(layout)]), ceil_to(blocks, 4)


def to_layout(sf: torch.Tensor, layout: int) -> torch.Tensor:
    """Linear scale bytes [M, K/16] to `layout` ([padded M, padded K/16]); padding bytes are 0."""
    if layout == SfLayout.layout_linear:
        return sf
    rows, blocks = sf.shape
    padded_rows, padded_blocks = sf_shape(rows, blocks * GROUP_SIZE, layout)
    sf = F.pad(sf, (0, padded_blocks - blocks, 0, padded_rows - rows))
    if layout == SfLayout.layout_128x4:
        tiles = sf.view(padded_rows // 128, 4, 32, padded_blocks // 4, 4).permute(0, 3, 2, 1, 4)
    else:
        tiles = sf.view(padded_rows // 8, 8, padded_blocks // 4, 4).permute(0, 2, 1, 3)
    return tiles.reshape(padded_rows, padded_blocks)


def from_layout(sf: torch.Tensor, rows: int, k: int, layout: int) -> torch.Tensor:
    """The inverse of `to_layout`: linear scale bytes [rows, k/16] out of a tensor in `layout`."""
    if layout == SfLayout.layout_linear:
        return sf
    padded_rows, padded_blocks = sf_shape(rows, k, layout)
    if layout == SfLayout.layout_128x4:
        tiles = sf.reshape(padded_rows // 128, padded_blocks // 4, 32, 4, 4).permute(0, 3, 2, 1, 4)
    else:
        tiles = sf.reshape(padded_rows // 8, padded_blocks // 4, 8, 4).permute(0, 2, 1, 3)
    return tiles.reshape(padded_rows, padded_blocks)[:rows, : k // GROUP_SIZE]


def shuffle_rows(t: torch.Tensor) -> torch.Tensor:
    """Rows in the order of TRT-LLM's transposed epilogue: within each 32 rows, new[d] = old[4*(d%8) + d//8]."""
    return t.view(-1, 8, 4, *t.shape[1:]).transpose(1, 2).reshape(t.shape)
