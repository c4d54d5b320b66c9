"""FlashInfer's own quantizer behind this library's call, for the backends "cute-dsl" and "flashinfer" (SM100 and newer)."""

from __future__ import annotations

import torch


def quantize(
    a: torch.Tensor,
    a_global_sf: torch.Tensor,
    *,
    backend: str,
    layout: int,
    shuffle: bool,
    per_token: bool,
    row_index: torch.Tensor | None,
    fast: bool,
    pdl: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`flashinfer.nvfp4_quantize` with the signature and the triple of `reference.quantize.quantize`.

    Fast or strict numerics are FlashInfer's own choice (FLASHINFER_DISABLE_FP4_QUANT_FAST_MATH), so `fast` means nothing.
    """
    import flashinfer

    result = flashinfer.nvfp4_quantize(
        a,
        a_global_sf,
        sfLayout=flashinfer.SfLayout(int(layout)),
        do_shuffle=shuffle,
        sf_vec_size=16,
        enable_pdl=pdl,
        backend=backend,
        per_token_activation=per_token,
        expanded_idx_to_permuted_idx=row_index,
    )
    per_token_scale = result[2] if per_token else a.new_empty(0, dtype=torch.float32)
    return result[0].view(torch.uint8), result[1].view(torch.uint8), per_token_scale
