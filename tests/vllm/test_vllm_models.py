"""Whole models in vLLM against Hugging Face's over fake-quantized weights, and a checkpoint's forms against each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import FORMS, PROMPT, reference_logprobs, save_modelopt, save_multimodal, tiny_model
from safetensors.torch import load_file, save_file
from vllm_engine import engine, logprobs, modules

from nvfp4_kernels import quantize_weight

pytestmark = pytest.mark.vllm

KINDS = ("llama", "qwen3_moe", "mixtral", "qwen2_moe")


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def online(kind: str, checkpoint) -> torch.Tensor:
    """Log-probabilities of the model quantized while it loads, weight-only, in fp32."""
    with engine(checkpoint(kind, "bf16"), {"activation": "none"}) as llm:
        return logprobs(llm, PROMPT)


def test_online_equals_hugging_face_over_fake_quantized_weights(kind: str, online: torch.Tensor, tmp_path: Path) -> None:
    expected = reference_logprobs(tiny_model(kind), PROMPT, tmp_path)
    plain = reference_logprobs(tiny_model(kind), PROMPT, tmp_path, scale_search="absmax")
    # Another choice of scales is far outside of the tolerance.
    assert (plain - expected).abs().max() > 0.05
    torch.testing.assert_close(online, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("form", FORMS)
def test_checkpoint_forms_give_the_same_bits(kind: str, form: str, online: torch.Tensor, checkpoint) -> None:
    with engine(checkpoint(kind, form), {"activation": "none"}) as llm:
        assert torch.equal(logprobs(llm, PROMPT), online)


def test_multimodal_names_find_the_checkpoints_tensors(tmp_path: Path) -> None:
    from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration

    from nvfp4_plugin.vllm.config import Nvfp4QuantizationConfig

    folder = save_multimodal(tmp_path)
    config = Nvfp4QuantizationConfig({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": []})
    config.maybe_update_config(str(folder))
    config.apply_vllm_mapper(Qwen3VLForConditionalGeneration.hf_to_vllm_mapper.get_rename_mapper())
    config.plan.configure()
    block = "layers.0.block_sparse_moe"
    assert config.plan.quantizes("language_model.lm_head", lm_head=True)
    assert config.plan.quantizes(f"language_model.model.{block}.gate", router=True)
    name = f"model.language_model.{block}.experts.3.w1.weight"
    described = config.plan.describe(f"language_model.model.{block}.experts.3.w1.weight")
    assert described == f"{name} ({folder}/model.safetensors)"


def test_gpt_oss_is_quantized_while_it_loads(checkpoint, tmp_path: Path) -> None:
    """Its model copies all experts into the parameters, and the rows of gate and up take turns."""
    model = tiny_model("gpt_oss")
    expected = reference_logprobs(model, PROMPT, tmp_path)
    assert (reference_logprobs(model, PROMPT, tmp_path, scale_search="absmax") - expected).abs().max() > 0.05
    with engine(checkpoint("gpt_oss", "bf16"), {"activation": "none"}) as llm:
        torch.testing.assert_close(logprobs(llm, PROMPT), expected, rtol=0, atol=2e-5)
        experts = modules(llm)["model.layers.1.mlp.experts.routed_experts"]
        bias = model.weights["model.layers.1.mlp.experts.gate_up_proj_bias"].float()
        assert torch.equal(experts.w13_bias, torch.cat([bias[:, 0::2], bias[:, 1::2]], dim=1))


def test_bf16_equals_hugging_face_up_to_rounding(checkpoint, tmp_path: Path) -> None:
    expected = reference_logprobs(tiny_model("llama"), PROMPT, tmp_path)
    with engine(checkpoint("llama", "bf16"), {"activation": "none"}, dtype="bfloat16") as llm:
        error = logprobs(llm, PROMPT) - expected
    # Another choice of scales costs 0.33 (root mean square).
    assert error.square().mean().sqrt() < 0.02
    assert error.abs().max() < 0.05


@pytest.mark.parametrize("activation", ["nvfp4_per_token", "nvfp4_per_tensor", "fp8_per_token"])
@pytest.mark.parametrize("kind_of", ["llama", "qwen2_moe"])
def test_quantized_activations(kind_of: str, activation: str, checkpoint, tmp_path: Path) -> None:
    expected = reference_logprobs(tiny_model(kind_of), PROMPT, tmp_path)
    with engine(checkpoint(kind_of, "modelopt"), {"activation": activation}) as llm:
        error = (logprobs(llm, PROMPT) - expected).square().mean().sqrt()
    # Coarser activations cost more, and cost something: the mode was really used.
    bounds = {"nvfp4_per_token": (0.03, 0.4), "nvfp4_per_tensor": (0.03, 0.4), "fp8_per_token": (0.01, 0.15)}
    low, high = bounds[activation]
    assert low < error < high


@pytest.mark.parametrize("form", ["bf16", "modelopt", "compressed_tensors"])
def test_each_logical_matrix_keeps_its_global_scale(form: str, checkpoint) -> None:
    weights = tiny_model("qwen2_moe").weights
    block = "model.layers.1"
    with engine(checkpoint("qwen2_moe", form)) as llm:
        layers = modules(llm)
        qkv = layers[f"{block}.self_attn.qkv_proj"]
        experts = next(
            layer for name, layer in layers.items() if name.startswith(f"{block}.mlp") and "RoutedExperts" in str(type(layer))
        )
        scales = [
            qkv.weight_decode_scale.clone(),
            experts.w13_weight_decode_scale.clone(),
            experts.w2_weight_decode_scale.clone(),
        ]

    def scale(name: str) -> torch.Tensor:
        return quantize_weight(weights[f"{block}.{name}.weight"]).global_scale

    q, k, v = (scale(f"self_attn.{name}_proj") for name in "qkv")
    assert len({q.item(), k.item(), v.item()}) == 3
    rows = [len(weights[f"{block}.self_attn.{name}_proj.weight"]) for name in "qkv"]
    expected_qkv = torch.cat([s.expand(n) for s, n in zip((q, k, v), rows, strict=True)])
    gate, up, down = (
        torch.stack([scale(f"mlp.experts.{expert}.{name}_proj") for expert in range(8)]) for name in ("gate", "up", "down")
    )
    inner = len(weights[f"{block}.mlp.experts.0.gate_proj.weight"])
    expected_w13 = torch.cat([gate[:, None].expand(-1, inner), up[:, None].expand(-1, inner)], dim=1)
    # Storing a scale's reciprocal may cost it its last bit.
    for got, expected in zip(scales, (expected_qkv, expected_w13, down), strict=True):
        torch.testing.assert_close(got, expected, rtol=2**-22, atol=0)


def test_scales_of_a_quantized_kv_cache_are_loaded(tmp_path: Path) -> None:
    folder = save_modelopt(tiny_model("llama"), tmp_path, kv_cache_quant_algo="FP8")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors |= {f"model.layers.{i}.self_attn.{name}_proj.{name}_scale": torch.tensor(0.05) for i in range(2) for name in "kv"}
    save_file(tensors, file, metadata={"format": "pt"})
    # Not every CPU can hold an FP8 cache; a plain one takes no notice of the scales, but they are known to the layers.
    with engine(folder, {"activation": "none"}, kv_cache_dtype="bfloat16", dtype="bfloat16") as llm:
        assert type(modules(llm)["model.layers.0.self_attn.attn"].quant_method).__name__ == "BaseKVCacheMethod"
        assert logprobs(llm, PROMPT).isfinite().all()
