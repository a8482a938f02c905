"""Lists of the tiles that a block mask keeps, as kernels walk over them (kernels/attention/tile_list.cuh).

A tile has the rows of one CTA and ``columns`` columns of the other side, in granules of eight. Blocks that are smaller
than a tile, or that lie apart, are gathered into whole tiles; a kernel that copies more than a granule at once has
pieces of several, of which all are in a tile or none. What is here is NumPy on the host, once for each mask and
shape of tiles: `BlockMask.derived` keeps it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cuattn.errors import ShapeError
from cuattn.scalars import MAX_EXTENT

if TYPE_CHECKING:
    from cuattn.ops.sparse.block_mask import BlockMask

__all__ = ["GRANULE", "Side", "TileLists", "num_tiles", "tile_lists"]

GRANULE = 8  # columns
_FULL = 255  # the bits of a granule of which everything is visible
_HEADER = 4
_GATHERED, _MIXED = 2, 1

Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Side:
    """Whose rows a CTA has, and the shape of its tiles: ``rows`` of its own side, ``columns`` of the other; those of
    a ``piece``, which divides them, stay together.
    """

    of_keys: bool
    rows: int
    columns: int
    piece: int = GRANULE


class TileLists(NamedTuple):
    """The lists of masks, one for each batch entry or one for all of them.

    ``work`` [entries, blocks of rows]: how many tiles there are, of all heads; blocks that a mask has not are -1.
    """

    array: NDArray[np.int32]
    work: NDArray[np.int64]


def tile_lists(masks: Sequence[BlockMask], side: Side) -> TileLists:
    """List the tiles of one mask, whose batch axis says how many lists there are, or of one mask a sequence."""
    parts = [_tiles(mask, side) for mask in masks]
    entries, first = [], 0
    for mask, part in zip(masks, parts, strict=True):
        blocks = part.counts.shape[2]
        for b in range(mask.batch):
            head = blocks if mask.num_heads > 1 else 0
            entries.append((first + b * mask.num_heads * blocks, head, part.rows_per_word, 0))
        first += part.counts.size
    counts = np.concatenate([part.counts.ravel() for part in parts]) if parts else np.zeros(0, np.int64)
    begins_at = _HEADER * (1 + len(entries))
    tiles_at = begins_at + counts.size + 1
    tiles_at += tiles_at % 2  # a tile is read as a pair
    details_at = tiles_at + 2 * int(counts.sum())
    # Behind the last words: what lengths on a device that are not those of the masks may lead to.
    total = details_at + sum(part.details.size for part in parts) + side.rows * max(side.columns // 32, 1)
    if total > MAX_EXTENT:
        raise ShapeError(f"the lists of the mask have {total} entries; at most {MAX_EXTENT} are allowed")
    array = np.zeros(total, np.int32)
    array[:3] = len(entries), begins_at, side.piece
    array[_HEADER:begins_at] = np.asarray(entries, np.int32).ravel()
    array[begins_at] = tiles_at
    array[begins_at + 1 : begins_at + 1 + counts.size] = tiles_at + 2 * np.cumsum(counts)
    at, detail = tiles_at, details_at
    for part in parts:
        behind = at + 2 * part.places.size
        array[at:behind:2], array[at + 1 : behind : 2] = part.places, part.offsets + detail
        array[detail : detail + part.details.size] = part.details
        at, detail = behind, detail + part.details.size
    work = np.full((len(entries), max((part.counts.shape[2] for part in parts), default=0)), -1, np.int64)
    row = 0
    for part in parts:
        batch, _, blocks = part.counts.shape
        work[row : row + batch, :blocks] = part.counts.sum(axis=1)
        row += batch
    return TileLists(array, work)


def num_tiles(mask: BlockMask, side: Side) -> int:
    """Return how many tiles the list of a mask has, without making it."""
    if side.of_keys:
        mask = mask.T
    num_blocks, num_granules = -(-mask.seqlen_q // side.rows), -(-mask.seqlen_k // GRANULE)
    pieces = _pieces(mask, side.rows, num_blocks)
    owner = np.unique(pieces.owner * num_granules + pieces.granule) // max(num_granules, 1)
    return int(np.sum(-(-np.bincount(owner) // (side.columns // GRANULE))))


class _Tiles(NamedTuple):
    """The tiles of one mask: how many each block of rows has, and what the list says of each."""

    counts: Integers  # [batch, heads, blocks of rows]
    places: Integers  # granule * 4 + GATHERED * 2 + MIXED
    offsets: Integers  # of the details of each tile
    details: NDArray[np.int32]
    rows_per_word: int


class _Pieces(NamedTuple):
    """Granules of which some rows of a CTA see something: one entry for each word of rows."""

    owner: Integers  # the block of rows, counted over batch entries and heads
    word: Integers  # of its words, counted from its first row
    granule: Integers
    bits: NDArray[np.uint8]  # which of the columns are visible


def _tiles(mask: BlockMask, side: Side) -> _Tiles:
    if side.of_keys:
        mask = mask.T
    num_rows, num_columns = mask.seqlen_q, mask.seqlen_k
    heads = mask.batch * mask.num_heads
    num_blocks, num_granules = -(-num_rows // side.rows), -(-num_columns // GRANULE)
    slots = side.columns // GRANULE
    pieces = _pieces(mask, side.rows, num_blocks)
    rows_per_word = mask.block_size[0] if mask.elements is None else 1

    # The granules of each block of rows in their order, piece by piece, and so many of them in each tile.
    together = side.piece // GRANULE
    num_pieces = -(-num_granules // together)
    keys, index = np.unique(pieces.owner * num_pieces + pieces.granule // together, return_inverse=True)
    owner, piece = np.divmod(keys, max(num_pieces, 1))
    per_owner = np.bincount(owner, minlength=heads * num_blocks) * together
    counts = -(-per_owner // slots)
    rank = np.arange(keys.size) * together - _starts(per_owner)[owner]
    tile, slot = _starts(counts)[owner] + rank // slots, rank % slots
    granules = np.full((int(counts.sum()), slots), num_granules, np.int64)  # that number, or more: there is none
    in_piece = np.arange(together)
    granules[tile[:, None], slot[:, None] + in_piece] = piece[:, None] * together + in_piece
    expected = granules[:, :1] + np.arange(slots)
    follow = np.all((granules == expected) | (expected >= num_granules), axis=1)

    # The words of each tile: bytes, one for each granule.
    first_row = np.arange(num_blocks) * side.rows
    last_row = np.minimum(first_row + side.rows, num_rows) - 1
    num_words = np.tile(last_row // rows_per_word - first_row // rows_per_word + 1, heads)
    word_bytes = max(slots, 4)
    most = int(num_words.max(initial=0))
    words = np.zeros((granules.shape[0], most, word_bytes), np.uint8)
    where = tile[index.ravel()], pieces.word, slot[index.ravel()] + pieces.granule % together
    if mask.block_size[1] % GRANULE:  # neighbouring blocks share granules
        np.bitwise_or.at(words, where, pieces.bits)
    else:
        words[where] = pieces.bits
    owner_of_tile = np.repeat(np.arange(counts.size), counts)
    needed = num_words[owner_of_tile]
    mixed = np.count_nonzero(words == _FULL, axis=(1, 2)) < needed * slots
    if side.of_keys:  # keys that do not exist must not see anything: their probabilities have no bound
        mixed |= np.tile(first_row + side.rows > num_rows, heads)[owner_of_tile]

    sizes = np.where(follow, 0, slots) + np.where(mixed, needed * (word_bytes // 4), 0)
    offsets = _starts(sizes)
    details = np.zeros(int(sizes.sum()), np.int32)
    gathered = np.flatnonzero(~follow)
    details[offsets[gathered][:, None] + np.arange(slots)] = granules[gathered]
    has_words = mixed[:, None] & (np.arange(most) < needed[:, None])
    places = (offsets + np.where(follow, 0, slots))[:, None] + np.arange(most) * (word_bytes // 4)
    details[places[has_words][:, None] + np.arange(word_bytes // 4)] = words[has_words].view(np.int32)
    shape = mask.batch, mask.num_heads, num_blocks
    place = granules[:, 0] * 4 + np.where(follow, 0, _GATHERED) + np.where(mixed, _MIXED, 0)
    return _Tiles(counts.reshape(shape), place, offsets, details, rows_per_word)


def _pieces(mask: BlockMask, rows: int, num_blocks: int) -> _Pieces:
    """Cut the kept blocks at the rows of CTAs, and into granules."""
    bq, bk = mask.block_size
    nq, num_rows, num_columns = mask.grid[0], mask.seqlen_q, mask.seqlen_k
    starts = mask.indptr.reshape(-1, nq + 1)
    lists = np.repeat(np.arange(starts.shape[0] * nq), np.diff(starts, axis=1).ravel())
    head, block_row = np.divmod(lists, max(nq, 1))
    number, begin = np.arange(lists.size), block_row.astype(np.int64) * bq
    end = np.minimum(begin + bq, num_rows)
    if mask.elements is None:  # a part of each block for each CTA that has rows of it
        first = begin // rows
        parts = (end - 1) // rows - first + 1
        number = np.repeat(number, parts)
        block = first[number] + _within(parts)
        word = begin[number] // bq - block * rows // bq
    else:  # and here for each row
        parts = end - begin
        number = np.repeat(number, parts)
        row = begin[number] + _within(parts)
        block = row // rows
        word = row - block * rows
    owner = head[number] * num_blocks + block

    column = mask.indices[number].astype(np.int64) * bk
    behind = np.minimum(column + bk, num_columns)
    first_granule = column // GRANULE
    counts = (behind - 1) // GRANULE - first_granule + 1
    of = np.repeat(np.arange(number.size), counts)
    granule = first_granule[of] + _within(counts)
    low = np.maximum(column[of] - granule * GRANULE, 0)
    high = np.minimum(behind[of] - granule * GRANULE, GRANULE)
    bits = ((_FULL << low) & (_FULL >> (GRANULE - high))).astype(np.uint8)
    if mask.elements is not None:
        bits &= _element_bits(mask.elements, number[of], (row - begin[number])[of], granule * GRANULE - column[of])
        seen = bits != 0
        of, granule, bits = of[seen], granule[seen], bits[seen]
    return _Pieces(owner[of], word[of], granule, bits)


def _element_bits(elements: NDArray[np.bool_], block: Integers, row: Integers, first: Integers) -> NDArray[np.uint8]:
    """Return the bits of eight columns from ``first`` on, of a row of a block; those outside of it mean nothing."""
    columns = np.clip(first[:, None] + np.arange(GRANULE), 0, elements.shape[2] - 1)
    return np.packbits(elements[block[:, None], row[:, None], columns], axis=1, bitorder="little")[:, 0]


def _starts(counts: Any) -> Integers:
    """Return where each of so many begins, one after another."""
    return np.asarray(np.cumsum(counts) - counts)


def _within(counts: Any) -> Integers:
    """Return 0, 1, ... below each count, one after another."""
    return np.asarray(np.arange(int(np.sum(counts))) - np.repeat(_starts(counts), counts))
