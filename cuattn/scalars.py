"""Numbers, flags and names as callers pass them: the one place that reads them, and says what was wrong.

A number may be a Python number, a NumPy scalar, or an array of rank 0 in host memory. It is taken exactly: a float is
no integer, a bool is no number, and an array of one element is an array. An array on a device is no number, because to
look at it is to wait for the device.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from numbers import Real
from typing import Any

import ml_dtypes
import numpy as np

from cuattn import dlpack
from cuattn.errors import ArgumentError, DTypeError, NonFiniteError
from cuattn.messages import shown

__all__ = [
    "MAX_EXTENT",
    "any_dtype",
    "as_flag",
    "as_integer",
    "as_real",
    "check_dtype",
    "check_flag",
    "choice",
    "integer",
    "real",
]

MAX_EXTENT = 2**31 - 1  # of an axis; kernels count its elements in 32 bits


def integer(name: str, value: Any, low: int, high: int, *, optional: bool = False) -> int:
    """Return ``value`` as an int from ``low`` to ``high``; `ArgumentError` for anything else.

    ``optional``: None is allowed as well, as the message then says, but not here.

    >>> integer("num_splits", np.array(3, np.int8), 1, 8)
    3
    """
    number = value if type(value) is int else as_integer(value)
    if number is None or not low <= number <= high:
        others = ", or None," if optional else ""
        raise ArgumentError(f"{name} is {shown(value)}; an integer from {low} to {high}{others} is allowed")
    return number


def real(
    name: str,
    value: Any,
    rule: str = "a finite number is needed",
    allowed: Callable[[float], bool] = math.isfinite,
    *,
    optional: bool = False,
) -> float:
    """Return ``value`` as a finite float that is ``allowed``, as the ``rule`` says.

    Raises `ArgumentError` for what is no number or not allowed, and `NonFiniteError` for NaN, infinity, and numbers
    that no float is near to.

    >>> real("scale", np.float16(0.5))
    0.5
    """
    number = value if type(value) is float else as_real(value)
    if number is None:
        others = " or None" if optional else ""
        kind = type(value).__name__
        raise ArgumentError(f"{name} is {shown(value)} of type {kind}; a number{others} is allowed")
    if not math.isfinite(number):
        raise NonFiniteError(f"{name} is {shown(value)}; {rule}")
    if not allowed(number):
        raise ArgumentError(f"{name} is {shown(value)}; {rule}")
    return number


def check_flag(name: str, value: Any) -> bool:
    """Return ``value`` as a bool; `ArgumentError` for anything that is none."""
    held = value if type(value) is bool else as_flag(value)
    if held is None:
        raise ArgumentError(f"{name} is {shown(value)}; allowed are False and True")
    return held


def choice(name: str, value: Any, options: Collection[str], *, optional: bool = False) -> str:
    """Return ``value``, one of the ``options``; `ArgumentError` for anything else."""
    if not isinstance(value, str) or value not in options:
        *most, last = [*["None"][: int(optional)], *map(repr, options)]
        raise ArgumentError(f"{name} is {shown(value)}; allowed are {', '.join(most)} and {last}")
    return str(value)


def check_dtype(name: str, value: Any, allowed: Collection[str]) -> np.dtype[Any]:
    """Return ``value`` as a dtype, like `any_dtype`; `DTypeError` unless it is ``allowed``."""
    found = _dtype(value)
    if found is None or found.name not in allowed or not found.isnative:
        raise DTypeError(f"{name} is {shown(value)}; allowed are {', '.join(allowed)} (native)")
    return found


def any_dtype(name: str, value: Any) -> np.dtype[Any]:
    """Return ``value``, a dtype of NumPy or `ml_dtypes`, or the type or name of one, as a dtype; else `DTypeError`."""
    found = _dtype(value)
    if found is None:
        raise DTypeError(f"{name} is {shown(value)}, which is no dtype")
    return found


def _dtype(value: Any) -> np.dtype[Any] | None:
    if not isinstance(value, np.dtype | type | str | list | tuple | dict):
        return None  # to NumPy, None is float64, and whatever has a dtype is one
    with suppress(Exception):  # a foreign object may raise what it likes
        named: Any = getattr(ml_dtypes, value, value) if isinstance(value, str) else value
        return np.dtype(named)
    return None


def as_integer(value: Any) -> int | None:
    """Return the integer that ``value`` is, of whatever size; None if it is none."""
    held = _held(value)
    try:
        return None if isinstance(held, bool) else operator.index(held)
    except Exception:  # no integer, or a foreign one that is none
        return None


def as_real(value: Any) -> float | None:
    """Return the number that ``value`` is, infinite if it is beyond every float; None if it is none."""
    held = _held(value)
    if isinstance(held, bool) or not isinstance(held, Real):
        return None
    try:
        return float(held)
    except OverflowError:
        return math.inf
    except Exception:
        return None


def as_flag(value: Any) -> bool | None:
    """Return the bool that ``value`` is; None if it is none."""
    held = _held(value)
    return held if isinstance(held, bool) else None


def _held(value: Any) -> Any:
    """Return the Python number of a NumPy scalar or an array of rank 0 on the host; anything but arrays as it is.

    None for other arrays, and for scalars that are no numbers, such as dates.
    """
    try:
        if not isinstance(value, np.ndarray | np.generic):
            if not hasattr(value, "__dlpack_device__"):
                return value
            if getattr(value, "ndim", None) != 0 or dlpack.cuda_device(value) is not None:
                return None
            value = dlpack.from_host(value)
        if value.ndim or isinstance(value, getattr(sys.modules.get("numpy.ma"), "MaskedArray", ())):
            return None
        held = value.item()
    except Exception:  # exporters raise what they like
        return None
    if isinstance(held, np.longdouble):
        return float(held)
    return held if value.dtype.kind not in "mM" and isinstance(held, bool | int | float) else None
