"""Recorded calls on the CPU: what stands for a kernel here writes to the addresses that it is handed, as one on a GPU would."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nvfp4_kernels import replay
from nvfp4_kernels.replay import Program, asked, launched, unrepeatable


class Hooks:
    """As Triton's chain of launch hooks."""

    def __init__(self) -> None:
        self.calls: list[Callable[[Any], None]] = []
        self.add, self.remove = self.calls.append, self.calls.remove


HOOKS = Hooks()


class Sum:
    """out[i] = a[i] + b[i] + constant of fp32 memory, called as Triton calls a compiled kernel."""

    function, packed_metadata = 7, (1, 2)

    @staticmethod
    def run(x: int, y: int, z: int, stream: int, function: int, metadata: object, *rest: Any) -> None:
        assert (y, z, stream, function, metadata, rest[:3]) == (1, 1, 0, 7, (1, 2), (None, None, None))
        for hook in HOOKS.calls:
            hook(None)
        a, b, out, constant = rest[3:]
        for i in range(x):
            left, right, total = (ctypes.c_float.from_address(address + 4 * i) for address in (a, b, out))
            total.value = left.value + right.value + constant


def unknown_launch(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, constant: float) -> None:
    Sum.run(a.numel(), 1, 1, 0, 7, (1, 2), None, None, None, a.data_ptr(), b.data_ptr(), out.data_ptr(), constant)


def launch(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, constant: float) -> None:
    unknown_launch(a, b, out, constant)
    launched(Sum, (a.numel(),), (a, b, out, constant))


def record(function: Callable[..., Any], *args: torch.Tensor) -> Program:
    with replay._recorded(args, HOOKS) as recording:
        result = function(*args)
    assert not HOOKS.calls
    return recording.program(result)


def check(function: Callable[..., Any], *args: torch.Tensor) -> Program:
    """A program of the function, which does for other arguments what the function does."""
    program = record(function, *args)
    for _ in range(3):
        others = tuple(torch.randn(2 * len(a))[: len(a)] for a in args)
        want, got = function(*others), program(others)
        for w, g in zip(want, got, strict=True) if isinstance(want, tuple) else [(want, got)]:
            assert (w.shape, w.stride(), w.dtype) == (g.shape, g.stride(), g.dtype)
            assert torch.equal(w, g)
    return program


def arguments() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(8), torch.randn(8)


def test_memory_between_launches_is_one_allocation() -> None:
    def function(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        first, second = torch.empty(8), a.new_empty((2, 4))
        launch(a, b, first, 1.0)
        launch(first, a, second.view(8), 2.0)
        out = torch.empty_like(a)
        launch(second[1], first[4:], out, 3.0)  # four values each, at offsets
        launch(second[0], b[:4], out[4:], 4.0)
        return out

    program = check(function, *arguments())
    assert program.arena == 2 * 512
    assert len(program.makers) == 1


def test_launches_are_kept_with_their_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    def function(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        between, out = torch.empty(8), torch.empty(8)
        launch(a, b, between, 1.0)
        launch(between, b, out, 2.0)
        return out

    program = record(function, *arguments())
    monkeypatch.setattr(replay, "_known", {})
    monkeypatch.setattr(replay, "_MAX_KNOWN", 3)
    capturing = False
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: capturing, raising=False)
    first = program._calls([16, 32, 48, 64], 0)
    assert program._calls([16, 32, 48, 64], 0) is first
    for addresses, stream in ([16, 32, 48, 80], 0), ([16, 32, 48, 64], 1):
        assert program._calls(addresses, stream) not in (first, None)
    assert program._calls([16, 32, 48, 64], 0) is first
    program._calls([16, 32, 96, 64], 0)  # a fourth: the first goes
    assert len(replay._known) == 3
    assert program._calls([16, 32, 48, 64], 0) is not first
    kept, capturing = list(replay._known), True
    program._calls([16, 32, 112, 64], 1)
    assert list(replay._known) == kept
    check(function, *arguments())


def test_several_results_and_views_of_them() -> None:
    def function(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        out = torch.empty(2, 4)
        launch(a, b, out.view(8), 0.5)
        return out, out.t(), out[1, 2:]

    assert check(function, *arguments()).arena == 0


def test_operation_of_torch() -> None:
    one = torch.ones(())

    def function(a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        codes = torch.empty(32, 16, dtype=torch.float8_e4m3fn)
        launch(a, b, codes.view(torch.float32).view(-1), 0.0)  # whatever these bytes are as e4m3
        other = torch.empty(16, 16, dtype=torch.float8_e4m3fn)
        launch(b[:64], a[:64], other.view(torch.float32).view(-1), 1.0)
        product = torch._scaled_mm(codes, other.t(), scale_a=scale, scale_b=scale, out_dtype=torch.float32)
        out = torch.empty(8)
        launch(product.view(-1)[:8], a[:8], out, 1.0)
        return out

    args = (torch.rand(128), torch.rand(128), one)
    program = record(function, *args)
    for _ in range(3):
        others = (torch.rand(128), torch.rand(128), one * 3)
        torch.testing.assert_close(program(others), function(*others), rtol=0, atol=0, equal_nan=True)


def test_tensors_that_outlive_a_call_are_asked_for() -> None:
    kept = [torch.full((8,), 5.0)]

    def function(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        out = torch.empty(8)
        launch(a, asked(lambda: kept[0] + 0.0), out, 0.0)
        return out

    a, b = arguments()
    program = record(function, a, b)
    assert torch.equal(program((a, b)), a + 5.0)
    kept[:] = [torch.full((8,), -1.0)]
    assert torch.equal(program((a, b)), a - 1.0)


def test_nothing_to_launch() -> None:
    def function(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a.new_empty((0, 3))

    assert record(function, *arguments())(arguments()).shape == (0, 3)


def computes(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    out = torch.empty(8)
    launch(a.clone(), b, out, 0.0)
    return out


def changes(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.empty(8).zero_()


def launches_past(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    out = torch.empty(8)
    unknown_launch(a, b, out, 0.0)
    return out


KEPT = torch.ones(8)


def reads_another(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    out = torch.empty(8)
    launch(a, KEPT, out, 0.0)
    return out


def calls_another_library(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    unrepeatable("a kernel of another library")
    return torch.empty(8)


def returns_an_argument(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (computes, "aten.clone.default computes"),
        (changes, "aten.zero_.default computes"),
        (launches_past, "1 kernels were not launched by launch"),
        (reads_another, "0 tensors hold an address"),
        (calls_another_library, "of another library"),
        (returns_an_argument, "returns an argument"),
    ],
)
def test_what_cannot_be_replayed(function: Callable[..., torch.Tensor], reason: str) -> None:
    with pytest.raises(replay._Unrepeatable, match=reason):
        record(function, *arguments())


def test_the_same_tensor_twice_cannot_be_told_apart() -> None:
    a = torch.randn(8)

    def function(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        out = torch.empty(8)
        launch(a, b, out, 0.0)
        return out

    with pytest.raises(replay._Unrepeatable, match="2 tensors hold an address"):
        record(function, a, a)


class OnGpu:
    """As much of a tensor on a GPU as `replayed` asks for."""

    is_cuda = True
    device = torch.device("cuda", 1)

    @staticmethod
    def get_device() -> int:
        return 1


def test_replayed_is_on_its_tensors_gpu_and_records_again_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [0]

    @contextlib.contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        current.append(wanted.index)
        try:
            yield
        finally:
            current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current[-1], raising=False)
    monkeypatch.setattr(replay, "_triton_runtime", lambda: SimpleNamespace(launch_enter_hook=HOOKS))
    ran, fails = [], [False, True, False, False]

    def function(x: OnGpu) -> torch.Tensor:
        ran.append((current[-1], getattr(replay._current, "recording", None) is not None))
        if fails[len(ran) - 1]:
            raise torch.OutOfMemoryError
        return torch.zeros(3).fill_(1.0)  # computes: cannot be replayed

    call = replay.replayed(function)
    call(OnGpu)
    with pytest.raises(torch.OutOfMemoryError):
        call(OnGpu)
    call(OnGpu)
    call(OnGpu)
    assert ran == [(1, False), (1, True), (1, True), (1, False)]
    assert current == [0]


def test_a_recording_ends_with_an_error() -> None:
    with pytest.raises(ZeroDivisionError), replay._recorded(arguments(), HOOKS):
        _ = 1 / 0
    assert not HOOKS.calls
    launched(Sum, (8,), ())  # nobody listens
