"""From a checkpoint's tensors to a layer's weights in SGLang, when it starts and when weights are replaced while it runs.

SGLang allocates all parameters, loads all tensors and then processes all layers: a model that is quantized while it loads
would need room for its plain weights. Here the parameters of a layer are empty until the first of its tensors arrives,
and the layer is processed as soon as the last one has.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.quantization.online_quantization import CopyNumelCounter

from nvfp4_kernels import Nvfp4Weight

from .. import layers

INPUT_SCALE = "input_decode_scale"
"""The parameter that holds a layer's static input scale, where it is used."""

Layer = Any
"""A torch.nn.Module of SGLang, with the attributes that SGLang and this package keep on it."""
Tensors = dict[str, torch.Tensor]
MakeParameter = Callable[[torch.Tensor, Callable[..., None]], torch.nn.Parameter]
"""Puts storage and a weight loader into a parameter of the kind that SGLang's loading code expects."""


@dataclass(frozen=True)
class Slot:
    """A parameter that tensors of a checkpoint are loaded into."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: MakeParameter
    dummy: float | None = None
    """What load_format="dummy" puts here; None stands for random values."""
    padding: int = 0
    """How many of the values are in no checkpoint."""

    @property
    def expected(self) -> int:
        return torch.Size(self.shape).numel() - self.padding


class LayerWeights:
    """The parameters of one layer: while it loads those of `slots`, afterwards those that it runs with.

    process: makes the parameters to run with, by name, of what was loaded into the slots, by name; it describes tensors in
        messages with what it gets besides.
    weight_loader: SGLang's for this layer.
    describe: adds to a tensor's name the file of the checkpoint that it came from.
    """

    def __init__(
        self,
        layer: Layer,
        name: str,
        slots: dict[str, Slot],
        process: Callable[[Tensors, layers.Describe], dict[str, torch.Tensor | None]],
        weight_loader: Callable[..., None],
        *,
        describe: layers.Describe,
        dummy: bool,
    ) -> None:
        self._name = name
        self._slots = slots
        self._process = process
        self._weight_loader = weight_loader
        self._describe = describe
        self._dummy = dummy
        self._device = torch.get_default_device()
        self._lock = threading.Lock()
        self._running: dict[str, torch.nn.Parameter | None] = {}
        self._loading = False
        self.open(layer)

    def open(self, layer: Layer) -> None:
        """Give `layer` empty parameters to load into; what was loaded into earlier ones is forgotten.

        What the layer runs with is kept, and used, until it is replaced.
        """
        if self._loading:
            self._drop(layer)
        else:
            for name in self._running:
                del layer._parameters[name]
        self._loading = True
        self._received = dict.fromkeys(self._slots, 0)
        for name, slot in self._slots.items():
            empty = torch.empty(0, dtype=slot.dtype, device=self._device)
            layer.register_parameter(name, slot.make(empty, self._loader(layer, name)))

    def finish(self, layer: Layer) -> None:
        """Everything that was to be loaded has been. A layer that got nothing goes on with what it ran with.

        ValueError that counts, tensor by tensor, what came if that was not all.
        """
        if not self._loading:
            return
        if self._dummy and not self._running:
            self._materialize(layer)
            self._fill(layer)
            self._replace(layer)
        elif self._running and not any(self._received.values()):
            self._drop(layer)
            self._close(layer)
        else:
            expected = {name: slot.expected for name, slot in self._slots.items()}
            missing = [f"{n} of {expected[name]} of {name}" for name, n in self._received.items() if n != expected[name]]
            raise ValueError(f"{self._name}: only some of this layer's values came: {', '.join(missing)}")

    def weight(self, layer: Layer, names: Mapping[str, str]) -> Nvfp4Weight:
        """The weight that the layer runs with, in the parameters `names` (`layers.parameter_names`)."""
        return layers.installed(self._running if self._loading else layer._parameters, names)

    def parameter(self, layer: Layer, name: str) -> torch.Tensor | None:
        """Another parameter that the layer runs with."""
        return self._running[name] if self._loading else getattr(layer, name)

    def _loader(self, layer: Layer, name: str) -> Callable[..., None]:
        """SGLang's weight loader for the parameter `name`, with a count of what it writes."""

        def load(param: torch.nn.Parameter, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            with self._lock:  # experts may come from several threads
                open_ = layer._parameters.get(name) is param
                if open_:
                    self._materialize(layer)
            if not open_:
                return self._load_closed(name, loaded_weight, *args, **kwargs)
            with CopyNumelCounter() as counter:
                self._weight_loader(param, loaded_weight, *args, **kwargs)
            with self._lock:
                self._received[name] += counter.copied_numel
                if all(count == self._slots[slot].expected for slot, count in self._received.items()):
                    self._replace(layer)

        return load

    def _load_closed(self, name: str, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """More for a layer that is whole: an expert of another rank, which SGLang's loader passes over, or an error."""
        try:
            nowhere = torch.empty(0, dtype=self._slots[name].dtype, device=self._device)
            self._weight_loader(self._slots[name].make(nowhere, self._weight_loader), loaded_weight, *args, **kwargs)
        except Exception as error:
            raise ValueError(
                f"{self._name}: more values of {name} came than the layer has. Weights of a running model are replaced with "
                "update_weights_from_disk, or between begin_weight_update and end_weight_update"
            ) from error

    def _materialize(self, layer: Layer) -> None:
        for name, slot in self._slots.items():
            parameter = getattr(layer, name)
            if parameter.shape != slot.shape:
                with self._device:
                    parameter.data = layers.unloaded(*slot.shape, dtype=slot.dtype)

    def _fill(self, layer: Layer) -> None:
        # How fast a GPU runs depends on what bits it moves: codes and plain weights are random.
        generator = torch.Generator(device=self._device).manual_seed(0)
        for name, slot in self._slots.items():
            data = getattr(layer, name).data
            if slot.dummy is not None:
                data.fill_(slot.dummy)
            elif slot.dtype == torch.uint8:
                data.random_(generator=generator)
            else:
                data.normal_(0, 0.02, generator=generator)

    def _replace(self, layer: Layer) -> None:
        """Process what was loaded. CUDA graphs hold on to what the layer runs with, so that is written in place."""
        # What replaces a running layer's weights comes from somewhere else than the checkpoint that it started with.
        describe = str if self._running else self._describe
        with self._device:
            processed = self._process({name: getattr(layer, name).data for name in self._slots}, describe)
        self._drop(layer)
        for name, tensor in processed.items():
            running = self._running.get(name)
            if running is not None and tensor is not None:
                running.data.copy_(tensor)
            else:
                self._running[name] = None if tensor is None else self._parameter(name, tensor)
        self._close(layer)

    def _parameter(self, name: str, tensor: torch.Tensor) -> torch.nn.Parameter:
        parameter = torch.nn.Parameter(tensor, requires_grad=False)
        if name in self._slots:
            parameter.weight_loader = lambda _, *args, **kwargs: self._load_closed(name, *args, **kwargs)  # type: ignore[attr-defined]
        return parameter

    def _close(self, layer: Layer) -> None:
        self._loading = False
        for name, parameter in self._running.items():
            layer.register_parameter(name, parameter)

    def _drop(self, layer: Layer) -> None:
        for name in self._slots:
            # Whoever loads a model holds on to all of its first parameters until the end, but not to their storage.
            parameter = layer._parameters.pop(name)
            assert parameter is not None
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=self._device)
