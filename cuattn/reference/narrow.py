"""The narrow formats of inputs and of intermediate results."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from cuattn.errors import ArgumentError
from cuattn.reference.softmax import Array

__all__ = [
    "FP8_FORMATS",
    "P_FACTORS",
    "decode",
    "output_dtype",
    "probability_dtype",
    "round_probabilities",
    "round_to_tf32",
]

#: Names of the 8-bit formats that a uint8 array may hold, and their dtypes.
FP8_FORMATS = {"e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn), "e5m2": np.dtype(ml_dtypes.float8_e5m2)}


def decode(x: ArrayLike, fp8_format: str | None = None) -> Array:
    """`x` with the dtype that says what its bits mean: uint8 becomes the float8 dtype named by `fp8_format`.

    >>> decode(np.array([0x38, 0x7E], np.uint8), "e4m3fn").astype(float).tolist()
    [1.0, 448.0]
    """
    values = np.asarray(x)
    if values.dtype != np.uint8:
        return values
    if fp8_format not in FP8_FORMATS:
        raise ArgumentError(
            f"fp8_format is {fp8_format!r}; uint8 arrays need one of {', '.join(map(repr, FP8_FORMATS))}"
        )
    return values.view(FP8_FORMATS[fp8_format])


def output_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    """The dtype of out for inputs of `dtype`: bfloat16 for 8-bit ones, else the same."""
    return np.dtype(ml_dtypes.bfloat16) if np.dtype(dtype) in FP8_FORMATS.values() else np.dtype(dtype)


def probability_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    """What probabilities are rounded to for inputs of `dtype`: float16 for 8-bit ones, which it holds exactly."""
    return np.dtype(np.float16) if np.dtype(dtype) in FP8_FORMATS.values() else np.dtype(dtype)


#: What probabilities are multiplied with before they are rounded: e4m3 ends at 448 and at 2^-9, float16 at 65504 and
#: at 2^-24.
P_FACTORS = {np.dtype(ml_dtypes.float8_e4m3fn): 2**8, np.dtype(np.float16): 2**15}


def round_probabilities(p: ArrayLike, dtype: DTypeLike) -> Array:
    """Probabilities `p` as kernels round them to `dtype`, times a power of two where it has few exponents.

    >>> round_probabilities([1.0, 0.55, 2.0**-17, 2.0**-19], ml_dtypes.float8_e4m3fn).tolist()
    [1.0, 0.5625, 7.62939453125e-06, 0.0]
    >>> round_probabilities([1.0, 2.0**-39, 2.0**-41], np.float16).tolist() == [1.0, 2.0**-39, 0.0]
    True
    """
    values = np.asarray(p)
    factor = P_FACTORS.get(np.dtype(dtype), 1)
    with np.errstate(over="ignore"):
        return np.asarray((values * factor).astype(dtype).astype(values.dtype) / factor)


def round_to_tf32(x: ArrayLike) -> Array:
    """`x` as float32 with 10 bits of mantissa, to the nearest, ties away from zero, as tensor cores read float32.

    >>> round_to_tf32([1 + 2**-11, -1 - 2**-11, 1 + 2**-12]).tolist() == [1 + 2**-10, -1 - 2**-10, 1.0]
    True
    """
    values = np.asarray(x, dtype=np.float32)
    bits = (values.view(np.uint32) + np.uint32(1 << 12)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(values), bits.view(np.float32), values)
