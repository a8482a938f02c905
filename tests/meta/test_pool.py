"""The pool of kernel variants: every two of their factors meet in it, and problems drawn from it stay in it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cuattn.head_dims import BUCKETS
from cuattn.ops.attention.forward.config import FLASH_FWD_CONFIGS, select
from cuattn.ops.attention.variants import ForwardOptions
from cuattn.testing.covering import uncovered_pairs
from cuattn.testing.pool import FACTORS, POOL, Blessed, pooled
from cuattn.testing.strategies import BOUNDS, OPTIONS, attention_problems, examples

#: Options of a problem whose kernel is one without options, or with bounds alone.
FEW = ("scale", "causal")


def asked_for(problem):
    """What a forward call with the problem is compiled for."""
    q, _, v = problem.arrays
    aligned = not any(
        x.ctypes.data % 16 or any(s % 16 for s, n in zip(x.strides[:-1], x.shape, strict=False) if n > 1)
        for x in problem.arrays
    )
    bounded = any(name in problem.options for name in BOUNDS)
    return Blessed(q.dtype, (BUCKETS[q.shape[3]], BUCKETS[v.shape[3]]), aligned, bounded)


def test_every_two_factors_meet():
    rows = [{name: getattr(one, name) for name in FACTORS} for one in POOL]
    assert uncovered_pairs(FACTORS, rows) == []
    assert len(POOL) == len(set(POOL)) < 30


@examples(200)
@given(problem=attention_problems(variants=st.sampled_from(POOL), options=FEW))
def test_problems_stay_in_it(problem):
    """Whatever their shapes and layouts are."""
    assert asked_for(problem) in POOL


@examples(60)
@given(variant=st.sampled_from(POOL), data=st.data())
def test_a_problem_is_of_its_variant(variant, data):
    problem = data.draw(attention_problems(variants=st.just(variant), options=OPTIONS, max_seqlen=20))
    assert asked_for(problem) == variant


def test_factors_are_chosen_by_name():
    chosen = pooled(buckets=((32, 32),), bounded=(False,))
    drawn = set()

    @examples(80)
    @given(variant=chosen)
    def collect(variant):
        drawn.add(variant)

    collect()
    assert drawn == {one for one in POOL if one.buckets == (32, 32) and not one.bounded}


@pytest.mark.parametrize("limit_kib", (99, 227))
def test_rows_of_the_pool(limit_kib):
    """Each kind of products, few queries and many: the other rows are run by the tests that go through the tables."""
    rows = {
        select(one.dtype, *one.buckets, seqlen_q=seqlen_q, smem_limit_bytes=limit_kib * 1024,
               options=ForwardOptions(bound_right=one.bounded))
        for one in POOL for seqlen_q in (1, 130)
    }  # fmt: skip
    assert {(row.products, row.itemsize) for row in rows} == {("mma", 2), ("fma", 4), ("fma", 8)}
    assert {row.max_seqlen_q > 0 for row in rows} == {True, False}
    assert rows < set(FLASH_FWD_CONFIGS)
