"""How the tokens of a rank lie in memory while a ring turns: by slots.

A slot is what a rank holds of one chunk of a sequence, or of packed sequences the same chunk of each, one after
another: so a slot is a piece of memory, and a call of attention takes two of them. Callers have packed sequences one
after another; with two chunks of each, tokens are put in the order of slots first.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cuattn.distributed.partitions import Strip, strips

__all__ = ["Layout", "Slot", "layout"]


class Slot(NamedTuple):
    """Tokens ``first`` to ``end`` of a rank: a strip of each sequence, or that of the one with number ``sequence``."""

    first: int
    end: int
    strips: tuple[Strip, ...]
    sequence: int | None = None

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(strip.length for strip in self.strips)

    @property
    def cu_seqlens(self) -> NDArray[np.int32]:
        return np.concatenate([[0], np.cumsum(self.counts, dtype=np.int64)]).astype(np.int32)

    def one_by_one(self) -> tuple[Slot, ...]:
        """Return the strips of the sequences as slots of their own."""
        ends = self.first + np.cumsum(self.counts, dtype=np.int64)
        return tuple(
            Slot(int(end) - strip.length, int(end), (strip,), number)
            for number, (end, strip) in enumerate(zip(ends, self.strips, strict=True))
        )

    @property
    def longest(self) -> int:
        return max(self.counts, default=0)


class Layout(NamedTuple):
    """The slots of a rank. ``order``: where the caller has the token of each place; None where places are the same."""

    tokens: int
    slots: tuple[Slot, ...]
    order: NDArray[np.int64] | None


@lru_cache(maxsize=1024)
def layout(lengths: tuple[int, ...], rank: int, size: int, kind: str) -> Layout:
    """Return what a rank holds of sequences of these lengths.

    >>> layout((4, 8), 0, 2, "zigzag").slots[1]
    Slot(first=3, end=6, strips=(Strip(start=3, length=1, step=1), Strip(start=6, length=2, step=1)), sequence=None)
    >>> layout((4, 8), 0, 2, "zigzag").order.tolist()
    [0, 2, 3, 1, 4, 5]
    """
    of_sequences = [strips(n, rank, size, kind) for n in lengths]
    num_slots = 2 if kind == "zigzag" else 1
    slots, places, first = [], [], 0
    held = np.cumsum([0, *(sum(strip.length for strip in sequence) for sequence in of_sequences)])
    for number in range(num_slots):
        chosen = tuple(sequence[number] for sequence in of_sequences)
        slots.append(Slot(first, first + sum(strip.length for strip in chosen), chosen))
        first = slots[-1].end
        for begin, sequence in zip(held, of_sequences, strict=False):
            before = sum(strip.length for strip in sequence[:number])
            places.append(begin + before + np.arange(sequence[number].length))
    order = np.concatenate([np.zeros(0, np.int64), *places]).astype(np.int64)
    return Layout(first, tuple(slots), None if (np.diff(order) == 1).all() and not order[:1].any() else order)
