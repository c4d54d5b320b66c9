"""Tiny models that a framework serves on a GPU, and how far from Hugging Face's they may be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from checkpoints import PROMPT, TinyModel, reference_logprobs, save, tiny_model

# Sizes that the Hopper GEMMs serve, and heads that FlashAttention serves.
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3_moe": {"moe_intermediate_size": 256},
    "mixtral": {},
}
# Bounds of the log-probabilities' error, root mean square: what the rounding of activations costs at least and at most.
BOUNDS = {"none": (0.0, 0.05), "fp8_per_token": (0.005, 0.15), "nvfp4_per_token": (0.02, 0.4)}
DECODED = 12
"""Tokens after the prompt."""


def gpu_model(kind: str, **config: Any) -> TinyModel:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return tiny_model(kind, **{**sizes, **KINDS[kind], **config})


def saved(kind: str, form: str, folder: Path) -> tuple[Path, torch.Tensor]:
    """A checkpoint in `folder`, and PROMPT's log-probabilities by Hugging Face."""
    model = gpu_model(kind)
    expected = reference_logprobs(model, PROMPT, folder / "reference")
    return save(model, form, folder / form), expected
