"""slot_mapping: where the next tokens of sequences go in a paged cache."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from cuattn import rotary_arguments
from cuattn.errors import ArgumentError, ArrayTypeError, ShapeError
from cuattn.launch import Executor, executor_for

__all__ = ["slot_mapping"]


def slot_mapping(block_tables: Any, lengths: Any, counts: Any, page_size: int) -> Any:
    """The slots of new tokens: ``counts[b]`` of them behind the ``lengths[b]`` that sequence b has in the cache.

    Parameters
    ----------
    block_tables : integers [batch, max_pages]
        Entry i of a sequence is the page of its tokens ``i * page_size`` and on. Entries beyond the new tokens are not
        read. NumPy arrays and lists give a NumPy array, an array on a device one on that device.
    lengths : integers [batch]
        Tokens that each sequence has already; a list, a NumPy array, or one on the device of ``block_tables``.
    counts : int, or integers [batch], on the host
        New tokens of each sequence: their sum is the length of the result, so it is not taken from a device.
    page_size : int
        Slots of a page, at least 1.

    Returns
    -------
    array [tokens], int64
        ``page * page_size + slot`` of the new tokens, those of sequence 0 first, as `append_kv` takes them. On a
        device, where nobody looks (``CUATTN_CHECK=1`` does), -1 for a token that the table has no page for.

    Raises
    ------
    ArrayTypeError, DTypeError
        An argument is no array, holds no integers, or lies elsewhere.
    ShapeError
        Shapes that do not fit each other.
    ArgumentError
        A ``page_size`` below 1; a negative count; or, of what the host sees: a negative length, more tokens than the
        table has room for, or a page below 0 for one of them.

    Examples
    --------
    >>> import cuattn
    >>> cuattn.slot_mapping([[7, 2], [5, -1]], lengths=[3, 0], counts=[2, 1], page_size=4)
    array([31,  8, 20])
    """
    if isinstance(page_size, bool | np.bool_) or not isinstance(page_size, int | np.integer) or page_size < 1:
        raise ArgumentError(f"page_size is {page_size!r}; an integer of at least 1 is allowed")
    lists = {"block_tables": block_tables, "lengths": lengths}
    placed = {name: x for name, x in lists.items() if rotary_arguments.on_device(x)}
    executor = executor_for(**(placed or {"block_tables": np.empty(0)}))
    tables, seen_tables = rotary_arguments.integers(executor, "block_tables", block_tables)
    starts, seen_lengths = rotary_arguments.integers(executor, "lengths", lengths)
    if tables.ndim != 2:
        raise ShapeError(f"block_tables has shape {tuple(tables.shape)}; [batch, max_pages] is needed")
    batch, max_pages = (int(extent) for extent in tables.shape)
    if tuple(starts.shape) != (batch,):
        raise ShapeError(f"lengths has shape {tuple(starts.shape)}; [{batch}] is needed, one a row of block_tables")
    numbers = _check_counts(counts, batch)
    sequence = np.repeat(np.arange(batch), numbers)
    place = np.arange(sequence.size) - np.repeat(np.cumsum(numbers) - numbers, numbers)
    if seen_lengths is not None:
        _check_room(seen_lengths, numbers, max_pages * int(page_size))
        if seen_tables is not None:
            position = seen_lengths[sequence] + place
            _check_used(seen_tables, sequence, position // page_size)
    return _slots(executor, tables, starts, sequence, place, int(page_size))


def _check_counts(counts: Any, batch: int) -> np.ndarray[Any, Any]:
    if not isinstance(counts, int | np.integer | list | tuple | np.ndarray) or isinstance(counts, bool | np.bool_):
        raise ArrayTypeError(
            f"counts is a {type(counts).__name__}; an int, a list or a NumPy array is needed: the host has to know them"
        )
    numbers = np.asarray(counts)
    if numbers.size and numbers.dtype.kind not in "iu":
        raise ArgumentError(f"counts holds {numbers.dtype}; integers are needed")
    if numbers.shape not in ((), (batch,)):
        raise ShapeError(f"counts has shape {numbers.shape}; one number or [{batch}] is needed")
    if numbers.size and numbers.min() < 0:
        raise ArgumentError(f"counts holds {int(numbers.min())}; numbers from 0 on are allowed")
    return np.broadcast_to(numbers.astype(np.int64), (batch,))


def _check_room(lengths: np.ndarray[Any, Any], counts: np.ndarray[Any, Any], capacity: int) -> None:
    if not lengths.size:
        return
    if lengths.min() < 0:
        raise ArgumentError(f"lengths[{int(lengths.argmin())}] is {int(lengths.min())}; numbers from 0 on are allowed")
    ends = lengths.astype(np.int64) + counts
    if (ends > capacity).any():
        b = int(ends.argmax())
        raise ArgumentError(
            f"sequence {b} has {int(lengths[b])} tokens and gets {int(counts[b])}; its row of block_tables has "
            f"room for {capacity}"
        )


def _check_used(tables: np.ndarray[Any, Any], sequence: np.ndarray[Any, Any], index: np.ndarray[Any, Any]) -> None:
    pages = tables[sequence, index]
    if pages.size and pages.min() < 0:
        i = int(pages.argmin())
        raise ArgumentError(
            f"block_tables[{int(sequence[i])}, {int(index[i])}] is {int(pages[i])}; the new tokens need that page"
        )


def _slots(
    executor: Executor,
    tables: Any,
    lengths: Any,
    sequence: np.ndarray[Any, Any],
    place: np.ndarray[Any, Any],
    page_size: int,
) -> Any:
    """The slot of each token; every operation stays where the tables are."""
    max_pages = int(tables.shape[1])
    if executor.name == "host":
        position = lengths[sequence].astype(np.int64) + place
        return tables[sequence, position // page_size].astype(np.int64) * page_size + position % page_size
    cupy = sys.modules["cupy"]
    with executor.on_device():
        if not sequence.size or not max_pages:
            return cupy.full(sequence.size, -1, np.int64)
        sequence, place = executor.put(sequence, np.int64), executor.put(place, np.int64)
        position = lengths[sequence].astype(np.int64) + place
        index = position // page_size
        page = tables[sequence, cupy.clip(index, 0, max_pages - 1)].astype(np.int64)
        there = (position >= 0) & (index < max_pages) & (page >= 0)
        return cupy.where(there, page * page_size + position % page_size, -1)
