"""A small valid call of every public function of linear attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import cuattn
from bench.stress.bad_inputs.call import Call

__all__ = ["LINEAR_TARGETS"]

B, N, H, G, D, E = 2, 5, 4, 2, 32, 16


def _normal(*shape: int) -> Any:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def _state(batch: int) -> Any:
    return cuattn.LinearState(np.ones((batch, G, D, E), np.float32), np.ones((batch, G, D), np.float32))


OPTIONS = {"feature_map": "relu", "normalize": True, "eps": 0.5, "scale": 0.3, "chunk": 64, "return_state": True}


def linear_attention() -> Call:
    given = {"q": _normal(B, N, H, D), "k": _normal(B, N, G, D), "v": _normal(B, N, G, E)}
    arrays = {"decay": -np.abs(_normal(B, N, G)), "initial_state": _state(B), "state_out": _state(B)}
    return Call(
        cuattn.linear_attention, given, OPTIONS | arrays | {"causal": True, "out": np.zeros((B, N, H, E), np.float32)}
    )


def linear_attention_varlen() -> Call:
    given = {"q": _normal(10, H, D), "k": _normal(10, G, D), "v": _normal(10, G, E)}
    given["cu_seqlens"] = np.array([0, 2, 10], np.int32)
    arrays = {"decay": -np.abs(_normal(10, G, D)), "initial_state": _state(2), "state_out": _state(2)}
    return Call(
        cuattn.linear_attention_varlen,
        given,
        OPTIONS | arrays | {"causal": True, "out": np.zeros((10, H, E), np.float32)},
    )


def linear_attention_summary() -> Call:
    given = {"k": _normal(B, N, G, D), "v": _normal(B, N, G, E)}
    options = {"feature_map": "square", "normalize": False, "decay": -np.abs(_normal(G))}
    return Call(cuattn.linear_attention_summary, given, options)


def linear_attention_backward() -> Call:
    given = {"q": _normal(B, N, H, D), "k": _normal(B, N, G, D), "v": _normal(B, N, G, E)}
    given["dout"] = _normal(B, N, H, E)
    arrays = {"decay": -np.abs(_normal(B, N, G, D)), "initial_state": _state(B), "dstate": _state(B)}
    options = {name: x for name, x in OPTIONS.items() if name != "return_state"}
    return Call(cuattn.linear_attention_backward, given, options | arrays | {"causal": True})


_LINEAR = (linear_attention, linear_attention_backward, linear_attention_varlen, linear_attention_summary)
LINEAR_TARGETS: dict[str, Callable[[], Call]] = {function.__name__: function for function in _LINEAR}
