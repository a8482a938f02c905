"""The options of flash-attn 2, of flash-attn 3 and of PyTorch's function, and what `cuattn.attention` calls them."""

from __future__ import annotations

from typing import Any

from cuattn.compat.arguments import chunk_option, plain
from cuattn.compat.spellings import DROPOUT, LOGITS, Spelling, Spellings
from cuattn.runtime.small_arrays import check_flag

__all__ = ["OPTIONS_2", "OPTIONS_3", "SDPA_OPTIONS"]


def _flag(causal: Any) -> bool:
    return check_flag("causal", causal)


def _scale(scale: Any) -> Any:
    return plain("scale", scale)


def _top_left(is_causal: Any) -> Any:
    return "top_left" if check_flag("is_causal", is_causal) else False


OPTIONS_2 = Spellings(
    *LOGITS,
    DROPOUT,
    Spelling("causal", ("causal",)),
    Spelling("alibi_slopes", ("alibi_slopes",)),
    absent={
        "chunk": "a keyword of flash-attn 3",
        "bias": "call cuattn.attention",
        "mask": "call cuattn.attention",
        "sinks": "a keyword of flash-attn 3",
        "diagonal_offset": "the last query sees the last key",
        "precision": "float32 is IEEE-accurate",
        **dict.fromkeys(("q_descale", "k_descale", "v_descale"), "keywords of flash-attn 3"),
    },
)

OPTIONS_3 = Spellings(
    *LOGITS,
    Spelling("causal", ("causal",), _flag),
    Spelling("chunk", ("attention_chunk",), chunk_option),
    Spelling("sinks", ("learnable_sink",)),
    *(Spelling(name, (name,)) for name in ("q_descale", "k_descale", "v_descale")),
    absent={
        "bias": "call cuattn.attention",
        "mask": "call cuattn.attention",
        "alibi_slopes": "a keyword of flash-attn 2",
        "dropout": "a keyword of flash-attn 2",
        "diagonal_offset": "the last query sees the last key",
        "precision": "float32 is IEEE-accurate",
    },
)

SDPA_OPTIONS = Spellings(
    Spelling("scale", ("scale",), _scale),
    Spelling("causal", ("is_causal",), _top_left),
    Spelling("bias", ("attn_mask",)),
    DROPOUT,
    absent={
        "mask": "an attn_mask of bool",
        **dict.fromkeys(("window", "chunk", "softcap", "alibi_slopes", "sinks"), "call cuattn.attention"),
        "diagonal_offset": "the first query sees the first key",
        "precision": "float32 is IEEE-accurate",
        **dict.fromkeys(("q_descale", "k_descale", "v_descale"), "call cuattn.attention"),
    },
)
