"""Where `flash_attn_with_kvcache` finds the entries of its cache, and where it puts new ones."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from cuattn.attention_arguments import MAX_EXTENT
from cuattn.decode import arguments
from cuattn.decode.lengths import integers
from cuattn.errors import ArgumentError, NotSupportedError, ShapeError
from cuattn.extents import address
from cuattn.launch import Executor
from cuattn.paging.slots import slot_mapping
from cuattn.scalars import as_integer, integer

__all__ = ["Places", "places_of"]


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
    seqlen_q: int
    seqlen_new: int

    @property
    def positions(self) -> Any:
        """Of new entries, [batch, seqlen_new]."""
        return self.seqlens[:, None] + self.xp.arange(self.seqlen_new, dtype=np.int32)

    def query_positions(self, consecutive: bool) -> Any:
        """[batch, seqlen_q], from the first new entry on; or all there."""
        steps = self.xp.arange(self.seqlen_q, dtype=np.int32)
        return self.seqlens[:, None] + (steps if consecutive else self.xp.zeros_like(steps))

    def slots(self) -> Any:
        """Where new entries go, [batch * seqlen_new], as `append_kv` takes it."""
        return slot_mapping(self.pages, self.seqlens, self.seqlen_new, self.page_size)

    def problem(self, q: Any, options: dict[str, Any]) -> arguments.DecodeProblem:
        """The call of `cuattn.decode_attention` or `cuattn.paged_attention`, checked."""
        if self.tables is None:
            return arguments.check(q, self.k, self.v, self.visible, **options)
        return arguments.check_paged(q, self.k, self.v, self.tables, self.visible, **options)


def places_of(
    executor: Executor,
    arrays: dict[str, Any],
    seqlen_new: int,
    cache_seqlens: Any,
    cache_batch_idx: Any,
    cache_leftpad: Any,
    block_table: Any,
) -> Places:
    """Check the arguments that say where entries are, by value where the host sees them, and make one thing of them."""
    if block_table is not None:
        for name, x in (("cache_batch_idx", cache_batch_idx), ("cache_leftpad", cache_leftpad)):
            if x is not None:
                raise NotSupportedError(f"{name} beside block_table does not work; the pages of a table say it all")
    k, v = arrays["k_cache"], arrays["v_cache"]
    (batch, seqlen_q), (num_pages, page_size) = arrays["q"].shape[:2], k.shape[:2]
    if max(num_pages, page_size) > MAX_EXTENT:
        raise ShapeError(f"k_cache has shape {tuple(k.shape)}; an extent may be at most {MAX_EXTENT}")
    if block_table is not None:
        tables = integers(executor, "block_table", block_table, batch, 2, "[batch, max_blocks]").array
    elif cache_batch_idx is not None:
        entries = integers(executor, "cache_batch_idx", cache_batch_idx, batch, 1, "[batch]")
        _check_range("cache_batch_idx", entries.seen, 0, num_pages - 1)
        tables = entries.array[:, None]
    elif num_pages < batch:
        raise ShapeError(f"k_cache has batch {num_pages} and q has batch {batch}; it must have as many, or more")
    else:
        tables = np.arange(batch)[:, None]
    capacity = tables.shape[1] * page_size
    seqlens, known = _seqlens(executor, cache_seqlens, batch, capacity)
    _check_range("cache_seqlens", known, 0, capacity - seqlen_new, f", for {seqlen_new} new entries each")
    leftpad = np.zeros(batch, np.int32)
    if cache_leftpad is not None:
        given = integers(executor, "cache_leftpad", cache_leftpad, batch, 1, "[batch]")
        _check_range("cache_leftpad", given.seen, 0, None if known is None else known + seqlen_new)
        leftpad = given.array

    xp = np if all(isinstance(x, np.ndarray) for x in (tables, seqlens, leftpad)) else sys.modules["cupy"]
    seqlens, leftpad = (xp.asarray(x).astype(np.int32) for x in (seqlens, leftpad))
    pages = tables if xp is np else xp.asarray(tables, np.int32)  # those on the host are still to be checked
    visible = seqlens + seqlen_new
    places = Places(xp, k, v, pages, visible, pages, page_size, seqlens, seqlen_q, seqlen_new)
    if cache_leftpad is not None:  # one slot a page: any entry of the cache can then be the first
        places.k, places.v = _slot_pages("k_cache", k), _slot_pages("v_cache", v)
        places.tables = pages * page_size + leftpad[:, None] + xp.arange(page_size, dtype=np.int32)
        places.visible = xp.maximum(visible - leftpad, 0)
    elif block_table is None and cache_batch_idx is None:
        places.k, places.v, places.tables = k[:batch], v[:batch], None
    return places


def _seqlens(executor: Executor, cache_seqlens: Any, batch: int, capacity: int) -> tuple[Any, Any]:
    """Entries of each sequence before the call, and what the host can see of them."""
    if cache_seqlens is None:
        cache_seqlens = capacity
    if as_integer(cache_seqlens) is not None:
        cache_seqlens = integer("cache_seqlens", cache_seqlens, -MAX_EXTENT, MAX_EXTENT)
        known = np.full(batch, cache_seqlens, np.int64)
        return known, known
    given = integers(executor, "cache_seqlens", cache_seqlens, batch, 1, "[batch]")
    return given.array, given.seen


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


def _slot_pages(name: str, cache: Any) -> Any:
    """A contiguous cache as pages of one slot, [batch_cache * capacity, 1, kv_heads, ...], without a copy."""
    num_slots = cache.shape[0] * cache.shape[1]
    pages = cache.reshape(num_slots, 1, *cache.shape[2:])
    if address(pages) != address(cache) or num_slots > MAX_EXTENT:
        raise NotSupportedError(
            f"{name} has strides {cache.strides} for shape {tuple(cache.shape)}; with cache_leftpad its batch entries "
            f"must follow one another in memory, at most {MAX_EXTENT} slots in all"
        )
    return pages
