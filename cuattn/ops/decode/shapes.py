"""Ranks, dtypes and extents of queries and caches that go together, and every check of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from cuattn.dtypes import DTYPES, ELEMENTS
from cuattn.errors import DTypeError, ShapeError
from cuattn.formats import KV_FORMATS, KVFormat
from cuattn.formats import resolve as resolve_format
from cuattn.head_dims import MAX_HEAD_DIM
from cuattn.ops.attention.arguments import MAX_EXTENT, Extents

__all__ = ["CONTIGUOUS", "PACKED", "PAGED", "Names", "capacity_of", "check_dtypes", "check_extents", "check_ranks"]


_PLAIN = {dtype: KV_FORMATS[dtype.name] for dtype in DTYPES}


@dataclass(frozen=True, slots=True, eq=False)
class Names:
    """What the caller calls the arrays, and how they are laid out."""

    k: str
    v: str
    q_layout: str
    cache_layout: str


CONTIGUOUS = Names("k_cache", "v_cache", "[batch, seqlen_q, heads, head_dim]", "[batch, capacity, kv_heads, head_dim]")
PAGED = Names("k_pages", "v_pages", CONTIGUOUS.q_layout, "[num_pages, page_size, kv_heads, head_dim]")
PACKED = Names("k_pages", "v_pages", "[tokens, heads, head_dim]", PAGED.cache_layout)


def check_ranks(names: Names, q: Any, k: Any, v: Any) -> None:
    """Raise `ShapeError`, naming the argument, for a rank that it may not have, and for an extent of 2^31."""
    _check_ranks(names, tuple(q.shape), tuple(k.shape), tuple(v.shape))


@lru_cache(maxsize=1024)
def _check_ranks(names: Names, q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> None:
    rank_q = 3 if names is PACKED else 4
    if len(q) != rank_q:
        raise ShapeError(f"q has shape {q}, rank {len(q)}; rank {rank_q} is needed: {names.q_layout}")
    for name, shape in ((names.k, k), (names.v, v)):
        if len(shape) != 4:
            raise ShapeError(f"{name} has shape {shape}, rank {len(shape)}; rank 4 is needed: {names.cache_layout}")
    for name, shape in (("q", q), (names.k, k), (names.v, v)):
        if max(shape) > MAX_EXTENT:
            raise ShapeError(f"{name} has shape {shape}; an extent may be at most {MAX_EXTENT}")


def check_dtypes(names: Names, q: Any, k: Any, v: Any, kv_format: Any) -> KVFormat:
    """Return the format of the cache, which q must go with."""
    if q.dtype not in DTYPES:
        raise DTypeError(f"q has dtype {q.dtype} ({q.dtype.str}); allowed are {', '.join(ELEMENTS)} (native)")
    row = _PLAIN[q.dtype] if kv_format is None and k.dtype == q.dtype else resolve_format(names.k, k.dtype, kv_format)
    if not row.quantized and k.dtype != q.dtype:
        raise DTypeError(f"{names.k} has dtype {k.dtype} and q has dtype {q.dtype}; they must be the same")
    if v.dtype != k.dtype and resolve_format(names.v, v.dtype, kv_format) is not row:
        raise DTypeError(f"{names.v} has dtype {v.dtype} and {names.k} has dtype {k.dtype}; one format is needed")
    if row.quantized and q.dtype == np.float64:
        raise DTypeError(f"q has dtype float64; {row.name} caches go with float16, bfloat16 and float32")
    return row


def capacity_of(tables: Any, page_size: int) -> int:
    """Return how many keys a sequence may have, by the columns of its block table."""
    if page_size < 1:
        raise ShapeError(f"k_pages has page size {page_size}; at least 1 is needed")
    max_pages = int(tables.shape[1])
    if max_pages * page_size > MAX_EXTENT:
        raise ShapeError(
            f"block_tables has {max_pages} columns of pages of {page_size} slots; a sequence may have {MAX_EXTENT} keys"
        )
    return max_pages * page_size


def check_extents(names: Names, q: Any, k: Any, v: Any, batch: int, capacity: int, row: KVFormat) -> Extents:
    """Return the extents of a problem. Raises `ShapeError`, naming the argument, if there is none."""
    return _extents(names, tuple(q.shape), tuple(k.shape), tuple(v.shape), batch, capacity, row.elements_per_item)


@lru_cache(maxsize=1024)
def _extents(
    names: Names,
    q: tuple[int, ...],
    k: tuple[int, ...],
    v: tuple[int, ...],
    batch: int,
    capacity: int,
    elements_per_item: int,
) -> Extents:
    """Return the extents for shapes, checked when they are first seen."""
    seqlen_q, num_heads, head_dim = q[-3:]
    num_kv_heads = k[2]
    if names is CONTIGUOUS and k[0] != batch:
        raise ShapeError(f"{names.k} has batch {k[0]} (shape {k}) and q has batch {batch}; they must be the same")
    if v[:3] != k[:3]:
        raise ShapeError(f"{names.v} has shape {v} and {names.k} has shape {k}; all but the last axis must be the same")
    k_head_dim, head_dim_v = k[3] * elements_per_item, v[3] * elements_per_item
    if k_head_dim != head_dim:
        items = "" if elements_per_item == 1 else f" ({elements_per_item} numbers an item)"
        raise ShapeError(
            f"{names.k} has head dim {k_head_dim}{items} and q has head dim {head_dim}; they must be the same"
        )
    for name, extent in (("q", head_dim), (names.v, head_dim_v)):
        if not 1 <= extent <= MAX_HEAD_DIM:
            raise ShapeError(f"{name} has head dim {extent}; allowed are 1 to {MAX_HEAD_DIM}")
    if num_heads % num_kv_heads if num_kv_heads else num_heads:
        raise ShapeError(
            f"q has {num_heads} heads and {names.k} has {num_kv_heads}; the number of query heads must be a multiple "
            "of the number of key/value heads"
        )
    return Extents(batch, seqlen_q, capacity, num_heads, num_kv_heads, head_dim, head_dim_v, names is PACKED)
