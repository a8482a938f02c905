"""Into how many splits the keys of each sequence go, so that a call is expected to take the least time."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cuattn.ops.attention.bounds import Bounds
from cuattn.ops.decode.cost import CostModel, Items

__all__ = ["Blocks", "blocks_of", "expected", "for_lengths", "most_tiles", "time_of", "uniform"]

MAX_SPLITS = 256  # that are chosen; the merge reads every one
WORTHWHILE = 1.03  # more splits must make a call this much faster
# Lists for each sequence must make it this much faster than one number for all, which needs no list on the device.
WORTH_A_LIST = 1.05
# Candidates for the splits of the longest sequence.
_COUNTS = np.array([1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 128, 192, 256])

Integers = NDArray[np.int64]


class Blocks(NamedTuple):
    """Row blocks, of some tokens of one sequence each: the sequence, the index in it, and the tiles that it sees."""

    batch_idx: Integers
    block: Integers
    tiles: Integers


def blocks_of(seqlens_q: Integers, seqlens_k: Integers, tokens: int, block_n: int, bounds: Bounds) -> Blocks:
    """Return the row blocks of ``tokens`` tokens.

    >>> blocks_of(np.array([1, 0, 3]), np.array([100, 50, 130]), 2, 64, Bounds(right=0))
    Blocks(batch_idx=array([0, 2, 2]), block=array([0, 0, 1]), tiles=array([2, 3, 3]))
    """
    if seqlens_q.size and int(seqlens_q.max()) <= tokens and int(seqlens_q.min()) > 0:
        batch_idx = np.arange(seqlens_q.size)
        first = block = np.zeros_like(batch_idx)
        keys, queries = seqlens_k, seqlens_q
    else:
        num_blocks = -(-seqlens_q // tokens)
        batch_idx = np.repeat(np.arange(num_blocks.size), num_blocks)
        block = np.arange(batch_idx.size) - np.repeat(np.cumsum(num_blocks) - num_blocks, num_blocks)
        first = block * tokens
        keys, queries = seqlens_k[batch_idx], seqlens_q[batch_idx]
    last = np.minimum(first + tokens, queries) - 1
    begin, end = bounds.keys(first, last, bounds.diagonal(queries, keys), keys)
    return Blocks(batch_idx, block, np.maximum(-(-end // block_n) - begin // block_n, 0))


def most_tiles(tokens: int, seqlen_k: int, block_n: int, bounds: Bounds) -> int:
    """Return how many tiles a row block of ``tokens`` tokens of a sequence of at most ``seqlen_k`` keys may see."""
    width = bounds.width(tokens)
    width = seqlen_k if width is None else min(width, seqlen_k)
    whole = -(-seqlen_k // block_n)
    return min(whole, (width + block_n - 2) // block_n + 1) if width else 0  # a stretch may begin within a tile


@lru_cache(maxsize=4096)
def uniform(model: CostModel, num_blocks: int, tiles: int) -> int:
    """Choose the splits of each of ``num_blocks`` blocks (row blocks of all heads) that see ``tiles`` tiles each."""
    most = min(tiles, MAX_SPLITS, -(-2 * model.num_slots // max(num_blocks, 1)))
    if most <= 1 or num_blocks == 0:
        return 1
    counts = np.arange(1, most + 1)
    return int(counts[_first_good(model.even(num_blocks * counts, -(-tiles // counts), counts > 1))])


def for_lengths(model: CostModel, blocks: Blocks, batch: int, heads: int, *, listed: bool) -> int | Integers:
    """Choose the splits of every sequence, [batch]; or one number for all, which needs no lists.

    ``heads`` CTAs work on a split of a row block, one for each key/value head and block of heads. ``listed``: a list is
    made anyway.
    """
    tiles = blocks.tiles
    if not tiles.size:
        return 1
    longest = int(tiles.max())
    if int(tiles.min()) == longest:
        return uniform(model, heads * tiles.size, longest)
    per_sequence = np.zeros(batch, np.int64)
    np.maximum.at(per_sequence, blocks.batch_idx, tiles)
    # Chunks of which the longest sequence has so many, and those that fill every slot once or twice.
    total = heads * int(tiles.sum())
    filling = [max(1, -(-total // (n * model.num_slots))) for n in (1, 2)]
    chunks = np.unique(np.concatenate([-(-longest // _COUNTS[longest >= _COUNTS]), filling]))[::-1]
    choices = np.clip(-(-per_sequence // chunks[:, None]), 1, MAX_SPLITS)
    times = time_of(model, blocks, heads, choices)
    best = _first_good(times)
    if not listed or int(choices[best].max()) == 1:
        counts = np.unique(np.minimum(_COUNTS, longest))
        same = time_of(model, blocks, heads, np.broadcast_to(counts[:, None], (counts.size, batch)))
        good = _first_good(same)
        if same[good] <= WORTH_A_LIST * times[best]:
            return int(counts[good])
    result: Integers = choices[best]
    return result


def time_of(model: CostModel, blocks: Blocks, heads: int, choices: Integers) -> NDArray[np.float64]:
    """Return the time of each of ``choices`` [candidates, batch] of splits."""
    splits = choices[:, blocks.batch_idx]
    items = Items(
        num_ctas=heads * splits.sum(axis=1),
        total_tiles=heads * float(blocks.tiles.sum()),
        most_tiles=(-(-blocks.tiles // splits)).max(axis=1),
        fewest_tiles=(blocks.tiles // splits).min(axis=1),
        split=choices.max(axis=1) > 1,
    )
    return model.uneven(items)


def expected(model: CostModel, blocks: Blocks, heads: int, num_splits: int | Integers, batch: int) -> float:
    """Return the time of a choice."""
    if not blocks.tiles.size:
        return 0.0
    most = int(blocks.tiles.max())
    if isinstance(num_splits, int) and int(blocks.tiles.min()) == most:
        counts = np.array([num_splits])
        return float(model.even(heads * blocks.tiles.size * counts, -(-most // counts), counts > 1)[0])
    return float(time_of(model, blocks, heads, np.broadcast_to(num_splits, (1, batch)))[0])


def _first_good(times: NDArray[np.float64]) -> int:
    """Return the first candidate that is about as fast as the fastest: they stand in the order of their splits."""
    return int(np.argmax(times <= WORTHWHILE * times.min()))
