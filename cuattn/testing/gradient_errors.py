"""What each rounding of a backward kernel can cost; :mod:`cuattn.testing.gradient_tolerance` explains it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cuattn import reference
from cuattn.reference.backward import Scores, scores, sum_over_group, sum_to_shape
from cuattn.reference.logits import heads_first
from cuattn.testing.rounding import accumulation_dtype, to_numpy, ulp, unit_roundoff
from cuattn.testing.tolerance import (
    U_TF32,
    dot_product_error,
    logit_errors,
    oracle_dtype,
    smallest_operand,
    smallest_probability,
    tiny,
    without_dropout,
)

__all__ = ["GradientSum", "gradient_sums"]

Array = NDArray[Any]


@dataclass
class GradientSum:
    """One gradient: what it should be, and what the terms that it is the sum of may lose."""

    dtype: np.dtype[Any]  #: of a result
    u: float  #: the unit roundoff of the accumulation
    factor: float  #: of the largest error of naive
    expected: Array
    naive: Array
    errors: Array  #: the sum of the errors of the terms
    magnitudes: Array  #: the sum of the magnitudes of the terms
    terms: float
    reached: Array  #: bool: whether any term may be other than 0

    def bound(self) -> Array:
        """What a result may be away from `expected`."""
        with np.errstate(invalid="ignore", over="ignore"):
            naive_error = np.abs(self.naive.astype(self.expected.dtype) - self.expected)
            largest = float(np.max(naive_error, where=np.isfinite(naive_error), initial=0.0))
            bound = self.factor * largest + 2 * ulp(self.expected, self.dtype)
            bound = bound + self.errors + (1 + math.sqrt(self.terms)) * self.u * self.magnitudes
        return np.where(self.reached, bound, 0.0)

    @classmethod
    def of_no_terms(cls, name: str, dtype: DTypeLike, options: dict[str, Any]) -> GradientSum:
        """Start the sum of dbias or dsinks, for inputs of `dtype`, before anything is added."""
        shape = np.shape(options[name.removeprefix("d")])
        expected, naive, errors, magnitudes = (np.zeros(shape, oracle_dtype(dtype)) for _ in range(4))
        return cls(*_kind(name, dtype, options), expected, naive, errors, magnitudes, 0.0, np.zeros(shape, bool))


def _kind(name: str, dtype: DTypeLike, options: dict[str, Any]) -> tuple[np.dtype[Any], float, float]:
    """Return the dtype, u and factor of the gradient `name` for inputs of `dtype`."""
    accumulation = accumulation_dtype(dtype)
    of_result = {"dsinks": accumulation, "dbias": np.asarray(options.get("bias")).dtype}.get(name, np.dtype(dtype))
    return of_result, unit_roundoff(accumulation), 2 if options.get("softcap") is None else 3


def _running_error(products: Array) -> Array:
    """Bound the error of a sum along the last axis, in any order that is not perverse, in units of u."""
    partial = np.abs(np.cumsum(products, axis=-1)).sum(axis=-1)
    return np.asarray(partial + (2 + math.sqrt(products.shape[-1])) * np.abs(products).sum(axis=-1))


def _finite(x: Any) -> Array:
    values = np.asarray(x).astype(np.float64)
    return np.where(np.isfinite(values), values, 0)


@dataclass
class _Errors:
    """What may be lost, [B, H, N, M] ([B, H, N] for delta): the dp, operands, ddS and dD of the rule."""

    pz: Array
    ds: Array
    operand: Array
    delta: Array


def _errors(of: Scores, dout: Array, q: Array, k: Array, v: Array, out: Array, lse: Array, *, dlse: Any,
            u: float, precision: str | None, **options: Any) -> _Errors:  # fmt: skip
    """Compute the errors of every element that is a term of a gradient."""
    dtype, softcap = q.dtype, options.get("softcap")
    u_p = 2 * U_TF32 if precision == "tf32" else unit_roundoff(dtype)
    least, least_p, least_operand = tiny(u), smallest_probability(dtype), smallest_operand(dtype)
    kept = of.seen & (of.z != 0)

    _, logit_error = logit_errors(q, k, u, precision=precision, **without_dropout(options))
    r = np.minimum(u * (_finite(logit_error) + 2 * np.abs(_finite(lse))[..., None]), 300)
    # A probability ends at 1, up to what lse has lost, however little is known of it.
    most = np.exp(np.minimum(of.log_p + r, np.maximum(of.log_p, 0) + 1)) - of.p
    p = np.where(r < 1, np.expm1(r) * of.p, most) + least
    pz = np.where(kept, of.z * (p + u_p * of.p + least_p), 0)

    wide_dout, wide_v = dout.astype(np.float64), v.astype(np.float64)
    dp = u * dot_product_error(wide_dout, wide_v)
    if precision == "tf32":
        dp = dp + 2 * U_TF32 * reference.logits(np.abs(wide_dout), np.abs(wide_v), scale=1)
    delta = u * _running_error(wide_dout * out.astype(np.float64)).swapaxes(1, 2)
    if dlse is not None:
        delta = delta + 2 * u * np.abs(dlse.astype(np.float64))
    cancelling = of.z * np.abs(of.dp) + np.abs(of.delta)[..., None]
    difference = of.z * dp + delta[..., None] + 2 * u * cancelling
    inner = np.abs(of.z * of.dp - of.delta[..., None])
    ds = np.where(of.seen, (of.p + p) * difference + p * inner + 2 * u * np.abs(of.ds) + least, 0)

    capped, operand = np.abs(of.ds * of.slope), ds
    if softcap is not None:
        tanh = np.sqrt(np.maximum(1 - of.slope, 0))
        slope = 2 * tanh * (of.slope * r / softcap + 4 * u) + 2 * u
        operand = ds * (of.slope + slope) + np.abs(of.ds) * slope
    operand = np.where(of.seen, operand + u_p * capped + least_operand, 0)
    return _Errors(pz, ds, operand, delta)


def gradient_sums(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    *,
    dlse: Any = None,
    precision: str | None = None,
    sinks: Any = None,
    **options: Any,
) -> dict[str, GradientSum]:
    """Compute the gradients by name, of a problem [B, N, H, D]; those that the call has."""
    arrays = dout, q, k, v, out, lse
    seqlen_q, num_heads, head_dim = q.shape[1:]
    num_kv_heads, bias = k.shape[2], options.get("bias")
    accumulation = accumulation_dtype(q.dtype)
    u = unit_roundoff(accumulation)
    dlse = None if dlse is None else to_numpy(dlse)
    every = {"dlse": dlse, "sinks": sinks, "precision": precision} | options
    expected = reference.attention_backward(*arrays, dtype=oracle_dtype(q.dtype), **every)
    wide_bias = {}
    if bias is not None and np.asarray(bias).dtype.itemsize < accumulation.itemsize:
        # In the precision of the sums, so that naive does not round dbias: 2 ulp are there for that already.
        wide_bias = {"bias": np.asarray(bias).astype(accumulation)}
    naive = reference.attention_backward_naive(*arrays, **every | wide_bias)

    scale = abs(1.0 / math.sqrt(head_dim) if options.get("scale") is None else options["scale"])
    rescale = 1 / (1 - options.get("dropout_p", 0))
    subnormal = float(np.finfo(accumulation).smallest_subnormal)
    dy, queries, keys = (np.abs(heads_first(x, num_heads, np.float64)) for x in (dout, q, k))

    def of_queries(x: Array) -> Array:
        return np.asarray((x @ keys).transpose(0, 2, 1, 3))

    def of_keys(x: Array, factors: Array) -> Array:
        return sum_over_group(x.swapaxes(-1, -2) @ factors, num_kv_heads)

    sums: dict[str, GradientSum] = {}

    def add(name: str, error: Array, magnitude: Array, reached: Array, terms: float, after: float = 1) -> None:
        """Add a gradient; `after` multiplies the sum at the end, and with it what is lost of a subnormal sum."""
        error = error + after * (2 + math.sqrt(terms)) * subnormal
        of = getattr(expected, name), getattr(naive, name)
        sums[name] = GradientSum(*_kind(name, q.dtype, options), *of, error, magnitude, terms, reached > 0)

    with np.errstate(invalid="ignore", over="ignore"):
        of = scores(*arrays, dlse=dlse, **options)
        errors = _errors(of, *arrays, dlse=dlse, u=u, precision=precision, **options)
        seen, ds, pz = of.seen.astype(np.float64), np.abs(of.ds * of.slope), np.where(of.z == 0, 0, of.p * of.z)
        rows = seqlen_q * (num_heads // num_kv_heads if num_kv_heads else 1)
        error, magnitude, reached = (of_queries(x) for x in (errors.operand, ds, seen))
        add("dq", scale * error, scale * magnitude, reached * (scale > 0), k.shape[1], scale)
        error, magnitude, reached = (of_keys(x, queries) for x in (errors.operand, ds, seen))
        add("dk", scale * error, scale * magnitude, reached * (scale > 0), rows, scale)
        error, magnitude, reached = (of_keys(x, dy) for x in (errors.pz, pz, seen * (of.z != 0)))
        add("dv", error, magnitude, reached, rows, rescale)
        if expected.dbias is not None:
            error, magnitude, reached = (
                sum_to_shape(x, expected.dbias.shape) for x in (errors.ds, np.abs(of.ds), seen)
            )
            add("dbias", error, magnitude, reached, of.ds.size / max(expected.dbias.size, 1))
        if expected.dsinks is not None:
            of_rows = _of_sinks(np.asarray(sinks), lse, np.abs(of.delta), errors.delta, u)
            error, magnitude, reached = (x.sum(axis=(0, 2)) for x in of_rows)
            add("dsinks", error, magnitude, reached, q.shape[0] * seqlen_q)
    return sums


def _of_sinks(sinks: Array, lse: Array, delta: Array, delta_error: Array, u: float) -> tuple[Array, Array, Array]:
    """Return (error, magnitude, whether it counts) of the terms e^(sink - lse) Delta [B, H, N]."""
    sink = sinks.astype(np.float64).reshape(1, -1, 1)
    there = np.broadcast_to(~np.isneginf(sink), lse.shape)
    p = np.where(there, np.exp(sink - lse.astype(np.float64)), 0)
    r = np.minimum(u * (4 * (1 + np.abs(_finite(sink))) + 2 * np.abs(_finite(lse))), 300)
    magnitude = delta + delta_error
    error = (np.expm1(r) * p + tiny(u)) * magnitude + p * (delta_error + 2 * u * magnitude)
    return np.where(there, error, 0), np.where(there, p * magnitude, 0), there.astype(np.float64)
