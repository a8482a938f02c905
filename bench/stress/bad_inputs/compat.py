"""A small valid call of every function of `cuattn.compat`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import cuattn
from bench.stress.bad_inputs.call import Call
from bench.stress.bad_inputs.calls import CU_Q, LONGEST, MASKS, SLOPES, B, D, E, G, H, M, N, heads, normal, packed
from cuattn import compat

__all__ = ["COMPAT_TARGETS"]


def scaled_dot_product_attention() -> Call:
    given = dict(zip(("query", "key", "value"), (x.swapaxes(1, 2) for x in heads().values()), strict=True))
    options = {"scale": 0.3, "is_causal": True, "attn_mask": MASKS["mask"], "dropout_p": 0.25, "dropout_seed": 5}
    return Call(compat.scaled_dot_product_attention, {**given, "enable_gqa": True}, options)


FLASH = {"softmax_scale": 0.3, "causal": True, "window_size": (3, 0), "softcap": 2.0, "return_attn_probs": True}
FLASH |= {"alibi_slopes": SLOPES["alibi_slopes"], "dropout_p": 0.25, "dropout_seed": 5, "deterministic": True}


def flash_targets() -> dict[str, Callable[[], Call]]:
    flash = compat.flash_attn
    saved = {
        "dout": normal(B, N, H, E, seed=1),
        "out": normal(B, N, H, E),
        "softmax_lse": np.full((B, H, N), 3.0, np.float32),
    }
    of_varlen = {
        "dout": normal(10, H, E, seed=1),
        "out": normal(10, H, E),
        "softmax_lse": np.full((H, 10), 3.0, np.float32),
    }
    square = {name: x[..., :0].repeat(1, 0) if name == "-" else x for name, x in heads().items()}
    given: dict[str, Callable[[], dict[str, Any]]] = {
        "flash_attn_func": heads,
        "flash_attn_kvpacked_func": lambda: {"q": square["q"].copy(), "kv": normal(B, M, 2, G, D)},
        "flash_attn_qkvpacked_func": lambda: {"qkv": normal(B, N, 3, H, D)},
        "flash_attn_varlen_func": lambda: packed() | LONGEST,
        "flash_attn_varlen_qkvpacked_func": lambda: {
            "qkv": normal(10, 3, H, D),
            "cu_seqlens": CU_Q.copy(),
            "max_seqlen": 9,
        },
        "flash_attn_func_backward": lambda: heads() | {name: x.copy() for name, x in saved.items()},
        "flash_attn_varlen_func_backward": lambda: (
            packed() | LONGEST | {name: x.copy() for name, x in of_varlen.items()}
        ),
    }
    lengths = np.array([3, 0, 5], np.int32)

    def with_cache() -> dict[str, Any]:
        new = {"k": normal(3, 2, G, D), "v": normal(3, 2, G, E), "cache_seqlens": lengths.copy()}
        return {"q": normal(3, 2, H, D), "k_cache": normal(3, 8, G, D), "v_cache": normal(3, 8, G, E), **new}

    given["flash_attn_with_kvcache"] = with_cache
    cos, sin = (x[:, :8] for x in cuattn.rope_frequencies(D, 8))
    of_cache = {"cache_batch_idx": np.array([2, 0, 1], np.int32), "cache_leftpad": np.array([1, 0, 0], np.int32)}
    of_cache |= {"rotary_cos": cos, "rotary_sin": sin, "num_splits": 2, "return_softmax_lse": True}
    options = {
        "flash_attn_with_kvcache": of_cache
        | {n: FLASH[n] for n in ("softmax_scale", "causal", "window_size", "softcap")}
    }

    def target(name: str) -> Callable[[], Call]:
        backward = "backward" in name
        general = {n: x for n, x in FLASH.items() if not (backward and n == "return_attn_probs")}
        return lambda: Call(getattr(flash, name), given[name](), options.get(name, general))

    return {name: target(name) for name in given}


COMPAT_TARGETS = flash_targets() | {"scaled_dot_product_attention": scaled_dot_product_attention}
