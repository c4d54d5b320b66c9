"""What a layer's parameters hold before vLLM loads into them, and whether all of their values came: vLLM processes layers
either way, and what did not come is whatever memory held."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from functools import wraps
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import CopyCounter
from vllm.model_executor.model_loader.reload.utils import get_tensor_load_numel

Layer = Any
"""A module of vLLM's. To a type checker its attributes, which come as it is built, would be tensors or modules."""


def loads_dummy_weights() -> bool:
    """Whether the model that is being built gets random weights instead of a checkpoint's."""
    return get_current_vllm_config().load_config.load_format == "dummy"


def codes(*shape: int) -> torch.Tensor:
    """Storage for packed codes. vLLM's dummy loader leaves integers alone, so they are drawn here for it: how fast a GPU runs
    depends on what bits it moves."""
    if not loads_dummy_weights():
        return torch.empty(shape, dtype=torch.uint8)
    device = torch.get_default_device()
    generator = torch.Generator(device=device).manual_seed(0)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator, device=device)


def check_loaded(layer: Layer, name: str, dummy: bool) -> None:
    """ValueError if vLLM processes a layer of which some weights never came: they would be whatever memory held."""
    info = get_layerwise_info(layer)
    if not dummy and info.load_numel_total and info.load_numel < info.load_numel_total:
        raise ValueError(
            f"{name}: the checkpoint holds {info.load_numel} of the {info.load_numel_total} values of this layer's weights"
        )


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
