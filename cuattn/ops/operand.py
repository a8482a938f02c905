"""Arrays as attention kernels see them, copied where they do not lie as a kernel needs it."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuattn.addresses import address
from cuattn.runtime.device_copies import copied
from cuattn.runtime.executor import Executor

__all__ = ["Operand", "deliver", "operand", "target"]


class Operand:
    """An array as a kernel sees it: ``array``, element strides of batch, sequence and head, and where it lies.

    A packed array, of rank 3, has batch stride 0.

    ``direct``: the last axis is contiguous and every element lies at a multiple of its size, as kernels need it.
    ``aligned``: every row starts at a multiple of 16 bytes.
    """

    __slots__ = ("aligned", "array", "direct", "strides")

    def __init__(self, array: Any) -> None:
        itemsize = array.dtype.itemsize
        batch, seq, head, last = array.strides if array.ndim == 4 else (0, *array.strides)
        bits = address(array) | batch | seq | head
        self.array = array
        self.direct = bits % itemsize == 0 and (last == itemsize or array.shape[-1] == 1)
        self.aligned = bits % 16 == 0
        self.strides = batch // itemsize, seq // itemsize, head // itemsize

    @classmethod
    def of_new(cls, array: Any) -> Operand:
        """Wrap an array of `Executor.empty`: contiguous, from an address aligned to more than any kernel asks for.

        So nobody has to look at it, which takes longer than all else here.
        """
        made = cls.__new__(cls)
        itemsize = array.dtype.itemsize
        batch, seq, head, _ = array.strides if array.ndim == 4 else (0, *array.strides)
        made.array, made.direct, made.aligned = array, True, (batch | seq | head) % 16 == 0
        made.strides = batch // itemsize, seq // itemsize, head // itemsize
        return made


def operand(executor: Executor, x: Any) -> Operand:
    """Return ``x`` as an operand that a kernel can take: itself, or a copy if it does not lie as it must."""
    result = Operand(x)
    if result.direct:
        return result
    with executor.on_device():
        return Operand(copied(x))


def target(executor: Executor, given: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Operand:
    """Return what a kernel is to write: ``given`` where it can, else a new array that `deliver` copies from."""
    if given is not None:
        result = Operand(given)
        if result.direct:
            return result
    return Operand.of_new(executor.empty(shape, dtype))


def deliver(executor: Executor, given: Any, written: Operand) -> Any:
    """Return the array for the caller of what `target` returned, once the kernel that writes it has been launched."""
    if written.array is given:
        return given
    executor.finish(written.array)
    if given is None:
        return written.array
    with executor.on_device():
        given[...] = written.array
    return given
