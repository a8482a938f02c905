"""slot_mapping: where the next tokens of sequences go in a paged cache."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuattn.errors import ArgumentError, ArrayTypeError, ShapeError
from cuattn.ops.rotary import arguments as rotary_arguments
from cuattn.runtime.executor import MAX_GRID, Executor, executor_for
from cuattn.runtime.places import check_size, host_list
from cuattn.runtime.structs import struct_layout
from cuattn.scalars import MAX_EXTENT, as_integer, integer

__all__ = ["slot_mapping"]

NUM_THREADS = 128


def slot_mapping(block_tables: Any, lengths: Any, counts: Any, page_size: int) -> Any:
    """Return the slots of new tokens: ``counts[b]`` of them behind the ``lengths[b]`` that sequence b has in the cache.

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
        device, where nobody looks (``CUATTN_CHECK=1`` does), -1 for a token that the table has no page for, or one so
        large that its slots have no numbers of 64 bits.

    Raises
    ------
    ArrayTypeError, DTypeError
        An argument is no array, holds no integers, or lies elsewhere.
    ShapeError
        Shapes that do not fit each other.
    ArgumentError
        A ``page_size`` below 1; a negative count; or, of what the host sees: a negative length, more tokens than the
        table has room for, or a page for one of them that is below 0 or whose slots have no numbers of 64 bits.

    Examples
    --------
    >>> import cuattn
    >>> cuattn.slot_mapping([[7, 2], [5, -1]], lengths=[3, 0], counts=[2, 1], page_size=4)
    array([31,  8, 20])
    """
    page_size = integer("page_size", page_size, 1, MAX_EXTENT)
    lists = {"block_tables": block_tables, "lengths": lengths}
    placed = {name: x for name, x in lists.items() if rotary_arguments.on_device(name, x)}
    executor = executor_for(**(placed or {"block_tables": np.empty(0)}))
    tables, seen_tables = rotary_arguments.integers(executor, "block_tables", block_tables)
    starts, seen_lengths = rotary_arguments.integers(executor, "lengths", lengths)
    if tables.ndim != 2:
        raise ShapeError(f"block_tables has shape {tuple(tables.shape)}; [batch, max_pages] is needed")
    batch, max_pages = (int(extent) for extent in tables.shape)
    if tuple(starts.shape) != (batch,):
        raise ShapeError(f"lengths has shape {tuple(starts.shape)}; [{batch}] is needed, one a row of block_tables")
    numbers = _check_counts(counts, batch)
    if seen_lengths is not None:
        _check_room(seen_lengths, numbers, max_pages * page_size)
        if seen_tables is not None:
            _check_used(seen_tables, seen_lengths.astype(np.int64), numbers, page_size)
    return _slots(executor, tables, starts, numbers, page_size)


def _check_counts(counts: Any, batch: int) -> np.ndarray[Any, Any]:
    if as_integer(counts) is not None:
        numbers = np.array(integer("counts", counts, 0, MAX_EXTENT))
    elif isinstance(counts, list | tuple):
        numbers = host_list("counts", counts)
    elif isinstance(counts, np.ndarray):
        numbers = check_size("counts", counts)
    else:
        raise ArrayTypeError(
            f"counts is a {type(counts).__name__}; an int, a list or a NumPy array is needed: the host has to know them"
        )
    if isinstance(numbers, np.ma.MaskedArray) or (numbers.size and numbers.dtype.kind not in "iu"):
        raise ArgumentError(f"counts holds {numbers.dtype}; integers are needed")
    if numbers.shape not in ((), (batch,)):
        raise ShapeError(f"counts has shape {numbers.shape}; one number or [{batch}] is needed")
    if numbers.size and numbers.min() < 0:
        raise ArgumentError(f"counts holds {int(numbers.min())}; numbers from 0 on are allowed")
    total = np.broadcast_to(numbers, (batch,)).sum(dtype=np.float64)
    if total > MAX_EXTENT:
        raise ArgumentError(f"counts holds {total:.0f} tokens in all; at most {MAX_EXTENT} may be new")
    return np.broadcast_to(numbers.astype(np.int64), (batch,))


def _check_room(lengths: np.ndarray[Any, Any], counts: np.ndarray[Any, Any], capacity: int) -> None:
    if not lengths.size:
        return
    if lengths.min() < 0:
        raise ArgumentError(f"lengths[{int(lengths.argmin())}] is {int(lengths.min())}; numbers from 0 on are allowed")
    lengths = lengths.astype(np.int64)
    wrong = lengths > capacity - counts  # a sum could be beyond 64 bits
    if wrong.any():
        b = int(wrong.argmax())
        raise ArgumentError(
            f"sequence {b} has {int(lengths[b])} tokens and gets {int(counts[b])}; its row of block_tables has "
            f"room for {capacity}"
        )


def _check_used(
    tables: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any], counts: np.ndarray[Any, Any], page_size: int
) -> None:
    """Raise if an entry that new tokens need is no page, or its slots have no numbers."""
    entry = np.arange(tables.shape[1])
    first, last = (lengths // page_size)[:, None], ((lengths + counts - 1) // page_size)[:, None]
    most = last_page(page_size)
    wrong = ((tables < 0) | (tables > most)) & (entry >= first) & (entry <= last) & (counts > 0)[:, None]
    if wrong.any():
        b, i = (int(index) for index in np.argwhere(wrong)[0])
        raise ArgumentError(
            f"block_tables[{b}, {i}] is {int(tables[b, i])}; the new tokens need that page, and pages are 0 to {most}"
        )


def last_page(page_size: int) -> int:
    """Return the last page all of whose slots are numbers of 64 bits."""
    return 2**63 // page_size - 1


def _slots(executor: Executor, tables: Any, lengths: Any, counts: np.ndarray[Any, Any], page_size: int) -> Any:
    """Compute the slot of each token where the tables are."""
    starts = np.zeros(counts.size + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    num_tokens = int(starts[-1])
    slots = executor.empty((num_tokens,), np.int64)
    if num_tokens:
        table_stride, entry_stride = (stride // tables.dtype.itemsize for stride in tables.strides)
        layout = struct_layout("slot_mapping", "SlotsLayout").pack(
            num_tokens=num_tokens,
            max_pages=tables.shape[1],
            page_size=page_size,
            last_page=last_page(page_size),
            table_stride=table_stride,
            entry_stride=entry_stride,
            lengths_stride=lengths.strides[0] // lengths.dtype.itemsize,
            num_sequences=counts.size,
            tables_are_64_bit=tables.dtype.itemsize == 8,
            lengths_are_64_bit=lengths.dtype.itemsize == 8,
        )
        kernel = executor.kernel("slot_mapping", {"NUM_THREADS": NUM_THREADS}, "cuattn_slot_mapping")
        args = {
            "g_block_tables": tables,
            "g_lengths": lengths,
            "g_starts": executor.put(starts, np.int64),
            "g_slots": slots,
            "layout": layout,
        }
        executor.launch(kernel, (min(-(-num_tokens // NUM_THREADS), MAX_GRID[0]),), (NUM_THREADS,), args)
    executor.finish(slots)
    return slots
