"""Random parts of an attention, for the tests of merge_states."""

from __future__ import annotations

import ml_dtypes
import numpy as np

F16, BF16, F32, F64 = (np.dtype(t) for t in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))


def lses_of(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype, spread: float) -> np.ndarray:
    """Random lse, a fifth of them -inf, some rows all of them."""
    lses = (rng.standard_normal(shape) * spread).astype(dtype)
    lses[rng.random(shape) < 0.2] = -np.inf
    lses[:, rng.random(shape[1:]) < 0.1] = -np.inf
    return lses


def outs_of(rng: np.random.Generator, lses: np.ndarray, head_dim: int, dtype: np.dtype) -> np.ndarray:
    """Random outs; those of empty parts hold NaN."""
    rows = np.moveaxis(lses, -1, -2)
    outs = rng.standard_normal((*rows.shape, head_dim)).astype(dtype)
    outs[np.isneginf(rows)] = np.nan
    return outs
