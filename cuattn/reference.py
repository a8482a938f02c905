"""What the kernels must compute, written from the formulas.

Every function here is plain NumPy in float64: no tiles, no running maximum, no scaled exponent, nothing that a kernel
might also do and get wrong in the same way. It is slow and stores the whole ``[batch, heads, seqlen_q, seqlen_k]``
matrix; its only purpose is to be read and believed. ``dtype=numpy.longdouble`` gives the oracle for float64 kernels.

Letters: B batch, N query length, M key length, H query heads, G key/value heads, D head dim, E value head dim.
Arrays are ``[B, N, H, D]``; query head ``h`` reads key/value head ``h // (H // G)``.

>>> import numpy as np
>>> q = np.zeros((1, 2, 1, 4)); k = np.zeros((1, 2, 1, 4)); v = np.arange(2.0).reshape(1, 2, 1, 1)
>>> out, lse = attention(q, k, v, causal=True)
>>> out.ravel().tolist(), lse.ravel().round(4).tolist()
([0.0, 0.5], [0.0, 0.6931])
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from cuattn.errors import ArgumentError

Array = NDArray[Any]

__all__ = [
    "OnlineSoftmax",
    "attention",
    "attention_naive",
    "diagonal",
    "log_softmax",
    "logits",
    "logsumexp",
    "merge_states",
    "probabilities",
    "softmax",
    "visible",
]


# ---------------------------------------------------------------------------------------------------------------------
# Softmax along one axis. A row that is all -inf has no distribution: probabilities 0, logsumexp -inf, never NaN.
# A row with a +inf or a NaN is NaN.
# ---------------------------------------------------------------------------------------------------------------------


def _row_max(x: Array, axis: int) -> Array:
    """The maximum of each row, keeping the axis; -inf for a row without elements."""
    return np.max(x, axis=axis, keepdims=True, initial=-np.inf)


def _exp_minus_max(x: Array, axis: int) -> tuple[Array, Array]:
    """``exp(x - max)`` and ``max``; the maximum of an all -inf row counts as 0, so that the row gives zeros."""
    row_max = _row_max(x, axis)
    with np.errstate(invalid="ignore"):  # inf - inf: the NaN of a +inf row is the answer
        return np.exp(x - np.where(np.isneginf(row_max), x.dtype.type(0), row_max)), row_max


def _divide_rows(numerator: Array, row_sum: Array) -> Array:
    """``numerator / row_sum`` with 0 for the empty rows, whose sum is 0."""
    return np.asarray(numerator / np.where(row_sum == 0, row_sum.dtype.type(1), row_sum))


def softmax(x: ArrayLike, axis: int = -1, *, dtype: DTypeLike = np.float64) -> Array:
    """``exp(x) / sum(exp(x))`` along `axis`; any shape, computed and returned in `dtype`.

    >>> softmax([0.0, math.log(3.0)]).round(4).tolist()
    [0.25, 0.75]
    """
    e, _ = _exp_minus_max(np.asarray(x).astype(dtype), axis)
    return _divide_rows(e, e.sum(axis=axis, keepdims=True))


def logsumexp(x: ArrayLike, axis: int = -1, *, dtype: DTypeLike = np.float64) -> Array:
    """``log(sum(exp(x)))`` along `axis`, which is removed; natural logarithm.

    >>> float(logsumexp([0.0, 0.0]).round(4))
    0.6931
    """
    e, row_max = _exp_minus_max(np.asarray(x).astype(dtype), axis)
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


class OnlineSoftmax:
    """The state (m, d) of a softmax whose row arrives in pieces: ``m = max x``, ``d = sum(exp(x - m))``.

    `shape` is that of the rows; each update has one more axis, the last, of any length. Milakov and Gimelshein, "Online
    normalizer calculation for softmax", 2018.

    >>> state = OnlineSoftmax((1,))
    >>> state.update([[0.0, 1.0]])
    >>> state.update([[2.0]])
    >>> bool(np.allclose(state.logsumexp(), logsumexp([0.0, 1.0, 2.0])))
    True
    """

    def __init__(self, shape: int | Sequence[int], dtype: DTypeLike = np.float64) -> None:
        self.m = np.full(shape, -np.inf, dtype)
        self.d = np.zeros(shape, dtype)

    def update(self, x: ArrayLike) -> None:
        """Take the elements ``x [*shape, any]`` into the rows."""
        piece = OnlineSoftmax(self.m.shape, self.m.dtype)
        e, row_max = _exp_minus_max(np.asarray(x).astype(self.m.dtype), -1)
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
            return _divide_rows(np.exp(np.asarray(x).astype(self.m.dtype) - m), self.d[..., None])


# ---------------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------------


def diagonal(
    seqlen_q: int, seqlen_k: int, causal: bool | str = False, diagonal_offset: ArrayLike | None = None
) -> Array:
    """The key position ``i + o`` that query i is aligned with, [B or 1, 1, N, 1].

    ``o = M - N`` (the last query sees the last key), 0 with ``causal="top_left"``, or `diagonal_offset` (one integer,
    or one per batch entry) when it is given.
    """
    if not (isinstance(causal, bool | np.bool_) or causal in ("bottom_right", "top_left")):
        raise ArgumentError(f"causal is {causal!r}; allowed are False, True, 'bottom_right' and 'top_left'")
    if diagonal_offset is None:
        diagonal_offset = 0 if isinstance(causal, str) and causal == "top_left" else seqlen_k - seqlen_q
    offset = np.asarray(diagonal_offset, dtype=np.int64).reshape(-1, 1, 1, 1)
    return np.asarray(np.arange(seqlen_q).reshape(1, 1, -1, 1) + offset)


def visible(
    seqlen_q: int,
    seqlen_k: int,
    *,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    mask: ArrayLike | None = None,
    diagonal_offset: ArrayLike | None = None,
) -> Array:
    """Which key each query may attend to: boolean, broadcastable to [B, H, N, M].

    >>> visible(2, 3, causal=True)[0, 0].astype(int).tolist()
    [[1, 1, 0], [1, 1, 1]]
    >>> visible(2, 3, causal="top_left", window=(0, None))[0, 0].astype(int).tolist()
    [[1, 0, 0], [0, 1, 0]]
    """
    key = np.arange(seqlen_k).reshape(1, 1, 1, -1)
    aligned = diagonal(seqlen_q, seqlen_k, causal, diagonal_offset)
    seen = np.ones((1, 1, seqlen_q, seqlen_k), dtype=bool)
    if causal:
        seen = seen & (key <= aligned)
    left, right = window if window is not None else (None, None)
    if left is not None:
        seen = seen & (key >= aligned - left)
    if right is not None:
        seen = seen & (key <= aligned + right)
    if mask is not None:
        seen = seen & np.asarray(mask, dtype=bool)
    return np.asarray(seen)


def _heads_first(x: ArrayLike, num_heads: int, dtype: DTypeLike) -> Array:
    """[B, len, G, D] to [B, H, len, D]: each of the G heads serves H // G consecutive query heads."""
    values = np.asarray(x)
    repeats = num_heads // values.shape[2] if values.shape[2] else 1
    return np.repeat(values.astype(dtype), repeats, axis=2).transpose(0, 2, 1, 3)


def logits(
    q: ArrayLike,
    k: ArrayLike,
    *,
    scale: float | None = None,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    diagonal_offset: ArrayLike | None = None,
    dtype: DTypeLike = np.float64,
) -> Array:
    """The final logits [B, H, N, M] of ``q [B, N, H, D]`` and ``k [B, M, G, D]``, in the order that the contract fixes:

    1. ``s = scale * (q . k)``, `scale` 1/sqrt(D) by default;
    2. `softcap` c: ``s = c * tanh(s / c)``;
    3. `alibi_slopes` ([H] or [B, H]): ``s -= slope * |i + o - j|`` with the offset o of :func:`diagonal`;
    4. `bias`, broadcast to [B, H, N, M]: ``s += bias``;
    5. -inf where a key is not :func:`visible`.
    """
    queries, keys = np.asarray(q), np.asarray(k)
    num_heads = queries.shape[2]
    if scale is None:
        scale = 1.0 / math.sqrt(queries.shape[3])
    real: Any = np.dtype(dtype).type
    with np.errstate(invalid="ignore", over="ignore"):
        s = _heads_first(queries, num_heads, dtype) @ _heads_first(keys, num_heads, dtype).swapaxes(-1, -2)
        s = s * real(scale)
        if softcap is not None:
            s = real(softcap) * np.tanh(s / real(softcap))
        seqlen_q, seqlen_k = s.shape[2:]
        if alibi_slopes is not None:
            slopes = np.asarray(alibi_slopes).astype(dtype)
            slopes = slopes.reshape(-1 if slopes.ndim == 2 else 1, num_heads, 1, 1)
            aligned = diagonal(seqlen_q, seqlen_k, causal, diagonal_offset)
            s = s - slopes * np.abs(aligned - np.arange(seqlen_k)).astype(dtype)
        if bias is not None:
            s = s + np.asarray(bias).astype(dtype)
    seen = visible(seqlen_q, seqlen_k, causal=causal, window=window, mask=mask, diagonal_offset=diagonal_offset)
    return np.asarray(np.where(seen, s, real(-np.inf)))


def _probabilities(s: Array, sinks: ArrayLike | None) -> tuple[Array, Array]:
    """P [B, H, N, M] and lse [B, H, N] of the logits; a sink is one more logit, whose value is nowhere."""
    num_keys = s.shape[3]
    if sinks is not None:
        sink = np.asarray(sinks).astype(s.dtype).reshape(1, -1, 1, 1)
        s = np.concatenate([s, np.broadcast_to(sink, (*s.shape[:3], 1))], axis=3)
    p = softmax(s, dtype=s.dtype)
    return p[..., :num_keys], logsumexp(s, dtype=s.dtype)


def probabilities(
    q: ArrayLike, k: ArrayLike, *, sinks: ArrayLike | None = None, dtype: DTypeLike = np.float64, **options: Any
) -> Array:
    """P [B, H, N, M], the softmax of :func:`logits` (same options) over the keys and, if there is one, the sink."""
    return _probabilities(logits(q, k, dtype=dtype, **options), sinks)[0]


def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    sinks: ArrayLike | None = None,
    dtype: DTypeLike = np.float64,
    **options: Any,
) -> tuple[Array, Array]:
    """``softmax(logits) v``: out [B, N, H, E] and the natural-log lse [B, H, N] of the final logits.

    `q` [B, N, H, D], `k` [B, M, G, D], `v` [B, M, G, E]; `options` are those of :func:`logits`. `sinks` [H] adds one
    logit per head to the denominator (and to lse) only. A query that sees no key has out 0 and lse -inf (lse = sink
    with a sink); one with a +inf logit is NaN in both. Vaswani et al., "Attention is all you need", 2017.
    """
    p, lse = _probabilities(logits(q, k, dtype=dtype, **options), sinks)
    with np.errstate(invalid="ignore", over="ignore"):
        out = p @ _heads_first(v, p.shape[1], dtype)
    return out.transpose(0, 2, 1, 3), lse


def attention_naive(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, *, sinks: ArrayLike | None = None, **options: Any
) -> tuple[Array, Array]:
    """The same formulas in the precision of a kernel: what plain, correct code may lose by rounding.

    float32 arithmetic (float64 for float64 inputs), probabilities rounded to the dtype of `v`, out rounded to the dtype
    of `q`. Not an oracle: its distance from one is the yardstick of :mod:`cuattn.testing.tolerance`.
    """
    queries, values = np.asarray(q), np.asarray(v)
    dtype = np.float64 if queries.dtype == np.float64 else np.float32
    p, lse = _probabilities(logits(queries, k, dtype=dtype, **options), sinks)
    with np.errstate(invalid="ignore", over="ignore"):
        out = p.astype(values.dtype).astype(dtype) @ _heads_first(values, p.shape[1], dtype)
        return out.transpose(0, 2, 1, 3).astype(queries.dtype), lse


def merge_states(
    outs: Sequence[ArrayLike], lses: Sequence[ArrayLike], *, sinks: ArrayLike | None = None
) -> tuple[Array, Array]:
    """Attention over the union of disjoint sets of keys, from the attention over each: ``sum(e^(lse_s - lse) out_s)``.

    `outs` S arrays [B, N, H, E], `lses` S arrays [B, H, N] without the sink; `sinks` [H] enters here. A part that saw
    nothing (lse -inf) changes nothing, whatever its out holds.
    """
    parts = np.stack([np.asarray(lse).astype(np.float64) for lse in lses])
    stack = parts
    if sinks is not None:
        sink = np.asarray(sinks).astype(np.float64).reshape(1, 1, -1, 1)
        stack = np.concatenate([parts, np.broadcast_to(sink, parts[:1].shape)])
    lse = logsumexp(stack, axis=0)
    with np.errstate(invalid="ignore"):
        weights = np.where(np.isneginf(parts), 0.0, np.exp(parts - lse)).swapaxes(-1, -2)[..., None]
        values = np.stack([np.asarray(out).astype(np.float64) for out in outs])
        return np.where(weights == 0, 0.0, weights * values).sum(axis=0), lse
