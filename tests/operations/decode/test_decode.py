"""decode_attention and paged_attention against the reference: lengths, groups of heads, head dims, memory layouts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cached_calls import assert_equal, assert_right, call, check, prepare
from hypothesis import given
from hypothesis import strategies as st

import cuattn
from cuattn.head_dims import HEAD_DIM_BUCKETS
from cuattn.testing.arrays import Layout, place
from cuattn.testing.decode_problems import cached_problem
from cuattn.testing.decode_strategies import AWKWARD_LENGTHS, GROUPS, cached_problems
from cuattn.testing.rounding import accumulation_dtype
from cuattn.testing.strategies import DTYPES, aligned_layouts, examples, layouts

F16, BF16, F32, F64 = DTYPES
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
two_dtypes = pytest.mark.parametrize("dtype", (F16, F32), ids=str)
#: One compiled bucket of head dims, with rows that are no multiples of 16 bytes among them; two heights of tiles.
FEW = {
    "dtype": st.sampled_from((F16, F32)),
    "head_dims": st.sampled_from([(32, 32), (24, 32), (31, 17), (8, 8)]),
    "heads": st.sampled_from([(2, 1), (4, 2)]),
    "seqlen_q": st.sampled_from([1, 1, 5, 0]),
}


@pytest.mark.smoke
@examples(60)
@given(problem=cached_problems(**FEW, options=("scale", "num_splits")))
def test_agrees_with_the_reference(executor, problem):
    before = [guarded.root.copy() for guarded in (problem.q, problem.k, problem.v)]
    assert_right(executor, problem)
    for guarded, content in zip((problem.q, problem.k, problem.v), before, strict=True):
        np.testing.assert_array_equal(guarded.root, content)  # inputs and their surroundings are only read


@pytest.mark.parametrize("num_splits", (1, 3))
@pytest.mark.parametrize("page_size", (None, 16))
@dtypes
def test_awkward_lengths(executor, dtype, page_size, num_splits):
    """Sequences of no key, of one, of a tile and one more or less, all in one batch."""
    problem = cached_problem(
        np.random.default_rng(0), lengths=AWKWARD_LENGTHS, seqlens_q=1, heads=(2, 1), head_dims=(32, 32), dtype=dtype,
        page_size=page_size,
    )  # fmt: skip
    out, lse = assert_right(executor, problem, num_splits=num_splits)
    empty = np.equal(AWKWARD_LENGTHS, 0)
    assert not out[empty].any() and np.isneginf(lse[empty]).all()


@pytest.mark.parametrize("seqlen_q", (1, 2, 7))
@pytest.mark.parametrize("heads", GROUPS, ids=str)
@two_dtypes
def test_groups_of_heads(executor, dtype, heads, seqlen_q):
    """Groups that fill a tile of rows, that do not, and that need several; tokens beside them in the tile."""
    problem = cached_problem(
        np.random.default_rng(0), lengths=[66, 1, 5], seqlens_q=seqlen_q, heads=heads, head_dims=(32, 32), dtype=dtype
    )
    assert_right(executor, problem, num_splits=2)


@pytest.mark.parametrize("seqlen_q", (1, 5, 40))
@two_dtypes
def test_more_queries_than_keys(executor, dtype, seqlen_q):
    """The first N - M queries are older than every key, and see nothing if the call is causal."""
    problem = cached_problem(
        np.random.default_rng(0), lengths=[3, 0, 1, 39], seqlens_q=seqlen_q, heads=(2, 1), head_dims=(32, 32),
        dtype=dtype,
    )  # fmt: skip
    out, lse = assert_right(executor, problem)
    for b, length in enumerate(problem.seqlens_k):
        before = max(0, seqlen_q - length)
        assert not out[b, :before].any() and np.isneginf(lse[b, :, :before]).all()
        assert np.isfinite(lse[b, :, before:]).all()


#: D and E at the edges of buckets and inside of them; pairs of different buckets among them.
HEAD_DIMS = (
    *((1, 1), (2, 30), (33, 64), (63, 40), (72, 96), (96, 65), (128, 128), (127, 100)),
    *((129, 192), (192, 192), (193, 256), (256, 256), (32, 256), (256, 32)),
)


@pytest.mark.parametrize("head_dims", HEAD_DIMS, ids=str)
def test_head_dims(executor, head_dims):
    problem = cached_problem(
        np.random.default_rng(0), lengths=[37, 70], seqlens_q=1, heads=(2, 1), head_dims=head_dims, page_size=5
    )
    assert_right(executor, problem, num_splits=2)


#: Every remainder of 8 in every bucket, and both sides of each of its edges.
EVERY_THIRD = sorted({*range(1, 513, 3), *(size + side for size in HEAD_DIM_BUCKETS[:-1] for side in (-1, 0, 1)), 512})


@pytest.mark.slow
def test_every_head_dim(executor):
    for head_dim in EVERY_THIRD:
        problem = cached_problem(
            np.random.default_rng(head_dim), lengths=[9, 70], seqlens_q=1, heads=(2, 1), head_dims=(head_dim,) * 2,
            page_size=5,
        )  # fmt: skip
        assert_right(executor, problem, num_splits=2)


@examples(25)
@given(problem=cached_problems(**{**FEW, "head_dims": st.just((32, 32))}, layout=aligned_layouts()))
def test_layouts_do_not_change_a_bit(executor, problem):
    """Head-major and padded arrays among NaN give what contiguous ones give."""
    q, k, v = (place(x) for x in problem.arrays[:3])
    assert_equal(call(executor, problem), call(executor, replace(problem, q=q, k=k, v=v)))


@examples(20)
@given(problem=cached_problems(**FEW), layout=layouts())
def test_out_is_written_in_place_and_nothing_beside_it(executor, problem, layout):
    q = problem.q.array
    target = executor.guarded((*q.shape[:3], problem.head_dim_v), q.dtype, layout)
    arrays, options = prepare(executor, problem, num_splits=2)
    function = cuattn.decode_attention if problem.kind == "decode" else cuattn.paged_attention
    assert function(*arrays, out=target.array, **options) is target.array
    target.check()
    check(problem, executor.numpy(target.array))


@pytest.mark.smoke
@dtypes
@pytest.mark.parametrize("shape", [(0, 1, 4), (2, 0, 4), (2, 1, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("page_size", (None, 4))
def test_empty_axes(executor, dtype, shape, page_size):
    batch, seqlen_q, num_heads = shape
    lengths = [5] * batch
    problem = cached_problem(
        np.random.default_rng(0), lengths=lengths, seqlens_q=seqlen_q, heads=(num_heads, min(num_heads, 2)),
        head_dims=(32, 24), dtype=dtype, page_size=page_size,
    )  # fmt: skip
    out, lse = call(executor, problem)
    assert out.shape == (batch, seqlen_q, num_heads, 24) and out.dtype == dtype
    assert lse.shape == (batch, num_heads, seqlen_q) and lse.dtype == accumulation_dtype(dtype)


@pytest.mark.parametrize("num_splits", (1, 4))
@dtypes
def test_a_cache_of_nothing(executor, dtype, num_splits):
    """No slot, no page: every sequence is empty, and a sink is all there is."""
    q = executor.array(np.ones((2, 1, 2, 32), dtype))
    empty = executor.array(np.ones((2, 0, 1, 32), dtype))
    no_pages = executor.array(np.ones((0, 4, 1, 32), dtype))
    sinks = executor.array(np.float32([0.5, -2.0]))
    for options, expected in (({}, -np.inf), ({"sinks": sinks}, [[0.5], [-2.0]])):
        options = {**options, "num_splits": num_splits, "return_lse": True}
        results = (
            cuattn.decode_attention(q, empty, empty, [0, 0], **options),
            cuattn.paged_attention(q, no_pages, no_pages, np.zeros((2, 0), np.int32), [0, 0], **options),
            cuattn.paged_attention(q, no_pages, no_pages, np.full((2, 3), -1, np.int32), [0, 0], **options),
        )
        for out, lse in results:
            assert not executor.numpy(out).any()
            np.testing.assert_allclose(executor.numpy(lse), np.broadcast_to(expected, (2, 2, 1)))


def test_a_page_may_be_in_many_tables(executor):
    """A shared prefix; and one page that stands twice in one table."""
    rng = np.random.default_rng(0)
    problem = cached_problem(rng, lengths=[40, 40, 40], seqlens_q=1, heads=(2, 1), head_dims=(32, 32), page_size=8)
    problem.block_tables[1, :3] = problem.block_tables[0, :3]
    problem.block_tables[2, :5] = problem.block_tables[2, 3]
    assert_right(executor, problem, num_splits=2)


@pytest.mark.parametrize(
    "layout", [Layout(order=(0, 2, 1, 3)), Layout(pad=(1, 2, 3, 0)), Layout(pad=(0, 3, 0, 5))], ids=str
)
@two_dtypes
def test_pages_in_any_layout(executor, dtype, layout):
    """Head-major pages as a transposed view; pages, slots and heads with gaps between them, of NaN; k and v unlike."""
    problem = cached_problem(
        np.random.default_rng(0), lengths=[33, 70, 1], seqlens_q=5, heads=(4, 2), head_dims=(32, 32), dtype=dtype,
        page_size=7, layouts=(None, layout, Layout(pad=(3, 0, 0, 0))),
    )  # fmt: skip
    assert_right(executor, problem)
