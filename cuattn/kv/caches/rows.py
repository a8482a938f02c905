"""What the caches with a fixed share for each sequence have in common: who has which share, and their steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

from cuattn.errors import CacheFullError
from cuattn.kv.caches.books import Books, OpenStep, reading, transaction
from cuattn.kv.caches.prefix import Node
from cuattn.kv.caches.reservation import Reservation
from cuattn.kv.caches.sequence import (
    Sequence,
    check_sequence,
    check_sequences,
    count_list,
    grow,
    listed,
    new_tokens,
    token_list,
)
from cuattn.kv.caches.step import Step
from cuattn.kv.caches.storage import PageStorage, check_format, check_scales
from cuattn.runtime.executor import executor_of_module
from cuattn.scalars import MAX_EXTENT, integer

__all__ = ["RowCache", "RowSequence", "RowStats"]


class RowSequence(Sequence):
    """A sequence that has one row of a cache for itself; made by ``add()`` of the cache.

    Attributes
    ----------
    row : int
        Which one.
    length : int
        Its tokens so far. A `StreamingKVCache` no longer has all of them.
    tokens : tuple of int
        The tokens that the cache was told. A `StreamingKVCache` does not keep them.
    state : str
        "live" or "freed".
    """

    __slots__ = ("_first",)

    def __init__(self, cache: RowCache, row: int, tokens: list[int]) -> None:
        super().__init__(cache, Node(None, (), 0), tokens)  # no prefixes are looked for here
        self._pages.append(row)
        self._first = 0  # the oldest token behind the sinks that a streaming cache still has

    @property
    def row(self) -> int:
        return self._pages[0]

    def __repr__(self) -> str:
        return f"RowSequence({self._length} tokens in row {self.row}, {self._state})"


@dataclass(frozen=True, slots=True)
class RowStats:
    """The state of a `KVCache` or a `StreamingKVCache` at one moment; made by its ``stats()``.

    Attributes
    ----------
    batch : int
        Sequences that there is room for.
    sequences : int
        Those that there are.
    capacity : int
        Tokens of one sequence that the cache can hold.
    cached : int
        Tokens of all sequences that it holds.
    total : int
        Tokens that all sequences have had since they were made or reset: more than ``cached`` where some were evicted.
    waste : int
        Room for tokens, of the sequences that there are, that none has taken yet.
    nbytes : int
        Bytes of the whole cache, with the scales.
    """

    batch: int
    sequences: int
    capacity: int
    cached: int
    total: int
    nbytes: int

    @property
    def waste(self) -> int:
        return self.sequences * self.capacity - self.cached

    @property
    def waste_fraction(self) -> float:
        """``waste`` as a part of the room that the sequences have; 0 without any."""
        return self.waste / (self.sequences * self.capacity) if self.sequences else 0.0


class RowCache(Books, ABC):
    """Rows that sequences take and give back. Steps, and what fits in a row, are the business of derived classes."""

    _keeps_tokens = True

    def __init__(
        self,
        batch: int,
        pages_per_row: int,
        page_size: int,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: Any,
        head_dim_v: int | None,
        kv_format: str | None,
        k_scale: Any,
        v_scale: Any,
        array_module: Any,
    ) -> None:
        super().__init__()
        self.batch = check_number("batch", batch)
        self.num_layers = check_number("num_layers", num_layers)
        self.num_kv_heads = check_number("num_kv_heads", num_kv_heads)
        self.head_dim = check_number("head_dim", head_dim)
        self.head_dim_v = self.head_dim if head_dim_v is None else check_number("head_dim_v", head_dim_v)
        self.page_size = page_size
        num_pages = self.batch * pages_per_row
        executor_of_module(array_module)
        format_row = check_format(dtype, kv_format, {"head_dim": self.head_dim, "head_dim_v": self.head_dim_v})
        self._storage = PageStorage(
            array_module,
            (num_pages, self.num_layers, page_size, self.num_kv_heads),
            (self.head_dim, self.head_dim_v),
            format_row,
            check_scales(format_row, {"k_scale": k_scale, "v_scale": v_scale}),
        )
        self._free_rows = list(range(self.batch - 1, -1, -1))  # the last one is taken next

    @property
    def kv_format(self) -> str:
        """How the numbers are stored; the name of the dtype if they are not quantized."""
        return self._storage.kv_format.name

    @property
    def nbytes(self) -> int:
        """Bytes of the whole cache, with the scales."""
        return self._storage.nbytes

    @property
    @reading
    def sequences(self) -> tuple[RowSequence, ...]:
        """All sequences that have not been freed, in the order in which they were made."""
        return tuple(sorted(self._sequences, key=lambda seq: seq._number))

    @transaction
    def add(self, tokens: Any = None, cache_key: Hashable = None) -> RowSequence:
        """Add a new, empty sequence.

        Parameters
        ----------
        tokens, cache_key
            As for `PagedKVCache.add`. No prefixes are looked up here: the sequence begins with length 0 in any case.

        Raises
        ------
        CacheFullError
            There are ``batch`` sequences already.
        ArgumentError, ArrayTypeError
            ``tokens`` are no integers.
        """
        known = [] if tokens is None else token_list("tokens", tokens)
        if not self._free_rows:
            raise CacheFullError(f"the cache has {self.batch} sequences, its batch; free one of them first")
        seq = RowSequence(self, self._free_rows[-1], known if self._keeps_tokens else [])
        self._journal.cut(self._free_rows, len(self._free_rows) - 1)
        self._journal.put(self._sequences, seq, None)
        return seq

    @listed
    @transaction
    def reserve(self, seqs: RowSequence | Iterable[RowSequence], counts: Any, tokens: Any = None) -> Step:
        """Open a step: ``counts`` more tokens in each sequence.

        Parameters
        ----------
        seqs : sequences of this cache
            Each once, and in no other open step.
        counts : integers [B], or one integer for all
            Tokens that the step adds to each; 0 is allowed.
        tokens : optional
            As for `PagedKVCache.reserve`.

        Returns
        -------
        Step

        Raises
        ------
        CacheFullError
            A sequence has no room for so many tokens.
        SequenceError
            A sequence has been freed, belongs to another cache or to an open step.
        ArgumentError, ArrayTypeError
            ``counts`` or ``tokens`` do not fit the sequences, or a sequence is named twice.
        """
        checked = check_sequences(self, seqs)
        numbers = count_list(counts, len(checked))
        new = new_tokens(checked, numbers, tokens)
        for i, (seq, count) in enumerate(zip(checked, numbers, strict=True)):
            self._check_room(i, seq, count)
        if not self._keeps_tokens:
            new = [[] for _ in new]
        opened = OpenStep(tuple(checked), tuple(numbers), new, Reservation())
        step = self._step(opened)
        self._open_step(opened, step)
        return step

    @transaction
    def truncate(self, seq: RowSequence, length: int) -> None:
        """Keep the first ``length`` tokens of a sequence, and forget the others: tokens that were not accepted.

        Raises
        ------
        ArgumentError
            ``length`` is no integer, negative, more than the sequence has, or needs tokens that were evicted.
        SequenceError
            The sequence has been freed, belongs to another cache or to an open step.
        """
        check_sequence(self, "seq", seq)
        self._truncate(seq, integer("length", length, 0, seq._length))

    def reset(self, seq: RowSequence) -> None:
        """Forget all tokens of a sequence. Raises as `truncate`."""
        self.truncate(seq, 0)

    @transaction
    def free(self, seq: RowSequence) -> None:
        """Give a sequence up; another one can have its row.

        Raises
        ------
        SequenceError
            The sequence has been freed already, belongs to another cache or to an open step.
        """
        check_sequence(self, "seq", seq)
        self._journal.assign(seq, "_state", "freed")
        self._journal.drop(self._sequences, seq)
        self._journal.extend(self._free_rows, [seq.row])

    @reading
    def stats(self) -> RowStats:
        """Return how full the cache is."""
        cached, total = (sum(map(count, self._sequences)) for count in (self._num_cached, lambda seq: seq._length))
        return RowStats(self.batch, len(self._sequences), self._capacity, cached, total, self.nbytes)

    def __repr__(self) -> str:
        stats = self.stats()
        return (
            f"{type(self).__name__}({stats.sequences} of {self.batch} sequences, {stats.cached} tokens of at most "
            f"{self._capacity} each, {self.kv_format})"
        )

    # What derived classes say.

    @property
    @abstractmethod
    def _capacity(self) -> int:
        """Tokens of a sequence that a query can see."""

    @abstractmethod
    def _check_room(self, index: int, seq: RowSequence, count: int) -> None:
        """Raise `CacheFullError` unless the sequence ``seqs[index]`` can have so many more tokens in one step."""

    @abstractmethod
    def _num_cached(self, seq: RowSequence) -> int:
        """Return how many tokens of a sequence the cache holds."""

    @abstractmethod
    def _step(self, opened: OpenStep) -> Step:
        """Open a step with checked arguments."""

    def _truncate(self, seq: RowSequence, length: int) -> None:
        """Truncate to a length that the sequence has had, as a part of a transaction."""
        self._journal.cut(seq._tokens, length)
        self._journal.assign(seq, "_length", length)

    @transaction
    def _commit(self, handle: Step) -> None:
        step = handle._opened
        step.check_open(handle)
        step.check_complete(self.num_layers)
        grow(self._journal, step)
        self._close_step(step)


def check_number(name: str, value: Any, least: int = 1, most: int = MAX_EXTENT) -> int:
    """Check that ``value`` is an int from ``least`` to ``most``, by default one that can count slots, and return it."""
    return integer(name, value, least, most)
