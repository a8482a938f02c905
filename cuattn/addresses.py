"""Where an array lies in memory: the same for NumPy and CuPy."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


class _ArrayInterface(ctypes.Structure):
    """``PyArrayInterface`` of NumPy's array interface, to which ``__array_struct__`` points."""

    _fields_ = (
        ("two", ctypes.c_int),
        ("nd", ctypes.c_int),
        ("typekind", ctypes.c_char),
        ("itemsize", ctypes.c_int),
        ("flags", ctypes.c_int),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("data", ctypes.c_void_p),
    )


_interface = _ArrayInterface.from_address


def address(x: Any) -> int:
    """Address of the first element, in half the time of ``__array_interface__``: a call asks for several."""
    if isinstance(x, np.ndarray):
        return _interface(_capsule_pointer(x.__array_struct__, None)).data or 0
    return int(x.data.ptr)


def byte_bounds(x: Any) -> tuple[int, int]:
    """The first byte that ``x`` covers and one past the last; an empty range for an array without elements."""
    low = high = address(x)
    if x.size == 0:
        return low, low
    if x.flags.c_contiguous:
        return low, low + x.nbytes
    for extent, stride in zip(x.shape, x.strides, strict=True):
        if stride < 0:
            low += (extent - 1) * stride
        else:
            high += (extent - 1) * stride
    return low, high + x.dtype.itemsize


def is_foreign(dtype: np.dtype[Any]) -> bool:
    """Whether no kernel reads the numbers of a dtype: CUDA C has none like them, or they have the other byte order."""
    return dtype.names is not None or not dtype.isnative or dtype.kind in "USMm" or dtype.char in "gG"


def as_bytes(x: Any) -> Any:
    """``x`` for a kernel that moves bytes, whatever they stand for: a view, where its dtype is foreign to kernels."""
    foreign = isinstance(x, np.ndarray) and is_foreign(x.dtype)
    return x.view(f"V{x.dtype.itemsize}") if foreign else x


def on_elements(x: Any) -> bool:
    """Whether every element lies at a multiple of its size."""
    return not any(value % x.dtype.itemsize for value in (address(x), *x.strides))


def overlaps_itself(x: Any) -> bool:
    """Whether two elements of ``x`` may share memory, by its strides."""
    if x.size == 0 or x.flags.c_contiguous:
        return False
    reach = x.dtype.itemsize  # bytes spanned by the axes so far; the next one must step over them
    for stride, extent in sorted((abs(s), n) for s, n in zip(x.strides, x.shape, strict=True) if n > 1):
        if stride < reach:
            return True
        reach += stride * (extent - 1)
    return False


class _Shadow:
    """Pointer, shape and strides of an array, without its memory."""

    def __init__(self, x: Any) -> None:
        self.__array_interface__ = {
            "data": (address(x), True),
            "shape": tuple(x.shape),
            "strides": tuple(x.strides),
            "typestr": f"|V{x.dtype.itemsize}",
            "version": 3,
        }


def share_elements(a: Any, b: Any, *, max_work: int = 100_000) -> bool:
    """Whether some byte belongs to an element of both: interleaved views of one array do not share any.

    Exact up to ``max_work``, candidate solutions of a bounded integer program; beyond it, True. Nothing is read: the
    arrays may lie on a GPU.

    >>> packed = np.empty((4, 3, 8), np.float32)
    >>> share_elements(packed[:, 0], packed[:, 1]), share_elements(packed[:, 0], packed[:, :2])
    (False, True)
    """
    return bool(np.may_share_memory(np.asarray(_Shadow(a)), np.asarray(_Shadow(b)), max_work=max_work))  # type: ignore[arg-type]
