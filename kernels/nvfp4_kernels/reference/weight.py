"""Twin of the weight quantizer: the searches for block scales that cost nothing in the format.

Candidates and tie-breaks are fixed, and so is the order of every sum, so that a GPU kernel can give the same bits.
"""

from __future__ import annotations

import torch

from ..formats import (
    E4M3_MAX_CODE,
    FLOAT32_MAX,
    GROUP_SIZE,
    e2m1_encode,
    e2m1_magnitude,
    e4m3_decode,
    e4m3_encode,
    pack_codes,
)

SCALE_SEARCHES = ("absmax", "four_over_six", "mse")
SCALE_BASE = {"absmax": 448.0, "four_over_six": 256.0, "mse": 256.0}
"""The e4m3 scale that the largest block gets. 256 leaves room above it, where the other candidates lie."""
MSE_CANDIDATES = range(-2, 7)
"""Steps in e4m3 codes around the absmax scale that `mse` tries. All 126 codes gain nothing over these nine."""

_CHUNK_BLOCKS = 2047
"""Blocks searched at a time: their fp32 copies stay in a core's cache, and the tensors stay below the 32,768 elements from
which torch shares an operation between threads. A hundred such operations a chunk would wait for one another a hundred
times, which takes ten times as long as soon as something else runs on a core."""


def block_error(magnitude: torch.Tensor, sf: torch.Tensor, inverse_g: torch.Tensor) -> torch.Tensor:
    """Squared error [B] of blocks |x| [B, 16] under scale bytes sf [B]: an adjacent-pair tree of fp32 sums."""
    step = (e4m3_decode(sf) * inverse_g).unsqueeze(-1)
    error = e2m1_magnitude(magnitude * (1.0 / step).clamp_(max=FLOAT32_MAX)).mul_(step).sub_(magnitude).square_()
    while error.shape[-1] > 1:
        error = error[..., 0::2] + error[..., 1::2]
    return error.squeeze(-1)


def _search_blocks(x: torch.Tensor, g: torch.Tensor, scale_search: str) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 blocks [B, 16] and one encode scale (0-d) to packed codes [B, 8] and scale bytes [B]."""
    magnitude = x.abs()
    amax = magnitude.amax(-1)
    inverse_g = 1.0 / g
    sixth = torch.tensor(1.0 / 6.0, dtype=torch.float32, device=x.device)
    s6 = amax * (g * sixth)
    sf = e4m3_encode(s6)
    if scale_search == "four_over_six":
        sf4 = e4m3_encode(1.5 * s6)
        better = block_error(magnitude, sf4, inverse_g) < block_error(magnitude, sf, inverse_g)
        sf = torch.where(better, sf4, sf)
    elif scale_search == "mse":
        center = sf.short()
        best = torch.full_like(amax, torch.inf)
        for step in MSE_CANDIDATES:
            candidate = (center + step).clamp(1, E4M3_MAX_CODE).to(torch.uint8)
            error = block_error(magnitude, candidate, inverse_g)
            better = error < best
            best = torch.where(better, error, best)
            sf = torch.where(better, candidate, sf)
        sf = torch.where(amax == 0, 0, sf)
    scale = (1.0 / (e4m3_decode(sf) * inverse_g)).clamp(max=FLOAT32_MAX)
    codes = torch.where((sf != 0).unsqueeze(-1), e2m1_encode(x * scale.unsqueeze(-1)), 0)
    return pack_codes(codes), sf


def search_scales(weight: torch.Tensor, encode_scale: torch.Tensor, *, scale_search: str) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., N, K] under fp32 encode scales [...] to (data uint8 [..., N, K/2], scales float8_e4m3fn [..., N, K/16])."""
    data = torch.empty(*weight.shape[:-1], weight.shape[-1] // 2, dtype=torch.uint8, device=weight.device)
    sf = torch.empty(*weight.shape[:-1], weight.shape[-1] // GROUP_SIZE, dtype=torch.uint8, device=weight.device)
    for matrix, g, matrix_data, matrix_sf in zip(
        weight.flatten(0, -3) if weight.dim() > 2 else weight[None],
        encode_scale.reshape(-1),
        data.flatten(0, -3) if data.dim() > 2 else data[None],
        sf.flatten(0, -3) if sf.dim() > 2 else sf[None],
        strict=True,
    ):
        block_sf = matrix_sf.view(-1)
        blocks = matrix.reshape(len(block_sf), GROUP_SIZE)
        block_data = matrix_data.view(len(block_sf), GROUP_SIZE // 2)
        for start in range(0, blocks.shape[0], _CHUNK_BLOCKS):
            chunk = slice(start, start + _CHUNK_BLOCKS)
            block_data[chunk], block_sf[chunk] = _search_blocks(blocks[chunk].to(torch.float32), g, scale_search)
    return data, sf.view(torch.float8_e4m3fn)
