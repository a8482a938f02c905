"""Where an argument lies, and how it becomes an array: every look at a foreign object, with the argument's name."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from cuattn import dlpack
from cuattn.dtypes import DTYPES
from cuattn.errors import ArrayTypeError, ShapeError
from cuattn.scalars import MAX_EXTENT

__all__ = ["HOST", "check_size", "describe", "host_array", "host_list", "place", "type_name", "unreadable"]

HOST = -1  # the place of CPU arrays; a device's place is its number


def place(name: str, x: Any) -> int:
    """Return the place of the argument ``name``; `ArrayTypeError` if it is no array, or one that no kernel can read."""
    if isinstance(x, np.ndarray):
        if isinstance(x, getattr(sys.modules.get("numpy.ma"), "MaskedArray", ())):
            raise ArrayTypeError(f"{name} is a masked array, whose mask no kernel reads; pass its data and a mask")
        return HOST
    cupy_array = getattr(sys.modules.get("cupy"), "ndarray", None)
    if cupy_array is not None and isinstance(x, cupy_array):
        return int(x.device.id)
    try:
        found = _protocol_place(x)
    except Exception as error:  # whatever the exporter raises, for a class that is passed as its instance too
        raise ArrayTypeError(f"{name}: {type_name(x)} does not say on which device it is: {error}") from error
    if found is None:
        raise ArrayTypeError(f"{name}: {type_name(x)} is no array; pass a NumPy or a CuPy array")
    return found


def _protocol_place(x: Any) -> int | None:
    """Return the place that an object says it is at; None without a protocol. Raises whatever the object does."""
    if hasattr(x, "__dlpack_device__"):
        device = dlpack.cuda_device(x)
        return HOST if device is None else device
    if hasattr(x, "__cuda_array_interface__"):
        import cupy

        return int(cupy.asarray(x).device.id)
    return HOST if hasattr(x, "__array__") and not isinstance(x, np.generic) else None


def host_array(name: str, x: Any) -> np.ndarray[Any, Any]:
    """Return the argument ``name``, which `place` says is on the host, as an array over the same memory."""
    if isinstance(x, np.ndarray):
        return np.asarray(x) if isinstance(x, np.matrix) else x  # every view of a matrix has two axes
    try:
        return dlpack.from_host(x) if hasattr(x, "__dlpack__") else np.asarray(x)
    except Exception as error:  # exporters raise what they like
        raise unreadable(name, x, "NumPy", error) from error


def unreadable(name: str, x: Any, library: str, error: Exception) -> ArrayTypeError:
    """Make the error for an object whose protocol fails."""
    return ArrayTypeError(f"{name}: {type(x).__name__} cannot be read as a {library} array: {error}")


def host_list(name: str, x: Sequence[Any]) -> np.ndarray[Any, Any]:
    """Return a list of numbers as an array."""
    try:
        array = np.asarray(x)
    except Exception as error:  # ragged, or whatever its entries raise
        raise ArrayTypeError(f"{name} cannot be read as an array: {error}") from error
    if array.dtype.kind not in "biuf" and array.dtype not in DTYPES:
        raise ArrayTypeError(f"{name} holds {array.dtype} objects; numbers are needed")
    return array


def check_size(name: str, x: Any) -> Any:
    """Return ``x``; `ShapeError` if it has more elements than metadata may have, before anything looks at them."""
    if x.size > MAX_EXTENT:
        raise ShapeError(f"{name} has shape {list(x.shape)}; at most {MAX_EXTENT} elements are allowed")
    return x


def describe(found: int, x: Any) -> str:
    return f"a {type_name(x)} {'on the CPU' if found == HOST else f'on CUDA device {found}'}"


def type_name(x: Any) -> str:
    return f"{type(x).__module__}.{type(x).__qualname__}"
