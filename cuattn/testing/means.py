"""What errors of the logits may do to an attention output, which is a mean of values whatever its weights are."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cuattn import reference
from cuattn.reference.attention import split_options

__all__ = ["what_logits_move"]

Array = NDArray[Any]

#: The errors of a row from which on it is looked at as a mean: below, e^r - 1 is smaller than the output.
LARGE_ERROR = 0.25
#: Keys whose logit is this much farther from the largest than errors reach are nothing: e^-40.
NOTHING = 40.0


def what_logits_move(
    out: Array, spread: Array, row: Array, q: Array, k: Array, v: Array, *, sinks: ArrayLike | None = None,
    **options: Any,
) -> Array:  # fmt: skip
    """Return ``min((e^r - 1) (P |V|), h)`` of the rule, [B, N, H, E].

    Args:
        out, spread: the reference, and that of |V|, [B, N, H, E].
        row: the ``r`` of each row, [B, H, N].
        q, k, v: the numbers of the problem, descales multiplied in; options as :func:`cuattn.reference.attention`.
    """
    moved = np.asarray(np.expm1(np.minimum(row, 700)).swapaxes(1, 2)[..., None] * spread)
    large = np.argwhere(row > LARGE_ERROR)
    if not large.size:
        return moved
    of_logits, of_dropout = split_options(options)
    of_logits.pop("precision", None)
    logits = reference.logits(q.astype(np.float64), k.astype(np.float64), **of_logits)
    rescale = 1 / (1 - of_dropout.get("dropout_p", 0))
    group = q.shape[2] // k.shape[2]
    for b, h, n in large:
        sink = -np.inf if sinks is None else float(np.asarray(sinks).astype(np.float64)[h])
        reach = max(np.max(logits[b, h, n], initial=-np.inf), sink) - 2 * row[b, h, n] - NOTHING
        values = v[b, logits[b, h, n] >= reach, h // group].astype(np.float64) * rescale
        if not len(values):
            continue
        low, high = values.min(axis=0), values.max(axis=0)
        if of_dropout or sink >= reach:  # what takes a part of the weights, and has no value
            low, high = np.minimum(low, 0), np.maximum(high, 0)
        others = np.abs(v[b, :, h // group].astype(np.float64)).max(axis=0) * rescale * len(v[b]) * np.exp(-NOTHING)
        distance = np.maximum(high - out[b, n, h], out[b, n, h] - low) + others
        moved[b, n, h] = np.fmin(moved[b, n, h], distance.astype(np.float64))
    return moved
