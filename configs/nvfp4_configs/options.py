"""`Nvfp4Config`: every option of the plugin, and the channels that it comes through."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, StrictBool, ValidationError, model_validator

from nvfp4_configs.patterns import PackedModules, check_pattern, matches_any, unmatched

Activation = Literal["auto", "nvfp4_per_token", "nvfp4_per_tensor", "fp8_per_token", "none"]
ScaleSearch = Literal["mse", "four_over_six", "absmax"]
ScaleLayout = Literal["layout_128x4", "layout_8x4", "layout_linear"]
Backend = Literal["cuda", "reference", "cublas", "cute-dsl", "flashinfer"]
Pattern = Annotated[str, AfterValidator(check_pattern)]

CONFIG_ENV = "NVFP4_CONFIG"
"""Environment variable that names a recipe or a YAML file."""

_ALLOWED = {"ignore": "a list of module names, globs or 're:' expressions", "lm_head": "true or false"}
"""What a key that is not one of a few words may hold."""

_RECIPES = resources.files("nvfp4_configs") / "recipes"


class Nvfp4Config(BaseModel):
    """How weights and activations are quantized, and what runs them. Frozen; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    activation: Activation = "auto"
    """What a linear or expert layer does to its input: `nvfp4_per_token` (W4A4, one fp32 scale per token),
    `nvfp4_per_tensor` (W4A4 with the checkpoint's static scale), `fp8_per_token` (W4A8), `none` (W4A16), or `auto`:
    what suits the device."""
    scale_search: ScaleSearch = "mse"
    """How the block scales of a weight are chosen when a bf16 checkpoint is quantized: `mse` (least squared error over
    nine candidates), `four_over_six` (two candidates) or `absmax` (none, the fastest)."""
    sf_layout: ScaleLayout = "layout_128x4"
    """Memory layout of the activations' block scales between the quantizer and the GEMMs of others (`cublas`, `cute-dsl`,
    `flashinfer`), which read `layout_128x4`. Our own have one of theirs: they take no notice, and a log line says so."""
    backend: Backend = "cuda"
    """`cuda`: this library's kernels (their torch twins for CPU tensors); `reference`: the torch twins on any device;
    `cublas`, `cute-dsl`, `flashinfer`: cuBLAS's and FlashInfer's kernels for W4A4 dense layers, on SM100 or newer."""
    ignore: tuple[Pattern, ...] = ()
    """Modules left in the checkpoint's precision: names, globs or `re:` expressions (`nvfp4_configs.patterns`)."""
    lm_head: StrictBool = False
    """Quantize the language-model head too."""

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            _check_keys(values, "Nvfp4Config")
        return values

    def ignores(self, name: str, packed: PackedModules | None = None) -> bool:
        """Whether `ignore` means the module `name`; `packed` maps a fused module to its parts (`qkv_proj`).

        ValueError where only some parts of a fused module are meant.
        """
        return matches_any(self.ignore, name, packed)

    def unmatched(self, names: Iterable[str], packed: PackedModules | None = None) -> list[str]:
        """The entries of `ignore` that mean none of `names`: most likely typing errors."""
        return unmatched(self.ignore, names, packed)

    @classmethod
    def from_recipe(cls, name_or_path: str | os.PathLike[str]) -> Nvfp4Config:
        """A recipe by name (`recipe_names()`), or a YAML file of the same form by path.

        ValueError for an unknown recipe, a file that is not YAML, an unknown key or a value that is not allowed.
        """
        return _validated(_read_recipe(name_or_path, ""))

    @classmethod
    def resolve(
        cls,
        checkpoint: Mapping[str, Any] | None = None,
        additional: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        *,
        channel: str = "--additional-config nvfp4",
    ) -> Nvfp4Config:
        """The options of one run, merged key by key from every channel; a later channel wins.

        1. The recipe or file that the environment variable NVFP4_CONFIG names.
        2. `checkpoint`: the checkpoint's `quantization_config` (vLLM's `--hf-overrides` too). With
           `"quant_method": "nvfp4"` every other key is an option; in a ModelOpt or compressed-tensors dict the options
           stand under the key `nvfp4` (its own `ignore` belongs to `CheckpointFormat`).
        3. `additional`: the value under `nvfp4` in vLLM's `--additional-config '{"nvfp4": {...}}'` or SGLang's
           `--json-model-override-args '{"nvfp4": {...}}'`; `channel` says which, for messages.

        In 2 and 3 the key `recipe` names a recipe or file whose keys come first. `env` defaults to os.environ.
        ValueError naming the channel, the key, what came and what is allowed.
        """
        env = os.environ if env is None else env
        merged: dict[str, tuple[str, Any]] = {}
        if named := env.get(CONFIG_ENV):
            merged |= _read_recipe(named, f"{CONFIG_ENV}={named}")
        merged |= _read_options(checkpoint_options(checkpoint), "quantization_config")
        merged |= _read_options(additional, channel)
        return _validated(merged)


def recipe_names() -> list[str]:
    """The recipes that come with the package, by name."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _RECIPES.iterdir() if entry.name.endswith(".yaml"))


def checkpoint_options(quantization_config: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The part of a checkpoint's `quantization_config` that holds this plugin's options."""
    if not isinstance(quantization_config, Mapping):
        return quantization_config
    if is_own(quantization_config):
        return {key: value for key, value in quantization_config.items() if key not in ("quant_method", "group_size")}
    return quantization_config.get("nvfp4")


def is_own(quantization_config: Mapping[str, Any]) -> bool:
    """Whether the dict is of our own form: `{"quant_method": "nvfp4", ...options}`."""
    method = quantization_config.get("quant_method", "nvfp4")
    return str(method).lower() == "nvfp4" and "quantization" not in quantization_config


def _read_recipe(name_or_path: str | os.PathLike[str], channel: str) -> dict[str, tuple[str, Any]]:
    text = os.fspath(name_or_path)
    prefix = f"{channel}: " if channel else ""
    if text in recipe_names():
        source, content = f"recipe {text}", (_RECIPES / f"{text}.yaml").read_text()
    elif os.sep in text or Path(text).suffix in (".yaml", ".yml", ".json"):
        try:
            source, content = text, Path(text).expanduser().read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{prefix}cannot read the configuration file {text!r}: {error}") from None
    else:
        raise ValueError(
            f"{prefix}unknown recipe {text!r}{_did_you_mean(text, recipe_names())}; allowed: "
            f"{', '.join(recipe_names())}, or the path of a .yaml file"
        )
    try:
        options = yaml.safe_load(content)
    except yaml.YAMLError as error:
        raise ValueError(f"{prefix}{source} is not YAML: {error}") from None
    # An empty file is a recipe that changes nothing.
    return _labelled({} if options is None else options, f"{prefix}{source}")


def _read_options(options: Mapping[str, Any] | None, channel: str) -> dict[str, tuple[str, Any]]:
    if not isinstance(options, Mapping) or "recipe" not in options:
        return _labelled({} if options is None else options, channel)
    recipe = options["recipe"]
    if not isinstance(recipe, str):
        raise ValueError(f"{channel}: recipe: got {recipe!r}; allowed: the name of a recipe or the path of a file")
    rest = {key: value for key, value in options.items() if key != "recipe"}
    return _read_recipe(recipe, channel) | _labelled(rest, channel)


def _labelled(options: Mapping[str, Any], channel: str) -> dict[str, tuple[str, Any]]:
    """Each option beside the channel that it came through, its key checked."""
    if not isinstance(options, Mapping):
        raise ValueError(f"{channel}: got {options!r} ({type(options).__name__}); allowed: a mapping of options")
    _check_keys(options, channel)
    return {key: (channel, value) for key, value in options.items()}


def _check_keys(options: Mapping[str, Any], channel: str) -> None:
    allowed = sorted(Nvfp4Config.model_fields)
    for key, value in options.items():
        if key not in allowed:
            raise ValueError(
                f"{channel}: unknown key {key!r} (with the value {value!r}){_did_you_mean(str(key), allowed)}; "
                f"allowed: {', '.join(allowed)}"
            )


def _validated(merged: dict[str, tuple[str, Any]]) -> Nvfp4Config:
    try:
        return Nvfp4Config(**{key: value for key, (_, value) in merged.items()})
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            key = str(problem["loc"][0])
            channel, value = merged[key]
            if problem["type"] == "value_error":  # our own words, on one entry of `ignore`
                problems.append(f"{channel}: {key}: {problem['ctx']['error']}")
            else:
                allowed = problem.get("ctx", {}).get("expected") or _ALLOWED[key]
                problems.append(f"{channel}: {key}: got {value!r}; allowed: {allowed}")
        raise ValueError("\n".join(problems)) from None


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""
