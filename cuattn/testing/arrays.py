"""Arrays in any memory layout, inside a larger buffer of poison that is verified afterwards.

A kernel that reads beside its array (a wrong stride, one key too many) reads 0xFF bytes, which are NaN in every
floating dtype and -1 in every integer one. A kernel that writes there is caught by :meth:`Guarded.check`: guard bands
at both ends and the gaps between strided rows must still hold every byte of their poison.

>>> guarded = place(np.zeros((2, 3), np.float32), Layout(pad=(0, 5)))
>>> guarded.array.strides
(32, 4)
>>> guarded.array[1, 2] = 1.0
>>> guarded.check()
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from cuattn.errors import ArgumentError
from cuattn.testing.rounding import to_numpy

__all__ = ["GUARD_BYTES", "POISON_BYTE", "GuardBandError", "Guarded", "Layout", "allocate", "place", "surrounded"]

POISON_BYTE = 0xFF
GUARD_BYTES = 256
#: Buffers begin at a multiple of this, as device allocations do.
_ALIGNMENT = 256


class GuardBandError(AssertionError):
    """Bytes around an array were written; the message says how many, and where the first one is."""


@dataclass(frozen=True)
class Layout:
    """How an array lies in memory.

    Attributes:
        order: the axes from the slowest to the fastest in memory, e.g. (0, 2, 1, 3) for a [B, N, H, D] array that is a
            transposed view of a [B, H, N, D] one; None is C order.
        pad: elements of poison behind each axis (in the order of the array's axes), which become gaps in its strides;
            () is none.
        offset: elements that the first one lies behind a 256-byte boundary: 1 makes a misaligned base.
    """

    order: tuple[int, ...] | None = None
    pad: tuple[int, ...] = ()
    offset: int = 0

    def strides(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the element strides of an array of `shape`."""
        order = self.order if self.order is not None else tuple(range(len(shape)))
        pad = self.pad or (0,) * len(shape)
        if sorted(order) != list(range(len(shape))) or len(pad) != len(shape):
            raise ArgumentError(f"{self} does not fit an array of shape {tuple(shape)}")
        strides, step = [0] * len(shape), 1
        for axis in reversed(order):
            strides[axis] = step
            step *= max(shape[axis] + pad[axis], 1)
        return tuple(strides)


@dataclass(frozen=True)
class Guarded:
    """An array and the poisoned buffer it lies in.

    Attributes:
        root: all bytes, uint8 [n], guard bands included.
        array: the view to pass to a kernel.
        byte_offset: where in `root` the first element lies.
    """

    root: Any
    array: Any
    byte_offset: int

    def __repr__(self) -> str:
        a = self.array
        return f"Guarded({a.dtype} {a.shape}, strides {a.strides}, {self.byte_offset} of {self.root.size} bytes)"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Hypothesis would print every element of a dataclass of arrays."""
        printer.text(repr(self))

    def check(self) -> None:
        """Raise :class:`GuardBandError` if a byte of `root` outside `array` no longer holds the poison."""
        content = to_numpy(self.root)
        written = content != POISON_BYTE
        shape, strides = (*self.array.shape, self.array.dtype.itemsize), (*self.array.strides, 1)
        _view(written, shape, bool, self.byte_offset, strides)[...] = False
        if not written.any():
            return
        at = np.flatnonzero(written)
        last = sum((n - 1) * s for n, s in zip(self.array.shape, self.array.strides, strict=True))
        end = self.byte_offset + (last + self.array.dtype.itemsize if self.array.size else 0)
        places = {
            "before the array": int((at < self.byte_offset).sum()),
            "in its gaps": int(((at >= self.byte_offset) & (at < end)).sum()),
            "behind it": int((at >= end).sum()),
        }
        told = ", ".join(f"{count} {place}" for place, count in places.items() if count)
        raise GuardBandError(
            f"{at.size} poison bytes around an array of shape {self.array.shape} were written ({told}); the first one "
            f"lies {int(at[0]) - self.byte_offset} bytes from its first element"
        )

    def to(self, xp: Any) -> Guarded:
        """Copy all of it to arrays of the module `xp` (numpy or cupy): same bytes around, same strides and alignment.

        A device kernel is then as surrounded by poison as a host one.
        """
        lead = self.root.ctypes.data % _ALIGNMENT
        raw = _aligned_buffer(lead + self.root.nbytes)
        raw[lead:] = self.root
        offset = lead + self.byte_offset
        if xp is np:
            return Guarded(raw, _view(raw, self.array.shape, self.array.dtype, offset, self.array.strides), offset)
        raw = xp.asarray(raw)  # device allocations begin at multiples of 256 bytes and more
        memory = raw.data + offset
        array = xp.ndarray(self.array.shape, self.array.dtype, memptr=memory, strides=self.array.strides)
        return Guarded(raw, array, offset)


def _view(root: NDArray[Any], shape: Sequence[int], dtype: DTypeLike, offset: int, strides: Sequence[int]) -> Any:
    return np.ndarray(tuple(shape), dtype, buffer=root, offset=offset, strides=tuple(strides))


def _aligned_buffer(num_bytes: int) -> NDArray[np.uint8]:
    """`num_bytes` of poison at a multiple of the alignment; a view, because NumPy allocates at multiples of 16 only."""
    raw = np.full(num_bytes + _ALIGNMENT, POISON_BYTE, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + num_bytes]


def allocate(shape: Sequence[int], dtype: DTypeLike, layout: Layout | None = None) -> Guarded:
    """Allocate a NumPy array that holds only poison, with guard bands at both ends.

    >>> bool(np.isnan(allocate((2,), np.float16).array).all())
    True
    """
    layout = layout or Layout()
    item = np.dtype(dtype).itemsize
    strides = layout.strides(shape)
    # Trailing padding belongs to the base too: a view of a padded array has poison behind its last row.
    extent = sum((n - 1 + p) * s for n, p, s in zip(shape, layout.pad or (0,) * len(shape), strides, strict=True)) + 1
    offset = GUARD_BYTES + layout.offset * item
    num_bytes = offset + max(extent, 0) * item + GUARD_BYTES
    root = _aligned_buffer(math.ceil(num_bytes / _ALIGNMENT) * _ALIGNMENT)
    return Guarded(root, _view(root, shape, dtype, offset, [s * item for s in strides]), offset)


def place(values: ArrayLike, layout: Layout | None = None) -> Guarded:
    """Copy `values` into a poisoned buffer, in that `layout`."""
    source = np.asarray(values)
    guarded = allocate(source.shape, source.dtype, layout)
    guarded.array[...] = source
    return guarded


def surrounded(array: NDArray[Any]) -> Guarded:
    """Return any NumPy array with the buffer that it is a view of (itself when it owns its memory).

    What is around it is what the caller put there, not necessarily poison: :meth:`Guarded.to` is what this is for.
    """
    owner = array
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    # An owner is dense, but its axes may lie in any order: "K" is the one in which nothing is copied.
    root = owner.ravel(order="K").view(np.uint8)
    return Guarded(root, array, array.ctypes.data - root.ctypes.data)
