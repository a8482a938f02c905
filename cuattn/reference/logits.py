"""The logits of attention, in the order of operations that the contract fixes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from cuattn.reference.narrow import decode
from cuattn.reference.softmax import Array
from cuattn.reference.visibility import diagonal, visible

__all__ = ["heads_first", "logits", "per_head"]


def heads_first(x: ArrayLike, num_heads: int, dtype: DTypeLike) -> Array:
    """Turn [B, len, G, D] into [B, H, len, D]: each of the G heads serves H // G consecutive query heads."""
    values = np.asarray(x)
    repeats = num_heads // values.shape[2] if values.shape[2] else 1
    return np.repeat(values.astype(dtype), repeats, axis=2).transpose(0, 2, 1, 3)


def per_head(descale: ArrayLike | None, num_heads: int, dtype: DTypeLike) -> Array:
    """A factor [B, G] per sequence and key/value head as [B, H, 1, 1], repeated like those heads; 1 for None."""
    if descale is None:
        return np.ones((1, 1, 1, 1), dtype)
    values = np.asarray(descale).astype(dtype)
    return np.repeat(values, num_heads // values.shape[1] if values.shape[1] else 1, axis=1)[..., None, None]


def logits(
    q: ArrayLike,
    k: ArrayLike,
    *,
    scale: float | None = None,
    causal: bool | str = False,
    softcap: float | None = None,
    bias: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    diagonal_offset: ArrayLike | None = None,
    q_descale: ArrayLike | None = None,
    k_descale: ArrayLike | None = None,
    fp8_format: str | None = None,
    dtype: DTypeLike = np.float64,
    **visibility: Any,
) -> Array:
    """The final logits [B, H, N, M] of ``q [B, N, H, D]`` and ``k [B, M, G, D]``, in the order that the contract fixes:

    1. ``s = scale * (q . k)``, `scale` 1/sqrt(D) by default, times `q_descale` and `k_descale` [B, G] for float8
       inputs (or uint8 ones with `fp8_format`);
    2. `softcap` c: ``s = c * tanh(s / c)``;
    3. `alibi_slopes` ([H] or [B, H]): ``s -= slope * |i + o - j|`` with the offset o of :func:`diagonal`;
    4. `bias`, broadcast to [B, H, N, M]: ``s += bias``;
    5. -inf where a key is not :func:`visible`, with `causal`, `diagonal_offset` and the other options of `visibility`.
    """
    queries, keys = decode(q, fp8_format), decode(k, fp8_format)
    num_heads = queries.shape[2]
    if scale is None:
        scale = 1.0 / math.sqrt(queries.shape[3])
    real: Any = np.dtype(dtype).type
    with np.errstate(invalid="ignore", over="ignore"):
        s = heads_first(queries, num_heads, dtype) @ heads_first(keys, num_heads, dtype).swapaxes(-1, -2)
        s = s * (real(scale) * per_head(q_descale, num_heads, dtype) * per_head(k_descale, num_heads, dtype))
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
    seen = visible(seqlen_q, seqlen_k, causal=causal, diagonal_offset=diagonal_offset, **visibility)
    return np.asarray(np.where(seen, s, real(-np.inf)))
