"""A small valid call of every public function of `cuattn.distributed`, by a group of one thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bench.stress.bad_inputs.call import Call
from cuattn import LinearState, attention, distributed

__all__ = ["DISTRIBUTED_TARGETS"]

B, N, H, G, D, E = 2, 5, 4, 2, 32, 16


def _normal(*shape: int) -> Any:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def _group() -> distributed.ThreadGroup:
    (group,) = distributed.ThreadGroup.create(1, timeout=5.0)
    return group


def _tokens() -> dict[str, Any]:
    return {"q": _normal(B, N, H, D), "k": _normal(B, N, G, D), "v": _normal(B, N, G, E)}


def _options() -> dict[str, Any]:
    options: dict[str, Any] = {"causal": True, "window": (3, 0), "softcap": 5.0, "scale": 0.3, "precision": "ieee"}
    options |= {"alibi_slopes": np.full(H, 0.5, np.float32), "sinks": np.zeros(H, np.float32)}
    return options | {"dropout_p": 0.25, "dropout_seed": 1, "dropout_offset": 2}


def _saved() -> dict[str, Any]:
    tokens = _tokens()
    out, lse = attention(**tokens, causal=True, return_lse=True)
    return {**tokens, "dout": _normal(B, N, H, E), "out": out, "lse": lse}


PLACES: dict[str, Any] = {"partition": "zigzag", "cu_seqlens": None}
GRADIENTS: dict[str, Any] = {"dlse": _normal(B, H, N), "deterministic": True}


def ring_attention() -> Call:
    options = {**_options(), **PLACES, "overlap": True, "return_lse": True}
    return Call(distributed.ring_attention, {**_tokens(), "group": _group()}, options)


def ring_attention_backward() -> Call:
    options = {**_options(), **PLACES, **GRADIENTS, "overlap": True}
    return Call(distributed.ring_attention_backward, {**_saved(), "group": _group()}, options)


def ulysses_attention() -> Call:
    options = {**_options(), **PLACES, "chunk": 4, "return_lse": True}
    return Call(distributed.ulysses_attention, {**_tokens(), "group": _group()}, options)


def ulysses_attention_backward() -> Call:
    options = {**_options(), **PLACES, **GRADIENTS, "chunk": 4}
    return Call(distributed.ulysses_attention_backward, {**_saved(), "group": _group()}, options)


def usp_attention() -> Call:
    grid = distributed.usp(_group(), _group())
    return Call(grid.attention, _tokens(), {**_options(), **PLACES, "overlap": True, "return_lse": True})


def usp_positions() -> Call:
    return Call(distributed.usp(_group(), _group()).positions, {"n": N}, PLACES)


def head_parallel() -> Call:
    options = {**_options(), "num_heads": H, "num_kv_heads": G, "cu_seqlens": None, "return_lse": True}
    return Call(distributed.head_parallel, {**_tokens(), "group": _group()}, options)


def head_parallel_backward() -> Call:
    options = {**_options(), **GRADIENTS, "num_heads": H, "num_kv_heads": G, "cu_seqlens": None}
    return Call(distributed.head_parallel_backward, {**_saved(), "group": _group()}, options)


def heads_of_rank() -> Call:
    return Call(distributed.heads_of_rank, {"num_heads": H, "num_kv_heads": G, "group": _group()})


def tree_decode_attention() -> Call:
    given = {"q": _normal(B, 1, H, D), "k_shard": _normal(B, N, G, D), "v_shard": _normal(B, N, G, E)}
    given |= {"seqlens": [N, 3], "group": _group()}
    names = ("causal", "window", "softcap", "scale", "alibi_slopes", "sinks")
    options = {name: x for name, x in _options().items() if name in names}
    return Call(distributed.tree_decode_attention, given, options | {"return_lse": True})


def _linear() -> dict[str, Any]:
    options: dict[str, Any] = {"causal": True, "feature_map": "relu", "normalize": True, "eps": 0.5, "scale": 0.3}
    state = LinearState(np.ones((B, G, D, E), np.float32), np.ones((B, G, D), np.float32))
    return options | {"chunk": 64, "decay": -np.abs(_normal(B, N, G)), "initial_state": state}


def distributed_linear_attention() -> Call:
    return Call(distributed.linear_attention, {**_tokens(), "group": _group()}, _linear() | {"return_state": True})


def distributed_linear_attention_backward() -> Call:
    given = {**_tokens(), "dout": _normal(B, N, H, E), "group": _group()}
    return Call(distributed.linear_attention_backward, given, _linear() | {"dstate": None})


def partition() -> Call:
    return Call(distributed.partition, {"n": N, "size": 2}, {"kind": "striped"})


def rope_positions() -> Call:
    return Call(distributed.rope_positions, {"n": N, "group": _group()}, PLACES)


def shard() -> Call:
    return Call(distributed.shard, {"x": _normal(B, N), "group": _group()}, PLACES | {"axis": 1})


def unshard() -> Call:
    return Call(distributed.unshard, {"x": _normal(B, N), "group": _group()}, PLACES | {"axis": 1})


def thread_group() -> Call:
    return Call(distributed.ThreadGroup.create, {"size": 2}, {"timeout": 1.0})


def all_reduce() -> Call:
    return Call(_group().all_reduce, {"x": _normal(3)}, {"op": "max"})


def all_gather() -> Call:
    return Call(_group().all_gather, {"x": _normal(3)})


def all_to_all() -> Call:
    return Call(_group().all_to_all, {"send": [_normal(3)], "receive": [_normal(3)]})


def send_recv() -> Call:
    given = {"send": _normal(3), "destination": 0, "receive": _normal(3), "source": 0}
    return Call(_group().send_recv, given)


_DISTRIBUTED = (
    ring_attention,
    ring_attention_backward,
    ulysses_attention,
    ulysses_attention_backward,
    usp_attention,
    usp_positions,
    head_parallel,
    head_parallel_backward,
    heads_of_rank,
    tree_decode_attention,
    distributed_linear_attention,
    distributed_linear_attention_backward,
    partition,
    rope_positions,
    shard,
    unshard,
    thread_group,
    all_reduce,
    all_gather,
    all_to_all,
    send_recv,
)
DISTRIBUTED_TARGETS: dict[str, Callable[[], Call]] = {function.__name__: function for function in _DISTRIBUTED}
