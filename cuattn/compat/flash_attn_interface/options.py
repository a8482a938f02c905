"""The options that flash-attn 3 has and `cuattn.attention` spells in another way, has no use for, or does not offer."""

from __future__ import annotations

from typing import Any

from cuattn.compat.arguments import score_options, whole_number
from cuattn.errors import ArgumentError, NotSupportedError
from cuattn.runtime.small_arrays import check_flag

__all__ = ["check_schedule", "logit_options"]


def logit_options(
    softmax_scale: Any,
    causal: Any,
    qv: Any,
    window_size: Any,
    attention_chunk: Any,
    softcap: Any,
    learnable_sink: Any = None,
) -> dict[str, Any]:
    """Return the options of `cuattn.attention` that shape the logits."""
    if qv is not None:
        raise NotSupportedError(
            "qv is given; logits with a second product, of qv and v, are not offered: None is allowed. Where the head "
            "dim allows it, concatenate q with qv, and k with v"
        )
    chunk = whole_number("attention_chunk", attention_chunk, "0 (off) or a positive integer")
    options = score_options(softmax_scale, window_size, softcap, None) | {"chunk": chunk or None}
    return options | {"causal": check_flag("causal", causal), "sinks": learnable_sink}


def check_schedule(num_splits: Any, pack_gqa: Any, sm_margin: Any) -> int | None:
    """``num_splits`` as `cuattn.decode_attention` takes it; the other two have no effect, but must be what they are."""
    whole_number("sm_margin", sm_margin, "an integer from 0 on")
    if pack_gqa is not None:
        try:
            check_flag("pack_gqa", pack_gqa)
        except ArgumentError:
            raise ArgumentError(f"pack_gqa is {pack_gqa!r}; allowed are None, False and True") from None
    return whole_number("num_splits", num_splits, "0 (chosen) or a positive integer") or None
