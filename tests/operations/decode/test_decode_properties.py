"""What is true of attention to a cache whatever the numbers are."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from cached_calls import assert_equal, assert_right, assert_same, call
from hypothesis import given
from hypothesis import strategies as st

import cuattn
from cuattn.testing import assert_attention_close
from cuattn.testing.arrays import place
from cuattn.testing.decode_problems import cached_problem
from cuattn.testing.decode_strategies import cache_lengths, cached_problems, page_sizes
from cuattn.testing.rounding import accumulation_dtype, unit_roundoff
from cuattn.testing.strategies import DTYPES, aligned_layouts, dtypes, examples
from cuattn.testing.tolerance import assert_within, attention_bound

NORMAL = st.just("normal")
#: One compiled bucket, rows of whole 16-byte pieces: the sizes of these problems say nothing new about kernels.
PLAIN = {"head_dims": st.sampled_from([(32, 32), (24, 32)]), "layout": aligned_layouts()}
HEADS = st.sampled_from([(2, 1), (4, 2)])
TOKENS = st.sampled_from([1, 1, 5])
TWO_DTYPES = st.sampled_from(DTYPES[::2])


def contiguous(**more):
    return cached_problems(**PLAIN, **{"heads": HEADS, "seqlen_q": TOKENS, "page_size": st.none(), **more})


def with_arrays(problem, **arrays):
    """The problem with other numbers in q, k or v, in place of theirs."""
    return replace(problem, **{name: place(x) for name, x in arrays.items()})


@examples(25)
@given(problem=contiguous(options=("scale", "num_splits")))
def test_rows_of_p_sum_to_one(executor, problem):
    v = problem.v.array
    problem = with_arrays(problem, v=np.where(np.isnan(v), v, v.dtype.type(1)))
    out, lse = call(executor, problem)
    seen = ~np.isneginf(lse).swapaxes(1, 2)[..., None]
    u = 2 * unit_roundoff(out.dtype) + unit_roundoff(accumulation_dtype(out.dtype)) * (8 + v.shape[1])
    assert_within(out, np.broadcast_to(seen, out.shape).astype(np.float64), u, "sum of P")


@examples(25)
@given(problem=contiguous(options=("scale",)), seed=st.integers(0, 999))
def test_order_of_keys_does_not_matter(executor, problem, seed):
    problem = problem.with_options(causal=False)
    rng, k, v = np.random.default_rng(seed), problem.k.array.copy(), problem.v.array.copy()
    for b, length in enumerate(problem.seqlens_k):
        order = rng.permutation(length)
        k[b, :length], v[b, :length] = k[b, order], v[b, order]
    assert_same(problem, call(executor, with_arrays(problem, k=k, v=v)), call(executor, problem))


@examples(20)
@given(dtype=dtypes(), lengths=cache_lengths(130), seqlen_q=TOKENS, shift=st.sampled_from([-8, 3, 30]))
def test_a_shift_of_a_row_of_logits_moves_only_lse(executor, dtype, lengths, seqlen_q, shift):
    """One more component, 1 in every key and t in query i, adds scale * t to every logit of row i."""
    rng = np.random.default_rng(sum(lengths))
    problem = cached_problem(
        rng, lengths=lengths, seqlens_q=seqlen_q, heads=(2, 1), head_dims=(32, 32), dtype=dtype, scale=0.25
    )
    problem.k.array[..., 31], problem.q.array[..., 31] = 1, 0
    shifted = problem.q.array.copy()
    shifted[..., 31] = shift * np.arange(1, seqlen_q + 1).reshape(1, -1, 1)
    moved = with_arrays(problem, q=shifted)
    out, lse = call(executor, moved)
    lse = lse - 0.25 * shifted[..., 31].astype(lse.dtype).swapaxes(1, 2)
    assert_same(moved, (out, lse), call(executor, problem))


@examples(20)
@given(problem=contiguous(dtype=TWO_DTYPES, heads=st.sampled_from([(4, 2), (6, 3), (3, 1), (8, 2), (17, 1)])))
def test_grouped_heads_equal_repeated_ones(executor, problem):
    q, k, v = problem.q.array, problem.k.array, problem.v.array
    group = q.shape[2] // k.shape[2]
    repeated = with_arrays(problem, k=np.repeat(k, group, axis=2), v=np.repeat(v, group, axis=2))
    assert_same(problem, call(executor, problem), call(executor, repeated))


@examples(30)
@given(
    problem=contiguous(dtype=TWO_DTYPES, options=("scale", "sinks", "window")),
    more=st.sampled_from([2, 3, 5, 64, 1000]),
)
def test_any_number_of_splits(executor, problem, more):
    """Also more of them than there are tiles; the same bits as before when asked again."""
    one, many = call(executor, problem, num_splits=1), call(executor, problem, num_splits=more)
    assert_same(problem, many, one)
    assert_same(problem, call(executor, problem), one)
    assert_equal(call(executor, problem, num_splits=more), many)


@examples(25)
@given(problem=contiguous(kinds=NORMAL, options=("num_splits",)), page_size=page_sizes(), seed=st.integers(0, 999))
def test_pages_do_not_change_a_bit(executor, problem, page_size, seed):
    """Contiguous or in pages, of any size and in any order: the order of the sums is the same."""
    problem = problem.with_options(num_splits=problem.options.get("num_splits", 2))
    rng = np.random.default_rng(seed)
    expected = call(executor, problem)
    assert_equal(call(executor, problem.in_pages(rng, page_size)), expected)
    assert_equal(call(executor, problem.in_pages(rng, 16, spare_pages=7)), expected)


@examples(20)
@given(problem=contiguous(kinds=NORMAL), page_size=page_sizes(), value=st.sampled_from([0.0, -60000.0, np.inf]))
def test_what_no_key_is_in_is_never_felt(executor, problem, page_size, value):
    """Slots beyond a length and pages that nobody has hold NaN here; with anything else the bits are the same."""
    paged = problem.in_pages(np.random.default_rng(0), page_size)
    expected = call(executor, paged)
    other = {name: getattr(paged, name).array for name in "kv"}
    other = {name: np.where(np.isnan(x), x.dtype.type(value), x) for name, x in other.items()}
    assert_equal(call(executor, with_arrays(paged, **other)), expected)
    tables = np.where(np.arange(paged.block_tables.shape[1]) * page_size < paged.seqlens_k[:, None],
                      paged.block_tables, 0)  # fmt: skip
    assert_equal(call(executor, replace(paged, block_tables=tables.astype(np.int32))), expected)


@examples(10)
@given(dtype=dtypes(), length=st.sampled_from([1, 2, 17, 33]), paged=st.booleans(), seed=st.integers(0, 999))
def test_step_by_step_equals_one_causal_call(executor, dtype, length, paged, seed):
    """Token after token over a growing cache, against `attention` of all tokens at once."""
    problem = cached_problem(
        np.random.default_rng(seed), lengths=[length] * 2, seqlens_q=length, heads=(2, 1), head_dims=(32, 32),
        dtype=dtype, page_size=3 if paged else None,
    )  # fmt: skip
    q, k, v = as_one(problem)
    out, lse = one_call(executor, q, k, v)
    for i in range(length):
        step = replace(problem, q=place(q[:, i : i + 1]), seqlens_k=np.full(2, i + 1, np.int32))
        got, got_lse = call(executor, step)
        _, bound, _, bound_lse = attention_bound(q[:, i : i + 1], k[:, : i + 1], v[:, : i + 1], causal=True)
        assert_within(got, out[:, i : i + 1].astype(np.float64), 2 * bound, "out")
        assert_within(got_lse, lse[:, :, i : i + 1].astype(np.float64), 2 * bound_lse + 1e-5, "lse")


@examples(10)
@given(dtype=TWO_DTYPES, cuts=st.lists(st.integers(0, 70), max_size=3), seed=st.integers(0, 999))
def test_chunked_prefill_equals_one_shot(executor, dtype, cuts, seed):
    problem = cached_problem(
        np.random.default_rng(seed), lengths=[70], seqlens_q=70, heads=(4, 2), head_dims=(32, 32), dtype=dtype,
        page_size=16,
    )  # fmt: skip
    q, k, v = as_one(problem)
    expected = one_call(executor, q, k, v)
    bounds, parts = sorted({0, 70, *cuts}), []
    for begin, end in itertools.pairwise(bounds):
        chunk = replace(problem, q=place(q[:, begin:end]), seqlens_k=np.int32([end]))
        parts.append(call(executor, chunk))
    out, lse = (np.concatenate(of, axis=axis) for of, axis in zip(zip(*parts, strict=True), (1, 2), strict=True))
    assert_attention_close(out, q, k, v, causal=True)
    assert_same(problem, (out, lse), expected)


def as_one(problem):
    """q, k and v [B, N, ...] of sequences of one length."""
    sequences = list(cuattn.reference.decode.cached_sequences(*problem.reference_arrays))
    dtype = problem.q.array.dtype
    k, v = (np.concatenate([getattr(part, name) for part in sequences]).astype(dtype) for name in "kv")
    return problem.q.array, k, v


def one_call(executor, q, k, v):
    out, lse = cuattn.attention(*map(executor.array, (q, k, v)), causal=True, return_lse=True)
    return executor.numpy(out), executor.numpy(lse)


@examples(15)
@given(problem=contiguous(kinds=NORMAL), data=st.data())
def test_a_nan_stays_in_its_sequence(executor, problem, data):
    """In a key of one sequence it is felt by who sees that key, and by nobody else."""
    long = [b for b, length in enumerate(problem.seqlens_k) if length]
    if not long or problem.q.array.shape[1] == 0:
        return
    b = data.draw(st.sampled_from(long))
    problem.k.array[b, problem.seqlens_k[b] - 1, 0, 0] = np.nan  # only the last query sees the last key
    out, _ = call(executor, problem)
    group = problem.q.array.shape[2] // problem.k.array.shape[2]
    felt = np.zeros(out.shape, bool)
    felt[b, -1, :group] = True
    np.testing.assert_array_equal(np.isnan(out), felt)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_in_any_schedule(executor, dtype):
    problem = cached_problem(
        np.random.default_rng(0), lengths=[133, 70, 0], seqlens_q=5, heads=(4, 2), head_dims=(32, 32), dtype=dtype,
        page_size=16, num_splits=3,
    )  # fmt: skip
    expected = assert_right(executor, problem)
    for asynchrony, seed in (("late", 1), ("random", 2), ("random", 3), ("eager", 4)):
        with executor.active(asynchrony=asynchrony, seed=seed):
            assert_equal(call(executor, problem), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_array_may_be_keys_and_values(executor, dtype):
    """Multi-head latent attention: one cache is both."""
    problem = cached_problem(
        np.random.default_rng(0), lengths=[50, 9], seqlens_q=1, heads=(2, 1), head_dims=(32, 32), dtype=dtype,
        page_size=4,
    )  # fmt: skip
    k = problem.k.array
    shared = place(k)
    assert_right(executor, replace(problem, k=shared, v=replace(shared, array=shared.array[..., :16])))
