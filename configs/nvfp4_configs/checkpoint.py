"""`CheckpointFormat`: how a checkpoint on disk was quantized, read from its `quantization_config`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from nvfp4_configs.options import is_own
from nvfp4_configs.patterns import PackedModules, check_pattern, matches_any

GROUP_SIZE = 16

_MODELOPT_ALGORITHMS = {"NVFP4": True, "W4A16_NVFP4": False}
"""ModelOpt's quant_algo -> whether layers come with a static input_scale."""
_MODELOPT_METHODS = ("modelopt", "modelopt_fp4")


class CheckpointFormat(BaseModel):
    """Whose tensor names and scale conventions a checkpoint follows. Frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["modelopt", "compressed-tensors", "nvfp4"]
    """`modelopt`: `weight`, `weight_scale`, `weight_scale_2` (multiply), `input_scale`; `compressed-tensors`:
    `weight_packed`, `weight_scale`, `weight_global_scale` (divide), `input_global_scale` (divide); `nvfp4`: the weights
    are not quantized yet, the dict holds options alone."""
    group_size: int = GROUP_SIZE
    ignore: tuple[str, ...] = ()
    """Modules that the checkpoint holds unquantized (`nvfp4_configs.patterns`)."""
    targets: tuple[str, ...] = ()
    """Where not empty, only these modules are quantized (compressed-tensors' targets other than `Linear`)."""
    static_activations: bool = False
    """Whether quantized layers come with a static activation scale."""
    kv_cache: str | None = None
    """How the checkpoint wants the KV cache stored, as it says it (`"FP8"`); None if it does not say."""

    def ignores(self, name: str, packed: PackedModules | None = None) -> bool:
        """Whether the checkpoint holds the module `name` unquantized; `packed` as in `Nvfp4Config.ignores`."""
        if matches_any(self.ignore, name, packed):
            return True
        return bool(self.targets) and not matches_any(self.targets, name, packed)

    @classmethod
    def parse(cls, quantization_config: Mapping[str, Any]) -> CheckpointFormat:
        """Read a `quantization_config` in any of these forms:

        - ModelOpt's in config.json: `{"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": [...], ...}`
        - ModelOpt's legacy hf_quant_config.json: `{"producer": ..., "quantization": {"quant_algo": ...}}`
        - compressed-tensors' nvfp4-pack-quantized: `{"quant_method": "compressed-tensors", "config_groups": ...}`
        - ours: `{"quant_method": "nvfp4", ...options}`

        Raises ValueError naming the key for everything that cannot be served exactly.
        """
        if not isinstance(quantization_config, Mapping):
            raise ValueError(f"quantization_config: got {quantization_config!r}; allowed: a mapping")
        if isinstance(quantization_config.get("quantization"), Mapping):
            return cls._parse_modelopt(quantization_config["quantization"], "quantization_config.quantization", legacy=True)
        if is_own(quantization_config):
            _check_group_size(quantization_config.get("group_size", GROUP_SIZE), "quantization_config.group_size")
            return cls(kind="nvfp4")
        method = str(quantization_config["quant_method"]).lower()
        if method in _MODELOPT_METHODS:
            return cls._parse_modelopt(quantization_config, "quantization_config", legacy=False)
        if method == "compressed-tensors":
            return cls._parse_compressed_tensors(quantization_config)
        raise ValueError(
            f"quantization_config.quant_method: got {quantization_config['quant_method']!r}; allowed: 'nvfp4', "
            "'modelopt', 'modelopt_fp4', 'compressed-tensors'"
        )

    @classmethod
    def _parse_modelopt(cls, config: Mapping[str, Any], where: str, legacy: bool) -> CheckpointFormat:
        algorithm = config.get("quant_algo")
        if str(algorithm).upper() not in _MODELOPT_ALGORITHMS:
            raise ValueError(f"{where}.quant_algo: got {algorithm!r}; allowed: 'NVFP4', 'W4A16_NVFP4'")
        for key in ("has_zero_point", "pre_quant_scale"):
            if config.get(key):
                raise ValueError(f"{where}.{key}: got {config[key]!r}; allowed: False or absent")
        static = _MODELOPT_ALGORITHMS[str(algorithm).upper()]
        group_size = config.get("group_size")
        groups = config.get("config_groups") or {}
        if groups:
            # The newer form tells of weight-only layers here, under the quant_algo NVFP4.
            static = _parse_groups(groups, f"{where}.config_groups")
        _check_group_size(GROUP_SIZE if group_size is None else group_size, f"{where}.group_size")
        key = "exclude_modules" if legacy else "ignore"
        kv_cache = config.get("kv_cache_quant_algo")
        if kv_cache is None and isinstance(scheme := config.get("kv_cache_scheme"), Mapping):
            kv_cache = _scheme_name(scheme)
        return cls(
            kind="modelopt",
            ignore=_patterns(config.get(key), f"{where}.{key}"),
            targets=_targets(groups, f"{where}.config_groups"),
            static_activations=static,
            kv_cache=kv_cache,
        )

    @classmethod
    def _parse_compressed_tensors(cls, config: Mapping[str, Any]) -> CheckpointFormat:
        where = "quantization_config"
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise ValueError(f"{where}.config_groups: got {groups!r}; allowed: a mapping with at least one group")
        static = _parse_groups(groups, f"{where}.config_groups")
        formats = {f"{where}.format": config.get("format")}
        formats |= {f"{where}.config_groups.{name}.format": group.get("format") for name, group in groups.items()}
        for key, value in formats.items():
            if value not in (None, "nvfp4-pack-quantized"):
                raise ValueError(f"{key}: got {value!r}; allowed: 'nvfp4-pack-quantized'")
        for key in ("sparsity_config", "transform_config"):
            if value := config.get(key):
                if isinstance(value, Mapping) and value.get("format") == "dense":
                    continue
                raise ValueError(f"{where}.{key}: got {value!r}; allowed: absent or empty")
        status = config.get("quantization_status", "compressed")
        if status != "compressed":
            raise ValueError(f"{where}.quantization_status: got {status!r}; allowed: 'compressed'")
        scheme = config.get("kv_cache_scheme")
        return cls(
            kind="compressed-tensors",
            ignore=_patterns(config.get("ignore"), f"{where}.ignore"),
            targets=_targets(groups, f"{where}.config_groups"),
            static_activations=static,
            kv_cache=_scheme_name(scheme) if isinstance(scheme, Mapping) else None,
        )


def _check_group_size(value: Any, key: str) -> None:
    if value == 32:
        raise ValueError(f"{key}: got 32, which is mxfp4, another format; allowed: {GROUP_SIZE} (nvfp4)")
    if value != GROUP_SIZE:
        raise ValueError(f"{key}: got {value!r}; allowed: {GROUP_SIZE}")


def _parse_groups(groups: Any, where: str) -> bool:
    """Check that every group is NVFP4; whether layers have a static activation scale."""
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise ValueError(f"{where}: got {groups!r}; allowed: a mapping of names to groups")
    static: set[bool] = set()
    for name, group in groups.items():
        _check_tensor(group.get("weights"), f"{where}.{name}.weights")
        activations = group.get("input_activations")
        if activations:
            _check_tensor(activations, f"{where}.{name}.input_activations")
        if group.get("output_activations"):
            raise ValueError(f"{where}.{name}.output_activations: got {group['output_activations']!r}; allowed: null or absent")
        # True is a fully dynamic quantizer (no scale in the checkpoint); "local" keeps a static global scale.
        static.add(bool(activations) and activations.get("dynamic") is not True)
    if len(static) > 1:
        raise ValueError(f"{where}: some groups have static input_activations and others none; allowed: one kind for all")
    return static == {True}


def _check_tensor(tensor: Any, where: str) -> None:
    if not isinstance(tensor, Mapping):
        raise ValueError(f"{where}: got {tensor!r}; allowed: the arguments of a 4-bit float quantizer")
    _check_group_size(tensor.get("group_size", GROUP_SIZE), f"{where}.group_size")
    for key, allowed in (("num_bits", 4), ("type", "float")):
        if tensor.get(key) != allowed:
            raise ValueError(f"{where}.{key}: got {tensor.get(key)!r}; allowed: {allowed!r}")
    # ModelOpt leaves these out.
    for key, default in (("strategy", "tensor_group"), ("symmetric", True)):
        if tensor.get(key, default) != default:
            raise ValueError(f"{where}.{key}: got {tensor.get(key)!r}; allowed: {default!r}")


def _targets(groups: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The union of the groups' targets; () where it is every linear layer."""
    targets: list[str] = []
    for name, group in groups.items():
        for target in _patterns(group.get("targets", ["Linear"]), f"{where}.{name}.targets"):
            # A class name has no dots; only that of every linear layer says which modules are meant.
            if target == "Linear":
                return ()
            if target[0].isupper() and target.isidentifier():
                raise ValueError(
                    f"{where}.{name}.targets: got the class {target!r}; allowed: 'Linear', module names or 're:...'"
                )
            targets.append(target)
    return tuple(targets)


def _patterns(value: Any, key: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str) or not all(isinstance(entry, str) for entry in value):
        raise ValueError(f"{key}: got {value!r}; allowed: a list of strings")
    try:
        return tuple(check_pattern(entry) for entry in value)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def _scheme_name(scheme: Mapping[str, Any]) -> str:
    kind = {"float": "FP", "int": "INT"}.get(str(scheme.get("type")), str(scheme.get("type")))
    return f"{kind}{scheme.get('num_bits')}"
