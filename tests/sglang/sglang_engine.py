"""Real SGLang for tests: a `ModelRunner` in this process, where modules can be looked at, and the whole Engine."""

from __future__ import annotations

import gc
import json
import os
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Before SGLang is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# SGLang brings up NCCL among ranks on the CPU, too, wherever torch was built for CUDA, unless its library cannot be loaded.
os.environ["SGLANG_NCCL_SO_PATH"] = "no NCCL among CPUs"
# Two ranks read the free memory of one machine, which other processes change in between.
os.environ["SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"] = "0"

import pytest
import torch

pytest.importorskip("sglang.srt.plugins", reason="these tests run real SGLang (pip install 'nvfp4-plugin[sglang]')")

SETTINGS: dict[str, Any] = {
    "quantization": "nvfp4",
    "device": "cpu",
    "dtype": "float32",
    "attention_backend": "torch_native",
    "skip_tokenizer_init": True,
    "disable_overlap_schedule": True,
    "disable_radix_cache": True,
    "max_total_tokens": 512,
    # On a CPU, SGLang charges a model with what any process allocates while it loads, and refuses to start when that is more
    # than this share of the memory that was free before. `max_total_tokens` alone keeps the KV cache small.
    "mem_fraction_static": 1.0,
    "random_seed": 0,
    "log_level": "error",
}


def settings(model: Path, options: dict[str, Any] | None = None, **others: Any) -> dict[str, Any]:
    """Arguments of ServerArgs and Engine for a small machine, with our `options`."""
    override = {"json_model_override_args": json.dumps({"nvfp4": options})} if options else {}
    return {"model_path": str(model), **SETTINGS, **override, **others}


@contextmanager
def runner(model: Path, options: dict[str, Any] | None = None, rank: int = 0, port: int = 0, **others: Any) -> Iterator[Any]:
    """SGLang's `ModelRunner` with a loaded model and a KV cache, in this process; all of it is gone afterwards.

    With a tp_size above 1 every process of the group calls it, with its rank and one free port for all of them.
    """
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.benchmark.one_batch import _init_process_global_configs
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed import bootstrap
    from sglang.srt.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel
    from sglang.srt.managers.scheduler import SpawnRanks, publish, spawn_world_rank
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.runtime_context import get_resources
    from sglang.srt.server_args import PortArgs, ServerArgs

    args = ServerArgs(**settings(model, options, **others))
    ranks = SpawnRanks(world_rank=spawn_world_rank(args, tp_rank=rank, pp_rank=0), gpu_id=0)
    publish(args, role="scheduler", ranks=ranks)
    _init_process_global_configs()
    port = port or PortArgs.init_new(args).nccl_port
    out = None
    try:
        config = ModelConfig.from_server_args(args)
        bootstrap.init_parallel_runtime(server_args=args, device="cpu", dist_port=port)
        bootstrap.init_layer_runtime(model_config=config)
        out = ModelRunner(
            model_config=config,
            mem_fraction_static=args.mem_fraction_static,
            gpu_id=0,
            nccl_port=port,
            server_args=args,
        )
        out.alloc_memory_pool()
        out.init_attention_backends()
        out.init_cuda_graphs()  # none on the CPU, but the eager runners come from here
        yield out
    finally:
        del out
        gc.collect()
        destroy_model_parallel()
        destroy_distributed_environment()
        get_resources().expert_location_metadata = None


@torch.no_grad()
def logprobs(runner: Any, prompt: list[int]) -> torch.Tensor:
    """The log-probability of each token of `prompt` after the first."""
    from sglang.benchmark.one_batch import TreeCacheNamespace
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.sampling.sampling_params import SamplingParams
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    runner.req_to_token_pool.clear()
    runner.token_to_kv_pool_allocator.clear()
    sampling = SamplingParams(temperature=0, max_new_tokens=1)
    tokens = array("q", prompt)
    request = Req(rid=0, origin_input_text="", origin_input_ids=tokens, sampling_params=sampling, return_logprob=True)
    request.full_untruncated_fill_ids = tokens
    request.logprob_start_len = 0
    request.extend_end = len(tokens)
    cache = TreeCacheNamespace(page_size=1, device=runner.device, token_to_kv_pool_allocator=runner.token_to_kv_pool_allocator)
    batch = ScheduleBatch.init_new(
        reqs=[request],
        req_to_token_pool=runner.req_to_token_pool,
        token_to_kv_pool_allocator=runner.token_to_kv_pool_allocator,
        tree_cache=cache,
        model_config=runner.model_config,
        enable_overlap=False,
        spec_algorithm=SpeculativeAlgorithm.NONE,
    )
    batch.prepare_for_extend()
    if batch.input_ids is None:
        batch.input_ids = batch.prefill_input_ids_cpu
    forward = ForwardBatch.init_new(batch, runner, return_hidden_states_before_norm=False)
    output = runner.forward(forward).logits_output
    return output.input_token_logprobs[: len(prompt) - 1].float()


def modules(runner: Any) -> dict[str, torch.nn.Module]:
    """The modules of the loaded model by name."""
    return dict(runner.model.named_modules())
