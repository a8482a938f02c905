"""Pages that have been swapped out, in host memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np

from cuattn.kv.caches.journal import Journal

__all__ = ["HostPages"]

Contents = tuple[np.ndarray, ...]


class HostPages:
    """Contents of swapped pages, their reference counts, and which page on the device still holds the same.

    Such a link is what keeps sharing: a page that several sequences share is stored once however they are swapped out,
    and is one page again however they come back. The cache cuts it before the page on the device is written, and when
    that page is given to somebody else.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._contents: dict[int, Contents] = {}
        self._references: dict[int, int] = {}
        self._page_of: dict[int, int] = {}
        self._host_of: dict[int, int] = {}
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._contents)

    def references(self, host_page: int) -> int:
        """Return how many swapped tables hold the page."""
        return self._references[host_page]

    def host_of(self, page: int) -> int | None:
        """Return the host page with the contents of a page on the device."""
        return self._host_of.get(page)

    def page_of(self, host_page: int) -> int | None:
        """Return the page on the device with the contents of a host page."""
        return self._page_of.get(host_page)

    def contents(self, host_page: int) -> Contents:
        return self._contents[host_page]

    def store(self, page: int, contents: Contents) -> None:
        """Keep what a page on the device holds, for tables that will `share` it."""
        host_page = next(self._numbers)
        self._journal.put(self._contents, host_page, contents)
        self._journal.put(self._references, host_page, 0)
        self.link(host_page, page)

    def link(self, host_page: int, page: int) -> None:
        """Note that a page on the device holds the same as a host page."""
        self._journal.put(self._page_of, host_page, page)
        self._journal.put(self._host_of, page, host_page)

    def unlink(self, pages: Iterable[int]) -> None:
        """Note that pages on the device will hold something else."""
        if self._host_of:
            for page in pages:
                host_page = self._host_of.get(page)
                if host_page is not None:
                    self._journal.drop(self._host_of, page)
                    self._journal.drop(self._page_of, host_page)

    def share(self, host_page: int) -> None:
        """Note that one more table holds a host page."""
        self._journal.put(self._references, host_page, self._references[host_page] + 1)

    def release(self, host_page: int) -> None:
        """Note that one table less holds a host page; without any it is gone."""
        left = self._references[host_page] - 1
        if left:
            self._journal.put(self._references, host_page, left)
            return
        self._journal.drop(self._references, host_page)
        self._journal.drop(self._contents, host_page)
        page = self._page_of.get(host_page)
        if page is not None:
            self._journal.drop(self._page_of, host_page)
            self._journal.drop(self._host_of, page)
