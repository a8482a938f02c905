"""Packed sequences: each by itself, whatever the others hold."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from linear_calls import F16, F32, decay_like, on, qkv, run_varlen, state_like

import cuattn
from cuattn import host
from cuattn.testing.linear_tolerance import assert_linear_varlen_close
from cuattn.testing.strategies import examples

CASES = [(F16, "token"), (F16, "channel"), (F32, "token"), (F32, "head")]


def packed(rng, dtype, lengths, heads=(2, 1, 1), dims=(32, 32)):
    q, k, v = (x[0] for x in qkv(rng, dtype, sum(lengths), heads, dims, batch=1))
    return q, k, v, np.cumsum([0, *lengths])


@pytest.mark.parametrize(("dtype", "kind"), CASES, ids=str)
def test_a_loop_over_sequences(executor, dtype, kind):
    @examples(6)
    @given(lengths=st.lists(st.sampled_from((0, 1, 2, 17, 63, 64, 65, 100)), min_size=1, max_size=5), data=st.data())
    def check(lengths, data):
        rng = np.random.default_rng(sum(lengths))
        q, k, v, starts = packed(rng, dtype, lengths)
        decay = decay_like(rng, k, v, kind)
        initial = state_like(rng, k, v, batch=len(lengths)) if data.draw(st.booleans()) else None
        given_starts = starts.tolist() if data.draw(st.booleans()) else executor.array(starts.astype(np.int32))
        out, state = run_varlen(executor, q, k, v, given_starts, decay=decay, initial_state=initial)
        assert_linear_varlen_close(out, state, q, k, v, starts, decay=decay, initial_state=initial)

    check()


@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
def test_every_query_reads_the_last_state_of_its_sequence(executor, dtype):
    rng = np.random.default_rng(0)
    lengths = [3, 0, 300, 20]
    q, k, v, starts = packed(rng, dtype, lengths)
    for given_starts in (starts, executor.array(starts.astype(np.int32))):
        out, state = run_varlen(executor, q, k, v, given_starts, causal=False)
        assert_linear_varlen_close(out, state, q, k, v, starts, causal=False)


@pytest.mark.parametrize(("dtype", "kind"), CASES, ids=str)
def test_other_sequences_are_never_felt(executor, dtype, kind):
    """A sequence of NaN, and a state of NaN, keep to themselves: the same bits for all others."""
    rng = np.random.default_rng(1)
    q, k, v, starts = packed(rng, dtype, [40, 5, 70])
    decay, initial = decay_like(rng, k, v, kind), state_like(rng, k, v, batch=3)
    clean = run_varlen(executor, q, k, v, starts, decay=decay, initial_state=initial)
    for x in (q, k, v):
        x[40:45] = np.nan
    initial.s[1] = np.nan
    out, state = run_varlen(executor, q, k, v, starts, decay=decay, initial_state=initial)
    others = np.r_[0:40, 45:115]
    np.testing.assert_array_equal(out[others], clean[0][others])
    np.testing.assert_array_equal(state.s[[0, 2]], clean[1].s[[0, 2]])
    assert np.isnan(out[40:45].astype(float)).all()


@pytest.mark.parametrize(("dtype", "kind"), CASES, ids=str)
def test_in_place(executor, dtype, kind):
    """A sequence without tokens reads its state and writes it back: every warp reads z, and one writes it."""
    rng = np.random.default_rng(4)
    q, k, v, starts = packed(rng, dtype, [0, 66])
    decay, initial = decay_like(rng, k, v, kind), state_like(rng, k, v, batch=2)
    out, state = run_varlen(executor, q, k, v, starts, decay=decay, initial_state=initial)
    inplace = on(executor, initial)
    arrays = [on(executor, x) for x in (q, k, v, starts)]
    same = cuattn.linear_attention_varlen(*arrays, decay=on(executor, decay), initial_state=inplace, state_out=inplace)
    np.testing.assert_array_equal(executor.numpy(same), out)
    for x, given_x, of_copy in zip(inplace, initial, state, strict=True):
        np.testing.assert_array_equal(executor.numpy(x), of_copy)
        np.testing.assert_array_equal(of_copy[0], given_x[0])


def test_a_list_on_the_device_that_leads_outside(executor):
    """Cut to the tokens that there are; what host lists would be refused for."""
    if executor.name == "host":
        pytest.skip("the host sees the list, and refuses it")
    rng = np.random.default_rng(2)
    q, k, v, _ = packed(rng, F16, [40])
    wrong = executor.array(np.array([0, 10**9], np.int32))
    out = cuattn.linear_attention_varlen(*(on(executor, x) for x in (q, k, v)), wrong)
    assert np.isfinite(executor.numpy(out)).all()


def test_more_sequences_than_a_grid_axis_has_places(executor):
    """66,000 sequences, most of them empty."""
    rng = np.random.default_rng(3)
    lengths = np.zeros(66_000, int)
    lengths[[5, 65_999]] = 3
    q, k, v, starts = packed(rng, F32, lengths.tolist(), (1, 1, 1), (1, 1))
    with host.check():  # no checkers: their records of 66,000 CTAs take most of the time
        out, state = run_varlen(executor, q, k, v, starts)
    busy = [5, 65_999]
    assert_linear_varlen_close(out, [x[busy] for x in state], q, k, v, [0, 3, 6])
    assert np.count_nonzero(state.s) == 2
