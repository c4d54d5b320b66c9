"""Tensor descriptors for Hopper's bulk copies."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


@dataclass(frozen=True)
class _Memory:
    """What a descriptor has to know of a tensor. Descriptors are kept for the next launch, and may not keep a tensor alive."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


@functools.lru_cache(maxsize=4096)
def _made(
    address: int, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
) -> TensorDescriptor:
    row_bytes = box[-1] * dtype.itemsize
    swizzle = next((width for width in (128, 64, 32) if row_bytes % width == 0), 0)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=dtype.itemsize * 8, rank=len(box))
    return TensorDescriptor(_Memory(address, dtype), list(shape), list(strides), list(box), layout)


def _sizes(tensor: torch.Tensor, dtype: torch.dtype) -> tuple[int, int, int]:
    """Rows of a tensor [..., columns], columns and stride between rows, in values of `dtype`."""
    *leading, columns = tensor.shape
    size = tensor.element_size()
    return math.prod(leading), columns * size // dtype.itemsize, tensor.stride(-2) * size // dtype.itemsize


def descriptor(
    tensor: torch.Tensor, box: tuple[int, ...], dtype: torch.dtype | None = None, shape: tuple[int, ...] | None = None
) -> TensorDescriptor:
    """Boxes of all rows of a tensor [..., columns], in the widest swizzle that a box's rows allow.

    The rows are one stride apart and 16-byte aligned. dtype: what the values are taken for, if not for what they are. shape:
    two or three dimensions, in values of dtype, that the rows are arranged in, if not [rows, columns].
    """
    dtype = dtype or tensor.dtype
    rows, columns, row = _sizes(tensor, dtype)
    shape = shape or (rows, columns)
    strides = (row, 1) if len(box) == 2 else (shape[1] * row, row, 1)
    return _made(tensor.data_ptr(), dtype, shape, strides, box)


def chunked(tensor: torch.Tensor, box: tuple[int, int, int], dtype: torch.dtype) -> TensorDescriptor:
    """Boxes [chunks, rows, columns] of a tensor [..., columns], whose rows are taken for chunks of box[-1] values of `dtype`.

    One copy brings neighbouring chunks of many rows, each chunk of all rows together.
    """
    rows, columns, row = _sizes(tensor, dtype)
    width = box[-1]
    return _made(tensor.data_ptr(), dtype, (columns // width, rows, width), (width, row, 1), box)


def moved(of: TensorDescriptor) -> Callable[[int], TensorDescriptor]:
    """address -> the descriptor of what lies there as `of` describes it."""
    rest = (of.base.dtype, tuple(of.shape), tuple(of.strides), tuple(of.block_shape))
    return lambda address: _made(address, *rest)
