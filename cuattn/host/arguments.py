"""A launch's arguments → the block of parameters, each checked against what the PTX declares.

A GPU takes the bytes that it is given. Here a value must be of the class and the size that the kernel declares, so that
nothing is read as what it is not. PTX tells integers, floats and structs apart, signed from unsigned hardly ever, and
addresses from 64-bit integers only where the declaration says ``.ptr`` or the code turns them into addresses.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np

from ..errors import LaunchError
from . import memory
from .ptx_module import Parameter
from .table import PARAM_LINE
from .tensor_map import TensorMap

_INTEGERS = frozenset("biu")


class _Unfit(Exception):
    """An argument is refused; becomes a `LaunchError` that says which one it is and why."""


def pack(
    kernel: str, params: Sequence[Parameter], nbytes: int, place: int, args: Sequence[object]
) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """Pack the block of ``nbytes`` bytes; returns it and the arrays in it with their positions.

    It begins at ``place`` modulo PARAM_LINE: aligned as the kernel declares it and no better. Structs that kernels
    address (tensor maps) ask for 64 bytes.

    Raises
    ------
    LaunchError
        The number of arguments is wrong, or one of them does not fit its parameter; the message says which, and why.
    """
    if not isinstance(args, tuple | list):
        raise LaunchError(f"{kernel}: args is a {type(args).__name__}, a tuple of the arguments is needed")
    if len(args) != len(params):
        raise LaunchError(f"{kernel}: {len(args)} arguments, the kernel takes {len(params)}")
    raw = np.zeros(nbytes + PARAM_LINE, np.uint8)
    start = (place - raw.ctypes.data) % PARAM_LINE
    block = raw[start : start + nbytes]
    view = block.data
    arrays: list[tuple[int, np.ndarray]] = []
    numbers: list[int] = []  # positions of numbers that are passed for pointers
    for index, (arg, param) in enumerate(zip(args, params, strict=True)):
        try:
            if isinstance(arg, np.ndarray):
                data = _address(arg, param)
                arrays.append((index, arg))
            elif isinstance(arg, TensorMap):
                data = _tensor_map(arg, param)
                arrays.append((index, arg.array))
            else:
                data = _value(arg, param)
                if param.pointer and arg:
                    numbers.append(index)
        except _Unfit as reason:
            raise LaunchError(f"{_which(kernel, index, param)} {reason}") from None
        view[param.offset : param.offset + param.size] = data
    for index in numbers:
        if not _is_inside(args[index], arrays):
            raise LaunchError(
                f"{_which(kernel, index, params[index])} is {args[index]!r}, the kernel's parameter is a pointer and "
                "none of the arrays of this launch is there: pass an array, or None"
            )
    return block, arrays


def _which(kernel: str, index: int, param: Parameter) -> str:
    """Name an argument by its position, and by its name where the PTX has one that tells more."""
    name = "" if param.name == f"{kernel}_param_{index}" else f" {param.name}"
    return f"{kernel}: argument {index}{name}"


def _is_inside(address: object, arrays: list[tuple[int, np.ndarray]]) -> bool:
    extents = [memory.bounds(array) for _, array in arrays]
    return any(low <= int(address) < high for low, high in extents)  # type: ignore[call-overload]


def _address(array: np.ndarray, param: Parameter) -> bytes:
    if param.type not in ("u64", "s64", "b64") or param.pointer is False:
        raise _Unfit(f"is an array, the kernel's parameter {_described(param)}")
    unfit = _unfit_dtypes.get(array.dtype)
    if unfit is None:
        unfit = _unfit_dtypes[array.dtype] = _why_unfit(array.dtype)
    if unfit:
        raise _Unfit(f"has dtype {array.dtype}, which {unfit}")
    if type(array) is not np.ndarray and isinstance(array, getattr(sys.modules.get("numpy.ma"), "MaskedArray", ())):
        raise _Unfit("is a masked array, whose mask no kernel reads: pass its data and a mask")
    address: int = array.__array_interface__["data"][0]
    return address.to_bytes(8, "little")


_unfit_dtypes: dict[np.dtype, str] = {}  # found so far; empty strings for dtypes that are good


def _why_unfit(dtype: np.dtype) -> str:
    if dtype.hasobject:
        return "holds Python objects: a kernel would read their addresses"
    if dtype.names is not None:
        return "is structured: pass a view of its bytes or of one field"
    if not dtype.isnative:
        return "has the other byte order: convert it"
    if dtype.kind in "USMm" or dtype.char in "gG":
        return "has no counterpart in CUDA C"
    return ""


def _tensor_map(described: TensorMap, param: Parameter) -> bytes:
    if not isinstance(described.array, np.ndarray):
        raise _Unfit("is a tensor map of an array on a GPU")
    data = described.value.tobytes()
    _check_size("TensorMap", len(data), param)
    return data


def _value(arg: object, param: Parameter) -> bytes:
    if arg is None:
        if param.size != 8 or param.type not in ("u64", "s64", "b64") or param.pointer is False:
            raise _Unfit(f"is None, a null pointer; the kernel's parameter {_described(param)}")
        return bytes(8)
    if isinstance(arg, np.generic):
        value = arg
    elif isinstance(arg, bool):
        value = np.bool_(arg)
    elif isinstance(arg, int):
        if not -(1 << 63) <= arg < 1 << 64:
            raise _Unfit(f"is {arg}, which does not fit 64 bits")
        value = np.int64(arg) if arg < 1 << 63 else np.uint64(arg)
    elif isinstance(arg, float):
        value = np.float64(arg)
    elif isinstance(arg, complex):
        value = np.complex128(arg)
    else:
        raise _Unfit(f"is a {type(arg).__name__}, not an array or a scalar")
    kind = type(arg).__name__
    _check_size(kind, value.dtype.itemsize, param)
    if not _same_class(value.dtype, param) or not value.dtype.isnative or value.dtype.hasobject:
        raise _Unfit(f"({kind}) is {_shown(arg)}, the kernel's parameter {_described(param)}")
    if param.type[0] == "s" and param.type != "struct" and value.dtype.kind == "u" and int(value) >> 8 * param.size - 1:
        raise _Unfit(f"({kind}) is {_shown(arg)}, above the range of the kernel's signed parameter")
    return value.tobytes()


def _check_size(kind: str, nbytes: int, param: Parameter) -> None:
    if nbytes != param.size:
        hint = " (a Python number has 8: state its width, as np.int32(...))" if kind in ("int", "float") else ""
        raise _Unfit(f"({kind}) has {nbytes} bytes, the kernel's parameter {param.size}{hint}")


def _same_class(dtype: np.dtype, param: Parameter) -> bool:
    """Whether values of a dtype are what a parameter of their size is declared as."""
    extension = dtype.kind == "V" and dtype.type is not np.void  # bfloat16, 8-bit floats, small integers
    if param.type == "struct":  # what CUDA C has as classes: structs, vectors, complex numbers, 16- and 8-bit floats
        return dtype.kind in "Vc" or dtype.name == "float16" or "float8" in dtype.name
    if param.type[0] == "b" and param.type != "bf16":  # bits
        return extension or dtype.kind in "biuf"
    if param.type in ("f16", "bf16"):
        return dtype.name == ("float16" if param.type == "f16" else "bfloat16")
    if "f" in param.type:
        return dtype.kind == "f" and dtype.char not in "gG"
    return dtype.kind in _INTEGERS or (extension and "int" in dtype.name)


def _described(param: Parameter) -> str:
    if param.pointer:
        return "is a pointer: pass an array, or None"
    if param.type == "struct":
        return f"is a struct of {param.size} bytes"
    kind = "floating-point number" if "f" in param.type else "integer" if param.type[0] in "us" else "number"
    return f"is a {8 * param.size}-bit {kind} (.{param.type})".replace("a 8-bit", "an 8-bit")


def _shown(arg: object) -> str:
    text = repr(arg)
    return text if len(text) <= 40 else f"{text[:37]}..."
