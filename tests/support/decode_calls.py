"""A small valid call of every decode function, by the names of its arguments: tests replace one of them, also by one
that is refused."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cuattn

__all__ = ["FUNCTIONS", "call", "quantized", "refused"]

FUNCTIONS = (cuattn.decode_attention, cuattn.paged_attention, cuattn.paged_attention_varlen)

# Three sequences of 2 queries; the pages hold 8 slots of 4 keys, sequence 1 shares its first page with sequence 0.
SEQLENS_K = np.array([7, 4, 0], np.int32)
TABLES = np.array([[5, 1], [5, -1], [-1, 99]], np.int32)


def call(function: Any, dtype: Any = np.float32, kv_format: str | None = None) -> dict[str, Any]:
    """4 query heads, 2 key/value heads, head dims 32 and 16, capacity 8."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(dtype)

    q, lengths = normal(3, 2, 4, 32), SEQLENS_K.copy()
    if function is cuattn.decode_attention:
        return {"q": q, "k_cache": normal(3, 8, 2, 32), "v_cache": normal(3, 8, 2, 16), "seqlens_k": lengths}
    pages = {"k_pages": normal(6, 4, 2, 32), "v_pages": normal(6, 4, 2, 16), "block_tables": TABLES.copy()}
    if function is cuattn.paged_attention:
        return {"q": q, **pages, "seqlens_k": lengths}
    cu_seqlens_q = np.array([0, 2, 4, 6], np.int32)
    return {"q": q.reshape(6, 4, 32), **pages, "cu_seqlens_q": cu_seqlens_q, "seqlens_k": lengths}


def quantized(function: Any, kv_format: str) -> dict[str, Any]:
    """The call with a cache of codes, whose values are as good as any, and what its format needs."""
    arguments = call(function)
    rng = np.random.default_rng(1)
    for name in ("k_cache", "v_cache", "k_pages", "v_pages"):
        if name in arguments:
            *slots, head_dim = arguments[name].shape
            codes = rng.integers(0, 120, (*slots, head_dim // 2 if "fp4" in kv_format else head_dim))
            arguments[name] = codes.astype(np.int8 if kv_format == "int8" else np.uint8)
            if "fp4" in kv_format:
                block, dtype = (16, ml_dtypes.float8_e4m3fn) if kv_format == "nvfp4" else (32, ml_dtypes.float8_e8m0fnu)
                arguments[f"{name[0]}_block_scales"] = np.ones((*slots, -(-head_dim // block)), dtype)
    return arguments | {"kv_format": kv_format}


def refused(
    function: Any, error: type[Exception], message: str, arguments: dict[str, Any] | None = None, **changes: Any
) -> None:
    """The call raises, and nothing of what it was given has changed."""
    arguments = (call(function) if arguments is None else arguments) | changes
    given = {name: x for name, x in arguments.items() if isinstance(x, np.ndarray) and x.nbytes < 2**20}
    arrays = {name: (x, x.copy()) for name, x in given.items()}
    with pytest.raises(error, match=message):
        function(**arguments)
    for name, (x, before) in arrays.items():
        assert x.tobytes() == before.tobytes(), name
