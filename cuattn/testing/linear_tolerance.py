"""When is a result of linear attention right? As far from float64 as the chunked form in the kernel's own precision is.

Element by element, as in :mod:`cuattn.testing.tolerance`::

    |out - ref| <= 2 max|naive - ref| + 2 ulp(ref) + u (A |V| + |out| (A 1)) / |w|
    |s - ref|   <= 2 max|naive - ref| + 2 ulp(ref) + 2 u |K|^T |V|

* ``ref`` is the float64 reference of the very inputs that the kernel got (``longdouble`` for float64 inputs);
* ``naive`` computes chunks of 64 tokens from the formulas: mapped queries and keys, weights A, decayed keys and the
  state are rounded to the element before they are multiplied, all sums are in the accumulation dtype;
* ``u`` is the unit roundoff of the element. ``A |V|`` are the sums of magnitudes that an output is made of, ``w`` its
  denominator (1 without normalisation): where numbers of both signs cancel in a denominator, its error counts as often
  as it is smaller than its terms. A key is rounded when it is mapped, and again when it is decayed.

Where the denominator is 0, the result must be exactly 0. NaN and infinities must stand in exactly the same places.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cuattn import reference
from cuattn.reference.linear import LinearState, mapped
from cuattn.testing.rounding import accumulation_dtype, to_numpy, ulp, unit_roundoff
from cuattn.testing.tolerance import assert_within, oracle_dtype

__all__ = ["assert_linear_close", "assert_linear_varlen_close", "linear_naive"]

Array = NDArray[Any]
CHUNK = 64


def _heads(x: Array, num_heads: int) -> Array:
    """Return [B, N, H, ...] as [B, num_heads, N, ...], each head repeated."""
    return np.moveaxis(np.repeat(x, num_heads // x.shape[2], axis=2), 2, 1)


def linear_naive(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    causal: bool = True,
    feature_map: str | None = "elu1",
    normalize: bool = True,
    eps: float = 0.0,
    scale: float | None = None,
    decay: ArrayLike | None = None,
    initial_state: Any = None,
) -> tuple[Array, LinearState]:
    """Linear attention in chunks, rounded as a kernel rounds: out and the state, in the accumulation dtype."""
    q, k, v = (np.asarray(x) for x in (q, k, v))
    dtype, real = q.dtype, accumulation_dtype(q.dtype)

    def rounded(x: Array) -> Array:
        return x.astype(real) if dtype == real else x.astype(dtype).astype(real)

    batch, seqlen, states = *k.shape[:2], max(k.shape[2], v.shape[2])
    outputs, head_dim = max(q.shape[2], states), q.shape[3]
    queries = _heads(rounded(mapped(q.astype(real), feature_map)), outputs)
    keys, values = _heads(rounded(mapped(k.astype(real), feature_map)), states), _heads(v.astype(real), states)
    g = np.asarray(np.zeros(states) if decay is None else decay).astype(real)
    g = g if g.ndim == 4 else g[..., None]
    factors = np.exp(np.moveaxis(np.broadcast_to(g, (batch, seqlen, states, g.shape[-1])), 2, 1))
    s = np.zeros((batch, states, head_dim, v.shape[3]), real)
    z = np.zeros(s.shape[:-1], real)
    if initial_state is not None:
        s = s + np.asarray(initial_state[0])
        z = z if initial_state[1] is None else z + np.asarray(initial_state[1])

    share = outputs // states if states else 1
    above = np.zeros((batch, outputs, q.shape[1], v.shape[3]), real)
    below = np.zeros((*above.shape[:-1], 1), real)
    for first in range(0, seqlen, CHUNK):
        part = slice(first, min(first + CHUNK, seqlen))
        length = part.stop - part.start
        f, k_part, v_part = factors[:, :, part], keys[:, :, part], values[:, :, part]
        reach = np.zeros((batch, states, length, length, f.shape[-1]), real)  # e^(G_i - G_j)
        from_start = np.cumprod(f, axis=2, dtype=real)
        for i in range(length):
            if i:
                reach[:, :, i] = reach[:, :, i - 1] * f[:, :, i, None]
            reach[:, :, i, i] = 1
        if causal:
            q_part = queries[:, :, part]
            of_heads = [np.repeat(x, share, axis=1) for x in (reach, k_part, v_part, from_start, s, z)]
            weights = rounded(np.einsum("boid,bojd,boijd->boij", q_part, of_heads[1], _wide(of_heads[0], head_dim)))
            decayed = q_part * of_heads[3]
            above[:, :, part] = decayed @ rounded(of_heads[4]) + weights @ of_heads[2]
            below[:, :, part] = decayed @ of_heads[5][..., None] + weights.sum(axis=-1, keepdims=True)
        kept = rounded(k_part * reach[:, :, -1])
        last = from_start[:, :, -1]
        s = last[..., None] * s + kept.swapaxes(-1, -2) @ v_part
        z = last * z + kept.sum(axis=2)
    if not causal:
        above = queries @ rounded(np.repeat(s, share, axis=1))
        below = queries @ np.repeat(z, share, axis=1)[..., None]
    factor = real.type(scale if scale is not None else 1.0 if normalize else 1.0 / math.sqrt(head_dim))
    out = factor * above
    if normalize:
        denominator = factor * below + real.type(eps)
        out = np.where(denominator == 0, 0, out / np.where(denominator == 0, 1, denominator))
    return np.moveaxis(out, 1, 2), LinearState(s, z if normalize else None)


def _wide(reach: Array, head_dim: int) -> Array:
    return np.broadcast_to(reach, (*reach.shape[:-1], head_dim))


def assert_linear_close(
    out: Any, state: Any, q: ArrayLike, k: ArrayLike, v: ArrayLike, *, factor: float = 1.0, **options: Any
) -> None:
    """Assert that ``out`` and ``state`` (either may be None) are linear attention of q, k, v.

    ``options`` are those of `cuattn.reference.linear_attention`. ``factor`` multiplies the bound: what passes through
    several calls is rounded more often.

    Raises:
        ToleranceError: naming the worst element, its index, values and bound; or a wrong dtype.
    """
    q, k, v = (np.asarray(x) for x in (q, k, v))
    oracle = oracle_dtype(q.dtype)
    expected, expected_state = reference.linear_attention(q, k, v, dtype=oracle, **options)
    naive, naive_state = linear_naive(q, k, v, **options)
    sizes, denominators = _magnitudes(q, k, v, oracle, options)
    u = unit_roundoff(q.dtype)
    if out is not None:
        assert to_numpy(out).dtype == q.dtype
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = (sizes.out + np.abs(expected) * sizes.weights) / np.abs(denominators)
        terms = np.where(denominators == 0, 0, terms)
        bound = 2 * _worst(naive, expected) + 2 * ulp(expected, q.dtype) + u * terms
        assert_within(out, expected, factor * np.where(np.isnan(bound), 0, bound), "out")
    if state is not None:
        real = accumulation_dtype(q.dtype)
        for name, x, want, rough, size in zip(
            ("s", "z"), state, expected_state, naive_state, (sizes.s, sizes.z), strict=True
        ):
            assert (x is None) == (want is None)
            if want is not None and rough is not None:
                assert to_numpy(x).dtype == real
                bound = 2 * _worst(rough, want) + 2 * ulp(want, real) + 2 * u * size
                assert_within(x, want, factor * bound, f"state.{name}")


def assert_linear_varlen_close(
    out: Any, state: Any, q: Array, k: Array, v: Array, cu_seqlens: ArrayLike, *, decay: Any = None, **options: Any
) -> None:
    """Assert the same of packed sequences, each by itself."""
    starts = np.asarray(cu_seqlens)
    initial = options.pop("initial_state", None)
    for b in range(len(starts) - 1):
        rows = slice(int(starts[b]), int(starts[b + 1]))
        own = decay if decay is None or np.ndim(decay) == 1 else np.asarray(decay)[None, rows]
        first = None if initial is None else [None if x is None else np.asarray(x)[b : b + 1] for x in initial]
        last = None if state is None else [None if x is None else to_numpy(x)[b : b + 1] for x in state]
        arrays = (x[None, rows] for x in (q, k, v))
        assert_linear_close(to_numpy(out)[None, rows], last, *arrays, decay=own, initial_state=first, **options)


class _Sizes:
    """Sums of the magnitudes of all terms: of scale q S, of scale q z, of S and of z."""

    def __init__(self, out: Array, weights: Array, s: Array, z: Array) -> None:
        self.out, self.weights, self.s, self.z = out, weights, s, z


def _magnitudes(q: Array, k: Array, v: Array, oracle: Any, options: dict[str, Any]) -> tuple[_Sizes, Array]:
    """Return the sizes, and the denominators [B, N, O, 1]: ones without normalisation."""
    feature_map, normalize = options.get("feature_map", "elu1"), options.get("normalize", True)
    scale = options.get("scale")
    factor = scale if scale is not None else 1.0 if normalize else 1.0 / math.sqrt(q.shape[3])
    queries, keys = (mapped(x.astype(oracle), feature_map) for x in (q, k))
    initial = options.get("initial_state")
    plain = {name: x for name, x in options.items() if name in ("causal", "decay")}
    plain |= {"feature_map": None, "normalize": False, "scale": factor, "dtype": oracle}
    ones = np.ones((*v.shape[:3], 1), oracle)

    def run(first: Any, a: Array, b: Array, c: Array) -> tuple[Array, Array]:
        out, state = reference.linear_attention(a, b, c, initial_state=first, **plain)
        return out, state.s

    first_z = positive_s = positive_z = None
    if initial is not None:
        positive_s = (np.abs(initial[0]), None)
        if initial[1] is not None:
            first_z = (np.asarray(initial[1])[..., None], None)
            positive_z = (np.abs(first_z[0]), None)
    out, s = run(positive_s, np.abs(queries), np.abs(keys), np.abs(v.astype(oracle)))
    weights, z = run(positive_z, np.abs(queries), np.abs(keys), ones)
    if not normalize:
        return _Sizes(np.abs(out), 0 * np.abs(weights), s, z[..., 0]), np.ones_like(weights)
    denominators, _ = run(first_z, queries, keys, ones)
    return _Sizes(np.abs(out), np.abs(weights), s, z[..., 0]), denominators + options.get("eps", 0.0)


def _worst(naive: Array, expected: Array) -> float:
    with np.errstate(invalid="ignore"):
        errors = np.abs(naive.astype(expected.dtype) - expected)
    return float(np.max(errors[np.isfinite(errors)], initial=0.0))
