"""Objects that claim a protocol which does not work, or lie in it."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["BROKEN", "ArrayOnly", "DLPackOnly"]


class ArrayOnly:
    """An array of another library, known by ``__array__``."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self._array if dtype is None else self._array.astype(dtype)


class DLPackOnly:
    """An array of another library, known by DLPack alone."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)


def _raises(self: Any, *args: Any, **kwargs: Any) -> Any:
    raise KeyError("broken")


_PROTOCOLS = (
    "__array__",
    "__dlpack__",
    "__dlpack_device__",
    "__index__",
    "__float__",
    "__bool__",
    "__len__",
    "__iter__",
)
_EVERYTHING = dict.fromkeys((*_PROTOCOLS, "__eq__", "__repr__", "__int__"), _raises) | {"__hash__": None}


def _made(name: str, **members: Any) -> Any:
    return type(name, (), members)()


def _on_device(device: Any) -> Any:
    return _made("Device", __dlpack_device__=lambda self: device, __dlpack__=_raises)


_INTERFACE = {"shape": (2, 3), "typestr": "<f4", "data": (4096, False), "version": 3}

BROKEN: dict[str, Any] = {
    **{f"{name} raises": _made("Broken", **{name: _raises}) for name in _PROTOCOLS},
    "everything raises": _made("Broken", **_EVERYTHING),
    "attributes raise": _made("Attributes", __getattr__=lambda self, name: _raises(self)),
    "shape lies": _made("Shape", shape=(2, 5, 4, 32), ndim=4, dtype=np.dtype(np.float32)),
    "__array__ lies": _made("Array", __array__=lambda self, dtype=None, copy=None: [1, 2]),
    "__index__ lies": _made("Index", __index__=lambda self: "1"),
    "__float__ lies": _made("Float", __float__=lambda self: "1"),
    "__len__ lies": _made("Length", __len__=lambda self: -1, __getitem__=lambda self, i: i),
    "no capsule": _made("Capsule", __dlpack_device__=lambda self: (1, 0), __dlpack__=lambda self, **options: 3),
    "CUDA by DLPack": _on_device((2, 0)),
    "CUDA managed": _on_device((13, 99)),
    "device -1": _on_device((2, -1)),
    "unknown device": _on_device((99, 0)),
    "no device": _on_device(None),
    "a text for a device": _on_device("ab"),
    "CUDA by interface": _made("Cuda", __cuda_array_interface__=_INTERFACE),
    "CUDA by an empty interface": _made("Cuda", __cuda_array_interface__={}),
    "CUDA interface raises": type("Cuda", (), {"__cuda_array_interface__": property(_raises)})(),
    "DLPack raises on access": type("Access", (), {"__dlpack_device__": property(_raises)})(),
    "a class of arrays": np.ndarray,
}
