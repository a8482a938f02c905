"""What the mutants of the softmax kernels asked for (docs/mutants.md): cases that no other test reached."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import cuattn
from cuattn.ops.softmax import online as online_softmax
from cuattn.ops.softmax.config import SPLIT, SPLIT_LANES, STREAM, STREAM_LANES, STREAM_SHORT
from cuattn.testing import assert_softmax_close, kernels


@pytest.mark.parametrize("config", [SPLIT, SPLIT_LANES], ids=["columns", "rows"])
def test_more_chunks_than_threads_of_a_row(executor, config):
    """Every thread merges the states of several chunks."""
    config = replace(config, min_chunk_cols=16)
    num_chunks = 3 * config.threads_per_row + 1
    lanes = config.lanes_span_rows
    shape = (16 * num_chunks, 9) if lanes else (2, 16 * num_chunks)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32) * 4
    axis = 0 if lanes else 1
    out = kernels.softmax(executor.array(x), axis=axis, config=config)
    assert_softmax_close(executor.numpy(out), x, axis)


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
