"""The gradients of attention, from the formulas: P again from logits and lse, then one product after the other."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from cuattn.reference.attention import attention, dropped_out, split_options
from cuattn.reference.logits import heads_first, logits
from cuattn.reference.narrow import round_probabilities, round_to_tf32
from cuattn.reference.softmax import Array
from cuattn.reference.varlen import place_of_sequence, sequences

__all__ = [
    "Gradients",
    "attention_backward",
    "attention_backward_naive",
    "attention_varlen_backward",
    "scores",
    "sum_over_group",
    "sum_to_shape",
]


#: One float32 says an lse from here on to 2^-10 only, and the larger the worse: P ends at 1 there, as in the kernels.
LARGE_LSE = 2.0**14


class Gradients(NamedTuple):
    """What a scalar changes by, per unit of each input; dbias and dsinks are None where there is no bias, no sinks."""

    dq: Array  #: [B, N, H, D]
    dk: Array  #: [B, M, G, D]
    dv: Array  #: [B, M, G, E]
    dbias: Array | None  #: of the shape of the bias
    dsinks: Array | None  #: [H]


def sum_to_shape(x: Array, shape: tuple[int, ...]) -> Array:
    """Sum x [B, H, N, M] over the axes along which an array of `shape` was broadcast."""
    full = (1,) * (4 - len(shape)) + shape
    axes = tuple(axis for axis in range(4) if full[axis] == 1)
    return np.asarray(x.sum(axis=axes, keepdims=True).reshape(shape))


def sum_over_group(x: Array, num_kv_heads: int) -> Array:
    """Sum [B, H, M, D] over the H // G query heads that read a key/value head, to [B, M, G, D]."""
    batch, num_heads, seqlen_k, dim = x.shape
    group = num_heads // num_kv_heads if num_kv_heads else 1
    return np.asarray(x.reshape(batch, num_kv_heads, group, seqlen_k, dim).sum(axis=2).transpose(0, 2, 1, 3))


class Scores(NamedTuple):
    """Intermediate results of size [B, H, N, M] ([B, H, N] for delta)."""

    seen: Array  #: bool: the keys that count
    log_p: Array  #: S - lse
    p: Array
    z: Array  #: kept / (1 - dropout_p)
    dp: Array  #: dout V^T
    delta: Array
    ds: Array  #: the gradient of the logits
    slope: Array  #: 1 - tanh^2, the derivative of the softcap; 1 without one


def scores(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    *,
    dlse: ArrayLike | None = None,
    operand: Callable[[Array], Array] = np.asarray,
    dtype: DTypeLike = np.float64,
    **options: Any,
) -> Scores:
    """Compute all up to dS, in `dtype`; `operand` rounds what enters a product (the sums that Delta is are none)."""
    of_logits, of_dropout = split_options(options)
    num_heads = q.shape[2]
    q, k = (operand(x.astype(dtype)) for x in (q, k))
    dy, values = (heads_first(operand(x.astype(dtype)), num_heads, dtype) for x in (dout, v))
    lse = lse.astype(dtype)[..., None]

    delta = (dout.astype(dtype) * out.astype(dtype)).sum(axis=-1).swapaxes(1, 2)
    if dlse is not None:
        delta = delta - np.asarray(dlse).astype(dtype)

    s = logits(q, k, dtype=dtype, **of_logits)
    seen = ~np.isneginf(s) & ~np.isneginf(lse)
    zero = s.dtype.type(0)
    log_p = s - lse
    log_p = np.where((log_p > 0) & (np.abs(lse) >= LARGE_LSE) & np.isfinite(lse), zero, log_p)
    p = np.where(seen, np.exp(log_p), zero)  # where nothing is seen lse is -inf, in a row with a +inf logit it is NaN
    z = dropped_out(np.ones_like(p), **of_dropout)
    dp = dy @ values.swapaxes(-1, -2)
    ds = np.where(seen, p * (z * dp - delta[..., None]), zero)

    slope = np.ones_like(p)
    softcap = of_logits.get("softcap")
    if softcap is not None:  # of c tanh(x / c)
        capped = logits(q, k, scale=of_logits.get("scale"), softcap=softcap, dtype=dtype)
        slope = 1 - np.square(capped / s.dtype.type(softcap))
    return Scores(seen, log_p, p, z, dp, delta, ds, slope)


def _gradients(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    *,
    operand: Callable[[Array], Array],
    probability: Callable[[Array], Array],
    dtype: DTypeLike,
    sinks: ArrayLike | None = None,
    **options: Any,
) -> Gradients:
    num_heads, num_kv_heads = q.shape[2], k.shape[2]
    scale, bias = options.get("scale"), options.get("bias")
    real: Any = np.dtype(dtype).type
    factor = real(1.0 / math.sqrt(q.shape[3]) if scale is None else scale)
    dy, queries, keys = (heads_first(operand(x.astype(dtype)), num_heads, dtype) for x in (dout, q, k))
    with np.errstate(invalid="ignore", over="ignore"):
        of = scores(dout, q, k, v, out, lse, operand=operand, dtype=dtype, **options)
        pz = np.where(of.z == 0, of.z, probability(of.p) * of.z)  # what is dropped is 0, be its probability NaN
        dv = pz.swapaxes(-1, -2) @ dy
        dbias = None if bias is None else sum_to_shape(of.ds, np.shape(bias))
        ds = operand(of.ds * of.slope)
        dq = factor * (ds @ keys)
        dk = factor * (ds.swapaxes(-1, -2) @ queries)
        dsinks = None
        if sinks is not None:  # one more key, whose logit is the sink and whose value is 0: dS = P (0 - Delta)
            sink = np.asarray(sinks).astype(dtype).reshape(1, -1, 1)
            log_p = sink - lse.astype(dtype)
            p_sink = np.exp(np.where((log_p > 0) & (np.abs(lse) >= LARGE_LSE) & np.isfinite(lse), real(0), log_p))
            dsinks = np.where(np.isneginf(sink), sink.dtype.type(0), -p_sink * of.delta).sum(axis=(0, 2))
    dq = dq.transpose(0, 2, 1, 3)
    return Gradients(dq, sum_over_group(dk, num_kv_heads), sum_over_group(dv, num_kv_heads), dbias, dsinks)


def attention_backward(
    dout: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    out: ArrayLike | None = None,
    lse: ArrayLike | None = None,
    *,
    dlse: ArrayLike | None = None,
    precision: str | None = None,
    dtype: DTypeLike = np.float64,
    **options: Any,
) -> Gradients:
    """Return the gradients of ``sum(dout * out) + sum(dlse * lse)``, ``out, lse = attention(q, k, v, **options)``.

    With Z = kept / (1 - dropout_p), 1 without dropout, and Delta = rowsum(dout * out) - dlse::

        P = e^(S - lse), 0 where S = -inf        dV = (P Z)^T dout      (P <= 1 where |lse| >= 2^14: LARGE_LSE)
        dS = P (Z (dout V^T) - Delta)            dbias = dS, summed over the axes along which bias was broadcast
        dS <- dS (1 - tanh^2) with a softcap     dQ = scale dS K,  dK = scale dS^T Q
        dsinks[h] = -(sum over B and N of e^(sink - lse) Delta)

    dout [B, N, H, E] and dlse [B, H, N] are cotangents, `options` those of :func:`cuattn.reference.attention`.

    `out` [B, N, H, E] and `lse` [B, H, N] are what forward returned; they are computed when None. Given, they are used
    as they are: the result is then the function of rounded out and lse that a backward kernel is, not the gradient to
    the last bit.

    A key that is not visible gives and gets exactly 0, also in a row whose lse is NaN (it has a +inf logit); such a row
    is NaN in dq, and so are dk and dv of the keys that it sees (dv: and keeps).
    """
    if out is None or lse is None:
        computed = attention(q, k, v, dtype=dtype, **options)
        out, lse = computed[0] if out is None else out, computed[1] if lse is None else lse
    arrays = (np.asarray(x) for x in (dout, q, k, v, out, lse))
    return _gradients(*arrays, operand=np.asarray, probability=np.asarray, dlse=dlse, dtype=dtype, **options)


def attention_backward_naive(
    dout: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    out: ArrayLike,
    lse: ArrayLike,
    *,
    dlse: ArrayLike | None = None,
    precision: str | None = None,
    **options: Any,
) -> Gradients:
    """Gradients by the same formulas in the precision of a kernel, from the same saved out and lse.

    float32 arithmetic (float64 for float64 inputs); P and dS, the operands of products, rounded to the dtype of q;
    each result rounded to the dtype of its input, dsinks to float32 or float64. With `precision` "tf32" all operands of
    products are rounded to 10 bits of mantissa. Not an oracle: its distance from one is the yardstick of
    :mod:`cuattn.testing.gradient_tolerance`.
    """
    arrays = [np.asarray(x) for x in (dout, q, k, v, out, lse)]
    given = arrays[1].dtype
    dtype = np.dtype(np.float64 if given == np.float64 else np.float32)

    def operand(x: Array) -> Array:
        return round_to_tf32(x) if precision == "tf32" else np.asarray(x.astype(given).astype(dtype))

    def probability(p: Array) -> Array:
        return round_to_tf32(p) if precision == "tf32" else round_probabilities(p, given)

    with np.errstate(over="ignore"):
        dq, dk, dv, dbias, dsinks = _gradients(
            *arrays, operand=operand, probability=probability, dlse=dlse, dtype=dtype, **options
        )
        if dbias is not None:
            dbias = dbias.astype(np.asarray(options["bias"]).dtype)
        return Gradients(dq.astype(given), dk.astype(given), dv.astype(given), dbias, dsinks)


def attention_varlen_backward(
    dout: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    out: ArrayLike | None = None,
    lse: ArrayLike | None = None,
    *,
    dlse: ArrayLike | None = None,
    dtype: DTypeLike = np.float64,
    **options: Any,
) -> Gradients:
    """Return the gradients of :func:`cuattn.reference.attention_varlen`, one sequence after the other.

    dout and out [T, H, E], lse and dlse [H, T]; dq, dk and dv are packed like q, k and v. dbias has the shape of the
    bias, by positions in the sequence, 0 where no sequence reaches.
    """
    dy = np.asarray(dout)
    dq, dk, dv = (np.zeros(np.shape(x), dtype) for x in (q, k, v))
    bias, sinks = options.get("bias"), options.get("sinks")
    bias_shape = () if bias is None else np.shape(bias)
    dbias = None if bias is None else np.zeros((1,) * (4 - len(bias_shape)) + bias_shape, dtype)
    dsinks = None if sinks is None else np.zeros(np.shape(sinks), dtype)
    starts_k = np.asarray(cu_seqlens_k, dtype=np.int64)
    for b, (rows, query, key, value, own) in enumerate(sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, **options)):
        columns = slice(int(starts_k[b]), int(starts_k[b + 1]))
        of_heads = (slice(None), slice(None), rows)
        grads = attention_backward(
            dy[None, rows],
            query,
            key,
            value,
            out=None if out is None else np.asarray(out)[None, rows],
            lse=None if lse is None else np.asarray(lse)[None][of_heads],
            dlse=None if dlse is None else np.asarray(dlse)[None][of_heads],
            dtype=dtype,
            **own,
        )
        dq[rows], dk[columns], dv[columns] = grads.dq[0], grads.dk[0], grads.dv[0]
        if dbias is not None and grads.dbias is not None:
            place = place_of_sequence(dbias.shape, b, rows.stop - rows.start, columns.stop - columns.start)
            dbias[place] += grads.dbias
        if dsinks is not None and grads.dsinks is not None:
            dsinks += grads.dsinks
    return Gradients(dq, dk, dv, None if dbias is None else dbias.reshape(bias_shape), dsinks)
