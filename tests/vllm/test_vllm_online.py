"""What becomes of a plain checkpoint while vLLM loads it: which layers, how much memory, and when it is loaded again."""

from __future__ import annotations

import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import PROMPT, save, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vllm_engine import SETTINGS, engine, logprobs, modules

from nvfp4_kernels import quantize_weight

pytestmark = pytest.mark.vllm


def quantized(llm: Any) -> set[str]:
    return {
        name for name, module in modules(llm).items() if "weight_decode_scale" in dict(module.named_parameters(recurse=False))
    }


def test_routers_head_and_embeddings_are_left_alone(checkpoint) -> None:
    with engine(checkpoint("qwen2_moe", "bf16")) as llm:
        block = "model.layers.0"
        assert quantized(llm) == {
            f"model.layers.{i}.{name}"
            for i in range(2)
            for name in (
                "self_attn.qkv_proj",
                "self_attn.o_proj",
                "mlp.shared_expert.gate_up_proj",
                "mlp.shared_expert.down_proj",
            )
        }
        named = modules(llm)
        assert named[f"{block}.mlp.experts.routed_experts"].w13_weight.dtype == torch.uint8
        for name in ("lm_head", "model.embed_tokens", f"{block}.mlp.gate", f"{block}.mlp.shared_expert_gate"):
            assert not hasattr(named[name], "weight_scale"), name


def test_options_reach_every_layer(checkpoint) -> None:
    options = {"ignore": ["model.layers.0", "*.o_proj", "re:.*no_such_layer"], "lm_head": True, "scale_search": "absmax"}
    # A handler of its own: this log goes to vLLM's handlers, and whether to Python's depends on vLLM's settings.
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("nvfp4_plugin")
    log.addHandler(handler)
    log.setLevel(logging.WARNING)
    with engine(checkpoint("llama", "bf16"), options) as llm:
        assert quantized(llm) == {
            "model.layers.1.self_attn.qkv_proj",
            "model.layers.1.mlp.gate_up_proj",
            "model.layers.1.mlp.down_proj",
            "lm_head",
        }
        down = modules(llm)["model.layers.1.mlp.down_proj"]
        expected = quantize_weight(tiny_model("llama").weights["model.layers.1.mlp.down_proj.weight"], scale_search="absmax")
        assert torch.equal(down.weight, expected.data)
        assert torch.equal(down.weight_scale.view(torch.uint8), expected.scales.view(torch.uint8))
    log.removeHandler(handler)
    log.setLevel(logging.NOTSET)
    unmatched = [message for message in messages if "ignore matches nothing" in message]
    assert len(unmatched) == 1
    assert "re:.*no_such_layer" in unmatched[0]


def test_tied_head_is_quantized_from_the_embedding(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    with engine(model.save(tmp_path), {"lm_head": True}) as llm:
        named = modules(llm)
        embedding = model.weights["model.embed_tokens.weight"]
        assert torch.equal(named["model.embed_tokens"].weight.bfloat16(), embedding)
        assert torch.equal(named["lm_head"].weight, quantize_weight(embedding).data)
        assert logprobs(llm, PROMPT).isfinite().all()


def test_options_through_the_checkpoint_and_the_environment(checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVFP4_CONFIG", "weight_only")
    overrides = {"quantization_config": {"quant_method": "nvfp4", "scale_search": "absmax"}}
    with engine(checkpoint("llama", "bf16"), {"ignore": ["*.down_proj"]}, hf_overrides=overrides) as llm:
        resolved = llm.llm_engine.vllm_config.additional_config["nvfp4_resolved"]
        assert (resolved["activation"], resolved["scale_search"], resolved["ignore"]) == ("none", "absmax", ["*.down_proj"])
        hashed = llm.llm_engine.vllm_config.compute_hash()
    # vLLM's compile cache must tell apart what differs in the environment alone.
    monkeypatch.setenv("NVFP4_CONFIG", "hopper_fp8")
    with engine(checkpoint("llama", "bf16"), {"ignore": ["*.down_proj"]}, hf_overrides=overrides) as llm:
        assert llm.llm_engine.vllm_config.compute_hash() != hashed


@pytest.mark.parametrize("form", ["bf16", "modelopt", "compressed_tensors"])
def test_dummy_weights(form: str, checkpoint) -> None:
    with engine(checkpoint("qwen2_moe", form), load_format="dummy") as llm:
        assert logprobs(llm, PROMPT).isfinite().all()
        named = modules(llm)
        for codes in (
            _codes(named["model.layers.0.self_attn.qkv_proj"], ""),
            _codes(named["model.layers.0.mlp.experts.routed_experts"], "w13_"),
        ):
            assert codes.unique().numel() > 200


def _codes(layer: torch.nn.Module, prefix: str) -> torch.Tensor:
    return getattr(layer, prefix + ("weight_packed" if hasattr(layer, f"{prefix}weight_packed") else "weight"))


@pytest.mark.parametrize("form", ["bf16", "modelopt", "compressed_tensors"])
def test_reload_keeps_the_tensors_and_refreshes_what_is_derived(form: str, checkpoint, tmp_path: Path) -> None:
    options = {"activation": "fp8_per_token"}
    other = save(tiny_model("qwen2_moe", seed=1), form, tmp_path / "other")
    with engine(other, options) as llm:
        expected = logprobs(llm, PROMPT)
    with engine(checkpoint("qwen2_moe", form), options) as llm:
        assert not torch.equal(logprobs(llm, PROMPT), expected)
        before = _places(llm)
        assert any(name.endswith("weight_fp8_fold") for name in before)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
        assert _places(llm) == before
        assert torch.equal(logprobs(llm, PROMPT), expected)


def _places(llm: Any) -> dict[str, tuple[int, int]]:
    """Which object each parameter is, and where its memory lies."""
    return {
        f"{name}.{parameter}": (id(t), t.data_ptr())
        for name, module in modules(llm).items()
        for parameter, t in module.named_parameters(recurse=False)
    }


# ---------------------------------------------------------------------------------------------------------------------
# Memory


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations made and that are alive; files mapped into memory are not among them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {
            t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and not t.is_meta
        }
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and not t.is_meta:
                storage = t.untyped_storage()
                if storage not in self._known and storage.data_ptr() not in inputs:
                    self._known.add(storage)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage.nbytes())
                    self.peak = max(self.peak, self.now)
        return out

    def _freed(self, size: int) -> None:
        self.now -= size


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_peak_memory_is_the_quantized_model_and_one_plain_layer(kind: str, tmp_path: Path) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.distributed import cleanup_dist_env_and_memory, init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    model = tiny_model(
        kind, hidden_size=512, intermediate_size=2048, moe_intermediate_size=256, num_experts=8, num_hidden_layers=4
    )
    folder = model.save(tmp_path)
    arguments = {**SETTINGS, "dtype": "bfloat16", "additional_config": {"nvfp4": {"scale_search": "absmax"}}}
    config = EngineArgs(model=str(folder), **arguments).create_engine_config()
    mlp = [
        t for name, t in model.weights.items() if name.startswith("model.layers.0.mlp") and not name.endswith(".gate.weight")
    ]
    # A dense block is two layers, of which gate and up are the larger one; the experts of a block are one.
    largest = _bytes(*(t for t in mlp if t.shape[0] == 2048) if kind == "llama" else mlp)
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{tmp_path}/rendezvous", 0, "gloo")
        initialize_model_parallel(1, 1)
        try:
            with LiveBytes() as live:
                loaded = get_model(vllm_config=config)
            final = _bytes(*loaded.parameters(), *loaded.buffers())
            plain = _bytes(*model.weights.values())
            # The slack is for the one matrix that has just been quantized.
            allowed = final + largest + (1 << 20)
            assert final < 0.45 * plain
            assert allowed < 0.8 * plain  # or the bound would mean nothing
            assert live.peak <= allowed
        finally:
            cleanup_dist_env_and_memory()


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile


def test_torch_compile_gives_the_same(checkpoint) -> None:
    from torch._dynamo.utils import counters

    folder = checkpoint("qwen2_moe", "bf16")
    options = {"activation": "fp8_per_token"}
    with engine(folder, options) as llm:
        eager = logprobs(llm, PROMPT)
    counters.clear()
    with engine(folder, options, enforce_eager=False) as llm:
        assert counters["stats"]["unique_graphs"] > 0
        assert not counters["graph_break"]
        torch.testing.assert_close(logprobs(llm, PROMPT), eager, rtol=0, atol=2e-2)
