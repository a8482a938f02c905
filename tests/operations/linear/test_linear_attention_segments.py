"""Long sequences of few heads, computed in segments at once: what comes out is what comes out of them one by one."""

from __future__ import annotations

import numpy as np
import pytest
from linear_calls import BF16, F16, F32, decay_like, on, qkv, run, run_varlen, state_like

import cuattn
from cuattn import host
from cuattn.ops.linear import segments
from cuattn.ops.linear.arguments import check
from cuattn.ops.linear.config import select
from cuattn.testing.linear_tolerance import assert_linear_close, assert_linear_varlen_close

CASES = [(F16, None), (F16, "token"), (BF16, "token"), (F16, "channel")]


@pytest.fixture
def short_segments(monkeypatch):
    monkeypatch.setattr(segments, "SEGMENT", 64)
    monkeypatch.setattr(segments, "MIN_SEGMENTS", 2)


@pytest.mark.usefixtures("short_segments")
@pytest.mark.parametrize(("dtype", "kind"), CASES, ids=str)
@pytest.mark.parametrize("seqlen", (65, 128, 300))
def test_outputs_and_states(executor, dtype, kind, seqlen):
    rng = np.random.default_rng(seqlen)
    dims = {65: (32, 24), 128: (32, 32), 300: (24, 32)}[seqlen]
    q, k, v = qkv(rng, dtype, seqlen, (2, 1, 1), dims)
    decay = decay_like(rng, k, v, kind, 0.02)
    if kind == "token":
        decay[:, seqlen // 2, 0] = -np.inf
    for initial in (None, state_like(rng, k, v)):
        options = {"decay": decay, "initial_state": initial}
        assert_linear_close(*run(executor, q, k, v, **options), q, k, v, **options)


@pytest.mark.usefixtures("short_segments")
def test_without_z_and_in_place(executor):
    rng = np.random.default_rng(0)
    q, k, v = qkv(rng, F16, 200, (4, 2, 2), (64, 64))
    first = state_like(rng, k, v, normalize=False)
    options = {"normalize": False, "feature_map": None, "decay": decay_like(rng, k, v, "token")}
    state = on(executor, cuattn.LinearState(first.s.copy(), None))
    given = options | {"decay": on(executor, options["decay"])}
    arrays = (on(executor, x) for x in (q, k, v))
    out, last = cuattn.linear_attention(*arrays, initial_state=state, state_out=state, return_state=True, **given)
    assert last.s is state.s
    after = cuattn.LinearState(executor.numpy(state.s), None)
    assert_linear_close(executor.numpy(out), after, q, k, v, initial_state=first, **options)


@pytest.mark.usefixtures("short_segments")
def test_packed_sequences_of_different_lengths(executor):
    rng = np.random.default_rng(1)
    lengths = [0, 150, 3, 64, 260]
    starts = np.cumsum([0, *lengths])
    q, k, v = (x[0] for x in qkv(rng, F16, sum(lengths), (2, 1, 1), (32, 32), batch=1))
    options = {"decay": decay_like(rng, k, v, "token", 0.05), "initial_state": state_like(rng, k, v, batch=5)}
    assert_linear_varlen_close(*run_varlen(executor, q, k, v, starts, **options), q, k, v, starts, **options)


@pytest.mark.parametrize(
    ("dtype", "seqlen", "heads", "expected"),
    [(F16, 7 * 1024, 1, 1), (F16, 7 * 1024 + 1, 1, 8), (F16, 7 * 1024 + 1, 132, 1), (F32, 7 * 1024 + 1, 1, 1)],
)
def test_when(dtype, seqlen, heads, expected):
    """From eight segments on, where there are fewer CTAs than multiprocessors, and on tensor cores."""
    x = np.broadcast_to(np.ones((), dtype), (1, seqlen, heads, 32))
    problem = check(x, x, x, feature_map=None, normalize=True, eps=0.0, scale=None, chunk=None)
    row = select(dtype.name, 32, 32, 0, True, True, num_tokens=seqlen, smem_limit_bytes=163 * 1024)
    assert segments.count_segments(problem, row, seqlen) == expected
    assert segments.count_segments(problem, row, None) == 1


@pytest.mark.usefixtures("short_segments")
@pytest.mark.parametrize("kind", (None, "token", "channel"))
def test_states_alone(executor, kind):
    """Without causal, and of summaries: two launches make the state, in place or not."""
    rng = np.random.default_rng(2)
    q, k, v = qkv(rng, F16, 20, (2, 1, 1), (32, 32), seqlen_k=300)
    first = state_like(rng, k, v)
    if kind is None:
        options = {"causal": False, "initial_state": first}
        assert_linear_close(*run(executor, q, k, v, **options), q, k, v, **options)
        state = on(executor, cuattn.LinearState(*(x.copy() for x in first)))
        arrays = (on(executor, x) for x in (q, k, v))
        out = cuattn.linear_attention(*arrays, causal=False, initial_state=state, state_out=state)
        after = cuattn.LinearState(*(executor.numpy(x) for x in state))
        assert_linear_close(executor.numpy(out), after, q, k, v, **options)
    decay = decay_like(rng, k, v, kind, 0.02)
    given = None if decay is None else on(executor, decay)
    _, state = cuattn.linear_attention_summary(on(executor, k), on(executor, v), decay=given)
    after = cuattn.LinearState(*(executor.numpy(x) for x in state))
    assert_linear_close(None, after, k, k, v, decay=decay)


def test_launches():
    """The segments, the scan, and the outputs."""
    x = np.ones((1, 7 * 1024 + 1, 1, 32), F16)
    for causal, expected in ((True, 3), (False, 3)):
        with host.check(), host.profile() as profile:
            cuattn.linear_attention(x, x, x, causal=causal)
        assert profile.launches == expected
