"""When is a result right? Not "close to 1e-2", but: no worse than plain code in the same precision may be.

An attention output passes when, element by element::

    |out - ref| <= 2 max|naive - ref| + 2 ulp(ref) + u_P (P |V|) + min((e^r - 1) (P |V|), h) + t (Z |V|)
    |lse - ref| <= r,    r = u_acc (4 (1 + max|s|) + sqrt(M) + e + log(f))

* ``ref`` is the float64 reference of the very inputs that the kernel got (``longdouble`` for float64 inputs);
* ``naive`` is the plain algorithm in the kernel's own precision (:func:`cuattn.reference.attention_naive`);
* ``u_P`` is the unit roundoff of the dtype that probabilities are rounded to (float16 for float8 inputs): on tiny
  problems naive happens to be exact, and rounding P alone costs a correct kernel ``u_P (P |V|)``;
* ``r``, one number a row, is what the logits and the sum over the keys may lose in the accumulation dtype, of unit
  roundoff ``u_acc``, in any order of operations. The terms of a logit are rounded a few times each (``max|s|`` adds
  their magnitudes, that of a softcap included), a sum of M terms loses about ``sqrt(M) u``, and ``e`` is the running
  error bound of the dot product: each of its D additions loses ``u`` of the partial sum so far, which neither a small
  result nor a lucky naive computation makes good again. For float16 and bfloat16 ``r`` is far below the other terms,
  unless a logit is huge; for float32 and float64 it is what keeps the rule fair when M or N is 1. ``f`` is the factor
  that P is multiplied with before it is rounded, 2^15 for float16, else 1: it is added to the exponent of a
  probability, which is then rounded where 15 is;
* ``h`` is how far out may be away where logits are so large that ``r`` says nothing any more: it stays a mean of the
  values that may count, those of keys within 2 r of the largest logit (:mod:`cuattn.testing.means`). So no 0, no NaN
  and no infinity passes for a mean of other numbers, however large the logits;
* ``t`` is half the smallest subnormal number of the dtype of P, over the factor that P is multiplied with before it is
  rounded (2^15 for float16), or the smallest normal one of the accumulation dtype, which may be flushed: with dropout,
  all that is kept of a row can be keys that small.

With dropout, P stands for P Z in all of this, where Z is 0 or 1 / (1 - p). Float8 inputs stand for their values times
the descales; q, k and v are exact in float16, out is bfloat16. With ``precision="tf32"`` the rule is looser, because
q, k and v themselves are rounded to 10 bits, which no accumulation makes good: ``r`` grows by the most that this can
move a logit, ``2 u_tf32 scale (|q| |k|)``, and ``u_P`` is twice ``u_tf32 = 2^-11``, once for P and once for V.
With ``precision="fp8"``, P is rounded to e4m3, 2^8 times as large: ``u_P = 2^-4`` and ``t = 2^-18``. And Hopper's
tensor cores are reported to keep 14 bits of a sum of 8-bit products: ``e`` grows by ``2^-13`` of the sum so far for
every eight products, and ``u_P`` by as much for every 32 keys.

Rows that see nothing must be exactly 0. NaN and infinities must stand in exactly the same places.
"""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from cuattn import reference
from cuattn.errors import ArgumentError
from cuattn.reference.logits import heads_first, per_head
from cuattn.reference.narrow import P_FACTORS, decode, output_dtype, probability_dtype
from cuattn.reference.varlen import sequences
from cuattn.testing import margins
from cuattn.testing.means import what_logits_move
from cuattn.testing.rounding import accumulation_dtype, to_numpy, ulp, unit_roundoff

Array = NDArray[Any]

#: The unit roundoff of float32 with 10 bits of mantissa.
U_TF32 = 2.0**-11
#: What tensor cores lose of a sum of 8-bit products when they add to it: 14 bits are kept, and the rest is cut.
U_FP8_SUM = 2.0**-13

__all__ = [
    "ToleranceError",
    "assert_attention_close",
    "assert_lse_close",
    "assert_softmax_close",
    "assert_varlen_close",
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
    margins.note(name, error, limit)
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


def oracle_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    return np.dtype(np.longdouble if np.dtype(dtype) == np.float64 else np.float64)


def dot_product_error(q: Array, k: Array) -> Array:
    """Bound the running error of the products q . k, in units of u, [B, H, N, M]: the sum of |partial sum| over D.

    Taken eight additions at a time: within those, a partial sum is at most the one before plus all magnitudes.
    """
    left, right = (heads_first(x, q.shape[2], np.float64) for x in (q, k))
    partial: Any = 0.0
    total: Any = 0.0
    for start in range(0, q.shape[3], 8):
        rows, columns = left[..., start : start + 8], right[..., start : start + 8].swapaxes(-1, -2)
        total = total + rows.shape[3] * (np.abs(partial) + np.abs(rows) @ np.abs(columns))
        partial = partial + rows @ columns
    return np.asarray(total)


def logit_errors(
    q: Array,
    k: Array,
    u: float,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    bias: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    precision: str | None = None,
    **visibility: Any,
) -> tuple[Array, Array]:
    """Return the logits [B, H, N, M], and ``4 (1 + |s|) + e`` of each in units of `u`, the unit roundoff of sums.

    With tf32, also what rounding q and k costs; with fp8, what tensor cores cut.
    """
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    q, k = q.astype(np.float64), k.astype(np.float64)
    logits = reference.logits(q, k, scale=scale, softcap=softcap, bias=bias, alibi_slopes=alibi_slopes, **visibility)
    if bias is not None:
        magnitudes = np.abs(np.asarray(bias).astype(np.float64))
        bias = np.where(np.isfinite(magnitudes), magnitudes, 0)
    if alibi_slopes is not None:
        alibi_slopes = -np.abs(np.asarray(alibi_slopes).astype(np.float64))
    with np.errstate(invalid="ignore"):
        # Head dim 0 leaves of the logits what is added to the product, and -inf where a key is not visible.
        added = reference.logits(q[..., :0], k[..., :0], scale=1, bias=bias, alibi_slopes=alibi_slopes, **visibility)
        magnitude = np.abs(reference.logits(q, k, scale=scale)) + added
        error = 4 * (1 + (softcap or 0) + magnitude) + abs(scale) * dot_product_error(q, k)
        if precision == "tf32":
            rounding = 2 * U_TF32 / unit_roundoff(np.float32)
            error = error + rounding * abs(scale) * reference.logits(np.abs(q), np.abs(k), scale=1)
        elif precision == "fp8":
            error = error + U_FP8_SUM / unit_roundoff(np.float32) * abs(scale) * dot_product_error(q, k) / 8
    return logits, error


def _logit_error(q: Array, k: Array, u: float, *, sinks: ArrayLike | None = None, **options: Any) -> Array:
    """Return the largest :func:`logit_errors` over the keys of each row that count, [B, H, N]; 4 for an empty one."""
    return row_error(*logit_errors(q, k, u, **options), u, sinks=sinks, softcap=options.get("softcap"))


def row_error(
    logits: Array, error: Array, u: float, *, sinks: ArrayLike | None = None, softcap: float | None = None
) -> Array:
    """Return the largest `error`, in units of `u`, over the keys of each row that count, [B, H, N]; at least 4."""
    with np.errstate(invalid="ignore"):
        # A key that is nothing beside another, whatever either loses, does not count: a bias of -3e38 on one key says
        # nothing about the others.
        least = np.max(logits - u * error, axis=-1, keepdims=True, where=np.isfinite(error), initial=-np.inf)
        counts = np.isfinite(error) & (logits + u * error >= least + math.log(tiny(u)))
    largest = np.max(np.where(counts, error, 4.0), axis=-1, initial=4.0)
    if sinks is not None:
        sink = np.abs(np.asarray(sinks).astype(np.float64)).reshape(1, -1, 1)
        largest = np.maximum(largest, 4 * (1 + (softcap or 0) + np.where(np.isfinite(sink), sink, 0)))
    return np.asarray(largest)


def tiny(u: float) -> float:
    """Return the smallest normal number of the accumulation dtype, whose unit roundoff is `u`."""
    return float(np.finfo(np.float64 if u == unit_roundoff(np.float64) else np.float32).tiny)


def _values(x: Any, descale: ArrayLike | None = None, fp8_format: str | None = None) -> Array:
    """Return the numbers [B, len, heads, dim] that a kernel was given, its descales [B, G] multiplied in."""
    values = decode(to_numpy(x), fp8_format)
    if descale is None:
        return values
    return values.astype(np.float64) * per_head(to_numpy(descale), values.shape[2], np.float64).swapaxes(1, 2)


def _plain(q: Any, k: Any, options: dict[str, Any]) -> tuple[Array, Array, dict[str, Any]]:
    """Return q, k and the options of the same problem without descales."""
    fp8_format = options.get("fp8_format")
    queries = _values(q, options.get("q_descale"), fp8_format)
    keys = _values(k, options.get("k_descale"), fp8_format)
    narrow = ("q_descale", "k_descale", "v_descale", "fp8_format")
    return queries, keys, {name: value for name, value in options.items() if name not in narrow}


def without_dropout(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if not name.startswith("dropout_")}


def lse_bound(q: Any, k: Any, **options: Any) -> Array:
    """Return what lse may be away from the reference, [B, H, N]: the ``r`` of the rule at the top of this file."""
    factor = rounding_of_factor(decode(to_numpy(q), options.get("fp8_format")).dtype)
    queries, keys, options = _plain(q, k, options)
    u = unit_roundoff(accumulation_dtype(queries.dtype if to_numpy(q).dtype == np.float64 else np.float32))
    error = _logit_error(queries, keys, u, **without_dropout(options))
    return np.asarray(u * (error + math.sqrt(keys.shape[1]) + factor))


def attention_bound(
    q: Any, k: Any, v: Any, *, unrounded: bool = False, **options: Any
) -> tuple[Array, Array, Array, Array]:
    """Return the reference and what a result may be away from it: (out, bound of out, lse, bound of lse).

    Arrays and options as :func:`cuattn.reference.attention`; out and its bound are [B, N, H, E], the others [B, H, N].
    An `unrounded` out is of the accumulation dtype: nothing is lost by the rounding of a result.
    """
    given = decode(to_numpy(q), options.get("fp8_format")).dtype
    oracle, narrow, precision = oracle_dtype(given), probability_dtype(given), options.get("precision")
    naive, _ = reference.attention_naive(to_numpy(q), to_numpy(k), to_numpy(v), unrounded=unrounded, **options)
    row = lse_bound(q, k, **options)
    values = _values(v, options.get("v_descale"), options.get("fp8_format"))
    queries, keys, options = _plain(q, k, options)
    out, lse = reference.attention(queries, keys, values, dtype=oracle, **options)
    magnitudes = np.abs(values).astype(np.float64)
    spread, _ = reference.attention(queries, keys, magnitudes, **options)
    with np.errstate(invalid="ignore", over="ignore"):
        naive_error = np.abs(naive.astype(oracle) - out)
        naive_max = float(np.max(naive_error, where=np.isfinite(naive_error), initial=0.0))
        u_p = 2 * U_TF32 if precision == "tf32" else unit_roundoff(narrow)
        if precision == "fp8":
            u_p = unit_roundoff(ml_dtypes.float8_e4m3fn) + math.ceil(keys.shape[1] / 32) * U_FP8_SUM
        bound = 2 * naive_max + 2 * ulp(out, accumulation_dtype(given) if unrounded else output_dtype(given))
        bound = bound + u_p * spread + what_logits_move(out, spread, row, queries, keys, values, **options)
    p = reference.probabilities(queries, keys, **options)
    rescale = 1 / (1 - options.get("dropout_p", 0))
    bound = bound + smallest_probability(given, precision) * rescale * sum_of_kept(p, magnitudes)
    if rescale > 1:  # what the sum loses where it is subnormal, before it is divided by 1 - p
        subnormal = float(np.finfo(accumulation_dtype(given)).smallest_subnormal)
        bound = bound + (2 + math.sqrt(keys.shape[1])) * subnormal * rescale
    # A row with no key, sink or not, is 0 and exactly so: no rounding is involved.
    p_sum = p.sum(axis=-1).swapaxes(1, 2)[..., None]
    return out, np.where(p_sum == 0, 0.0, bound), lse, row


def rounding_of_factor(dtype: DTypeLike) -> float:
    """Return the ``log(f)`` of the rule, for inputs of `dtype`."""
    return math.log(P_FACTORS.get(probability_dtype(dtype), 1))


def smallest_operand(dtype: DTypeLike) -> float:
    """Return half the smallest subnormal of `dtype`, or the smallest normal of its accumulation dtype if larger."""
    half = float(ml_dtypes.finfo(np.dtype(dtype)).smallest_subnormal) / 2
    return max(half, float(np.finfo(accumulation_dtype(dtype)).tiny))


def smallest_probability(dtype: DTypeLike, precision: str | None = None) -> float:
    """Return the ``t`` of the rule, for inputs of `dtype`."""
    narrow = np.dtype(ml_dtypes.float8_e4m3fn) if precision == "fp8" else probability_dtype(dtype)
    half = float(ml_dtypes.finfo(narrow).smallest_subnormal) / P_FACTORS.get(narrow, 1) / 2
    return max(half, float(np.finfo(accumulation_dtype(dtype)).tiny))


def sum_of_kept(p: Array, magnitudes: Array) -> Array:
    """Return the sum of |V| over the keys of P [B, H, N, M] that are not 0, [B, N, H, E]."""
    kept = (p > 0).astype(np.float64)
    finite = np.where(np.isfinite(magnitudes), magnitudes, 0)
    return np.asarray((kept @ heads_first(finite, p.shape[1], np.float64)).swapaxes(1, 2))


def assert_attention_close(
    out: Any, q: Any, k: Any, v: Any, *, lse: Any = None, unrounded: bool = False, **options: Any
) -> None:
    """Assert that `out` (and `lse`) is the attention of q, k, v under the rule at the top of this file.

    Args:
        out: what the kernel returned, [B, N, H, E], of the dtype of q; bfloat16 for float8 inputs.
        q, k, v: what the kernel was given, exactly: [B, N, H, D], [B, M, G, D], [B, M, G, E].
        lse: what the kernel returned, [B, H, N], float32 (float64 for float64 inputs); not checked when None.
        unrounded: whether out is of the accumulation dtype instead, and as exact as that.
        options: those of :func:`cuattn.attention`, and `dropout_keep` of :func:`cuattn.reference.attention`.

    Raises:
        ToleranceError: naming the worst element, its index, values and bound.

    >>> from cuattn import reference
    >>> x = np.ones((1, 3, 1, 2), np.float32)
    >>> assert_attention_close(reference.attention_naive(x, x, x)[0], x, x, x)
    """
    given = decode(to_numpy(q), options.get("fp8_format")).dtype
    expected_dtype = np.dtype(accumulation_dtype(given) if unrounded else output_dtype(given))
    if out.dtype != expected_dtype:
        raise ToleranceError(f"out has dtype {out.dtype}, expected {expected_dtype} for q of dtype {given}")
    expected, bound, expected_lse, bound_lse = attention_bound(q, k, v, unrounded=unrounded, **options)
    assert_within(out, expected, bound, "out")
    if lse is not None:
        _assert_lse_dtype(lse, given)
        assert_within(lse, expected_lse, bound_lse, "lse")


def assert_varlen_close(
    out: Any, q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, *, lse: Any = None, **options: Any
) -> None:
    """Assert that `out` [T, H, E] (and `lse` [H, T]) is right for packed sequences, each of them under the same rule.

    Args:
        out, lse: what the kernel returned.
        q, k, v: what it was given: [T, H, D], [Tk, G, D], [Tk, G, E].
        cu_seqlens_q, cu_seqlens_k: where sequences start, [B + 1], the last entry being T and Tk.
        options: those of :func:`cuattn.attention_varlen`.

    Raises:
        ToleranceError: naming the sequence and the worst element of it.
    """
    arrays = [to_numpy(x) for x in (q, k, v)]
    tokens, heads = arrays[0].shape[:2]
    if tuple(out.shape) != (tokens, heads, arrays[2].shape[2]):
        raise ToleranceError(f"out has shape {tuple(out.shape)}, expected {(tokens, heads, arrays[2].shape[2])}")
    if lse is not None and tuple(lse.shape) != (heads, tokens):
        raise ToleranceError(f"lse has shape {tuple(lse.shape)}, expected {(heads, tokens)}")
    starts = (to_numpy(cu) for cu in (cu_seqlens_q, cu_seqlens_k))
    for b, (rows, *of_sequence, own) in enumerate(sequences(*arrays, *starts, **options)):
        lse_of_sequence = None if lse is None else lse[None, :, rows]
        try:
            assert_attention_close(out[None, rows], *of_sequence, lse=lse_of_sequence, **own)
        except ToleranceError as error:
            raise ToleranceError(f"sequence {b}, tokens {rows.start} to {rows.stop}: {error}") from None


def assert_lse_close(lse: Any, q: Any, k: Any, **options: Any) -> None:
    """Assert that `lse` [B, H, N] is the natural-log sum-exp of the logits of q and k, as in the rule above."""
    given = decode(to_numpy(q), options.get("fp8_format")).dtype
    _assert_lse_dtype(lse, given)
    bound, dtype = lse_bound(q, k, **options), oracle_dtype(given)
    queries, keys, options = _plain(q, k, options)
    values = np.zeros((*keys.shape[:3], 1), dtype)
    _, expected = reference.attention(queries, keys, values, dtype=dtype, **without_dropout(options))
    assert_within(lse, expected, bound, "lse")


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
    expected = functions[kind](values, axis, dtype=oracle_dtype(values.dtype))
    magnitude = np.abs(values.astype(np.float64))
    largest = np.max(magnitude, axis=axis, keepdims=True, where=np.isfinite(magnitude), initial=0.0)
    bound = unit_roundoff(accumulation) * (4 * (1 + largest) + math.sqrt(values.shape[axis]))
    if kind == "logsumexp":
        bound = np.squeeze(bound, axis)
    if kind == "softmax":
        bound = bound * np.nan_to_num(expected.astype(np.float64)) + float(np.finfo(accumulation).tiny)
        bound = np.where(expected == 0, 0.0, bound)
    assert_within(out, expected, bound + 2 * ulp(expected, out.dtype), kind)
