"""What the host does before a launch, kept short: an eager step of a large model waits for its host long before its GPU.

Triton is not imported here: what is called decides whether kernels run on a GPU or in Triton's interpreter.
"""

from __future__ import annotations

import copy
import threading
import types
from collections.abc import Callable
from typing import Any

import torch

from ..replay import Call, launched

_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Triton's function of this name is made for kernels: on the host, it takes tens of microseconds."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n; n is positive. Triton's is as slow as its `cdiv`."""
    return 1 << (n - 1).bit_length()


def scale_stride(scale: torch.Tensor | None) -> int:
    """How far apart the scales of neighbouring rows lie: one scale may serve all."""
    return 0 if scale is None or scale.numel() == 1 else 1


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """kernel[grid](*args, **constants), without Triton's own look-up of the compiled kernel from the second time on.

    args: the parameters of `kernel` that are not `constexpr`, all of them, and they come first: tensors, descriptors of
    tensors, integers, None. constants: the `constexpr` parameters, and options of the compiler. Triton compiles anew for
    another type, for another alignment of a pointer, and for integers that are 1, multiples of 16 or long: whatever
    combination of these is new here is left to Triton.
    """
    key: list[Any] = [id(kernel), *constants.items()]  # kernels are never deleted
    for arg in args:
        if isinstance(arg, torch.Tensor):
            key.append((arg.dtype, arg.data_ptr() % 16 == 0, arg.device))
        elif type(arg) is int:
            key.append((arg == 1, arg % 16 == 0, arg.bit_length() >> 5))
        elif arg is None or type(arg) is float:
            key.append(type(arg))
        else:
            key.append((arg.base.dtype, *arg.block_shape, arg.layout))
    look_up = tuple(key)
    known = _compiled.get(look_up)
    if known is None:
        compiled = kernel[grid](*args, **constants)
        if compiled is None:  # the interpreter keeps nothing
            return
        constexpr = [p.is_constexpr for p in kernel.params]
        if any(constexpr[: len(args)]) or not all(constexpr[len(args) :]):
            raise TypeError(f"args: got {len(args)}, which are not the parameters of {kernel.__name__} that are no constexpr")
        rest = tuple(constants.get(p.name, p.default) for p in kernel.params[len(args) :])
        _compiled[look_up] = compiled, rest
    else:
        compiled, rest = known
        compiled[(*grid, 1, 1)[:3]](*args, *rest)
    launched(compiled, grid, (*args, *rest))


def taken_apart(launcher: Callable[..., Any]) -> Callable[..., Call]:
    """A function that takes what `launcher` takes, of a compiled kernel, and launches nothing: it returns what to call instead,
    and with which arguments, for a launch in as little Python as there can be.

    Triton's launcher finds scratch memory, encodes descriptors, and calls a function in C with what comes of it. A descriptor's
    code holds its address alone, so these arguments may be kept. A kernel that needs scratch memory is left to `launcher`.
    """
    last = getattr(launcher, "launch", None)
    scratch = ("global_scratch_size", "profile_scratch_size", "gsan_enabled")
    if last is None or any(getattr(launcher, name, 0) for name in scratch):
        return lambda *args: (launcher, args)
    taken: list[tuple[Any, ...]] = []
    alone = threading.Lock()

    def take(*args: Any) -> None:
        taken.append(args)

    probe = copy.copy(launcher)
    probe.launch = take  # type: ignore[attr-defined]
    if isinstance(last, types.FunctionType) and "launcher" in last.__code__.co_freevars:
        # A function of Python that encodes descriptors for the one in C.
        encode, cells = last, list(last.__closure__ or ())
        at = encode.__code__.co_freevars.index("launcher")
        last, cells[at] = cells[at].cell_contents, types.CellType(take)
        probe.launch = types.FunctionType(  # type: ignore[attr-defined]
            encode.__code__, encode.__globals__, encode.__name__, encode.__defaults__, tuple(cells)
        )

    def prepare(*args: Any) -> Call:
        with alone:
            probe(*args)
            return last, taken.pop()

    return prepare
