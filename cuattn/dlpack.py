"""CPU arrays of other libraries as NumPy arrays, without a copy, in the dtypes that NumPy itself does not read.

NumPy takes integers, floats and complex numbers through DLPack and refuses the narrow floats of machine learning. Those
are dtypes of `ml_dtypes` here; a bfloat16 tensor of PyTorch on the CPU is the usual case.
"""

from __future__ import annotations

import ctypes
import operator
from typing import Any

import ml_dtypes
import numpy as np

# (DLDataTypeCode, bits) of the protocol.
_NARROW_DTYPES = {
    (4, 16): np.dtype(ml_dtypes.bfloat16),
    (10, 8): np.dtype(ml_dtypes.float8_e4m3fn),
    (12, 8): np.dtype(ml_dtypes.float8_e5m2),
}
_CAPSULE_NAME = b"dltensor"
_CPU, _CUDA, _CUDA_HOST, _CUDA_MANAGED = 1, 2, 3, 13  # DLDeviceType


def cuda_device(x: Any) -> int | None:
    """The CUDA device that ``x``, an object with ``__dlpack_device__``, lies on; None for memory of the host.

    Raises `ValueError` for a device of another kind, and whatever the exporter raises.
    """
    kind, number = (operator.index(value) for value in x.__dlpack_device__())
    if kind in (_CPU, _CUDA_HOST):
        return None
    if kind not in (_CUDA, _CUDA_MANAGED) or number < 0:
        raise ValueError(f"it is on DLPack device {kind}, number {number}; the CPU and CUDA devices are allowed")
    return number


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Memory:
    """What a NumPy array made from a capsule refers to: the capsule frees the memory when it is collected itself."""

    def __init__(self, capsule: Any, interface: dict[str, Any]) -> None:
        self.capsule = capsule
        self.__array_interface__ = interface


def from_host(x: Any) -> np.ndarray[Any, Any]:
    """``x``, an object with ``__dlpack__`` whose memory the CPU can read, as a NumPy array over the same memory.

    >>> from_host(np.arange(3)).tolist()
    [0, 1, 2]
    """
    try:
        return np.from_dlpack(x)
    except (BufferError, RuntimeError) as error:  # the exporter refuses, or NumPy the dtype
        try:
            narrow = _read_narrow(x.__dlpack__())
        except Exception:
            raise error from None  # what was said the first time is the reason
        if narrow is None:
            raise
        return narrow


def _read_narrow(capsule: Any) -> np.ndarray[Any, Any] | None:
    """Return the array in a capsule; None if its dtype is not one of the narrow ones."""
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    tensor = _DLTensor.from_address(get_pointer(capsule, _CAPSULE_NAME))
    dtype = _NARROW_DTYPES.get((tensor.code, tensor.bits))
    if dtype is None or tensor.lanes != 1:
        return None
    shape = tuple(tensor.shape[: tensor.ndim])
    if 0 in shape:
        return np.empty(shape, dtype)
    strides = tuple(n * dtype.itemsize for n in tensor.strides[: tensor.ndim]) if tensor.strides else None
    interface = {
        "version": 3,
        "shape": shape,
        "typestr": f"<u{dtype.itemsize}",
        "data": (tensor.data + tensor.byte_offset, False),
        "strides": strides,
    }
    return np.asarray(_Memory(capsule, interface)).view(dtype)
