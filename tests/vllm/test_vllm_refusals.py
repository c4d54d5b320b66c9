"""Checkpoints and options that cannot be served: each message says what, where, and what to do."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_compressed_tensors, save_modelopt, tiny_model
from safetensors.torch import load_file, save_file
from vllm_engine import engine, log_lines

from nvfp4_plugin.checkpoint import CheckpointIndex

pytestmark = pytest.mark.vllm

Tensors = dict[str, torch.Tensor]
DOWN = "model.layers.1.mlp.down_proj"
EXPERT = "model.layers.1.mlp.experts.5.up_proj"


def refused(model: Path, match: str, options: dict[str, Any] | None = None, **settings: Any) -> None:
    with pytest.raises(ValueError, match=match), engine(model, options, **settings):
        pass


def edit(folder: Path, change: Callable[[Tensors], object]) -> Path:
    """Rewrite the tensors of a checkpoint."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def poison(tensors: Tensors, name: str) -> None:
    tensors[name][3, 5] = float("nan")


@pytest.mark.parametrize(("kind", "name"), [("llama", f"{DOWN}.weight"), ("qwen3_moe", f"{EXPERT}.weight")])
def test_nan_in_a_plain_weight(kind: str, name: str, tmp_path: Path) -> None:
    folder = edit(tiny_model(kind).save(tmp_path), lambda tensors: poison(tensors, name))
    refused(folder, rf"{name} \({folder}/model.safetensors\): .*1 values are NaN or infinite, the first at \[3, 5\]")


@pytest.mark.parametrize(("kind", "name"), [("llama", DOWN), ("qwen3_moe", EXPERT)])
def test_plain_weight_that_is_missing(kind: str, name: str, tmp_path: Path) -> None:
    folder = edit(tiny_model(kind).save(tmp_path), lambda tensors: tensors.pop(f"{name}.weight"))
    refused(folder, rf"{name.partition('.experts')[0]}.*: the checkpoint holds \d+ of the \d+ values of this layer's weights")


@pytest.mark.parametrize(
    ("name", "rows", "match"),
    [
        (
            DOWN,
            64,
            r"down_proj\.weight \({folder}/model\.safetensors\): the checkpoint has a tensor \[64, 112\] for a parameter",
        ),
        ("model.layers.1.self_attn.k_proj", 24, r"qkv_proj\.weight, k of it: the checkpoint has a tensor \[24, 48\] for a"),
    ],
)
def test_plain_weight_of_another_shape(name: str, rows: int, match: str, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        weight = tensors[f"{name}.weight"]
        tensors[f"{name}.weight"] = weight[:rows, : weight.shape[1] - 16].contiguous()

    refused(edit(tiny_model("llama").save(tmp_path), change), match.replace("{folder}", str(tmp_path)))


def test_k_that_is_no_multiple_of_16(tmp_path: Path) -> None:
    folder = tiny_model("llama", intermediate_size=72).save(tmp_path)
    refused(folder, r"model.layers.0.mlp.down_proj: K is 72, NVFP4 needs a multiple of 16; add the layer to `ignore`")
    with engine(folder, {"ignore": ["*.down_proj"]}):
        pass


def test_expert_size_that_is_no_multiple_of_16(tmp_path: Path) -> None:
    folder = tiny_model("qwen3_moe", moe_intermediate_size=40).save(tmp_path)
    refused(folder, r"model.layers.0.mlp.experts \(intermediate size\): K is 40, NVFP4 needs a multiple of 16")


SAVERS = {"modelopt": save_modelopt, "compressed_tensors": save_compressed_tensors}
GLOBAL_SCALE = {"modelopt": "weight_scale_2", "compressed_tensors": "weight_global_scale"}


@pytest.mark.parametrize("form", SAVERS)
@pytest.mark.parametrize(("kind", "module"), [("llama", DOWN), ("qwen3_moe", EXPERT)])
def test_scales_that_are_missing_or_misshapen(form: str, kind: str, module: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    for name in ("weight_scale", GLOBAL_SCALE[form]):
        folder = edit(SAVERS[form](model, tmp_path / name), lambda tensors, name=name: tensors.pop(f"{module}.{name}"))
        refused(folder, rf"{module}.{name} is missing from the checkpoint; its weight is in {folder}/model.safetensors")

    def halve(tensors: Tensors) -> None:
        tensors[f"{module}.weight_scale"] = tensors[f"{module}.weight_scale"][:, ::2].contiguous()

    folder = edit(SAVERS[form](model, tmp_path / "half"), halve)
    refused(folder, rf"{module}.weight_scale in {folder}/model.safetensors is F8_E4M3 .* needs F8_E4M3 \[")


@pytest.mark.parametrize("form", SAVERS)
@pytest.mark.parametrize(("kind", "module"), [("llama", DOWN), ("qwen3_moe", EXPERT)])
def test_scales_that_are_no_numbers(form: str, kind: str, module: str, tmp_path: Path) -> None:
    model, name = tiny_model(kind), GLOBAL_SCALE[form]
    for value, got in ((float("nan"), "missing from the checkpoint, or NaN"), (0.0, r"got 0\.0")):
        folder = edit(SAVERS[form](model, tmp_path / str(value)), lambda tensors, v=value: tensors[f"{module}.{name}"].fill_(v))
        refused(folder, rf"{module}.{name} \({folder}/model.safetensors\): .*{got}.*; allowed: a finite number above 0")

    def nan(tensors: Tensors) -> None:
        tensors[f"{module}.weight_scale"].view(torch.uint8)[1, 2] = 0x7F

    refused(edit(SAVERS[form](model, tmp_path / "e4m3"), nan), rf"{module}.weight_scale \(.*NaN; allowed: e4m3 numbers")


@pytest.mark.parametrize(("kind", "module"), [("llama", DOWN), ("qwen3_moe", EXPERT)])
def test_codes_that_are_missing_where_no_header_tells(
    kind: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = edit(save_modelopt(tiny_model(kind), tmp_path), lambda tensors: tensors.pop(f"{module}.weight"))
    monkeypatch.setattr(CheckpointIndex, "find", lambda model, revision=None: None)  # as before a download
    layer = module.partition(".5.")[0]
    refused(folder, rf"{layer}: only some of this layer's values came: \d+ of \d+ of (w13_)?weight$")


def test_input_scale_that_is_missing_or_no_number(tmp_path: Path) -> None:
    zero = edit(save_modelopt(tiny_model("llama"), tmp_path / "0"), lambda tensors: tensors[f"{DOWN}.input_scale"].fill_(0.0))
    refused(zero, rf"{DOWN}.input_scale \(.*; allowed: a finite number above 0", {"activation": "nvfp4_per_tensor"})
    missing = edit(save_modelopt(tiny_model("llama"), tmp_path / "no"), lambda tensors: tensors.pop(f"{DOWN}.input_scale"))
    refused(missing, rf"{DOWN}: only some .* came: 0 of 1 of input_scale$", {"activation": "nvfp4_per_tensor"})
    for folder in (zero, missing):
        with engine(folder, {"activation": "nvfp4_per_token"}):  # which has no use for it
            pass


def test_truncated_file(tmp_path: Path) -> None:
    folder = save_modelopt(tiny_model("llama"), tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    refused(folder, rf"{file} is not a whole safetensors file .*truncated")


def test_file_that_the_index_names_is_missing(tmp_path: Path) -> None:
    folder = save_modelopt(tiny_model("llama"), tmp_path)
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, r"index.json names model-00002-of-00002.safetensors, which is missing")


def test_formats_that_are_not_nvfp4(tmp_path: Path) -> None:
    model = tiny_model("llama")
    groups = {"group_0": {"weights": {"num_bits": 4, "type": "float", "group_size": 32}, "targets": ["Linear"]}}
    refused(save_modelopt(model, tmp_path / "32", config_groups=groups), r"group_size: got 32, which is mxfp4")
    refused(save_modelopt(model, tmp_path / "fp8", quant_algo="FP8"), r"quant_algo: got 'FP8'; allowed: 'NVFP4'")
    refused(save_modelopt(model, tmp_path / "gptq", quant_method="gptq"), r"quant_method: got 'gptq'; allowed: 'nvfp4'")


def test_options_that_cannot_be_served(checkpoint, tmp_path: Path) -> None:
    plain = checkpoint("llama", "bf16")
    refused(plain, r"additional.*: unknown key 'activations' .*did you mean 'activation'", {"activations": "none"})
    refused(plain, r"activation: got 'nvfp4_per_tensor', which needs static input scales", {"activation": "nvfp4_per_tensor"})
    refused(plain, r"\*\.q_proj mean .*q_proj but not .*k_proj.*fused layer", {"ignore": ["*.q_proj"]})
    refused(
        checkpoint("qwen3_moe", "bf16"),
        r"mean .*experts\.3\.up_proj but not .*experts\.0\.gate_proj",
        {"ignore": ["*.experts.3.up_proj"]},
    )
    overrides = {"quantization_config": {"quant_method": "nvfp4"}}
    quantized = checkpoint("llama", "modelopt")
    refused(quantized, r"down_proj: ignored by '\*\.down_proj', but .* holds it in NVFP4", {"ignore": ["*.down_proj"]})
    refused(
        quantized,
        r"--hf-overrides nvfp4, .*got {'lm_head': True}, .*--additional-config",
        hf_overrides={"nvfp4": {"lm_head": True}},
    )
    refused(plain, r"--additional-config nvfp4: got \[\] \(list\)", additional_config={"nvfp4": []})
    refused(quantized, r"are in NVFP4: leave the checkpoint's own quantization_config", hf_overrides=overrides)


def test_misnamed_options_are_said(checkpoint) -> None:
    misnamed = {"nvfp": {"activation": "none"}}
    with log_lines(logging.WARNING) as messages, engine(checkpoint("llama", "bf16"), additional_config=misnamed):
        pass
    assert "nvfp4: --additional-config: nothing reads the key 'nvfp'; options are read from 'nvfp4'" in messages


def test_tensor_parallel_shard_of_k_is_named() -> None:
    from nvfp4_plugin.layers import check_input_size

    with pytest.raises(ValueError, match=r"x: K is 24 on each of 2 ranks.*lower the tensor-parallel size or add the layer to"):
        check_input_size("x", 24, 2)
