"""The index of prefixes: which page holds the keys and values of which tokens.

A page's keys and values depend on its own tokens and on every token before them. So a page is known by a chain: its
node has its tokens and, as parent, the node of the page before. The digest of a node is a hash of the parent's digest
and of the tokens; a digest alone decides nothing, since equal nodes have equal tokens and the same parent, compared
one by one. It is not Python's hash, by which -1 is -2 and 2**61 - 1 is 0. W. Kwon et al., "Efficient memory management
for large language model serving with PagedAttention", 2023 (arXiv:2309.06180), section 4.4, shares prefixes that the
operator names; chains find them.

Examples
--------
>>> index = PrefixIndex()
>>> root = index.root("adapter 1")
>>> node = index.extend(root, (5, 6), page=3)
>>> index.find(root, (5, 6)).page, index.find(root, (5, 7))
(3, None)
"""

from __future__ import annotations

import hashlib
import itertools
import struct
from collections.abc import Callable, Hashable

import numpy as np

from cuattn.kv.caches.journal import Journal

__all__ = ["Node", "PrefixIndex", "key_of"]

Tokens = tuple[int, ...]


def key_of(cache_key: Hashable) -> Hashable:
    """Return what a cache key is known by: 1, True, 1.0 and "1" are four keys, alone and in tuples and frozen sets.

    A NumPy scalar is the key that the Python number or string of the same value is.

    >>> key_of((1, "a")) == key_of((True, "a")), key_of(np.int64(1)) == key_of(1)
    (False, True)
    """
    if isinstance(cache_key, np.generic):
        cache_key = cache_key.item()
    if isinstance(cache_key, tuple | frozenset):
        kind = tuple if isinstance(cache_key, tuple) else frozenset
        return type(cache_key), kind(map(key_of, cache_key))
    return type(cache_key), cache_key


def digest_of(node: tuple[int, Tokens]) -> int:
    """Return a hash of 64 bits of a parent's digest and tokens: the same in every process."""
    digest, tokens = node
    try:
        packed = struct.pack(f"Q{len(tokens)}q", digest, *tokens)
    except struct.error:  # a token beyond 64 bits
        packed = repr(node).encode()
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


class Node:
    """A full page of tokens after those of its parent; or, without tokens, the start of all chains of a cache key.

    Attributes
    ----------
    parent : Node or None
    tokens : tuple of int
    digest : int
    depth : int
        Pages from the start of the chain to the end of this one.
    page : int or None
        The page that holds these tokens' keys and values, if there is one.
    num_holders : int
        Children and sequences that refer to the node. It stays in the index while there are any, or a page.
    cache_key, key : hashable
        Of a start: the key as it was given, and as the index knows it.
    """

    __slots__ = ("cache_key", "depth", "digest", "key", "num_holders", "page", "parent", "tokens")

    def __init__(
        self, parent: Node | None, tokens: Tokens, digest: int, cache_key: Hashable = None, key: Hashable = None
    ) -> None:
        self.parent = parent
        self.tokens = tokens
        self.digest = digest
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.cache_key = cache_key
        self.key = key
        self.page: int | None = None
        self.num_holders = 0


class PrefixIndex:
    """Nodes by digest and by page. Every method takes time in proportion to the tokens of one page."""

    def __init__(self, journal: Journal | None = None, digest: Callable[[tuple[int, Tokens]], int] = digest_of) -> None:
        self.journal = Journal() if journal is None else journal
        self._digest = digest
        self._roots: dict[Hashable, Node] = {}
        self._nodes: dict[int, list[Node]] = {}  # those with equal digests together: nearly always one
        self._node_of_page: dict[int, Node] = {}
        self._root_numbers = itertools.count()

    def __len__(self) -> int:
        """Number of nodes, roots included."""
        return len(self._roots) + sum(map(len, self._nodes.values()))

    def root(self, cache_key: Hashable) -> Node:
        """Return the node where the chains of a cache key begin."""
        key = key_of(cache_key)
        root = self._roots.get(key)
        if root is None:
            # Numbered, since keys of equal hashes would have children of equal digests.
            root = Node(None, (), self._digest((next(self._root_numbers), ())), cache_key, key)
            self.journal.put(self._roots, key, root)
        return root

    def find(self, parent: Node, tokens: Tokens) -> Node | None:
        """Return the node of exactly these tokens after exactly that parent."""
        return self._find(parent, tokens, self._digest((parent.digest, tokens)))

    def extend(self, parent: Node, tokens: Tokens, page: int) -> Node:
        """Do as `find`, or make a node; ``page``, which no node has, is found as that node, unless another page is."""
        digest = self._digest((parent.digest, tokens))
        node = self._find(parent, tokens, digest)
        if node is not None:
            if node.page is None:
                self.publish(node, page)
            return node
        node = Node(parent, tokens, digest)
        node.page = page
        self.journal.note(self._forget, node, parent.num_holders)
        self._nodes[digest] = [*self._nodes.get(digest, ()), node]
        self._node_of_page[page] = node
        parent.num_holders += 1
        return node

    def hold(self, node: Node) -> None:
        """Keep a node, and with it all before it, until it is let go."""
        self.journal.assign(node, "num_holders", node.num_holders + 1)

    def let_go(self, node: Node) -> None:
        """Undo one `hold`."""
        self.journal.assign(node, "num_holders", node.num_holders - 1)
        self._prune(node)

    def node_of(self, page: int) -> Node | None:
        """Return the node under which a page is published."""
        return self._node_of_page.get(page)

    def publish(self, node: Node, page: int) -> None:
        """Let ``page``, which no node has, be found as ``node``, which has no page."""
        self.journal.assign(node, "page", page)
        self.journal.put(self._node_of_page, page, node)

    def withdraw(self, page: int) -> None:
        """Let a published page be found no more."""
        node = self._node_of_page[page]
        self.journal.drop(self._node_of_page, page)
        self.journal.assign(node, "page", None)
        self._prune(node)

    def _find(self, parent: Node, tokens: Tokens, digest: int) -> Node | None:
        for node in self._nodes.get(digest, ()):
            if node.parent is parent and node.tokens == tokens:
                return node
        return None

    def _prune(self, node: Node | None) -> None:
        """Remove a node that nothing refers to, and those before it of which that is then true."""
        while node is not None and node.page is None and not node.num_holders:
            parent = node.parent
            if parent is None:
                self.journal.drop(self._roots, node.key)
                return
            others = self._others(node)
            if others:
                self.journal.put(self._nodes, node.digest, others)
            else:
                self.journal.drop(self._nodes, node.digest)
            self.journal.assign(parent, "num_holders", parent.num_holders - 1)
            node = parent

    def _forget(self, node: Node, num_holders: int) -> None:
        """Undo what `extend` did for a new node; ``num_holders`` its parent had before."""
        others = self._others(node)
        if others:
            self._nodes[node.digest] = others
        else:
            self._nodes.pop(node.digest, None)
        if node.page is not None:
            self._node_of_page.pop(node.page, None)
        if node.parent is not None:
            node.parent.num_holders = num_holders

    def _others(self, node: Node) -> list[Node]:
        """Return the other nodes with the same digest."""
        return [other for other in self._nodes.get(node.digest, ()) if other is not node]
