"""nvfp4_configs: options, their channels, recipes, forms of checkpoints. Errors are read as a user reads them."""

import copy
import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from nvfp4_configs import CheckpointFormat, Nvfp4Config, recipe_names

ACTIVATIONS = ["auto", "nvfp4_per_token", "nvfp4_per_tensor", "fp8_per_token", "none"]
QKV = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}

MODELOPT: dict[str, Any] = {
    "quant_method": "modelopt",
    "quant_algo": "NVFP4",
    "producer": {"name": "modelopt", "version": "0.39.0"},
    "config_groups": {
        "group_0": {
            "input_activations": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
            "weights": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
            "targets": ["Linear"],
        }
    },
    "ignore": ["lm_head", "model.layers.0.self_attn*"],
}
LEGACY: dict[str, Any] = {
    "producer": {"name": "modelopt", "version": "0.23.0"},
    "quantization": {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": "FP8",
        "group_size": 16,
        "exclude_modules": ["lm_head"],
    },
}
COMPRESSED: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "nvfp4-pack-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "float",
                "strategy": "tensor_group",
                "group_size": 16,
                "symmetric": True,
                "dynamic": False,
            },
            "input_activations": {
                "num_bits": 4,
                "type": "float",
                "strategy": "tensor_group",
                "group_size": 16,
                "symmetric": True,
                "dynamic": "local",
            },
        }
    },
    "ignore": ["lm_head", "re:.*mlp[.]gate$"],
}


def changed(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A deep copy of `config` with one value replaced; `path` is dotted."""
    result = copy.deepcopy(config)
    *parents, last = path.split(".")
    target = result
    for parent in parents:
        target = target[parent]
    target[last] = value
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Options and channels


def test_defaults():
    config = Nvfp4Config.resolve(env={})
    assert config == Nvfp4Config()
    assert config.model_dump() == {
        "activation": "auto",
        "scale_search": "mse",
        "sf_layout": "layout_128x4",
        "backend": "cuda",
        "ignore": (),
        "lm_head": False,
    }


def test_config_is_frozen_and_hashable():
    config = Nvfp4Config(ignore=["lm_head"])
    with pytest.raises(ValidationError, match="frozen"):
        config.activation = "none"
    assert hash(config) == hash(Nvfp4Config(ignore=("lm_head",)))


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_reads(name):
    config = Nvfp4Config.from_recipe(name)
    assert config == Nvfp4Config.resolve(env={"NVFP4_CONFIG": name})


def test_recipes_mean_what_their_names_say():
    assert {"default", "per_token", "hopper_fp8", "weight_only", "blackwell"} <= set(recipe_names())
    assert Nvfp4Config.from_recipe("default") == Nvfp4Config()
    assert Nvfp4Config.from_recipe("per_token").activation == "nvfp4_per_token"
    assert Nvfp4Config.from_recipe("hopper_fp8").activation == "fp8_per_token"
    assert Nvfp4Config.from_recipe("weight_only").activation == "none"
    assert Nvfp4Config.from_recipe("blackwell").activation == "nvfp4_per_token"


def test_recipe_from_a_path(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("activation: none\nignore: ['*.o_proj']\n")
    assert Nvfp4Config.from_recipe(path) == Nvfp4Config(activation="none", ignore=("*.o_proj",))
    path.write_text("# nothing yet\n")
    assert Nvfp4Config.from_recipe(path) == Nvfp4Config()


channel = st.none() | st.fixed_dictionaries(
    {},
    optional={
        "activation": st.sampled_from(ACTIVATIONS),
        "scale_search": st.sampled_from(["mse", "four_over_six", "absmax"]),
        "sf_layout": st.sampled_from(["layout_128x4", "layout_8x4", "layout_linear"]),
        "backend": st.sampled_from(["cuda", "reference", "cublas", "cute-dsl", "flashinfer"]),
        "ignore": st.lists(st.sampled_from(["lm_head", "*.gate", "re:.*mtp.*"])),
        "lm_head": st.booleans(),
    },
)


@given(recipe=st.none() | st.sampled_from(recipe_names()), checkpoint=channel, additional=channel)
def test_later_channels_win_key_by_key(recipe, checkpoint, additional):
    env = {"NVFP4_CONFIG": recipe} if recipe else {}
    expected = Nvfp4Config.from_recipe(recipe or "default").model_dump() | (checkpoint or {}) | (additional or {})
    own = None if checkpoint is None else {"quant_method": "nvfp4", **checkpoint}
    assert Nvfp4Config.resolve(own, additional, env) == Nvfp4Config(**expected)
    # The same options under the key nvfp4 of a foreign checkpoint.
    foreign = MODELOPT if checkpoint is None else MODELOPT | {"nvfp4": checkpoint}
    assert Nvfp4Config.resolve(foreign, additional, env) == Nvfp4Config(**expected)


def test_the_environment_is_the_default_env(monkeypatch):
    monkeypatch.setenv("NVFP4_CONFIG", "weight_only")
    assert Nvfp4Config.resolve().activation == "none"


def test_a_channel_may_name_a_recipe():
    config = Nvfp4Config.resolve(
        {"quant_method": "nvfp4", "recipe": "hopper_fp8"}, {"recipe": "fast_load", "lm_head": True}, {}
    )
    assert config == Nvfp4Config(activation="fp8_per_token", scale_search="absmax", lm_head=True)


def test_a_foreign_checkpoints_ignore_is_not_an_option():
    assert Nvfp4Config.resolve(MODELOPT, None, {}).ignore == ()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: Nvfp4Config.resolve(env={"NVFP4_CONFIG": "hoper_fp8"}),
            ["NVFP4_CONFIG=hoper_fp8", "unknown recipe 'hoper_fp8'", "did you mean 'hopper_fp8'", "per_token", ".yaml"],
        ),
        (
            lambda: Nvfp4Config.resolve({"quant_method": "nvfp4", "activaton": "none"}, env={}),
            ["quantization_config", "unknown key 'activaton'", "'none'", "did you mean 'activation'", "scale_search"],
        ),
        (
            lambda: Nvfp4Config.resolve(None, {"activation": "w4a4"}, {}),
            ["--additional-config nvfp4", "activation", "got 'w4a4'", "'nvfp4_per_token'", "'none'"],
        ),
        (
            lambda: Nvfp4Config.resolve({"quant_method": "nvfp4", "activation": 4}, {"lm_head": "yes"}, {}),
            [
                "quantization_config: activation: got 4",
                "--additional-config nvfp4: lm_head: got 'yes'",
                "true or false",
            ],
        ),
        (
            lambda: Nvfp4Config.resolve(None, {"ignore": "lm_head"}, {}),
            ["--additional-config nvfp4: ignore: got 'lm_head'; allowed: a list"],
        ),
        (
            lambda: Nvfp4Config.resolve(None, {"ignore": ["re:(["]}, {}),
            ["--additional-config nvfp4: ignore: 're:([' is not a regular expression"],
        ),
        (lambda: Nvfp4Config.resolve(None, {"ignore": [" "]}, {}), ["ignore: ' ' is empty"]),
        (
            lambda: Nvfp4Config.resolve(None, ["none"], {}),
            ["--additional-config nvfp4: got ['none'] (list)", "mapping"],
        ),
        (lambda: Nvfp4Config.resolve(None, [], {}), ["--additional-config nvfp4: got [] (list)", "mapping"]),
        (lambda: Nvfp4Config.resolve(None, False, {}), ["--additional-config nvfp4: got False (bool)", "mapping"]),
        (lambda: Nvfp4Config.resolve({**MODELOPT, "nvfp4": 0}, env={}), ["quantization_config: got 0 (int)", "mapping"]),
        (lambda: Nvfp4Config.resolve(None, {"recipe": 3}, {}), ["--additional-config nvfp4: recipe: got 3"]),
        (lambda: Nvfp4Config.from_recipe("none"), ["unknown recipe 'none'", "weight_only"]),
        (lambda: Nvfp4Config.from_recipe("absent.yaml"), ["cannot read", "'absent.yaml'", "No such file"]),
        (lambda: Nvfp4Config(ignored=[]), ["unknown key 'ignored'", "did you mean 'ignore'"]),
    ],
)
def test_errors_say_channel_key_what_came_and_what_is_allowed(call, words):
    with pytest.raises(ValueError, match=r".") as caught:
        call()
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("activation: fp8\n", ["activation: got 'fp8'", "'fp8_per_token'"]),
        ("- none\n", ["got ['none'] (list)", "mapping"]),
        ("activation: [none\n", ["is not YAML"]),
        ("recipe: per_token\n", ["unknown key 'recipe'"]),
    ],
)
def test_errors_in_a_file_name_the_file(tmp_path, content, words):
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"mine\.yaml") as caught:
        Nvfp4Config.resolve(env={"NVFP4_CONFIG": str(path)})
    for word in ["NVFP4_CONFIG=", *words]:
        assert word in str(caught.value)


def test_needs_no_torch():
    code = "import sys, nvfp4_configs; assert 'torch' not in sys.modules; nvfp4_configs.Nvfp4Config.from_recipe('default')"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------------------------------------------------------------
# Ignore patterns


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "language_model.lm_head", True),
        ("lm_head", "lm_head_norm", False),
        ("model.layers.1", "model.layers.1.mlp.down_proj", True),
        ("model.layers.1", "model.layers.10.mlp.down_proj", False),
        ("mlp.gate", "model.layers.0.mlp.gate", True),
        ("mlp.gate", "model.layers.0.mlp.gate_proj", False),
        ("*.mlp.*", "model.layers.0.mlp.down_proj", True),
        ("*.mlp", "model.layers.0.mlp.down_proj", False),
        ("*.O_PROJ", "model.layers.0.self_attn.o_proj", False),
        ("re:.*o_proj", "model.layers.0.self_attn.o_proj", True),
        ("re:.*gate$", "model.layers.0.mlp.gate_proj", False),
        ("re:o_proj", "model.layers.0.self_attn.o_proj", False),
    ],
)
def test_patterns(pattern, name, expected):
    config = Nvfp4Config(ignore=(pattern,))
    assert config.ignores(name) is expected
    assert config.unmatched([name, "other"]) == ([] if expected else [pattern])


def test_fused_modules():
    name = "model.layers.0.self_attn.qkv_proj"
    assert Nvfp4Config(ignore=("q_proj", "k_proj", "v_proj")).ignores(name, QKV)
    assert Nvfp4Config(ignore=("re:.*[qkv]_proj",)).ignores(name, QKV)
    assert Nvfp4Config(ignore=("qkv_proj",)).ignores(name, QKV)
    assert not Nvfp4Config(ignore=("o_proj",)).ignores(name, QKV)
    partly = Nvfp4Config(ignore=("q_proj",))
    with pytest.raises(ValueError, match=r"q_proj but not .*k_proj, .*v_proj.*one fused layer .*qkv_proj"):
        partly.ignores(name, QKV)
    assert partly.unmatched([name], QKV) == []
    assert partly.unmatched([name]) == ["q_proj"]


def test_routed_experts_as_one_module():
    packed = {"experts": ["experts.0.gate_proj", "experts.0.up_proj", "experts.0.down_proj"]}
    name = "model.layers.3.mlp.experts"
    assert Nvfp4Config(ignore=("re:.*experts[.].*_proj",)).ignores(name, packed)
    assert not Nvfp4Config(ignore=("mlp.gate",)).ignores(name, packed)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoint formats


def test_modelopt():
    parsed = CheckpointFormat.parse(MODELOPT)
    assert parsed.kind == "modelopt"
    assert parsed.group_size == 16
    assert parsed.static_activations
    assert parsed.ignores("lm_head")
    assert parsed.ignores("model.layers.0.self_attn.qkv_proj")
    assert not parsed.ignores("model.layers.1.self_attn.qkv_proj")


def test_modelopt_weight_only():
    assert not CheckpointFormat.parse(MODELOPT | {"config_groups": {}, "quant_algo": "W4A16_NVFP4"}).static_activations
    assert not CheckpointFormat.parse(changed(MODELOPT, "config_groups.group_0.input_activations", None)).static_activations


@pytest.mark.parametrize("extra", [{}, {"quant_method": "modelopt_fp4"}, {"quant_method": "modelopt"}])
def test_legacy_modelopt(extra):
    parsed = CheckpointFormat.parse(LEGACY | extra)
    assert parsed == CheckpointFormat(kind="modelopt", ignore=("lm_head",), static_activations=True, kv_cache="FP8")


def test_compressed_tensors():
    parsed = CheckpointFormat.parse(COMPRESSED | {"total_num_heads": 32, "total_num_kv_heads": 8})
    assert parsed.kind == "compressed-tensors"
    assert parsed.static_activations
    assert parsed.ignores("model.layers.0.mlp.gate")
    assert not parsed.ignores("model.layers.0.mlp.gate_up_proj")
    assert not CheckpointFormat.parse(changed(COMPRESSED, "config_groups.group_0.input_activations", None)).static_activations


def test_compressed_tensors_targets():
    parsed = CheckpointFormat.parse(changed(COMPRESSED, "config_groups.group_0.targets", ["re:.*mlp.*"]))
    assert not parsed.ignores("model.layers.0.mlp.down_proj")
    assert parsed.ignores("model.layers.0.self_attn.o_proj")


@pytest.mark.parametrize("config", [{"quant_method": "nvfp4"}, {"quant_method": "NVFP4", "group_size": 16}, {}])
def test_own_form(config):
    assert CheckpointFormat.parse(config) == CheckpointFormat(kind="nvfp4")
    assert Nvfp4Config.resolve(config, env={}) == Nvfp4Config()


GROUP = "config_groups.group_0"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (changed(LEGACY, "quantization.group_size", 32), ["quantization.group_size: got 32", "mxfp4", "16"]),
        (changed(MODELOPT, f"{GROUP}.weights.group_size", 32), ["group_0.weights.group_size: got 32", "mxfp4"]),
        (changed(COMPRESSED, f"{GROUP}.weights.group_size", 32), ["group_0.weights.group_size: got 32", "mxfp4"]),
        ({"quant_method": "nvfp4", "group_size": 32}, ["quantization_config.group_size: got 32", "mxfp4"]),
        (changed(LEGACY, "quantization.group_size", 64), ["quantization.group_size: got 64; allowed: 16"]),
        (changed(LEGACY, "quantization.quant_algo", "FP8"), ["quantization.quant_algo: got 'FP8'", "'NVFP4'"]),
        (changed(MODELOPT, "quant_algo", "NVFP4_AWQ"), ["quant_algo: got 'NVFP4_AWQ'", "'W4A16_NVFP4'"]),
        (changed(MODELOPT, "quant_algo", None), ["quant_algo: got None"]),
        (changed(MODELOPT, "ignore", "lm_head"), ["ignore: got 'lm_head'; allowed: a list"]),
        (changed(MODELOPT, "pre_quant_scale", True), ["pre_quant_scale: got True"]),
        (changed(COMPRESSED, f"{GROUP}.weights.num_bits", 8), ["weights.num_bits: got 8; allowed: 4"]),
        (changed(COMPRESSED, f"{GROUP}.weights.type", "int"), ["weights.type: got 'int'; allowed: 'float'"]),
        (changed(COMPRESSED, f"{GROUP}.weights.strategy", "group"), ["weights.strategy: got 'group'"]),
        (changed(COMPRESSED, f"{GROUP}.weights.symmetric", False), ["weights.symmetric: got False"]),
        (changed(COMPRESSED, f"{GROUP}.input_activations.num_bits", 8), ["input_activations.num_bits: got 8"]),
        (changed(COMPRESSED, f"{GROUP}.weights", None), ["group_0.weights: got None"]),
        (changed(COMPRESSED, f"{GROUP}.targets", ["Embedding"]), ["group_0.targets", "'Embedding'", "'Linear'"]),
        (changed(COMPRESSED, f"{GROUP}.output_activations", {"num_bits": 8}), ["group_0.output_activations"]),
        (changed(COMPRESSED, "format", "pack-quantized"), ["quantization_config.format: got 'pack-quantized'"]),
        (changed(COMPRESSED, f"{GROUP}.format", "float-quantized"), ["group_0.format: got 'float-quantized'"]),
        (changed(COMPRESSED, "quantization_status", "frozen"), ["quantization_status: got 'frozen'"]),
        (changed(COMPRESSED, "transform_config", {"config_groups": {"a": 1}}), ["transform_config"]),
        (changed(COMPRESSED, "ignore", ["re:("]), ["quantization_config.ignore", "not a regular expression"]),
        (changed(COMPRESSED, "config_groups", {}), ["config_groups: got {}"]),
        ({"quant_method": "gptq", "bits": 4}, ["quant_method: got 'gptq'", "'compressed-tensors'"]),
        ("nvfp4", ["quantization_config: got 'nvfp4'; allowed: a mapping"]),
    ],
)
def test_checkpoints_that_cannot_be_served_are_refused_by_key(config, words):
    with pytest.raises(ValueError, match=r".") as caught:
        CheckpointFormat.parse(config)
    for word in words:
        assert word in str(caught.value)


def test_mixed_groups_are_refused():
    groups = COMPRESSED["config_groups"]["group_0"]
    mixed = changed(COMPRESSED, "config_groups.group_1", groups | {"input_activations": None})
    with pytest.raises(ValueError, match=r"config_groups: some groups have static input_activations"):
        CheckpointFormat.parse(mixed)


def test_survives_json():
    for config in (MODELOPT, LEGACY, COMPRESSED):
        assert CheckpointFormat.parse(json.loads(json.dumps(config))) == CheckpointFormat.parse(config)
