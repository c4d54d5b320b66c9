"""The host's arithmetic. Triton is not imported here: other tests choose its interpreter when they import it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nvfp4_kernels.triton.launch import cdiv, next_power_of_2


@given(st.integers(0, 1 << 40), st.integers(1, 1 << 20))
def test_cdiv(a: int, b: int) -> None:
    assert (cdiv(a, b) - 1) * b < a <= cdiv(a, b) * b


@given(st.integers(1, 1 << 31))
def test_next_power_of_2(n: int) -> None:
    assert next_power_of_2(n).bit_count() == 1
    assert n <= next_power_of_2(n) < 2 * n
