"""The rule for linear attention lets chunked computations of every precision pass, and finds small mistakes."""

from __future__ import annotations

import numpy as np
import pytest
from linear_calls import BF16, DTYPES, F16, F32, decay_like, qkv, state_like

from cuattn.testing import linear_tolerance
from cuattn.testing.linear_tolerance import assert_linear_close, assert_linear_varlen_close, linear_naive
from cuattn.testing.tolerance import ToleranceError

KINDS = (None, "head", "token", "channel")


def problem(seed, dtype, kind, seqlen=40):
    rng = np.random.default_rng(seed)
    q, k, v = qkv(rng, dtype, seqlen, (2, 1, 1), (8, 5), batch=1)
    options = {"decay": decay_like(rng, k, v, kind), "initial_state": state_like(rng, k, v)}
    return q, k, v, options | {"feature_map": ("elu1", "relu", "square")[seed % 3], "eps": 1e-3}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_of_any_length_pass(monkeypatch, dtype, kind):
    for seed in range(12):
        q, k, v, options = problem(seed, dtype, kind)
        monkeypatch.setattr(linear_tolerance, "CHUNK", (1, 4, 16, 32)[seed % 4])
        out, state = linear_naive(q, k, v, **options)
        monkeypatch.undo()
        assert_linear_close(out.astype(dtype), state, q, k, v, **options)


def lost_token(q, k, v, options):
    v = v.copy()
    v[:, 20] = 0
    return linear_naive(q, k, v, **options)


def late_decay(q, k, v, options):
    return linear_naive(q, k, v, **options | {"decay": np.roll(options["decay"], 1, axis=1)})


def lost_state(q, k, v, options):
    return linear_naive(q, k, v, **options | {"initial_state": None})


def wrong_map(q, k, v, options):
    return linear_naive(q, k, v, **options | {"feature_map": None})


def own_token_unseen(q, k, v, options):
    out, state = linear_naive(q, k, v, **options)
    return np.roll(out, 1, axis=1), state


def swapped_heads(q, k, v, options):
    out, state = linear_naive(q[:, :, ::-1], k, v, **options)
    return out, state


MISTAKES = (lost_token, late_decay, lost_state, wrong_map, own_token_unseen, swapped_heads)


@pytest.mark.parametrize("dtype", (F16, BF16, F32), ids=str)
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_mistakes_do_not(dtype, mistake):
    for seed in range(6):
        q, k, v, options = problem(seed, dtype, "token")
        out, state = mistake(q, k, v, options)
        with pytest.raises(ToleranceError):
            assert_linear_close(out.astype(dtype), state, q, k, v, **options)


def test_a_state_that_is_slightly_off_is_found():
    q, k, v, options = problem(0, F16, "token")
    out, state = linear_naive(q, k, v, **options)
    for part in (0, 1):
        wrong = [x.copy() for x in state]
        wrong[part].reshape(-1)[3] += 0.01 * np.abs(state[part]).max()
        with pytest.raises(ToleranceError, match=f"state.{'sz'[part]}"):
            assert_linear_close(out.astype(F16), wrong, q, k, v, **options)


def test_nothing_passes_for_a_number():
    """0, NaN and infinity where the reference is finite."""
    q, k, v, options = problem(0, F16, None)
    out, _ = linear_naive(q, k, v, **options)
    for value in (0.0, np.nan, np.inf):
        wrong = out.astype(F16)
        wrong[0, 7, 0, np.argmax(np.abs(wrong[0, 7, 0]))] = value
        with pytest.raises(ToleranceError):
            assert_linear_close(wrong, None, q, k, v, **options)


def test_packed_sequences_are_judged_one_by_one():
    rng = np.random.default_rng(0)
    q, k, v = (x[0] for x in qkv(rng, F32, 30, (2, 1, 1), (8, 5), batch=1))
    parts = [linear_naive(*(x[None, rows] for x in (q, k, v)))[0][0] for rows in (slice(0, 11), slice(11, 30))]
    out = np.concatenate(parts).astype(F32)
    assert_linear_varlen_close(out, None, q, k, v, [0, 11, 11, 30])
    with pytest.raises(ToleranceError):
        assert_linear_varlen_close(out, None, q, k, v, [0, 10, 30])
