"""How full a paged cache is, and what it has done."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cuattn.kv.caches.paged import PagedKVCache

__all__ = ["CacheStats", "collect", "unused_slots"]


@dataclass(frozen=True, slots=True)
class CacheStats:
    """The state of a `PagedKVCache` at one moment; made by its ``stats()``.

    Attributes
    ----------
    num_pages, page_size : int
        used + cached + free is num_pages.
    used : int
        Pages in the table of at least one sequence; with a step open, also those that it may have to give back.
    cached : int
        Pages in no table whose prefix can still be found; they are evicted when room is needed.
    free : int
    waste : int
        Slots of used pages that hold no token, nor are reserved for one: less than a page for each sequence.
    shared : int
        Pages saved by sharing: the entries of all tables, less the used pages.
    sequences, swapped_sequences : int
        In pages, and in host memory.
    host_pages : int
        Pages in host memory.
    hits : int
        Pages found by their prefix so far, by ``add``.
    copies : int
        Pages copied before they were written so far.
    evictions : int
        Cached pages given up for others so far.
    """

    num_pages: int
    page_size: int
    used: int
    cached: int
    free: int
    waste: int
    shared: int
    sequences: int
    swapped_sequences: int
    host_pages: int
    hits: int
    copies: int
    evictions: int

    @property
    def allocatable(self) -> int:
        """Number of pages that a step could get: cached + free."""
        return self.cached + self.free

    @property
    def waste_fraction(self) -> float:
        """``waste`` as a part of the slots of all used pages; 0 without any."""
        return self.waste / (self.used * self.page_size) if self.used else 0.0


def collect(cache: PagedKVCache) -> CacheStats:
    """Collect the state of a cache, whose lock the caller has: time in proportion to its sequences and its pages."""
    pool, seqs = cache._pool, cache._sequences
    used = cache.num_pages - pool.num_allocatable
    return CacheStats(
        num_pages=cache.num_pages,
        page_size=cache.page_size,
        used=used,
        cached=pool.num_cached,
        free=pool.num_free,
        waste=unused_slots(_tails(cache), pool.references, cache.page_size),
        shared=sum(pool.references) - used,
        sequences=sum(seq._state == "live" for seq in seqs),
        swapped_sequences=sum(seq._state == "swapped" for seq in seqs),
        host_pages=len(cache._host),
        hits=cache._num_hits,
        copies=cache._num_copies,
        evictions=pool.num_evicted,
    )


def _tails(cache: PagedKVCache) -> Iterable[tuple[int, int]]:
    """Find pages that end a table before they are full, and how many of their slots hold a token or are to hold one."""
    reserved = {seq: count for step in cache._open for seq, count in zip(step.sequences, step.counts, strict=True)}
    for seq in cache._sequences:
        num_filled = (seq._length + reserved.get(seq, 0)) % cache.page_size
        if seq._state == "live" and num_filled:
            yield seq._pages[-1], num_filled
    for step in cache._open:
        for seq, page, _ in step._reservation.copies:
            yield page, seq._length % cache.page_size


def unused_slots(tails: Iterable[tuple[int, int]], references: Sequence[int], page_size: int) -> int:
    """Count the slots that no table fills of pages that are not full.

    ``tails`` are the pages that end a table before they are full, with the slots filled there; a page may be the tail
    of several tables, and an inner page of others.

    >>> unused_slots([(0, 3), (0, 5), (1, 2)], [2, 2], page_size=8)
    3
    """
    filled: dict[int, list[int]] = {}
    for page, num_filled in tails:
        filled.setdefault(page, []).append(num_filled)
    return sum(page_size - max(fills) for page, fills in filled.items() if references[page] == len(fills))
