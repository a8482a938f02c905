"""When are gradients right? By the rule of :mod:`cuattn.testing.tolerance`, for what a backward kernel computes: a
function of dout, q, k, v and of the rounded out and lse that forward saved.

Each of dq, dk, dv, dbias and dsinks passes when, element by element::

    |d - ref| <= f max|naive - ref| + 2 ulp(ref) + c,    f = 2, 3 with a softcap

* ``ref`` is :func:`cuattn.reference.attention_backward` in float64 (``longdouble`` for float64 inputs) of the very
  inputs: the saved out and lse are taken as exact. So an error of forward is not charged to backward and gives it no
  room either: with the gradient of the true function as ``ref``, the last bit of out alone, in
  Delta = rowsum(dout out) - dlse, would be worth more than everything that backward does in float32;
* ``naive`` is :func:`cuattn.reference.attention_backward_naive`: the same formulas, the same out and lse, the kernel's
  precision. Where it overflows, so may a kernel;
* ``c`` is what each rounding that a kernel has to make can cost, whatever naive happens to do: naive is exact on tiny
  problems. With u the unit roundoff of the accumulation, u_P that of the dtype to which P Z and dS are rounded (twice
  2^-11 with tf32, once for each operand), ``tiny`` the smallest normal number of the accumulation dtype, t the larger
  of it and of half the smallest subnormal of the narrow one:

  - a probability e^(s - lse): ``dp = (e^r - 1) P + tiny`` with ``r = u (4 (1 + |s|) + e + 2 |lse|)``, of which the
    first two terms are explained there. It is that of the element, not the largest of its row: lse is given;
  - the operand P Z: ``Z dp + u_P P Z + t Z``, which gives ``c`` of dV when multiplied by |dout|;
  - dP = dout V^T: ``ddP = u e'``, the running error bound of that dot product; with tf32 ``+ 2 u_tf32 (|dout| |V|)``;
  - Delta: ``dD``, the running error bound of its sum, and 2 u |dlse|;
  - dS = P (Z dP - Delta), where the difference may cancel to nothing (it does with one key): ``ddS = (P + dp)
    (Z ddP + dD + 2 u (Z |dP| + |Delta|)) + dp |Z dP - Delta| + 2 u |dS|``;
  - the softcap's 1 - tanh^2, likewise a difference: ``2 |tanh| ((1 - tanh^2) r / softcap + 4 u) + 2 u``, times |dS|;
  - the operand dS: ``ddS + u_P |dS| + t``, which gives ``c`` of dQ when multiplied by scale |K|, of dK by scale |Q|.
    dbias sums dS as it is, so it has no u_P and no t;
  - dsinks sums e^(sink - lse) Delta: ``r`` of the sink times that, and the probability times dD;
  - a sum of n terms loses ``(1 + sqrt(n)) u`` of the sum of their magnitudes, and where it is subnormal
    ``2 + sqrt(n)`` of the smallest numbers of the accumulation dtype, before the last factor (scale, 1 / (1 - p)).

  All of them are 0 for a key that is not visible.

A sum that has no term, or none but zeros (a row that sees nothing), must be exactly 0. NaN and infinities must stand
in exactly the same places.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from cuattn.reference.backward import Gradients
from cuattn.reference.varlen import place_of_sequence, sequences
from cuattn.testing.gradient_errors import GradientSum, gradient_sums
from cuattn.testing.rounding import to_numpy
from cuattn.testing.tolerance import ToleranceError, assert_within

__all__ = ["assert_gradients_close", "assert_varlen_gradients_close", "gradient_bound"]

Array = NDArray[Any]


def _assert_gradient(name: str, actual: Any, of: GradientSum) -> None:
    bound, got = of.bound(), to_numpy(actual)
    if got.dtype != of.dtype:
        raise ToleranceError(f"{name} has dtype {got.dtype}, expected {of.dtype}")
    if got.shape == of.expected.shape:  # else the next assertion says so
        got = got.astype(of.expected.dtype)
        too_large = np.abs(of.expected) + bound > float(ml_dtypes.finfo(of.dtype).max)
        overflows = np.isinf(got) & too_large & (np.sign(got) == np.sign(of.expected))
        overflows |= ~np.isfinite(got) & ~np.isfinite(of.naive)
        got = np.where(overflows & np.isfinite(of.expected), of.expected, got)
    assert_within(got, of.expected, bound, name)


def _given(grads: Any, options: dict[str, Any]) -> list[str]:
    """Return the names of the gradients to be checked, after a check that they are those of the call."""
    names = ["dq", "dk", "dv"]
    if grads.dbias is not None:
        names.append("dbias")
    if grads.dsinks is not None:
        names.append("dsinks")
    for name, option in (("dbias", "bias"), ("dsinks", "sinks")):
        if name in names and options.get(option) is None:
            raise ToleranceError(f"{name} is given, but there is no {option}")
    if options.get("sinks") is not None and "dsinks" not in names:
        raise ToleranceError("dsinks is None, but there are sinks")
    return names


def _on_host(*arrays: Any, **options: Any) -> tuple[list[Array], dict[str, Any]]:
    """Return NumPy arrays of everything that may be on a device."""
    options = {name: to_numpy(x) if hasattr(x, "shape") else x for name, x in options.items()}
    return [to_numpy(x) for x in arrays], options


def gradient_bound(
    dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *, dlse: Any = None, **options: Any
) -> tuple[Gradients, Gradients]:
    """Return the reference and what a result may be away from it: (gradients, bounds); arguments as below."""
    arrays, options = _on_host(dout, q, k, v, out, lse, dlse=dlse, **options)
    sums = gradient_sums(*arrays, **options)
    absent: dict[str, Any] = dict.fromkeys(Gradients._fields)
    expected = Gradients(**absent | {name: of.expected for name, of in sums.items()})
    return expected, Gradients(**absent | {name: of.bound() for name, of in sums.items()})


def assert_gradients_close(
    grads: Any, dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *, dlse: Any = None, **options: Any
) -> None:
    """Assert that `grads` are the gradients of attention under the rule at the top of this file.

    Args:
        grads: anything with dq, dk, dv, dbias and dsinks: what the kernel returned, dq, dk and dv of the dtype of q,
            dbias (not checked when None) of that of the bias, dsinks (None without sinks) float32, float64 for float64.
        dout, q, k, v, out, lse, dlse: what the kernel was given, exactly: dout and out [B, N, H, E], q [B, N, H, D],
            k [B, M, G, D], v [B, M, G, E], lse and dlse [B, H, N].
        options: those of :func:`cuattn.attention`, and `dropout_keep` of :func:`cuattn.reference.attention`.

    Raises:
        ToleranceError: naming the gradient, its worst element, its index, values and bound.

    >>> from cuattn import reference
    >>> x = np.ones((1, 3, 1, 2), np.float32)
    >>> out, lse = reference.attention_naive(x, x, x)
    >>> assert_gradients_close(reference.attention_backward_naive(x, x, x, x, out, lse), x, x, x, x, out, lse)
    """
    names = _given(grads, options)
    arrays, options = _on_host(dout, q, k, v, out, lse, dlse=dlse, **options)
    sums = gradient_sums(*arrays, **options)
    for name in names:
        _assert_gradient(name, getattr(grads, name), sums[name])


def assert_varlen_gradients_close(
    grads: Any,
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    *,
    dlse: Any = None,
    **options: Any,
) -> None:
    """Assert that `grads` are right for packed sequences: dq, dk and dv of each of them, dbias and dsinks of them all.

    Args:
        grads, dout, q, k, v, out, lse, dlse: as above, packed: dout [T, H, E], k [Tk, G, D], lse [H, T] and so on.
        cu_seqlens_q, cu_seqlens_k: where sequences start, [B + 1], the last entry being T and Tk.
        options: those of :func:`cuattn.attention_varlen`.

    Raises:
        ToleranceError: naming the sequence, the gradient and the worst element of it.
    """
    names = _given(grads, options)
    arrays, options = _on_host(dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, **options)
    dy, queries, keys, values, saved, saved_lse, starts_q, starts_k = arrays
    for name, x in (("dq", queries), ("dk", keys), ("dv", values)):
        if tuple(getattr(grads, name).shape) != x.shape:
            raise ToleranceError(f"{name} has shape {tuple(getattr(grads, name).shape)}, expected {x.shape}")
    total = {name: GradientSum.of_no_terms(name, queries.dtype, options) for name in names[3:]}
    of_call = sequences(queries, keys, values, starts_q, starts_k, **options)
    for b, (rows, query, key, value, own) in enumerate(of_call):
        columns = slice(int(starts_k[b]), int(starts_k[b + 1]))
        own_dlse = None if dlse is None else to_numpy(dlse)[None, :, rows]
        sums = gradient_sums(
            dy[None, rows], query, key, value, saved[None, rows], saved_lse[None, :, rows], dlse=own_dlse, **own
        )
        for name, tokens in (("dq", rows), ("dk", columns), ("dv", columns)):
            try:
                _assert_gradient(name, getattr(grads, name)[None, tokens], sums[name])
            except ToleranceError as error:
                raise ToleranceError(f"sequence {b}, tokens {tokens.start} to {tokens.stop}: {error}") from None
        for name in names[3:]:
            _add(total[name], sums[name], b, rows.stop - rows.start, columns.stop - columns.start)
    for name, of in total.items():
        _assert_gradient(name, getattr(grads, name), of)


def _add(total: GradientSum, of: GradientSum, b: int, seqlen_q: int, seqlen_k: int) -> None:
    """Add to dbias or dsinks what sequence `b` gives."""
    for name in ("expected", "naive", "errors", "magnitudes", "reached"):
        array, part = getattr(total, name), getattr(of, name)
        if part.ndim == 4:  # dbias: the positions that the sequence has
            array = array.reshape((1,) * (4 - array.ndim) + array.shape)
            array = array[place_of_sequence(array.shape, b, seqlen_q, seqlen_k)]
        np.add(array, part, out=array)  # of bool: or
    total.terms += of.terms
