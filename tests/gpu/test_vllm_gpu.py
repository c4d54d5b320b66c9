"""Tiny models in vLLM on a GPU, bf16, torch.compile and CUDA graphs on, against Hugging Face's in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import PROMPT, TinyModel, reference_logprobs, save, tiny_model
from vllm_engine import engine, logprobs

pytestmark = [pytest.mark.gpu, pytest.mark.vllm]

# Sizes that the Hopper GEMMs serve, and heads that FlashAttention serves.
SIZES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3_moe": {"moe_intermediate_size": 256},
    "mixtral": {},
}
# Bounds of the log-probabilities' error, root mean square: what the rounding of activations costs at least and at most.
BOUNDS = {"none": (0.0, 0.05), "fp8_per_token": (0.005, 0.15), "nvfp4_per_token": (0.02, 0.4)}
DECODED = 12


def _model(kind: str, **config: Any) -> TinyModel:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return tiny_model(kind, **{**sizes, **SIZES[kind], **config})


def _decode(llm: Any) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens after PROMPT, and the log-probability of each as decoding gave it."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=DECODED, min_tokens=DECODED, temperature=0, logprobs=0, detokenize=False)
    [output] = llm.generate([{"prompt_token_ids": PROMPT}], sampling, use_tqdm=False)
    [completion] = output.outputs
    tokens = list(completion.token_ids)
    return tokens, torch.tensor([step[token].logprob for token, step in zip(tokens, completion.logprobs, strict=True)])


@pytest.mark.parametrize("form", ["bf16", "modelopt"])
@pytest.mark.parametrize("kind", list(SIZES))
def test_log_probabilities(kind: str, form: str, tmp_path: Path) -> None:
    model = _model(kind)
    expected = reference_logprobs(model, PROMPT, tmp_path / "reference")
    folder = save(model, form, tmp_path / form)
    settings: dict[str, Any] = {
        "dtype": "bfloat16",
        "enforce_eager": False,
        "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4]},
        "kv_cache_memory_bytes": 1 << 28,
    }
    for activation, (low, high) in BOUNDS.items():
        with engine(folder, {"activation": activation}, **settings) as llm:
            error = (logprobs(llm, PROMPT) - expected).square().mean().sqrt()
            assert low <= error < high, f"{activation}: root mean square error {error:.4f}"
            tokens, decoded = _decode(llm)
            # A row at a time, by CUDA graphs, comes to what all rows at once come to.
            together = logprobs(llm, PROMPT + tokens)[-DECODED:]
            assert (decoded - together).square().mean().sqrt() < high, activation


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_no_request_waits_for_a_compiler(kind: str, tmp_path: Path) -> None:
    folder = save(_model(kind, max_position_embeddings=2048), "bf16", tmp_path)
    settings: dict[str, Any] = {
        "dtype": "bfloat16",
        "enforce_eager": True,
        "kv_cache_memory_bytes": 1 << 28,
        "max_model_len": 2048,
        "max_num_batched_tokens": 2048,
        "jit_monitor_mode": "error",  # of vLLM: whatever is compiled once the engine has started raises
    }
    with engine(folder, **settings) as llm:
        for length in (1, 3, 7, 12, 30, 50, 100, 200, 500, 1000, 1900):
            assert logprobs(llm, [3 + i % 200 for i in range(length + 1)]).isfinite().all()
