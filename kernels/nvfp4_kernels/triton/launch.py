"""Arithmetic of the host, before every launch. Triton's own functions of these names are made for kernels: called on the host,
they take tens of microseconds, several times a launch."""

from __future__ import annotations


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n; n is positive."""
    return 1 << (n - 1).bit_length()
