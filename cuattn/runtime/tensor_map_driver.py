"""Tensor maps as the driver encodes them, which alone knows the format of the hardware.

The driver is asked directly: it writes 128 bytes to an address that must be a multiple of 64, which the objects of
Python bindings do not promise.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from cuattn.errors import LaunchError, NotSupportedError
from cuattn.host.tensor_map import FILLS, L2_PROMOTIONS, MAP_ALIGNMENT, MAP_BYTES, SWIZZLE_BYTES, TensorMap

Encoder = Callable[..., int]

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_U32, _U64, _POINTER, _ENUM = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_int
#: Of ``cuTensorMapEncodeTiled``: map, data type, rank, address, extents, strides, box, steps, interleave, swizzle, L2
#: promotion, fill.
ARGUMENT_TYPES = (
    *(_POINTER, _ENUM, _U32, _POINTER),
    *(ctypes.POINTER(_U64), ctypes.POINTER(_U64), ctypes.POINTER(_U32), ctypes.POINTER(_U32)),
    *(_ENUM, _ENUM, _ENUM, _ENUM),
)


@cache
def encoder() -> Encoder | None:
    """Return ``cuTensorMapEncodeTiled`` of the driver; None where there is no driver, or one older than CUDA 12."""
    try:
        function = ctypes.CDLL(_LIBRARY).cuTensorMapEncodeTiled
    except (OSError, AttributeError):
        return None
    function.argtypes, function.restype = ARGUMENT_TYPES, ctypes.c_int
    return function


def encode(described: TensorMap, address: int) -> np.void:
    """Encode a map of the array at ``address``.

    Raises `NotSupportedError` where there is no driver that encodes maps, `LaunchError` if it refuses this one.
    """
    function = encoder()
    if function is None:
        raise NotSupportedError("tensor_map: a tensor map for a GPU needs a driver of CUDA 12 or newer; none is loaded")
    memory = (ctypes.c_char * (MAP_BYTES + MAP_ALIGNMENT))()
    place = -(-ctypes.addressof(memory) // MAP_ALIGNMENT) * MAP_ALIGNMENT
    status = function(
        place,
        described.data_type,
        len(described.dims),
        address,
        _array(_U64, described.dims),
        _array(_U64, described.strides[1:]),
        _array(_U32, described.box),
        _array(_U32, described.element_strides),
        0,  # not interleaved
        tuple(SWIZZLE_BYTES).index(described.swizzle),
        L2_PROMOTIONS.index(described.l2_promotion),
        FILLS.index(described.fill),
    )
    if status:
        raise LaunchError(f"tensor_map: the driver refuses {described}: error {status}")
    return np.void(ctypes.string_at(place, MAP_BYTES))


def _array(kind: Any, values: Sequence[int]) -> Any:
    return (kind * max(1, len(values)))(*values)
