"""Replays call what Triton compiled as Triton itself does, in each version of it."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.slow


def test_a_kernel_is_run_as_triton_runs_it() -> None:
    from triton import knobs
    from triton.compiler.compiler import CompiledKernel

    from nvfp4_kernels.replay import _Launch

    calls: list[tuple[Any, ...]] = []

    class Compiled(CompiledKernel):
        """A kernel that no GPU has loaded."""

        function, packed_metadata = 7, (1, 2)

        def __init__(self) -> None:
            pass

        def _init_handles(self) -> None:
            pass

        def launch_metadata(self, *args: Any) -> None:
            return None

        @property
        def run(self) -> Any:
            return lambda *args: calls.append(args)

    kernel = Compiled()
    kernel[(3, 4, 5)](11, 12, stream=9)
    _Launch(kernel.run, (3, 4, 5), kernel.function, kernel.packed_metadata, [11, 12], [], [])([], [], 9)
    triton, ours = calls
    # Triton hands over its hooks, of which there are none.
    assert ours == tuple(
        None if arg in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook) else arg for arg in triton
    )
