"""Softmax along one axis, from the formulas.

A row that is all -inf has no distribution: probabilities 0, logsumexp -inf, never NaN. A row with a +inf or a NaN is
NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

__all__ = ["Array", "divide_rows", "exp_minus_max", "log_softmax", "logsumexp", "softmax"]

Array = NDArray[Any]


def _row_max(x: Array, axis: int) -> Array:
    """The maximum of each row, keeping the axis; -inf for a row without elements."""
    return np.max(x, axis=axis, keepdims=True, initial=-np.inf)


def exp_minus_max(x: Array, axis: int) -> tuple[Array, Array]:
    """``exp(x - max)`` and ``max``; the maximum of an all -inf row counts as 0, so that the row gives zeros."""
    row_max = _row_max(x, axis)
    with np.errstate(invalid="ignore"):  # inf - inf: the NaN of a +inf row is the answer
        return np.exp(x - np.where(np.isneginf(row_max), x.dtype.type(0), row_max)), row_max


def divide_rows(numerator: Array, row_sum: Array) -> Array:
    """``numerator / row_sum`` with 0 for the empty rows, whose sum is 0."""
    return np.asarray(numerator / np.where(row_sum == 0, row_sum.dtype.type(1), row_sum))


def softmax(x: ArrayLike, axis: int = -1, *, dtype: DTypeLike = np.float64) -> Array:
    """``exp(x) / sum(exp(x))`` along `axis`; any shape, computed and returned in `dtype`.

    >>> softmax([0.0, np.log(3.0)]).round(4).tolist()
    [0.25, 0.75]
    """
    e, _ = exp_minus_max(np.asarray(x).astype(dtype), axis)
    return divide_rows(e, e.sum(axis=axis, keepdims=True))


def logsumexp(x: ArrayLike, axis: int = -1, *, dtype: DTypeLike = np.float64) -> Array:
    """``log(sum(exp(x)))`` along `axis`, which is removed; natural logarithm.

    >>> float(logsumexp([0.0, 0.0]).round(4))
    0.6931
    """
    e, row_max = exp_minus_max(np.asarray(x).astype(dtype), axis)
    with np.errstate(divide="ignore"):  # log(0): the -inf of an empty row is the answer
        return np.asarray(np.squeeze(row_max + np.log(e.sum(axis=axis, keepdims=True)), axis=axis))


def log_softmax(x: ArrayLike, axis: int = -1, *, dtype: DTypeLike = np.float64) -> Array:
    """``x - logsumexp(x)`` along `axis`; -inf everywhere in an all -inf row.

    >>> log_softmax([0.0, 0.0]).round(4).tolist()
    [-0.6931, -0.6931]
    """
    values = np.asarray(x).astype(dtype)
    lse = np.expand_dims(logsumexp(values, axis, dtype=dtype), axis)
    with np.errstate(invalid="ignore"):
        return np.where(np.isneginf(lse), -np.inf, values - lse).astype(dtype)
