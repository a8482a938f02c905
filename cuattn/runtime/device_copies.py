"""Copies of arrays, of every dtype that kernels here read.

CuPy compiles its copies for the types that it can name in CUDA C. It has none for 8-bit floats: arrays of them exist as
views of memory, but it neither makes nor copies nor converts them. Their bytes are copied instead.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np


def copied(x: Any, dtype: Any = None) -> Any:
    """Copy a NumPy or CuPy array in C order, as ``dtype`` (default: its own), on the current device."""
    dtype = x.dtype if dtype is None else np.dtype(dtype)
    if isinstance(x, np.ndarray):
        return np.array(x, dtype, order="C")
    array = sys.modules["cupy"].array
    if dtype == x.dtype and dtype.itemsize == 1:
        return array(x.view(np.uint8), order="C").view(dtype)
    return array(x, dtype, order="C")
