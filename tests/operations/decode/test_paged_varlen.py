"""paged_attention_varlen: prefill and decode in one batch, each sequence with as many queries as it has."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cached_calls import assert_equal, assert_right, assert_same, call
from hypothesis import given
from hypothesis import strategies as st

from cuattn.ops.decode import arguments
from cuattn.ops.decode.launch import decode
from cuattn.testing.arrays import place
from cuattn.testing.decode_problems import cached_problem
from cuattn.testing.decode_strategies import cache_lengths, packed_problems
from cuattn.testing.strategies import DTYPES, aligned_layouts, examples

PLAIN = {
    "head_dims": st.sampled_from([(32, 32), (24, 32)]),
    "heads": st.sampled_from([(2, 1), (4, 2)]),
    "seqlen_q": st.sampled_from([1, 1, 5, 0, 17]),
    "lengths": cache_lengths(150),
}


def mixed(dtype, seed=0, **more):
    """A prefill of a whole prompt, one of a chunk, decoding, speculation, a sequence without queries, and no keys."""
    return cached_problem(
        np.random.default_rng(seed), lengths=[70, 130, 64, 1, 33, 0, 9], seqlens_q=[70, 30, 1, 1, 0, 0, 5],
        heads=(4, 2), head_dims=(32, 32), dtype=dtype, page_size=16, **more,
    )  # fmt: skip


@pytest.mark.smoke
@examples(30)
@given(problem=packed_problems(**PLAIN, dtype=st.sampled_from(DTYPES[::2]), options=("scale", "num_splits")))
def test_agrees_with_the_reference(executor, problem):
    assert_right(executor, problem)


@pytest.mark.parametrize("num_splits", (1, 3, None))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prefill_and_decode_together(executor, dtype, num_splits):
    problem = mixed(dtype, num_splits=num_splits)
    result = assert_right(executor, problem)
    longest = int(np.diff(problem.cu_seqlens_q).max())
    assert_equal(call(executor, problem, max_seqlen_q=longest), result)


@examples(12)
@given(
    problem=packed_problems(
        **PLAIN, dtype=st.sampled_from(DTYPES[::2]), layout=st.just(None), options=("scale", "sinks")
    )
)
def test_equals_a_loop_over_sequences(executor, problem):
    out, lse = call(executor, problem)
    for b, (start, end) in enumerate(zip(problem.cu_seqlens_q, problem.cu_seqlens_q[1:], strict=False)):
        alone = replace(
            problem, q=place(problem.q.array[None, start:end]), cu_seqlens_q=None,
            seqlens_k=problem.seqlens_k[b : b + 1], block_tables=problem.block_tables[b : b + 1],
        )  # fmt: skip
        assert_same(alone, (out[None, start:end], lse[None, :, start:end]), call(executor, alone))


@examples(15)
@given(dtype=st.sampled_from(DTYPES), layout=aligned_layouts(3), seed=st.integers(0, 999))
def test_out_is_written_in_place_and_nothing_beside_it(executor, dtype, layout, seed):
    problem = mixed(dtype, seed, num_splits=2)
    expected, _ = call(executor, problem)
    target = executor.guarded(expected.shape, dtype, layout)
    call(executor, problem, out=target.array)
    target.check()
    assert_equal([executor.numpy(target.array)], [expected])


@pytest.mark.parametrize("num_splits", (1, 2))
@pytest.mark.parametrize("dtype", DTYPES[:3:2], ids=str)
def test_lengths_that_only_a_device_knows(executor, dtype, num_splits):
    """Nothing but the number of tokens is known when the kernels are launched."""
    problem = mixed(dtype, num_splits=num_splits)
    told = arguments.check_paged_varlen(*map(executor.array, problem.arrays), num_splits=num_splits)
    told.host_seqlens_q = told.host_seqlens_k = told.max_seqlen_q = None
    out, lse = decode(told, return_lse=True)
    assert_same(problem, (executor.numpy(out), executor.numpy(lse)), call(executor, problem))


def test_same_bits_in_any_schedule(executor):
    problem = mixed(DTYPES[0], num_splits=3)
    expected = call(executor, problem)
    for asynchrony, seed in (("random", 2), ("random", 3), ("eager", 4)):
        with executor.active(asynchrony=asynchrony, seed=seed):
            assert_equal(call(executor, problem), expected)
