"""Sequences of a paged cache to host memory and back, with their pages shared as before."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Items

from cuattn.errors import OutOfPagesError
from cuattn.kv.caches import chains
from cuattn.kv.caches.host_pages import HostPages
from cuattn.kv.caches.journal import Journal
from cuattn.kv.caches.pages import PagePool
from cuattn.kv.caches.sequence import Sequence
from cuattn.kv.caches.storage import PageStorage

__all__ = ["swap_in", "swap_out"]


def swap_out(journal: Journal, pool: PagePool, host: HostPages, storage: PageStorage, seqs: Items[Sequence]) -> None:
    """Copy the pages that the host does not have, then release all of them."""
    pages = list(dict.fromkeys(page for seq in seqs for page in seq._pages if host.host_of(page) is None))
    if pages:
        for page, contents in zip(pages, storage.to_host(pages), strict=True):
            host.store(page, contents)
    for seq in seqs:
        host_pages = []
        for page in seq._pages:
            host_page = host.host_of(page)
            assert host_page is not None, "all of them have been stored"
            host.share(host_page)
            host_pages.append(host_page)
        journal.assign(seq, "_host_pages", host_pages)
        journal.assign(seq, "_state", "swapped")
    for seq in seqs:
        pool.release(seq._pages)
        journal.cut(seq._pages, 0)


def swap_in(journal: Journal, pool: PagePool, host: HostPages, storage: PageStorage, seqs: Items[Sequence]) -> None:
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

    pool.share(list(page_of.values()))  # before any page is taken: a cached one could be evicted
    if missing:
        num_free = pool.num_free
        taken = pool.take(len(missing))
        storage.keep(journal, taken[num_free:])
        storage.from_host(taken, [host.contents(host_page) for host_page in missing])
        for host_page, page in zip(missing, taken, strict=True):
            host.link(host_page, page)
            page_of[host_page] = page

    for seq in seqs:
        pages = array("i", [page_of[host_page] for host_page in seq._host_pages])
        pool.share(pages)
        journal.extend(seq._pages, pages)
        for host_page in seq._host_pages:
            host.release(host_page)
        journal.assign(seq, "_host_pages", [])
        journal.assign(seq, "_state", "live")
        chains.publish_again(pool, seq)
    pool.release(list(page_of.values()))
