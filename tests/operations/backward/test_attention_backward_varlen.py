"""cuattn.attention_varlen_backward: against a loop of attention_backward and the reference, and at its edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
from backward_calls import (
    Saved,
    after_forward,
    assert_gradients_right,
    assert_right,
    assert_same,
    bounds,
    call_backward,
    of_problem,
    same_bits,
)
from backward_formats import BF16, F16, F32, F64
from hypothesis import given
from hypothesis import strategies as st
from packed_sequences import LENGTHS, lengths_of, pack

import cuattn
from cuattn import AttentionGrads
from cuattn.reference.varlen import sequences
from cuattn.testing.arrays import Layout
from cuattn.testing.backward_problems import varlen_gradient_problems
from cuattn.testing.covering import covering_array, uncovered_pairs
from cuattn.testing.options import make_bias, make_mask, make_sinks, make_slopes
from cuattn.testing.strategies import OPTIONS, aligned_layouts, examples, layouts

ARRAYS = ("dout", "q", "k", "v", "out", "lse", "dlse")


def after_packed(executor, lengths, dtype=F16, *, heads=(2, 1), head_dims=(32, 32), seed=0, layout=None, **options):
    arrays, starts = pack(lengths, dtype, heads=heads, head_dims=head_dims, seed=seed, layout=layout)
    return after_forward(executor, *arrays, *starts, dlse=True, seed=seed, layout=layout, **options)


def alone(saved):
    """The call of each sequence of a packed one, with batch 1, and its rows and columns."""
    dout, q, k, v, out, lse = saved.arrays
    for b, (rows, *own, options) in enumerate(sequences(q, k, v, *saved.starts, **saved.options)):
        columns = slice(int(saved.starts[1][b]), int(saved.starts[1][b + 1]))
        one = dout[None, rows], *own, out[None, rows], lse[None, :, rows]
        yield rows, columns, Saved(*one, options, dlse=saved.dlse[None, :, rows])


@pytest.mark.smoke
@lengths_of
@pytest.mark.parametrize("causal", (False, True))
def test_sequences(executor, name, causal):
    """Against the reference, sequence by sequence; one without keys, or without queries, gives and gets nothing."""
    for dtype in (F16, F32)[: 1 + (causal is False)]:
        saved = after_packed(executor, LENGTHS[name], dtype, causal=causal)
        grads = assert_right(executor, saved)
        for b, (n, m) in enumerate(LENGTHS[name]):
            if n == 0 or m == 0:
                rows, columns = (slice(own[b], own[b + 1]) for own in saved.starts)
                assert not any(x.any() for x in (grads.dq[rows], grads.dk[columns], grads.dv[columns]))


@pytest.mark.parametrize("dtype", (BF16, F64), ids=str)
def test_other_dtypes(executor, dtype):
    lengths = LENGTHS["mixed"] + LENGTHS["empty_ones"]
    assert_right(executor, after_packed(executor, lengths, dtype, heads=(4, 2), head_dims=(24, 16), causal=True))


@lengths_of
def test_a_loop_of_attention_backward(executor, name):
    """Each sequence gives what it gives alone; with other tiles, perhaps, so that bits may differ."""
    saved = after_packed(executor, LENGTHS[name], window=(40, 20))
    grads = call_backward(executor, saved)
    for rows, columns, one in alone(saved):
        own = AttentionGrads(grads.dq[None, rows], grads.dk[None, columns], grads.dv[None, columns], None, None)
        assert_same(own, call_backward(executor, one), bounds(one)[1])


def test_one_sequence_is_attention_backward(executor):
    saved = after_packed(executor, [(135, 200)], causal=True)
    (_, _, one), *_ = alone(saved)
    grads = call_backward(executor, saved)
    assert same_bits([x[None] for x in grads[:3]], call_backward(executor, one)[:3])


def test_equal_lengths_are_a_batch(executor):
    """In bits: the same tiles, whichever way the sequences are held together; dbias and dsinks, too."""
    rng = np.random.default_rng(1)
    options = {
        "causal": True,
        "bias": rng.standard_normal((3, 4, 100, 70)).astype(np.float32),
        "mask": rng.random((3, 1, 100, 70)) < 0.7,
        "alibi_slopes": rng.random((3, 4)).astype(np.float32),
        "diagonal_offset": np.int32([-3, 5, 40]),
        "sinks": np.float32([0.5, -1, 2, -math.inf]),
        "dropout_p": 0.3,
        "dropout_seed": 21,
    }
    saved = after_packed(executor, [(100, 70)] * 3, heads=(4, 2), **options)
    dout, q, k, v, out, lse = saved.arrays
    batch = Saved(
        *(x.reshape(3, -1, *x.shape[1:]) for x in (dout, q, k, v, out)),
        lse.reshape(4, 3, 100).swapaxes(0, 1),
        options,
        dlse=saved.dlse.reshape(4, 3, 100).swapaxes(0, 1),
    )
    grads = call_backward(executor, saved, return_dbias=True)
    expected = call_backward(executor, batch, return_dbias=True)
    assert same_bits(grads[:3], [x.reshape(-1, *x.shape[2:]) for x in expected[:3]])
    assert same_bits(grads[3:4], expected[3:4])
    np.testing.assert_allclose(grads.dsinks, expected.dsinks, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal", (False, True))
def test_other_sequences_are_never_felt(executor, causal):
    """NaN in everything of the sequences before and after."""
    saved = after_packed(executor, [(30, 40), (70, 65), (20, 90)], causal=causal)
    grads = call_backward(executor, saved)
    rows, columns = (slice(own[1], own[2]) for own in saved.starts)
    poisoned = {}
    for name, x in zip(ARRAYS, (*saved.arrays, saved.dlse), strict=True):
        x = x.swapaxes(0, 1) if name.endswith("lse") else x
        own = columns if name in ("k", "v") else rows
        nan = np.full_like(x, np.nan)
        nan[own] = x[own]
        poisoned[name] = nan.swapaxes(0, 1) if name.endswith("lse") else nan
    again = call_backward(executor, saved.but(**poisoned))
    for name, own in (("dq", rows), ("dk", columns), ("dv", columns)):
        assert same_bits([getattr(again, name)[own]], [getattr(grads, name)[own]]), name
    assert np.isfinite(grads.dq).all() and np.isnan(again.dv[columns.stop :]).all()


@examples(1)
@given(
    problem=varlen_gradient_problems(
        dtype=st.sampled_from((F16, F32)),
        head_dims=st.sampled_from([(32, 32), (24, 16)]),
        layout=aligned_layouts(3),
        options=OPTIONS,
        kinds=st.just("normal"),
    )
)
def test_drawn_problems(executor, problem):
    """One here, as each may be a kernel of its own; thousands with the profile for fuzzing."""
    saved = of_problem(executor, problem)
    assert_right(executor, saved, return_dbias="bias" in saved.options)


# --- options ----------------------------------------------------------------------------------------------------------

#: As above, but few sequences, so that every option has its turn.
FEW = {
    "mixed": [(5, 9), (70, 70), (1, 130), (64, 63)],
    "empty_ones": [(0, 0), (20, 30), (0, 40), (33, 0), (1, 1)],
    "one_long": [(1, 1), (2, 0), (130, 170), (0, 3), (1, 2)],
    "more_queries_than_keys": [(135, 70), (65, 1), (10, 9)],
}

FACTORS = {
    "format": ["float16", "bfloat16", "float32", "tf32", "float64"],
    "lengths": list(FEW),
    "causal": [False, True, "top_left"],
    "window": [None, (20, 9)],
    "softcap": [None, 3.0],
    "bias": [None, "full", "row_of_keys"],
    "mask": [None, "blocks", "random"],
    "alibi_slopes": [None, "heads", "batch"],
    "sinks": [False, True],
    "dropout_p": [0.0, 0.25],
    "diagonal_offset": [None, 4, "batch"],
    "schedule_on_device": [False, True],
    "return_dbias": [False, True],
}
ROWS = covering_array(FACTORS)


def options_of(row, lengths, seed, heads=(4, 2)):
    rng = np.random.default_rng(seed)
    longest = [int(n) for n in np.max(lengths, axis=0)]
    full = len(lengths), heads[0], *longest
    options = {name: row[name] for name in ("causal", "window", "softcap")}
    if row["format"] == "tf32":
        options["precision"] = "tf32"
    if row["bias"] is not None:
        shape, kind = (full, "infinities") if row["bias"] == "full" else (full[-1:], "lowest")
        options["bias"] = make_bias(rng, shape, F32, kind)
    if row["mask"] is not None:
        options["mask"] = make_mask(rng, full if row["mask"] == "blocks" else full[1:], row["mask"], 64)
    if row["alibi_slopes"] is not None:
        options["alibi_slopes"] = make_slopes(rng, full[:2] if row["alibi_slopes"] == "batch" else full[1:2])
    if row["sinks"]:
        options["sinks"] = make_sinks(rng, heads[0])
    if row["dropout_p"]:
        options |= {"dropout_p": row["dropout_p"], "dropout_seed": 2**40 + seed, "dropout_offset": seed}
    offset = row["diagonal_offset"]
    options["diagonal_offset"] = rng.integers(-30, 60, len(lengths)).astype(np.int32) if offset == "batch" else offset
    return options


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_options_together(executor, number):
    row = ROWS[number]
    lengths = FEW[row["lengths"]]
    dtype = np.dtype("float32" if row["format"] == "tf32" else row["format"])
    options = options_of(row, lengths, number)
    saved = after_packed(executor, lengths, dtype, heads=(4, 2), seed=number, **options)
    extra = {"return_dbias": True} if row["return_dbias"] and row["bias"] else {}
    assert_right(executor, saved, schedule_on_device=row["schedule_on_device"], **extra)


def test_every_pair_of_options_is_there():
    assert uncovered_pairs(FACTORS, ROWS) == []
    assert len(ROWS) < 45


# --- schedules --------------------------------------------------------------------------------------------------------


@lengths_of
def test_a_schedule_made_on_the_device_changes_no_bit(executor, name):
    for options in ({}, {"causal": True}):
        saved = after_packed(executor, LENGTHS[name], **options)
        here, there = (call_backward(executor, saved, schedule_on_device=own) for own in (False, True))
        assert same_bits(here, there)


def test_many_sequences(executor):
    """More sequences than a block of the scheduling kernel has threads; most of them empty."""
    rng = np.random.default_rng(5)
    lengths = rng.integers(0, 3, (1500, 2)) * (rng.random((1500, 1)) < 0.05)
    lengths[700] = 150, 90
    saved = after_packed(executor, lengths, head_dims=(8, 8))
    results = [call_backward(executor, saved, schedule_on_device=on_device) for on_device in (False, True)]
    assert same_bits(*results)
    assert_gradients_right(results[0], saved)


@pytest.mark.parametrize("head_dims", ((32, 32), (31, 17)), ids=str)
def test_same_bits_in_any_schedule(executor, head_dims):
    saved = after_packed(executor, LENGTHS["mixed"], head_dims=head_dims, heads=(4, 2))
    expected = call_backward(executor, saved)
    for asynchrony, seed in (("late", 1), ("random", 2), ("random", 3), ("eager", 4)):
        with executor.active(asynchrony=asynchrony, seed=seed):
            assert same_bits(call_backward(executor, saved), expected), (asynchrony, seed)


# --- arrays -----------------------------------------------------------------------------------------------------------


@examples(6)
@given(data=st.data())
def test_layouts_and_given_gradients(executor, data):
    """Arrays of any strides among NaN; the gradients are written where they are wanted, and nowhere else."""
    saved = after_packed(executor, LENGTHS["mixed"], head_dims=(31, 17), layout=data.draw(layouts(3)))
    expected = call_backward(executor, after_packed(executor, LENGTHS["mixed"], head_dims=(31, 17)))
    like = saved.arrays[1:4]
    targets = [executor.guarded(x.shape, x.dtype, data.draw(layouts(3))) for x in like]
    given_arrays = dict(zip(("dq", "dk", "dv"), (target.array for target in targets), strict=True))
    assert same_bits(call_backward(executor, saved, **given_arrays), expected)
    for target, x in zip(targets, expected[:3], strict=True):
        target.check()
        assert same_bits([executor.numpy(target.array)], [x])


def test_views_of_one_packed_projection(executor):
    """q, k and v as slices of one [tokens, 3, heads, head_dim] array, and their gradients likewise."""
    (packed, _, _), (starts, _) = pack([(30, 30), (0, 0), (75, 75)], heads=(6, 6))
    views = packed.reshape(105, 3, 2, 32).transpose(1, 0, 2, 3)
    saved = after_forward(executor, *views, starts, starts, causal=True, dlse=True)
    target = executor.guarded((105, 3, 2, 32), F16, Layout(pad=(0, 0, 0, 8)))
    given_arrays = {f"d{name}": target.array[:, i] for i, name in enumerate("qkv")}
    assert_right(executor, saved, **given_arrays)
    target.check()


def test_a_workspace_is_used_and_nothing_beside_it(executor):
    saved = after_packed(executor, LENGTHS["mixed"], heads=(4, 2), causal=True)
    q, k, v = saved.arrays[1:4]
    size = cuattn.attention_backward_workspace_size(
        *(executor.array(x) for x in (q, k, v)), cu_seqlens_q=saved.starts[0], cu_seqlens_k=saved.starts[1], causal=True
    )
    workspace = executor.guarded((size,), np.uint8)  # full of NaN
    assert same_bits(call_backward(executor, saved, workspace=workspace.array), call_backward(executor, saved))
    workspace.check()
    assert (executor.numpy(workspace.array) != 0xFF).any()


@pytest.mark.parametrize("kind", (list, np.int64), ids=lambda kind: kind.__name__)
def test_lengths_as_what_there_is(executor, kind):
    saved = after_packed(executor, LENGTHS["mixed"])
    given_starts = tuple(kind(own.tolist()) if kind is list else own.astype(kind) for own in saved.starts)
    assert same_bits(call_backward(executor, saved.but(starts=given_starts)), call_backward(executor, saved))


def test_lengths_on_the_executor_and_longest_lengths(executor):
    """Beside arrays on a GPU, lengths are not waited for, so the schedule is made there; longer ones change nothing."""
    saved = after_packed(executor, LENGTHS["one_long_among_many"], causal=True)
    expected = call_backward(executor, saved)
    on_executor = tuple(executor.array(own) for own in saved.starts)
    assert same_bits(call_backward(executor, saved.but(starts=on_executor)), expected)
    assert same_bits(call_backward(executor, saved, max_seqlen_q=5000, max_seqlen_k=10**9), expected)


@pytest.mark.parametrize("batch", (0, 1, 3))
def test_no_tokens(executor, batch):
    starts = np.zeros(batch + 1, np.int32)
    q, k, v = np.zeros((0, 2, 32), F16), np.zeros((0, 1, 32), F16), np.zeros((0, 1, 16), F16)
    saved = after_forward(executor, q, k, v, starts, starts, sinks=np.float32([1.0, 2.0]))
    grads = call_backward(executor, saved)
    assert [x.shape for x in grads[:3]] == [q.shape, k.shape, v.shape]
    assert grads.dsinks.tolist() == [0, 0]


def test_sequences_without_keys_have_their_sink(executor):
    saved = after_packed(executor, [(40, 0), (3, 0)], sinks=np.float32([1.5, -2.0]))
    grads = assert_right(executor, saved)
    assert not grads.dq.any() and grads.dk.shape == (0, 1, 32)
    np.testing.assert_allclose(grads.dsinks, saved.dlse.sum(axis=1), rtol=1e-4, atol=1e-5)
