"""Attention between two strips of tokens, as one or two calls of attention on them.

With queries at positions sq + d a and keys at sk + d b, d the step of both, query a is aligned with the position of key
``a + (sq + o - sk) / d``. Where d is 1 that is another diagonal, and everything else stays: causal masks, windows and
ALiBi are those of the whole sequence. With d > 1, the bounds of a band of b - a are rounded inwards, and

* ALiBi, slope |i + o - j|, is d slope |a + x - b| and a constant for all pairs on one side of the diagonal, with x the
  diagonal rounded down: the constant is added to the lse of the call afterwards (and before its gradients). Keys after
  the diagonal, if any are visible, are another call, with x rounded up.

>>> list(pieces(Strip(8, 4), Strip(4, 4), Band(offset=0, right=0)))
[Piece(diagonal=4, window=(None, 0), slope_factor=1, slope_shift=0)]
>>> list(pieces(Strip(1, 4, 3), Strip(2, 4, 3), Band(offset=0, right=0)))
[Piece(diagonal=-1, window=(None, 0), slope_factor=3, slope_shift=2)]
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from cuattn.distributed.partitions import Strip

__all__ = ["Band", "Piece", "pairs_in_band", "pieces"]


class Band(NamedTuple):
    """Keys i + o - left to i + o + right are visible to query i, None on a side without a bound."""

    offset: int = 0
    left: int | None = None
    right: int | None = None


class Piece(NamedTuple):
    """A call: its diagonal, the window around it, and what becomes of ALiBi's slopes.

    Logits are ``slope_shift * slope`` above those of the whole sequence.
    """

    diagonal: int
    window: tuple[int | None, int | None]
    slope_factor: int = 1
    slope_shift: int = 0


def pieces(queries: Strip, keys: Strip, band: Band, *, alibi: bool = True) -> Iterator[Piece]:
    """Yield the calls for two strips of one step; none where no key is visible."""
    step, shift = queries.step, queries.start + band.offset - keys.start
    # in units of steps: low <= b - a <= high
    low = None if band.left is None else -((band.left - shift) // step)
    high = None if band.right is None else (shift + band.right) // step
    if not _meets(queries.length, keys.length, low, high):
        return
    if step == 1:
        yield Piece(shift, (band.left, band.right))
        return
    below, rest = divmod(shift, step)  # what lies before the diagonal, and on it, has b - a <= below
    if not alibi:
        yield _piece(below if low is None else max(below, low), low, high)
        return
    before = below if high is None else min(high, below)
    if _meets(queries.length, keys.length, low, before):
        yield _piece(below, low, before, step, rest)
    behind = below + 1 if low is None else max(low, below + 1)
    if (high is None or high > below) and _meets(queries.length, keys.length, behind, high):
        yield _piece(below + 1, behind, high, step, step - rest)


def _piece(diagonal: int, low: int | None, high: int | None, factor: int = 1, shift: int = 0) -> Piece:
    """Return the call whose keys have low <= b - a <= high, around the diagonal wherever a window reaches that far."""
    return Piece(
        diagonal,
        (None if low is None else diagonal - low, None if high is None else high - diagonal),
        factor,
        shift,
    )


def _meets(num_queries: int, num_keys: int, low: int | None, high: int | None) -> bool:
    """Whether a pair of a query and a key has low <= b - a <= high."""
    if not num_queries or not num_keys or (low is not None and high is not None and low > high):
        return False
    return (low is None or low < num_keys) and (high is None or high > -num_queries)


def pairs_in_band(queries: Strip, keys: Strip, band: Band) -> int:
    """Return how many pairs of a query and a key of two strips are visible: the work that they are.

    >>> pairs_in_band(Strip(0, 4), Strip(0, 4), Band(right=0))
    10
    """
    step, shift = queries.step, queries.start + band.offset - keys.start
    low = -keys.length - queries.length if band.left is None else -((band.left - shift) // step)
    high = keys.length + queries.length if band.right is None else (shift + band.right) // step
    total = 0
    for a in range(queries.length):
        total += max(0, min(keys.length - 1, a + high) - max(0, a + low) + 1)
    return total
