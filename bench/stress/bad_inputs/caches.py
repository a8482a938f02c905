"""A small valid call of every method of the caches and of their steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import cuattn
from bench.stress.bad_inputs.call import Call

__all__ = ["CACHE_TARGETS"]

SIZES = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 32, "dtype": np.float32}
OPTIONS = {"head_dim_v": 16, "kv_format": "int8", "k_scale": 0.5, "v_scale": [0.5, 0.25], "array_module": np}


def _new(kind: Any) -> Any:
    if kind is cuattn.PagedKVCache:
        return kind(8, 4, **SIZES)
    if kind is cuattn.KVCache:
        return kind(3, 8, **SIZES)
    return kind(1, 4, batch=3, max_chunk=4, **SIZES)


def _filled(kind: Any) -> tuple[Any, list[Any]]:
    """A cache with two sequences of three tokens."""
    cache = _new(kind)
    seqs = [cache.add(), cache.add()]
    rows = np.ones((6, 2, 32), np.float32)
    with cache.reserve(seqs, 3) as step:
        for layer in range(2):
            step.append(layer, rows, rows)
        step.commit()
    return cache, seqs


def _method(kind: Any, name: str) -> Callable[[], Call]:
    def make() -> Any:
        cache, seqs = _filled(kind)
        given = {
            "add": {"tokens": [1, 2, 3], "cache_key": "k"},
            "reserve": {"seqs": seqs, "counts": np.array([2, 1]), "tokens": [[1, 2], [3]]},
            "truncate": {"seq": seqs[0], "length": 2},
            "layer_arrays": {"layer": 1},
            "block_tables": {"seqs": seqs},
            "swap_out": {"seqs": seqs},
            "cached_tokens": {"seq": seqs[0]},
        }.get(name, {"seq": seqs[0]})
        return Call(getattr(cache, name), given)

    return make


def _constructor(kind: Any) -> Callable[[], Call]:
    def make() -> Any:
        if kind is cuattn.PagedKVCache:
            return Call(kind, {"num_pages": 8, "page_size": 4, **SIZES}, OPTIONS | {"prefix_caching": True})
        if kind is cuattn.KVCache:
            return Call(kind, {"batch": 3, "max_seqlen": 8, **SIZES}, OPTIONS)
        own = {"num_sinks": 1, "window": 4, "batch": 3, **SIZES}
        return Call(kind, own, OPTIONS | {"rope": cuattn.Rotary(), "max_chunk": 4})

    return make


def _step(kind: Any, name: str) -> Callable[[], Call]:
    def make() -> Any:
        cache, seqs = _filled(kind)
        step = cache.reserve(seqs, [2, 1])
        rows = np.ones((3, 2, 32), np.float32)
        if name == "append":
            return Call(step.append, {"layer": 0, "k": rows, "v": rows.copy()})
        step.append(0, rows, rows)
        options = {"scale": 0.3, "softcap": 2.0, "sinks": np.zeros(4, np.float32), "return_lse": True}
        return Call(step.attend, {"layer": 0, "q": np.ones((3, 4, 32), np.float32)}, options)

    return make


_PAGED, _ROWS, _STREAMING = cuattn.PagedKVCache, cuattn.KVCache, cuattn.StreamingKVCache
_METHODS = {
    _PAGED: ("add", "reserve", "truncate", "free", "fork", "layer_arrays", "block_tables", "swap_out"),
    _ROWS: ("add", "reserve", "truncate", "free", "reset", "layer_arrays"),
    _STREAMING: ("add", "reserve", "truncate", "cached_tokens"),
}
CACHE_TARGETS: dict[str, Callable[[], Call]] = {}
for _kind, _names in _METHODS.items():
    CACHE_TARGETS[_kind.__name__] = _constructor(_kind)
    CACHE_TARGETS |= {f"{_kind.__name__}.{_name}": _method(_kind, _name) for _name in _names}
    CACHE_TARGETS |= {f"{_kind.__name__} step.{_name}": _step(_kind, _name) for _name in ("append", "attend")}
