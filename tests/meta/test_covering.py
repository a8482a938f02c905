"""Covering arrays cover, are small, and are always the same."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cuattn.testing.covering import covering_array, uncovered_pairs
from cuattn.testing.strategies import examples

SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=9)


def numbered(sizes):
    return {f"factor_{i}": list(range(size)) for i, size in enumerate(sizes)}


@examples(60)
@given(SIZES)
def test_every_pair_is_covered(sizes):
    factors = numbered(sizes)
    rows = covering_array(factors)
    assert uncovered_pairs(factors, rows) == []
    assert all(list(row) == list(factors) and all(row[name] in factors[name] for name in row) for row in rows)
    assert rows[0] == dict.fromkeys(factors, 0)
    assert rows == covering_array(factors)
    largest = sorted(sizes)[-2:]
    fewest = largest[0] * largest[1] if len(largest) == 2 else largest[0]
    assert fewest <= len(rows) <= 1.6 * fewest + 5


def test_a_missing_row_is_noticed():
    """Every row is needed for something: without it, some pair is uncovered."""
    factors = numbered([3, 3, 2, 2])
    rows = covering_array(factors)
    for i in range(len(rows)):
        if not uncovered_pairs(factors, rows[:i] + rows[i + 1 :]):
            assert i == 0  # the row of first levels is there for its own sake
    assert (("factor_0", 0), ("factor_1", 0)) in uncovered_pairs(factors, [row for row in rows if row["factor_0"]])


def test_levels_are_told_apart_by_type():
    """False and 0, 1 and True are different levels."""
    factors = {"a": [False, 0, None], "b": [1, True]}
    rows = covering_array(factors)
    assert len(rows) == 6 and uncovered_pairs(factors, rows) == []
    assert len(uncovered_pairs(factors, [row for row in rows if row["a"] is not False])) == 2


def test_arrays_of_known_size():
    assert len(covering_array(numbered([2, 2, 2]))) <= 5  # 4 is the least
    assert len(covering_array(numbered([2] * 10))) <= 9  # 6 is the least
    assert len(covering_array(numbered([3] * 4))) <= 12  # 9 is the least
    assert len(covering_array({"one": ["level"]})) == 1
