"""Dual-chunk attention, from its definition: every pair of a query and a key has the position that its chunks give it.

An, Huang, Zhang, Gong, Qiu, Zhou and Kong, "Training-free long-context scaling of large language models", 2024
(arXiv:2402.17463). With L = `chunk_size` - `local_size`, key j stands at j mod L, and query p at

    p mod L                          to keys of its own chunk, p // L,
    min(p mod L + L, chunk_size)     to those of the chunk before,
    min(2 L - 1, chunk_size)         to all older ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from cuattn.reference.attention import attention_of_logits
from cuattn.reference.logits import heads_first
from cuattn.reference.rotary import rope as turn
from cuattn.reference.softmax import Array
from cuattn.reference.varlen import sequences

__all__ = [
    "chunks_ahead",
    "dual_chunk_attention",
    "dual_chunk_attention_backward",
    "dual_chunk_attention_varlen",
    "dual_chunk_logit_factor",
    "dual_chunk_logits",
    "dual_chunk_positions",
    "query_positions",
    "turned_parts",
]


def dual_chunk_positions(positions: ArrayLike, chunk_size: int, local_size: int) -> NDArray[np.int64]:
    """Return where the keys at these positions of their sequence stand.

    >>> dual_chunk_positions([0, 5, 6, 13], 8, 2).tolist()
    [0, 5, 0, 1]
    """
    return np.asarray(np.asarray(positions, np.int64) % (chunk_size - local_size))


def query_positions(positions: ArrayLike, chunk_size: int, local_size: int) -> tuple[NDArray[np.int64], ...]:
    """Return where queries stand to their own chunk, to the one before, and to older ones.

    >>> [x.tolist() for x in query_positions([7, 13], 8, 2)]
    [[1, 1], [7, 7], [8, 8]]
    """
    length = chunk_size - local_size
    own = np.asarray(positions, np.int64) % length
    return own, np.minimum(own + length, chunk_size), np.full_like(own, min(2 * length - 1, chunk_size))


def dual_chunk_logit_factor(seqlen: ArrayLike, trained: int, kind: str) -> Array:
    """Return (a ln s + 1)^2, s = max(1, seqlen / trained); a is 0.1 for "qwen" and 0.05 for "chunkllama".

    >>> dual_chunk_logit_factor([10, 1000], 100, "qwen").round(4).tolist()
    [1.0, 1.5135]
    """
    weight = {"qwen": 0.1, "chunkllama": 0.05}[kind]
    stretched = np.maximum(1.0, np.asarray(seqlen, np.float64) / trained)
    return np.asarray((weight * np.log(stretched) + 1) ** 2)


def _turned(x: ArrayLike, positions: ArrayLike, rope: Any, dtype: DTypeLike, *, inverse: bool = False) -> Array:
    keywords = "base", "interleaved", "rotary_dim", "cos", "sin"
    named = {} if rope is None else {name: getattr(rope, name) for name in keywords}
    return turn(x, positions, inverse=inverse, dtype=dtype, **named)


def chunks_ahead(seqlen_q: int, seqlen_k: int, length: int) -> NDArray[np.int64]:
    """Return by how many chunks each query is ahead of each key, [N, M], 2 for more; -1 for a key that it cannot see.

    >>> chunks_ahead(2, 4, 1).tolist()
    [[2, 1, 0, -1], [2, 2, 1, 0]]
    """
    queries, keys = np.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q, np.arange(seqlen_k)[None]
    ahead = np.minimum(queries // length - keys // length, 2)
    return np.asarray(np.where(keys <= queries, ahead, -1))


def turned_parts(
    q: ArrayLike,
    k: ArrayLike,
    *,
    chunk_size: int,
    local_size: int,
    rope: Any = None,
    keys_rotated: bool = False,
    operand: Callable[[Array], Array] = np.asarray,
    dtype: DTypeLike = np.float64,
) -> Iterator[tuple[Array, Array, Array]]:
    """Yield (pairs [N, M], q, k) as queries and keys are turned for these pairs: own chunk, chunk before, older ones.

    Arguments as for :func:`dual_chunk_logits`. Parts without a pair are left out.
    """
    queries, keys = np.asarray(q), np.asarray(k)
    seqlen_q, seqlen_k = queries.shape[1], keys.shape[1]
    if not keys_rotated:
        keys = operand(_turned(keys, dual_chunk_positions(np.arange(seqlen_k), chunk_size, local_size), rope, dtype))
    ahead = chunks_ahead(seqlen_q, seqlen_k, chunk_size - local_size)
    places = np.maximum(np.arange(seqlen_q) + seqlen_k - seqlen_q, 0)
    for part, positions in enumerate(query_positions(places, chunk_size, local_size)):
        if (ahead == part).any():
            yield ahead == part, operand(_turned(queries, positions, rope, dtype)), keys.astype(dtype)


def dual_chunk_logits(
    q: ArrayLike,
    k: ArrayLike,
    *,
    scale: float | None = None,
    logit_factor: ArrayLike = 1.0,
    softcap: float | None = None,
    dtype: DTypeLike = np.float64,
    **options: Any,
) -> Array:
    """Return the logits [B, H, N, M] of `q` [B, N, H, D] and `k` [B, M, G, D]; -inf for keys behind the query.

    Other options: `chunk_size`, `local_size`; `rope`, a :class:`cuattn.Rotary`, where None is one without arguments;
    `keys_rotated`. `logit_factor`, a number or one a batch entry, multiplies them before `softcap`. `operand` is
    applied to what has been turned: kernels round there.
    """
    batch, seqlen_q, num_heads, head_dim = np.shape(q)
    real: Any = np.dtype(dtype).type
    logits = np.full((batch, num_heads, seqlen_q, np.shape(k)[1]), -np.inf, dtype)
    factor = np.asarray(logit_factor, dtype).reshape(-1, 1, 1, 1)
    factor = factor * real(1 / math.sqrt(head_dim) if scale is None else scale)
    for pairs, queries, keys in turned_parts(q, k, dtype=dtype, **options):
        scores = heads_first(queries, num_heads, dtype) @ heads_first(keys, num_heads, dtype).swapaxes(-1, -2) * factor
        if softcap:
            scores = real(softcap) * np.tanh(scores / real(softcap))
        logits = np.where(pairs, scores, logits)
    return logits


def dual_chunk_attention(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, *, dtype: DTypeLike = np.float64, **options: Any
) -> tuple[Array, Array]:
    """Return out [B, N, H, E] and lse [B, H, N]; `options` are those of :func:`dual_chunk_logits`."""
    return attention_of_logits(dual_chunk_logits(q, k, dtype=dtype, **options), v)


def dual_chunk_attention_varlen(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    *,
    logit_factor: ArrayLike = 1.0,
    dtype: DTypeLike = np.float64,
    **options: Any,
) -> tuple[Array, Array]:
    """Return :func:`dual_chunk_attention` of each sequence to its own keys: out [T, H, E] and lse [H, T]."""
    tokens, num_heads = np.shape(q)[:2]
    out = np.zeros((tokens, num_heads, np.shape(v)[2]), dtype)
    lse = np.full((num_heads, tokens), -np.inf, dtype)
    factors = np.broadcast_to(np.asarray(logit_factor), len(np.asarray(cu_seqlens_q)) - 1)
    for factor, (rows, *arrays, _) in zip(factors, sequences(q, k, v, cu_seqlens_q, cu_seqlens_k), strict=True):
        of_sequence, own_lse = dual_chunk_attention(*arrays, logit_factor=factor, dtype=dtype, **options)
        out[rows], lse[:, rows] = of_sequence[0], own_lse[0]
    return out, lse


def dual_chunk_attention_backward(
    dout: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    scale: float | None = None,
    logit_factor: ArrayLike = 1.0,
    softcap: float | None = None,
    operand: Callable[[Array], Array] = np.asarray,
    dtype: DTypeLike = np.float64,
    **options: Any,
) -> tuple[Array, Array, Array]:
    """Return dq, dk and dv of ``(out * dout).sum()``; with `keys_rotated`, dk is of the keys as they are given.

    Options as for :func:`dual_chunk_logits`; `operand` is also applied to P, dS and out, which kernels round.
    """
    batch, seqlen_q, num_heads, head_dim = np.shape(q)
    seqlen_k, num_kv_heads = np.shape(k)[1:3]
    factors: dict[str, Any] = {"scale": scale, "logit_factor": logit_factor, "softcap": softcap}
    logits = dual_chunk_logits(q, k, operand=operand, dtype=dtype, **factors, **options)
    out, lse = attention_of_logits(logits, v)
    with np.errstate(invalid="ignore"):
        p = np.where(np.isneginf(lse)[..., None], 0, np.exp(logits - lse[..., None]))
    gradient = np.asarray(dout).astype(dtype)
    rows = gradient.transpose(0, 2, 1, 3)
    delta = (gradient * operand(out)).sum(-1).swapaxes(1, 2)[..., None]
    ds = p * (rows @ heads_first(v, num_heads, dtype).swapaxes(-1, -2) - delta)
    if softcap:
        with np.errstate(invalid="ignore"):
            ds = np.where(np.isneginf(logits), 0, ds * (1 - (logits / softcap) ** 2))
    factor = np.asarray(logit_factor, dtype).reshape(-1, 1, 1, 1) * (
        1 / math.sqrt(head_dim) if scale is None else scale
    )
    ds = operand(ds) * factor

    rope, keys_rotated = options.get("rope"), options.get("keys_rotated", False)
    chunking = options["chunk_size"], options["local_size"]
    places = query_positions(np.maximum(np.arange(seqlen_q) + seqlen_k - seqlen_q, 0), *chunking)
    ahead = chunks_ahead(seqlen_q, seqlen_k, chunking[0] - chunking[1])
    dq = np.zeros(np.shape(q), dtype)
    dk_heads = np.zeros((batch, num_heads, seqlen_k, head_dim), dtype)
    for pairs, queries, keys in turned_parts(q, k, operand=operand, dtype=dtype, **options):
        own = np.where(pairs, ds, 0)
        positions = places[ahead[pairs][0]]
        of_turned = (own @ heads_first(keys, num_heads, dtype)).transpose(0, 2, 1, 3)
        dq += _turned(of_turned, positions, rope, dtype, inverse=True)
        dk_heads += own.swapaxes(-1, -2) @ heads_first(queries, num_heads, dtype)

    def summed(of_heads: Array) -> Array:
        groups = of_heads.reshape(batch, num_kv_heads, num_heads // max(num_kv_heads, 1), *of_heads.shape[2:])
        return np.asarray(groups.sum(2).transpose(0, 2, 1, 3))

    dk = summed(dk_heads)
    if not keys_rotated:
        dk = _turned(dk, dual_chunk_positions(np.arange(seqlen_k), *chunking), rope, dtype, inverse=True)
    return dq, dk, summed(operand(p).swapaxes(-1, -2) @ rows)
