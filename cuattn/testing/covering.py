"""Pairwise covering arrays: few combinations of options in which every two values meet.

Most faults of combined options need two of them. A table in which every pair of values of every pair of factors stands
in some row finds those with dozens of cases instead of millions. The greedy construction is that of D. M. Cohen, S. R.
Dalal, M. L. Fredman and G. C. Patton, "The AETG system: an approach to testing based on combinatorial design", 1997,
without its random part: the same factors always give the same rows.

>>> rows = covering_array({"causal": [False, True], "bias": [None, "full", "row"], "dropout": [0.0, 0.1]})
>>> len(rows), rows[0]
(6, {'causal': False, 'bias': None, 'dropout': 0.0})
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any

__all__ = ["covering_array", "uncovered_pairs"]

_Value = tuple[int, int]  # (factor, level)


def _pairs_of(row: Sequence[int]) -> set[tuple[_Value, _Value]]:
    return set(combinations(enumerate(row), 2))


def _all_pairs(sizes: Sequence[int]) -> set[tuple[_Value, _Value]]:
    return {
        ((a, level_a), (b, level_b))
        for a, b in combinations(range(len(sizes)), 2)
        for level_a, level_b in product(range(sizes[a]), range(sizes[b]))
    }


def covering_array(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Choose rows with a level of every factor, so that any two levels of any two factors stand together in some row.

    The first row holds the first level of each factor. There are at least as many rows as the two largest factors have
    pairs, and rarely half as many again.
    """
    names, levels = list(factors), [list(values) for values in factors.values()]
    if len(names) == 1:  # there are no pairs to cover
        return [{names[0]: level} for level in levels[0]]
    sizes = [len(values) for values in levels]
    rows: list[list[int]] = []
    missing = _all_pairs(sizes)
    used: Counter[_Value] = Counter()
    while missing or not rows:
        row = [0] * len(sizes) if not rows else _next_row(sizes, missing, used)
        rows.append(row)
        missing -= _pairs_of(row)
        used.update(enumerate(row))
    return [{name: levels[i][level] for i, (name, level) in enumerate(zip(names, row, strict=True))} for row in rows]


def _next_row(sizes: Sequence[int], missing: set[tuple[_Value, _Value]], used: Counter[_Value]) -> list[int]:
    """Choose the best of some rows, each begun with a value of many missing pairs and continued factor by factor."""
    open_pairs: Counter[_Value] = Counter(value for pair in missing for value in pair)
    # Ties are broken by how often a value stands in a row already, then by its position: never by chance.
    starts = sorted(open_pairs, key=lambda value: (-open_pairs[value], used[value], value))[:12]
    best: tuple[int, list[int]] | None = None
    for start in starts:
        chosen = {start[0]: start[1]}
        order = sorted(range(len(sizes)), key=lambda i: -sum(open_pairs[i, level] for level in range(sizes[i])))
        for factor in order:
            if factor not in chosen:
                chosen[factor] = min(
                    range(sizes[factor]),
                    key=lambda level: (
                        -_gain((factor, level), chosen, missing),
                        -open_pairs[factor, level],
                        used[factor, level],
                    ),
                )
        row = [chosen[i] for i in range(len(sizes))]
        gain = len(_pairs_of(row) & missing)
        if best is None or gain > best[0]:
            best = gain, row
    assert best is not None  # something is missing, so there is a start
    return best[1]


def _gain(value: _Value, chosen: Mapping[int, int], missing: set[tuple[_Value, _Value]]) -> int:
    """Count how many missing pairs `value` makes with the values that are chosen."""
    return sum((min(value, other), max(value, other)) in missing for other in chosen.items())


def uncovered_pairs(
    factors: Mapping[str, Sequence[Any]], rows: Sequence[Mapping[str, Any]]
) -> list[tuple[tuple[str, Any], tuple[str, Any]]]:
    """Find the pairs of levels that stand together in no row; of a covering array there are none."""
    result = []
    for (a, levels_a), (b, levels_b) in combinations(factors.items(), 2):
        for one, other in product(levels_a, levels_b):
            if not any(_same(row[a], one) and _same(row[b], other) for row in rows):
                result.append(((a, one), (b, other)))
    return result


def _same(x: Any, y: Any) -> bool:
    return x is y or (type(x) is type(y) and bool(x == y))
