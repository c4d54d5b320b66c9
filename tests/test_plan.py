"""Which modules a plan quantizes, under a framework's own names and in front of a checkpoint's headers."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from checkpoints import FORMS, MODELOPT_IGNORE, save, save_multimodal, tiny_model
from safetensors.torch import load_file, save_file

from nvfp4_configs import Nvfp4Config
from nvfp4_kernels import quantize_weight
from nvfp4_plugin import layers
from nvfp4_plugin.checkpoint import MODELOPT, CheckpointIndex
from nvfp4_plugin.plan import Mapper, QuantizationPlan, expert_parts, is_router, warn_misnamed

QKV = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}


def plan(quantization_config: dict | None = None, **options: object) -> QuantizationPlan:
    made = QuantizationPlan(quantization_config)
    made.configure(options)
    return made


def modelopt(*ignore: str) -> dict:
    return {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": list(ignore)}


def prefixes(moves: dict[str, str | None]) -> Mapper:
    """A mapper as the frameworks have them: each prefix is replaced in turn; None drops the name."""

    def mapper(names: list[str]) -> list[str]:
        out = []
        for name in names:
            for old, new in moves.items():
                if name.startswith(old):
                    if new is None:
                        break
                    name = new + name.removeprefix(old)
            else:
                out.append(name)
        return out

    return mapper


# Hugging Face's "model.visual" is vLLM's "visual", its "model.language_model" vLLM's "language_model.model".
MULTIMODAL = prefixes(
    {
        "model.visual.": "visual.",
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "mtp.": None,
    }
)


def test_online_leaves_head_and_routers() -> None:
    online = plan()
    assert online.quantizes("model.layers.0.self_attn.qkv_proj", QKV)
    assert not online.quantizes("lm_head", lm_head=True)
    assert not online.quantizes("model.layers.0.mlp.gate", router=True)
    assert plan(lm_head=True).quantizes("lm_head", lm_head=True)


@pytest.mark.parametrize(
    ("name", "router"), [("m.mlp.gate", True), ("m.router", True), ("m.gate_proj", False), ("gate.up", False)]
)
def test_routers_are_known_by_name(name: str, router: bool) -> None:
    assert is_router(name) is router


def test_checkpoint_says_what_it_holds(tmp_path: Path) -> None:
    made = plan(modelopt(*MODELOPT_IGNORE))
    assert not made.online
    assert not made.quantizes("lm_head", lm_head=True)
    assert not made.quantizes("model.layers.0.mlp.gate", router=True)
    assert made.quantizes("model.layers.0.mlp.experts", {"experts": expert_parts(8, ["gate_proj", "up_proj", "down_proj"])})
    # A config that forgets to list them does not make the router and the head quantized: the headers tell.
    careless = plan(modelopt())
    careless.inspect(str(save(tiny_model("qwen3_moe"), "modelopt", tmp_path)))
    assert not careless.quantizes("lm_head", lm_head=True)
    assert not careless.quantizes("model.layers.0.mlp.gate", router=True)
    assert careless.quantizes("model.layers.0.self_attn.qkv_proj", QKV)


def test_names_follow_the_framework(caplog: pytest.LogCaptureFixture) -> None:
    made = QuantizationPlan(modelopt("model.visual*", "model.language_model.layers.0.self_attn*"))
    made.rename(MULTIMODAL)
    made.rename(prefixes({"decoder.": "model."}))  # of a model inside
    made.configure({"ignore": ["model.language_model.layers.3", "model.language_model.layers.9"]})
    assert not made.quantizes("visual.blocks.0.mlp.fc1")
    assert not made.quantizes("language_model.model.layers.0.self_attn.qkv_proj", QKV)
    assert made.quantizes("language_model.model.layers.10.self_attn.qkv_proj", QKV)
    assert not made.quantizes("language_model.model.layers.3.mlp.down_proj")
    with caplog.at_level(logging.WARNING, "nvfp4_plugin"):
        made.warn_unmatched()
        made.warn_unmatched()
    assert [record.args[0] for record in caplog.records] == ["model.language_model.layers.9"]


@pytest.mark.parametrize("inspects_first", [True, False])
def test_checkpoint_is_found_by_the_frameworks_names(inspects_first: bool, tmp_path: Path) -> None:
    folder = save_multimodal(tmp_path)
    made = plan(modelopt())
    if inspects_first:
        made.inspect(str(folder))
    made.rename(MULTIMODAL)
    made.inspect(str(folder))
    layer = "language_model.model.layers.{}.block_sparse_moe"
    assert made.quantizes("language_model.lm_head", lm_head=True)
    assert made.quantizes(f"{layer.format(0)}.gate", router=True)
    assert not made.quantizes(f"{layer.format(1)}.gate", router=True)
    assert made.expert_projections(f"{layer.format(0)}.experts") == ("w1", "w3", "w2")
    original = "model.language_model.layers.1.block_sparse_moe.experts.3.w3"
    # A tensor that is missing has no file, but it has its name in the checkpoint.
    for tensor, file in (("weight_scale", f" ({folder}/model.safetensors)"), ("no_scale", "")):
        assert made.describe(f"{layer.format(1)}.experts.3.w3.{tensor}") == f"{original}.{tensor}{file}"
    # The checkpoint's own names serve as well: not every model of SGLang names its layers as its mapper does.
    assert made.quantizes("lm_head", lm_head=True)
    assert made.describe(f"{original}.weight") == f"{original}.weight ({folder}/model.safetensors)"


def test_mappers_of_inner_models_follow_the_outer_ones(tmp_path: Path) -> None:
    folder = save_multimodal(tmp_path)
    made = plan(modelopt())
    made.inspect(str(folder))
    made.rename(MULTIMODAL)
    assert made.quantizes("language_model.lm_head", lm_head=True)
    made.rename(prefixes({"language_model.model.": "text."}))
    assert made.quantizes("language_model.lm_head", lm_head=True)
    assert made.quantizes("text.layers.0.block_sparse_moe.gate", router=True)


def test_misnamed_options_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "nvfp4_plugin"):
        warn_misnamed(["nvfp4", "nvfp4_resolved", "gdn_prefill_backend"], "--additional-config")
        assert not caplog.records
        warn_misnamed(["nvfp", "NVFP4"], "--additional-config")
    assert [record.message for record in caplog.records] == [
        f"nvfp4: --additional-config: nothing reads the key {key!r}; options are read from 'nvfp4'" for key in ("nvfp", "NVFP4")
    ]


def test_half_of_a_fused_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"q_proj but not .*k_proj"):
        plan(ignore=["*.q_proj"]).quantizes("model.layers.0.self_attn.qkv_proj", QKV)


@pytest.mark.parametrize("form", ["modelopt", "compressed_tensors"])
@pytest.mark.parametrize("owner", ["options", "checkpoint"])
def test_ignored_modules_that_the_checkpoint_holds_in_nvfp4(form: str, owner: str, tmp_path: Path) -> None:
    folder = save(tiny_model("qwen3_moe"), form, tmp_path)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    ignore = ["*.o_proj", "*.qkv_proj", "*.experts.*"]
    made = plan(config, ignore=ignore) if owner == "options" else plan({**config, "ignore": ignore})
    layer = "model.layers.1"
    experts = {"experts": expert_parts(8, ["gate_proj", "up_proj", "down_proj"])}
    asked = [("self_attn.o_proj", None), ("self_attn.qkv_proj", QKV), ("mlp.experts", experts)]
    for name, packed in asked:  # nothing is known of a model that is not on this machine
        assert not made.quantizes(f"{layer}.{name}", packed)
    made.inspect(str(folder))
    for (name, packed), part, pattern in zip(asked, ["o_proj", "q_proj", "experts.0.gate_proj"], ignore, strict=True):
        module = f"{layer}.{name.rpartition('.')[0]}.{part}"
        message = f"{module}: ignored by {pattern!r}, but {folder}/model.safetensors holds it in NVFP4"
        with pytest.raises(ValueError, match=re.escape(message)):
            made.quantizes(f"{layer}.{name}", packed)
    untouched = plan(config, ignore=["lm_head"])
    untouched.inspect(str(folder))
    assert not untouched.quantizes("lm_head", lm_head=True)


def test_ignored_modules_are_found_by_the_frameworks_names(tmp_path: Path) -> None:
    folder = save_multimodal(tmp_path)
    made = plan(modelopt(), ignore=["lm_head", "model.language_model.layers.0.self_attn"])
    made.inspect(str(folder))
    made.rename(MULTIMODAL)
    with pytest.raises(ValueError, match=r"^lm_head: ignored by 'lm_head', but .*model.safetensors holds it in NVFP4"):
        made.quantizes("language_model.lm_head", lm_head=True)
    with pytest.raises(ValueError, match=r"^model.language_model.layers.0.self_attn.q_proj: ignored by 'language_model.model"):
        made.quantizes("language_model.model.layers.0.self_attn.qkv_proj", QKV)


def test_plain_weights_that_ignore_does_not_name(tmp_path: Path) -> None:
    model = tiny_model("llama")
    folder = save(model, "modelopt", tmp_path)
    layer, file = "model.layers.1", folder / "model.safetensors"
    tensors = load_file(file)
    for name in ("mlp.down_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj"):
        for scale in ("weight_scale", "weight_scale_2", "input_scale"):
            del tensors[f"{layer}.{name}.{scale}"]
        tensors[f"{layer}.{name}.weight"] = model.weights[f"{layer}.{name}.weight"]
    tensors[f"{layer}.self_attn.o_proj.weight"] = torch.zeros(64, 128, dtype=torch.float8_e4m3fn)
    save_file(tensors, file)
    made = plan(modelopt())
    made.inspect(str(folder))
    gate_up = {"gate_up_proj": ["gate_proj", "up_proj"]}
    for name, packed, message in (
        ("mlp.down_proj", None, f"down_proj.weight in {file} is BF16, not in NVFP4: add '{layer}.mlp.down_proj' to `ignore`"),
        ("mlp.gate_up_proj", gate_up, f"gate_proj.weight in {file} is BF16, not in NVFP4: add '{layer}.mlp.gate_up_proj' to"),
        ("self_attn.qkv_proj", QKV, f"k_proj.weight in {file} is BF16, but {layer}.self_attn.q_proj is in NVFP4: they run as"),
        ("self_attn.o_proj", None, f"o_proj.weight in {file} is F8_E4M3, allowed: U8"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            made.quantizes(f"{layer}.{name}", packed)
    ignoring = plan(modelopt(), ignore=["*.down_proj", f"{layer}.mlp.gate_up_proj", "*.o_proj"])
    ignoring.inspect(str(folder))
    assert not ignoring.quantizes(f"{layer}.mlp.down_proj")
    assert not ignoring.quantizes(f"{layer}.mlp.gate_up_proj", gate_up)
    with pytest.raises(ValueError, match=r"o_proj: ignored by '\*.o_proj', but .* holds it as F8_E4M3"):
        ignoring.quantizes(f"{layer}.self_attn.o_proj")


def test_weights_that_are_not_plain_are_not_quantized(tmp_path: Path) -> None:
    model, name = tiny_model("llama"), "model.layers.1.mlp.down_proj"
    model.weights[f"{name}.weight"] = model.weights[f"{name}.weight"].to(torch.float8_e4m3fn)
    made = plan({"quant_method": "nvfp4"})
    made.inspect(str(model.save(tmp_path)))
    assert made.quantizes("model.layers.0.mlp.down_proj")
    with pytest.raises(
        ValueError, match=rf"^{name}: taken for unquantized, but {tmp_path}/model.safetensors holds it as F8_E4M3"
    ):
        made.quantizes(name)


def test_static_scales_are_asked_of_those_who_have_them() -> None:
    assert plan(modelopt(), activation="nvfp4_per_tensor").uses_input_scales
    weight_only = {**modelopt(), "quant_algo": "W4A16_NVFP4"}
    for config in (None, weight_only):
        with pytest.raises(ValueError, match="needs static input scales"):
            plan(config, activation="nvfp4_per_tensor")


def test_a_layout_of_scales_that_nobody_reads_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "nvfp4_plugin"):
        plan(backend="cublas", sf_layout="layout_128x4")
        plan()
        assert not caplog.records
        plan(sf_layout="layout_8x4")
    assert [record.message for record in caplog.records] == [
        "nvfp4: sf_layout has no effect with the backend 'cuda', whose layers use no layout"
    ]
    with pytest.raises(
        ValueError, match=r"sf_layout: got 'layout_8x4', .* of the backend 'flashinfer' .* allowed: 'layout_128x4'"
    ):
        plan(backend="flashinfer", sf_layout="layout_8x4")


def test_quantized_checkpoint_is_not_quantized_again(tmp_path: Path) -> None:
    folder = save(tiny_model("llama"), "modelopt", tmp_path)
    with pytest.raises(ValueError, match=r"are in NVFP4: leave the checkpoint's own quantization_config in place"):
        plan({"quant_method": "nvfp4"}).inspect(str(folder))


@pytest.mark.parametrize("form", FORMS)
def test_index_knows_tensors_and_files(form: str, tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    folder = save(model, form, tmp_path)
    index = CheckpointIndex.find(str(folder))
    assert index is not None
    assert sorted(index.quantized_modules()) == sorted(model.linears)
    assert index.file_of("lm_head.weight") == str(folder / "model.safetensors")
    assert index.weight_of("lm_head") is not None
    assert index.weight_of("model.norm.bias") is None
    assert not index.is_quantized("lm_head")
    assert CheckpointIndex.find("no-such-organisation/no-such-model") is None


@pytest.mark.parametrize(
    ("form", "scale"),
    [("modelopt", "weight_scale_2"), ("modelopt", "input_scale"), ("compressed_tensors", "weight_global_scale")],
)
def test_scales_that_are_integers(form: str, scale: str, tmp_path: Path) -> None:
    folder = save(tiny_model("llama"), form, tmp_path)
    file, tensor = folder / "model.safetensors", f"model.layers.1.mlp.down_proj.{scale}"
    tensors = load_file(file)
    save_file({**tensors, tensor: tensors[tensor].to(torch.int32) + 1}, file)
    made = plan(json.loads((folder / "config.json").read_text())["quantization_config"])
    with pytest.raises(ValueError, match=re.escape(f"{tensor} in {file} is I32; allowed: BF16, F16, F32")):
        made.inspect(str(folder))


@pytest.mark.parametrize(("code", "got"), [(0x7F, "NaN"), (0xFF, "NaN"), (0xB8, "got -1.0")])
def test_block_scales_that_are_no_positive_numbers(code: int, got: str) -> None:
    weights = [quantize_weight(torch.randn(4, 32)) for _ in "qkv"]
    data, scales = (torch.cat([getattr(weight, field) for weight in weights]) for field in ("data", "scales"))
    global_scales = torch.stack([weight.global_scale for weight in weights])
    arguments = (global_scales, [4, 4, 4], ["q", "k", "v"], MODELOPT)
    layers.load_linear(data, scales, *arguments)
    scales.view(torch.uint8)[6, 1] = code
    with pytest.raises(ValueError, match=rf"^<k.weight_scale>: .*{got}; allowed: e4m3 numbers without a sign"):
        layers.load_linear(data, scales, *arguments, describe="<{}>".format)
    with pytest.raises(ValueError, match=rf"^<k.weight_scale>: .*{got}; allowed"):
        layers.load_experts(
            data[None],
            scales[None],
            global_scales[None],
            [4, 4, 4],
            lambda _: ["q", "k", "v"],
            MODELOPT,
            describe="<{}>".format,
        )


def test_experts_have_the_backend_that_serves_them(caplog: pytest.LogCaptureFixture) -> None:
    layers._log_once.cache_clear()
    with caplog.at_level(logging.WARNING, "nvfp4_plugin"):
        assert layers.experts_backend(Nvfp4Config(backend="reference")) == "reference"
        assert not caplog.records
        for _ in range(2):
            assert layers.experts_backend(Nvfp4Config(backend="cublas")) == "cuda"
    assert [record.message for record in caplog.records] == [
        "experts are served by the backend 'cuda': 'cublas' has dense layers alone"
    ]
