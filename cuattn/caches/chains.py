"""What a sequence of a paged cache and the index of prefixes do for each other.

A sequence holds one node of the index, its tip: that of its last full page whose tokens, and those of all pages before
it, are known.
"""

from __future__ import annotations

from cuattn.caches.pages import PagePool
from cuattn.caches.prefix import Node, PrefixIndex
from cuattn.caches.sequence import Sequence

__all__ = ["adopt", "publish", "publish_again", "step_back"]


def adopt(pool: PagePool, index: PrefixIndex, seq: Sequence, page_size: int) -> None:
    """Give a new sequence the pages that can be found for its first tokens, but not for its last token."""
    for first in range(0, len(seq._tokens) - page_size, page_size):
        node = index.find(seq._tip, tuple(seq._tokens[first : first + page_size]))
        if node is None or node.page is None:
            return
        pool.share(node.page)
        seq._pages.append(node.page)
        seq._length += page_size
        _move_tip(index, seq, node)


def publish(pool: PagePool, index: PrefixIndex, seq: Sequence, page_size: int) -> None:
    """Let the full pages of a sequence be found, as far as its tokens are known."""
    while (end := (seq._tip.depth + 1) * page_size) <= min(seq._length, len(seq._tokens)):
        node = index.extend(seq._tip, tuple(seq._tokens[end - page_size : end]))
        pool.publish(seq._pages[node.depth - 1], node)
        _move_tip(index, seq, node)


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
    _move_tip(index, seq, node)


def _move_tip(index: PrefixIndex, seq: Sequence, node: Node) -> None:
    index.hold(node)
    index.let_go(seq._tip)
    seq._tip = node
