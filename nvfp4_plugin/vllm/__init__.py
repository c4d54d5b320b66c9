"""vLLM: `register`, which the entry point `vllm.general_plugins` calls once in every process."""

from __future__ import annotations

import logging
import re
from importlib.util import find_spec
from pathlib import Path

METHOD = "nvfp4"
SUPPORTED = "0.32 and 0.33"
LOGGERS = ("nvfp4", "nvfp4_plugin")

_HOOKS = {
    "compilation/passes/inductor_pass.py": ("InductorPass", "enable_fake_mode", "get_pass_context"),
    "model_executor/layers/quantization/__init__.py": ("register_quantization_config",),
    "model_executor/layers/quantization/base_config.py": ("QuantizationConfig", "QuantizeMethodBase"),
    "model_executor/layers/quantization/kv_cache.py": ("BaseKVCacheMethod",),
    "model_executor/layers/quantization/utils/quant_utils.py": (
        "amax_for_tp_weight_quant",
        "amax_for_moe_weight_quant",
    ),
    "model_executor/layers/linear.py": ("LinearMethodBase", "register_weight_loader_v2_supported_method"),
    "model_executor/layers/vocab_parallel_embedding.py": ("ParallelLMHead",),
    "model_executor/layers/fused_moe/fused_moe_method_base.py": ("FusedMoEMethodBase",),
    "model_executor/layers/fused_moe/routed_experts.py": ("RoutedExperts", "FusedMoeWeightScaleSupported"),
    "model_executor/layers/fused_moe/router/gate_linear.py": ("GateLinear",),
    "model_executor/model_loader/reload/layerwise.py": ("initialize_online_processing", "get_layerwise_info"),
    "model_executor/model_loader/reload/meta.py": ("CopyCounter",),
    "model_executor/model_loader/reload/utils.py": ("get_layer_size", "get_tensor_load_numel"),
    "model_executor/parameter.py": ("ModelWeightParameter", "GroupQuantScaleParameter", "PerTensorScaleParameter"),
}
"""What this plugin uses of vLLM, file by file. They are read instead of imported, which would cost every process seconds."""


def missing_hooks(package: Path) -> list[str]:
    """What of `_HOOKS` the vLLM in the folder `package` lacks."""
    missing = []
    for file, names in _HOOKS.items():
        path = package / file
        source = path.read_text() if path.is_file() else ""
        missing += [
            f"vllm/{file}: {name}" for name in names if not re.search(rf"^(?:def|class) {name}\b", source, re.MULTILINE)
        ]
    return missing


def register() -> None:
    """Make `--quantization nvfp4` known to vLLM. May be called any number of times.

    ImportError if the installed vLLM lacks what this plugin hooks into.
    """
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    if METHOD in QUANTIZATION_METHODS:
        return
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    if missing := missing_hooks(Path(spec.origin).parent):
        from vllm import __version__

        raise ImportError(
            f"nvfp4-plugin supports vLLM {SUPPORTED}; vLLM {__version__} lacks {', '.join(missing)}: "
            "install a supported vLLM, or another release of nvfp4-plugin"
        )
    _log_with_vllm()
    from vllm.model_executor.layers.quantization import register_quantization_config

    from .config import Nvfp4QuantizationConfig

    register_quantization_config(METHOD)(Nvfp4QuantizationConfig)


def _log_with_vllm() -> None:
    """Give this plugin's log vLLM's level and handlers, which come later: by itself, Python shows warnings alone."""
    for name in LOGGERS:
        logging.getLogger(name).parent = logging.getLogger("vllm")
