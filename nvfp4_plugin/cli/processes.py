"""Child processes that never outlive the command that started them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOP_SECONDS = 8.0
"""How long a process may take to stop before it is killed."""


def interrupt_on_termination() -> None:
    """Let `kill` and a closed terminal end this program as Ctrl-C does, so that it stops its children.

    Once each: `timeout` sends its signal to the program and then to the whole group, and the second would end what the first
    has begun.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


@contextmanager
def process_group(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process with a session of its own; it is stopped with every process of its group however we leave.

    `options` are those of subprocess.Popen.
    """
    process = None
    try:
        with _signals_later():
            # Ctrl-C reaches this process alone, which then stops the whole group.
            process = subprocess.Popen(list(command), start_new_session=True, **options)
        yield process
    finally:
        if process is not None:
            _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    _signal_group(process, signal.SIGTERM)
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    finally:  # after a second Ctrl-C too
        # Engine processes may outlive the one that we started.
        _signal_group(process, signal.SIGKILL)
        process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


@contextmanager
def _signals_later() -> Iterator[None]:
    """Python's handlers of the signals that end a program run when the block ends, not inside of it.

    What they raise between a fork and the assignment of its process would leave a process that nobody stops. A signal mask
    would do the same, but a child inherits it. Handlers run in the main thread alone, so elsewhere there is nothing to do.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: handler for number in numbers if callable(handler := signal.getsignal(number))}
    for number in handlers:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for arrived in came:
        signal.raise_signal(arrived)
