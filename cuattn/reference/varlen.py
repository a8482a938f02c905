"""Attention over packed sequences: one sequence at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from cuattn.reference.attention import attention
from cuattn.reference.dropout import dropout_keep
from cuattn.reference.softmax import Array

__all__ = ["attention_varlen", "place_of_sequence", "sequences"]


def place_of_sequence(shape: tuple[int, ...], b: int, seqlen_q: int, seqlen_k: int) -> tuple[slice, ...]:
    """Where sequence `b` finds its part of an array whose 4-dimensional `shape` broadcasts to [B, H, max_q, max_k]."""
    return (
        slice(b, b + 1) if shape[0] > 1 else slice(None),
        slice(None),
        slice(seqlen_q) if shape[2] > 1 else slice(None),
        slice(seqlen_k) if shape[3] > 1 else slice(None),
    )


def _of_sequence(name: str, value: Any, b: int, seqlen_q: int, seqlen_k: int) -> Any:
    """Return what an option of the whole call is to sequence `b` of it."""
    if value is None:
        return None
    if name in ("bias", "mask", "dropout_keep"):
        full = np.asarray(value)
        full = full.reshape((1,) * (4 - full.ndim) + full.shape)
        return full[place_of_sequence(full.shape, b, seqlen_q, seqlen_k)]
    if name in ("q_descale", "k_descale", "v_descale") or (name == "alibi_slopes" and np.ndim(value) == 2):
        return np.asarray(value)[b : b + 1]
    if name == "diagonal_offset" and np.ndim(value) == 1:
        return np.asarray(value)[b : b + 1]
    return value


def sequences(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, cu_seqlens_q: ArrayLike, cu_seqlens_k: ArrayLike, **options: Any
) -> Iterator[tuple[slice, Array, Array, Array, dict[str, Any]]]:
    """Yield (where in q, q [1, N, H, D], k, v, options) of each sequence of a packed call.

    `options` are those of :func:`attention`; bias, mask and the dropout mask broadcast to [B, H, max_q, max_k] and are
    indexed by positions in the sequence.
    """
    queries, keys, values = np.asarray(q), np.asarray(k), np.asarray(v)
    starts_q, starts_k = (np.asarray(cu, dtype=np.int64) for cu in (cu_seqlens_q, cu_seqlens_k))
    options = {name: value for name, value in options.items() if name not in ("max_seqlen_q", "max_seqlen_k")}
    if options.get("dropout_p") and options.get("dropout_keep") is None:
        longest = (int(np.diff(starts).max(initial=0)) for starts in (starts_q, starts_k))
        of_dropout = {name: value for name, value in options.items() if name.startswith("dropout_")}
        of_dropout.pop("dropout_keep", None)
        options["dropout_keep"] = dropout_keep((len(starts_q) - 1, queries.shape[1], *longest), **of_dropout)
    for b in range(len(starts_q) - 1):
        rows, columns = (slice(int(starts[b]), int(starts[b + 1])) for starts in (starts_q, starts_k))
        lengths = rows.stop - rows.start, columns.stop - columns.start
        own = {name: _of_sequence(name, value, b, *lengths) for name, value in options.items()}
        yield rows, queries[None, rows], keys[None, columns], values[None, columns], own


def attention_varlen(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    *,
    dtype: DTypeLike = np.float64,
    **options: Any,
) -> tuple[Array, Array]:
    """Attention of each sequence to its own keys: out [T, H, E] and lse [H, T].

    `q` [T, H, D], `k` [Tk, G, D], `v` [Tk, G, E]; sequence b is ``q[cu_seqlens_q[b]:cu_seqlens_q[b + 1]]`` and the same
    of k and v with `cu_seqlens_k`. `options` are those of :func:`attention`, with a batch axis of B where they have
    one.
    """
    num_tokens, num_heads = np.shape(q)[:2]
    out = np.zeros((num_tokens, num_heads, np.shape(v)[2]), dtype)
    lse = np.full((num_heads, num_tokens), -np.inf, dtype)
    for rows, *arrays, own in sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, **options):
        of_sequence, lse_of_sequence = attention(*arrays, dtype=dtype, **own)
        out[rows], lse[:, rows] = of_sequence[0], lse_of_sequence[0]
    return out, lse
