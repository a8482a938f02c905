"""States: a sequence in any parts, decoding, memory that is used again, summaries."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from linear_calls import DTYPES, F16, F32, F64, decay_like, fetched, on, qkv, run, state_like

import cuattn
from cuattn import reference
from cuattn.testing.arrays import Layout, place
from cuattn.testing.linear_tolerance import assert_linear_close
from cuattn.testing.strategies import examples

CASES = [(F16, "token"), (F16, "channel"), (F32, "token"), (F32, None), (F64, "channel")]


@pytest.mark.parametrize(("dtype", "kind"), CASES, ids=str)
def test_any_parts_of_a_sequence(executor, dtype, kind):
    @examples(6)
    @given(cuts=st.lists(st.integers(0, 150), max_size=4).map(sorted))
    def check(cuts):
        rng = np.random.default_rng(0)
        q, k, v = qkv(rng, dtype, 150, (2, 1, 1), (32, 32), batch=1)
        decay = decay_like(rng, k, v, kind)
        state, outs = None, []
        for start, end in zip([0, *cuts], [*cuts, 150], strict=True):
            part = slice(start, end)
            of_part = None if decay is None else decay[:, part]
            out, state = run(executor, *(x[:, part] for x in (q, k, v)), decay=of_part, initial_state=state)
            outs.append(out)
        assert_linear_close(np.concatenate(outs, axis=1), state, q, k, v, decay=decay, factor=1.0 + 0.25 * len(cuts))

    check()


@pytest.mark.parametrize(("dtype", "kind"), CASES, ids=str)
def test_token_by_token(executor, dtype, kind):
    """Decoding, the state in place."""
    rng = np.random.default_rng(1)
    q, k, v = qkv(rng, dtype, 9, (4, 2, 2), (32, 70))
    decay = decay_like(rng, k, v, kind)
    first = state_like(rng, k, v)
    state = on(executor, cuattn.LinearState(*(x.copy() for x in first)))
    outs = []
    for t in range(9):
        token = slice(t, t + 1)
        of_token = None if decay is None else on(executor, decay[:, token])
        arrays = (on(executor, x[:, token]) for x in (q, k, v))
        outs.append(cuattn.linear_attention(*arrays, decay=of_token, initial_state=state, state_out=state))
    out = np.concatenate([executor.numpy(x) for x in outs], axis=1)
    after = cuattn.LinearState(*(executor.numpy(x) for x in state))
    assert_linear_close(out, after, q, k, v, decay=decay, initial_state=first, factor=2.0)


@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
def test_in_place_is_what_elsewhere_is(executor, dtype):
    """Also where several CTAs read what one of them writes: more heads than a CTA takes, several slices of columns."""
    rng = np.random.default_rng(2)
    for seqlen in (1, 40):
        q, k, v = qkv(rng, dtype, seqlen, (11, 1, 1), (32, 70))
        arrays = [on(executor, x) for x in (q, k, v)]
        first = state_like(rng, k, v)
        out, state = fetched(
            executor, cuattn.linear_attention(*arrays, initial_state=on(executor, first), return_state=True)
        )
        inplace = on(executor, first)
        result, same = cuattn.linear_attention(*arrays, initial_state=inplace, state_out=inplace, return_state=True)
        assert same.s is inplace.s and same.z is inplace.z
        for x, y in zip((out, *state), (result, *same), strict=True):
            np.testing.assert_array_equal(x, executor.numpy(y))


def test_sums_of_keys_are_not_rounded(executor):
    """Those of a state have 22 bits in half precision: 2048 / 2048.99 is not 1."""
    ones = np.ones((1, 20, 1, 32), F16)
    initial = cuattn.LinearState(np.full((1, 1, 32, 32), 2048, F32), np.full((1, 1, 32), 2048.99, F32))
    options = {"feature_map": None, "decay": np.zeros((1, 20, 1)), "initial_state": initial}
    out, _ = run(executor, ones, 0 * ones, ones, **options)
    np.testing.assert_array_equal(out, F16.type(2048 / 2048.99))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", (True, False))
def test_no_tokens(executor, dtype, normalize):
    """The state is returned as it is."""
    rng = np.random.default_rng(3)
    q, k, v = qkv(rng, dtype, 0, (2, 1, 1), (32, 32))
    first = state_like(rng, k, v, normalize=normalize)
    for causal in (True, False):
        out, state = run(executor, q, k, v, normalize=normalize, causal=causal, initial_state=first)
        assert out.shape == (2, 0, 2, 32) and (state.z is None) == (not normalize)
        np.testing.assert_array_equal(state.s, first.s)
        if normalize:
            np.testing.assert_array_equal(state.z, first.z)


@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
def test_states_that_lie_anywhere(executor, dtype):
    rng = np.random.default_rng(4)
    q, k, v = qkv(rng, dtype, 20, (2, 1, 1), (32, 32))
    first = state_like(rng, k, v)
    layouts = Layout(order=(0, 1, 3, 2), pad=(0, 1, 2, 1), offset=1), Layout(order=(2, 0, 1), pad=(1, 0, 1))
    given_state = tuple(executor.array(place(x, layout)) for x, layout in zip(first, layouts, strict=True))
    target = tuple(executor.guarded(x.shape, x.dtype, layout) for x, layout in zip(first, layouts, strict=True))
    arrays = [on(executor, x) for x in (q, k, v)]
    out = cuattn.linear_attention(*arrays, initial_state=given_state, state_out=tuple(x.array for x in target))
    for x in target:
        x.check()
    state = cuattn.LinearState(*(executor.numpy(x.array) for x in target))
    assert_linear_close(executor.numpy(out), state, q, k, v, initial_state=first)


@pytest.mark.parametrize("dtype", (F16, F32, F64), ids=str)
@pytest.mark.parametrize("kind", (None, "head", "token", "channel"))
def test_summaries_compose(executor, dtype, kind):
    """Those of three segments, in either grouping, are that of the whole; and they carry a state across."""
    rng = np.random.default_rng(5)
    _, k, v = qkv(rng, dtype, 90, dims=(32, 32))
    decay = decay_like(rng, k, v, kind)
    whole = _summary(executor, k, v, decay)
    expected, expected_state = reference.linear_attention_summary(k, v, decay=decay)
    np.testing.assert_allclose(whole[0], expected, rtol=1e-5, atol=1e-6)
    assert_linear_close(None, whole[1], k[:, :, :1], k, v, decay=decay)
    parts = []
    for start, end in ((0, 20), (20, 21), (21, 90)):
        of_part = decay if kind in (None, "head") else decay[:, start:end]
        parts.append(_summary(executor, k[:, start:end], v[:, start:end], of_part))
    a, b, c = parts
    tolerance = 2e-2 if dtype == F16 else 1e-4
    for total, (s, z) in (_composed(_composed(a, b), c), _composed(a, _composed(b, c))):
        np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(s, expected_state.s, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(z, expected_state.z, rtol=tolerance, atol=tolerance)


def _summary(executor, k, v, decay):
    total, state = cuattn.linear_attention_summary(
        on(executor, k), on(executor, v), decay=None if decay is None else on(executor, decay)
    )
    return executor.numpy(total), cuattn.LinearState(executor.numpy(state.s), executor.numpy(state.z))


def _composed(first, second):
    """The summary of two segments, one behind the other."""
    factor = np.exp(second[0])
    wide = factor if factor.ndim == 3 else factor[..., None]
    s, z = wide[..., None] * first[1].s + second[1].s, wide * first[1].z + second[1].z
    return first[0] + second[0], cuattn.LinearState(s, z)


def test_total_decay_of_nothing_is_nothing(executor):
    empty = executor.xp.zeros((2, 0, 3, 16), np.float32)
    for decay in (None, [-np.inf, -1.0, 0.0]):
        total, state = cuattn.linear_attention_summary(empty, empty, decay=decay, normalize=False)
        assert executor.numpy(total).tolist() == [[0.0] * 3] * 2 and state.z is None
        assert not executor.numpy(state.s).any()
