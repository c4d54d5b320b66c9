"""`nvfp4 bench vllm` with a tiny model: real engines in processes of their own, on the CPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from checkpoints import tiny_model

from nvfp4_plugin.cli import bench_vllm

pytestmark = pytest.mark.vllm


def test_both_methods_are_measured_and_served_by_whom_they_name(monkeypatch, capfd) -> None:
    for name, value in (("BATCHES", (1, 2)), ("PREFILL", (2, 16)), ("KV_CACHE_BYTES", 64 << 20)):
        monkeypatch.setattr(bench_vllm, name, value)
    config = tiny_model("llama").config | {"max_position_embeddings": 4096}
    results = bench_vllm._measure(["nvfp4-plugin", "bf16"], config, "none", 300, together=True)
    for result in results.values():
        assert set(result.get("tokens_per_second", ())) == {"decode, batch 1", "decode, batch 2", "prefill 2 x 16"}, result
        assert all(rate > 0 for rate in result["tokens_per_second"].values())
    assert 'bf16: {"tokens_per_second"' in capfd.readouterr().err


def test_decoding_is_timed_from_when_all_prompts_take_part() -> None:
    prompts = [
        SimpleNamespace(first_token_ts=first, last_token_ts=last) for first, last in ((1.0, 8.0), (3.0, 9.0), (2.0, 8.5))
    ]
    assert bench_vllm._seconds_of_decoding(prompts) == 6.0
    assert bench_vllm._tokens({"batches": (1, 4), "prefill": (2, 16)}) == {
        "decode, batch 1": bench_vllm.TOKENS - 1,
        "decode, batch 4": 4 * (bench_vllm.TOKENS - 1),
        "prefill 2 x 16": 32,
    }
