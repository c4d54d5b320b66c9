"""Registration: SGLang swallows what a plugin raises, so what it leads to is looked at, and what it says when it fails."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path

import pytest
from sglang_engine import settings  # sets the environment before SGLang is imported

import nvfp4_plugin.sglang as plugin

pytestmark = pytest.mark.sglang


@pytest.fixture(autouse=True)
def _plugins() -> None:
    from sglang.srt.plugins import load_plugins

    load_plugins()


def test_entry_point_registers_nvfp4_before_sglangs_own_methods() -> None:
    from sglang.srt.layers.quantization import CPU_QUANTIZATION_METHODS, QUANTIZATION_METHODS, get_quantization_config
    from sglang.srt.model_loader import loader

    from nvfp4_plugin.sglang.config import Nvfp4QuantizationConfig

    assert next(iter(QUANTIZATION_METHODS)) == "nvfp4"
    assert {"fp8", "modelopt_fp4", "compressed-tensors"} < set(QUANTIZATION_METHODS)
    assert CPU_QUANTIZATION_METHODS["nvfp4"] is get_quantization_config("nvfp4") is Nvfp4QuantizationConfig
    assert inspect.unwrap(loader.get_quant_config) is not loader.get_quant_config, "the hook is not there"


def test_registering_again_changes_nothing() -> None:
    from sglang.srt.arg_groups.choices import QUANTIZATION_CHOICES
    from sglang.srt.layers.linear import WEIGHT_LOADER_V2_SUPPORTED
    from sglang.srt.layers.quantization import QUANTIZATION_METHODS
    from sglang.srt.plugins.hook_registry import HookRegistry

    def state() -> list[object]:
        hooks = HookRegistry._hooks["sglang.srt.model_loader.loader.get_quant_config"]
        return [list(QUANTIZATION_METHODS), list(QUANTIZATION_CHOICES), list(WEIGHT_LOADER_V2_SUPPORTED), len(hooks)]

    before = state()
    plugin.register()
    plugin.register()
    assert state() == before
    assert len(before[1]) == len(set(before[1]))


def test_what_sglang_lacks_is_an_error_in_the_log(monkeypatch, caplog) -> None:
    monkeypatch.setitem(plugin._HOOKS, "sglang.srt.layers.linear", ("LinearBase", "NoSuchLayer"))
    monkeypatch.setitem(plugin._HOOKS, "sglang.srt.no_such_module", ("Anything",))
    with caplog.at_level(logging.ERROR), pytest.raises(ImportError, match="NoSuchLayer"):
        plugin.register()
    [record] = [record for record in caplog.records if record.name == "nvfp4_plugin"]
    assert record.levelno == logging.ERROR
    for word in ("sglang.srt.layers.linear.NoSuchLayer", "sglang.srt.no_such_module", "Install sglang==0.5.23"):
        assert word in record.getMessage()


def test_registering_without_effect_is_an_error_in_the_log(monkeypatch, caplog) -> None:
    from sglang.srt.layers.quantization import QUANTIZATION_METHODS

    monkeypatch.setitem(QUANTIZATION_METHODS, "nvfp4", object)
    with caplog.at_level(logging.ERROR), pytest.raises(RuntimeError, match="its name leads to this plugin"):
        plugin.register()
    assert "not available" in caplog.text


def test_the_command_line_takes_nvfp4_with_the_flags_that_people_use(checkpoint) -> None:
    from sglang.srt.server_args import prepare_server_args

    line = ["--model-path", str(checkpoint("qwen3_moe", "bf16")), "--quantization", "nvfp4", "--device", "cpu"]
    line += ["--moe-runner-backend", "auto", "--tp", "2", "--ep", "2", "--attention-backend", "torch_native"]
    args = prepare_server_args(line)
    args.resolve_once()
    assert args.quantization == "nvfp4"


@pytest.mark.parametrize("form", ["modelopt", "legacy_modelopt", "compressed_tensors"])
@pytest.mark.parametrize(("asked", "got"), [("nvfp4", "nvfp4"), (None, "other")])
def test_checkpoints_are_claimed_only_for_those_who_ask(form: str, asked: str | None, got: str, checkpoint) -> None:
    from sglang.srt.configs.model_config import ModelConfig

    model: Path = checkpoint("llama", form)
    config = ModelConfig(str(settings(model)["model_path"]), quantization=asked)
    assert (config.quantization == "nvfp4") == (got == "nvfp4")
