"""When are the gradients of differential attention right? When those of its two attentions are, for what reaches them.

Each stream is held against :mod:`cuattn.testing.gradient_tolerance`, for the gradient ``dout_s`` of its result as the
reference rounds it. The kernels round ``dout_s`` as well, from sums in the accumulation dtype: it may be away by

    d = ulp(dout_s) + 16 u r (|g| + |o| r mean(|g| w) + w mean(|g o| r)),    w = r (|out1| + |lambda out2|)

(without a norm ``ulp(dout_s) + 16 u |g|``), where g is the gradient of the difference before the norm and r the
inverse root mean square; w / r is what the difference o is computed from, and u the unit roundoff of the sums. What d
does to dq, dk and dv follows from their formulas, all terms taken by their magnitude. What the streams share is added
before it is rounded.

dlam is ``-sum(do out2)`` and dnorm_weight a sum of ``c dout o r``: both may lose what d is without its ulp, and
``u (8 + sqrt(terms))`` of the sum of the magnitudes of their terms.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuattn import reference
from cuattn.reference.attention import dropped_out, split_options
from cuattn.reference.backward import sum_over_group
from cuattn.reference.logits import heads_first
from cuattn.testing.gradient_tolerance import gradient_bound
from cuattn.testing.rounding import accumulation_dtype, to_numpy, ulp, unit_roundoff
from cuattn.testing.tolerance import assert_within

__all__ = ["assert_differential_gradients_close"]

Array = NDArray[Any]


def assert_differential_gradients_close(
    grads: Any,
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    lambda_: Any,
    state: Any,
    *,
    norm: bool = False,
    norm_weight: Any = None,
    eps: float = 1e-5,
    output_scale: float = 1.0,
    **options: Any,
) -> None:
    """Assert that `grads` are the gradients of differential attention under the rule at the top of this file.

    Args:
        grads: what the kernels returned: dq, dk, dv, dlam, dnorm_weight.
        dout, q, k, v, lambda_, state: what they were given, exactly.
        norm, norm_weight, eps, output_scale, options: as for :func:`cuattn.differential_attention`.

    Raises:
        ToleranceError: naming the gradient, its worst element, its index, values and bound.
    """
    dy, q, k, v = (to_numpy(x) for x in (dout, q, k, v))
    lse, *outs = (to_numpy(x) for x in state)
    dtype, u = q.dtype, unit_roundoff(accumulation_dtype(q.dtype))
    of_norm: dict[str, Any] = {"norm": norm, "norm_weight": norm_weight, "eps": eps, "output_scale": output_scale}
    lam = np.asarray(to_numpy(lambda_) if hasattr(lambda_, "shape") else lambda_).astype(accumulation_dtype(dtype))
    saved = lse, outs[0], outs[1]
    expected = reference.differential_attention_backward(dy, q, k, v, lam, saved, **of_norm, **options)

    factor = lam.astype(np.float64)[..., None]
    out1, out2 = (x.astype(np.float64) for x in outs)
    o, w = out1 - factor * out2, np.abs(out1) + np.abs(factor * out2)
    g = dy.astype(np.float64) * output_scale
    terms = np.abs(g)
    moved = 16 * u * np.abs(g)
    do = g
    if norm:
        square = np.mean(np.square(o), axis=-1, keepdims=True) + eps
        r = np.where(square == 0, 0, 1 / np.sqrt(np.where(square == 0, 1, square)))  # a row of zeros stays one
        unit, w = o * r, w * r
        terms = np.abs(g) * (w + np.abs(unit) * np.mean(np.abs(unit) * w, axis=-1, keepdims=True))
        if norm_weight is not None:
            g = g * to_numpy(norm_weight).astype(np.float64)
        do = r * (g - unit * np.mean(g * unit, axis=-1, keepdims=True))
        spread = np.abs(unit) * np.mean(np.abs(g) * w, axis=-1, keepdims=True)
        spread = spread + w * np.mean(np.abs(g * unit), axis=-1, keepdims=True)
        moved = 16 * u * r * (np.abs(g) * (1 + np.mean(np.abs(unit) * w, axis=-1, keepdims=True)) + spread)

    axes = {0: (0, 1, 2), 1: (0, 1), 3: ()}[lam.ndim]
    count = math.prod(do.shape[axis] for axis in axes) * do.shape[-1]
    # What sums lose where they are subnormal, which u of them does not say.
    subnormal = (2 + math.sqrt(count)) * float(np.finfo(accumulation_dtype(dtype)).smallest_subnormal)
    lost = (moved * np.abs(out2)).sum(axis=-1) + u * (8 + math.sqrt(count)) * np.abs(do * out2).sum(axis=-1)
    assert grads.dlam.dtype == accumulation_dtype(dtype), grads.dlam.dtype
    assert_within(grads.dlam, expected.dlam, lost.sum(axis=axes) + subnormal, "dlam")
    if expected.dnorm_weight is None:
        assert grads.dnorm_weight is None
    else:
        bound = u * (24 + math.sqrt(count)) * terms.sum(axis=(0, 1, 2)) + subnormal
        assert_within(grads.dnorm_weight, expected.dnorm_weight, bound, "dnorm_weight")

    dq, dk, dv = (np.zeros(x.shape) for x in (q, k, v))
    shared = k.shape[2] == v.shape[2]
    streams = reference.differential_streams(q, k, v, **options)
    for s, (stream, out, by) in enumerate(zip(streams, outs, (np.ones_like(factor), -factor), strict=True)):
        gradient = (by * do).astype(dtype)
        saved_lse = np.ascontiguousarray(lse[:, :, s])
        _, bounds = gradient_bound(gradient, stream.q, stream.k, stream.v, out, saved_lse, **stream.options)
        delta = ulp(gradient, dtype) + np.abs(by) * moved
        of_q, of_k, of_v = _what_moves(delta, stream, out)
        dq[:, :, s::2] = bounds.dq + of_q
        if shared:
            dk += bounds.dk + of_k
        else:
            dk[:, :, s::2] = bounds.dk + of_k
        dv += bounds.dv + of_v
    for name, bound, x in (("dq", dq, q), ("dk", dk, k), ("dv", dv, v)):
        got, want = getattr(grads, name), getattr(expected, name)
        assert got.dtype == dtype and got.shape == x.shape, (name, got.dtype, got.shape)
        assert_within(got, want, bound, name)


def _what_moves(delta: Array, stream: reference.Stream, out: Array) -> tuple[Array, Array, Array]:
    """Return what dq, dk and dv of a stream move by at most, where the gradient of its result moves by `delta`.

    Rows that are NaN or infinite count for nothing: what they reach is NaN, and its bound is not asked for.
    """
    delta, out = _finite(delta), _finite(out)
    of_logits, of_dropout = split_options(stream.options)
    num_heads, num_kv_heads = stream.q.shape[2], stream.k.shape[2]
    p = _finite(reference.probabilities(stream.q, stream.k, **of_logits))
    z = dropped_out(np.ones_like(p), **of_dropout)
    change, values, queries, keys = (
        heads_first(np.abs(x.astype(np.float64)), num_heads, np.float64) for x in (delta, stream.v, stream.q, stream.k)
    )
    row = (delta * np.abs(out.astype(np.float64))).sum(axis=-1).swapaxes(1, 2)[..., None]
    ds = p * (z * (change @ values.swapaxes(-1, -2)) + row)
    scale = stream.options.get("scale")
    scale = abs(1 / math.sqrt(stream.q.shape[3]) if scale is None else scale)
    dk = sum_over_group(ds.swapaxes(-1, -2) @ queries, num_kv_heads)
    dv = sum_over_group((p * z).swapaxes(-1, -2) @ change, num_kv_heads)
    return scale * (ds @ keys).transpose(0, 2, 1, 3), scale * dk, dv


def _finite(x: Array) -> Array:
    return np.nan_to_num(x.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
