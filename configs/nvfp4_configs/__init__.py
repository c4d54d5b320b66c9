"""Options of the plugin, recipes, and the forms that NVFP4 checkpoints come in. Needs no torch."""

from nvfp4_configs.checkpoint import CheckpointFormat
from nvfp4_configs.options import CONFIG_ENV, Activation, Backend, Nvfp4Config, ScaleLayout, ScaleSearch, recipe_names
from nvfp4_configs.patterns import PackedModules

__all__ = [
    "CONFIG_ENV",
    "Activation",
    "Backend",
    "CheckpointFormat",
    "Nvfp4Config",
    "PackedModules",
    "ScaleLayout",
    "ScaleSearch",
    "recipe_names",
]
