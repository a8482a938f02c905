"""The oracle of linear attention: against differences, against attention's own definition, and against itself."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from differences import by_differences

from cuattn import reference

BATCH, SEQLEN, HEAD_DIM, HEAD_DIM_V = 2, 4, 2, 3
#: (H, Gk, Gv): one each; grouped queries; more value heads than key heads; fewer; fewer query heads than states.
HEADS = {"mha": (2, 2, 2), "gqa": (4, 2, 2), "gva": (2, 1, 2), "mqv": (4, 2, 1), "few_queries": (1, 1, 3)}
MAPS = ["elu1", "relu", "square", None]


def _arrays(rng, heads, seqlen_k=SEQLEN, positive=False):
    """q, k, v of a small problem; q and k lie off the kinks of maps at 0, and `positive` ones have denominators."""
    num_heads, num_key_heads, num_value_heads = heads
    q = rng.standard_normal((BATCH, SEQLEN, num_heads, HEAD_DIM))
    k = rng.standard_normal((BATCH, seqlen_k, num_key_heads, HEAD_DIM))
    v = rng.standard_normal((BATCH, seqlen_k, num_value_heads, HEAD_DIM_V))
    if positive:
        return np.abs(q) + 0.5, np.abs(k) + 0.5, v
    return q + 0.01 * np.sign(q), k + 0.01 * np.sign(k), v


def _decay(rng, rank, num_states):
    shapes = {1: (num_states,), 3: (BATCH, SEQLEN, num_states), 4: (BATCH, SEQLEN, num_states, HEAD_DIM)}
    return -rng.random(shapes[rank])


def _state(rng, num_states, normalize):
    s = rng.standard_normal((BATCH, num_states, HEAD_DIM, HEAD_DIM_V))
    return s, rng.random((BATCH, num_states, HEAD_DIM)) + 0.5 if normalize else None


def _cases():
    """All heads with all ranks of a decay; every map and every rank normalised and not."""
    for (number, name), (step, rank) in itertools.product(enumerate(HEADS), enumerate((0, 1, 3, 4))):
        normalize, feature_map = bool((number + step) % 2), MAPS[(number // 2 + step) % 4]
        yield pytest.param(HEADS[name], rank, normalize, feature_map, id=f"{name}-{rank}-{normalize}-{feature_map}")


@pytest.mark.parametrize(("heads", "rank", "normalize", "feature_map"), list(_cases()))
def test_central_differences(heads, rank, normalize, feature_map):
    """Every gradient, by elements: q, k, v, the decay and the initial state, with gradients of out and of the state."""
    rng = np.random.default_rng(7 * rank + normalize)
    num_states = max(heads[1:])
    arrays = list(_arrays(rng, heads, positive=normalize))
    causal = rank > 0
    if rank:
        arrays.append(_decay(rng, rank, num_states))
    first = len(arrays)
    arrays += [x for x in _state(rng, num_states, normalize) if x is not None]
    dout = rng.standard_normal((BATCH, SEQLEN, max(heads), HEAD_DIM_V))
    dstate = _state(rng, num_states, normalize)
    options = {"causal": causal, "feature_map": feature_map, "normalize": normalize, "scale": 0.7, "eps": 0.25}

    def of_call(decay_and_state):
        decay = decay_and_state[0] if rank else None
        state = tuple(decay_and_state[1 if rank else 0 :])
        return options | {"decay": decay, "initial_state": state if normalize else (*state, None)}

    def scalar(q, k, v, *others):
        out, state = reference.linear_attention(q, k, v, dtype=np.longdouble, **of_call(others))
        of_z = (state.z * dstate[1]).sum() if normalize else 0
        return (out * dout).sum() + (state.s * dstate[0]).sum() + of_z

    grads = reference.linear_attention_backward(dout, *arrays[:3], dstate=dstate, **of_call(arrays[3:]))
    found = [grads.dq, grads.dk, grads.dv, *([grads.ddecay] if rank else []), *grads.dinitial_state]
    expected = by_differences(scalar, arrays)
    assert len(arrays) == first + 1 + normalize
    for number, want in enumerate(expected):
        np.testing.assert_allclose(found[number], want, rtol=0, atol=1e-12, err_msg=str(number))
    assert (grads.ddecay is None) == (not rank) and grads.dbeta is None


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("normalize", [True, False])
def test_equals_a_product_with_a_mask(feature_map, normalize, causal):
    """Without decay, linear attention is ``(mapped(Q) mapped(K)^T masked) V``, rows divided by their sums."""
    rng = np.random.default_rng(3)
    q, k, v = _arrays(rng, (2, 2, 2), positive=True)
    out, _ = reference.linear_attention(q, k, v, causal=causal, feature_map=feature_map, normalize=normalize)
    maps = {"elu1": lambda x: x + 1, "relu": lambda x: x, "square": np.square, None: lambda x: x}  # of x > 0
    rows, columns = (maps[feature_map](x).swapaxes(1, 2) for x in (q, k))
    products = rows @ columns.swapaxes(-1, -2) * (np.tri(SEQLEN) if causal else 1)
    products = products / products.sum(axis=-1, keepdims=True) if normalize else products / np.sqrt(HEAD_DIM)
    np.testing.assert_allclose(out, (products @ v.swapaxes(1, 2)).swapaxes(1, 2), rtol=1e-13)


@pytest.mark.parametrize("rank", [1, 3, 4])
@pytest.mark.parametrize("cut", range(SEQLEN + 1))
def test_a_cut_anywhere_changes_nothing(rank, cut):
    """Two parts joined by the state, and by what the second does to a state."""
    rng = np.random.default_rng(rank)
    q, k, v = _arrays(rng, HEADS["gva"])
    decay, first = _decay(rng, rank, 2), _state(rng, 2, True)
    out, last = reference.linear_attention(q, k, v, decay=decay, initial_state=first)
    parts, state = [], first
    for rows in (slice(cut), slice(cut, None)):
        own = decay if rank == 1 else decay[:, rows]
        before = state
        part, state = reference.linear_attention(*(x[:, rows] for x in (q, k, v)), decay=own, initial_state=before)
        parts.append(part)
        total, added = reference.linear_attention_summary(k[:, rows], v[:, rows], decay=own)
        factor = np.exp(total).reshape(BATCH, 2, -1)
        np.testing.assert_allclose(state.s, factor[..., None] * before[0] + added.s, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(state.z, factor * before[1] + added.z, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), out, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(state.s, last.s, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_reset_is_a_new_beginning(rank, normalize):
    """After a decay of -inf nothing of the past is left, and nothing comes back to it; an infinite state neither."""
    rng = np.random.default_rng(5)
    q, k, v = _arrays(rng, HEADS["gqa"])
    decay, dout = _decay(rng, rank, 2), rng.standard_normal((BATCH, SEQLEN, 4, HEAD_DIM_V))
    decay[:, 2] = -np.inf
    state = tuple(np.full_like(x, 1e300) for x in _state(rng, 2, True))
    options = {"normalize": normalize}
    out, last = reference.linear_attention(q, k, v, decay=decay, initial_state=state, **options)
    tail = [x[:, 2:] for x in (q, k, v)]
    own = decay[:, 2:].copy()
    own[:, 0] = -3  # any: the state is 0
    want, of_tail = reference.linear_attention(*tail, decay=own, **options)
    np.testing.assert_array_equal(out[:, 2:], want)
    np.testing.assert_array_equal(last.s, of_tail.s)
    grads = reference.linear_attention_backward(dout, q, k, v, decay=decay, **options)
    of_grads = reference.linear_attention_backward(dout[:, 2:], *tail, decay=own, **options)
    np.testing.assert_array_equal(grads.dk[:, 2:], of_grads.dk)
    np.testing.assert_array_equal(grads.ddecay[:, 3:], of_grads.ddecay[:, 1:])
    assert not grads.ddecay[:, 2].any()


def test_sequences_of_their_own():
    """Packed sequences, an empty one and one token among them, are each one call."""
    rng = np.random.default_rng(9)
    starts = np.array([0, 3, 3, 4, 8])
    q, k, v = (np.concatenate(list(x)) for x in _arrays(rng, HEADS["mqv"]))
    decay = -rng.random((8, 2))
    first = rng.standard_normal((4, 2, HEAD_DIM, HEAD_DIM_V)), rng.random((4, 2, HEAD_DIM))
    out, state = reference.linear_attention_varlen(q, k, v, starts, decay=decay, initial_state=first)
    for b, (start, end) in enumerate(itertools.pairwise(starts)):
        rows, own = slice(start, end), tuple(x[b : b + 1] for x in first)
        want, last = reference.linear_attention(
            *(x[None, rows] for x in (q, k, v)), decay=decay[None, rows], initial_state=own
        )
        np.testing.assert_array_equal(out[rows], want[0])
        np.testing.assert_array_equal(state.s[b], last.s[0])
        np.testing.assert_array_equal(state.z[b], last.z[0])
    np.testing.assert_array_equal(state.s[1], first[0][1])


def test_nothing_divided_by_nothing():
    """Rows whose denominator is 0 are 0 and have no gradient."""
    rng = np.random.default_rng(2)
    q, k, v = _arrays(rng, HEADS["mha"])
    q[:, 1] = -1  # relu makes it 0
    dout = rng.standard_normal(v.shape)
    out, _ = reference.linear_attention(q, k, v, feature_map="relu")
    grads = reference.linear_attention_backward(dout, q, k, v, feature_map="relu")
    assert not out[:, 1].any() and not grads.dq[:, 1].any()
    assert all(np.isfinite(x).all() for x in (out, grads.dq, grads.dk, grads.dv))
