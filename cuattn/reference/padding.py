"""Padded and packed batches, in terms of the mask itself."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from cuattn.reference.softmax import Array

__all__ = ["padding_plan", "remove_padding", "restore_padding"]


def padding_plan(mask: ArrayLike) -> tuple[Array, Array, int]:
    """Return (indices [T], cu_seqlens [B + 1], max_seqlen) of a `mask` [B, N] that is nonzero at real tokens.

    >>> indices, cu_seqlens, max_seqlen = padding_plan([[0, 1, 1], [1, 0, 0]])
    >>> indices.tolist(), cu_seqlens.tolist(), max_seqlen
    ([1, 2, 3], [0, 2, 3], 2)
    """
    real = np.asarray(mask) != 0
    lengths = real.sum(axis=1)
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    return np.flatnonzero(real).astype(np.int32), cu_seqlens.astype(np.int32), int(lengths.max(initial=0))


def remove_padding(x: ArrayLike, mask: ArrayLike) -> Array:
    """Return the real tokens [T, ...] of `x` [B, N, ...]; no arithmetic, any dtype.

    >>> remove_padding([[1.0, 2.0], [3.0, 4.0]], [[1, 0], [1, 1]]).tolist()
    [1.0, 3.0, 4.0]
    """
    return np.asarray(np.asarray(x)[np.asarray(mask) != 0])


def restore_padding(x: ArrayLike, mask: ArrayLike) -> Array:
    """Put `x` [T, ...] at the real tokens of [B, N, ...], zeros elsewhere.

    >>> restore_padding([1.0, 3.0, 4.0], [[1, 0], [1, 1]]).tolist()
    [[1.0, 0.0], [3.0, 4.0]]
    """
    real, tokens = np.asarray(mask) != 0, np.asarray(x)
    padded = np.zeros((*real.shape, *tokens.shape[1:]), tokens.dtype)
    padded[real] = tokens
    return padded
