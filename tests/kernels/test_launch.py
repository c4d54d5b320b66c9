"""The host's arithmetic against Triton's own."""

from __future__ import annotations

import triton
from hypothesis import given
from hypothesis import strategies as st

from nvfp4_kernels.triton.launch import cdiv, next_power_of_2


@given(st.integers(0, 1 << 40), st.integers(1, 1 << 20))
def test_cdiv(a: int, b: int) -> None:
    assert cdiv(a, b) == triton.cdiv(a, b)


@given(st.integers(1, 1 << 31))
def test_next_power_of_2(n: int) -> None:
    assert next_power_of_2(n) == triton.next_power_of_2(n)
