"""A softmax whose row arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from cuattn.reference.softmax import Array, divide_rows, exp_minus_max

__all__ = ["OnlineSoftmax"]


class OnlineSoftmax:
    """The state (m, d) of a softmax whose row arrives in pieces: ``m = max x``, ``d = sum(exp(x - m))``.

    `shape` is that of the rows; each update has one more axis, the last, of any length. Milakov and Gimelshein, "Online
    normalizer calculation for softmax", 2018.

    >>> state = OnlineSoftmax((1,))
    >>> state.update([[0.0, 1.0]])
    >>> state.update([[2.0]])
    >>> np.exp(state.logsumexp() - np.logaddexp.reduce([0.0, 1.0, 2.0])).round(12)
    array([1.])
    """

    def __init__(self, shape: int | Sequence[int], dtype: DTypeLike = np.float64) -> None:
        self.m = np.full(shape, -np.inf, dtype)
        self.d = np.zeros(shape, dtype)

    def update(self, x: ArrayLike) -> None:
        """Take the elements ``x [*shape, any]`` into the rows."""
        piece = OnlineSoftmax(self.m.shape, self.m.dtype)
        e, row_max = exp_minus_max(np.asarray(x).astype(self.m.dtype), -1)
        piece.m, piece.d = row_max[..., 0], e.sum(axis=-1)
        self.merge(piece)

    def merge(self, other: OnlineSoftmax) -> None:
        """Take the rows of another state: associative and commutative up to rounding."""
        m = np.maximum(self.m, other.m)
        with np.errstate(invalid="ignore"):  # -inf - -inf: a state without elements, replaced by the factor 1
            own, others = (np.where(s.m == m, 1, np.exp(s.m - m)) for s in (self, other))
        self.m, self.d = m, self.d * own + other.d * others

    def logsumexp(self) -> Array:
        """``m + log(d)`` [*shape]; -inf for a row that holds nothing."""
        with np.errstate(divide="ignore"):
            return np.asarray(self.m + np.log(self.d))

    def probabilities(self, x: ArrayLike) -> Array:
        """``exp(x - m) / d`` [*shape, any]; zeros for rows that hold nothing."""
        m = np.where(np.isneginf(self.m), 0, self.m)[..., None]
        with np.errstate(invalid="ignore"):
            return divide_rows(np.exp(np.asarray(x).astype(self.m.dtype) - m), self.d[..., None])
