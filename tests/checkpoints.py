"""Tiny random checkpoints: one model in plain bf16 and in each of the forms that NVFP4 checkpoints come in."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nvfp4_kernels import Nvfp4Weight, quantize_weight

VOCAB = 256
HIDDEN = 64
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 32
INTERMEDIATE = 128
EXPERTS, TOP_K = 8, 2
PROMPT = [(7 * i + 3) % (VOCAB - 3) + 3 for i in range(40)]

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "moe_intermediate_size": HIDDEN,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "sliding_window": None,
        # SGLang's Mixtral knows no other head_dim than hidden size / heads, and vLLM on a CPU none below 32.
        "num_attention_heads": HIDDEN // HEAD_DIM,
        "num_key_value_heads": 1,
    },
    # The one with shared experts, and with biases in its attention.
    "qwen2_moe": {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "num_attention_heads": HIDDEN // HEAD_DIM,  # this architecture has no head_dim of its own
        "num_key_value_heads": 1,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "moe_intermediate_size": HIDDEN,
        "shared_expert_intermediate_size": INTERMEDIATE,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    # The one whose experts lie in one tensor, transposed, the rows of gate and up taking turns.
    "gpt_oss": {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention"],
        "attention_bias": True,
        "swiglu_limit": 7.0,
        "pad_token_id": 0,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 2.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 128,
        },
    },
}


@dataclass
class TinyModel:
    """A model's config.json and its plain weights by name, bf16."""

    config: dict[str, Any]
    weights: dict[str, torch.Tensor]

    @property
    def linears(self) -> list[str]:
        """The modules that are quantized: every projection, but neither routers nor the head."""
        return [
            name.removesuffix(".weight")
            for name, weight in self.weights.items()
            if weight.dim() == 2
            and name.endswith(".weight")
            and not name.endswith((".gate.weight", "_gate.weight", "router.weight", "lm_head.weight", "tokens.weight"))
        ]

    def save(self, folder: Path, weights: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
        """Write a checkpoint of these weights (or of `weights`), with more keys in its config."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({**self.config, **config}))
        tensors = {name: t.contiguous() for name, t in (weights or self.weights).items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    def fake_quantized(self, scale_search: str = "mse") -> dict[str, torch.Tensor]:
        """The weights in fp32, each projection's as its NVFP4 form gives them back."""
        linears = set(self.linears)

        def fake(name: str, weight: torch.Tensor) -> torch.Tensor:
            if name.removesuffix(".weight") in linears:
                return quantize_weight(weight, scale_search=scale_search).dequantize()
            if weight.dim() == 3:  # all experts of a block, transposed
                return quantize_weight(weight.transpose(1, 2), scale_search=scale_search).dequantize().transpose(1, 2)
            return weight.float()

        return {name: fake(name, weight) for name, weight in self.weights.items()}


def tiny_model(kind: str, *, seed: int = 0, **config: Any) -> TinyModel:
    """A random model: "llama", "qwen3_moe", "mixtral", "qwen2_moe" or "gpt_oss"; `config` overrides keys of its config.json."""
    config = {**_COMMON, **_CONFIGS[kind], **config}
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    hidden = config["hidden_size"]

    def linear(name: str, rows: int, columns: int, bias: bool = False) -> None:
        # Every matrix has a size of its own, so that no two global scales of a fused layer agree.
        size = 2.0 ** float(torch.rand((), generator=generator) * 2 - 1) / columns**0.5
        weights[f"{name}.weight"] = (torch.randn(rows, columns, generator=generator) * size).bfloat16()
        if bias:
            weights[f"{name}.bias"] = (torch.randn(rows, generator=generator) * 0.1).bfloat16()

    def norm(name: str, size: int) -> None:
        weights[f"{name}.weight"] = (1 + torch.randn(size, generator=generator) * 0.1).bfloat16()

    def mlp(name: str, inner: int, projections: tuple[str, str, str]) -> None:
        gate, up, down = projections
        linear(f"{name}.{gate}", inner, hidden)
        linear(f"{name}.{up}", inner, hidden)
        linear(f"{name}.{down}", hidden, inner)

    def gpt_oss_experts(name: str) -> None:
        experts, inner = config["num_local_experts"], config["intermediate_size"]
        linear(f"{name}.router", experts, hidden, True)
        for projection, k, n in (("gate_up_proj", hidden, 2 * inner), ("down_proj", inner, hidden)):
            size = 2 ** (torch.rand(experts, 1, 1, generator=generator) * 2 - 1) / k**0.5
            weights[f"{name}.experts.{projection}"] = (torch.randn(experts, k, n, generator=generator) * size).bfloat16()
            weights[f"{name}.experts.{projection}_bias"] = (torch.randn(experts, n, generator=generator) * 0.1).bfloat16()

    weights["model.embed_tokens.weight"] = torch.randn(config["vocab_size"], hidden, generator=generator).bfloat16()
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        head_dim = config["head_dim"]
        q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
        bias = kind in ("qwen2_moe", "gpt_oss")
        linear(f"{layer}.self_attn.q_proj", q, hidden, bias)
        linear(f"{layer}.self_attn.k_proj", kv, hidden, bias)
        linear(f"{layer}.self_attn.v_proj", kv, hidden, bias)
        linear(f"{layer}.self_attn.o_proj", hidden, q, kind == "gpt_oss")
        norm(f"{layer}.input_layernorm", hidden)
        norm(f"{layer}.post_attention_layernorm", hidden)
        if kind == "qwen3_moe":
            norm(f"{layer}.self_attn.q_norm", head_dim)
            norm(f"{layer}.self_attn.k_norm", head_dim)
        names = ("gate_proj", "up_proj", "down_proj")
        if kind == "llama":
            mlp(f"{layer}.mlp", config["intermediate_size"], names)
            continue
        if kind == "gpt_oss":
            weights[f"{layer}.self_attn.sinks"] = torch.randn(config["num_attention_heads"], generator=generator).bfloat16()
            gpt_oss_experts(f"{layer}.mlp")
            continue
        block, names, inner = f"{layer}.mlp", names, config.get("moe_intermediate_size")
        if kind == "mixtral":
            block, names, inner = f"{layer}.block_sparse_moe", ("w1", "w3", "w2"), config["intermediate_size"]
        experts = config.get("num_experts") or config["num_local_experts"]
        linear(f"{block}.gate", experts, hidden)
        for expert in range(experts):
            mlp(f"{block}.experts.{expert}", inner, names)
        if kind == "qwen2_moe":
            linear(f"{block}.shared_expert_gate", 1, hidden)
            mlp(f"{block}.shared_expert", config["shared_expert_intermediate_size"], names)
    norm("model.norm", hidden)
    if not config["tie_word_embeddings"]:
        linear("lm_head", config["vocab_size"], hidden)
    return TinyModel(config, weights)


# ---------------------------------------------------------------------------------------------------------------------
# Quantized forms

IGNORE = ["lm_head", "re:.*mlp.gate$", "re:.*block_sparse_moe.gate$", "re:.*shared_expert_gate$"]
MODELOPT_IGNORE = ["lm_head", "*.mlp.gate", "*.block_sparse_moe.gate", "*.shared_expert_gate"]
_TENSOR_ARGS = {"num_bits": 4, "type": "float", "group_size": 16, "strategy": "tensor_group", "symmetric": True}


def _quantized(model: TinyModel) -> dict[str, tuple[Nvfp4Weight, torch.Tensor]]:
    """Module -> its weight and the encode scale whose reciprocal is exactly the decode scale: one format stores each."""
    out = {}
    for module in model.linears:
        weight = model.weights[f"{module}.weight"]
        encode = 1.0 / quantize_weight(weight).global_scale
        out[module] = quantize_weight(weight, global_scale=1.0 / encode), encode
    return out


def _save(
    model: TinyModel, folder: Path, tensors: Callable[[Nvfp4Weight, torch.Tensor], dict[str, torch.Tensor]], **config: Any
) -> Path:
    weights = dict(model.weights)
    for module, (weight, encode) in _quantized(model).items():
        del weights[f"{module}.weight"]
        weights |= {f"{module}.{name}": t for name, t in tensors(weight, encode).items()}
    return model.save(folder, weights, **config)


def _modelopt_tensors(weight: Nvfp4Weight, encode: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "weight": weight.data,
        "weight_scale": weight.scales,
        "weight_scale_2": 1.0 / encode,
        "input_scale": 1.0 / torch.tensor(448 * 6 / 8.0),
    }


def save_modelopt(model: TinyModel, folder: Path, **quantization: Any) -> Path:
    """ModelOpt's form, the quantization config in config.json."""
    quantization = {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "producer": {"name": "modelopt", "version": "0.40.0"},
        "config_groups": {
            "group_0": {
                "weights": {"num_bits": 4, "type": "float", "group_size": 16, "dynamic": False},
                "input_activations": {"num_bits": 4, "type": "float", "group_size": 16, "dynamic": False},
                "targets": ["Linear"],
            }
        },
        "ignore": MODELOPT_IGNORE,
        **quantization,
    }
    return _save(model, folder, _modelopt_tensors, quantization_config=quantization)


def save_multimodal(folder: Path) -> Path:
    """Mixtral under the names of a multimodal model's language model, in ModelOpt's form: the head and the first block's
    router are in NVFP4 as well. Its config.json is still Mixtral's."""
    model = tiny_model("mixtral")
    weights = {"mtp.norm.weight": model.weights["model.norm.weight"], **model.weights}
    for module in (*model.linears, "lm_head", "model.layers.0.block_sparse_moe.gate"):
        weight = quantize_weight(weights.pop(f"{module}.weight"))
        weights |= {f"{module}.{name}": t for name, t in _modelopt_tensors(weight, 1.0 / weight.global_scale).items()}
    renamed = {re.sub(r"^model\.", "model.language_model.", name): tensor.clone() for name, tensor in weights.items()}
    return model.save(folder, renamed)


def save_legacy_modelopt(model: TinyModel, folder: Path) -> Path:
    """ModelOpt's older form, the quantization config in hf_quant_config.json."""
    _save(model, folder, _modelopt_tensors)
    legacy = {
        "producer": {"name": "modelopt", "version": "0.29.0"},
        "quantization": {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": None,
            "group_size": 16,
            "exclude_modules": MODELOPT_IGNORE,
        },
    }
    (folder / "hf_quant_config.json").write_text(json.dumps(legacy))
    return folder


def save_compressed_tensors(model: TinyModel, folder: Path) -> Path:
    """compressed-tensors' nvfp4-pack-quantized, whose global scales divide."""
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": "nvfp4-pack-quantized",
                "weights": {**_TENSOR_ARGS, "dynamic": False},
                "input_activations": {**_TENSOR_ARGS, "dynamic": "local"},
                "output_activations": None,
            }
        },
        "ignore": IGNORE,
    }

    def tensors(weight: Nvfp4Weight, encode: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            "weight_packed": weight.data,
            "weight_scale": weight.scales,
            "weight_global_scale": encode.reshape(1),
            "input_global_scale": torch.tensor([448 * 6 / 8.0]),
        }

    return _save(model, folder, tensors, quantization_config=quantization)


FORMS: dict[str, Callable[[TinyModel, Path], Path]] = {
    "modelopt": save_modelopt,
    "legacy_modelopt": save_legacy_modelopt,
    "compressed_tensors": save_compressed_tensors,
}


def save(model: TinyModel, form: str, folder: Path) -> Path:
    """Write `model` in "bf16" or one of FORMS."""
    return model.save(folder) if form == "bf16" else FORMS[form](model, folder)


def reference_logprobs(model: TinyModel, prompt: list[int], folder: Path, scale_search: str = "mse") -> torch.Tensor:
    """What Hugging Face's model gives for each token of `prompt` after the first, over fake-quantized weights, in fp32."""
    from transformers import AutoModelForCausalLM

    weights = model.fake_quantized(scale_search)
    reference = AutoModelForCausalLM.from_pretrained(model.save(folder, weights, dtype="float32"), dtype=torch.float32)
    with torch.no_grad():
        logits = reference(torch.tensor([prompt])).logits[0]
    return logits.log_softmax(-1)[torch.arange(len(prompt) - 1), torch.tensor(prompt[1:])]
