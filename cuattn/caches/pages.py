"""Which pages of a cache are used, kept for their prefix, or free."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable

from cuattn.caches.prefix import Node, PrefixIndex

__all__ = ["PagePool"]


class PagePool:
    """Reference counts, the free pages, and the cached ones in the order in which they will be evicted.

    A page is *used* while a table holds it, *cached* when none does but the index of prefixes still knows what it
    holds, and *free* otherwise. Every method takes constant time.

    Attributes
    ----------
    references : array of int [num_pages]
        How many tables hold each page.
    num_evicted : int
        Cached pages that were given up for others so far.
    """

    def __init__(self, num_pages: int, index: PrefixIndex, on_lost: Callable[[int], None]) -> None:
        """``on_lost(page)`` is called when nobody can ask any more for what the page holds."""
        self.references = array("q", bytes(8 * num_pages))
        self.num_evicted = 0
        self._index = index
        self._on_lost = on_lost
        self._free = list(range(num_pages - 1, -1, -1))  # the last one is taken next
        self._cached: OrderedDict[int, None] = OrderedDict()  # the first one is evicted next

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
        return tuple(self._cached)

    def is_cached(self, page: int) -> bool:
        """Whether no table holds the page, but its prefix is known."""
        return page in self._cached

    def take(self) -> int:
        """A page for one table: a free one, else the cached one that nobody has wanted for the longest time."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._cached.popitem(last=False)
            self._index.withdraw(page)
            self._on_lost(page)
            self.num_evicted += 1
        self.references[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more table holds the page, which is used or cached."""
        if not self.references[page]:
            del self._cached[page]
        self.references[page] += 1

    def release(self, page: int) -> None:
        """One table less holds the page."""
        self.references[page] -= 1
        if not self.references[page]:
            if self._index.node_of(page) is not None:
                self._cached[page] = None
            else:
                self._free.append(page)
                self._on_lost(page)

    def release_all(self, pages: array[int] | list[int]) -> None:
        """Release pages in the order of a table: its tail is evicted first, because only its head makes it findable."""
        for page in reversed(pages):
            self.release(page)

    def publish(self, page: int, node: Node) -> None:
        """Let the page of a table be found as ``node``; nothing happens if another page is."""
        if node.page is None:
            self._index.publish(node, page)
