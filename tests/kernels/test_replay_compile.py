"""Replays call what Triton compiled as Triton itself does, in each version of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def test_a_kernel_is_run_as_triton_runs_it() -> None:
    from triton import knobs
    from triton.compiler.compiler import CompiledKernel

    from nvfp4_kernels.replay import _Launch
    from nvfp4_kernels.triton.launch import taken_apart

    calls: list[tuple[Any, ...]] = []

    class Compiled(CompiledKernel):
        """A kernel that no GPU has loaded."""

        function, packed_metadata, module = 7, (1, 2), None

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
    launch = _Launch(taken_apart(kernel.run), (3, 4, 5), kernel.function, kernel.packed_metadata, [11, 12], [], [])
    function, arguments = launch.call([], 9)
    assert len(calls) == 1
    function(*arguments)
    triton, ours = calls
    # Triton hands over its hooks, of which there are none.
    assert ours == tuple(
        None if arg in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook) else arg for arg in triton
    )


@pytest.mark.parametrize("descriptors", [True, False])
@pytest.mark.parametrize("scratch", [0, 64])
def test_what_a_launcher_hands_to_its_function_in_c(descriptors: bool, scratch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    import triton
    from triton.backends.nvidia import driver
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
    from triton.runtime import _allocation

    from nvfp4_kernels.triton import descriptors as ours
    from nvfp4_kernels.triton.launch import taken_apart

    reached: list[tuple[Any, ...]] = []

    def in_c(*args: Any) -> None:
        reached.append(args)

    # What Triton makes of a compiled kernel, without the function in C, which takes a GPU to be compiled.
    utils = SimpleNamespace(
        fill_tma_descriptor=lambda *args: ("code", *args), fill_tma_descriptor_tiled=lambda *args: ("code", *args)
    )
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=SimpleNamespace(utils=utils)))
    allocator = _allocation._allocator.set(lambda size, align, stream: ("scratch", size))
    signature = {"x": "*fp32", "d": "tensordesc<fp16[16, 64]>" if descriptors else "*fp16", "n": "i32"}
    meta = [{"swizzle": 3, "elem_size": 2, "elem_type": 6, "block_size": [16, 64], "fp4_padded": False}] if descriptors else []
    launcher = object.__new__(driver.CudaLauncher)
    launcher.launch = driver.wrap_handle_tensordesc(in_c, signature, meta)
    launcher.num_ctas, launcher.launch_cooperative_grid, launcher.launch_pdl = 1, False, True
    launcher.global_scratch_size, launcher.global_scratch_align = scratch, 16
    launcher.profile_scratch_size, launcher.profile_scratch_align = 0, 1
    launcher.gsan_enabled, launcher.arg_annotations, launcher.kernel_signature = False, "annotations", b"signature"

    descriptor = ours._made(4096, torch.float16, (128, 256), (256, 1), (16, 64))
    assert isinstance(descriptor, TensorDescriptor)
    args = (3, 4, 5, 9, 7, (1, 2), None, None, None, 1024, descriptor if descriptors else 2048, 11)
    launcher(*args)
    function, arguments = taken_apart(launcher)(*args)
    assert len(reached) == 1
    function(*arguments)
    _allocation._allocator.reset(allocator)
    assert reached[0] == reached[1]
    assert not descriptors or "code" in str(reached[0])
    # Memory that each launch has to ask for is not kept.
    assert (function is in_c) == (scratch == 0)
