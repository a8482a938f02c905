"""The builders of grids against their definitions, block by block or element by element."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cuattn
from cuattn import BlockMask, reference
from cuattn.testing.strategies import examples

LENGTHS = st.one_of(st.sampled_from((0, 1, 16)), st.integers(0, 60))
SIZES = st.one_of(st.integers(1, 12), st.tuples(st.integers(1, 12), st.integers(1, 12)))
GRIDS = st.tuples(st.integers(0, 12), st.integers(0, 12))
SIDES = st.one_of(st.none(), st.integers(0, 70))


def pair(size: Any) -> tuple[int, int]:
    return size if isinstance(size, tuple) else (size, size)


@examples(60)
@given(lengths=st.tuples(LENGTHS, LENGTHS), size=SIZES, left=SIDES, right=SIDES)
def test_local(lengths: Any, size: Any, left: Any, right: Any) -> None:
    grid = cuattn.local_mask(*lengths, size, left, right)
    assert grid.dtype == bool
    np.testing.assert_array_equal(grid, reference.local_mask(*lengths, pair(size), left, right))
    mask = BlockMask.from_blocks(grid, *lengths, size)
    window = reference.visible(*lengths, window=(left, right))[0, 0]
    assert mask.todense()[window].all()  # with window=(left, right) beside it, the mask hides nothing more


@examples(60)
@given(grid=GRIDS, stride=st.integers(1, 5), local=st.integers(0, 4))
def test_strided(grid: Any, stride: int, local: int) -> None:
    kept = cuattn.strided_mask(*grid, stride, local)
    assert kept.shape == grid and kept.dtype == bool
    np.testing.assert_array_equal(kept, reference.strided_mask(*grid, stride, local))


@examples(60)
@given(grid=GRIDS, data=st.data())
def test_global(grid: Any, data: st.DataObject) -> None:
    nk = grid[1]
    chosen = data.draw(st.lists(st.integers(-nk, nk - 1), max_size=4)) if nk else []
    kept = cuattn.global_mask(*grid, chosen)
    np.testing.assert_array_equal(kept, reference.global_mask(*grid, [n % nk for n in chosen]))
    np.testing.assert_array_equal(kept, cuattn.global_mask(*grid, np.array(chosen, np.int16)))
    few = data.draw(st.integers(0, nk))
    np.testing.assert_array_equal(cuattn.global_mask(*grid, few), cuattn.global_mask(*grid, list(range(few))))


@examples(60)
@given(grid=GRIDS, sinks=st.integers(0, 4), local=st.integers(0, 4))
def test_streaming(grid: Any, sinks: int, local: int) -> None:
    kept = cuattn.streaming_mask(*grid, sinks, local)
    np.testing.assert_array_equal(kept, reference.streaming_mask(*grid, sinks, local))


@examples(60)
@given(lengths=st.tuples(LENGTHS, LENGTHS), size=SIZES, data=st.data())
def test_vertical_slash(lengths: Any, size: Any, data: st.DataObject) -> None:
    numbers = st.lists(st.integers(-1, lengths[1] - 1), max_size=4)
    vertical, slash = data.draw(numbers), data.draw(numbers)
    kept = cuattn.vertical_slash_mask(*lengths, size, vertical, slash)
    one = reference.vertical_slash_mask(*lengths, pair(size), vertical, [n for n in slash if n >= 0])
    np.testing.assert_array_equal(kept, one)
    heads = np.array([slash, [-1] * len(slash)]).reshape(2, 1, len(slash))
    both = cuattn.vertical_slash_mask(*lengths, size, [vertical], heads)
    assert both.shape == (2, 1, *kept.shape)
    np.testing.assert_array_equal(both[0, 0], kept)
    np.testing.assert_array_equal(both[1, 0], reference.vertical_slash_mask(*lengths, pair(size), vertical, []))


COUNTS = st.fixed_dictionaries(
    {
        "num_window": st.integers(0, 5),
        "num_global": st.integers(0, 3),
        "num_random": st.integers(0, 4),
        "seed": st.sampled_from((0, 1, 2**64, 2**128 - 1)),
        "causal": st.booleans(),
    }
)


@examples(60)
@given(grid=GRIDS, counts=COUNTS)
def test_bigbird(grid: Any, counts: Any) -> None:
    kept = cuattn.bigbird_mask(*grid, **counts)
    np.testing.assert_array_equal(kept, reference.bigbird_mask(*grid, **counts))
    if counts["causal"]:
        assert not np.triu(kept, grid[1] - grid[0] + 1).any()
    # Random blocks are beside the others, never some of them again.
    without = cuattn.bigbird_mask(*grid, **{**counts, "num_random": 0})
    assert (kept | without == kept).all()
    room = (np.tri(*grid, grid[1] - grid[0]) if counts["causal"] else np.ones(grid)).sum(axis=1)
    more = np.minimum(counts["num_random"], room - without.sum(axis=1))
    np.testing.assert_array_equal(kept.sum(axis=1) - without.sum(axis=1), more)


@pytest.mark.parametrize(
    ("counts", "rows"),
    [
        (
            {"num_random": 1},
            ["########", "###.#..#", "#####..#", "#.###.##", "##.###.#", "##..####", "#..#.###", "########"],
        ),
        (
            {"num_window": 2, "num_global": 0, "num_random": 2, "seed": 7},
            ["#.#....#", "###....#", "###..#..", "..###..#", "...##.##", "..#.##.#", "#...###.", ".#.#..##"],
        ),
        (
            {"num_random": 2, "seed": 2**100 + 1, "causal": True},
            ["#.......", "##......", "###.....", "####....", "#####...", "##.###..", "#.##.##.", "########"],
        ),
    ],
    ids=str,
)
def test_bigbird_draws_the_same_blocks_everywhere(counts: Any, rows: Any) -> None:
    kept = cuattn.bigbird_mask(8, 8, **counts)
    assert ["".join(".#"[int(block)] for block in row) for row in kept] == rows


def test_the_first_and_the_last_blocks_see_all_and_are_seen_by_all() -> None:
    kept = cuattn.bigbird_mask(9, 9, num_window=0, num_global=2, num_random=0)
    inner = slice(2, -2)
    assert not kept[inner, inner].any()
    kept[inner, inner] = True
    assert kept.all()


def test_child_s_pattern_by_blocks_of_one_element() -> None:
    """Blocks of one element: the pattern of `strided_attention` by columns, not by distances."""
    kept = cuattn.strided_mask(9, 9, stride=3, local=1)
    i, j = np.indices((9, 9))
    np.testing.assert_array_equal(kept, (i == j) | (j % 3 == 2))
