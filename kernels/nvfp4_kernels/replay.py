"""Layers whose launches are prepared once: an eager step of a large model waits for its host long before its GPU.

What a layer launches, and with which numbers, follows from the shapes it is called with; only the addresses differ from call
to call, and from one layer of a model to the next. So the third call of an op with the same shapes no longer runs its Python:
the second recorded its launches, each pointer as an offset into an argument or into the memory that the op allocated. And
where all memory lies where it lay in a call before, as it mostly does, Triton's Python does not run either.

Whatever a recording cannot repeat (an operation of torch that computes, a Triton kernel that was not launched by
triton/launch.py, an address that belongs to nothing known) makes the op run as it is written, with these shapes, for ever. Who
calls what neither torch nor Triton sees, a kernel of another library, says so by `unrepeatable`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

_LOG = logging.getLogger(__name__)
_ALIGNMENT = 512  # of an allocation, as torch's own
_MAX_PROGRAMS = 4096  # of an op; each is some kilobytes
_MAX_KNOWN = 8192  # calls whose launches are kept with their addresses, likewise
_ONCE, _AS_WRITTEN = "called once", "cannot be replayed"

_aten = torch.ops.aten
_ALLOCATIONS = {_aten.empty, _aten.new_empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty_strided}
_REPEATABLE = {_aten._scaled_mm}


class Pointer(NamedTuple):
    """`offset` bytes into memory of this number: an argument that is a tensor, the arena, or a tensor of the call's own."""

    memory: int
    offset: int


class _View(NamedTuple):
    """A tensor by its number, or a view of it."""

    memory: int
    layout: tuple[torch.Size, tuple[int, ...], int] | None = None  # shape, strides, offset

    def of(self, tensors: list[Any]) -> torch.Tensor:
        tensor = tensors[self.memory]
        return tensor if self.layout is None else tensor.as_strided(*self.layout)


Call = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function and its arguments."""


@dataclass
class _Launch:
    """One kernel: everything that its launch takes but the stream and the addresses."""

    prepare: Callable[..., Call]  # takes what Triton's launcher takes, and says what that would call
    grid: tuple[int, int, int]
    function: int
    metadata: Any
    arguments: list[Any]
    pointers: list[tuple[int, Pointer]]
    descriptors: list[tuple[int, Pointer, Callable[[int], Any]]]

    def call(self, addresses: Sequence[int], stream: int) -> Call:
        arguments = self.arguments[:]
        for at, (memory, offset) in self.pointers:
            arguments[at] = addresses[memory] + offset
        for at, (memory, offset), moved in self.descriptors:
            arguments[at] = moved(addresses[memory] + offset)
        return self.prepare(*self.grid, stream, self.function, self.metadata, None, None, None, *arguments)


@dataclass
class _Operation:
    """An operation of torch whose result is a tensor of the call's own."""

    function: Callable[..., torch.Tensor]
    arguments: list[Any]
    keywords: dict[str, Any]
    result: int

    def __call__(self, addresses: list[int], tensors: list[Any]) -> None:
        arguments = [a.of(tensors) if isinstance(a, _View) else a for a in self.arguments]
        keywords = {key: a.of(tensors) if isinstance(a, _View) else a for key, a in self.keywords.items()}
        result = self.function(*arguments, **keywords)
        tensors[self.result] = result
        addresses[self.result] = result.data_ptr()


_known: dict[tuple[Any, ...], list[Call]] = {}  # program, stream and addresses -> the calls of its launches


@dataclass(eq=False)
class Program:
    """What a call with certain shapes does. Memory is numbered: arguments that are tensors, the arena, tensors of its own."""

    inputs: list[int]  # positions of the arguments that are tensors
    arena: int  # bytes
    makers: list[Callable[[], torch.Tensor] | None]  # of its own tensors; None: an operation makes it
    steps: list[_Launch | _Operation]
    results: list[_View]
    single: bool
    launches: list[_Launch] = field(init=False)  # all steps, or none where an operation of torch is among them

    def __post_init__(self) -> None:
        launches = [step for step in self.steps if isinstance(step, _Launch)]
        self.launches = launches if len(launches) == len(self.steps) else []

    def __call__(self, args: tuple[Any, ...]) -> Any:
        tensors: list[Any] = [args[i] for i in self.inputs]
        device = tensors[0].device
        tensors.append(torch.empty(self.arena, dtype=torch.uint8, device=device) if self.arena else None)
        tensors += [make and make() for make in self.makers]
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        stream = torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
        if self.launches:
            for function, arguments in self._calls(addresses, stream):
                function(*arguments)
        else:
            for step in self.steps:
                if isinstance(step, _Launch):
                    function, arguments = step.call(addresses, stream)
                    function(*arguments)
                else:
                    step(addresses, tensors)
        results = [view.of(tensors) for view in self.results]
        return results[0] if self.single else tuple(results)

    def _calls(self, addresses: list[int], stream: int) -> list[Call]:
        key = (self, stream, *addresses)
        calls = _known.get(key)
        if calls is None:
            calls = [launch.call(addresses, stream) for launch in self.launches]
            if stream and torch._C._cuda_isCurrentStreamCapturing():
                return calls  # nobody comes back to the addresses of a graph that is being captured
            if len(_known) >= _MAX_KNOWN:
                _known.pop(next(iter(_known)), None)
            _known[key] = calls
        return calls


@dataclass(eq=False)
class _Root:
    """Memory that pointers may lie in. The tensor is kept so that nothing else gets the same memory while it is recorded."""

    tensor: torch.Tensor
    argument: int | None = None
    make: Callable[[], torch.Tensor] | None = None
    movable: bool = False  # into the arena
    start: int = field(init=False)
    end: int = field(init=False)

    def __post_init__(self) -> None:
        span = sum((size - 1) * stride for size, stride in zip(self.tensor.shape, self.tensor.stride(), strict=True)) + 1
        self.start = self.tensor.data_ptr()
        self.end = self.start + (span * self.tensor.element_size() if self.tensor.numel() else 0)


@dataclass(eq=False)
class _Seen:
    """An operation of torch in a recording, and the memory of its result."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    root: _Root


class _Unrepeatable(Exception):
    """Says why a call cannot be recorded."""


def _is_view(function: torch._ops.OpOverload) -> bool:
    """Whether all that it returns shares memory with what it takes, unchanged."""
    returns = function._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


class Recording(TorchDispatchMode):
    """Sees the allocations and operations of one call; `launched` and `asked` tell it the rest."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        super().__init__()
        self._roots = [_Root(a, argument=i) for i, a in enumerate(args) if isinstance(a, torch.Tensor)]
        self._events: list[_Seen | tuple[Any, tuple[int, ...], tuple[Any, ...]]] = []
        self._problem: str | None = None
        self._launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.overloadpacket in _ALLOCATIONS:
            self._allocated(result)
        elif func.overloadpacket in _REPEATABLE:
            self._roots.append(_Root(result))
            self._events.append(_Seen(func, args, kwargs, self._roots[-1]))
        elif not _is_view(func):
            self.refuse(f"{func} computes")
        return result

    def refuse(self, reason: str) -> None:
        self._problem = self._problem or reason

    def _allocated(self, tensor: torch.Tensor) -> None:
        shape, dtype, device = tensor.shape, tensor.dtype, tensor.device
        if not tensor.is_contiguous():
            self.refuse("an allocation is not contiguous")
        make = lambda: torch.empty(shape, dtype=dtype, device=device)  # noqa: E731
        self._roots.append(_Root(tensor, make=make, movable=True))

    def asked(self, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        with _disable_current_modes():
            tensor = make()
        self._roots.append(_Root(tensor, make=make))
        return tensor

    def launched(self, compiled: Any, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        self._launches += 1
        self._events.append((compiled, grid, arguments))

    def expect_launches(self, count: int) -> None:
        """There were so many launches of Triton kernels."""
        if count != self._launches:
            self.refuse(f"{count - self._launches} kernels were not launched by launch()")

    def _find(self, address: int) -> tuple[_Root, int]:
        found = [root for root in self._roots if root.start <= address < root.end]
        if len(found) != 1:
            raise _Unrepeatable(f"{len(found)} tensors hold an address")
        return found[0], address - found[0].start

    def _holder(self, tensor: torch.Tensor) -> _Root:
        """Whose memory a tensor is a view of; one without values is its own."""
        if tensor.numel():
            return self._find(tensor.data_ptr())[0]
        found = next((root for root in self._roots if root.tensor is tensor), None)
        if found is None:
            raise _Unrepeatable("an empty tensor is a view")
        return found

    def program(self, result: Any) -> Program:
        """What was recorded, whose outcome was `result`. Raises _Unrepeatable."""
        if self._problem:
            raise _Unrepeatable(self._problem)
        single = isinstance(result, torch.Tensor)
        results = [result] if single else list(result)
        # What torch gets to see has to be a tensor; all else lies in one allocation, the arena.
        seen = [*results]
        for event in self._events:
            if isinstance(event, _Seen):
                seen += [a for a in (*event.args, *event.kwargs.values()) if isinstance(a, torch.Tensor)]
        exposed = {id(self._holder(tensor)) for tensor in seen}
        inputs = [root for root in self._roots if root.argument is not None]
        inner = [root for root in self._roots if root.movable and id(root) not in exposed]
        owned = [root for root in self._roots if root not in inputs and root not in inner]
        place = {id(root): Pointer(i, 0) for i, root in enumerate(inputs)}
        place |= {id(root): Pointer(len(inputs) + 1 + i, 0) for i, root in enumerate(owned)}
        arena = 0
        for root in inner:
            place[id(root)] = Pointer(len(inputs), arena)
            arena += -(-(root.end - root.start) // _ALIGNMENT) * _ALIGNMENT

        def pointer(address: int) -> Pointer:
            root, offset = self._find(address)
            memory, start = place[id(root)]
            return Pointer(memory, start + offset)

        def view(tensor: torch.Tensor) -> _View:
            root = self._holder(tensor)
            offset = tensor.data_ptr() - root.start
            memory = place[id(root)].memory
            if root.tensor.dtype == tensor.dtype:
                if root.tensor.shape == tensor.shape and root.tensor.stride() == tensor.stride() and not offset:
                    return _View(memory)
                if root.argument is None:
                    return _View(memory, (tensor.shape, tensor.stride(), offset // tensor.element_size()))
            raise _Unrepeatable("torch sees an argument or an allocation as something else")

        def viewed(value: Any) -> Any:
            return view(value) if isinstance(value, torch.Tensor) else value

        steps: list[_Launch | _Operation] = []
        for event in self._events:
            if isinstance(event, _Seen):
                keywords = {key: viewed(value) for key, value in event.kwargs.items()}
                made = place[id(event.root)].memory
                steps.append(_Operation(event.function, [viewed(a) for a in event.args], keywords, made))
            else:
                steps.append(_prepared(*event, pointer))
        if any(self._holder(tensor).argument is not None for tensor in results):
            raise _Unrepeatable("it returns an argument")
        return Program(
            [root.argument for root in inputs if root.argument is not None],
            arena,
            [root.make for root in owned],
            steps,
            [view(tensor) for tensor in results],
            single,
        )


def _prepared(compiled: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], pointer: Callable[[int], Pointer]) -> _Launch:
    from .triton.descriptors import moved
    from .triton.launch import taken_apart

    pointers, descriptors = [], []
    template = list(arguments)
    for at, argument in enumerate(arguments):
        if isinstance(argument, torch.Tensor):
            # Nobody reads or writes through the pointer to nothing.
            template[at] = 0
            if argument.numel():
                pointers.append((at, pointer(argument.data_ptr())))
        elif hasattr(argument, "block_shape"):
            template[at] = None
            descriptors.append((at, pointer(argument.base.data_ptr()), moved(argument)))
    x, y, z = (*grid, 1, 1)[:3]
    prepare = taken_apart(compiled.run)
    return _Launch(prepare, (x, y, z), compiled.function, compiled.packed_metadata, template, pointers, descriptors)


_current = threading.local()


def launched(compiled: Any, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
    """Tell a recording that `compiled` was launched with these arguments, constants among them."""
    recording = getattr(_current, "recording", None)
    if recording is not None:
        recording.launched(compiled, grid, arguments)


def asked(make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """make(), which a replay calls again: a tensor that outlives the call, whatever made it."""
    recording = getattr(_current, "recording", None)
    return make() if recording is None else recording.asked(make)


def unrepeatable(reason: str) -> None:
    """What follows cannot be replayed."""
    recording = getattr(_current, "recording", None)
    if recording is not None:
        recording.refuse(reason)


@contextlib.contextmanager
def _recorded(args: tuple[Any, ...], hooks: Any) -> Iterator[Recording]:
    """A recording of what happens within, which notices kernels that nobody tells it of."""
    recording = Recording(args)
    thread, launches = threading.get_ident(), 0

    def count(metadata: Any) -> None:
        nonlocal launches
        launches += threading.get_ident() == thread

    hooks.add(count)
    _current.recording = recording
    try:
        with recording:
            yield recording
    finally:
        _current.recording = None
        hooks.remove(count)
    recording.expect_launches(launches)


def _signature(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What decides about the launches of a call, and about the code that Triton compiles for them."""
    described = [(a.dtype, a.shape, a.stride(), a.data_ptr() & 15) if isinstance(a, torch.Tensor) else a for a in args]
    return (args[0].get_device(), *described)


@functools.cache
def _triton_runtime() -> Any:
    from triton import knobs  # not before a kernel runs

    return knobs.runtime


def replayed(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of positional arguments, the first a tensor, and of no other state, replayed from the third call on that has
    the same shapes. It returns tensors that it made. On a CPU it runs as it is written.

    Its tensors' GPU is the current one within: Triton launches there, and nobody else sees to it for an op in Python.
    """
    programs: dict[tuple[Any, ...], Program | str] = {}

    def call(*args: Any) -> Any:
        x = args[0]
        if not x.is_cuda:
            return function(*args)
        if x.get_device() != torch._C._cuda_getDevice():
            with torch.cuda.device(x.device):
                return call(*args)
        hooks = _triton_runtime().launch_enter_hook
        if hooks.calls:  # a profiler, which wants to see the launches as Triton makes them
            return function(*args)
        signature = _signature(args)
        program = programs.get(signature)
        if isinstance(program, Program):
            return program(args)
        if program is None:
            if len(programs) >= _MAX_PROGRAMS:
                programs.pop(next(iter(programs)))
            programs[signature] = _ONCE
        elif program == _ONCE:
            with _recorded(args, hooks) as recording:
                result = function(*args)
            try:
                programs[signature] = recording.program(result)
            except _Unrepeatable as reason:
                programs[signature] = _AS_WRITTEN
                _LOG.debug("%s runs as it is written: %s", getattr(function, "__name__", function), reason)
            return result
        return function(*args)

    return call
