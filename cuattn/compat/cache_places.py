"""Where a call with a cache finds its entries, and where it puts new ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cuattn.addresses import address
from cuattn.compat.arguments import plain
from cuattn.compat.cache_tokens import Tokens
from cuattn.errors import ArgumentError, NotSupportedError, ShapeError
from cuattn.kv.slots import slot_mapping
from cuattn.ops.attention.arguments import MAX_EXTENT
from cuattn.ops.decode import arguments
from cuattn.ops.decode.lengths import integers
from cuattn.runtime.arrays import module_of
from cuattn.runtime.executor import Executor

__all__ = ["Places", "Where", "places_of"]


@dataclass(slots=True)
class Where:
    """The arguments that say where entries are, as the caller gave them; ``table_name`` is what the table is called."""

    cache_seqlens: Any
    cache_batch_idx: Any
    cache_leftpad: Any
    table: Any
    table_name: str
    rotary_seqlens: Any = None


@dataclass(slots=True)
class Places:
    """Old and new entries of the sequences; arrays of ``xp``, which is NumPy unless some of them came on a device."""

    xp: Any
    k: Any  # the cache that queries attend to
    v: Any
    tables: Any  # its pages of each sequence, or None: sequence b has batch entry b
    visible: Any  # keys that queries see, [batch]
    pages: Any  # where the caller's cache is written: pages of each sequence, [batch, max_pages]
    page_size: int
    seqlens: Any  # entries before the call, [batch]
    rotary_seqlens: Any  # the position of the first new entry, [batch]
    queries: Tokens
    new: Tokens

    @property
    def positions(self) -> Any:
        """Positions of new entries, [tokens]."""
        return self.new.numbers(self.xp, self.rotary_seqlens).reshape(-1)

    def query_positions(self, consecutive: bool) -> Any:
        """Positions of the queries: from that of the first new entry on; or all there."""
        return self.queries.numbers(self.xp, self.rotary_seqlens, consecutive)

    def slots(self) -> Any:
        """Where new entries go, [tokens], as `append_kv` takes it."""
        if self.new.each is not None:
            return slot_mapping(self.pages, self.seqlens, self.new.each, self.page_size)
        sequence, entry = self.new.counted_from(self.xp, self.seqlens)
        page = entry // self.page_size
        last = max(self.pages.shape[1] - 1, 0)  # a page that the table has not is no place: the slot is -1
        slots = self.pages[sequence, self.xp.minimum(page, last)].astype(np.int64) * self.page_size
        return self.xp.where(page <= last, slots + entry % self.page_size, -1)

    def problem(self, q: Any, max_seqlen_q: Any, options: dict[str, Any]) -> arguments.DecodeProblem:
        """The call of `cuattn.decode_attention` or of a paged function, checked."""
        if self.queries.each is None:
            options = options | {"max_seqlen_q": max_seqlen_q}
            tables = self.pages if self.tables is None else self.tables
            return arguments.check_paged_varlen(q, self.k, self.v, tables, self.queries.starts, self.visible, **options)
        if self.tables is None:
            return arguments.check(q, self.k, self.v, self.visible, **options)
        return arguments.check_paged(q, self.k, self.v, self.tables, self.visible, **options)


def places_of(executor: Executor, k: Any, v: Any, queries: Tokens, new: Tokens, where: Where) -> Places:
    """Check the arguments that say where entries are, by value where the host sees them, and make one thing of them."""
    batch, (num_pages, page_size) = queries.batch, k.shape[:2]
    tables, seen_tables = _tables(executor, where, batch, num_pages)
    capacity = tables.shape[1] * page_size
    room = "" if where.table is None else f"; {where.table_name} has room for {capacity}"
    seqlens, seen = _lengths(executor, "cache_seqlens", where.cache_seqlens, batch, capacity)
    if new.seen is not None:
        added = f"{new.each} new entries each" if new.each is not None else "the new entries"
        _check_range("cache_seqlens", seen, 0, capacity - new.seen, f", for {added}{room}")
    leftpad = np.zeros(batch, np.int32)
    ends = None if seen is None or new.seen is None else seen + new.seen
    if where.cache_leftpad is not None:
        given = integers(executor, "cache_leftpad", where.cache_leftpad, batch, 1, "[batch]")
        _check_range("cache_leftpad", given.seen, 0, ends)
        leftpad = given.array
    if where.table is not None and seen_tables is not None and ends is not None:
        _check_pages(where.table_name, seen_tables, ends, num_pages, page_size)
    turned = (
        seqlens
        if where.rotary_seqlens is None
        else _lengths(executor, "rotary_seqlens", where.rotary_seqlens, batch, 0)[0]
    )

    given_arrays = (tables, seqlens, leftpad, turned, *(x.starts for x in (queries, new) if x.starts is not None))
    xp = module_of(*given_arrays)
    seqlens, leftpad, turned = (xp.asarray(x).astype(np.int32) for x in (seqlens, leftpad, turned))
    pages = tables if xp is np else xp.asarray(tables, np.int32)  # those on the host are still to be checked
    visible = seqlens + new.counts(xp)
    places = Places(xp, k, v, pages, visible, pages, page_size, seqlens, turned, queries, new)
    if where.cache_leftpad is not None:  # one slot a page: any entry of the cache can then be the first
        places.k, places.v = _slot_pages("k_cache", k), _slot_pages("v_cache", v)
        places.tables = _slots_from(xp, pages, leftpad, page_size)
        places.visible = xp.maximum(visible - leftpad, 0)
    elif where.table is None and where.cache_batch_idx is None:
        places.k, places.v, places.tables = k[:batch], v[:batch], None
    return places


def _tables(executor: Executor, where: Where, batch: int, num_pages: int) -> tuple[Any, Any]:
    """The pages of each sequence, [batch, max_pages], and what the host sees of them."""
    rows: Any = None
    if where.cache_batch_idx is not None:
        rows = integers(executor, "cache_batch_idx", where.cache_batch_idx, batch, 1, "[batch]")
    if where.table is None:
        if rows is not None:
            _check_range("cache_batch_idx", rows.seen, 0, num_pages - 1)
            return rows.array[:, None], None
        if num_pages < batch:
            raise ShapeError(f"k_cache has batch {num_pages} and q has batch {batch}; it must have as many, or more")
        return np.arange(batch)[:, None], None
    given = integers(executor, where.table_name, where.table, batch if rows is None else None, 2, "[batch, max_blocks]")
    if rows is None:
        return given.array, given.seen
    _check_range("cache_batch_idx", rows.seen, 0, given.array.shape[0] - 1)
    xp = module_of(given.array, rows.array)
    seen = None if given.seen is None or rows.seen is None else given.seen[rows.seen]
    return xp.asarray(given.array)[xp.asarray(rows.array)], seen


def _lengths(executor: Executor, name: str, lengths: Any, batch: int, default: int) -> tuple[Any, Any]:
    """Return a length of each sequence, and what the host can see of it, int64."""
    if lengths is None:
        lengths = default
    if getattr(lengths, "ndim", None) == 0:
        lengths = plain(name, lengths)
    if isinstance(lengths, int | np.integer) and not isinstance(lengths, bool):
        if not -(2**31) <= lengths < 2**31:
            raise ArgumentError(f"{name} is {lengths}; integers of 32 bits are allowed")
        known = np.full(batch, lengths, np.int64)
        return known, known
    given = integers(executor, name, lengths, batch, 1, "[batch]")
    return given.array, None if given.seen is None else given.seen.astype(np.int64)


def _check_range(name: str, values: Any, low: int, high: Any, why: str = "") -> None:
    """Raise `ArgumentError` unless ``low <= values <= high``; None is unknown."""
    if values is None:
        return
    values = values.astype(np.int64)
    wrong = (values < low) | (False if high is None else values > high)
    if wrong.any():
        at = int(np.argmax(wrong))
        most = "" if high is None else f" to {np.broadcast_to(high, values.shape)[at]}"
        raise ArgumentError(f"{name}[{at}] is {values[at]}; {low}{most} {'is' if not most else 'are'} allowed{why}")


def _check_pages(name: str, tables: Any, seqlens: Any, num_pages: int, page_size: int) -> None:
    """Raise `ArgumentError` if a page with a key of a sequence does not exist; the other entries may hold anything."""
    if page_size < 1:
        return
    used = np.arange(tables.shape[1]) < -(-seqlens // page_size)[:, None]
    wrong = used & ((tables < 0) | (tables >= num_pages))
    if wrong.any():
        b, i = (int(n) for n in np.argwhere(wrong)[0])
        raise ArgumentError(
            f"{name}[{b}, {i}] is {tables[b, i]}, a page that the {seqlens[b]} keys of sequence {b} need; "
            f"there are the pages 0 to {num_pages - 1}"
        )


def _slots_from(xp: Any, pages: Any, leftpad: Any, page_size: int) -> Any:
    """The slot of every entry of each sequence from entry ``leftpad`` on, [batch, capacity]; none where no page is."""
    max_pages = pages.shape[1]
    entry = leftpad[:, None] + xp.arange(max_pages * page_size, dtype=np.int32)
    page = xp.take_along_axis(pages, xp.minimum(entry // max(page_size, 1), max(max_pages - 1, 0)), 1)
    slots = page.astype(np.int64) * page_size + entry % max(page_size, 1)
    return xp.clip(slots, -1, MAX_EXTENT).astype(np.int32)


def _slot_pages(name: str, cache: Any) -> Any:
    """A contiguous cache as pages of one slot, [batch_cache * capacity, 1, kv_heads, ...], without a copy."""
    num_slots = cache.shape[0] * cache.shape[1]
    pages = cache.reshape(num_slots, 1, *cache.shape[2:])
    if address(pages) != address(cache) or num_slots > MAX_EXTENT:
        raise NotSupportedError(
            f"{name} has strides {cache.strides} for shape {tuple(cache.shape)}; with cache_leftpad its batch entries "
            f"(or pages) must follow one another in memory, at most {MAX_EXTENT} slots in all"
        )
    return pages
