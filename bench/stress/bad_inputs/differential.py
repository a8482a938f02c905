"""A small valid call of every function of differential attention: see `bench.stress.bad_inputs.calls`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import cuattn
from bench.stress.bad_inputs.call import Call
from bench.stress.bad_inputs.calls import SEQLENS_K, TABLES, normal

__all__ = ["DIFFERENTIAL_TARGETS"]

B, N, M, H, G, D, E = 2, 5, 7, 4, 2, 32, 16
NORM = {"norm": True, "norm_weight": np.ones(E, np.float32), "eps": 0.1, "output_scale": 0.8}
SCORES = {"scale": 0.3, "causal": True, "window": (3, 0), "chunk": 4, "softcap": 2.0, "diagonal_offset": 1}
ARRAYS = {"alibi_slopes": np.ones(2 * H, np.float32), "bias": normal(H, N, M), "mask": np.tri(N, M, 2, dtype=bool)}
DROPOUT = {"dropout_p": 0.25, "dropout_seed": 5, "dropout_offset": 1}
CACHED = {"scale": 0.3, "causal": True, "window": (3, 0), "chunk": 4, "softcap": 2.0, "num_splits": 2}
CACHED |= {"alibi_slopes": np.ones(H, np.float32)}
OPTIONS = NORM | SCORES | ARRAYS | DROPOUT


def heads(key_heads: int) -> dict[str, Any]:
    return {"q": normal(B, N, 2 * H, D), "k": normal(B, M, key_heads, D), "v": normal(B, M, G, E)}


def differential_attention() -> Call:
    given = heads(2 * G) | {"lambda_": normal(B, N, H)}
    return Call(cuattn.differential_attention, given, OPTIONS | {"out": np.zeros((B, N, H, E), np.float32)})


def differential_attention_shared() -> Call:
    given = heads(G) | {"lambda_": np.array([0.1, 0.2, 0.3, 0.4])}
    return Call(cuattn.differential_attention, given, {"return_state": True})


def differential_forward_path() -> Call:
    given = heads(2 * G) | {"lambda_": normal(B, N, H)}
    return Call(cuattn.forward_path, given, {"arch": "sm_90a"} | OPTIONS)


def differential_attention_backward() -> Call:
    given = {"dout": normal(B, N, H, E), **heads(2 * G), "lambda_": normal(B, N, H)}

    def call(lse: Any, out1: Any, out2: Any, **others: Any) -> Any:
        return cuattn.differential_attention_backward(**others, state=cuattn.DifferentialState(lse, out1, out2))

    state = {"lse": np.full((B, H, 2, N), 3.0, np.float32), "out1": normal(B, N, H, E), "out2": normal(B, N, H, E)}
    return Call(call, given | state, OPTIONS)


def differential_decode() -> Call:
    given = {"q": normal(3, 2, 2 * H, D), "k_cache": normal(3, 8, 2 * G, D), "v_cache": normal(3, 8, G, E)}
    given |= {"lambda_": 0.5, "seqlens_k": SEQLENS_K.copy()}
    return Call(cuattn.differential_decode, given, NORM | CACHED | {"out": np.zeros((3, 2, H, E), np.float32)})


def differential_decode_paged() -> Call:
    given = {"q": normal(3, 2, 2 * H, D), "k_cache": normal(6, 4, G, D), "v_cache": normal(6, 4, G, E)}
    given |= {"lambda_": normal(3, 2, H), "seqlens_k": SEQLENS_K.copy(), "block_tables": TABLES.copy()}
    return Call(cuattn.differential_decode, given, NORM)


def differential_lambda() -> Call:
    given = {name: normal(H, D, seed=i) for i, name in enumerate(("lq1", "lk1", "lq2", "lk2"))}
    return Call(cuattn.differential_lambda, given | {"lambda_init": 0.2})


def lambda_init() -> Call:
    return Call(cuattn.lambda_init, {"depth": 3.5})


_OWN = (
    *(
        differential_attention,
        differential_attention_shared,
        differential_forward_path,
        differential_attention_backward,
    ),
    *(differential_decode, differential_decode_paged, differential_lambda, lambda_init),
)
DIFFERENTIAL_TARGETS: dict[str, Callable[[], Call]] = {function.__name__: function for function in _OWN}
