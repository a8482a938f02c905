"""When are the gradients of linear attention right? As far from float64 as the chunked form in a kernel's precision is.

Each gradient passes when, element by element, as in :mod:`cuattn.testing.gradient_tolerance`::

    |d - ref| <= 2 max|naive - ref| + 2 ulp(ref) + (2 u + sqrt(n) u_a) c

* ``ref`` is the float64 reference of the very inputs that the kernel got (``longdouble`` for float64 inputs);
* ``naive`` computes chunks of 64 tokens from the formulas: mapped queries and keys, decayed ones, the gradients of
  scores and the states are rounded to the element before they are multiplied; sums are in the accumulation dtype;
* ``u`` is the unit roundoff of the element, and ``c`` the sum of the magnitudes of all terms of a gradient: what it
  would be, were all numbers positive. A term is a product of up to four numbers that a kernel rounds, so that it may be
  wrong by 4 u: half of that is allowed, since on all but tiny problems, where naive may be exact, roundings cancel;
* ``u_a`` is that of the accumulation, and n the terms of the longest of the sums: a chunk, D or E.

Normalisation is a column: with r = scale / w and delta = dout . out, the gradients are those of the form without it
for the values (v, 1), the states (s, z) and the output gradients (r dout, -r delta). Denominators must not cancel: a
map that makes q and k positive, or such numbers, are the tests' to choose.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cuattn import reference
from cuattn.reference.linear import LinearGradients, LinearState, feature_map_derivative, mapped
from cuattn.testing.rounding import accumulation_dtype, to_numpy, ulp, unit_roundoff
from cuattn.testing.tolerance import assert_within, oracle_dtype

__all__ = ["assert_linear_gradients_close", "linear_gradients_naive"]

Array = NDArray[Any]
CHUNK = 64


def _arrays(*arrays: ArrayLike) -> list[Array]:
    return [to_numpy(x) for x in arrays]


def _extended(x: Array, column: Array) -> Array:
    return np.concatenate([x, column[..., None]], axis=-1)


def _extended_state(state: Any, dtype: Any) -> Array | None:
    if state is None:
        return None
    s, z = (None if x is None else to_numpy(x).astype(dtype) for x in state)
    return None if s is None else _extended(s, np.zeros(s.shape[:-1], dtype) if z is None else z)


def _factor(options: dict[str, Any], head_dim: int) -> float:
    if options.get("scale") is not None:
        return float(options["scale"])
    return 1.0 if options.get("normalize", True) else 1.0 / math.sqrt(head_dim)


def _output_gradients(dout: Array, q: Array, k: Array, v: Array, dtype: Any, options: dict[str, Any]) -> Array:
    """Return (r dout, -r delta) [B, N, O, E + 1] by the reference in some precision."""
    forward = {name: x for name, x in options.items() if name != "dstate"}
    factor = np.dtype(dtype).type(_factor(options, q.shape[3]))
    dy = dout.astype(dtype)
    if not options.get("normalize", True):
        return _extended(factor * dy, np.zeros(dy.shape[:-1], dtype))
    out, _ = reference.linear_attention(q, k, v, dtype=dtype, **forward)
    initial = _extended_state(options.get("initial_state"), dtype)
    plain = forward | {"normalize": False, "scale": float(factor)}
    plain["initial_state"] = None if initial is None else (initial[..., -1:], None)
    sums, _ = reference.linear_attention(q, k, np.ones((*v.shape[:3], 1)), dtype=dtype, **plain)
    w = sums[..., 0] + np.dtype(dtype).type(options.get("eps", 0.0))
    r = np.where(w == 0, 0, factor / np.where(w == 0, 1, w))
    return _extended(r[..., None] * dy, -r * (dy * out).sum(axis=-1))


def _magnitudes(dout: Array, q: Array, k: Array, v: Array, dtype: Any, options: dict[str, Any]) -> LinearGradients:
    """Return the gradients of positive numbers: of the magnitudes of all that enters, mapped."""
    feature_map = options.get("feature_map", "elu1")
    gradients = np.abs(_output_gradients(dout, q, k, v, dtype, options))
    queries, keys = (np.abs(mapped(x.astype(dtype), feature_map)) for x in (q, k))
    values = np.abs(_extended(v.astype(dtype), np.ones(v.shape[:-1])))
    states = {name: _extended_state(options.get(name), dtype) for name in ("initial_state", "dstate")}
    own = {name: None if x is None else (np.abs(x), None) for name, x in states.items()}
    of = reference.linear_attention_backward(
        gradients,
        queries,
        keys,
        values,
        initial_state=own["initial_state"],
        dstate=own["dstate"],
        causal=options.get("causal", True),
        feature_map=None,
        normalize=False,
        scale=1.0,
        decay=options.get("decay"),
        dtype=dtype,
    )
    slopes = [np.abs(feature_map_derivative(x.astype(dtype), feature_map)) for x in (q, k)]
    first = of.dinitial_state
    state = None if first is None else LinearState(first.s[..., :-1], first.s[..., -1])
    return LinearGradients(of.dq * slopes[0], of.dk * slopes[1], of.dv[..., :-1], of.ddecay, None, state)


def linear_gradients_naive(
    dout: ArrayLike, q: ArrayLike, k: ArrayLike, v: ArrayLike, **options: Any
) -> LinearGradients:
    """Gradients in chunks, rounded as a kernel rounds: those of q, k and v to the element, the others not."""
    dout, q, k, v = _arrays(dout, q, k, v)
    dtype, real = q.dtype, accumulation_dtype(q.dtype)
    causal, feature_map = options.get("causal", True), options.get("feature_map", "elu1")

    def rounded(x: Array) -> Array:
        return x if dtype == real else x.astype(dtype).astype(real)

    def per_head(x: Array, num_heads: int) -> Array:
        return np.moveaxis(np.repeat(x, num_heads // x.shape[2], axis=2), 2, 1)

    batch, seqlen, states = *k.shape[:2], max(k.shape[2], v.shape[2])
    outputs = max(q.shape[2], states)
    share = outputs // states
    queries = per_head(rounded(mapped(q.astype(real), feature_map)), outputs)
    keys = per_head(rounded(mapped(k.astype(real), feature_map)), states)
    values = per_head(_extended(v.astype(real), np.ones(v.shape[:-1], real)), states)
    grads = np.moveaxis(_output_gradients(dout, q, k, v, real, options), 2, 1)
    given = options.get("decay")
    g = np.asarray(np.zeros(states) if given is None else to_numpy(given)).astype(real)
    g = g if g.ndim == 4 else g[..., None]
    factors = np.exp(np.moveaxis(np.broadcast_to(g, (batch, seqlen, states, g.shape[-1])), 2, 1))

    first = _extended_state(options.get("initial_state"), real)
    s = np.zeros((batch, states, k.shape[3], v.shape[3] + 1), real) if first is None else first
    last = _extended_state(options.get("dstate"), real)
    ds = np.zeros_like(s) if last is None else last
    dq, dk, dv = (np.zeros_like(x) for x in (queries, keys, values))
    dg = np.zeros_like(factors)

    def of_outputs(x: Array) -> Array:
        return np.repeat(x, share, axis=1)

    def of_states(x: Array) -> Array:
        return x.reshape(batch, states, share, *x.shape[2:]).sum(axis=2)

    if not causal:
        s = s + rounded(keys).swapaxes(-1, -2) @ values
        ds = ds + of_states(queries.swapaxes(-1, -2) @ rounded(grads))
        dq = grads @ rounded(of_outputs(s)).swapaxes(-1, -2)
        dk, dv = values @ rounded(ds).swapaxes(-1, -2), keys @ rounded(ds)
    parts = [slice(at, min(at + CHUNK, seqlen)) for at in range(0, seqlen, CHUNK)] if causal else []
    before: list[Array] = []
    for part in parts:
        before.append(s)
        reach = _Reach(factors[:, :, part])
        s = reach.whole[..., None] * s + rounded(keys[:, :, part] * reach.after).swapaxes(-1, -2) @ values[:, :, part]
    for part, s in zip(reversed(parts), reversed(before), strict=True):
        reach = _Reach(factors[:, :, part])
        own_q, own_da = queries[:, :, part], grads[:, :, part]
        own_k, own_v, own_s = (of_outputs(x) for x in (keys[:, :, part], values[:, :, part], s))
        from_start, between = of_outputs(reach.before), of_outputs(reach.between)
        scores_of = between * own_k[:, :, None]  # [.., i, j, D]
        da = rounded((own_da @ own_v.swapaxes(-1, -2)) * np.tri(own_da.shape[2], dtype=real))
        weights = rounded(
            np.einsum("boid,boijd->boij", own_q, np.broadcast_to(scores_of, (*scores_of.shape[:4], q.shape[3])))
        )
        dq_within = np.einsum("boij,boijd->boijd", da, scores_of)
        dk_within = np.einsum("boij,boijd->boijd", da, between * own_q[:, :, :, None])
        dq_before = from_start * (own_da @ rounded(own_s).swapaxes(-1, -2))
        dk_behind = reach.after * (values[:, :, part] @ rounded(ds).swapaxes(-1, -2))
        dq[:, :, part] = dq_before + dq_within.sum(axis=3)
        dk[:, :, part] = dk_behind + of_states(dk_within.sum(axis=2))
        dv[:, :, part] = rounded(keys[:, :, part] * reach.after) @ rounded(ds)
        dv[:, :, part] += of_states(weights.swapaxes(-1, -2) @ own_da)
        moved = of_states(np.einsum("boid,boijd->boijd", own_q, dq_within))
        through = (reach.whole[..., None] * ds * s).sum(axis=-1)
        x, y = of_states(own_q * dq_before), keys[:, :, part] * dk_behind
        for t in range(x.shape[2]):
            got = moved[:, :, t:, :t].sum(axis=(2, 3)) + x[:, :, t:].sum(axis=2) + y[:, :, :t].sum(axis=2) + through
            dg[:, :, part.start + t] = got if dg.shape[-1] > 1 else got.sum(axis=-1, keepdims=True)
        ds = reach.whole[..., None] * ds + of_states(rounded(own_q * from_start).swapaxes(-1, -2) @ rounded(own_da))

    def summed(x: Array, num_heads: int) -> Array:
        x = np.moveaxis(x, 1, 2)
        return x.reshape(*x.shape[:2], num_heads, x.shape[2] // num_heads, x.shape[3]).sum(axis=3)

    dg = np.moveaxis(dg, 1, 2)
    ddecay = None
    if given is not None:
        rank = np.ndim(given)
        ddecay = dg if rank == 4 else dg[..., 0] if rank == 3 else dg.sum(axis=(0, 1, 3))
    slopes = [feature_map_derivative(x.astype(real), feature_map) for x in (q, k)]
    return LinearGradients(
        (summed(dq, q.shape[2]) * slopes[0]).astype(dtype),
        (summed(dk, k.shape[2]) * slopes[1]).astype(dtype),
        summed(dv[..., :-1], v.shape[2]).astype(dtype),
        ddecay,
        None,
        None if first is None else LinearState(ds[..., :-1], ds[..., -1]),
    )


class _Reach:
    """What decays within a chunk, from factors [B, G, n, D or 1]; token by token, without differences."""

    def __init__(self, factors: Array) -> None:
        length = factors.shape[2]
        self.between = np.zeros((*factors.shape[:2], length, length, factors.shape[-1]), factors.dtype)
        for i in range(length):
            if i:
                self.between[:, :, i] = self.between[:, :, i - 1] * factors[:, :, i, None]
            self.between[:, :, i, i] = 1
        self.before = np.cumprod(factors, axis=2, dtype=factors.dtype)
        self.after = self.between[:, :, -1]
        self.whole = self.before[:, :, -1]


def assert_linear_gradients_close(
    grads: Any, dout: ArrayLike, q: ArrayLike, k: ArrayLike, v: ArrayLike, *, part: bool = False, **options: Any
) -> None:
    """Assert that ``grads`` are those of linear attention under the rule at the top of this file.

    Those that are None have to be; with ``part`` they are not looked at. ``options`` are those of
    `cuattn.linear_attention_backward` but ``chunk``. Raises `ToleranceError`, which names the gradient, its worst
    element, its index, values and bound.
    """
    dout, q, k, v = _arrays(dout, q, k, v)
    if options.get("decay") is not None:
        options["decay"] = to_numpy(options["decay"])
    for name in ("initial_state", "dstate"):
        if options.get(name) is not None:
            options[name] = tuple(None if x is None else to_numpy(x) for x in options[name])
    dtype, real, oracle = q.dtype, accumulation_dtype(q.dtype), oracle_dtype(q.dtype)
    expected = reference.linear_attention_backward(dout, q, k, v, dtype=oracle, **options)
    naive = linear_gradients_naive(dout, q, k, v, **options)
    sizes = _magnitudes(dout, q, k, v, oracle, options)
    terms = max(CHUNK, q.shape[-1], v.shape[-1])
    rounding = 2 * unit_roundoff(dtype) + math.sqrt(terms) * unit_roundoff(real)
    for name, of in (("dq", dtype), ("dk", dtype), ("dv", dtype), ("ddecay", real)):
        if part and getattr(grads, name) is None:
            continue
        _assert_close(name, [getattr(x, name) for x in (grads, expected, naive, sizes)], of, rounding)
    assert grads.dbeta is None
    states = [x.dinitial_state for x in (grads, expected, naive, sizes)]
    if not part:
        assert (states[0] is None) == (states[1] is None)
    if states[0] is not None:
        for name in ("s", "z"):
            _assert_close(f"dinitial_state.{name}", [getattr(x, name) for x in states], real, rounding)


def _assert_close(name: str, of_all: list[Any], of: Any, rounding: float) -> None:
    got, want, naive, size = of_all
    assert (got is None) == (want is None), name
    if want is None:
        return
    found = to_numpy(got)
    assert found.dtype == of, (name, found.dtype)
    error = np.max(np.abs(naive.astype(want.dtype) - want), initial=0.0)
    bound = 2 * error + 2 * ulp(want, of) + rounding * size
    assert_within(found, want, bound, name)
