"""The gradient of the sinks: one more logit of every query, summed over queries and batch entries."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from backward_calls import after_forward, assert_right, call_backward, same_bits
from backward_formats import BF16, DIM, F16, F32, F64
from packed_sequences import LENGTHS, pack
from test_attention_backward import normal

import cuattn
from cuattn.ops.attention.arguments import Extents
from cuattn.ops.attention.backward.bias_launch import launch_dsinks
from cuattn.runtime.executor import HostExecutor, executor_for
from cuattn.testing.options import make_bias

SINKS = np.float32([0.5, -np.inf, 30.0, -3.0])


def with_sinks(executor, dtype, *, batch=2, seqlens=(70, 135), sinks=SINKS, **options):
    arrays = normal(dtype, batch, seqlens, (len(sinks), 1), (32, 32))
    return after_forward(executor, *arrays, dlse=True, sinks=sinks, **options)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", (F16, BF16, F32, F64), ids=str)
def test_sinks(executor, dtype):
    sinks = SINKS.astype(F64) if dtype == F64 else SINKS
    dsinks = assert_right(executor, with_sinks(executor, dtype, sinks=sinks)).dsinks
    assert dsinks.shape == (4,) and dsinks.dtype == sinks.dtype
    assert dsinks[1] == 0 and dsinks[[0, 2, 3]].all()


@pytest.mark.parametrize("options", ({"causal": True}, {"window": (9, 3)}, {"softcap": 3.0}, {"dropout_p": 0.3},
                                     {"mask": np.arange(135) % 3 == 0}), ids=" ".join)  # fmt: skip
def test_beside_other_options(executor, options):
    assert_right(executor, with_sinks(executor, F16, **options))


def test_beside_a_bias(executor):
    bias = make_bias(np.random.default_rng(0), (4, 70, 135), F32, "normal")
    grads = assert_right(executor, with_sinks(executor, F16, bias=bias), return_dbias=True)
    assert grads.dbias.shape == bias.shape


def test_queries_that_see_nothing(executor):
    """All of the probability is the sink's: dsinks is -Delta = dlse. Without a sink lse is -inf: they give nothing."""
    sinks = np.float32([1.0, -np.inf])
    saved = with_sinks(executor, F16, sinks=sinks, mask=np.zeros((70, 135), bool))
    assert np.isneginf(saved.lse[:, 1]).all()
    grads = assert_right(executor, saved)
    np.testing.assert_allclose(grads.dsinks[0], saved.dlse[:, 0].astype(F64).sum(), rtol=1e-6)
    assert grads.dsinks[1] == 0 and not grads.dq.any() and not grads.dk.any() and not grads.dv.any()


@pytest.mark.parametrize("seqlens", ((5, 0), (0, 5), (0, 0)), ids=str)
def test_nothing_to_sum(executor, seqlens):
    grads = assert_right(executor, with_sinks(executor, F32, seqlens=seqlens))
    if seqlens[0] == 0:
        assert grads.dsinks.tobytes() == np.zeros(4, F32).tobytes()


def test_no_batch_entry(executor):
    assert not with_sinks(executor, F16, batch=0).q.size
    assert not call_backward(executor, with_sinks(executor, F16, batch=0)).dsinks.any()


@pytest.mark.parametrize("name", LENGTHS)
def test_packed(executor, name):
    arrays, starts = pack(LENGTHS[name], F16, heads=(4, 1))
    saved = after_forward(executor, *arrays, *starts, dlse=True, sinks=SINKS, causal=True)
    assert_right(executor, saved)


def test_same_bits_in_any_schedule(executor):
    saved = with_sinks(executor, F16, batch=1, seqlens=(1100, 3), sinks=SINKS[::2])
    expected = assert_right(executor, saved)
    for asynchrony, seed in (("random", 2), ("random", 3), ("eager", 4)):
        with executor.active(asynchrony=asynchrony, seed=seed):
            assert same_bits(call_backward(executor, saved), expected), seed


def test_there_are_none(executor):
    assert call_backward(executor, after_forward(executor, *normal(F16))).dsinks is None


def sums_of_rows(executor, lse, delta, sinks):
    """The kernel alone: [batch, heads, rows] of lse and delta."""
    arrays = [executor.array(x) for x in (lse, delta, sinks)]
    batch, heads, rows = lse.shape
    forward = SimpleNamespace(
        extents=Extents(batch, rows, 1, heads, 1, 1, 1),
        dtype=lse.dtype,
        accumulator=lse.dtype.type,
        options=SimpleNamespace(sinks=arrays[2]),
    )
    problem = SimpleNamespace(forward=forward, executor=executor_for(lse=arrays[0]), lse=arrays[0])
    return executor.numpy(launch_dsinks(problem, SimpleNamespace(delta=arrays[1])))


def test_a_million_rows_keep_their_digits(executor):
    """Terms between 1 and 2 with all of their bits: the sum is rounded once. In float, it would lose the last bits."""
    rng = np.random.default_rng(0)
    delta = rng.uniform(1, 2, (2, 1, 2**19)).astype(F32)
    lse = np.full_like(delta, 3.0)
    dsinks = sums_of_rows(executor, lse, delta, np.float32([3.0]))
    assert dsinks[0] == -delta.astype(F64).sum().astype(F32)
    columns = delta.reshape(-1, 1024)
    in_float = columns[0].copy()
    for row in columns[1:]:
        in_float += row
    assert dsinks[0] != -in_float.sum()  # what the same threads would have found


@pytest.mark.parametrize("rows", (1, 3, 1023, 1024, 1025, 2500))
def test_every_row_of_every_batch_entry_once(executor, rows):
    """Whole numbers, so that the sum is exact; the threads of a CTA wrap around in short sequences."""
    delta = np.random.default_rng(rows).integers(-100, 100, (7000 // rows, 2, rows)).astype(F32)
    dsinks = sums_of_rows(executor, np.zeros_like(delta), delta, np.zeros(2, F32))
    np.testing.assert_array_equal(dsinks, -delta.sum(axis=(0, 2)))


def test_rows_with_an_lse_of_minus_infinity_give_nothing(executor):
    """Beside a finite sink forward returns none; one of another source must not make an infinity of the sum."""
    lse = np.float32([[[0.0, -np.inf, 0.0]]])
    dsinks = sums_of_rows(executor, lse, np.float32([[[1.0, 5.0, 2.0]]]), np.float32([0.0]))
    assert dsinks[0] == -3.0


def test_more_heads_than_an_axis_of_a_grid_may_have(executor, monkeypatch):
    """The checks of the launch pass; 70,000 CTAs are too slow to run on a CPU."""
    started = []
    monkeypatch.setattr(HostExecutor, "_start", lambda self, kernel, grid, *_: started.append(grid))
    monkeypatch.setattr(HostExecutor, "finish", lambda *_: None)
    if executor.name == "host":
        rows = np.zeros((1, 70_000, 1), F32)
        sums_of_rows(executor, rows, rows, np.zeros(70_000, F32))
        assert started == [(70_000,)]
    else:
        delta = np.arange(70_000, dtype=F32).reshape(1, -1, 1)
        dsinks = sums_of_rows(executor, np.zeros_like(delta), delta, np.zeros(70_000, F32))
        np.testing.assert_array_equal(dsinks, -delta.ravel())


def test_against_finite_differences(executor):
    """The derivative of sum(dout out) + sum(dlse lse) by each sink, in float64."""
    sinks = np.array([0.5, -1.0, 2.0])
    saved = with_sinks(executor, F64, sinks=sinks, seqlens=(9, 13))
    dsinks = assert_right(executor, saved).dsinks

    def loss(values):
        out, lse = cuattn.reference.attention(*saved.arrays[1:4], sinks=values)
        return (out * saved.arrays[0]).sum() + (lse * saved.dlse).sum()

    step = 1e-5
    for head in range(3):
        moved = np.eye(3)[head] * step
        np.testing.assert_allclose(dsinks[head], (loss(sinks + moved) - loss(sinks - moved)) / (2 * step), rtol=1e-7)


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 1), (33, 16), (300, 150), (700, 3), (1100, 3)])
def test_sinks_alone(executor, seqlen_q, seqlen_k):
    """Rows of several entries of the batch, more and fewer than a CTA has threads; some see nothing."""
    arrays = normal(F16, 3, (seqlen_q, seqlen_k), (4, 2), DIM)
    sinks = np.float32([0.5, -np.inf, 1.0, 4.0])
    saved = after_forward(executor, *arrays, dlse=True, causal=True, sinks=sinks)
    assert_right(executor, saved)
