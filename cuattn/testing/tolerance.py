"""When is a result right? Not "close to 1e-2", but: no worse than plain code in the same precision may be.

An attention output passes when, element by element::

    |out - ref| <= 2 max|naive - ref| + 2 ulp(ref) + u_P (P |V|) + r (P |V|)
    |lse - ref| <= r,    r = u_acc (4 (1 + max|s|) + sqrt(M) + e)

* ``ref`` is the float64 reference of the very inputs that the kernel got (``longdouble`` for float64 inputs);
* ``naive`` is the plain algorithm in the kernel's own precision (:func:`cuattn.reference.attention_naive`);
* ``u_P`` is the unit roundoff of the dtype that probabilities are rounded to: on tiny problems naive happens to be
  exact, and rounding P alone costs a correct kernel ``u_P (P |V|)``;
* ``r``, one number a row, is what the logits and the sum over the keys may lose in the accumulation dtype, of unit
  roundoff ``u_acc``, in any order of operations. The terms of a logit are rounded a few times each (``max|s|`` adds
  their magnitudes, that of a softcap included), a sum of M terms loses about ``sqrt(M) u``, and ``e`` is the running
  error bound of the dot product: each of its D additions loses ``u`` of the partial sum so far, which neither a small
  result nor a lucky naive computation makes good again. For float16 and bfloat16 ``r`` is far below the other terms,
  unless a logit is huge; for float32 and float64 it is what keeps the rule fair when M or N is 1.

Rows that see nothing must be exactly 0. NaN and infinities must stand in exactly the same places.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from cuattn import reference
from cuattn.errors import ArgumentError
from cuattn.testing.rounding import accumulation_dtype, to_numpy, ulp, unit_roundoff

Array = NDArray[Any]

__all__ = [
    "ToleranceError",
    "assert_attention_close",
    "assert_lse_close",
    "assert_softmax_close",
    "assert_within",
    "attention_bound",
    "lse_bound",
]


class ToleranceError(AssertionError):
    """A result is out of bound; the message names the worst element, its values and its bound."""


def _first(where: Array) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argwhere(where)[0])


def assert_within(actual: Any, expected: ArrayLike, bound: ArrayLike, name: str = "out") -> None:
    """Assert ``|actual - expected| <= bound`` for every element, and NaN and infinities in the same places.

    Raises:
        ToleranceError: naming the element that is most times out of bound.
    """
    got = to_numpy(actual)
    want = np.asarray(expected)
    if got.shape != want.shape:
        raise ToleranceError(f"{name} has shape {got.shape}, expected {want.shape}")
    got = got.astype(want.dtype)
    for kind, test in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        differs = test(got) != test(want)
        if differs.any():
            at = _first(differs)
            raise ToleranceError(
                f"{kind} in the wrong places: {name}{list(at)} is {got[at]}, expected {want[at]}; "
                f"{int(differs.sum())} of {got.size} elements differ"
            )
    finite = np.isfinite(want)
    limit = np.broadcast_to(np.asarray(bound, dtype=np.float64), want.shape)
    with np.errstate(invalid="ignore"):
        error = np.where(finite, np.abs(got - want), 0).astype(np.float64)
    bad = ~(error <= np.where(finite, limit, 0))
    if not bad.any():
        return
    with np.errstate(divide="ignore", invalid="ignore"):
        excess = np.where(bad, error / limit, -1)
    at = tuple(int(i) for i in np.unravel_index(int(np.argmax(excess)), excess.shape))
    raise ToleranceError(
        f"{name}{list(at)} is {got[at]:.9g}, expected {want[at]:.9g}: error {error[at]:.3g} is {excess[at]:.3g} times "
        f"the bound {limit[at]:.3g}; {int(bad.sum())} of {got.size} elements are out of bound"
    )


def _oracle_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    return np.dtype(np.longdouble if np.dtype(dtype) == np.float64 else np.float64)


def _dot_product_error(q: Array, k: Array) -> Array:
    """The running error bound of the products q . k, in units of u, [B, H, N, M]: the sum of |partial sum| over D.

    Taken eight additions at a time: within those, a partial sum is at most the one before plus all magnitudes.
    """
    partial: Any = 0.0
    total: Any = 0.0
    for start in range(0, q.shape[3], 8):
        left, right = q[..., start : start + 8], k[..., start : start + 8]
        total = total + left.shape[3] * (np.abs(partial) + reference.logits(np.abs(left), np.abs(right), scale=1.0))
        partial = partial + reference.logits(left, right, scale=1.0)
    return np.asarray(total)


def _logit_error(
    q: Array,
    k: Array,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    bias: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    **visibility: Any,
) -> Array:
    """[B, H, N]: ``4 (1 + max|s|) + e`` over the visible keys of each row; 4 for an empty one."""
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    q, k = q.astype(np.float64), k.astype(np.float64)
    if bias is not None:
        magnitudes = np.abs(np.asarray(bias).astype(np.float64))
        bias = np.where(np.isfinite(magnitudes), magnitudes, 0)
    if alibi_slopes is not None:
        alibi_slopes = -np.abs(np.asarray(alibi_slopes).astype(np.float64))
    with np.errstate(invalid="ignore"):
        # Head dim 0 leaves of the logits what is added to the product, and -inf where a key is not visible.
        added = reference.logits(q[..., :0], k[..., :0], scale=1, bias=bias, alibi_slopes=alibi_slopes, **visibility)
        magnitude = np.abs(reference.logits(q, k, scale=scale)) + added
        error = 4 * magnitude + abs(scale) * _dot_product_error(q, k)
    largest = np.max(np.where(np.isfinite(error), error, 0), axis=-1, initial=0.0)
    if sinks is not None:
        sink = np.abs(np.asarray(sinks).astype(np.float64)).reshape(1, -1, 1)
        largest = np.maximum(largest, 4 * np.where(np.isfinite(sink), sink, 0))
    return np.asarray(4 * (1 + (softcap or 0)) + largest)


def lse_bound(q: Any, k: Any, **options: Any) -> Array:
    """What lse may be away from the reference, [B, H, N]: the ``r`` of the rule at the top of this file."""
    queries, keys = to_numpy(q), to_numpy(k)
    u = unit_roundoff(accumulation_dtype(queries.dtype))
    return np.asarray(u * (_logit_error(queries, keys, **options) + math.sqrt(keys.shape[1])))


def attention_bound(q: Any, k: Any, v: Any, **options: Any) -> tuple[Array, Array, Array, Array]:
    """The reference and what a result may be away from it: (out, bound of out, lse, bound of lse).

    Arrays and options as :func:`cuattn.reference.attention`; out and its bound are [B, N, H, E], the others [B, H, N].
    """
    queries, keys, values = to_numpy(q), to_numpy(k), to_numpy(v)
    oracle = _oracle_dtype(queries.dtype)
    out, lse = reference.attention(queries, keys, values, dtype=oracle, **options)
    naive, _ = reference.attention_naive(queries, keys, values, **options)
    spread, _ = reference.attention(queries, keys, np.abs(values), **options)
    with np.errstate(invalid="ignore"):
        naive_error = np.abs(naive.astype(oracle) - out)
    naive_max = float(np.max(naive_error, where=np.isfinite(naive_error), initial=0.0))
    row = lse_bound(queries, keys, **options)
    relative = unit_roundoff(values.dtype) + row.swapaxes(1, 2)[..., None]
    bound = 2 * naive_max + 2 * ulp(out, queries.dtype) + relative * spread
    # A row with no key, sink or not, is 0 and exactly so: no rounding is involved.
    p_sum = reference.probabilities(queries, keys, **options).sum(axis=-1).swapaxes(1, 2)[..., None]
    return out, np.where(p_sum == 0, 0.0, bound), lse, row


def assert_attention_close(out: Any, q: Any, k: Any, v: Any, *, lse: Any = None, **options: Any) -> None:
    """Assert that `out` (and `lse`) is the attention of q, k, v under the rule at the top of this file.

    Args:
        out: what the kernel returned, [B, N, H, E], of the dtype of q.
        q, k, v: what the kernel was given, exactly: [B, N, H, D], [B, M, G, D], [B, M, G, E].
        lse: what the kernel returned, [B, H, N], float32 (float64 for float64 inputs); not checked when None.
        options: those of :func:`cuattn.reference.attention`.

    Raises:
        ToleranceError: naming the worst element, its index, values and bound.

    >>> from cuattn import reference
    >>> x = np.ones((1, 3, 1, 2), np.float32)
    >>> assert_attention_close(reference.attention_naive(x, x, x)[0], x, x, x)
    """
    queries = to_numpy(q)
    if out.dtype != queries.dtype:
        raise ToleranceError(f"out has dtype {out.dtype}, expected {queries.dtype}, the dtype of q")
    expected, bound, expected_lse, bound_lse = attention_bound(queries, k, v, **options)
    assert_within(out, expected, bound, "out")
    if lse is not None:
        _assert_lse_dtype(lse, queries.dtype)
        assert_within(lse, expected_lse, bound_lse, "lse")


def assert_lse_close(lse: Any, q: Any, k: Any, **options: Any) -> None:
    """Assert that `lse` [B, H, N] is the natural-log sum-exp of the logits of q and k, as in the rule above."""
    queries, keys = to_numpy(q), to_numpy(k)
    _assert_lse_dtype(lse, queries.dtype)
    dtype = _oracle_dtype(queries.dtype)
    _, expected = reference.attention(queries, keys, np.zeros((*keys.shape[:3], 1), dtype), dtype=dtype, **options)
    assert_within(lse, expected, lse_bound(queries, keys, **options), "lse")


def _assert_lse_dtype(lse: Any, dtype: DTypeLike) -> None:
    if lse.dtype != accumulation_dtype(dtype):
        raise ToleranceError(f"lse has dtype {lse.dtype}, expected {accumulation_dtype(dtype)}")


def assert_softmax_close(out: Any, x: Any, axis: int = -1, kind: str = "softmax") -> None:
    """Assert that `out` is the softmax of `x` along `axis`; `kind` is "softmax", "log_softmax" or "logsumexp".

    The bound is relative, element by element: with u the unit roundoff of the accumulation and a the largest finite
    magnitude of the row, an exponent ``x - max`` may be off by ``4 u (1 + a)`` and the sum of n terms by ``sqrt(n) u``
    of itself; that, times the probability itself for "softmax", plus 2 ulp of `out`. A probability below the smallest
    normal number of the accumulation dtype may be flushed.

    Raises:
        ToleranceError: naming the worst element, its index, values and bound.
    """
    values = to_numpy(x)
    functions = {"softmax": reference.softmax, "log_softmax": reference.log_softmax, "logsumexp": reference.logsumexp}
    if kind not in functions:
        raise ArgumentError(f"kind is {kind!r}; allowed are {', '.join(map(repr, functions))}")
    accumulation = accumulation_dtype(values.dtype)
    if kind == "softmax" and out.dtype != values.dtype:
        raise ToleranceError(f"softmax has dtype {out.dtype}, expected {values.dtype}, the dtype of x")
    expected = functions[kind](values, axis, dtype=_oracle_dtype(values.dtype))
    magnitude = np.abs(values.astype(np.float64))
    largest = np.max(magnitude, axis=axis, keepdims=True, where=np.isfinite(magnitude), initial=0.0)
    bound = unit_roundoff(accumulation) * (4 * (1 + largest) + math.sqrt(values.shape[axis]))
    if kind == "logsumexp":
        bound = np.squeeze(bound, axis)
    if kind == "softmax":
        bound = bound * np.nan_to_num(expected.astype(np.float64)) + float(np.finfo(accumulation).tiny)
        bound = np.where(expected == 0, 0.0, bound)
    assert_within(out, expected, bound + 2 * ulp(expected, out.dtype), kind)
