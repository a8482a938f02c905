"""Tables and lengths that nobody has looked at, as they come from a device: whatever they hold, no foreign memory.

The arguments are checked with good numbers, and changed before the launch. The memory checker of the host executor
knows every array of the call; a load from anywhere else fails the test.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cached_calls import check, prepare
from hypothesis import given
from hypothesis import strategies as st

from cuattn.ops.decode import arguments
from cuattn.ops.decode.launch import decode
from cuattn.testing.decode_problems import GARBAGE, cached_problem
from cuattn.testing.strategies import DTYPES, examples

PAGES, PAGE_SIZE, COLUMNS = 5, 4, 6
LENGTHS = st.sampled_from([0, 1, 7, 23, 24, 25, 1000, -1, -5, 2**31 - 1, -(2**31)])
CHECKS = {
    "decode": arguments.check,
    "paged": arguments.check_paged,
    "varlen": arguments.check_paged_varlen,
}


def unchecked(executor, problem, num_splits):
    """The result of a call whose lengths and tables no check has seen."""
    harmless = replace(problem, seqlens_k=np.zeros_like(problem.seqlens_k))
    given, options = prepare(executor, harmless)
    told = CHECKS[problem.kind](*given, num_splits=num_splits, **options)
    told.seqlens_k = executor.array(problem.seqlens_k)
    told.host_seqlens_k = None
    out, lse = decode(told, return_lse=True)
    return executor.numpy(out), executor.numpy(lse)


@examples(40)
@given(
    dtype=st.sampled_from(DTYPES[::2]),
    kv_format=st.sampled_from([None, None, "nvfp4"]),
    lengths=st.lists(LENGTHS, min_size=3, max_size=3),
    seqlens_q=st.sampled_from([1, [5, 0, 1]]),
    num_splits=st.sampled_from([1, 3]),
    seed=st.integers(0, 999),
)
def test_pages_that_do_not_exist_are_zeros(executor, dtype, kv_format, lengths, seqlens_q, num_splits, seed):
    """Lengths are cut to what the table has room for, and to 0."""
    rng = np.random.default_rng(seed)
    problem = cached_problem(
        rng, lengths=[COLUMNS * PAGE_SIZE] * 3, seqlens_q=seqlens_q, heads=(2, 1), head_dims=(32, 32), dtype=dtype,
        kv_format=kv_format, page_size=PAGE_SIZE, room=0,
    )  # fmt: skip
    tables = problem.block_tables[:, :COLUMNS].copy()
    wrong = rng.random(tables.shape) < 0.3
    tables[wrong] = rng.choice(GARBAGE, int(wrong.sum()))
    tables[tables == problem.k.array.shape[0] - 1] = -1  # where the spare page of poison may be
    usable = np.isin(tables, problem.block_tables[:, :COLUMNS])
    tables = np.where(usable, tables, -1 - np.abs(tables.astype(np.int64) % 7)).astype(np.int32)
    problem = replace(problem, block_tables=tables, seqlens_k=np.array(lengths, np.int64).astype(np.int32))
    out, lse = unchecked(executor, problem, num_splits)
    check(problem, out, lse)


@pytest.mark.parametrize("num_splits", (1, 2))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lengths_beyond_a_contiguous_cache(executor, dtype, num_splits):
    problem = cached_problem(
        np.random.default_rng(0), lengths=[20, 20, 20, 20], seqlens_q=1, heads=(2, 1), head_dims=(32, 32),
        dtype=dtype, room=0,
    )  # fmt: skip
    problem = replace(problem, seqlens_k=np.int32([21, 2**31 - 1, -1, 20]))
    out, lse = unchecked(executor, problem, num_splits)
    check(problem, out, lse)


@pytest.mark.parametrize("page", GARBAGE)
@pytest.mark.parametrize("dtype", DTYPES[:3:2], ids=str)
def test_every_garbage_page(executor, dtype, page):
    """Pages far outside, in a table that is garbage from its first entry on."""
    problem = cached_problem(
        np.random.default_rng(0), lengths=[8], seqlens_q=1, heads=(2, 1), head_dims=(32, 32), dtype=dtype,
        page_size=PAGE_SIZE,
    )  # fmt: skip
    problem.k.array[np.isnan(problem.k.array)] = 0
    problem.v.array[np.isnan(problem.v.array)] = 0
    problem.block_tables[:] = page
    out, lse = unchecked(executor, problem, 2)
    check(problem, out, lse)


def test_lengths_and_pages_that_nobody_has_checked(executor, form):
    """As they come from a device: lengths are cut, and what lies on pages that do not exist is zeros."""
    problem = cached_problem(np.random.default_rng(8), lengths=[32] * 4, seqlens_q=1, heads=(2, 1), room=0, **form)
    wrong = replace(problem, seqlens_k=np.int32([33, 2**31 - 1, -1, 32]))
    check(wrong, *unchecked(executor, wrong, 2))
    paged = problem.in_pages(np.random.default_rng(9), 8, spare_pages=0)
    tables = paged.block_tables.copy()
    tables[:, 1] = 16, -1, 2**31 - 1, -(2**31)  # there are 16 pages
    wrong = replace(wrong, k=paged.k, v=paged.v, options=paged.options, block_tables=tables[:, :4].copy())
    check(wrong, *unchecked(executor, wrong, 2))


def test_lengths_that_only_the_device_knows(executor, form):
    """The list of work is made there, for as many blocks as there could be: the last ones are no work."""
    problem = cached_problem(
        np.random.default_rng(10), lengths=[130, 40, 7, 9], seqlens_q=[7, 1, 0, 2], heads=(6, 2), page_size=16, **form
    )
    given, options = prepare(executor, problem, num_splits=2)
    told = arguments.check_paged_varlen(*given, **options)
    told.host_seqlens_q = told.host_seqlens_k = told.max_seqlen_q = None
    out, lse = decode(told, return_lse=True)
    check(problem, executor.numpy(out), executor.numpy(lse))
