"""Linear attention and its gradients, from the recurrence: one token after the other, with every state kept."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from cuattn.reference.softmax import Array

__all__ = [
    "LinearGradients",
    "LinearState",
    "feature_map_derivative",
    "linear_attention",
    "linear_attention_backward",
    "linear_attention_summary",
    "linear_attention_varlen",
    "mapped",
]


class LinearState(NamedTuple):
    """What linear attention keeps of the past, or the gradient of that."""

    s: Array  #: [B, G, D, E]: the sum of decayed outer products of keys and values
    z: Array | None  #: [B, G, D]: the sum of decayed keys; None without normalisation


class LinearGradients(NamedTuple):
    """What a scalar changes by, per unit of each input; None for an input that is not there."""

    dq: Array  #: [B, N, H, D]
    dk: Array  #: [B, M, Gk, D]
    dv: Array  #: [B, M, Gv, E]
    ddecay: Array | None  #: of the shape of the decay
    dbeta: Array | None  #: always None: there is no delta rule here
    dinitial_state: LinearState | None


class _Walk(NamedTuple):
    """All that the recurrence computes, heads repeated to G states and O outputs."""

    queries: Array  #: [B, N, O, D], mapped
    keys: Array  #: [B, M, G, D], mapped
    values: Array  #: [B, M, G, E]
    factors: Array  #: e^decay [B, M, G, D or 1]
    s: Array  #: [M + 1, B, G, D, E]: the state before each token, and after the last
    z: Array  #: [M + 1, B, G, D]
    reads: Array  #: [N]: the state that each query reads
    of_output: Array  #: [O]: the state head of each output head


def mapped(x: Array, feature_map: str | None) -> Array:
    """Return a feature map's values: x + 1 for x > 0 and e^x else ("elu1"), max(x, 0), x^2, or x itself (None).

    >>> mapped(np.array([-1.0, 0.0, 2.0]), "elu1").round(3).tolist()
    [0.368, 1.0, 3.0]
    """
    if feature_map == "elu1":
        return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))
    if feature_map == "relu":
        return np.where(x > 0, x, x * 0)  # NaN stays NaN
    return np.square(x) if feature_map == "square" else x


def feature_map_derivative(x: Array, feature_map: str | None) -> Array:
    """Return the derivative of a feature map; that of relu is 0 at 0.

    >>> feature_map_derivative(np.array([-1.0, 0.0, 2.0]), "square").tolist()
    [-2.0, 0.0, 4.0]
    """
    if feature_map == "elu1":
        return np.where(x > 0, np.ones_like(x), np.exp(np.minimum(x, 0)))
    if feature_map == "relu":
        return np.where(x > 0, np.ones_like(x), np.zeros_like(x))
    return 2 * x if feature_map == "square" else np.ones_like(x)


def _repeated(x: Array, num_heads: int) -> Array:
    """Return [B, N, H, ...] with each head repeated, neighbours first, to `num_heads`."""
    return np.repeat(x, num_heads // x.shape[2], axis=2) if x.shape[2] else x


def _summed(x: Array, num_heads: int) -> Array:
    """Sum neighbouring heads of x [B, N, O, ...] to `num_heads`: the transpose of :func:`_repeated`."""
    batch, seqlen, repeated, dim = x.shape
    group = repeated // num_heads if num_heads else 1
    return np.asarray(x.reshape(batch, seqlen, num_heads, group, dim).sum(axis=3))


def _full_decay(decay: ArrayLike, batch: int, seqlen: int, num_states: int, dtype: DTypeLike) -> Array:
    """Return a decay of any of its three shapes as [B, N, G, D or 1]."""
    g = np.asarray(decay).astype(dtype)
    if g.ndim < 4:
        g = g[..., None]
    return np.broadcast_to(g, (batch, seqlen, num_states, g.shape[-1]))


def _decayed(factor: Array, state: Array) -> Array:
    """Multiply a state by e^decay; a factor of 0 forgets it whatever it holds."""
    return np.where(factor == 0, state.dtype.type(0), factor * state)


def _walk(
    q: Array,
    k: Array,
    v: Array,
    causal: bool,
    feature_map: str | None,
    decay: ArrayLike | None,
    initial_state: Any,
    dtype: DTypeLike,
) -> _Walk:
    """Run the recurrence over all tokens."""
    batch, seqlen_k, num_states = *k.shape[:2], max(k.shape[2], v.shape[2])
    num_outputs = max(q.shape[2], num_states)
    queries = _repeated(mapped(q.astype(dtype), feature_map), num_outputs)
    keys = _repeated(mapped(k.astype(dtype), feature_map), num_states)
    values = _repeated(v.astype(dtype), num_states)
    log_factors = _full_decay(np.zeros(num_states) if decay is None else decay, batch, seqlen_k, num_states, dtype)
    factors = np.exp(log_factors)

    s = np.zeros((seqlen_k + 1, batch, num_states, k.shape[3], v.shape[3]), dtype)
    z = np.zeros(s.shape[:-1], dtype)
    if initial_state is not None:
        first_s, first_z = initial_state
        s[0] = np.asarray(first_s)
        if first_z is not None:
            z[0] = np.asarray(first_z)
    for t in range(seqlen_k):
        s[t + 1] = _decayed(factors[:, t, :, :, None], s[t]) + keys[:, t, :, :, None] * values[:, t, :, None, :]
        z[t + 1] = _decayed(factors[:, t], z[t]) + keys[:, t]
    seqlen_q = q.shape[1]
    reads = np.arange(1, seqlen_q + 1) if causal else np.full(seqlen_q, seqlen_k)
    of_output = np.arange(num_outputs) // max(1, num_outputs // max(1, num_states))
    return _Walk(queries, keys, values, factors, s, z, reads, of_output)


def _factor(scale: float | None, normalize: bool, head_dim: int) -> float:
    """Return the scale, by default 1 with normalisation and 1 / sqrt(D) without."""
    if scale is not None:
        return float(scale)
    return 1.0 if normalize else 1.0 / math.sqrt(max(1, head_dim))


def _denominators(walk: _Walk, t: int, factor: Any, eps: Any) -> tuple[Array, Array]:
    """Return scale q z + eps of query `t` [B, O, 1], with 1 where it is 0, and where it is not 0."""
    sums = np.einsum("bod,bod->bo", walk.queries[:, t], walk.z[walk.reads[t]][:, walk.of_output])
    below = (factor * sums + eps)[..., None]
    return np.where(below == 0, below.dtype.type(1), below), below != 0


def linear_attention(
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
    dtype: DTypeLike = np.float64,
) -> tuple[Array, LinearState]:
    """Linear attention: out [B, N, O, E] and the state after the last token.

    With q and k mapped by `feature_map`, for every token t, the present one included::

        S_t = diag(e^g_t) S_{t-1} + k_t (x) v_t          z_t = diag(e^g_t) z_{t-1} + k_t
        o_t = scale q_t S_t                              or, with normalize, scale q_t S_t / (scale q_t z_t + eps)

    A denominator of 0 gives 0. Without `causal` every query reads the state after the last key. `decay` (g) is [G],
    [B, N, G] or [B, N, G, D]; -inf forgets the past exactly. q [B, N, H, D], k [B, M, Gk, D], v [B, M, Gv, E]: there
    are G = max(Gk, Gv) states and O = max(H, G) outputs; output o reads query head ``o // (O // H)`` and state
    ``o // (O // G)``, state g reads key head ``g // (G // Gk)`` and value head ``g // (G // Gv)``.

    `initial_state` is a pair (s [B, G, D, E], z [B, G, D] or None).

    >>> one = np.ones((1, 3, 1, 1))
    >>> out, state = linear_attention(one, one, one, feature_map=None, normalize=False)
    >>> out.ravel().tolist(), state.s.item()
    ([1.0, 2.0, 3.0], 3.0)
    """
    q, k, v = (np.asarray(x) for x in (q, k, v))
    walk = _walk(q, k, v, causal, feature_map, decay, initial_state, dtype)
    real: Any = np.dtype(dtype).type
    factor = real(_factor(scale, normalize, q.shape[3]))
    out = np.zeros((*q.shape[:2], walk.queries.shape[2], v.shape[3]), dtype)
    for t, state in enumerate(walk.reads):
        above = factor * np.einsum("bod,bode->boe", walk.queries[:, t], walk.s[state][:, walk.of_output])
        if normalize:
            below, some = _denominators(walk, t, factor, real(eps))
            above = np.where(some, above / below, real(0))
        out[:, t] = above
    return out, LinearState(walk.s[-1], walk.z[-1] if normalize else None)


def linear_attention_summary(
    k: ArrayLike,
    v: ArrayLike,
    *,
    feature_map: str | None = "elu1",
    normalize: bool = True,
    decay: ArrayLike | None = None,
    dtype: DTypeLike = np.float64,
) -> tuple[Array, LinearState]:
    """What a segment does to a state: the sum of its decays [B, G] or [B, G, D], and its state from zero.

    The state after the segment is ``e^total S_before + S_from_zero``.

    >>> total, state = linear_attention_summary(np.ones((1, 3, 1, 1)), np.ones((1, 3, 1, 1)), decay=[-1.0])
    >>> total.tolist(), state.s.round(3).item()
    ([[-3.0]], 3.006)
    """
    k, v = np.asarray(k), np.asarray(v)
    queries = np.zeros((k.shape[0], 0, 1, k.shape[3]))
    walk = _walk(queries, k, v, True, feature_map, decay, None, dtype)
    batch, seqlen, num_states = walk.keys.shape[:3]
    given = np.zeros(num_states) if decay is None else np.asarray(decay)
    total = _full_decay(given, batch, seqlen, num_states, dtype).sum(axis=1)
    total = total if given.ndim == 4 else total[..., 0]
    return total, LinearState(walk.s[-1], walk.z[-1] if normalize else None)


def linear_attention_varlen(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    cu_seqlens: ArrayLike,
    *,
    decay: ArrayLike | None = None,
    initial_state: Any = None,
    dtype: DTypeLike = np.float64,
    **options: Any,
) -> tuple[Array, LinearState]:
    """Linear attention of packed sequences, one at a time: out [T, O, E] and the state of each sequence.

    `q` [T, H, D], `k` [T, Gk, D], `v` [T, Gv, E]; sequence b is ``q[cu_seqlens[b]:cu_seqlens[b + 1]]`` and so on.
    `decay` is [G], [T, G] or [T, G, D]; the states' batch counts the sequences. `options` are those of
    :func:`linear_attention`.
    """
    q, k, v = (np.asarray(x) for x in (q, k, v))
    starts = np.asarray(cu_seqlens, dtype=np.int64)
    num_states = max(k.shape[1], v.shape[1])
    num_sequences = len(starts) - 1
    out = np.zeros((q.shape[0], max(q.shape[1], num_states), v.shape[2]), dtype)
    s = np.zeros((num_sequences, num_states, k.shape[2], v.shape[2]), dtype)
    z = np.zeros(s.shape[:-1], dtype)
    for b in range(num_sequences):
        rows = slice(int(starts[b]), int(starts[b + 1]))
        own = decay if decay is None or np.ndim(decay) == 1 else np.asarray(decay)[None, rows]
        first = initial_state
        if first is not None:
            first = [None if x is None else np.asarray(x)[b : b + 1] for x in initial_state]
        arrays = (x[None, rows] for x in (q, k, v))
        of_sequence, state = linear_attention(*arrays, decay=own, initial_state=first, dtype=dtype, **options)
        out[rows], s[b] = of_sequence[0], state.s[0]
        if state.z is not None:
            z[b] = state.z[0]
    return out, LinearState(s, z if options.get("normalize", True) else None)


def linear_attention_backward(
    dout: ArrayLike,
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
    dstate: Any = None,
    dtype: DTypeLike = np.float64,
) -> LinearGradients:
    """Return the gradients of ``sum(dout * out) + sum(dstate.s * state.s) + sum(dstate.z * state.z)``.

    `out` and `state` are the results of :func:`linear_attention` with the same options. Let w be the denominator of a
    token, 1 without normalisation. The reverse recurrence, from the last token with dS = dstate on::

        da = scale dout / w           dw = -scale (dout o) / w with normalize, else 0
        dS_t += q_t (x) da            dz_t += dw q_t             dq_t = S_t da + dw z_t
        dk_t = dS_t v_t + dz_t        dv_t = k_t dS_t
        dg_t = rowsum(dS_t * e^g_t S_{t-1}) + dz_t * e^g_t z_{t-1}
        dS_{t-1} = e^g_t dS_t         dz_{t-1} = e^g_t dz_t

    then through the feature map, and summed to the shape of each input. What a denominator of 0 gives has no gradient.
    """
    dout, q, k, v = (np.asarray(x) for x in (dout, q, k, v))
    walk = _walk(q, k, v, causal, feature_map, decay, initial_state, dtype)
    real: Any = np.dtype(dtype).type
    factor = real(_factor(scale, normalize, q.shape[3]))
    dq, dk, dv = (np.zeros(x.shape, dtype) for x in (walk.queries, walk.keys, walk.values))
    dg = np.zeros_like(walk.factors)
    ds, dz = np.zeros(walk.s.shape, dtype), np.zeros(walk.z.shape, dtype)  # what each state gets from its readers
    if dstate is not None:
        last_s, last_z = dstate
        ds[-1] = np.asarray(last_s)
        if last_z is not None:
            dz[-1] = np.asarray(last_z)
    for t, state in enumerate(walk.reads):
        s, z = (x[state][:, walk.of_output] for x in (walk.s, walk.z))
        query, da = walk.queries[:, t], factor * dout[:, t].astype(dtype)
        dw = np.zeros((*da.shape[:2], 1), dtype)
        if normalize:
            below, some = _denominators(walk, t, factor, real(eps))
            da = np.where(some, da / below, real(0))
            dw = -factor * np.einsum("boe,bod,bode->bo", da, query, s)[..., None] / below
        dq[:, t] = np.einsum("bode,boe->bod", s, da) + dw * z
        for o, head in enumerate(walk.of_output):
            ds[state, :, head] += query[:, o, :, None] * da[:, o, None, :]
            dz[state, :, head] += dw[:, o] * query[:, o]
    for t in reversed(range(k.shape[1])):
        f = walk.factors[:, t]
        dk[:, t] = np.einsum("bgde,bge->bgd", ds[t + 1], walk.values[:, t]) + dz[t + 1]
        dv[:, t] = np.einsum("bgde,bgd->bge", ds[t + 1], walk.keys[:, t])
        of_channels = (ds[t + 1] * _decayed(f[..., None], walk.s[t])).sum(axis=-1) + dz[t + 1] * _decayed(f, walk.z[t])
        dg[:, t] = of_channels if f.shape[-1] > 1 else of_channels.sum(axis=-1, keepdims=True)
        ds[t] += _decayed(f[..., None], ds[t + 1])
        dz[t] += _decayed(f, dz[t + 1])
    return LinearGradients(
        _summed(dq, q.shape[2]) * feature_map_derivative(q.astype(dtype), feature_map),
        _summed(dk, k.shape[2]) * feature_map_derivative(k.astype(dtype), feature_map),
        _summed(dv, v.shape[2]),
        None if decay is None else _of_decay_shape(dg, np.ndim(decay)),
        None,
        None if initial_state is None else LinearState(ds[0], dz[0] if normalize else None),
    )


def _of_decay_shape(dg: Array, rank: int) -> Array:
    """Sum a gradient [B, N, G, D or 1] to the shape of a decay of `rank` axes."""
    if rank == 1:
        return np.asarray(dg.sum(axis=(0, 1, 3)))
    return dg if rank == 4 else dg[..., 0]
