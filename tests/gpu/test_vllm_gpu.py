"""Tiny models in vLLM on a GPU, bf16, torch.compile and CUDA graphs on, against Hugging Face's in fp32."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import PROMPT, save
from gpu_models import BOUNDS, DECODED, KINDS, gpu_model, saved
from vllm_engine import engine, log_lines, logprobs

pytestmark = [pytest.mark.gpu, pytest.mark.vllm]


def _decode(llm: Any) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens after PROMPT, and the log-probability of each as decoding gave it."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=DECODED, min_tokens=DECODED, temperature=0, logprobs=0, detokenize=False)
    [output] = llm.generate([{"prompt_token_ids": PROMPT}], sampling, use_tqdm=False)
    [completion] = output.outputs
    tokens = list(completion.token_ids)
    return tokens, torch.tensor([step[token].logprob for token, step in zip(tokens, completion.logprobs, strict=True)])


@pytest.mark.parametrize("form", ["bf16", "modelopt"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_log_probabilities(kind: str, form: str, tmp_path: Path) -> None:
    folder, expected = saved(kind, form, tmp_path)
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


@pytest.mark.parametrize(("kind", "eager"), [("llama", True), ("qwen3_moe", True), ("llama", False)])
def test_no_request_waits_for_a_compiler(kind: str, eager: bool, tmp_path: Path) -> None:
    from vllm import SamplingParams

    folder = save(gpu_model(kind, max_position_embeddings=2048), "bf16", tmp_path)
    settings: dict[str, Any] = {
        "dtype": "bfloat16",
        "enforce_eager": eager,
        "kv_cache_memory_bytes": 1 << 28,
        "max_model_len": 2048,
        "max_num_batched_tokens": 2048,
        "jit_monitor_mode": "error",  # of vLLM: whatever is compiled once the engine has started raises
    }
    if not eager:
        settings["compilation_config"] = {"cudagraph_capture_sizes": [1, 2, 4]}
    with engine(folder, **settings) as llm:
        for length in (1, 3, 7, 12, 30, 50, 100, 200, 500, 1000, 1900):
            # No log-probabilities of the prompt: vLLM itself compiles a kernel for them when they are first asked for.
            prompt = {"prompt_token_ids": [3 + i % 200 for i in range(length + 1)]}
            [output] = llm.generate([prompt], SamplingParams(max_tokens=2, min_tokens=2, detokenize=False), use_tqdm=False)
            assert len(output.outputs[0].token_ids) == 2


# Of two decoder layers, in the graphs that vLLM compiles: before, between and after their attention.
FUSED = {
    "llama": [
        {"rms_norm_linear": 1},
        {"add_rms_norm_linear": 2, "silu_and_mul_linear": 1},
        {"add_rms_norm_linear": 1, "silu_and_mul_linear": 1},
    ],
    "qwen3_moe": [{"rms_norm_linear": 1}, {"add_rms_norm_linear": 1}, {}],
}


@pytest.mark.parametrize("kind", list(FUSED))
def test_norms_and_silu_are_fused(kind: str, tmp_path: Path) -> None:
    from torch._inductor.utils import fresh_cache

    settings: dict[str, Any] = {"dtype": "bfloat16", "kv_cache_memory_bytes": 1 << 28}
    folder = save(gpu_model(kind), "bf16", tmp_path)
    options = {"activation": "fp8_per_token"}
    with engine(folder, options, **settings) as llm:
        eager = logprobs(llm, PROMPT)
    settings |= {"enforce_eager": False, "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4]}}
    with fresh_cache(), log_lines(logging.INFO) as messages, engine(folder, options, **settings) as llm:
        error = (logprobs(llm, PROMPT) - eager).square().mean().sqrt()
    lines = [message for message in messages if "with what comes before them" in message]
    found = [{name: int(count) for count, name in re.findall(r"(\d+) (\w+_linear)", line)} for line in lines]
    assert found == FUSED[kind]
    # Roundings to 16 bits and to e4m3 fall out differently here and there.
    assert error < 0.1
