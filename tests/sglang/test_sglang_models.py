"""Whole models in SGLang against Hugging Face's over fake-quantized weights, and the forms of one checkpoint against each
other: real loaders, layers and routing, in fp32 on the CPU."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from checkpoints import FORMS, PROMPT, reference_logprobs, tiny_model
from sglang_engine import logprobs, modules, runner

from nvfp4_kernels import quantize_weight

pytestmark = pytest.mark.sglang

KINDS = ("llama", "qwen3_moe", "mixtral")  # of qwen2_moe SGLang itself runs parts in Triton, also on the CPU


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def online(kind: str, checkpoint) -> torch.Tensor:
    """Log-probabilities of the model quantized while it loads, weight-only."""
    with runner(checkpoint(kind, "bf16"), {"activation": "none"}) as model:
        return logprobs(model, PROMPT)


def test_online_equals_hugging_face_over_fake_quantized_weights(kind: str, online: torch.Tensor, tmp_path: Path) -> None:
    expected = reference_logprobs(tiny_model(kind), PROMPT, tmp_path)
    other = reference_logprobs(tiny_model(kind), PROMPT, tmp_path, scale_search="absmax")
    # Another choice of scales is far outside of the tolerance.
    assert (other - expected).abs().max() > 0.05
    torch.testing.assert_close(online, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("form", FORMS)
def test_checkpoint_forms_give_the_same_bits(kind: str, form: str, online: torch.Tensor, checkpoint) -> None:
    with runner(checkpoint(kind, form), {"activation": "none"}) as model:
        assert torch.equal(logprobs(model, PROMPT), online)


def test_experts_of_gpt_oss_are_quantized_while_they_load(checkpoint) -> None:
    """The rows of its gate and up take turns. SGLang has no attention for it on a CPU, so that its experts run alone."""
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    model = tiny_model("gpt_oss")
    fake = model.fake_quantized()
    with runner(checkpoint("gpt_oss", "bf16"), {"activation": "none"}, attention_backend="triton") as served:
        for block in range(2):
            name = f"model.layers.{block}.mlp.experts"
            tensors = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
            gate_up, down, gate_up_bias, down_bias = (fake[f"{name}.{tensor}"].double() for tensor in tensors)
            x = torch.randn(9, gate_up.shape[1])
            scores = torch.rand(9, len(gate_up)).topk(3, dim=-1)
            ids = scores.indices.to(torch.int32)
            got = modules(served)[name](x.clone(), StandardTopKOutput(scores.values, ids, torch.empty(0)))
            want = torch.zeros(9, down.shape[2], dtype=torch.float64)
            for slot in range(3):
                expert = scores.indices[:, slot]
                pairs = torch.einsum("mk,mkn->mn", x.double(), gate_up[expert]) + gate_up_bias[expert]
                gate, up = pairs[:, 0::2].clamp(max=7), pairs[:, 1::2].clamp(-7, 7)
                h = gate * torch.sigmoid(1.702 * gate) * (up + 1)
                y = torch.einsum("mn,mnk->mk", h, down[expert]) + down_bias[expert]
                want += scores.values[:, slot, None].double() * y
            torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("activation", ["nvfp4_per_token", "nvfp4_per_tensor", "fp8_per_token"])
@pytest.mark.parametrize("kind_of", ["llama", "qwen3_moe"])
def test_quantized_activations(kind_of: str, activation: str, checkpoint, tmp_path: Path) -> None:
    expected = reference_logprobs(tiny_model(kind_of), PROMPT, tmp_path)
    with runner(checkpoint(kind_of, "modelopt"), {"activation": activation}) as model:
        error = (logprobs(model, PROMPT) - expected).square().mean().sqrt()
    # Coarser activations cost more, and cost something: the mode was really used.
    low, high = {"nvfp4_per_token": (0.05, 0.6), "nvfp4_per_tensor": (0.05, 0.8), "fp8_per_token": (0.005, 0.2)}[activation]
    assert low < error < high


@pytest.mark.parametrize("form", ["bf16", "modelopt", "compressed_tensors"])
def test_each_logical_matrix_keeps_its_global_scale(form: str, checkpoint) -> None:
    weights = tiny_model("qwen2_moe").weights
    block = "model.layers.1"
    with runner(checkpoint("qwen2_moe", form)) as model:
        layers = modules(model)
        qkv, experts = layers[f"{block}.self_attn.qkv_proj"], layers[f"{block}.mlp.experts"]
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


@pytest.mark.parametrize("form", ["bf16", "modelopt"])
def test_routers_head_and_embeddings_are_left_alone(form: str, checkpoint) -> None:
    weights = tiny_model("qwen2_moe").weights
    with runner(checkpoint("qwen2_moe", form)) as model:
        layers = modules(model)
        for name in ("model.layers.0.mlp.gate", "model.layers.0.mlp.shared_expert_gate", "lm_head", "model.embed_tokens"):
            got = layers[name].weight.data[: len(weights[f"{name}.weight"])]
            assert torch.equal(got, weights[f"{name}.weight"].float())
        quantized = {name for name, layer in layers.items() if hasattr(layer, "nvfp4_weights")}
    assert len(quantized) == 2 * 5  # qkv, o, experts, shared gate_up and down of two layers


def test_lm_head_and_ignored_layers(checkpoint, caplog) -> None:
    options = {"lm_head": True, "ignore": ["model.layers.0.mlp", "re:.*qkv_proj", "no_such_layer"], "activation": "none"}
    with caplog.at_level(logging.WARNING), runner(checkpoint("llama", "bf16"), options) as model:
        layers = modules(model)
        quantized = {name for name, layer in layers.items() if hasattr(layer, "nvfp4_weights")}
        assert logprobs(model, PROMPT).isfinite().all()
        head = layers["lm_head"].weight
    assert quantized == {
        "model.layers.0.self_attn.o_proj",
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.mlp.gate_up_proj",
        "model.layers.1.mlp.down_proj",
        "lm_head",
    }
    expected = quantize_weight(tiny_model("llama").weights["lm_head.weight"].float())
    assert torch.equal(head.data[: len(expected.data)], expected.data)
    assert "no_such_layer" in caplog.text


def test_channels_of_options(checkpoint, monkeypatch, tmp_path: Path, caplog) -> None:
    from nvfp4_plugin.sglang.config import Nvfp4QuantizationConfig

    def options(options: dict | None = None, **others: object) -> tuple[str, str]:
        with runner(checkpoint("llama", "bf16"), options, **others) as model:
            config = model.model.quant_config
            assert isinstance(config, Nvfp4QuantizationConfig)
            return config.plan.options.activation, config.plan.options.scale_search

    recipe = tmp_path / "mine.yaml"
    recipe.write_text("activation: fp8_per_token\nscale_search: absmax\n")
    monkeypatch.setenv("NVFP4_CONFIG", str(recipe))
    assert options() == ("fp8_per_token", "absmax")
    assert options({"activation": "none"}) == ("none", "absmax")
    assert "nothing reads" not in caplog.text
    assert options(json_model_override_args=json.dumps({"nvfp": {"activation": "none"}})) == ("fp8_per_token", "absmax")
    assert "--json-model-override-args: nothing reads the key 'nvfp'" in caplog.text
    override = {"quantization_config": {"quant_method": "nvfp4", "activation": "nvfp4_per_token"}}
    assert options(json_model_override_args=json.dumps(override)) == ("nvfp4_per_token", "absmax")
    # The config of a model may ask for nvfp4 by itself.
    assert options(json_model_override_args=json.dumps(override), quantization=None)[0] == "nvfp4_per_token"
    with pytest.raises(ValueError, match=r"json-model-override-args nvfp4: unknown key 'activatoin'"):
        options({"activatoin": "none"})
    quantized = {"json_model_override_args": json.dumps({"quantization_config": {"quant_method": "nvfp4"}})}
    with (
        pytest.raises(ValueError, match=r"are in NVFP4: .* options through --json-model-override-args nvfp4"),
        runner(checkpoint("llama", "legacy_modelopt"), **quantized),
    ):
        pass


def test_ignored_layers_that_the_checkpoint_holds_in_nvfp4(checkpoint) -> None:
    with (
        pytest.raises(ValueError, match=r"down_proj: ignored by '\*\.down_proj', but .* holds it in NVFP4"),
        runner(checkpoint("llama", "modelopt"), {"ignore": ["*.down_proj"]}),
    ):
        pass


def test_dummy_weights(checkpoint) -> None:
    for kind, form in (("qwen3_moe", "bf16"), ("qwen3_moe", "modelopt"), ("llama", "compressed_tensors")):
        with runner(checkpoint(kind, form), load_format="dummy") as model:
            assert logprobs(model, PROMPT).isfinite().all()


@pytest.mark.parametrize("backend", ["triton_kernel", "cutlass"])
def test_other_runners_of_experts_are_refused(backend: str, checkpoint) -> None:
    with (
        pytest.raises(ValueError, match=rf"--moe-runner-backend: got '{backend}'.*allowed: 'auto'"),
        runner(checkpoint("qwen3_moe", "bf16"), moe_runner_backend=backend),
    ):
        pass
