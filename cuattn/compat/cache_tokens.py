"""Tokens of a batch as a call with a cache has them: as many of every sequence, or packed, sequence by sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cuattn.errors import ShapeError
from cuattn.ops.attention.sequences import check_cu_seqlens
from cuattn.ops.decode.lengths import integers
from cuattn.runtime.executor import Executor

__all__ = ["Tokens", "packed_tokens", "tokens_of_each"]


@dataclass(slots=True)
class Tokens:
    """How many tokens each sequence has, and which sequence a token is of."""

    batch: int
    total: int
    each: int | None  # tokens of every sequence; None if packed
    starts: Any  # cu_seqlens, [batch + 1]; None if not packed
    seen: Any  # of each sequence, where the host can look: an int, or [batch]

    def counts(self, xp: Any) -> Any:
        """Tokens of each sequence: an int, or an array [batch] of ``xp``."""
        if self.each is not None:
            return self.each
        starts = xp.asarray(self.starts)
        return starts[1:] - starts[:-1]

    def counted_from(self, xp: Any, first: Any, consecutive: bool = True) -> tuple[Any, Any]:
        """The sequence of each packed token, and its number where its sequence counts from ``first``; both [total].

        Without ``consecutive`` all tokens of a sequence have the number of the first.
        """
        token, starts = xp.arange(self.total, dtype=np.int32), xp.asarray(self.starts)
        sequence = xp.minimum(xp.searchsorted(starts[1:], token, side="right"), max(self.batch - 1, 0))
        numbers = first[sequence]
        return sequence, numbers + (token - starts[sequence]) if consecutive else numbers

    def numbers(self, xp: Any, first: Any, consecutive: bool = True) -> Any:
        """The number of every token where its sequence counts from ``first``: [batch, each], or [total] if packed."""
        if self.each is None:
            return self.counted_from(xp, first, consecutive)[1]
        steps = xp.arange(self.each, dtype=np.int32)
        return first[:, None] + (steps if consecutive else xp.zeros_like(steps))


def tokens_of_each(batch: int, each: int) -> Tokens:
    """Return the tokens of a batch with ``each`` tokens in each of ``batch`` sequences."""
    return Tokens(batch, batch * each, each, None, each)


def packed_tokens(executor: Executor, name: str, cu_seqlens: Any, batch: int | None, total: int) -> Tokens:
    """Return the tokens that ``cu_seqlens``, the argument ``name``, divides; checked where the host sees it."""
    given = integers(executor, name, cu_seqlens, None if batch is None else batch + 1, 1, "[batch + 1]")
    if not given.array.size:
        raise ShapeError(f"{name} has shape [0]; [batch + 1] is needed")
    counts = None
    if given.seen is not None:
        check_cu_seqlens(name, given.seen.astype(np.int64), total, name, None)
        counts = np.diff(given.seen.astype(np.int64))
    return Tokens(int(given.array.shape[0]) - 1, total, None, given.array, counts)
