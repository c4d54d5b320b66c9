"""`QuantizationPlan`: which of a model's modules are quantized, from what and how. Both frameworks ask it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from nvfp4_configs import CheckpointFormat, Nvfp4Config, PackedModules
from nvfp4_configs.patterns import matches, parts_of

from .checkpoint import MODELOPT, PACKED, PLAIN, CheckpointIndex, TensorNames, tensor_names

logger = logging.getLogger("nvfp4_plugin")

ROUTERS = ("gate", "router", "shared_expert_gate", "shared_experts_gate")
"""Last components of the layers that choose experts or weigh the shared one: small, and a wrong choice costs much."""

EXPERT_PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""What checkpoints call an expert's gate, up and down projections."""

RESOLVED_KEY = "nvfp4_resolved"
"""Where vLLM's additional config holds what all options come to."""

Mapper = Callable[[list[str]], list[str]]
"""A checkpoint's names to a framework's; it may drop some."""


def is_router(name: str) -> bool:
    """Whether the module `name` is an MoE router, by its name."""
    return name.rpartition(".")[2] in ROUTERS


def warn_misnamed(keys: Iterable[str], channel: str) -> None:
    """A warning for each of the keys of `channel` that looks like the one of our options, `nvfp4`, and is another."""
    for key in keys:
        if key.lower().startswith("nvfp") and key not in ("nvfp4", RESOLVED_KEY):
            logger.warning("nvfp4: %s: nothing reads the key %r; options are read from 'nvfp4'", channel, key)


def expert_parts(experts: int, projections: Sequence[str]) -> list[str]:
    """The parts of a routed-experts module named `experts`, for a `PackedModules` mapping."""
    return [f"experts.{expert}.{projection}" for expert in range(experts) for projection in projections]


class QuantizationPlan:
    """The options of one model and what its checkpoint holds.

    `quantization_config` is the checkpoint's dict, or None for one that is not quantized; `channel` is how a user gives the
    framework options for this plugin. ValueError where it asks for something that cannot be served.
    """

    def __init__(
        self, quantization_config: Mapping[str, Any] | None = None, channel: str = "--additional-config nvfp4"
    ) -> None:
        self._quantization_config = quantization_config
        self._channel = channel
        self._format = None if quantization_config is None else CheckpointFormat.parse(quantization_config)
        self._options: Nvfp4Config | None = None
        self._mappers: list[Mapper] = []
        self._index: CheckpointIndex | None = None
        self._modules: dict[str, str] | None = None
        self._asked: dict[str, PackedModules] = {}
        self._warned = False

    @property
    def online(self) -> bool:
        """Whether the checkpoint holds plain weights, to be quantized while they load."""
        return self._format is None or self._format.kind == "nvfp4"

    @property
    def format(self) -> CheckpointFormat:
        """The form of a quantized checkpoint."""
        assert self._format is not None
        assert not self.online
        return self._format

    @property
    def names(self) -> TensorNames:
        """The tensor names of the checkpoint; of ModelOpt, for what is quantized online."""
        return MODELOPT if self.online else tensor_names(self.format)

    @property
    def options(self) -> Nvfp4Config:
        """The resolved options; `configure` comes first."""
        assert self._options is not None, "configure() comes first"
        return self._options

    @property
    def configured(self) -> bool:
        """Whether `configure` has been called."""
        return self._options is not None

    def configure(self, additional: Mapping[str, Any] | None = None) -> None:
        """Resolve the options; `additional` is what the framework's command line holds for this plugin."""
        options = Nvfp4Config.resolve(self._quantization_config, additional, channel=self._channel)
        if options.activation == "nvfp4_per_tensor" and not self.static_activations:
            holder = "a checkpoint that is not quantized" if self.online else "this weight-only checkpoint"
            raise ValueError(
                f"activation: got 'nvfp4_per_tensor', which needs static input scales, and {holder} has none; "
                "allowed: 'auto', 'nvfp4_per_token', 'fp8_per_token', 'none'"
            )
        if options.backend in ("cuda", "reference"):
            if "sf_layout" in options.model_fields_set:
                logger.warning(
                    "nvfp4: sf_layout has no effect with the backend %r, whose layers use no layout", options.backend
                )
        elif options.sf_layout != "layout_128x4":
            raise ValueError(
                f"sf_layout: got {options.sf_layout!r}, and the GEMMs of the backend {options.backend!r} read another one; "
                "allowed: 'layout_128x4'"
            )
        self._options = options

    @property
    def static_activations(self) -> bool:
        """Whether quantized layers of the checkpoint come with static input scales."""
        return not self.online and self.format.static_activations

    @property
    def uses_input_scales(self) -> bool:
        """Whether the layers need the checkpoint's static input scales at run time."""
        return self.options.activation == "nvfp4_per_tensor"

    @property
    def required(self) -> list[str]:
        """The tensors of a quantized module that its layer needs: input scales may be missing where they are not used."""
        names = self.names
        return [names.weight, names.scale, names.global_scale, *([names.input_scale] if self.uses_input_scales else [])]

    def inspect(self, model: str, revision: str | None = None) -> None:
        """Read the headers of `model` if it is on this machine. ValueError naming tensor and file if it cannot be served."""
        if self._index is not None:
            return
        self._index = CheckpointIndex.find(model, revision)
        if self._index is None:
            return
        if not self.online:
            self._index.check(self.names)
        elif quantized := self._index.quantized_modules():
            raise ValueError(
                f"quantization_config says that the weights are not quantized, but {quantized[0]} and {len(quantized) - 1} "
                f"other modules of {model} are in NVFP4: leave the checkpoint's own quantization_config in place and give "
                f"options through {self._channel}"
            )

    def rename(self, mapper: Mapper) -> None:
        """Follow a framework that renames modules: `mapper` turns the checkpoint's names into the framework's.

        A model and the models inside it may each bring a mapper: they apply one after the other.
        """
        self._mappers.append(mapper)
        self._modules = None
        if self._format is not None:
            ignore, targets = (_renamed(patterns, [mapper]) for patterns in (self._format.ignore, self._format.targets))
            self._format = self._format.model_copy(update={"ignore": ignore, "targets": targets})

    def _in_checkpoint(self, module: str) -> str:
        """What the checkpoint calls the framework's `module`."""
        assert self._index is not None
        if self._modules is None:
            # By tensors: mappers are made for them, and many know "lm_head." or "router.weight" but not the bare module.
            tensors = {tensor: tensor for tensor in self._index.tensors}
            for mapper in self._mappers:
                tensors |= {new: tensor for name, tensor in tensors.items() for new in mapper([name])}
            self._modules = {name.rpartition(".")[0]: tensor.rpartition(".")[0] for name, tensor in tensors.items()}
        return self._modules.get(module, module)

    def quantizes(self, name: str, packed: PackedModules | None = None, *, lm_head: bool = False, router: bool = False) -> bool:
        """Whether the module `name` runs in NVFP4; `packed` maps fused modules to their parts.

        Routers and the language-model head stay as they are unless the options (`lm_head`) or the checkpoint itself say
        otherwise. ValueError where `ignore` means only some parts of a fused module, or the checkpoint's weights do not fit.
        """
        self._asked[name] = packed or {}
        options = self.options.model_copy(update={"ignore": _renamed(self.options.ignore, self._mappers)})
        if options.ignores(name, packed):
            quantized = False
        elif self.online:
            quantized = not router and (not lm_head or options.lm_head)
        elif self.format.ignores(name, packed):
            quantized = False
        elif router or lm_head:
            quantized = lm_head if self._index is None else self._index.is_quantized(self._in_checkpoint(name))
        else:
            quantized = True
        self._check_weights(name, packed, options.ignore, quantized)
        return quantized

    def _check_weights(self, name: str, packed: PackedModules | None, ignore: Sequence[str], quantized: bool) -> None:
        """ValueError where the checkpoint holds the module `name`, or a part of it, in another form than it is read in."""
        if self._index is None:
            return
        wanted = (PACKED,) if quantized and not self.online else PLAIN
        # A fused module may be fused in the checkpoint, too.
        named = {part: self._in_checkpoint(part) for part in (name, *parts_of(name, packed))}
        held = {part: weight for part, module in named.items() if (weight := self._index.weight_of(module)) is not None}
        wrong = [part for part, weight in held.items() if weight.dtype not in wanted]
        if not wrong:
            return
        part, weight = wrong[0], held[wrong[0]]
        module = named[part]
        if wanted == PLAIN:
            patterns = ignore if self._format is None else (*ignore, *self._format.ignore)
            pattern = next((pattern for pattern in patterns if matches(pattern, name) or matches(pattern, part)), None)
            taken = "taken for unquantized" if pattern is None else f"ignored by {pattern!r}"
            form = "in NVFP4" if weight.dtype == PACKED else f"as {weight.dtype}"
            raise ValueError(f"{module}: {taken}, but {weight.file} holds it {form}")
        if len(wrong) < len(held):
            other = next(named[part] for part in held if part not in wrong)
            what = f"but {other} is in NVFP4: they run as one layer, which cannot be half quantized"
        elif weight.dtype in PLAIN:
            what = f"not in NVFP4: add {name!r} to `ignore` to serve it as it is"
        else:
            what = f"allowed: {PACKED} (NVFP4)"
        raise ValueError(f"{module}.{MODELOPT.weight} in {weight.file} is {weight.dtype}, {what}")

    def warn_unmatched(self) -> None:
        """Once, after the whole model has been built: a warning for every entry of the options' `ignore` that meant nothing."""
        if self._warned:
            return
        self._warned = True
        names = {part for name, packed in self._asked.items() for part in (name, *parts_of(name, packed))}
        for pattern in self.options.ignore:
            single = self.options.model_copy(update={"ignore": _renamed((pattern,), self._mappers)})
            if len(single.unmatched(names)) == len(single.ignore):
                logger.warning(
                    "nvfp4: ignore matches nothing: %r means none of the %d layers that could be quantized, such as %s",
                    pattern,
                    len(self._asked),
                    ", ".join(sorted(self._asked)[:3]),
                )

    def part_names(self, name: str, count: int, packed: PackedModules | None = None) -> list[str]:
        """The checkpoint's names of the `count` logical matrices of the module `name`, for messages."""
        parts = parts_of(name, packed)
        return parts if len(parts) == count else [name] * count

    def expert_projections(self, name: str) -> tuple[str, str, str]:
        """What the checkpoint calls the gate, up and down projections of the routed experts `name`."""
        for projections in EXPERT_PROJECTIONS:
            if self._index is not None and self._index.weight_of(self._in_checkpoint(f"{name}.0.{projections[0]}")):
                return projections
        return EXPERT_PROJECTIONS[0]

    def describe(self, tensor: str) -> str:
        """What the checkpoint calls the framework's `tensor`, with its file, where that is known."""
        if self._index is None:
            return tensor
        module, _, last = tensor.rpartition(".")
        return self._index.describe(f"{self._in_checkpoint(module)}.{last}")


def _renamed(patterns: Sequence[str], mappers: Sequence[Mapper]) -> tuple[str, ...]:
    """`patterns`, and what each mapper in turn makes of them."""
    out = list(patterns)
    for mapper in mappers:
        for pattern in tuple(out):
            if pattern.startswith("re:"):
                continue
            # A mapper works on whole components: "tower*" stands for "tower" and "tower.*" as well.
            stem = pattern[:-1] if pattern.endswith("*") and not pattern.endswith(".*") else None
            out += mapper([pattern] if stem is None else [stem, f"{stem}.*"])
    return tuple(dict.fromkeys(out))
