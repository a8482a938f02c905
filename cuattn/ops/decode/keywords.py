"""The keywords of the decode functions, for the overloads that say what they return."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cuattn.ops.attention.options import CascadeOptions, DecodeOptions
from cuattn.typing import KVFormatName

if TYPE_CHECKING:
    from cuattn.ops.decode.plan import DecodePlan
    from cuattn.ops.rotary.arguments import Rotary

__all__ = ["CascadeKeywords", "DecodeKeywords", "PackedKeywords"]


class DecodeKeywords(DecodeOptions, total=False):
    """All keywords of `cuattn.decode_attention` but the one that its result depends on."""

    num_splits: int | None
    plan: DecodePlan | None
    kv_format: KVFormatName | None
    k_scale: Any
    v_scale: Any
    k_block_scales: Any
    v_block_scales: Any
    out: Any
    rope: Rotary | None
    rotate_keys: bool
    workspace: Any


class PackedKeywords(DecodeKeywords, total=False):
    """All keywords of `cuattn.paged_attention_varlen` but the one that its result depends on."""

    max_seqlen_q: int | None


class CascadeKeywords(CascadeOptions, total=False):
    """All keywords of `cuattn.cascade_attention` but the one that its result depends on."""

    kv_format: KVFormatName | None
    k_scale: Any
    v_scale: Any
    k_block_scales: Any
    v_block_scales: Any
    out: Any
