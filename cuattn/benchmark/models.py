"""The attention of published models: heads, head dims and options, and the calls that these make.

A model's layers call attention to read a prompt (prefill), to write a token (decode), and forward and backward to learn
(training). Models whose layers take turns, a window in one and none in the next, make two kinds of each call.

>>> MODELS["Mistral-7B"].layers
({'causal': True, 'window': (4095, 0)},)
>>> slug("Llama-3-8B")
'llama_3_8b'
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from cuattn.testing.backward_cases import BackwardCase
from cuattn.testing.cases import AttentionCase
from cuattn.testing.decode_cases import DecodeCase

__all__ = ["MODELS", "Model", "decode", "prefill", "slug", "training"]


@dataclass(frozen=True)
class Model:
    """The attention of a model; `layers` are the options of each kind of layer. An encoder does not decode."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str = "bfloat16"
    layers: tuple[dict[str, Any], ...] = ({"causal": True},)
    decodes: bool = True


#: As their configuration files say: num_attention_heads, num_key_value_heads, head_dim, sliding_window and so on.
MODELS = {
    "Llama-3-8B": Model(32, 8, 128),
    "Llama-3-70B": Model(64, 8, 128),
    "Qwen2.5-7B": Model(28, 4, 128),
    "Mistral-7B": Model(32, 8, 128, layers=({"causal": True, "window": (4095, 0)},)),
    "Gemma-2-9B": Model(
        *(16, 8, 256),
        layers=(
            {"causal": True, "softcap": 50.0, "scale": 256**-0.5, "window": (4095, 0)},
            {"causal": True, "softcap": 50.0, "scale": 256**-0.5},
        ),
    ),
    "gpt-oss-20b": Model(
        *(64, 8, 64),
        layers=({"causal": True, "sinks": True, "window": (127, 0)}, {"causal": True, "sinks": True}),
    ),
    "SmolLM2": Model(9, 3, 64),
    "MiniLM": Model(12, 12, 32, dtype="float16", layers=({},), decodes=False),
}


def slug(name: str) -> str:
    """A model's name as case names spell it."""
    return re.sub(r"\W+", "_", name.lower())


def prefill(model: Model, batch: int, seqlen: int, dtype: str | None = None) -> list[AttentionCase]:
    """The calls that read a prompt."""
    return [
        AttentionCase(
            *(batch, seqlen, model.num_heads, model.head_dim),
            num_kv_heads=model.num_kv_heads,
            dtype=dtype or model.dtype,
            **options,
        )
        for options in model.layers
    ]


def training(model: Model, batch: int, seqlen: int, dtype: str | None = None) -> list[BackwardCase]:
    """The calls that learn from a text: forward and backward in one, and the backward alone."""
    forwards = prefill(model, batch, seqlen, dtype)
    return [BackwardCase(case, with_forward=both) for case in forwards for both in (True, False)]


def decode(model: Model, batch: int, context: int, dtype: str | None = None, page_size: int = 16) -> list[DecodeCase]:
    """The calls that write a token, one a kind of layer; none of an encoder."""
    if not model.decodes:
        return []
    kept = ("window", "softcap", "sinks", "scale")
    return [
        DecodeCase(
            *(batch, context, model.num_heads, model.num_kv_heads, model.head_dim),
            dtype or model.dtype,
            page_size=page_size,
            **{name: value for name, value in options.items() if name in kept},
        )
        for options in model.layers
    ]
