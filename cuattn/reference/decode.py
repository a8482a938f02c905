"""Attention to cached keys and values: each sequence by itself, its keys gathered one by one from where they lie.

A contiguous cache [B, Mmax, G, D] is one of B pages of Mmax slots, and sequence b has page b.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from cuattn.reference.attention import attention
from cuattn.reference.kv_formats import dequantize
from cuattn.reference.rotary import rope as rotate
from cuattn.reference.softmax import Array

__all__ = [
    "CachedSequence",
    "cached_sequences",
    "decode_attention",
    "gather_pages",
    "paged_attention",
    "paged_attention_varlen",
]


def gather_pages(pages: ArrayLike, block_table: ArrayLike, length: int) -> Array:
    """Gather what the first `length` slots of a sequence hold, [length, ...], out of `pages` [P, S, ...].

    Slot j is slot ``j % S`` of page ``block_table[j // S]``. A page outside of [0, P) is one of zeros; `length` is at
    most what the table has room for.

    >>> pages = np.arange(6).reshape(3, 2)
    >>> gather_pages(pages, [2, 0, -1], 3).tolist()
    [4, 5, 0]
    """
    source, table = np.asarray(pages), np.asarray(block_table, dtype=np.int64).reshape(-1)
    num_pages, page_size = source.shape[:2]
    slots = np.arange(min(max(int(length), 0), table.size * page_size))
    page = table[slots // page_size] if page_size else slots
    there = (page >= 0) & (page < num_pages)
    gathered = np.zeros((slots.size, *source.shape[2:]), source.dtype)
    gathered[there] = source[page[there], slots[there] % max(page_size, 1)]
    return gathered


class CachedSequence(NamedTuple):
    """One sequence of a decode call, as a problem of :func:`cuattn.reference.attention`."""

    where: Any  #: its index into q, out and, behind the axis of heads, lse: a batch entry, or a slice of tokens
    q: Array  #: [1, N, H, D], rotated
    k: Array  #: [1, M, G, D], numbers, rotated
    v: Array  #: [1, M, G, E], numbers
    options: dict[str, Any]  #: of :func:`cuattn.reference.attention`


def _of_slots(pages: Any, scale: Any, block_scales: Any, kv_format: Any, table: Array, length: int) -> Array:
    """Return the numbers [1, M, G, dim] of a sequence: codes, times block scales, times the scale of slot or head."""
    codes = gather_pages(pages, table, length)
    factor = None if scale is None else np.asarray(scale)
    if factor is not None and factor.ndim == 3:  # per slot and head
        factor = gather_pages(factor, table, length)
    blocks = None if block_scales is None else gather_pages(block_scales, table, length)
    return dequantize(codes, kv_format, scale=factor, block_scales=blocks)[None]


def cached_sequences(
    q: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike,
    block_tables: ArrayLike,
    seqlens_k: ArrayLike,
    cu_seqlens_q: ArrayLike | None = None,
    *,
    kv_format: Any = None,
    k_scale: ArrayLike | None = None,
    v_scale: ArrayLike | None = None,
    k_block_scales: ArrayLike | None = None,
    v_block_scales: ArrayLike | None = None,
    rope: Any = None,
    rotate_keys: bool = False,
    alibi_slopes: ArrayLike | None = None,
    operand: Callable[[Array], Array] = np.asarray,
    dtype: DTypeLike = np.float64,
    **options: Any,
) -> Iterator[CachedSequence]:
    """Each sequence of a call, its keys and values gathered, dequantized and rotated in `dtype`.

    Arguments are those of :func:`paged_attention_varlen`, or without `cu_seqlens_q` of :func:`paged_attention`.
    `operand` is applied to keys and values that a scale per slot or per block has multiplied, and to what has been
    rotated: kernels round there.
    """
    queries, tables = np.asarray(q), np.asarray(block_tables)
    in_slots = [
        blocks is not None or (scale is not None and np.ndim(scale) == 3)
        for scale, blocks in ((k_scale, k_block_scales), (v_scale, v_block_scales))
    ]
    keywords = "base", "interleaved", "rotary_dim", "cos", "sin"
    turn = None if rope is None else {name: getattr(rope, name) for name in keywords}
    for b, length in enumerate(np.asarray(seqlens_k).tolist()):
        where: Any = slice(b, b + 1)
        own = queries[where]
        if cu_seqlens_q is not None:
            starts = np.asarray(cu_seqlens_q)
            where = slice(int(starts[b]), int(starts[b + 1]))
            own = queries[None, where]
        keys = _of_slots(k_pages, k_scale, k_block_scales, kv_format, tables[b], length).astype(dtype)
        values = _of_slots(v_pages, v_scale, v_block_scales, kv_format, tables[b], length).astype(dtype)
        if turn is not None:
            first = keys.shape[1] - own.shape[1]
            own = operand(rotate(own, first + np.arange(own.shape[1]), dtype=dtype, **turn))
            if rotate_keys:
                keys = rotate(keys, np.arange(keys.shape[1]), dtype=dtype, **turn)
        if in_slots[0] or (turn is not None and rotate_keys):
            keys = operand(keys)
        if in_slots[1]:
            values = operand(values)
        slopes = alibi_slopes
        if slopes is not None and np.ndim(slopes) == 2:
            slopes = np.asarray(slopes)[b : b + 1]
        yield CachedSequence(where, own, keys, values, {**options, "alibi_slopes": slopes})


def paged_attention(
    q: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike,
    block_tables: ArrayLike,
    seqlens_k: ArrayLike,
    *,
    causal: bool | str = True,
    dtype: DTypeLike = np.float64,
    **options: Any,
) -> tuple[Array, Array]:
    """Attention of q [B, N, H, D] to the first ``seqlens_k[b]`` cached keys: out [B, N, H, E] and lse [B, H, N].

    `k_pages` [P, S, G, D] and `v_pages` [P, S, G, E]; key j of sequence b lies where :func:`gather_pages` finds it with
    ``block_tables[b]``. The query tokens are the last ones of ``seqlens_k[b]``, their keys among the cached ones.

    `options`: scale, window, softcap, alibi_slopes and sinks as for :func:`cuattn.reference.attention`; `kv_format`,
    `k_scale`, `v_scale`, `k_block_scales`, `v_block_scales` as for :func:`cuattn.reference.dequantize`, scales per slot
    and block scales lying in pages like the codes; `rope` (a :class:`cuattn.Rotary`) turns query i by position
    ``i + seqlens_k[b] - N``, and with `rotate_keys` key j by position j.

    >>> pages = np.arange(4.0).reshape(2, 2, 1, 1)
    >>> out, lse = paged_attention(np.zeros((1, 1, 1, 1)), pages, pages, [[1, 0]], [3])
    >>> round(out.item() * 3, 4), round(lse.item(), 4)
    (5.0, 1.0986)
    """
    batch, seqlen, num_heads = np.shape(q)[:3]
    out = np.zeros((batch, seqlen, num_heads, _head_dim_v(v_pages, options)), dtype)
    lse = np.full((batch, num_heads, seqlen), -np.inf, dtype)
    parts = cached_sequences(q, k_pages, v_pages, block_tables, seqlens_k, causal=causal, dtype=dtype, **options)
    for where, *arrays, own in parts:
        out[where], lse[where] = attention(*arrays, dtype=dtype, **own)
    return out, lse


def decode_attention(
    q: ArrayLike, k_cache: ArrayLike, v_cache: ArrayLike, seqlens_k: ArrayLike, **options: Any
) -> tuple[Array, Array]:
    """:func:`paged_attention` to contiguous caches [B, Mmax, G, D] and [B, Mmax, G, E]."""
    own_page = np.arange(np.shape(k_cache)[0]).reshape(-1, 1)
    return paged_attention(q, k_cache, v_cache, own_page, seqlens_k, **options)


def paged_attention_varlen(
    q: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike,
    block_tables: ArrayLike,
    cu_seqlens_q: ArrayLike,
    seqlens_k: ArrayLike,
    *,
    causal: bool | str = True,
    max_seqlen_q: int | None = None,
    dtype: DTypeLike = np.float64,
    **options: Any,
) -> tuple[Array, Array]:
    """:func:`paged_attention` of packed queries `q` [T, H, D]: out [T, H, E] and lse [H, T].

    The tokens of sequence b are ``q[cu_seqlens_q[b]:cu_seqlens_q[b + 1]]``. `max_seqlen_q` changes nothing.
    """
    tokens, num_heads = np.shape(q)[:2]
    out = np.zeros((tokens, num_heads, _head_dim_v(v_pages, options)), dtype)
    lse = np.full((num_heads, tokens), -np.inf, dtype)
    tables = k_pages, v_pages, block_tables, seqlens_k, cu_seqlens_q
    for where, *arrays, own in cached_sequences(q, *tables, causal=causal, dtype=dtype, **options):
        of_sequence, lse_of_sequence = attention(*arrays, dtype=dtype, **own)
        out[where], lse[:, where] = of_sequence[0], lse_of_sequence[0]
    return out, lse


def _head_dim_v(v_pages: ArrayLike, options: dict[str, Any]) -> int:
    """Return E; in the formats of 4 bits two of its numbers share a byte."""
    return int(np.shape(v_pages)[-1]) * (2 if options.get("v_block_scales") is not None else 1)
