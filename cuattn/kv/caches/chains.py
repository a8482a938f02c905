"""What a sequence of a paged cache and the index of prefixes do for each other.

A sequence holds one node of the index, its tip: that of its last full page whose tokens, and those of all pages before
it, are known.
"""

from __future__ import annotations

from cuattn.kv.caches.pages import PagePool
from cuattn.kv.caches.prefix import Node, PrefixIndex
from cuattn.kv.caches.sequence import Sequence

__all__ = ["adopt", "publish", "publish_again", "step_back"]


def adopt(pool: PagePool, index: PrefixIndex, seq: Sequence, page_size: int) -> None:
    """Give a new sequence the pages that can be found for its first tokens, but not for its last token."""
    found = seq._tip
    for first in range(0, len(seq._tokens) - page_size, page_size):
        node = index.find(found, tuple(seq._tokens[first : first + page_size]))
        if node is None or node.page is None:
            break
        seq._pages.append(node.page)  # nobody else has the sequence yet: nothing of it needs to be put back
        found = node
    seq._length = page_size * len(seq._pages)
    pool.share(seq._pages)
    move_tip(index, seq, found)


def publish(index: PrefixIndex, seq: Sequence, page_size: int) -> None:
    """Let the full pages of a sequence be found, as far as its tokens are known."""
    tip, num_known = seq._tip, min(seq._length, len(seq._tokens))
    while (end := (tip.depth + 1) * page_size) <= num_known:
        tip = index.extend(tip, tuple(seq._tokens[end - page_size : end]), seq._pages[tip.depth])
    move_tip(index, seq, tip)


def publish_again(pool: PagePool, seq: Sequence) -> None:
    """Let the full pages of a sequence be found that has other pages now."""
    node = seq._tip
    while node.parent is not None:
        pool.publish(seq._pages[node.depth - 1], node)
        node = node.parent


def step_back(index: PrefixIndex, seq: Sequence, page_size: int) -> None:
    """Let go of the nodes of pages that a sequence, being shorter now, does not fill any more."""
    node = seq._tip
    while node.parent is not None and node.depth * page_size > seq._length:
        node = node.parent
    move_tip(index, seq, node)


def move_tip(index: PrefixIndex, seq: Sequence, node: Node) -> None:
    """Let a sequence hold another node."""
    if node is not seq._tip:
        index.hold(node)
        index.let_go(seq._tip)
        index.journal.assign(seq, "_tip", node)
