"""What the compatibility functions call the arguments of those that they call, for messages about them."""

from __future__ import annotations

from cuattn.compat.libraries import OPTIONS_2, OPTIONS_3

__all__ = [
    *(
        "COMBINE",
        "FLASH_ATTN",
        "FLASH_ATTN_3",
        "KVPACKED",
        "PADDING",
        "QKVPACKED",
        "ROTARY",
        "SDPA",
        "VARLEN",
        "WITH_KVCACHE",
    ),
    "WITH_KVCACHE_3",
]

FLASH_ATTN = OPTIONS_2.renamed | {"lse": "softmax_lse"}
KVPACKED = dict.fromkeys(("k", "v"), "a part of kv")
QKVPACKED = dict.fromkeys(("q", "k", "v"), "a part of qkv")
QKVPACKED |= {f"{name}_{side}": name for name in ("cu_seqlens", "max_seqlen") for side in ("q", "k")}
WITH_KVCACHE = FLASH_ATTN | {"k_pages": "k_cache", "v_pages": "v_cache", "cos": "rotary_cos", "sin": "rotary_sin"}
WITH_KVCACHE |= {"block_tables": "block_table", "seqlens_k": "cache_seqlens"}
FLASH_ATTN_3 = FLASH_ATTN | OPTIONS_3.renamed
WITH_KVCACHE_3 = WITH_KVCACHE | FLASH_ATTN_3 | {"block_tables": "page_table"}
VARLEN = FLASH_ATTN | {"k_pages": "k", "v_pages": "v", "block_tables": "block_table", "seqlens_k": "cu_seqlens_k"}
COMBINE = {"outs": "out_partial", "lses": "lse_partial"}
ROTARY = {"positions": "counted from seqlen_offsets"}
PADDING = {"x": "hidden_states", "mask": "attention_mask"}
SDPA = {"q": "query", "k": "key", "v": "value", "bias": "attn_mask", "mask": "attn_mask"}
