"""The options of flash-attn 3: what `cuattn.attention` calls them, has no use for, or does not offer."""

from __future__ import annotations

from typing import Any

from cuattn.compat.arguments import whole_number
from cuattn.compat.libraries import OPTIONS_3
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
    return OPTIONS_3.options(
        softmax_scale=softmax_scale,
        window_size=window_size,
        softcap=softcap,
        attention_chunk=attention_chunk,
        causal=causal,
        learnable_sink=learnable_sink,
    )


def check_schedule(num_splits: Any, pack_gqa: Any, sm_margin: Any) -> int | None:
    """``num_splits`` as `cuattn.decode_attention` takes it; the other two have no effect, but must be what they are."""
    whole_number("sm_margin", sm_margin, "an integer from 0 on")
    if pack_gqa is not None:
        try:
            check_flag("pack_gqa", pack_gqa)
        except ArgumentError:
            raise ArgumentError(f"pack_gqa is {pack_gqa!r}; allowed are None, False and True") from None
    return whole_number("num_splits", num_splits, "0 (chosen) or a positive integer") or None
