"""`flash_attn_with_kvcache` of every version: new keys and values go into a cache, then queries attend to all of it.

The versions differ in names and in what may be packed; here both sides, queries and new entries, may be either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cuattn.compat.cache_codes import Codes
from cuattn.compat.cache_places import Places, Where, places_of
from cuattn.compat.cache_tokens import Tokens, packed_tokens, tokens_of_each
from cuattn.dtypes import DTYPES
from cuattn.errors import ArgumentError, ShapeError
from cuattn.kv.append import append_kv
from cuattn.kv.arguments import check_apart
from cuattn.ops.attention.arguments import MAX_EXTENT
from cuattn.ops.attention.slow_calls import warn_if_slow
from cuattn.ops.decode.launch import decode
from cuattn.ops.rotary.arguments import DEFAULT_BASE
from cuattn.ops.rotary.rope import Rotary, rope
from cuattn.runtime.executor import executor_for

__all__ = ["CacheCall", "attend_with_cache", "rotation_table"]


@dataclass(slots=True)
class CacheCall:
    """The arguments of a call, its options already under the names of `cuattn.decode_attention`."""

    q: Any
    k_cache: Any
    v_cache: Any
    k: Any
    v: Any
    rotary_cos: Any
    rotary_sin: Any
    rotary_interleaved: bool
    where: Where
    options: dict[str, Any]
    cu_seqlens_q: Any = None
    max_seqlen_q: Any = None
    cu_seqlens_k_new: Any = None
    codes: Codes | None = None  # what 8-bit arrays mean


def attend_with_cache(call: CacheCall, return_lse: bool) -> Any:
    """Check everything, write the new entries, attend; returns ``out``, or (out, lse)."""
    _check_pairs(call)
    given = {name: getattr(call, name) for name in ("q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin")}
    optional = {"k", "v", "rotary_cos", "rotary_sin"}
    given = {name: x for name, x in given.items() if x is not None or name not in optional}
    executor = executor_for(**given)
    arrays: dict[str, Any] = {name: executor.asarray(name, x) for name, x in given.items()}
    _check_ranks(arrays, call)
    codes, options = call.codes or Codes(), dict(call.options)
    with executor.on_device():
        queries, new = _tokens(executor, arrays, call)
        places = places_of(executor, arrays["k_cache"], arrays["v_cache"], queries, new, call.where)
        descaled = codes.read(executor, arrays, queries, options)
        rotary = None
        if call.rotary_cos is not None:
            tables = (rotation_table(arrays[name], arrays["q"].dtype) for name in ("rotary_cos", "rotary_sin"))
            rotary = Rotary(DEFAULT_BASE, call.rotary_interleaved, None, *tables)
            _rotate_queries(arrays, places, rotary, call, options)
        # Nothing is written before everything is checked.
        problem = places.problem(arrays["q"], call.max_seqlen_q, options)
        if new.total:
            _check_apart(executor, arrays, call)
            new_k, new_v = (arrays[name].reshape(new.total, *arrays[name].shape[-2:]) for name in "kv")
            positions = None if rotary is None else places.positions
            append_kv(
                *(new_k, new_v, arrays["k_cache"], arrays["v_cache"], places.slots()),
                positions=positions,
                rope=rotary,
                kv_format=options.get("kv_format"),
            )
        warn_if_slow(problem, pairs=problem.num_pairs)
        result = decode(problem, return_lse=return_lse)
        if descaled is None:
            return result
        return (descaled(result[0]), result[1]) if return_lse else descaled(result)


def _check_apart(executor: Any, arrays: dict[str, Any], call: CacheCall) -> None:
    """Raise `OverlapError` if the cache, which is written first, shares memory with what is read after that."""
    where = call.where
    lists = {name: getattr(where, name) for name in ("cache_seqlens", "cache_batch_idx", "cache_leftpad")}
    lists |= {where.table_name: where.table, "cu_seqlens_q": call.cu_seqlens_q}
    read = {name: executor.metadata(name, x) for name, x in lists.items() if getattr(x, "ndim", 0)}
    check_apart({name: arrays[name] for name in ("k_cache", "v_cache")}, {"q": arrays["q"], **read})


def rotation_table(table: Any, dtype: np.dtype[Any]) -> Any:
    """A table of rotations in the dtype that `cuattn.Rotary` takes; those of the package have the dtype of q."""
    narrow = table.ndim == 2 and (table.dtype in DTYPES or table.dtype.name.startswith("float8_"))
    return table.astype(np.float32) if dtype != np.float64 and narrow and table.dtype.itemsize <= 2 else table


def _rotate_queries(
    arrays: dict[str, Any], places: Places, rotary: Rotary, call: CacheCall, options: dict[str, Any]
) -> None:
    """Turn q, or let the kernel turn it where that has the same positions in mind."""
    queries, new, where = places.queries, places.new, call.where
    consecutive = options["causal"] or queries.each == 1 or options["window"] is not None
    plain = where.cache_leftpad is None and where.rotary_seqlens is None
    if plain and consecutive and queries.each is not None and queries.each == new.each:
        options["rope"] = rotary  # query i is then where the kernel takes it to be, among the last keys
    else:
        words = {"interleaved": rotary.interleaved, "cos": rotary.cos, "sin": rotary.sin}
        arrays["q"] = rope(arrays["q"], places.query_positions(consecutive), **words)


def _check_pairs(call: CacheCall) -> None:
    """Raise `ArgumentError` for one array without the other, or without what it is to be used for."""
    for names in (("k", "v"), ("rotary_cos", "rotary_sin")):
        there = [name for name in names if getattr(call, name) is not None]
        if len(there) == 1:
            raise ArgumentError(f"{there[0]} is given alone; give both of {' and '.join(names)}, or neither")
    if call.rotary_cos is not None and call.k is None:
        raise ArgumentError("rotary_cos and rotary_sin are given without k and v; they rotate k and q")
    if call.k is not None and call.where.cache_seqlens is None:
        raise ArgumentError("k and v are given without cache_seqlens; it says behind which entries they go")
    if call.cu_seqlens_k_new is not None and call.k is None:
        raise ArgumentError("cu_seqlens_k_new is given without k and v, which it divides")


def _check_ranks(arrays: dict[str, Any], call: CacheCall) -> None:
    """Raise `ShapeError` for a rank that is not that of the call; the rest is checked later."""
    packed = {"q": call.cu_seqlens_q, "k": call.cu_seqlens_k_new, "v": call.cu_seqlens_k_new}
    for name in ("q", "k_cache", "v_cache", "k", "v"):
        rank = 4 if packed.get(name) is None else 3
        if name in arrays and arrays[name].ndim != rank:
            x = arrays[name]
            raise ShapeError(f"{name} has shape {tuple(x.shape)}, rank {x.ndim}; rank {rank} is needed")
        if name in arrays and max(arrays[name].shape) > MAX_EXTENT:
            raise ShapeError(f"{name} has shape {tuple(arrays[name].shape)}; an extent may be at most {MAX_EXTENT}")


def _tokens(executor: Any, arrays: dict[str, Any], call: CacheCall) -> tuple[Tokens, Tokens]:
    """The queries, and the new entries, which must be of the same sequences."""
    q, k, v = arrays["q"], arrays.get("k"), arrays.get("v")
    if call.cu_seqlens_q is None:
        queries = tokens_of_each(int(q.shape[0]), int(q.shape[1]))
    else:
        queries = packed_tokens(executor, "cu_seqlens_q", call.cu_seqlens_q, None, int(q.shape[0]))
    if k is None or v is None:
        return queries, tokens_of_each(queries.batch, 0)
    if call.cu_seqlens_k_new is not None:
        if v.shape[:2] != k.shape[:2]:
            raise ShapeError(
                f"k has shape {tuple(k.shape)} and v has shape {tuple(v.shape)}; [total_new, kv_heads, ...] is needed"
            )
        return queries, packed_tokens(
            executor, "cu_seqlens_k_new", call.cu_seqlens_k_new, queries.batch, int(k.shape[0])
        )
    if k.shape[0] != queries.batch or v.shape[:2] != k.shape[:2]:
        raise ShapeError(
            f"k has shape {tuple(k.shape)}, v has shape {tuple(v.shape)} and q has batch {queries.batch}; "
            "[batch, seqlen_new, kv_heads, ...] is needed"
        )
    return queries, tokens_of_each(queries.batch, int(k.shape[1]))
