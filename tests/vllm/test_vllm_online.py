"""What becomes of a plain checkpoint while vLLM loads it: which layers, how much memory, and when it is loaded again."""

from __future__ import annotations

import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import PROMPT, save, save_modelopt, tiny_model
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vllm_engine import SETTINGS, engine, log_lines, logprobs, modules

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
    with log_lines(logging.WARNING) as messages, engine(checkpoint("llama", "bf16"), options) as llm:
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


@pytest.mark.parametrize("missing", ["weight", "weight_scale", "weight_scale_2"])
@pytest.mark.parametrize(
    ("kind", "module", "layer", "prefix"),
    [
        ("llama", "model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.qkv_proj", ""),
        ("qwen3_moe", "model.layers.1.mlp.experts.5.up_proj", "model.layers.1.mlp.experts", "w13_"),
    ],
)
def test_reload_of_a_checkpoint_that_lacks_a_tensor(
    missing: str, kind: str, module: str, layer: str, prefix: str, checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tiny_model(kind, seed=1), "modelopt", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{module}.{missing}"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    empty_strided = torch.empty_strided

    def plausible(*args: Any, **kwargs: Any) -> torch.Tensor:
        """The memory that vLLM reloads into, full of what could be codes and scales."""
        tensor = empty_strided(*args, **kwargs)
        if not tensor.is_meta:
            tensor.untyped_storage().fill_(0x38)
        return tensor

    with engine(checkpoint(kind, "modelopt")) as llm:
        monkeypatch.setattr(torch, "empty_strided", plausible)
        with pytest.raises(ValueError, match=rf"^{layer}: only some .* came: \d+ of \d+ of {prefix}{missing}$"):
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})


def test_head_of_a_padded_vocabulary_loads_and_reloads(tmp_path: Path) -> None:
    from vllm.model_executor.model_loader.reload.layerwise import initialize_layerwise_reload

    def save_with_head(seed: int) -> tuple[Path, dict[str, torch.Tensor]]:
        model = tiny_model("llama", seed=seed, vocab_size=300)
        weight = quantize_weight(model.weights.pop("lm_head.weight"))
        head = {
            "weight": weight.data,
            "weight_scale": weight.scales,
            "weight_scale_2": weight.global_scale,
            "input_scale": torch.tensor(0.01),
        }
        model.weights |= {f"lm_head.{name}": tensor for name, tensor in head.items()}
        return save_modelopt(model, tmp_path / str(seed), ignore=[]), head

    other, tensors = save_with_head(1)
    with engine(other) as llm:
        expected = logprobs(llm, PROMPT)
    with engine(save_with_head(0)[0]) as llm:
        head = modules(llm)["lm_head"]
        assert head.weight.shape == (320, 32)
        assert not torch.equal(logprobs(llm, PROMPT), expected)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
        assert torch.equal(logprobs(llm, PROMPT), expected)
        initialize_layerwise_reload(head)
        for name, tensor in tensors.items():
            assert head.weight.is_meta
            parameter = getattr(head, name)
            parameter.weight_loader(parameter, tensor)
        assert not head.weight.is_meta  # vLLM waits for nothing else
        assert torch.equal(logprobs(llm, PROMPT), expected)


def _places(llm: Any) -> dict[str, tuple[int, int]]:
    """Which object each parameter is, and where its memory lies."""
    return {
        f"{name}.{parameter}": (id(t), t.data_ptr())
        for name, module in modules(llm).items()
        for parameter, t in module.named_parameters(recurse=False)
    }


def test_models_of_other_options_are_compiled_for_again(checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warming up passes over what it has done. On a CPU it does nothing: here is what it is told to tell layers apart by."""
    from nvfp4_plugin.vllm import linear, moe

    told: set[tuple[Any, ...]] = set()
    monkeypatch.setattr(linear, "warm_up_linear", lambda *args: told.add(("linear", args[0], *args[5:])))
    monkeypatch.setattr(moe, "warm_up_moe", lambda *args, **kwargs: told.add(("moe", args[0], *args[4:])))
    before: set[tuple[Any, ...]] = set()
    for options in ({"activation": "none"}, {"activation": "fp8_per_token"}, {"activation": "none", "backend": "reference"}):
        told.clear()
        with engine(checkpoint("qwen2_moe", "modelopt"), options, load_format="dummy"):
            pass
        assert {kind for kind, *_ in told} == {"linear", "moe"}
        assert not told & before
        before |= told


# ---------------------------------------------------------------------------------------------------------------------
# Experts

BLOCKS = [f"model.layers.{i}.mlp.experts" for i in range(2)]


def _fused(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights with all experts of a block in one tensor, gate and up in another one below each other."""
    fused = {name: t for name, t in weights.items() if ".experts." not in name}
    for block in BLOCKS:
        gate, up, down = (
            torch.stack([weights[f"{block}.{e}.{p}_proj.weight"] for e in range(8)]) for p in ("gate", "up", "down")
        )
        fused |= {f"{block}.gate_up_proj": torch.cat([gate, up], dim=1), f"{block}.down_proj": down}
    return fused


def _check_experts(layer: torch.nn.Module, weights: dict[str, torch.Tensor], block: str) -> None:
    """Equality, to the bit, of a layer's experts with their matrices quantized one by one."""

    def expected(projection: str) -> list[Any]:
        return [quantize_weight(weights[f"{block}.{expert}.{projection}_proj.weight"]) for expert in range(8)]

    for prefix, projections in (("w13", ("gate", "up")), ("w2", ("down",))):
        parts = [expected(projection) for projection in projections]
        data = torch.stack([torch.cat([w.data for w in expert]) for expert in zip(*parts, strict=True)])
        scales = torch.stack([torch.cat([w.scales.view(torch.uint8) for w in expert]) for expert in zip(*parts, strict=True)])
        decode = [torch.cat([w.global_scale.expand(len(w.data)) for w in expert]) for expert in zip(*parts, strict=True)]
        got = getattr(layer, f"{prefix}_weight_decode_scale")
        assert torch.equal(getattr(layer, f"{prefix}_weight"), data)
        assert torch.equal(getattr(layer, f"{prefix}_weight_scale").view(torch.uint8), scales)
        assert torch.equal(got if got.dim() == 2 else got[:, None].expand(-1, data.shape[1]), torch.stack(decode))


@pytest.mark.parametrize("fused", [False, True])
def test_experts_equal_their_matrices_quantized_alone(fused: bool, tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    with engine(model.save(tmp_path, _fused(model.weights) if fused else None)) as llm:
        for block in BLOCKS:
            _check_experts(modules(llm)[f"{block}.routed_experts"], model.weights, block)


def test_experts_come_again_in_any_order_and_in_tensors_of_all_experts(checkpoint) -> None:
    """What vLLM's models do with a layer's loaders, which they find in its parameters."""
    from vllm.model_executor.model_loader.reload.layerwise import finalize_layerwise_reload, initialize_layerwise_reload

    other, block = tiny_model("qwen3_moe", seed=1).weights, BLOCKS[1]
    projections = [("w1", "gate"), ("w3", "up"), ("w2", "down")]

    def load(layer: torch.nn.Module, shard: str, weight: torch.Tensor, expert: int) -> None:
        name = "w2_weight" if shard == "w2" else "w13_weight"
        parameter = getattr(layer, name)
        assert parameter.weight_loader(parameter, weight, name, shard_id=shard, expert_id=expert, return_success=True)

    def one_by_one(layer: torch.nn.Module) -> None:
        for expert in (5, 2, 7, 0, 1, 6, 4, 3):
            for shard, projection in reversed(projections):
                load(layer, shard, other[f"{block}.{expert}.{projection}_proj.weight"], expert)

    def at_once(layer: torch.nn.Module) -> None:
        for shard, projection in projections:
            load(layer, shard, torch.stack([other[f"{block}.{e}.{projection}_proj.weight"] for e in range(8)]), 0)

    with engine(checkpoint("qwen3_moe", "bf16")) as llm:
        layer = modules(llm)[f"{block}.routed_experts"]
        for come in (one_by_one, at_once):
            for codes in (layer.w13_weight, layer.w2_weight):
                codes.zero_()
            initialize_layerwise_reload(layer)
            assert layer.w13_weight.is_meta
            come(layer)
            finalize_layerwise_reload(layer, llm.llm_engine.vllm_config.model_config)
            _check_experts(layer, other, block)

        def one_twice(layer: torch.nn.Module) -> None:
            """And another never: as many values as there should be."""
            for expert in range(8):
                for shard, projection in projections:
                    source = 5 if (expert, shard) == (6, "w2") else expert
                    load(layer, shard, other[f"{block}.{source}.{projection}_proj.weight"], source)

        initialize_layerwise_reload(layer)
        with pytest.raises(ValueError, match=rf"{block}.6.down_proj.weight.*: .* values are NaN"):
            one_twice(layer)


def test_a_quantized_expert_that_comes_twice_stands_for_no_other(checkpoint) -> None:
    from vllm.model_executor.model_loader.reload.layerwise import initialize_layerwise_reload

    folder, block = checkpoint("qwen3_moe", "modelopt"), BLOCKS[1]
    tensors = {name: t for name, t in load_file(folder / "model.safetensors").items() if name.startswith(block)}
    names = [name.removeprefix(f"{block}.").replace("6.down_proj.weight", "5.down_proj.weight") for name in tensors]
    with engine(folder) as llm:
        layer = modules(llm)[f"{block}.routed_experts"]
        initialize_layerwise_reload(layer)
        with pytest.raises(
            ValueError, match=r"came: \d+ of \d+ of w2_weight, .* of w2_weight_scale, 7 of 8 of w2_weight_scale_2$"
        ):
            list(layer.load_weights(zip(names, tensors.values(), strict=True)))


def test_dummy_experts_can_be_loaded_over(checkpoint) -> None:
    folder, weights = checkpoint("qwen3_moe", "bf16"), tiny_model("qwen3_moe").weights
    with engine(folder, load_format="dummy") as llm:
        layer = modules(llm)[f"{BLOCKS[0]}.routed_experts"]
        assert not torch.equal(layer.w13_weight[0], layer.w13_weight[1])
        llm.llm_engine.vllm_config.load_config.load_format = "auto"
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        _check_experts(layer, weights, BLOCKS[0])


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
def test_peak_memory_is_the_quantized_model_and_one_plain_layer_or_expert(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.distributed import cleanup_dist_env_and_memory, init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    if not torch.accelerator.is_available():
        monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)  # as vLLM's worker for CPUs does
    model = tiny_model(
        kind, hidden_size=512, intermediate_size=2048, moe_intermediate_size=256, num_experts=16, num_hidden_layers=4
    )
    folder = model.save(tmp_path)
    arguments = {**SETTINGS, "dtype": "bfloat16", "additional_config": {"nvfp4": {"scale_search": "absmax"}}}
    config = EngineArgs(model=str(folder), **arguments).create_engine_config()
    experts = [t for name, t in model.weights.items() if ".layers.0.mlp.experts." in name]
    # A dense block is two layers, of which gate and up are the larger one. An expert is three matrices.
    gate_up = [t for name, t in model.weights.items() if ".layers.0.mlp." in name and t.shape[0] == 2048]
    largest = _bytes(*(experts[:3] or gate_up))
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
            assert not experts or allowed - final < 0.2 * _bytes(*experts)
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
