"""Attention over disjoint sets of keys, put together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from cuattn.reference.softmax import Array, logsumexp

__all__ = ["merge_states"]


def merge_states(
    outs: Sequence[ArrayLike],
    lses: Sequence[ArrayLike],
    *,
    sinks: ArrayLike | None = None,
    dtype: DTypeLike = np.float64,
) -> tuple[Array, Array]:
    """Attention over the union of disjoint sets of keys, from the attention over each: ``sum(e^(lse_s - lse) out_s)``.

    `outs` S arrays [..., N, H, E], `lses` S arrays [..., H, N] without the sink; `sinks` [H] enters here. A part that
    saw nothing (lse -inf) changes nothing, whatever its out holds; one with lse +inf or NaN makes the row NaN.
    """
    parts = np.stack([np.asarray(lse).astype(dtype) for lse in lses])
    stack = parts
    if sinks is not None:
        sink = np.asarray(sinks).astype(dtype)[:, None]
        stack = np.concatenate([parts, np.broadcast_to(sink, parts[:1].shape)])
    lse = logsumexp(stack, axis=0, dtype=dtype)
    with np.errstate(invalid="ignore"):
        weights = np.where(np.isneginf(parts), 0, np.exp(parts - lse)).swapaxes(-1, -2)[..., None]
        values = np.stack([np.asarray(out).astype(dtype) for out in outs])
        return np.where(weights == 0, 0, weights * values).sum(axis=0), lse
