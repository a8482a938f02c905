"""cuattn.attention_varlen: against a loop of attention, against the reference, and at the edges of packing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from attention_calls import assert_varlen_right, call, call_varlen, prepare, same_kernel
from hypothesis import given
from hypothesis import strategies as st
from packed_sequences import BAD_STARTS, LENGTHS, lengths_of, pack
from test_attention_options import BF16, F16, F32, F64, same_bits

import cuattn
from cuattn import host, reference
from cuattn.ops.attention.forward.launch import forward
from cuattn.ops.attention.sequences import work_list
from cuattn.ops.attention.varlen import check
from cuattn.testing import assert_varlen_close, kernels
from cuattn.testing.arrays import Layout
from cuattn.testing.covering import covering_array, uncovered_pairs
from cuattn.testing.options import make_bias, make_descale, make_mask, make_sinks, make_slopes
from cuattn.testing.strategies import DTYPES, FLOAT8_DTYPES, OPTIONS, examples, varlen_problems
from cuattn.testing.tolerance import assert_within, attention_bound


@pytest.mark.smoke
@lengths_of
@pytest.mark.parametrize("causal", (False, True, "top_left"))
def test_sequences(executor, name, causal):
    for dtype in (F16, F32):
        arrays, starts = pack(LENGTHS[name], dtype)
        out, lse = assert_varlen_right(executor, *arrays, *starts, causal=causal)
        for (n, m), start in zip(LENGTHS[name], starts[0], strict=False):
            if m == 0:
                assert not out[start : start + n].any() and np.isneginf(lse[:, start : start + n]).all()


@pytest.mark.parametrize("dtype", (BF16, F64), ids=str)
def test_other_dtypes(executor, dtype):
    arrays, starts = pack(LENGTHS["mixed"] + LENGTHS["empty_ones"], dtype, heads=(4, 2), head_dims=(24, 17))
    assert_varlen_right(executor, *arrays, *starts, causal=True)


@lengths_of
def test_a_loop_of_attention(executor, name):
    """Each sequence gives what it gives alone; with other tiles, perhaps, so that bits may differ."""
    options = {"window": (40, 20)}
    (q, k, v), starts = pack(LENGTHS[name])
    out, lse = call_varlen(executor, q, k, v, *starts, **options)
    for b in range(len(LENGTHS[name])):
        rows, columns = (slice(own[b], own[b + 1]) for own in starts)
        alone = q[None, rows], k[None, columns], v[None, columns]
        expected = call(executor, *alone, **options)
        _, bound, _, bound_lse = attention_bound(*alone, **options)
        assert_within(out[None, rows], expected[0].astype(np.float64), 2 * bound)
        assert_within(lse[None, :, rows], expected[1].astype(np.float64), 2 * bound_lse, "lse")


def test_one_sequence_is_attention(executor):
    (q, k, v), starts = pack([(135, 200)])
    out, lse = call_varlen(executor, q, k, v, *starts, causal=True)
    assert same_bits((out[None], lse[None]), call(executor, q[None], k[None], v[None], causal=True))


def test_equal_lengths_are_a_batch(executor):
    """In bits: the same tiles, whichever way the sequences are held together."""
    (q, k, v), starts = pack([(100, 70)] * 3, heads=(4, 2))
    rng = np.random.default_rng(1)
    options = {
        "causal": True,
        "bias": rng.standard_normal((3, 4, 100, 70)).astype(np.float32),
        "mask": rng.random((3, 1, 100, 70)) < 0.7,
        "alibi_slopes": rng.random((3, 4)).astype(np.float32),
        "diagonal_offset": np.int32([-3, 5, 40]),
        "dropout_p": 0.3,
        "dropout_seed": 21,
    }
    out, lse = call_varlen(executor, q, k, v, *starts, **options)
    expected, expected_lse = call(executor, *(x.reshape(3, -1, *x.shape[1:]) for x in (q, k, v)), **options)
    assert same_bits((out, lse), (expected.reshape(out.shape), expected_lse.swapaxes(0, 1).reshape(lse.shape)))


def test_other_sequences_are_never_felt(executor):
    """NaN in the sequences before and after, queries, keys and values."""
    lengths = [(30, 40), (70, 65), (20, 90)]
    (q, k, v), starts = pack(lengths)
    for causal in (False, True):
        out, lse = call_varlen(executor, q, k, v, *starts, causal=causal)
        rows, columns = (slice(own[1], own[2]) for own in starts)
        alone = []
        for x, own in ((q, rows), (k, columns), (v, columns)):
            poisoned = np.full_like(x, np.nan)
            poisoned[own] = x[own]
            alone.append(poisoned)
        again, lse_again = call_varlen(executor, *alone, *starts, causal=causal)
        assert same_bits((again[rows], lse_again[:, rows]), (out[rows], lse[:, rows]))
        assert np.isnan(again[: rows.start]).any() and np.isnan(again[rows.stop :]).all()


@examples(3)
@given(
    problem=varlen_problems(
        dtype=st.sampled_from((*DTYPES, *FLOAT8_DTYPES)),
        head_dims=st.sampled_from([(32, 32), (24, 16)]),
        options=OPTIONS,
        kinds=st.just("normal"),
    )
)
def test_drawn_problems(executor, problem):
    """A few here, as each may be a kernel of its own; thousands with the profile for fuzzing."""
    arrays = problem.q, problem.k, problem.v
    out, lse = call_varlen(executor, *arrays, problem.cu_seqlens_q, problem.cu_seqlens_k, **problem.options)
    assert_varlen_close(out, *problem.arrays, lse=lse, **problem.options)


# --- options ----------------------------------------------------------------------------------------------------------


FACTORS = {
    "format": ["float16", "bfloat16", "float32", "tf32", "float64", "float8_e4m3fn"],
    "lengths": ["mixed", "empty_ones", "one_long_among_many", "more_queries_than_keys"],
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
}
ROWS = covering_array(FACTORS)


def options_of(row, lengths, seed, heads=(4, 2)):
    rng = np.random.default_rng(seed)
    longest = [int(n) for n in np.max(lengths, axis=0)]
    full = len(lengths), heads[0], *longest
    options = {name: row[name] for name in ("causal", "window", "softcap")}
    if row["format"] == "tf32":
        options["precision"] = "tf32"
    if row["format"].startswith("float8"):
        options |= {f"{name}_descale": make_descale(rng, (len(lengths), heads[1])) for name in "qkv"}
    if row["bias"] is not None:
        options["bias"] = make_bias(rng, full if row["bias"] == "full" else full[-1:], np.float32, "infinities")
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
    lengths = LENGTHS[row["lengths"]]
    dtype = np.dtype("float32" if row["format"] == "tf32" else row["format"])
    arrays, starts = pack(lengths, dtype, heads=(4, 2), seed=number)
    options = options_of(row, lengths, number)
    on_executor, moved = prepare(executor, arrays, options)
    evaluated = kernels.attention_varlen(
        *on_executor, *starts, return_lse=True, schedule_on_device=row["schedule_on_device"], **moved
    )
    out, lse = (executor.numpy(x) for x in evaluated)
    assert_varlen_close(out, *arrays, *starts, lse=lse, **options)


def test_every_pair_of_options_is_there():
    assert uncovered_pairs(FACTORS, ROWS) == []
    assert len(ROWS) < 45


def test_dropout_counts_positions_within_a_sequence(executor):
    """Exactly the mask of the batch entry, from its first query and key on; values are columns of the identity."""
    lengths = [(20, 9), (0, 5), (40, 32), (70, 20)]
    (q, k, v), starts = pack(lengths)
    for m, start in zip([m for _, m in lengths], starts[1], strict=False):
        v[start : start + m] = np.eye(32, dtype=F16)[:m, None]
    options = {"dropout_p": 0.4, "dropout_seed": 2**63 + 1, "dropout_offset": 6}
    out, _ = call_varlen(executor, q, k, v, *starts, **options)
    mask = cuattn.dropout_mask(4, 2, 70, 32, **options)
    for b, (n, m) in enumerate(lengths):
        kept = out[starts[0][b] : starts[0][b + 1], :, :m].swapaxes(0, 1) > 0
        np.testing.assert_array_equal(kept, mask[b, :, :n, :m])


def test_a_bias_may_be_larger_than_the_longest_sequence(executor):
    arrays, starts = pack(LENGTHS["mixed"])
    bias = make_bias(np.random.default_rng(3), (5, 2, 150, 140), np.float32, "infinities")
    result = assert_varlen_right(executor, *arrays, *starts, bias=bias, max_seqlen_q=150, max_seqlen_k=140)
    assert same_bits(call_varlen(executor, *arrays, *starts, bias=bias[:, :, :130, :130]), result)


# --- schedules --------------------------------------------------------------------------------------------------------


@lengths_of
def test_a_schedule_made_on_the_device_changes_no_bit(executor, name):
    arrays, starts = pack(LENGTHS[name])
    on_executor, _ = prepare(executor, arrays, {})
    for options in ({}, {"causal": True}):
        here, there = (
            kernels.attention_varlen(*on_executor, *starts, return_lse=True, schedule_on_device=on_device, **options)
            for on_device in (False, True)
        )
        assert same_bits(*([executor.numpy(x) for x in result] for result in (here, there)))


@pytest.mark.parametrize("options", ({}, {"causal": True}, {"window": (30, 5)}, {"causal": "top_left"}), ids=str)
@lengths_of
def test_the_work_is_what_there_is_longest_first(name, options):
    """One entry for each block of queries of each sequence, those that see the most keys first."""
    arrays, starts = pack(LENGTHS[name], head_dims=(8, 8))
    problem, packed = check(*arrays, *starts, **options)
    work = work_list(*packed.host, 64, problem.options).tolist()
    blocks = {
        (b, block): min(64, n - 64 * block) for b, (n, _) in enumerate(LENGTHS[name]) for block in range(-(-n // 64))
    }
    assert sorted(map(tuple, work)) == sorted(blocks)
    spans = []
    for b, block in work:
        n, m = LENGTHS[name][b]
        rows = slice(64 * block, 64 * block + blocks[b, block])
        seen = np.flatnonzero(np.broadcast_to(reference.visible(n, m, **options), (1, 1, n, m))[0, 0, rows].any(axis=0))
        spans.append(seen.max() - seen.min() + 1 if seen.size else 0)
    assert spans == sorted(spans, reverse=True)


@pytest.mark.parametrize("starts", BAD_STARTS)
@pytest.mark.parametrize("which", ("q", "k", "both"))
def test_unchecked_lengths_touch_nothing_foreign(executor, which, starts):
    """What only the device knows cannot be refused; but kernels read and write inside of the arrays all the same.

    Not that the result means anything: sequences may even overlap, and then several blocks write one row.
    """
    arrays, good = pack([(20, 20), (30, 30), (20, 20)])
    on_executor, _ = prepare(executor, arrays, {})
    target = executor.guarded((70, 2, 32), F16)
    target.array[...] = 0
    problem, packed = check(*on_executor, *good, out=target.array)
    packed.host = packed.max_seqlen_q = packed.max_seqlen_k = None
    bad = executor.array(np.array(BAD_STARTS[starts], np.int32))
    if which != "k":
        packed.cu_seqlens_q = bad
    if which != "q":
        packed.cu_seqlens_k = bad
    with host.check("mem", "init"):
        forward(problem, return_lse=False, packed=packed)
    target.check()


def test_many_sequences(executor):
    """More sequences than a block of the scheduling kernel has threads; most of them empty."""
    rng = np.random.default_rng(5)
    lengths = rng.integers(0, 3, (1500, 2)) * (rng.random((1500, 1)) < 0.3)
    lengths[700] = 150, 90
    arrays, starts = pack(lengths, head_dims=(8, 8))
    on_executor, _ = prepare(executor, arrays, {})
    results = [
        kernels.attention_varlen(*on_executor, *starts, schedule_on_device=on_device) for on_device in (False, True)
    ]
    out, again = (executor.numpy(x) for x in results)
    assert same_bits([out], [again])
    expected, _ = reference.attention_varlen(*arrays, *starts)
    np.testing.assert_allclose(out.astype(np.float64), expected, atol=5e-3)


# --- arrays -----------------------------------------------------------------------------------------------------------


LAYOUTS = {
    "heads_first": Layout(order=(1, 0, 2)),
    "padded": Layout(pad=(2, 1, 8)),
    "odd_rows": Layout(pad=(0, 0, 1)),
    "odd_base": Layout(offset=1),
    "last_axis_strided": Layout(order=(0, 2, 1)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_out(executor, layout):
    arrays, starts = pack(LENGTHS["mixed"], head_dims=(24, 16), layout=LAYOUTS[layout])
    plain, _ = pack(LENGTHS["mixed"], head_dims=(24, 16))
    out, lse = assert_varlen_right(executor, *arrays, *starts, causal=True)
    if same_kernel(executor, *(((*x, *starts), {"causal": True}) for x in (arrays, plain))):
        assert same_bits(call_varlen(executor, *plain, *starts, causal=True), (out, lse))
    target = executor.guarded(out.shape, F16, LAYOUTS[layout])
    on_executor, _ = prepare(executor, arrays, {})
    assert cuattn.attention_varlen(*on_executor, *starts, causal=True, out=target.array) is target.array
    target.check()
    assert same_bits([executor.numpy(target.array)], [out])


def test_views_of_one_packed_projection(executor):
    """q, k and v as slices of one [tokens, 3, heads, head_dim] array."""
    (packed, _, _), (starts, _) = pack([(30, 30), (0, 0), (75, 75)], heads=(6, 6))
    q, k, v = packed.reshape(105, 3, 2, 32).transpose(1, 0, 2, 3)
    assert_varlen_right(executor, q, k, v, starts, starts, causal=True)


@pytest.mark.parametrize("kind", (list, tuple, np.int64, np.uint32), ids=lambda kind: kind.__name__)
def test_lengths_as_what_there_is(executor, kind):
    arrays, starts = pack(LENGTHS["mixed"])
    given = [kind(own.tolist()) if kind in (list, tuple) else own.astype(kind) for own in starts]
    assert same_bits(call_varlen(executor, *arrays, *given), call_varlen(executor, *arrays, *starts))


def test_lengths_on_the_executor(executor):
    """Beside arrays on a GPU: not waited for, so the schedule is made there."""
    arrays, starts = pack(LENGTHS["one_long_among_many"])
    expected = call_varlen(executor, *arrays, *starts, causal=True)
    on_executor = [executor.array(own) for own in starts]
    assert same_bits(call_varlen(executor, *arrays, *on_executor, causal=True), expected)


def test_longest_lengths_may_be_given(executor):
    arrays, starts = pack(LENGTHS["mixed"])
    expected = call_varlen(executor, *arrays, *starts)
    assert same_bits(call_varlen(executor, *arrays, *starts, max_seqlen_q=130, max_seqlen_k=130), expected)
    assert same_bits(call_varlen(executor, *arrays, *starts, max_seqlen_q=5000, max_seqlen_k=10**9), expected)


@pytest.mark.parametrize("batch", (0, 1, 3))
def test_no_tokens(executor, batch):
    starts = np.zeros(batch + 1, np.int32)
    q, k, v = np.zeros((0, 2, 32), F16), np.zeros((0, 1, 32), F16), np.zeros((0, 1, 16), F16)
    out, lse = call_varlen(executor, q, k, v, starts, starts, sinks=[1.0, 2.0])
    assert out.shape == (0, 2, 16) and lse.shape == (2, 0) and lse.dtype == np.float32


def test_sequences_without_keys_have_their_sink(executor):
    arrays, starts = pack(LENGTHS["empty_ones"])
    out, lse = assert_varlen_right(executor, *arrays, *starts, sinks=np.float32([1.5, -2.0]))
    rows = slice(starts[0][3], starts[0][4])
    assert not out[rows].any()
    np.testing.assert_allclose(lse[:, rows], np.broadcast_to([[1.5], [-2.0]], (2, 33)), rtol=2e-7)


def test_lse_is_natural(executor):
    """Keys that are all equal: lse is the logit plus the logarithm of their number."""
    starts = np.int32([0, 3, 7])
    q = np.zeros((7, 1, 8), F32)
    _, lse = call_varlen(executor, q, q, q, starts, starts)
    np.testing.assert_allclose(lse[0], [math.log(3)] * 3 + [math.log(4)] * 4, rtol=1e-6)
