"""What differs in Gluon's interface between the Triton versions that we serve (3.6 to 3.9)."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma

# The bulk tensor copies were renamed in Triton 3.7.
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
tma_store_wait = tma.store_wait

# The asynchronous copies of single threads in Triton 3.8.
copy_async = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared

# So was the barrier of a thread block.
thread_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

# And another view of shared memory, in Triton 3.9.
_PUBLIC_REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def reinterpret(memory, DTYPE: gl.constexpr, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
    """The same shared memory as values of DTYPE in SHAPE and LAYOUT."""
    if _PUBLIC_REINTERPRET:
        return memory.reinterpret(DTYPE, SHAPE, LAYOUT)
    else:
        return memory._reinterpret(DTYPE, SHAPE, LAYOUT)


@gluon.jit
def wait_for_previous_kernel():
    """Everything that the kernel before this one in the stream wrote is visible after it (SM90, programmatic launch)."""
    gl.inline_asm_elementwise("griddepcontrol.wait; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def let_next_kernel_start():
    """The kernel after this one may start, up to its own wait (SM90, programmatic launch)."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def prefetch(pointers):
    """Bring what `pointers` point at nearer, into L2. Nothing is read: it may be written still."""
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=gl.int32, is_pure=False, pack=1
    )
