"""When is dual-chunk attention right? The rule of :mod:`cuattn.testing.tolerance`, with what RoPE adds to a logit::

    |out - ref| <= 2 max|naive - ref| + 2 ulp(ref) + u_P (P |V|) + (e^r - 1) (P |V|) + t |V|
    |lse - ref| <= r,    r = u_acc (4 (1 + max|s|) + sqrt(M) + e + log(f)) + c

* ``ref`` is :func:`cuattn.reference.dual_chunk_attention` in float64 (``longdouble`` for float64) of the very inputs;
* ``naive`` rounds turned queries and keys to their dtype, and computes in the kernel's precision;
* ``c`` is what those roundings, and rotations that are a few u off, may move a logit: see
  :mod:`cuattn.testing.decode_tolerance`. Where rotations follow from each other (16 bit), they are off by ``STEPS`` u.

Everything else is as there, a row that sees nothing exactly 0 included.
"""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from cuattn import reference
from cuattn.reference.attention import attention_of_logits
from cuattn.reference.dual_chunk import dual_chunk_logits, turned_parts
from cuattn.reference.logits import heads_first
from cuattn.reference.narrow import probability_dtype, round_probabilities
from cuattn.reference.softmax import softmax
from cuattn.testing.rotary_tolerance import TRIGONOMETRIC_ROUNDINGS
from cuattn.testing.rounding import accumulation_dtype, to_numpy, ulp, unit_roundoff
from cuattn.testing.tolerance import (
    assert_within,
    dot_product_error,
    oracle_dtype,
    rounding_of_factor,
    row_error,
    smallest_probability,
    sum_of_kept,
)

__all__ = [
    "assert_dual_chunk_close",
    "assert_dual_chunk_gradients_close",
    "assert_dual_chunk_varlen_close",
    "dual_chunk_bound",
]

Array = NDArray[Any]

#: What a rotation may be off by where it follows from others, in units of u: 2 u a product, of fewer than 64.
STEPS = 128


def _rounding_of_logits(q: Array, k: Array, keys_rotated: bool, given: np.dtype[Any]) -> Array:
    """Return the c of the rule, over the scale, for each logit of turned q and k, [B, H, N, M]."""
    rows, columns = (np.abs(heads_first(x, q.shape[2], np.float64)) for x in (q, k))
    columns = columns.swapaxes(-1, -2)
    u = unit_roundoff(accumulation_dtype(given))
    # A pair (a, b) is turned with an error of so many units of |a| + |b|, at most sqrt(2) times the length of the pair;
    # summed over the pairs of both vectors, at most the product of their lengths.
    lengths = np.sqrt(np.square(rows).sum(-1, keepdims=True) * np.square(columns).sum(-2, keepdims=True))
    num_turned = 1 if keys_rotated else 2
    steps = STEPS if given.itemsize == 2 else 0
    error = u * (2 + steps + num_turned * (2 + TRIGONOMETRIC_ROUNDINGS)) * math.sqrt(2) * lengths
    if given.itemsize == 2:
        typical = 3 * math.sqrt(num_turned) * np.sqrt(np.square(rows) @ np.square(columns))
        error = error + unit_roundoff(given) * np.minimum(num_turned * (rows @ columns), typical)
    return np.asarray(error)


def _logit_errors(q: Array, k: Array, u: float, given: np.dtype[Any], options: dict[str, Any]) -> Array:
    """Return ``e`` and ``c`` of each logit together, over the scale and in units of `u`, [B, H, N, M]."""
    named = {name: x for name, x in options.items() if name not in ("scale", "logit_factor", "softcap")}
    error = np.zeros((q.shape[0], q.shape[2], q.shape[1], k.shape[1]))
    for pairs, queries, keys in turned_parts(q, k, **named):
        rounding = _rounding_of_logits(queries, keys, options.get("keys_rotated", False), given)
        error = np.where(pairs, dot_product_error(queries, keys) + rounding / u, error)
    return error


def dual_chunk_bound(q: Any, k: Any, v: Any, **options: Any) -> tuple[Array, Array, Array, Array]:
    """Return the reference and what a result may be away from it: (out, bound of out, lse, bound of lse).

    Arguments as :func:`cuattn.reference.dual_chunk_attention`.
    """
    queries, keys, values = (to_numpy(x) for x in (q, k, v))
    given = queries.dtype
    oracle, real, narrow = oracle_dtype(given), accumulation_dtype(given), probability_dtype(given)
    u = unit_roundoff(real)
    logits = dual_chunk_logits(queries, keys, dtype=oracle, **options)
    out, lse = attention_of_logits(logits, values)
    on_chip = dual_chunk_logits(queries, keys, dtype=real, operand=lambda x: x.astype(given).astype(real), **options)
    p = round_probabilities(softmax(on_chip, dtype=real), narrow)
    naive = (p @ heads_first(values, queries.shape[2], real)).transpose(0, 2, 1, 3).astype(given)

    scale, softcap = options.get("scale"), options.get("softcap") or 0
    factor = np.asarray(options.get("logit_factor", 1.0), np.float64).reshape(-1, 1, 1, 1)
    factor = factor * (1 / math.sqrt(queries.shape[3]) if scale is None else scale)
    error = np.abs(factor) * _logit_errors(queries, keys, u, given, options)
    with np.errstate(invalid="ignore"):
        error = np.where(np.isneginf(logits), np.inf, error + 4 * (1 + softcap + np.abs(logits)))
    row = u * (row_error(logits, error, u, softcap=softcap) + math.sqrt(keys.shape[1]) + rounding_of_factor(given))

    magnitudes = np.abs(values.astype(np.float64))
    spread, _ = attention_of_logits(logits, magnitudes)
    of_row = row.swapaxes(1, 2)[..., None]
    bound = 2 * np.max(np.abs(naive.astype(oracle) - out), initial=0.0) + 2 * ulp(out, given)
    bound = bound + (unit_roundoff(narrow) + np.expm1(of_row)) * spread
    p = softmax(logits, dtype=oracle)
    bound = bound + smallest_probability(given) * sum_of_kept(p, magnitudes)
    return out, np.where(p.sum(-1).swapaxes(1, 2)[..., None] == 0, 0.0, bound), lse, row


def assert_dual_chunk_close(out: Any, q: Any, k: Any, v: Any, *, lse: Any = None, **options: Any) -> None:
    """Assert that `out` (and `lse`) is :func:`cuattn.dual_chunk_attention` of q, k and v, with these options.

    >>> from cuattn import reference
    >>> x = np.ones((1, 3, 1, 2), np.float32)
    >>> out, _ = reference.dual_chunk_attention(x, x, x, chunk_size=3, local_size=1)
    >>> assert_dual_chunk_close(out.astype(np.float32), x, x, x, chunk_size=3, local_size=1)
    """
    expected, bound, expected_lse, bound_lse = dual_chunk_bound(q, k, v, **options)
    assert out.dtype == q.dtype, f"out has dtype {out.dtype}, expected {q.dtype}, the dtype of q"
    assert_within(out, expected, bound, "out")
    if lse is not None:
        assert lse.dtype == accumulation_dtype(to_numpy(q).dtype), f"lse has dtype {lse.dtype}"
        assert_within(lse, expected_lse, bound_lse, "lse")


def assert_dual_chunk_varlen_close(
    out: Any,
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    *,
    lse: Any = None,
    logit_factor: Any = 1.0,
    **options: Any,
) -> None:
    """Assert that `out` [T, H, E] and `lse` [H, T] are right for packed sequences, each under the same rule."""
    starts_q, starts_k = (to_numpy(cu).tolist() for cu in (cu_seqlens_q, cu_seqlens_k))
    factors = np.broadcast_to(np.asarray(logit_factor), len(starts_q) - 1)
    for b, factor in enumerate(factors):
        rows, columns = slice(*starts_q[b : b + 2]), slice(*starts_k[b : b + 2])
        of_sequence = q[None, rows], k[None, columns], v[None, columns]
        own_lse = None if lse is None else lse[None, :, rows]
        assert_dual_chunk_close(out[None, rows], *of_sequence, lse=own_lse, logit_factor=factor, **options)


def assert_dual_chunk_gradients_close(grads: Any, dout: Any, q: Any, k: Any, v: Any, **options: Any) -> None:
    """Assert that `grads`, (dq, dk, dv), are those of dual-chunk attention with these options.

    They may be three times as far away as plain code in this precision is at most, and 2 ulp, and half of the smallest
    number where they are subnormal. A query that sees one key alone has a gradient of exactly 0: dP less
    rowsum(dout out), of which the kernel has a rounded out; its gradient, and with one key alone that of the key, may
    be what u of that sum makes of it. A query that sees no key gets 0 and nothing else.
    """
    dtype, oracle, real = q.dtype, oracle_dtype(q.dtype), accumulation_dtype(q.dtype)
    expected = reference.dual_chunk_attention_backward(dout, q, k, v, dtype=oracle, **options)

    def rounded(x: Array) -> Array:
        return np.asarray(x.astype(dtype).astype(real))

    naive = reference.dual_chunk_attention_backward(dout, q, k, v, operand=rounded, dtype=real, **options)
    smallest = float(ml_dtypes.finfo(dtype).smallest_subnormal) / 2
    out = reference.dual_chunk_attention(q, k, v, **options)[0].astype(np.float64)
    row = unit_roundoff(dtype) * float(np.abs(dout.astype(np.float64) * out).sum(axis=-1).max(initial=0))
    scale = options.get("scale")
    row *= abs(1 / math.sqrt(q.shape[3]) if scale is None else scale)
    row *= float(np.max(np.abs(options.get("logit_factor", 1.0))))
    largest_q, largest_k = (float(np.abs(x.astype(np.float64)).max(initial=0)) for x in (q, k))
    # A turned pair is at most sqrt(2) times its larger number; all queries of a group may see the same key alone.
    last_key = np.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None, None]  # that each query sees
    alone = last_key == 0
    seen_by = q.shape[1] * (q.shape[2] // k.shape[2]) if k.shape[1] == 1 else 0
    of_zero = {"dq": math.sqrt(2) * row * largest_k * alone, "dk": math.sqrt(2) * row * largest_q * seen_by, "dv": 0.0}
    for name, got, want, plain in zip(("dq", "dk", "dv"), grads, expected, naive, strict=True):
        assert got.dtype == dtype, f"{name} has dtype {got.dtype}, expected {dtype}"
        error = np.abs(plain.astype(dtype).astype(oracle) - want).max(initial=0)
        bound = 3 * error + 2 * ulp(want, dtype)
        allowed = np.where(want == 0, 3 * error + of_zero[name], bound) + smallest
        assert_within(got, want, np.where(last_key < 0, 0, allowed) if name == "dq" else allowed, name)
