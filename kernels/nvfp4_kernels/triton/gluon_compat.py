"""What differs in Gluon's interface between the Triton versions that we serve (3.6 to 3.9)."""

from __future__ import annotations

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

# The bulk tensor copies were renamed in Triton 3.7.
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
tma_store_wait = tma.store_wait

# So was the barrier of a thread block.
thread_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
