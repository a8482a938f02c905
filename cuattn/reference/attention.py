"""Attention: the softmax of the logits, dropout, and the product with the values."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from cuattn.reference.dropout import dropout_keep as keep
from cuattn.reference.logits import heads_first, logits, per_head
from cuattn.reference.narrow import decode, output_dtype, probability_dtype, round_probabilities, round_to_tf32
from cuattn.reference.softmax import Array, logsumexp, softmax

__all__ = ["attention", "attention_naive", "attention_of_logits", "probabilities"]


def _softmax_with_sink(s: Array, sinks: ArrayLike | None) -> tuple[Array, Array]:
    """P [B, H, N, M] and lse [B, H, N] of the logits; a sink is one more logit, whose value is nowhere."""
    num_keys = s.shape[3]
    if sinks is not None:
        sink = np.asarray(sinks).astype(s.dtype).reshape(1, -1, 1, 1)
        s = np.concatenate([s, np.broadcast_to(sink, (*s.shape[:3], 1))], axis=3)
    p = softmax(s, dtype=s.dtype)
    return p[..., :num_keys], logsumexp(s, dtype=s.dtype)


def attention_of_logits(s: Array, v: ArrayLike) -> tuple[Array, Array]:
    """Return ``softmax(s) v``, out [B, N, H, E], and the log-sum-exp of the logits `s` [B, H, N, M], in their dtype."""
    p, lse = _softmax_with_sink(s, None)
    with np.errstate(invalid="ignore", over="ignore"):
        out = p @ heads_first(v, s.shape[1], s.dtype)
    return out.transpose(0, 2, 1, 3), lse


def dropped_out(
    p: Array,
    *,
    dropout_p: float = 0.0,
    dropout_seed: int = 0,
    dropout_offset: int = 0,
    dropout_origin: tuple[Any, ...] | None = None,
    dropout_keep: ArrayLike | None = None,
) -> Array:
    """Return P Z, Z = kept / (1 - dropout_p): kept are `dropout_keep`, or else those of :func:`cuattn.dropout_mask`."""
    if not dropout_p:
        return p
    if dropout_keep is None:
        words: dict[str, Any] = {"dropout_seed": dropout_seed, "dropout_offset": dropout_offset}
        dropout_keep = keep(p.shape, dropout_p=dropout_p, dropout_origin=dropout_origin, **words)
    return np.asarray(p * np.asarray(dropout_keep) / p.dtype.type(1 - float(dropout_p)))


def split_options(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split options into those of logits and those of dropout."""
    dropout = {name: value for name, value in options.items() if name.startswith("dropout_")}
    return {name: value for name, value in options.items() if name not in dropout}, dropout


def probabilities(
    q: ArrayLike, k: ArrayLike, *, sinks: ArrayLike | None = None, dtype: DTypeLike = np.float64, **options: Any
) -> Array:
    """Return P [B, H, N, M]: the softmax of :func:`logits` over the keys and, if there is one, the sink; after dropout.

    `options` are those of :func:`attention`.
    """
    of_logits, of_dropout = split_options(options)
    of_logits.pop("precision", None)
    of_logits.pop("v_descale", None)
    return dropped_out(_softmax_with_sink(logits(q, k, dtype=dtype, **of_logits), sinks)[0], **of_dropout)


def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    sinks: ArrayLike | None = None,
    v_descale: ArrayLike | None = None,
    fp8_format: str | None = None,
    precision: str | None = None,
    dtype: DTypeLike = np.float64,
    **options: Any,
) -> tuple[Array, Array]:
    """``softmax(logits) v``: out [B, N, H, E] and the natural-log lse [B, H, N] of the final logits.

    `q` [B, N, H, D], `k` [B, M, G, D], `v` [B, M, G, E]; other `options` are those of :func:`logits`. `sinks` [H] adds
    one logit per head to the denominator (and to lse) only. A query that sees no key has out 0 and lse -inf (lse = sink
    with a sink); one with a +inf logit is NaN in both. Vaswani et al., "Attention is all you need", 2017.

    `dropout_p`, `dropout_seed`, `dropout_offset`: probabilities that :func:`cuattn.dropout_mask` keeps are divided by
    1 - dropout_p, the others are 0; lse is that of all. `dropout_origin` says where in a larger mask theirs begins.
    `dropout_keep`, broadcast to [B, H, N, M], takes the place of that mask. `v_descale` [B, G] multiplies out for
    float8 inputs. `precision` names how a kernel computes, which changes nothing here.
    """
    of_logits, of_dropout = split_options(options)
    p, lse = _softmax_with_sink(logits(q, k, fp8_format=fp8_format, dtype=dtype, **of_logits), sinks)
    num_heads = p.shape[1]
    with np.errstate(invalid="ignore", over="ignore"):
        out = dropped_out(p, **of_dropout) @ heads_first(decode(v, fp8_format), num_heads, dtype)
        out = out * per_head(v_descale, num_heads, dtype)
    return out.transpose(0, 2, 1, 3), lse


def attention_naive(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    sinks: ArrayLike | None = None,
    v_descale: ArrayLike | None = None,
    fp8_format: str | None = None,
    precision: str | None = None,
    unrounded: bool = False,
    **options: Any,
) -> tuple[Array, Array]:
    """Attention by the same formulas in the precision of a kernel: what plain, correct code may lose by rounding.

    float32 arithmetic (float64 for float64 inputs), probabilities rounded to the dtype of `v` (float16 for float8
    inputs), out rounded to the dtype of `q` (bfloat16 for float8), or not if it is `unrounded`. With `precision`
    "tf32", q, k, v and the probabilities are rounded to 10 bits of mantissa; with "fp8", probabilities to e4m3. Not an
    oracle: its distance from one is the yardstick of :mod:`cuattn.testing.tolerance`.
    """
    queries, keys, values = (decode(x, fp8_format) for x in (q, k, v))
    dtype = np.float64 if queries.dtype == np.float64 else np.float32
    tf32 = precision == "tf32"
    narrow = probability_dtype(values.dtype)
    out_dtype = dtype if unrounded else output_dtype(queries.dtype)
    if tf32:
        queries, keys, values = (round_to_tf32(x) for x in (queries, keys, values))
    of_logits, of_dropout = split_options(options)
    p, lse = _softmax_with_sink(logits(queries, keys, dtype=dtype, **of_logits), sinks)
    if tf32:
        rounded = round_to_tf32(p)
    else:
        rounded = round_probabilities(p, ml_dtypes.float8_e4m3fn if precision == "fp8" else narrow)
    num_heads = p.shape[1]
    with np.errstate(invalid="ignore", over="ignore"):
        out = dropped_out(rounded, **of_dropout) @ heads_first(values, num_heads, dtype)
        out = out * per_head(v_descale, num_heads, dtype)
        return out.transpose(0, 2, 1, 3).astype(out_dtype), lse
