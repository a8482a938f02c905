"""Grids of blocks by the patterns of the literature, as `BlockMask.from_blocks` takes them.

Blocks are aligned at the bottom right: block I of the queries lies on block I' = I + nk - nq of the keys, as query i
lies on key i + M - N. Nothing of N x M is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuattn.allocation import allocating
from cuattn.errors import ArgumentError, ShapeError
from cuattn.ops.sparse.block_mask_arguments import block_size_pair, integers, num_blocks, seqlen
from cuattn.scalars import MAX_EXTENT, as_integer, check_flag, integer

__all__ = ["bigbird_mask", "global_mask", "local_mask", "streaming_mask", "strided_mask", "vertical_slash_mask"]

Grid = NDArray[np.bool_]


def local_mask(seqlen_q: int, seqlen_k: int, block_size: Any, left: int | None, right: int | None) -> Grid:
    """Keep every block that a window touches: some query i and key j in it with -left <= j - (i + M - N) <= right.

    Parameters
    ----------
    seqlen_q, seqlen_k : int
        N and M.
    block_size : int or (int, int)
        (bq, bk).
    left, right : int or None
        Keys before and behind the one that a query lies on; None is no bound.

    Returns
    -------
    bool array [nq, nk], nq = ceil(N / bq), nk = ceil(M / bk)

    Raises
    ------
    ArgumentError
        A number that is none, or out of range.

    References
    ----------
    Beltagy, Peters and Cohan, "Longformer", 2020 (arXiv:2004.05150).

    Examples
    --------
    >>> import cuattn
    >>> cuattn.local_mask(6, 6, 2, 1, 0).astype(int)
    array([[1, 0, 0],
           [1, 1, 0],
           [0, 1, 1]])
    """
    low = -MAX_EXTENT if left is None else -_bound("left", left, optional=True)
    high = MAX_EXTENT if right is None else _bound("right", right, optional=True)
    sizes = _sizes(seqlen_q, seqlen_k, block_size)
    with _room(*sizes):
        blocks = _Blocks(*sizes)
        # All distances between the least and the largest of a block are in it.
        first, last = blocks.first_key - blocks.last_aligned, blocks.last_key - blocks.first_aligned
        return np.asarray(np.maximum(first, low) <= np.minimum(last, high))


def strided_mask(nq: int, nk: int, stride: int, local: int) -> Grid:
    """Keep the blocks near the diagonal, and the last block of each group of ``stride``.

    Parameters
    ----------
    nq, nk : int
        Blocks of queries and of keys.
    stride : int
        Block J is kept for every query if J is stride - 1 modulo ``stride``.
    local : int
        Block (I, J) is kept if |I' - J| < local, with I' = I + nk - nq.

    Returns
    -------
    bool array [nq, nk]

    Raises
    ------
    ArgumentError
        A number that is none, or out of range: ``stride`` is at least 1, the others at least 0.

    References
    ----------
    Child et al., "Generating long sequences with sparse transformers", 2019 (arXiv:1904.10509), whose "fixed" pattern
    this is, by blocks. By elements: `cuattn.strided_attention`.

    Examples
    --------
    >>> import cuattn
    >>> cuattn.strided_mask(4, 4, stride=2, local=1).astype(int)
    array([[1, 1, 0, 1],
           [0, 1, 0, 1],
           [0, 1, 1, 1],
           [0, 1, 0, 1]])
    """
    stride, local = integer("stride", stride, 1, MAX_EXTENT), _bound("local", local)
    return _where(nq, nk, lambda aligned, key: (np.abs(aligned - key) < local) | (key % stride == stride - 1))


def global_mask(nq: int, nk: int, blocks: Any) -> Grid:
    """Keep everything in the rows and in the columns of some blocks: they see all, and all see them.

    Parameters
    ----------
    nq, nk : int
        Blocks of queries and of keys.
    blocks : int or list of int
        Which, as blocks of keys; a negative one is counted from the end. A number stands for so many at the beginning.
        The row of block J is that of the queries that lie on it: I + nk - nq = J.

    Returns
    -------
    bool array [nq, nk]

    Raises
    ------
    ArgumentError
        A number that is none, or out of range.

    References
    ----------
    Beltagy, Peters and Cohan, "Longformer", 2020 (arXiv:2004.05150).

    Examples
    --------
    >>> import cuattn
    >>> cuattn.global_mask(3, 3, [-1]).astype(int)
    array([[0, 0, 1],
           [0, 0, 1],
           [1, 1, 1]])
    """
    nk = _bound("nk", nk)
    few = as_integer(blocks)
    if few is None:
        chosen = integers("blocks", blocks, range(1, 2), "a number or one axis of them")
        _check_range("blocks", chosen, -nk, nk - 1)
        chosen = np.where(chosen < 0, chosen + nk, chosen)
        return _where(nq, nk, lambda aligned, key: np.isin(aligned, chosen) | np.isin(key, chosen))
    few = integer("blocks", few, 0, nk)
    return _where(nq, nk, lambda aligned, key: ((aligned >= 0) & (aligned < few)) | (key < few))


def streaming_mask(nq: int, nk: int, sinks: int, local: int) -> Grid:
    """Keep the first blocks of keys and the latest ones: attention sinks and a window behind each query.

    Parameters
    ----------
    nq, nk : int
        Blocks of queries and of keys.
    sinks : int
        So many blocks at the beginning.
    local : int
        So many blocks up to the one that a block of queries lies on. What is behind it is not kept: the pattern is
        causal, by blocks.

    Returns
    -------
    bool array [nq, nk]

    Raises
    ------
    ArgumentError
        A number that is none, or out of range.

    References
    ----------
    Xiao et al., "Efficient streaming language models with attention sinks", 2023 (arXiv:2309.17453).

    Examples
    --------
    >>> import cuattn
    >>> cuattn.streaming_mask(4, 4, sinks=1, local=2).astype(int)
    array([[1, 0, 0, 0],
           [1, 1, 0, 0],
           [1, 1, 1, 0],
           [1, 0, 1, 1]])
    """
    sinks, local = _bound("sinks", sinks), _bound("local", local)
    return _where(nq, nk, lambda aligned, key: ((key < sinks) | (aligned - key < local)) & (key <= aligned))


def vertical_slash_mask(seqlen_q: int, seqlen_k: int, block_size: Any, vertical: Any, slash: Any) -> Grid:
    """Keep every block that a chosen key or a chosen diagonal touches, where the causal mask shows it.

    Parameters
    ----------
    seqlen_q, seqlen_k : int
        N and M.
    block_size : int or (int, int)
        (bq, bk).
    vertical : integers [n], [heads, n] or [batch, heads, n]
        Keys j that every later query may see; -1 is none, so that heads may have different numbers of them.
    slash : integers [n], [heads, n] or [batch, heads, n]
        Distances (i + M - N) - j at which every query may see a key; -1 is none.

    Returns
    -------
    bool array [nq, nk], or [heads, nq, nk] or [batch, heads, nq, nk] as the two are broadcast

    Raises
    ------
    ArrayTypeError, DTypeError, ShapeError
        Not lists, or arrays of the CPU, of integers in such shapes.
    ArgumentError
        A number that is none, or out of range: keys and distances are -1 to M - 1.

    References
    ----------
    Jiang et al., "MInference 1.0", 2024 (arXiv:2407.02490).

    Examples
    --------
    >>> import cuattn
    >>> cuattn.vertical_slash_mask(8, 8, 2, vertical=[0], slash=[0]).astype(int)
    array([[1, 0, 0, 0],
           [1, 1, 0, 0],
           [1, 0, 1, 0],
           [1, 0, 0, 1]])
    """
    sizes = _sizes(seqlen_q, seqlen_k, block_size)
    chosen = []
    for name, given in (("vertical", vertical), ("slash", slash)):
        numbers = integers(name, given, range(1, 4), "[n], [heads, n] or [batch, heads, n]")
        _check_range(name, numbers, -1, sizes[0][1] - 1)
        chosen.append(numbers)
    try:
        leading = np.broadcast_shapes(chosen[0].shape[:-1], chosen[1].shape[:-1])
    except ValueError as error:
        shapes = " and ".join(str(list(x.shape)) for x in chosen)
        raise ShapeError(f"vertical and slash have shapes {shapes}; but for the last axis they must fit") from error
    keys, distances = (np.broadcast_to(x, (*leading, x.shape[-1])) for x in chosen)
    with _room(*sizes, of=math.prod(leading)):
        blocks = _Blocks(*sizes)
        kept = np.empty((*leading, *blocks.shape), bool)
        for at in np.ndindex(*leading):
            kept[at] = blocks.touched_by_keys(keys[at]) | blocks.touched_by_distances(distances[at])
    return kept


def bigbird_mask(
    nq: int,
    nk: int,
    *,
    num_window: int = 3,
    num_global: int = 1,
    num_random: int = 3,
    seed: int = 0,
    causal: bool = False,
) -> Grid:
    """Keep a window, the first and the last blocks both ways, and some more of each row at random.

    The same numbers give the same mask everywhere: what is drawn is drawn by ``numpy.random.Philox(key=seed)``.

    Parameters
    ----------
    nq, nk : int
        Blocks of queries and of keys.
    num_window : int
        Blocks around I' = I + nk - nq that row I keeps; of an even number the one more is to the left.
    num_global : int
        So many first and so many last blocks see everything and are seen by everything.
    num_random : int
        Blocks that each row keeps of those that it lacks, drawn without replacement, row after row.
    seed : int, 0 to 2^128 - 1
    causal : bool
        Keep, and draw, only blocks J <= I'.

    Returns
    -------
    bool array [nq, nk]

    Raises
    ------
    ArgumentError
        A number that is none, or out of range.

    References
    ----------
    Zaheer et al., "Big Bird: transformers for longer sequences", 2020 (arXiv:2007.14062).

    Examples
    --------
    >>> import cuattn
    >>> cuattn.bigbird_mask(5, 5, num_random=1).sum(axis=1).tolist()
    [5, 5, 5, 5, 5]
    """
    window, edge = _bound("num_window", num_window), _bound("num_global", num_global)
    count, seed = _bound("num_random", num_random), integer("seed", seed, 0, 2**128 - 1)
    causal, nk = check_flag("causal", causal), _bound("nk", nk)

    def keeps(aligned: NDArray[np.int64], key: NDArray[np.int64]) -> Grid:
        distance = key - aligned
        seen = distance <= (0 if causal else MAX_EXTENT)
        kept = (-(window // 2) <= distance) & (distance <= (window - 1) // 2)
        kept |= (aligned < edge) | (aligned >= nk - edge) | (key < edge) | (key >= nk - edge)
        kept &= seen
        draw = np.random.Generator(np.random.Philox(key=seed))
        for row, visible in zip(kept, seen, strict=True):
            row[draw.permutation(np.flatnonzero(visible & ~row))[:count]] = True
        return np.asarray(kept)

    return _where(nq, nk, keeps)


class _Blocks:
    """The first and last key of each block, and the keys that its first and last query lie on: [1, nk] and [nq, 1]."""

    def __init__(self, seqlens: tuple[int, int], block_size: tuple[int, int]) -> None:
        n, m = seqlens
        bq, self.bk = block_size
        self.shape = nq, nk = num_blocks(seqlens, block_size)
        first_query = np.arange(nq)[:, None] * bq
        self.first_aligned = first_query + (m - n)
        self.last_aligned = np.minimum(first_query + bq, n) - 1 + (m - n)
        self.first_key = np.arange(nk)[None] * self.bk
        self.last_key = np.minimum(self.first_key + self.bk, m) - 1

    def touched_by_keys(self, keys: NDArray[np.int64]) -> Grid:
        """Return the blocks that have one of the keys and a query that lies on it or behind."""
        nearest = np.full(self.shape[1], MAX_EXTENT, np.int64)
        keys = keys[keys >= 0]
        np.minimum.at(nearest, keys // self.bk, keys)
        return np.asarray(nearest <= self.last_aligned)

    def touched_by_distances(self, distances: NDArray[np.int64]) -> Grid:
        """Return the blocks that have a query at one of the distances behind a key."""
        distances = np.sort(distances[distances >= 0])
        least = np.maximum(self.first_aligned - self.last_key, 0)
        up_to = np.searchsorted(distances, self.last_aligned - self.first_key, side="right")
        return np.asarray(up_to > np.searchsorted(distances, least))


def _where(nq: Any, nk: Any, keeps: Callable[[NDArray[np.int64], NDArray[np.int64]], Any]) -> Grid:
    """Return what ``keeps`` says of the blocks of keys that those of queries lie on, [nq, 1], and those of keys."""
    nq, nk = _bound("nq", nq), _bound("nk", nk)
    with _room((nq, nk), (1, 1), what=f"a grid of nq = {nq} by nk = {nk} blocks"):
        return np.asarray(keeps(np.arange(nq)[:, None] + (nk - nq), np.arange(nk)))


def _sizes(seqlen_q: Any, seqlen_k: Any, block_size: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    return (seqlen("seqlen_q", seqlen_q), seqlen("seqlen_k", seqlen_k)), block_size_pair(block_size)


def _room(
    seqlens: tuple[int, int], block_size: tuple[int, int], *, of: int = 1, what: str = ""
) -> AbstractContextManager[None]:
    """Refuse a grid for which the machine has no memory: int64 and bool, a few of each at a time."""
    nq, nk = num_blocks(seqlens, block_size)
    named = f"a grid for seqlen_q = {seqlens[0]}, seqlen_k = {seqlens[1]} and block_size = {block_size}"
    return allocating(what or named, 24 * nq * nk + of * nq * nk + 32 * (nq + nk))


def _bound(name: str, value: Any, *, optional: bool = False) -> int:
    return integer(name, value, 0, MAX_EXTENT, optional=optional)


def _check_range(name: str, numbers: NDArray[np.int64], low: int, high: int) -> None:
    wrong = (numbers < low) | (numbers > high)
    if wrong.any():
        raise ArgumentError(f"{name} holds {numbers[wrong].ravel()[0]}; {low} to {high} are allowed")
