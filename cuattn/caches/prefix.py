"""The index of prefixes: which page holds the keys and values of which tokens.

A page's keys and values depend on its own tokens and on every token before them. So a page is known by a chain: its
node has its tokens and, as parent, the node of the page before. The digest of a node is a hash of the parent's digest
and of the tokens; a digest alone decides nothing, since equal nodes have equal tokens and the same parent, compared
one by one. W. Kwon et al., "Efficient memory management for large language model serving with PagedAttention", 2023
(arXiv:2309.06180), section 4.4, shares prefixes that the operator names; chains find them.

Examples
--------
>>> index = PrefixIndex()
>>> root = index.root("adapter 1")
>>> node = index.extend(root, (5, 6))
>>> index.publish(node, page=3)
>>> index.find(root, (5, 6)).page, index.find(root, (5, 7))
(3, None)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

__all__ = ["Node", "PrefixIndex"]

Tokens = tuple[int, ...]


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
    """

    __slots__ = ("cache_key", "depth", "digest", "num_holders", "page", "parent", "tokens")

    def __init__(self, parent: Node | None, tokens: Tokens, digest: int, cache_key: Hashable = None) -> None:
        self.parent = parent
        self.tokens = tokens
        self.digest = digest
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.cache_key = cache_key
        self.page: int | None = None
        self.num_holders = 0


class PrefixIndex:
    """Nodes by digest and by page. Every method takes time in proportion to the tokens of one page."""

    def __init__(self, digest: Callable[[object], int] = hash) -> None:
        self._digest = digest
        self._roots: dict[Hashable, Node] = {}
        self._nodes: dict[int, list[Node]] = {}  # those with equal digests together: nearly always one
        self._node_of_page: dict[int, Node] = {}

    def __len__(self) -> int:
        """Nodes, roots included."""
        return len(self._roots) + sum(map(len, self._nodes.values()))

    def root(self, cache_key: Hashable) -> Node:
        """Where the chains of a cache key begin."""
        root = self._roots.get(cache_key)
        if root is None:
            root = self._roots[cache_key] = Node(None, (), self._digest(cache_key), cache_key)
        return root

    def find(self, parent: Node, tokens: Tokens) -> Node | None:
        """The node of exactly these tokens after exactly that parent."""
        for node in self._nodes.get(self._digest((parent.digest, tokens)), ()):
            if node.parent is parent and node.tokens == tokens:
                return node
        return None

    def extend(self, parent: Node, tokens: Tokens) -> Node:
        """`find`, or a new node. The caller holds or publishes it."""
        node = self.find(parent, tokens)
        if node is None:
            node = Node(parent, tokens, self._digest((parent.digest, tokens)))
            self._nodes.setdefault(node.digest, []).append(node)
            parent.num_holders += 1
        return node

    def hold(self, node: Node) -> None:
        """Keep a node, and with it all before it, until it is let go."""
        node.num_holders += 1

    def let_go(self, node: Node) -> None:
        """The opposite of `hold`."""
        node.num_holders -= 1
        self._prune(node)

    def node_of(self, page: int) -> Node | None:
        """The node under which a page is published."""
        return self._node_of_page.get(page)

    def publish(self, node: Node, page: int) -> None:
        """Let ``page``, which no node has, be found as ``node``, which has no page."""
        node.page = page
        self._node_of_page[page] = node

    def withdraw(self, page: int) -> None:
        """Let a published page be found no more."""
        node = self._node_of_page.pop(page)
        node.page = None
        self._prune(node)

    def _prune(self, node: Node | None) -> None:
        """Remove a node that nothing refers to, and those before it of which that is then true."""
        while node is not None and node.page is None and not node.num_holders:
            parent = node.parent
            if parent is None:
                del self._roots[node.cache_key]
                return
            bucket = self._nodes[node.digest]
            bucket.remove(node)
            if not bucket:
                del self._nodes[node.digest]
            parent.num_holders -= 1
            node = parent
