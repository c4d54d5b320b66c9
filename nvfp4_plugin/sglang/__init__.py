"""SGLang: `register`, which the entry point `sglang.srt.plugins` calls once in every process.

SGLang logs what a plugin raises and goes on without it, so `register` checks what it did and logs an error that says
what to do.
"""

from __future__ import annotations

import importlib
import inspect
import logging

METHOD = "nvfp4"
SUPPORTED = "0.5.23"

logger = logging.getLogger("nvfp4_plugin")

_LOADER_HOOK = "sglang.srt.model_loader.loader.get_quant_config"
_HOOKS = {
    "sglang.srt.arg_groups.choices": ("QUANTIZATION_CHOICES", "add_quantization_method_choices"),
    "sglang.srt.layers.quantization": ("QUANTIZATION_METHODS", "CPU_QUANTIZATION_METHODS", "get_quantization_config"),
    "sglang.srt.layers.quantization.base_config": ("QuantizationConfig", "LinearMethodBase", "FusedMoEMethodBase"),
    "sglang.srt.layers.quantization.kv_cache": ("BaseKVCacheMethod",),
    "sglang.srt.layers.quantization.online_quantization": ("CopyNumelCounter",),
    "sglang.srt.layers.linear": ("WEIGHT_LOADER_V2_SUPPORTED", "LinearBase"),
    "sglang.srt.layers.parameter": ("ModelWeightParameter", "PerTensorScaleParameter"),
    "sglang.srt.model_loader.checkpoint_quantization": ("resolve_checkpoint_quant_spec",),
    "sglang.srt.model_loader.loader": ("get_quant_config",),
    "sglang.srt.plugins.hook_registry": ("HookRegistry", "HookType"),
}
"""What this plugin uses of SGLang while it registers and loads, module by module."""


def missing_hooks() -> list[str]:
    """What of `_HOOKS` the installed SGLang lacks."""
    missing = []
    for name, attributes in _HOOKS.items():
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not name.startswith(error.name or ""):
                raise  # SGLang has the module; something that it needs is not installed
            missing.append(name)
            continue
        missing += [f"{name}.{attribute}" for attribute in attributes if not hasattr(module, attribute)]
    return missing


def register() -> None:
    """Make `--quantization nvfp4` known to SGLang. May be called any number of times.

    ImportError if the installed SGLang lacks what this plugin hooks into, RuntimeError if registering had no effect;
    either way an error is logged first that says what to do.
    """
    try:
        _register()
        _verify()
    except Exception as error:
        logger.error(
            "nvfp4-plugin could not register with SGLang %s, so --quantization nvfp4 is not available: %s. Install "
            "sglang==%s, which this release of nvfp4-plugin supports, or another release of nvfp4-plugin; to start SGLang "
            "without the plugin set SGLANG_PLUGINS to the names of the others.",
            _version(),
            error,
            SUPPORTED,
        )
        raise


def _version() -> str:
    import sglang

    return getattr(sglang, "__version__", "(unknown version)")


def _register() -> None:
    if missing := missing_hooks():
        raise ImportError(f"it lacks {', '.join(missing)}")
    from sglang.srt.arg_groups.choices import QUANTIZATION_CHOICES, add_quantization_method_choices
    from sglang.srt.layers.linear import WEIGHT_LOADER_V2_SUPPORTED
    from sglang.srt.layers.quantization import CPU_QUANTIZATION_METHODS, QUANTIZATION_METHODS
    from sglang.srt.model_loader.weight_utils import get_quant_config
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from .config import Nvfp4QuantizationConfig, make_config
    from .linear import LINEAR_METHODS

    if METHOD not in QUANTIZATION_METHODS:
        ours, theirs = list(inspect.signature(make_config).parameters)[1:], list(inspect.signature(get_quant_config).parameters)
        if ours != theirs:
            raise ImportError(f"get_quant_config takes {theirs} instead of {ours}")
        HookRegistry.register(_LOADER_HOOK, make_config, HookType.AROUND)
        # The first method that claims a checkpoint gets it, and SGLang's own would claim ModelOpt's. The table is shared,
        # so it is put into order in place.
        others = dict(QUANTIZATION_METHODS)
        QUANTIZATION_METHODS.clear()
        QUANTIZATION_METHODS.update({METHOD: Nvfp4QuantizationConfig, **others})
    CPU_QUANTIZATION_METHODS[METHOD] = Nvfp4QuantizationConfig
    if METHOD not in QUANTIZATION_CHOICES:
        add_quantization_method_choices([METHOD])
    WEIGHT_LOADER_V2_SUPPORTED.extend(name for name in LINEAR_METHODS if name not in WEIGHT_LOADER_V2_SUPPORTED)


def _verify() -> None:
    """RuntimeError unless SGLang sees the method everywhere that it looks for one."""
    from sglang.srt.layers.linear import WEIGHT_LOADER_V2_SUPPORTED
    from sglang.srt.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
    from sglang.srt.server_args import QUANTIZATION_CHOICES

    from .config import Nvfp4QuantizationConfig
    from .linear import LINEAR_METHODS

    checks = {
        "it is the first quantization method": next(iter(QUANTIZATION_METHODS)) == METHOD,
        "its name leads to this plugin": get_quantization_config(METHOD) is Nvfp4QuantizationConfig,
        "the command line offers it": METHOD in QUANTIZATION_CHOICES,
        "its weights load part by part": set(LINEAR_METHODS) <= set(WEIGHT_LOADER_V2_SUPPORTED),
    }
    if failed := [check for check, passed in checks.items() if not passed]:
        raise RuntimeError(f"not true after registering {METHOD!r}: {'; '.join(failed)}")
