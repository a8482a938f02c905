"""Spacing and unit roundoff of the floating dtypes, the narrow ones of ml_dtypes included."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

__all__ = ["accumulation_dtype", "to_numpy", "ulp", "unit_roundoff"]


def accumulation_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    """Return what a kernel accumulates values of `dtype` in: float64 for float64, else float32."""
    return np.dtype(np.float64 if np.dtype(dtype) == np.float64 else np.float32)


def unit_roundoff(dtype: DTypeLike) -> float:
    """Return the largest relative error of rounding to nearest: 2^-11 for float16, 2^-8 for bfloat16, 2^-24, 2^-53."""
    return float(ml_dtypes.finfo(np.dtype(dtype)).eps) / 2


def ulp(x: ArrayLike, dtype: DTypeLike) -> NDArray[np.float64]:
    """Return the distance of neighbours of `dtype` around `x`: the smallest subnormal around 0, NaN if x is not finite.

    >>> ulp([1.0, 1.5, 2.0, 0.0], np.float16).tolist() == [2**-10, 2**-10, 2**-9, 2**-24]
    True
    """
    info = ml_dtypes.finfo(np.dtype(dtype))
    values = np.abs(np.asarray(x, dtype=np.float64))
    _, exponent = np.frexp(values)  # values = m * 2^exponent with 0.5 <= m < 1
    exponent = np.where(values == 0, info.minexp, np.maximum(exponent - 1, info.minexp))
    return np.where(np.isfinite(values), np.ldexp(1.0, exponent - info.nmant), np.nan)


def to_numpy(x: Any) -> NDArray[Any]:
    """Return what a kernel returned as a NumPy array: CuPy arrays are copied from the device."""
    return np.asarray(x.get() if hasattr(x, "get") and hasattr(x, "device") else x)
