"""Differential attention: one softmax minus a multiple of another, over the same values, and its gradients.

Ye et al., "Differential transformer", 2024. Query heads come in pairs (2h, 2h + 1), the streams of output head h; both
read the values of head ``g = h // (H // G)``, the first with key head 2g and the second with 2g + 1 (V1), or both with
key head g (V2, where there are as many key heads as value heads).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from cuattn.reference.attention import attention
from cuattn.reference.backward import attention_backward
from cuattn.reference.dropout import dropout_keep
from cuattn.reference.softmax import Array

__all__ = [
    "DifferentialGradients",
    "DifferentialResult",
    "Stream",
    "differential_attention",
    "differential_attention_backward",
    "differential_combine",
    "differential_lambda",
    "differential_streams",
    "lambda_init",
]

#: The axis of heads of options that may have a head for each stream or one for both; all are broadcast.
_HEAD_AXES = {"alibi_slopes": -1, "bias": -3, "mask": -3}


class DifferentialResult(NamedTuple):
    """What forward computes: the result, and the two attentions that it is the difference of."""

    out: Array  #: [B, N, H, E]
    lse: Array  #: [B, H, 2, N]
    out1: Array  #: [B, N, H, E]
    out2: Array  #: [B, N, H, E]


class DifferentialGradients(NamedTuple):
    """What a scalar changes by, per unit of each input."""

    dq: Array  #: [B, N, 2H, D]
    dk: Array  #: of the shape of k
    dv: Array  #: [B, M, G, E]
    dlam: Array  #: of the shape of lambda
    dnorm_weight: Array | None  #: [E]; None without a weight


class Stream(NamedTuple):
    """One of the two attentions: its inputs, and the options of :func:`cuattn.reference.attention`."""

    q: Array
    k: Array
    v: Array
    options: dict[str, Any]


def lambda_init(depth: float) -> float:
    """Return ``0.8 - 0.6 e^(-0.3 depth)``; the first layer has depth 0.

    >>> round(lambda_init(0), 9)
    0.2
    """
    return 0.8 - 0.6 * math.exp(-0.3 * depth)


def differential_lambda(lq1: ArrayLike, lk1: ArrayLike, lq2: ArrayLike, lk2: ArrayLike, lambda_init: float) -> Array:
    """Return ``e^(lq1 . lk1) - e^(lq2 . lk2) + lambda_init``, products over the last axis.

    >>> float(differential_lambda([0.0, 1.0], [1.0, 0.0], [0.0], [2.0], 0.25))
    0.25
    """
    first, second = (
        (np.asarray(a).astype(np.float64) * np.asarray(b).astype(np.float64)).sum(axis=-1)
        for a, b in ((lq1, lk1), (lq2, lk2))
    )
    return np.asarray(np.exp(first) - np.exp(second) + lambda_init)


def differential_streams(q: ArrayLike, k: ArrayLike, v: ArrayLike, **options: Any) -> tuple[Stream, Stream]:
    """Split a problem into two of :func:`cuattn.reference.attention`, whose heads are the pairs.

    Dropout is that of the 2H heads of q. Of a bias, a mask and slopes, 2H heads go one to each stream; fewer are for
    both.
    """
    queries, keys, values = (np.asarray(x) for x in (q, k, v))
    heads = queries.shape[2]
    shared = keys.shape[2] == values.shape[2]
    if options.get("dropout_p") and options.get("dropout_keep") is None:
        shape = queries.shape[0], heads, queries.shape[1], keys.shape[1]
        of_dropout = {name: options[name] for name in options if name.startswith("dropout_")}
        options = options | {"dropout_keep": dropout_keep(shape, **of_dropout)}

    def of(stream: int) -> Stream:
        own = dict(options)
        for name, axis in (_HEAD_AXES | {"dropout_keep": -3}).items():
            if own.get(name) is not None and np.ndim(own[name]) >= -axis and np.shape(own[name])[axis] == heads:
                own[name] = np.take(np.asarray(own[name]), range(stream, heads, 2), axis=axis)
        return Stream(queries[:, :, stream::2], keys if shared else keys[:, :, stream::2], values, own)

    return of(0), of(1)


def _per_row(lambda_: ArrayLike, dtype: DTypeLike) -> Array:
    """Turn lambda (a scalar, [H] or [B, N, H]) into what multiplies [B, N, H, E]."""
    return np.asarray(np.asarray(lambda_).astype(dtype)[..., None])


def differential_combine(
    out1: ArrayLike,
    out2: ArrayLike,
    lambda_: ArrayLike,
    *,
    norm: bool = False,
    norm_weight: ArrayLike | None = None,
    eps: float = 1e-5,
    output_scale: float = 1.0,
    dtype: DTypeLike = np.float64,
) -> Array:
    """Return ``o = out1 - lambda out2``; with `norm` o / sqrt(mean(o^2) + eps), times the weight; times the scale.

    >>> differential_combine([3.0, 4.0], [0.0, 0.0], 0.5, norm=True, eps=0.0).round(4).tolist()
    [0.8485, 1.1314]
    """
    real: Any = np.dtype(dtype).type
    with np.errstate(invalid="ignore", over="ignore"):
        o = np.asarray(out1).astype(dtype) - _per_row(lambda_, dtype) * np.asarray(out2).astype(dtype)
        if norm:
            o = o * _inverse_norm(o, eps)
            if norm_weight is not None:
                o = o * np.asarray(norm_weight).astype(dtype)
        return np.asarray(o * real(output_scale))


def _inverse_norm(o: Array, eps: float) -> Array:
    """Return 1 / sqrt(mean(o^2) + eps) of each row, 0 where that is 1 / 0."""
    square = np.mean(np.square(o), axis=-1, keepdims=True) + o.dtype.type(eps)
    return np.where(square == 0, o.dtype.type(0), 1 / np.sqrt(np.where(square == 0, o.dtype.type(1), square)))


def differential_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    lambda_: ArrayLike,
    *,
    norm: bool = False,
    norm_weight: ArrayLike | None = None,
    eps: float = 1e-5,
    output_scale: float = 1.0,
    dtype: DTypeLike = np.float64,
    **options: Any,
) -> DifferentialResult:
    """Return ``softmax(q1 k1^T) v - lambda softmax(q2 k2^T) v`` and what it comes of.

    `q` [B, N, 2H, D], `k` [B, M, 2G, D] (V1) or [B, M, G, D] (V2), `v` [B, M, G, E]; `lambda_` is a scalar, [H] or
    [B, N, H]; other `options` are those of :func:`cuattn.reference.attention`, but sinks and descales.

    >>> q = np.zeros((1, 1, 2, 4)); v = np.array([1.0, 3.0]).reshape(1, 2, 1, 1)
    >>> differential_attention(q, np.zeros((1, 2, 2, 4)), v, 0.25).out.ravel().tolist()
    [1.5]
    """
    results = [attention(x.q, x.k, x.v, dtype=dtype, **x.options) for x in differential_streams(q, k, v, **options)]
    (out1, lse1), (out2, lse2) = results
    of_norm: dict[str, Any] = {"norm": norm, "norm_weight": norm_weight, "eps": eps, "output_scale": output_scale}
    out = differential_combine(out1, out2, lambda_, dtype=dtype, **of_norm)
    return DifferentialResult(out, np.stack([lse1, lse2], axis=2), out1, out2)


def differential_attention_backward(
    dout: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    lambda_: ArrayLike,
    state: tuple[ArrayLike, ArrayLike, ArrayLike] | None = None,
    *,
    norm: bool = False,
    norm_weight: ArrayLike | None = None,
    eps: float = 1e-5,
    output_scale: float = 1.0,
    dtype: DTypeLike = np.float64,
    **options: Any,
) -> DifferentialGradients:
    """Return the gradients of ``sum(dout * out)``.

    With o = out1 - lambda out2, r = 1 / sqrt(mean(o^2) + eps), w the weight and c the scale::

        y = w o r c:  g = c w dout,  do = r (g - o r^2 mean(g o)),  dw = sum(dout c o r)     (without norm: do = c dout)
        dlam = -sum_E(do out2), summed over the axes along which lambda was broadcast
        the gradients of the first attention for do, and of the second for -lambda do; of shared keys their sum

    `state` (lse [B, H, 2, N], out1, out2) is what forward returned, computed when None; it is used as it is.
    """
    if state is None:
        computed = differential_attention(q, k, v, lambda_, dtype=dtype, **options)
        state = computed.lse, computed.out1, computed.out2
    lse, out1, out2 = (np.asarray(x).astype(dtype) for x in state)
    lam, dy = _per_row(lambda_, dtype), np.asarray(dout).astype(dtype)
    real: Any = np.dtype(dtype).type
    dnorm_weight = None
    do = dy * real(output_scale)
    if norm:
        o = out1 - lam * out2
        r = _inverse_norm(o, eps)
        if norm_weight is not None:
            dnorm_weight = (do * o * r).sum(axis=(0, 1, 2))
            do = do * np.asarray(norm_weight).astype(dtype)
        do = r * (do - o * np.square(r) * np.mean(do * o, axis=-1, keepdims=True))
    of_rows = -(do * out2).sum(axis=-1)
    broadcast = {0: (0, 1, 2), 1: (0, 1), 3: ()}[np.ndim(lambda_)]
    dlam = of_rows.sum(axis=broadcast)

    queries, keys = np.asarray(q), np.asarray(k)
    dq, dk = np.zeros(queries.shape, dtype), np.zeros(keys.shape, dtype)
    dv: Any = 0
    for s, (stream, out, gradient) in enumerate(
        zip(differential_streams(q, k, v, **options), (out1, out2), (do, -lam * do), strict=True)
    ):
        of = attention_backward(
            gradient, stream.q, stream.k, stream.v, out, lse[:, :, s], dtype=dtype, **stream.options
        )
        dq[:, :, s::2] = of.dq
        if stream.k.shape == keys.shape:
            dk += of.dk
        else:
            dk[:, :, s::2] = of.dk
        dv = dv + of.dv
    return DifferentialGradients(dq, dk, np.asarray(dv), np.asarray(dlam), dnorm_weight)
