"""The pages that one step writes: taken together, or not at all, and given back if the step is aborted."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from cuattn.errors import OutOfPagesError
from cuattn.kv.caches.host_pages import HostPages
from cuattn.kv.caches.journal import Journal
from cuattn.kv.caches.pages import PagePool
from cuattn.kv.caches.prefix import Node, PrefixIndex
from cuattn.kv.caches.sequence import Sequence
from cuattn.kv.caches.storage import PageStorage

__all__ = ["Reservation", "reserve", "restore", "settle"]


@dataclass(slots=True)
class Reservation:
    """What `reserve` has changed.

    Attributes
    ----------
    copies : list of (Sequence, int, int)
        The sequence, the page whose place in its table was taken by a copy, and the copy. The first is kept for the
        sequence, as a reference, until the step is over.
    extensions : list of (Sequence, int)
        How many pages were put behind the table of a sequence.
    withdrawn : list of (Node, int)
        Nodes, held until the step is over, whose pages will be written and therefore are found no more.
    """

    copies: list[tuple[Sequence, int, int]] = field(default_factory=list)
    extensions: list[tuple[Sequence, int]] = field(default_factory=list)
    withdrawn: list[tuple[Node, int]] = field(default_factory=list)


def reserve(
    journal: Journal,
    pool: PagePool,
    index: PrefixIndex,
    host: HostPages,
    storage: PageStorage,
    seqs: Items[Sequence],
    counts: Items[int],
    page_size: int,
) -> Reservation:
    """Give each sequence the pages for ``counts`` more tokens, those to be copied before they are written included.

    The copies are made. Raises `OutOfPagesError`, and then nothing has changed.
    """
    written = [
        seq for seq, count in zip(seqs, counts, strict=True) if count and seq._length % page_size
    ]  # those that go on writing the page at their end
    copied = _to_copy(pool, written)
    missing = [
        -(-(seq._length + count) // page_size) - len(seq._pages) for seq, count in zip(seqs, counts, strict=True)
    ]
    needed = len(copied) + sum(missing)
    if needed > pool.num_allocatable:
        raise OutOfPagesError(
            f"{needed} pages are needed for {sum(counts)} tokens of {len(seqs)} sequences; {pool.num_allocatable} of "
            f"{len(pool.references)} can be had ({pool.num_free} free, {pool.num_cached} cached)",
            needed=needed,
            allocatable=pool.num_allocatable,
        )

    done = Reservation()
    num_free = pool.num_free
    taken = pool.take(needed) if needed else []
    for seq in written:
        page = seq._pages[-1]
        if seq in copied:
            copy = taken[len(done.copies)]
            journal.write(seq._pages, len(seq._pages) - 1, copy)
            done.copies.append((seq, page, copy))
            continue
        host.unlink([page])
        node = index.node_of(page)
        if node is not None:
            index.hold(node)
            index.withdraw(page)
            done.withdrawn.append((node, page))
    first = len(done.copies)
    for seq, num_pages in zip(seqs, missing, strict=True):
        if num_pages:
            journal.extend(seq._pages, array("i", taken[first : first + num_pages]))
            done.extensions.append((seq, num_pages))
            first += num_pages
    if done.copies:
        targets = [copy for _, _, copy in done.copies]
        storage.keep(journal, targets[num_free:])
        storage.copy([page for _, page, _ in done.copies], targets)
    return done


def restore(journal: Journal, pool: PagePool, index: PrefixIndex, done: Reservation, *, written: bool) -> None:
    """Take back what `reserve` did. Pages that were ``written`` meanwhile cannot be found by their prefix any more."""
    for seq, num_pages in reversed(done.extensions):
        num_kept = len(seq._pages) - num_pages
        pool.release(seq._pages[num_kept:])
        journal.cut(seq._pages, num_kept)
    for seq, page, copy in reversed(done.copies):
        journal.write(seq._pages, len(seq._pages) - 1, page)
        pool.release([copy])
    for node, page in reversed(done.withdrawn):
        if not written:
            pool.publish(page, node)
        index.let_go(node)


def settle(pool: PagePool, index: PrefixIndex, done: Reservation) -> None:
    """Keep what `reserve` did for good: pages that were copied lose a table, and those written their old prefix."""
    for _, page, _ in done.copies:
        pool.release([page])
    for node, _ in done.withdrawn:
        index.let_go(node)


def _to_copy(pool: PagePool, written: list[Sequence]) -> set[Sequence]:
    """Find the sequences that need a copy of the page at their end, because a table that stays holds it too.

    Of several sequences that share one page and all write, the longest may write the page itself. It writes slots that
    no other one has filled, so that the others can have the page back if the step is aborted.
    """
    leaving: Counter[int] = Counter()
    copied = set()
    for seq in sorted(written, key=lambda seq: seq._length):
        page = seq._pages[-1]
        if pool.references[page] - leaving[page] > 1:
            leaving[page] += 1
            copied.add(seq)
    return copied
