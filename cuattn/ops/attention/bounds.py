"""Which keys a query may see because of its position: causal masks, windows and chunks, as hosts plan with them.

>>> Bounds(left=2, right=0).keys(np.array([0, 64]), np.array([63, 99]), np.array([28, 28]), np.array([128, 128]))
(array([26, 90]), array([ 92, 128]))
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cuattn.ops.attention.params import UNBOUNDED

__all__ = ["NO_BOUNDS", "Bounds"]

Integers = NDArray[np.int64]


class Bounds(NamedTuple):
    """Query i sees the keys i + o - left to i + o + right, `UNBOUNDED` on a side where there is no bound.

    The diagonal o is ``offset``, and ``from_end`` the number of keys minus that of queries more. With a ``chunk``,
    the query sees those of them alone that lie with key i + o in one piece of so many keys.
    """

    left: int = UNBOUNDED
    right: int = UNBOUNDED
    from_end: bool = True
    offset: int = 0
    chunk: int = 0

    @property
    def sides(self) -> tuple[bool, bool]:
        """Whether keys may be hidden before, and after, some position: what kernels are compiled for."""
        return self.left != UNBOUNDED or self.chunk != 0, self.right != UNBOUNDED or self.chunk != 0

    def width(self, tokens: int) -> int | None:
        """Keys that ``tokens`` queries in a row see at most; None where that grows with the keys there are."""
        widths = [self.left + self.right + tokens] if UNBOUNDED not in (self.left, self.right) else []
        if self.chunk:  # the first query may be the last of its piece
            widths.append(self.chunk * (1 + -(-(tokens - 1) // self.chunk)))
        return min(widths, default=None)

    def diagonal(self, seqlens_q: Integers, seqlens_k: Integers) -> Integers:
        """o of sequences of so many queries and keys."""
        return (seqlens_k - seqlens_q) * self.from_end + self.offset

    def keys(self, first: Integers, last: Integers, diagonal: Integers, seqlens_k: Integers) -> tuple[Integers, ...]:
        """The first key that one of the queries ``first`` to ``last`` sees, and the one behind the last."""
        begin, end = _stretch(first + diagonal, last + diagonal, self.left, self.right, seqlens_k)
        if self.chunk:
            begin = np.maximum(begin, self._piece(first + diagonal))
            end = np.minimum(end, self._piece(last + diagonal) + self.chunk)
        return np.minimum(begin, seqlens_k), np.maximum(end, 0)

    def queries(self, first: Integers, last: Integers, diagonal: Integers, seqlens_q: Integers) -> tuple[Integers, ...]:
        """The first query that sees one of the keys ``first`` to ``last``, and the one behind the last."""
        begin, end = _stretch(first - diagonal, last - diagonal, self.right, self.left, seqlens_q)
        if self.chunk:
            begin = np.maximum(begin, self._piece(first) - diagonal)
            end = np.minimum(end, self._piece(last) + self.chunk - diagonal)
        return np.minimum(begin, seqlens_q), np.maximum(end, 0)

    def _piece(self, keys: Integers) -> Integers:
        """The first key of the pieces that keys lie in."""
        return keys // self.chunk * self.chunk


NO_BOUNDS = Bounds()


def _stretch(first: Integers, last: Integers, before: int, behind: int, limit: Integers) -> tuple[Integers, ...]:
    """What lies from ``before`` places before ``first`` to ``behind`` places behind ``last``, of 0 to ``limit``."""
    begin, end = np.zeros_like(limit), limit
    if before != UNBOUNDED:
        begin = np.clip(first - before, 0, limit)
    if behind != UNBOUNDED:
        end = np.clip(last + behind + 1, 0, limit)
    return begin, end
