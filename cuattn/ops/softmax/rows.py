"""Arrays as rows: what the softmax kernels see of an array and its axis.

A kernel takes rows of ``num_cols`` elements, a fixed stride apart, numbered over at most four outer axes. This module
folds the outer axes of an array of any rank into that, and copies the rare array that does not fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from cuattn.addresses import address
from cuattn.dtypes import PACK_BYTES
from cuattn.runtime.structs import struct_layout

MAX_OUTER_DIMS = 4
MIN_ADJACENT_ROWS = 8  # fewer neighbouring rows than this do not pay for giving each lane a row


@dataclass(frozen=True, slots=True)
class RowView:
    """The rows of an input and of an output array of the same shape (strides in elements)."""

    num_cols: int
    x_col_stride: int
    out_col_stride: int
    outer: tuple[tuple[int, int, int], ...]  # (extent, input stride, output stride), outermost first
    vectorized: bool

    @property
    def num_rows(self) -> int:
        return math.prod(extent for extent, _, _ in self.outer)

    @property
    def lanes_span_rows(self) -> bool:
        """Whether neighbouring rows are adjacent in memory, and neighbouring columns are not."""
        if self.x_col_stride == 1 or not self.outer:
            return False
        extent, x_stride, _ = self.outer[-1]
        return x_stride == 1 and extent >= MIN_ADJACENT_ROWS

    def pack(self, chunk_cols: int) -> np.void:
        """Pack the struct that a kernel takes by value."""
        padded = [(1, 0, 0)] * (MAX_OUTER_DIMS - len(self.outer)) + list(self.outer)
        extent, x_stride, out_stride = zip(*padded, strict=True)
        return struct_layout("softmax", "RowLayout").pack(
            num_rows=self.num_rows,
            extent=extent,
            x_row_stride=x_stride,
            out_row_stride=out_stride,
            x_col_stride=self.x_col_stride,
            out_col_stride=self.out_col_stride,
            num_cols=self.num_cols,
            chunk_cols=chunk_cols,
        )


def fold(x: Any, out: Any, axis: int) -> RowView | None:
    """Return rows along ``axis`` of ``x``, and of ``out`` with its axes or all but that one; None if they do not fit.

    >>> x = np.zeros((2, 3, 4, 5), np.float32)
    >>> fold(x, x, axis=2).outer
    ((6, 20, 20), (5, 1, 1))
    """
    return _fold(x.shape, axis, _placement(x), _placement(out))


@dataclass(frozen=True, slots=True)
class _Placement:
    """Where the elements of an array lie, as far as a kernel cares."""

    strides: tuple[int, ...]  # bytes
    itemsize: int
    past_boundary: int  # bytes from a 16-byte boundary to the first element

    def element_strides(self, shape: Sequence[int]) -> tuple[int, ...] | None:
        """Strides in elements; None if not every element lies at a multiple of its size."""
        # The stride of an axis of length 1 is arbitrary.
        strides = [s if extent > 1 else self.itemsize for extent, s in zip(shape, self.strides, strict=True)]
        if self.past_boundary % self.itemsize or any(stride % self.itemsize for stride in strides):
            return None
        return tuple(stride // self.itemsize for stride in strides)


def _placement(x: Any) -> _Placement:
    return _Placement(x.strides, x.dtype.itemsize, address(x) % PACK_BYTES)


@lru_cache(maxsize=1024)
def _fold(shape: tuple[int, ...], axis: int, x: _Placement, out: _Placement) -> RowView | None:
    has_axis = len(out.strides) == len(shape)
    x_strides = x.element_strides(shape)
    out_strides = out.element_strides(shape if has_axis else shape[:axis] + shape[axis + 1 :])
    if x_strides is None or out_strides is None:
        return None
    if not has_axis:
        out_strides = (*out_strides[:axis], 0, *out_strides[axis:])
    dims = [i for i in range(len(shape)) if i != axis and shape[i] != 1]
    outer = _collapse([(shape[i], x_strides[i], out_strides[i]) for i in dims])
    if len(outer) > MAX_OUTER_DIMS:
        return None

    def packs_are_aligned(past_boundary: int, itemsize: int, col_stride: int, row_strides: Iterable[int]) -> bool:
        per_pack = PACK_BYTES // itemsize
        return past_boundary == 0 and col_stride == 1 and all(stride % per_pack == 0 for stride in row_strides)

    vectorized = packs_are_aligned(x.past_boundary, x.itemsize, x_strides[axis], [s for _, s, _ in outer])
    if has_axis:
        row_strides = [s for _, _, s in outer]
        vectorized &= packs_are_aligned(out.past_boundary, out.itemsize, out_strides[axis], row_strides)
    return RowView(shape[axis], x_strides[axis], out_strides[axis], tuple(outer), vectorized)


def _collapse(dims: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Merge neighbouring axes that are one axis in memory, in both arrays."""
    merged: list[tuple[int, int, int]] = []
    for dim in dims:
        extent, *strides = dim
        if merged and list(merged[-1][1:]) == [stride * extent for stride in strides]:
            merged[-1] = (merged[-1][0] * extent, strides[0], strides[1])
        else:
            merged.append(dim)
    return merged
