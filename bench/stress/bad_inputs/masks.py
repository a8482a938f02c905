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


BLOCKS = {"scale": 0.3, "causal": True, "window": (3, 0), "chunk": 4, "softcap": 2.0, "precision": "ieee"}
BLOCKS |= {"sinks": np.zeros(4, np.float32), "dropout_p": 0.25, "dropout_seed": 5, "dropout_offset": 1}
OF_ONE = {"bias": _normal(5, 7), "mask": np.tri(5, 7, 2, dtype=bool), "diagonal_offset": 1}
OF_ONE |= {"alibi_slopes": np.array([0.5, 1.0, 2.0, 4.0], np.float32)}


def _block_mask(seqlen_q: int, seqlen_k: int) -> Any:
    return cuattn.BlockMask.from_dense(np.tri(seqlen_q, seqlen_k, 1, dtype=bool), (2, 3))


def block_sparse_attention() -> Call:
    given = {"q": _normal(2, 5, 4, 32), "k": _normal(2, 7, 2, 32), "v": _normal(2, 7, 2, 32)}
    results = {"out": np.zeros((2, 5, 4, 32), np.float32), "return_lse": True}
    return Call(cuattn.block_sparse_attention, given | {"block_mask": _block_mask(5, 7)}, BLOCKS | OF_ONE | results)


def block_sparse_attention_backward() -> Call:
    saved = {"out": _normal(2, 5, 4, 32), "lse": np.full((2, 4, 5), 3.0, np.float32)}
    saved["dout"] = _normal(2, 5, 4, 32, seed=1)
    results = {"dq": np.zeros((2, 5, 4, 32), np.float32), "dlse": np.zeros((2, 4, 5), np.float32)}
    results |= {"deterministic": True, "workspace": np.zeros(2**12, np.uint8)}
    given = block_sparse_attention().given | saved
    return Call(cuattn.block_sparse_attention_backward, given, BLOCKS | OF_ONE | results)


def block_sparse_attention_varlen() -> Call:
    given = {"q": _normal(7, 4, 32), "k": _normal(11, 2, 32), "v": _normal(11, 2, 32)}
    given |= {"cu_seqlens_q": np.array([0, 2, 7], np.int32), "cu_seqlens_k": np.array([0, 4, 11], np.int32)}
    given["block_masks"] = [_block_mask(2, 4), _block_mask(5, 7)]
    results = {"out": np.zeros((7, 4, 32), np.float32), "return_lse": True, "max_seqlen_q": 5, "max_seqlen_k": 9}
    return Call(cuattn.block_sparse_attention_varlen, given, BLOCKS | results | {"block_size": 16})


def block_sparse_attention_varlen_backward() -> Call:
    saved = {"out": _normal(7, 4, 32), "lse": np.full((4, 7), 3.0, np.float32), "dout": _normal(7, 4, 32, seed=1)}
    results = {"dk": np.zeros((11, 2, 32), np.float32), "dlse": np.zeros((4, 7), np.float32)}
    given = block_sparse_attention_varlen().given | saved
    return Call(cuattn.block_sparse_attention_varlen_backward, given, BLOCKS | results)


def sparse_attention() -> Call:
    given = strided_attention().given
    of_attention = {name: given[name] for name in ("q", "k", "v")}
    options = {"causal": True, "scale": 0.3, "softcap": 2.0, "precision": "ieee", "return_lse": True}
    return Call(cuattn.sparse_attention, of_attention | {"pattern": ("strided", 3, 2)}, options)


_OWN = (
    *(block_sparse_attention, block_sparse_attention_backward, block_sparse_attention_varlen),
    block_sparse_attention_varlen_backward,
    *(from_blocks, from_dense, from_csr, local_mask, strided_mask, global_mask, streaming_mask),
    *(vertical_slash_mask, bigbird_mask, strided_attention, strided_attention_backward),
    sparse_attention,
)
MASK_TARGETS: dict[str, Callable[[], Call]] = {function.__name__: function for function in _OWN}
