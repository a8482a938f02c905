"""Which pages of a cache are used, kept for their prefix, or free."""

from __future__ import annotations

import itertools
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from cuattn.kv.caches.journal import Journal
from cuattn.kv.caches.prefix import Node, PrefixIndex

__all__ = ["PagePool"]


class PagePool:
    """Reference counts, the free pages, and the cached ones in the order in which they will be evicted.

    A page is *used* while a table holds it, *cached* when none does but the index of prefixes still knows what it
    holds, and *free* otherwise. Every method takes constant time a page.

    Attributes
    ----------
    references : array of int [num_pages]
        How many tables hold each page.
    num_evicted : int
        Cached pages that were given up for others so far.
    """

    def __init__(
        self, num_pages: int, index: PrefixIndex, on_lost: Callable[[list[int]], None], journal: Journal
    ) -> None:
        """``on_lost(pages)`` is called when nobody can ask any more for what the pages hold."""
        self.references = array("q", bytes(8 * num_pages))
        self.num_evicted = 0
        self._counts = np.frombuffer(self.references, np.int64)  # the same numbers, for many pages at once
        self._index = index
        self._on_lost = on_lost
        self._journal = journal
        self._free = list(range(num_pages - 1, -1, -1))  # the last one is taken next
        # When each page was cached. The first one is evicted next, except after something was undone: then the moments
        # still say the order.
        self._cached: OrderedDict[int, int] = OrderedDict()
        self._in_order = True
        self._moments = itertools.count()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_allocatable(self) -> int:
        return len(self._free) + len(self._cached)

    @property
    def free_pages(self) -> tuple[int, ...]:
        return tuple(self._free)

    @property
    def cached_pages(self) -> tuple[int, ...]:
        """The cached pages, the one to be evicted next first."""
        self._sort()
        return tuple(self._cached)

    def is_cached(self, page: int) -> bool:
        """Whether no table holds the page, but its prefix is known."""
        return page in self._cached

    def take(self, num_pages: int) -> list[int]:
        """Take pages for one table each: free ones, then cached ones that nobody has wanted for the longest time."""
        num_kept = max(0, len(self._free) - num_pages)
        pages = self._free[num_kept:][::-1]
        self._journal.cut(self._free, num_kept)
        if len(pages) < num_pages:
            pages += self._evict(num_pages - len(pages))
        self._set_references(np.array(pages, np.intp), 1)
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """Note that one more table holds each of several different pages, which are used or cached."""
        at = np.array(pages, np.intp)
        before = self._counts[at]
        for page in at[before == 0].tolist():
            self._uncache(page)
        self._set_references(at, before + 1)

    def release(self, pages: Sequence[int]) -> None:
        """Note that one table less holds each of several different pages, which are in the order of that table.

        Its tail is evicted first, because only its head makes it findable.
        """
        at = np.array(pages, np.intp)[::-1]
        left = self._counts[at] - 1
        self._set_references(at, left)
        free = []
        for page in at[left == 0].tolist():
            if self._index.node_of(page) is None:
                free.append(page)
            else:
                self._journal.note(self._restore_cached, page, None)
                self._cached[page] = next(self._moments)
        self._journal.extend(self._free, free)
        self._on_lost(free)

    def publish(self, page: int, node: Node) -> None:
        """Let the page of a table be found as ``node``; nothing happens if another page is."""
        if node.page is None:
            self._index.publish(node, page)

    def _evict(self, num_pages: int) -> list[int]:
        self._sort()
        pages = list(itertools.islice(self._cached, num_pages))
        for page in pages:
            self._uncache(page)
            self._index.withdraw(page)
        self._on_lost(pages)
        self._journal.assign(self, "num_evicted", self.num_evicted + len(pages))
        return pages

    def _uncache(self, page: int) -> None:
        self._journal.note(self._restore_cached, page, self._cached[page])
        del self._cached[page]

    def _restore_cached(self, page: int, moment: int | None) -> None:
        if moment is None:
            self._cached.pop(page, None)
        else:
            self._in_order = False
            self._cached[page] = moment

    def _sort(self) -> None:
        if not self._in_order:
            self._cached = OrderedDict(sorted(self._cached.items(), key=lambda item: item[1]))
            self._in_order = True

    def _set_references(self, at: np.ndarray, counts: np.ndarray | int) -> None:
        self._journal.note(self._counts.__setitem__, at, self._counts[at])
        self._counts[at] = counts
