"""Sequences of a paged cache to host memory and back, with their pages shared as before."""

from __future__ import annotations

from collections.abc import Sequence as Items

from cuattn.caches import chains
from cuattn.caches.host_pages import HostPages
from cuattn.caches.pages import PagePool
from cuattn.caches.sequence import Sequence
from cuattn.caches.storage import PageStorage
from cuattn.errors import OutOfPagesError

__all__ = ["swap_in", "swap_out"]


def swap_out(pool: PagePool, host: HostPages, storage: PageStorage, seqs: Items[Sequence]) -> None:
    """Copy the pages that the host does not have, then release all of them."""
    pages = list(dict.fromkeys(page for seq in seqs for page in seq._pages if host.host_of(page) is None))
    if pages:
        for page, contents in zip(pages, storage.to_host(pages), strict=True):
            host.store(page, contents)
    for seq in seqs:
        for page in seq._pages:
            host_page = host.host_of(page)
            assert host_page is not None, "all of them have been stored"
            host.share(host_page)
            seq._host_pages.append(host_page)
        seq._state = "swapped"
    for seq in seqs:
        pool.release_all(seq._pages)
        del seq._pages[:]


def swap_in(pool: PagePool, host: HostPages, storage: PageStorage, seqs: Items[Sequence]) -> None:
    """Share the pages that still hold what was swapped out, and take others for the rest."""
    host_pages = list(dict.fromkeys(host_page for seq in seqs for host_page in seq._host_pages))
    page_of = {host_page: page for host_page in host_pages if (page := host.page_of(host_page)) is not None}
    missing = [host_page for host_page in host_pages if host_page not in page_of]
    allocatable = pool.num_allocatable - sum(map(pool.is_cached, page_of.values()))
    if len(missing) > allocatable:
        raise OutOfPagesError(
            f"{len(missing)} pages are needed to swap {len(seqs)} sequences in; {allocatable} of "
            f"{len(pool.references)} can be had",
            needed=len(missing),
            allocatable=allocatable,
        )

    for page in page_of.values():  # before any page is taken: a cached one could be evicted
        pool.share(page)
    taken = {host_page: pool.take() for host_page in missing}
    page_of |= taken
    if taken:
        try:
            storage.from_host(list(taken.values()), [host.contents(host_page) for host_page in missing])
        except BaseException:
            pool.release_all(list(page_of.values()))
            raise
    for host_page, page in taken.items():
        host.link(host_page, page)

    for seq in seqs:
        for host_page in seq._host_pages:
            pool.share(page_of[host_page])
            seq._pages.append(page_of[host_page])
            host.release(host_page)
        del seq._host_pages[:]
        seq._state = "live"
        chains.publish_again(pool, seq)
    pool.release_all(list(page_of.values()))
