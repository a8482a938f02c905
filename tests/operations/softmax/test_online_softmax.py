"""OnlineSoftmax: any cutting of a row into pieces gives what one shot gives."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cuattn
from cuattn import errors, reference
from cuattn.ops.softmax import online as online_softmax
from cuattn.ops.softmax.config import SPLIT, SPLIT_LANES, STREAM, STREAM_LANES, STREAM_SHORT
from cuattn.testing import assert_softmax_close
from cuattn.testing.arrays import Layout, place
from cuattn.testing.strategies import examples, fill

DTYPES = (np.dtype(np.float32), np.dtype(np.float64))


def pieces_of(x, cuts):
    edges = [0, *sorted(cuts), x.shape[-1]]
    return [x[..., a:b] for a, b in pairwise(edges)]


def state_of(executor, pieces, *, shape=None, dtype=None):
    state = cuattn.OnlineSoftmax(pieces[0].shape[:-1] if shape is None else shape, pieces[0].dtype)
    for piece in pieces:
        state.update(executor.array(np.ascontiguousarray(piece)))
    return state


@st.composite
def cut_rows(draw, dtype=None):
    """Rows [*shape, n] and where to cut them; pieces may be empty."""
    dtype = draw(st.sampled_from(DTYPES)) if dtype is None else dtype
    shape = draw(st.sampled_from([(1,), (3,), (2, 3), ()]))
    num_cols = draw(st.sampled_from((1, 2, 31, 33, 129, 300)))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    x = fill((*shape, num_cols), dtype, draw(st.sampled_from(("normal", "huge_logit", "wide"))), rng)
    if draw(st.booleans()):
        x[rng.random(x.shape) < 0.3] = -np.inf
        x[..., : num_cols // 2] = -np.inf  # whole pieces without anything
    return x, draw(st.lists(st.integers(0, num_cols), max_size=4))


@examples(25)
@given(case=cut_rows())
def test_any_chunking_equals_one_shot(executor, case):
    x, cuts = case
    pieces = pieces_of(x, cuts)
    state = state_of(executor, pieces)
    lse = executor.numpy(state.logsumexp())
    assert_softmax_close(lse, x, -1, "logsumexp")
    p = np.concatenate([executor.numpy(state.probabilities(executor.array(piece.copy()))) for piece in pieces], axis=-1)
    assert_softmax_close(p, x)


@examples(15)
@given(case=cut_rows(dtype=DTYPES[0]), data=st.data())
def test_merge_is_associative_and_commutative(executor, case, data):
    x, _ = case
    cuts = [data.draw(st.integers(0, x.shape[-1])) for _ in range(2)]
    parts = [state_of(executor, [piece]) for piece in pieces_of(x, cuts)]
    numbers = [int(i) for i in data.draw(st.permutations(range(3)))]

    def merged(*states):
        first, *others = (copy.deepcopy(state) for state in states)
        for other in others:
            first.merge(other)
        return first

    a, b, c = (parts[i] for i in numbers)
    left, right = merged(merged(a, b), c), merged(a, merged(b, c))
    for state in (left, right):
        assert_softmax_close(executor.numpy(state.logsumexp()), x, -1, "logsumexp")
    ab, ba = merged(a, b), merged(b, a)
    for name in ("row_max", "row_sum"):  # bit for bit
        np.testing.assert_array_equal(executor.numpy(getattr(ab, name)), executor.numpy(getattr(ba, name)))


def test_two_updates_of_a_batch(executor):
    """Defect 3: ``if sum_exp > 0`` on an array. Some rows have seen something, others have not."""
    first = np.array([[-np.inf, -np.inf], [0, 1], [5, -np.inf]], np.float32)
    second = np.array([[1, 2], [-np.inf, -np.inf], [7, 100]], np.float32)
    state = state_of(executor, [first, second])
    both = np.concatenate([first, second], axis=1)
    assert_softmax_close(executor.numpy(state.logsumexp()), both, -1, "logsumexp")
    assert_softmax_close(executor.numpy(state.probabilities(executor.array(both))), both)


def test_the_state_is_maximum_and_sum(executor):
    state = state_of(executor, [np.array([[0, 1]], np.float32), np.array([[3, 2]], np.float32)])
    assert executor.numpy(state.row_max) == 3
    np.testing.assert_allclose(executor.numpy(state.row_sum), np.exp([-3.0, -2, 0, -1]).sum(), rtol=1e-6)


def test_a_growing_maximum_rescales_and_never_overflows(executor):
    state = cuattn.OnlineSoftmax((2,), np.float32)
    x = np.arange(-1000, 1000, 50, dtype=np.float32)
    for value in x:
        state.update(executor.array(np.array([[value], [-value]])))
    lse = executor.numpy(state.logsumexp())
    np.testing.assert_allclose(lse, reference.logsumexp(np.stack([x, -x])), rtol=1e-6)


def test_long_pieces_take_several_ctas(executor):
    x = np.random.default_rng(0).standard_normal((1, 50_000)).astype(ml_dtypes.bfloat16)
    state = state_of(executor, pieces_of(x, [33_000]))
    assert_softmax_close(executor.numpy(state.logsumexp()), x, -1, "logsumexp")
    assert_softmax_close(executor.numpy(state.probabilities(executor.array(x))), x)


def test_strided_pieces(executor):
    """Rows that lie side by side in memory, and rows in a padded buffer."""
    values = np.random.default_rng(0).standard_normal((2, 40, 30)).astype(np.float32)
    for layout in (Layout(order=(0, 2, 1)), Layout(order=(2, 1, 0), pad=(1, 3, 2), offset=1)):
        state = cuattn.OnlineSoftmax((2, 40), np.float32)
        x = executor.array(place(values, layout))
        state.update(x)
        assert_softmax_close(executor.numpy(state.logsumexp()), values, -1, "logsumexp")
        assert_softmax_close(executor.numpy(state.probabilities(x)), values)


def test_infinities(executor):
    state = state_of(executor, [np.array([[0], [np.inf], [np.nan]], np.float32), np.ones((3, 1), np.float32)])
    lse = executor.numpy(state.logsumexp())
    np.testing.assert_array_equal(np.isnan(lse), [False, True, True])


@pytest.mark.parametrize("array_module", [True, False])
def test_nothing_seen(executor, array_module):
    state = cuattn.OnlineSoftmax((2,), np.float16, array_module=executor.xp if array_module else None)
    if array_module:
        assert isinstance(state.logsumexp(), executor.xp.ndarray)
        np.testing.assert_array_equal(executor.numpy(state.logsumexp()), [-np.inf] * 2)
        p = state.probabilities(executor.array(np.full((2, 3), -np.inf, np.float16)))
        np.testing.assert_array_equal(executor.numpy(p), 0)
    else:
        for use in (state.logsumexp, lambda: state.row_max, lambda: state.probabilities(np.zeros((2, 1), np.float16))):
            with pytest.raises(errors.ArgumentError, match="array_module"):
                use()


def test_empty_pieces_and_shapes(executor):
    state = cuattn.OnlineSoftmax((2,), np.float32)
    state.merge(cuattn.OnlineSoftmax((2,), np.float32))  # neither has seen an array
    state.update(executor.array(np.zeros((2, 0), np.float32)))
    np.testing.assert_array_equal(executor.numpy(state.logsumexp()), [-np.inf] * 2)
    assert state.probabilities(executor.array(np.zeros((2, 0), np.float32))).shape == (2, 0)
    state = cuattn.OnlineSoftmax((0, 3), np.float32)
    state.update(executor.array(np.zeros((0, 3, 5), np.float32)))
    state.merge(state)
    assert state.logsumexp().shape == (0, 3)


def test_merge_into_a_fresh_state_and_into_itself(executor):
    x = np.random.default_rng(0).standard_normal((2, 9)).astype(np.float32)
    state, fresh = state_of(executor, [x]), cuattn.OnlineSoftmax(2, np.float32)
    fresh.merge(state)
    np.testing.assert_array_equal(executor.numpy(fresh.logsumexp()), executor.numpy(state.logsumexp()))
    fresh.merge(fresh)
    assert_softmax_close(executor.numpy(fresh.logsumexp()), np.concatenate([x, x], axis=1), -1, "logsumexp")
    assert_softmax_close(executor.numpy(state.logsumexp()), x, -1, "logsumexp")  # the other state stays as it was


def test_bad_arguments(executor):
    with pytest.raises(errors.ShapeError, match="-1"):
        cuattn.OnlineSoftmax((-1,), np.float32)
    with pytest.raises(errors.ShapeError, match="2147483648"):
        cuattn.OnlineSoftmax(2**31, np.float32)
    with pytest.raises(errors.ShapeError, match="integer"):
        cuattn.OnlineSoftmax(1.5, np.float32)
    for dtype in (np.int32, "nonsense"):
        with pytest.raises(errors.DTypeError):
            cuattn.OnlineSoftmax((1,), dtype)
    with pytest.raises(errors.ArrayTypeError, match="numpy and cupy"):
        cuattn.OnlineSoftmax((1,), np.float32, array_module=ml_dtypes)

    state = cuattn.OnlineSoftmax((2,), np.float32, array_module=executor.xp)
    for use in (state.update, state.probabilities):
        for shape in ((3, 4), (2,), (2, 1, 4), ()):
            with pytest.raises(errors.ShapeError, match="x"):
                use(executor.array(np.zeros(shape, np.float32)))
        with pytest.raises(errors.DTypeError, match=r"float16.*float32"):
            use(executor.array(np.zeros((2, 4), np.float16)))
        with pytest.raises(errors.ArrayTypeError, match="x"):
            use([[1.0], [2.0]])
    with pytest.raises(errors.ShapeError):
        state.merge(cuattn.OnlineSoftmax((3,), np.float32))
    with pytest.raises(errors.DTypeError):
        state.merge(cuattn.OnlineSoftmax((2,), np.float16))
    with pytest.raises(errors.ArrayTypeError):
        state.merge(np.zeros(2, np.float32))
    np.testing.assert_array_equal(executor.numpy(state.logsumexp()), [-np.inf] * 2)


@pytest.mark.parametrize("config", [STREAM, STREAM_LANES, STREAM_SHORT], ids=["cta", "lanes", "warp"])
def test_one_cta_takes_many_row_groups_of_a_state(executor, monkeypatch, config):
    """`OnlineSoftmax` where rows outnumber what the grid takes at once."""
    config = replace(config, max_ctas=1)
    monkeypatch.setattr(online_softmax, "select_streaming", lambda **problem: config)
    monkeypatch.setattr(online_softmax, "STREAM_SHORT", replace(STREAM_SHORT, max_ctas=1))
    rows = 3 * config.rows_per_cta + 1
    x = np.random.default_rng(1).standard_normal((70, rows)).astype(np.float32).T * 3
    if not config.lanes_span_rows:
        x = np.ascontiguousarray(x)
    state, other = (cuattn.OnlineSoftmax((rows,), np.float32) for _ in range(2))
    state.update(executor.array(x[:, :40]))
    other.update(executor.array(x[:, 40:]))
    state.merge(other)
    assert_softmax_close(executor.numpy(state.logsumexp()), x, -1, "logsumexp")
    assert_softmax_close(executor.numpy(state.probabilities(executor.array(x))), x)


@pytest.mark.parametrize("config", [SPLIT, SPLIT_LANES], ids=["columns", "rows"])
def test_a_piece_in_more_chunks_than_threads_of_a_row(executor, monkeypatch, config):
    """Their states are merged into that of the row by one warp, each lane taking several."""
    config = replace(config, min_chunk_cols=16)
    monkeypatch.setattr(online_softmax, "select_streaming", lambda **problem: config)
    num_cols = 16 * (2 * STREAM_SHORT.threads_per_row + 3)
    x = np.random.default_rng(2).standard_normal((num_cols, 9)).astype(np.float32).T * 3
    if not config.lanes_span_rows:
        x = np.ascontiguousarray(x)
    state = cuattn.OnlineSoftmax((9,), np.float32)
    state.update(executor.array(x))
    assert_softmax_close(executor.numpy(state.logsumexp()), x, -1, "logsumexp")
