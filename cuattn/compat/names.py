"""What the compatibility functions call the arguments of those that they call, for messages about them."""

from __future__ import annotations

__all__ = ["FLASH_ATTN", "KVPACKED", "QKVPACKED", "SDPA"]

FLASH_ATTN = {"scale": "softmax_scale", "lse": "softmax_lse"}
#: What is cut out of a packed array has another shape, which a message may show: both names are said.
KVPACKED = {name: f"{name} (of kv)" for name in ("k", "v")}
QKVPACKED = {name: f"{name} (of qkv)" for name in ("q", "k", "v")}
QKVPACKED |= {f"{name}_{side}": name for name in ("cu_seqlens", "max_seqlen") for side in ("q", "k")}
SDPA = {"q": "q (query)", "k": "k (key)", "v": "v (value)", "bias": "attn_mask", "mask": "attn_mask"}
