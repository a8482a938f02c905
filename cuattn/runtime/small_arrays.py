"""Numbers and small arrays that say something about the large ones: slopes, sinks, factors, offsets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cuattn.dtypes import DTYPES
from cuattn.errors import ArgumentError, DTypeError, NonFiniteError, ShapeError
from cuattn.runtime.executor import Executor
from cuattn.scalars import check_flag

__all__ = ["as_float", "check_flag", "small_array"]


def as_float(x: Any) -> float:
    """Return a number as a float; infinite beyond the range."""
    try:
        return float(x)
    except OverflowError:
        return math.inf


def small_array(
    executor: Executor,
    name: str,
    value: Any,
    shapes: Sequence[tuple[int, ...]],
    dtype: np.dtype[Any],
    *,
    minus_infinity: bool = False,
) -> Any:
    """Take a small array of numbers, contiguous, of `dtype`, where the executor's kernels can read it.

    It may be a list, or lie on the host beside arrays on a GPU. Then its values are checked as well: they are finite,
    or -inf where `minus_infinity` allows it. Integers are taken for floats, in whatever byte order. Raises
    `ArrayTypeError`, `DTypeError`, `ShapeError`, `NonFiniteError` or `ArgumentError`.
    """
    array = executor.metadata(name, value)
    known = array.dtype.kind in ("iuf" if dtype.kind == "f" else "iu")
    known |= isinstance(value, list | tuple) and not array.size  # nothing: NumPy takes it for floats
    if not known and not (dtype.kind == "f" and array.dtype in DTYPES):  # NumPy's floats, and bfloat16
        kind = "numbers" if dtype.kind == "f" else "integers"
        raise DTypeError(f"{name} has dtype {array.dtype}; {kind} are needed")
    if tuple(array.shape) not in shapes:
        allowed = " or ".join(str(list(shape)) for shape in shapes)
        raise ShapeError(f"{name} has shape {list(array.shape)}; allowed is {allowed}")
    if isinstance(array, np.ndarray):
        _check_values(name, array, dtype, minus_infinity)
    return executor.put(array, dtype)


def _check_values(name: str, array: np.ndarray[Any, Any], dtype: np.dtype[Any], minus_infinity: bool) -> None:
    if dtype.kind == "i":
        if array.size and (array.min() < -(2**31) + 1 or array.max() > 2**31 - 1):
            raise ArgumentError(f"{name} holds a number that is not in the range of int32")
        return
    with np.errstate(over="ignore"):
        values = array.astype(dtype)
    allowed = np.isfinite(values) | (np.isneginf(values) & minus_infinity)
    if not np.all(allowed):
        needed = "finite numbers and -inf are allowed" if minus_infinity else "finite numbers are needed"
        raise NonFiniteError(f"{name} holds {array[~allowed].ravel()[0]}; {needed}")
