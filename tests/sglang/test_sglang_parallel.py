"""Two ranks: tensor parallelism, and experts spread over the ranks."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from checkpoints import PROMPT, tiny_model
from sglang_engine import logprobs, modules, runner

from nvfp4_kernels import quantize_weight

pytestmark = pytest.mark.sglang


def _rank(rank: int, cases: list[tuple[str, dict[str, Any]]], ports: list[int], out: Path) -> None:
    results = []
    for port, (path, settings) in zip(ports, cases, strict=True):
        with runner(Path(path), {"activation": "none"}, rank=rank, port=port, tp_size=2, **settings) as model:
            for layer in modules(model).values():
                # SGLang's dispatcher asks for an accelerator when it makes this table, which maps global to local experts.
                if getattr(dispatcher := getattr(layer, "dispatcher", None), "moe_ep_size", 1) > 1:
                    local, first = dispatcher.num_local_experts, dispatcher.moe_ep_rank * dispatcher.num_local_experts
                    dispatcher.local_expert_mapping = torch.full((dispatcher.num_experts,), -1, dtype=torch.int32)
                    dispatcher.local_expert_mapping[first : first + local] = torch.arange(local, dtype=torch.int32)
            results.append((logprobs(model, PROMPT), {name: p.data for name, p in model.model.named_parameters()}))
    torch.save(results, out / f"{rank}.pt")


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_ranks_agree_with_one(checkpoint, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|1")
    experts = "model.layers.0.mlp.experts.w13_weight"
    cases: list[tuple[str, str, dict[str, Any], str, tuple[int, ...]]] = [
        ("llama", "modelopt", {}, "model.layers.0.self_attn.qkv_proj.weight", (128, 32)),
        ("qwen3_moe", "modelopt", {}, experts, (8, 64, 32)),
        ("qwen3_moe", "modelopt", {"ep_size": 2}, experts, (4, 128, 32)),
        ("qwen3_moe", "compressed_tensors", {"ep_size": 2}, f"{experts}_packed", (4, 128, 32)),
        ("llama", "bf16", {}, "model.layers.0.mlp.down_proj.weight", (64, 32)),
        ("qwen3_moe", "bf16", {"ep_size": 2}, experts, (4, 128, 32)),
    ]
    jobs = [(str(checkpoint(kind, form)), settings) for kind, form, settings, *_ in cases]
    ports = [_free_port() for _ in cases]
    torch.multiprocessing.spawn(_rank, (jobs, ports, tmp_path), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    monkeypatch.undo()
    for i, (kind, form, _, name, shape) in enumerate(cases):
        with runner(checkpoint(kind, form), {"activation": "none"}) as model:
            expected = logprobs(model, PROMPT)
        (first, parameters), (second, _) = ranks[0][i], ranks[1][i]
        assert tuple(parameters[name].shape) == shape
        assert torch.equal(first, second)
        if form != "bf16":
            torch.testing.assert_close(first, expected, rtol=0, atol=1e-4, msg=lambda text, i=i: f"{cases[i]}: {text}")
    # Online, a rank's shards get global scales of their own; experts that a rank holds whole have those of one rank.
    down = tiny_model("llama").weights["model.layers.0.mlp.down_proj.weight"].float()
    experts_1 = tiny_model("qwen3_moe").weights["model.layers.0.mlp.experts.4.down_proj.weight"].float()
    for rank in range(2):
        shard = quantize_weight(down[:, 64 * rank :][:, :64].contiguous())
        assert torch.equal(ranks[rank][4][1]["model.layers.0.mlp.down_proj.weight"], shard.data)
    whole = quantize_weight(experts_1)
    assert torch.equal(ranks[1][5][1]["model.layers.0.mlp.experts.w2_weight"][0], whole.data)
