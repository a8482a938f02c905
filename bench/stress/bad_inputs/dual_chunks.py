"""Calls of dual-chunk attention: see `bench.stress.bad_inputs.calls`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import cuattn
from bench.stress.bad_inputs.call import Call
from bench.stress.bad_inputs.calls import heads, normal, packed

__all__ = ["DUAL_CHUNK_TARGETS"]

B, N, H, D, E = 2, 5, 4, 32, 16
CHUNKS = {"chunk_size": 4, "local_size": 1}
OPTIONS = {"scale": 0.3, "softcap": 2.0, "keys_rotated": True, "rope": cuattn.Rotary(), "return_lse": True}


def dual_chunk_attention() -> Call:
    options = {"logit_factor": [1.0, 1.5], "out": np.zeros((B, N, H, E), np.float32)}
    return Call(cuattn.dual_chunk_attention, heads() | CHUNKS, OPTIONS | options)


def dual_chunk_attention_packed() -> Call:
    options = {"logit_factor": 1.5, "out": np.zeros((10, H, E), np.float32)}
    return Call(cuattn.dual_chunk_attention, packed() | CHUNKS, OPTIONS | options)


def dual_chunk_attention_backward() -> Call:
    given = heads()
    out, lse = cuattn.dual_chunk_attention(**given, **CHUNKS, return_lse=True)
    saved = {"dout": normal(B, N, H, E, seed=4), **given, "out": out, "lse": lse}
    options = {name: x for name, x in OPTIONS.items() if name != "return_lse"}
    return Call(cuattn.dual_chunk_attention_backward, saved | CHUNKS, options | {"logit_factor": [1.0, 1.5]})


def dual_chunk_decode_attention() -> Call:
    pages = {"k_pages": normal(6, 4, 2, D, seed=1), "v_pages": normal(6, 4, 2, E, seed=2)}
    tables = {"block_tables": np.array([[5, 1], [0, -1]], np.int32), "seqlens_k": np.array([7, 4], np.int32)}
    options = {name: x for name, x in OPTIONS.items() if name != "keys_rotated"}
    more = {"logit_factor": [1.0, 1.5], "num_splits": 2, "out": np.zeros((B, 1, H, E), np.float32)}
    return Call(cuattn.dual_chunk_decode, {"q": normal(B, 1, H, D), **pages, **tables, **CHUNKS}, options | more)


def dual_chunk_positions() -> Call:
    return Call(cuattn.dual_chunk_positions, {"positions": np.arange(9), **CHUNKS})


def dual_chunk_logit_factor() -> Call:
    given: dict[str, Any] = {"seqlen": np.array([10, 1000]), "trained": 100, "kind": "qwen"}
    return Call(cuattn.dual_chunk_logit_factor, given)


_OWN = (
    *(dual_chunk_attention, dual_chunk_attention_packed, dual_chunk_attention_backward),
    dual_chunk_decode_attention,
    *(dual_chunk_positions, dual_chunk_logit_factor),
)
DUAL_CHUNK_TARGETS: dict[str, Callable[[], Call]] = {function.__name__: function for function in _OWN}
