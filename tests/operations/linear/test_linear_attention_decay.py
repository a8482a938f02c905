"""Decays of any magnitude: mild ones over many tokens, -60 a token, and -inf, which forgets."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from linear_calls import DTYPES, F16, F32, F64, decay_like, on, qkv, run, state_like

import cuattn
from cuattn.testing.linear_tolerance import assert_linear_close

CASES = [(dtype, "token") for dtype in DTYPES] + [(dtype, "channel") for dtype in (F16, F32, F64)]
INF = np.inf


def mixed_decay(rng, k, v, kind):
    """Decays of a channel or head from 0 to -1e30 beside each other, with resets at the edges of a chunk."""
    decay = decay_like(rng, k, v, kind, 0.2)
    strong = rng.choice(decay.size, decay.size // 12, replace=False)
    decay.reshape(-1)[strong] = rng.choice([0.0, -1e-6, -60.0, -103.0, -199.0, -201.0, -1e4, -1e30, -INF], strong.size)
    for token in (0, 63, 64, 90):
        decay[:, token] = -INF
    return decay


@pytest.mark.parametrize(("dtype", "kind"), CASES, ids=str)
def test_every_magnitude(executor, dtype, kind):
    rng = np.random.default_rng(0)
    q, k, v = qkv(rng, dtype, 97, dims=(32, 32))
    options = {"decay": mixed_decay(rng, k, v, kind), "initial_state": state_like(rng, k, v)}
    assert_linear_close(*run(executor, q, k, v, **options), q, k, v, **options)


@pytest.mark.parametrize(("dtype", "kind"), CASES, ids=str)
def test_sixty_a_token(executor, dtype, kind):
    """The sum over the sequence is -6000: e^-sum is no number of any dtype here."""
    rng = np.random.default_rng(1)
    q, k, v = qkv(rng, dtype, 100, dims=(32, 32), batch=1)
    decay = np.full_like(decay_like(rng, k, v, kind), -60.0)
    decay[:, 50:] = -1e-3
    out, state = run(executor, q, k, v, decay=decay)
    assert_linear_close(out, state, q, k, v, decay=decay)
    np.testing.assert_allclose(out[:, :50].astype(float), v[:, :50].astype(float), rtol=2e-2)  # a token sees itself


@pytest.mark.parametrize(("dtype", "kind"), CASES, ids=str)
@pytest.mark.parametrize("at", (0, 17, 64))
def test_a_reset_is_a_beginning(executor, dtype, kind, at):
    """Whatever the state was, infinity and NaN included: as if the sequence began there."""
    rng = np.random.default_rng(2)
    q, k, v = qkv(rng, dtype, at + 20, dims=(32, 32), batch=1)
    decay = decay_like(rng, k, v, kind)
    decay[:, at] = -INF
    initial = state_like(rng, k, v)
    initial.s[:, 0, ::3], initial.z[:, 1, 5], initial.s[:, 1, 4] = INF, np.nan, -INF
    out, state = run(executor, q, k, v, decay=decay, initial_state=initial)
    q, k, v, decay = (x[:, at:] for x in (q, k, v, decay))
    assert_linear_close(out[:, at:], state, q, k, v, decay=decay)
    decay = decay.copy()
    decay[:, 0] = 0  # the decay of the first token has nothing to work on
    assert_linear_close(out[:, at:], state, q, k, v, decay=decay)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constant_decays_over_many_tokens(executor, dtype):
    """As retention has them: a factor near 1 that is rounded once is wrong in the same direction every time."""
    rng = np.random.default_rng(3)
    q, k, v = qkv(rng, dtype, 400, (3, 3, 3), (32, 32), batch=1)
    decay = [float(np.log1p(-(2.0**-power))) for power in (3, 6, 10)]
    assert_linear_close(*run(executor, q, k, v, decay=decay), q, k, v, decay=decay)


@pytest.mark.parametrize("dtype", (F16, F64), ids=str)
@pytest.mark.parametrize("kind", ("head", "token"))
def test_dtypes_of_the_decay(executor, dtype, kind):
    rng = np.random.default_rng(4)
    q, k, v = qkv(rng, dtype, 70, dims=(32, 32), batch=1)
    exact = decay_like(rng, k, v, kind).astype(ml_dtypes.bfloat16)
    first = None
    for of in (ml_dtypes.bfloat16, np.float16, np.float32, np.float64):
        if executor.name == "cuda" and of is ml_dtypes.bfloat16:
            continue
        out, _ = run(executor, q, k, v, decay=exact.astype(np.float32).astype(of))
        if of is np.float32:
            first = out
            assert_linear_close(out, None, q, k, v, decay=exact.astype(np.float32))
        elif of is np.float64:
            np.testing.assert_array_equal(out, first)
    if kind == "head":
        for given in (exact.astype(float).tolist(), exact.astype(np.float32)):  # also beside arrays on a GPU
            out = cuattn.linear_attention(*(on(executor, x) for x in (q, k, v)), decay=given)
            np.testing.assert_array_equal(executor.numpy(out), first)


def test_positive_decays_grow(executor):
    rng = np.random.default_rng(5)
    for dtype in (F16, F32):
        q, k, v = qkv(rng, dtype, 40, dims=(32, 32), batch=1)
        decay = decay_like(rng, k, v, "token", -0.05)
        assert decay.max() > 0.1
        assert_linear_close(*run(executor, q, k, v, decay=decay), q, k, v, decay=decay)
