"""How much of a layer in NVFP4 has come. vLLM processes layers whether all of their values were loaded or not, and those that
were not are whatever memory held."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from functools import wraps
from typing import Any

import torch
from vllm.model_executor.model_loader.reload.meta import CopyCounter
from vllm.model_executor.model_loader.reload.utils import get_tensor_load_numel

Layer = Any
"""A module of vLLM's. To a type checker its attributes, which come as it is built, would be tensors or modules."""


class Received:
    """The numbers of values that were loaded into the parameters of a layer, its `quant_method.received`."""

    def __init__(self) -> None:
        # By the arguments of a loader as well: what comes twice does not stand for what never came.
        self._counts: defaultdict[str, dict[Hashable, int]] = defaultdict(dict)

    def start(self) -> None:
        """Forget what came before."""
        self._counts.clear()

    def add(self, parameter: str, arguments: Hashable, count: int) -> None:
        """A loader that was called with `arguments` has written `count` values."""
        self._counts[parameter][arguments] = count

    def check(self, layer: Layer, name: str, parameters: Iterable[str], dummy: bool) -> None:
        """ValueError that counts, parameter by parameter, what came if that was not all; `dummy` allows for nothing at all."""
        counts, self._counts = self._counts, defaultdict(dict)
        if dummy and not counts:
            return
        missing = []
        for parameter in parameters:
            tensor = getattr(layer, parameter)
            came, expected = sum(counts[parameter].values()), get_tensor_load_numel(tensor)
            # A model may have put a loader of its own in place, as Mamba does: of what that writes nothing is known.
            if came < expected and hasattr(tensor.weight_loader, "counts"):
                missing.append(f"{came} of {expected} of {parameter}")
        if missing:
            raise ValueError(f"{name}: only some of this layer's values came: {', '.join(missing)}")


def counted(load: Callable[..., Any]) -> Callable[..., Any]:
    """`load`, a weight loader for `MethodType(load, layer)`, that tells `Received` what it writes."""

    @wraps(load)
    def loader(layer: Layer, param: torch.Tensor, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        received: Received = layer.quant_method.received
        if param.is_meta:  # vLLM counts what is to be loaded, as it does before it reloads a layer
            received.start()
            return load(layer, param, loaded_weight, *args, **kwargs)
        with CopyCounter() as counter:
            result = load(layer, param, loaded_weight, *args, **kwargs)
        for name, own in layer._parameters.items():
            if own is param and counter.copied_numel:  # nothing for an expert of another rank
                received.add(name, (args, *kwargs.values()), counter.copied_numel)
        return result

    loader.counts = True  # type: ignore[attr-defined]
    return loader
