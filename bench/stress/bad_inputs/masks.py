"""A small valid call of every function that makes masks of blocks, and of the attention with patterns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import cuattn
from bench.stress.bad_inputs.call import Call

__all__ = ["MASK_TARGETS"]

GRID = np.array([[1, 0, 1], [0, 1, 1]], bool)


def _normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def from_blocks() -> Call:
    given = {"blocks": GRID.copy(), "seqlen_q": 3, "seqlen_k": 6, "block_size": 2}
    return Call(cuattn.BlockMask.from_blocks, given, {"elements": np.ones((4, 2, 2), bool)})


def from_dense() -> Call:
    return Call(cuattn.BlockMask.from_dense, {"mask": np.tri(5, 6, dtype=bool)}, {"block_size": (2, 3)})


def from_csr() -> Call:
    lists = {"indptr": np.array([0, 2, 3]), "indices": np.array([0, 2, 1])}
    given = {**lists, "seqlen_q": 3, "seqlen_k": 6, "block_size": 2}
    return Call(cuattn.BlockMask.from_csr, given, {"elements": np.ones((3, 2, 2), bool)})


def local_mask() -> Call:
    return Call(cuattn.local_mask, {"seqlen_q": 5, "seqlen_k": 7, "block_size": 2, "left": 2, "right": 0})


def strided_mask() -> Call:
    return Call(cuattn.strided_mask, {"nq": 3, "nk": 4, "stride": 2, "local": 1})


def global_mask() -> Call:
    return Call(cuattn.global_mask, {"nq": 3, "nk": 4, "blocks": np.array([0, -1])})


def streaming_mask() -> Call:
    return Call(cuattn.streaming_mask, {"nq": 3, "nk": 4, "sinks": 1, "local": 2})


def vertical_slash_mask() -> Call:
    given = {"seqlen_q": 5, "seqlen_k": 7, "block_size": (2, 3), "vertical": np.array([0, -1]), "slash": np.array([2])}
    return Call(cuattn.vertical_slash_mask, given)


def bigbird_mask() -> Call:
    options = {"num_window": 2, "num_global": 1, "num_random": 1, "seed": 3, "causal": True}
    return Call(cuattn.bigbird_mask, {"nq": 4, "nk": 5}, options)


STRIDED = {"local": 3, "causal": True, "scale": 0.3, "softcap": 2.0, "precision": "ieee"}


def strided_attention() -> Call:
    given = {"q": _normal(2, 5, 4, 32), "k": _normal(2, 7, 2, 32), "v": _normal(2, 7, 2, 32), "stride": 3}
    results = {"out": np.zeros((2, 5, 4, 32), np.float32), "return_lse": True}
    return Call(cuattn.strided_attention, given, STRIDED | results)


def strided_attention_backward() -> Call:
    saved = {
        "out": _normal(2, 5, 4, 32),
        "lse": np.full((2, 4, 5), 3.0, np.float32),
        "dout": _normal(2, 5, 4, 32, seed=1),
    }
    results = {
        "dq": np.zeros((2, 5, 4, 32), np.float32),
        "dlse": np.zeros((2, 4, 5), np.float32),
        "deterministic": True,
    }
    return Call(cuattn.strided_attention_backward, strided_attention().given | saved, STRIDED | results)


_OWN = (
    *(from_blocks, from_dense, from_csr, local_mask, strided_mask, global_mask, streaming_mask),
    *(vertical_slash_mask, bigbird_mask, strided_attention, strided_attention_backward),
)
MASK_TARGETS: dict[str, Callable[[], Call]] = {function.__name__: function for function in _OWN}
