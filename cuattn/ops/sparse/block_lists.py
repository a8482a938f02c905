"""The kept blocks of a mask as compressed lists: those of each block of queries, and those of each block of keys."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cuattn.errors import ShapeError
from cuattn.scalars import MAX_EXTENT

__all__ = [
    "BlockLists",
    "KeyLists",
    "Places",
    "by_key",
    "by_query",
    "inside",
    "listed",
    "places",
    "tiles",
    "without_empty",
]

Bools = NDArray[np.bool_]


class BlockLists(NamedTuple):
    """Row r = (b·heads + h)·nq + I keeps the key blocks indices[indptr[r]:indptr[r + 1]], ascending; all int32."""

    indptr: NDArray[np.int32]  #: [batch · heads · nq + 1]
    indices: NDArray[np.int32]  #: [nnz]


class KeyLists(NamedTuple):
    """Row r = (b·heads + h)·nk + J is kept by the query blocks indices[indptr[r]:indptr[r + 1]], ascending; int32."""

    indptr: NDArray[np.int32]  #: [batch · heads · nk + 1]
    indices: NDArray[np.int32]  #: [nnz]
    order: NDArray[np.int32]  #: [nnz]: the number of the block in the lists of the query blocks, and in `elements`


class Places(NamedTuple):
    """The axes of kept blocks, int64 [nnz] each, in the order of the lists of the query blocks."""

    batch: NDArray[np.int64]
    head: NDArray[np.int64]
    query: NDArray[np.int64]
    key: NDArray[np.int64]


def by_query(blocks: Bools) -> BlockLists:
    """List the kept blocks of a grid [batch, heads, nq, nk]."""
    counts = np.count_nonzero(blocks, axis=3).ravel()
    indices = np.nonzero(blocks.reshape(-1, blocks.shape[3]))[1] if blocks.size else np.zeros(0, np.int64)
    return listed(counts, indices)


def listed(counts: Any, indices: Any) -> BlockLists:
    """Return the lists of rows that keep so many blocks each; raises `ShapeError` if int32 cannot count them."""
    return BlockLists(_starts(counts), indices.astype(np.int32))


def by_key(lists: BlockLists, grid: tuple[int, int, int, int]) -> KeyLists:
    """List the same blocks for each block of keys; ``grid`` is [batch, heads, nq, nk]."""
    at = places(lists, grid)
    rows = (at.batch * grid[1] + at.head) * grid[3] + at.key
    order = np.argsort(rows, kind="stable")  # query blocks ascend within a row, and stay so
    counts = np.bincount(rows, minlength=grid[0] * grid[1] * grid[3])
    return KeyLists(_starts(counts), at.query[order].astype(np.int32), order.astype(np.int32))


def places(lists: BlockLists, grid: tuple[int, int, int, int]) -> Places:
    """Say where each kept block lies in a grid [batch, heads, nq, nk]."""
    _, heads, nq, _ = grid
    rows = np.repeat(np.arange(lists.indptr.size - 1, dtype=np.int64), np.diff(lists.indptr))
    entries, query = np.divmod(rows, max(nq, 1))
    batch, head = np.divmod(entries, max(heads, 1))
    return Places(batch, head, query, lists.indices.astype(np.int64))


def tiles(
    lists: BlockLists,
    grid: tuple[int, int, int, int],
    block_size: tuple[int, int],
    elements: Bools | None,
    at: Places,
) -> Bools:
    """Return what is visible in the blocks ``at``, [n, bq, bk]; an axis of the grid that is 1 stands for every place.

    Nothing is in a block that is not kept, everything in one that is, where there are no ``elements``.
    """
    batch, heads, nq, nk = grid

    def number(of: Places) -> NDArray[np.int64]:
        first = of.batch * (batch > 1) * heads + of.head * (heads > 1)
        return np.asarray((first * nq + of.query) * nk + of.key)

    kept, wanted = number(places(lists, grid)), number(at)
    found = np.searchsorted(kept, wanted)
    is_kept = np.zeros(wanted.size, bool) if not kept.size else kept[np.minimum(found, kept.size - 1)] == wanted
    result = np.zeros((wanted.size, *block_size), bool)
    result[is_kept] = True if elements is None else elements[found[is_kept]]
    return result


def inside(at: Places, seqlens: tuple[int, int], block_size: tuple[int, int]) -> tuple[Any, Any]:
    """Return how many queries and how many keys each block has: fewer than its size where it is the last."""
    return (
        np.minimum(block_size[0], seqlens[0] - at.query * block_size[0]),
        np.minimum(block_size[1], seqlens[1] - at.key * block_size[1]),
    )


def without_empty(blocks: Bools, elements: Bools) -> tuple[Bools, Bools]:
    """Drop those of the kept blocks in which nothing is visible."""
    used = elements.any(axis=(1, 2))
    fewer = np.zeros_like(blocks)
    fewer[blocks] = used
    return fewer, elements[used]


def _starts(counts: Any) -> NDArray[np.int32]:
    """Return the prefix sums of the lengths of lists, the sum of all at the end; each must fit into int32."""
    starts = np.zeros(counts.size + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    if max(starts[-1], starts.size) > MAX_EXTENT:
        raise ShapeError(f"the mask keeps {starts[-1]} blocks in {counts.size} rows; at most {MAX_EXTENT} are allowed")
    return starts.astype(np.int32)
