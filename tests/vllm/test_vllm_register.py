"""The entry point and what happens where vLLM is not one that the plugin knows."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import vllm_engine  # noqa: F401 (settings that vLLM reads when it is imported)

import nvfp4_plugin.vllm as plugin

pytestmark = pytest.mark.vllm


def test_entry_point_registers_once_and_again() -> None:
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

    [entry] = [entry for entry in entry_points(group="vllm.general_plugins") if entry.name == "nvfp4"]
    register = entry.load()
    register()
    register()
    assert QUANTIZATION_METHODS.count("nvfp4") == 1
    assert get_quantization_config("nvfp4").__name__ == "Nvfp4QuantizationConfig"


def test_importing_and_registering_is_light() -> None:
    code = """
import sys
import nvfp4_plugin.vllm
assert "torch" not in sys.modules and "vllm" not in sys.modules, "import nvfp4_plugin.vllm"
import vllm.config
before = set(sys.modules)
nvfp4_plugin.vllm.register()
heavy = ("vllm.model_executor.layers.fused_moe", "vllm.model_executor.models", "nvfp4_kernels.triton", "transformers.models")
loaded = [name for name in set(sys.modules) - before if name.startswith(heavy) and name != "nvfp4_kernels.triton"]
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_installed_vllm_has_every_hook() -> None:
    import vllm

    assert plugin.missing_hooks(Path(vllm.__file__).parent) == []


def test_missing_hooks_are_named(tmp_path: Path) -> None:
    layerwise = tmp_path / "model_executor/model_loader/reload/layerwise.py"
    layerwise.parent.mkdir(parents=True)
    layerwise.write_text("def initialize_online_processing(layer):\n    pass\n")
    missing = plugin.missing_hooks(tmp_path)
    assert "vllm/model_executor/model_loader/reload/layerwise.py: get_layerwise_info" in missing
    assert not any("initialize_online_processing" in hook for hook in missing)


def test_unsupported_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    monkeypatch.setattr(plugin, "_HOOKS", {"model_executor/parameter.py": ("NoSuchParameter",)})
    methods = [name for name in QUANTIZATION_METHODS if name != "nvfp4"]
    monkeypatch.setattr("vllm.model_executor.layers.quantization.QUANTIZATION_METHODS", methods)
    with pytest.raises(
        ImportError, match=r"supports vLLM 0\.32 and 0\.33; vLLM .* lacks vllm/model_executor/parameter.py: NoSuch"
    ):
        plugin.register()
    assert "nvfp4" not in methods
