"""flash-attn 3 for decoding: new keys and values go into a cache, and queries attend to what is then in it."""

from __future__ import annotations

from typing import Any

from cuattn.compat.cache_calls import CacheCall, attend_with_cache
from cuattn.compat.cache_codes import Codes
from cuattn.compat.cache_places import Where
from cuattn.compat.flash_attn_interface.options import check_schedule, logit_options
from cuattn.compat.names import WITH_KVCACHE_3
from cuattn.runtime.renaming import renamed
from cuattn.runtime.small_arrays import check_flag


@renamed(WITH_KVCACHE_3)
def flash_attn_with_kvcache(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    k: Any = None,
    v: Any = None,
    qv: Any = None,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    cache_seqlens: Any = None,
    cache_batch_idx: Any = None,
    cache_leftpad: Any = None,
    page_table: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k_new: Any = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Any = None,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Any = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    *,
    learnable_sink: Any = None,
    fp8_format: str | None = None,
) -> Any:
    """Write ``k`` and ``v`` behind the first cache_seqlens[b] entries of the cache, then attend to all of them.

    As `cuattn.compat.flash_attn.flash_attn_with_kvcache`, with these differences:

    Parameters
    ----------
    q : array [batch, seqlen_q, heads, head_dim], or [total_q, heads, head_dim] with ``cu_seqlens_q``
    k : array [batch, seqlen_new, kv_heads, head_dim], or [total_new, kv_heads, head_dim] with ``cu_seqlens_k_new``
    v : array [batch, seqlen_new, kv_heads, head_dim_v], or [total_new, kv_heads, head_dim_v]
    page_table : int32 [batch, max_blocks], optional
        What flash-attn 2 calls block_table. ``cache_batch_idx`` picks rows of it, and ``cache_leftpad`` counts its
        entries.
    cu_seqlens_q : int32 [batch + 1], optional
        Queries are packed: those of sequence b from cu_seqlens_q[b] up to, but without, cu_seqlens_q[b + 1].
    cu_seqlens_k_new : int32 [batch + 1], optional
        New entries are packed likewise. On a GPU, where nobody looks, one behind the capacity is dropped.
    max_seqlen_q : int, optional
        Queries of the longest sequence, or more; only a hint.
    rotary_seqlens : int32 [batch], optional
        Positions of the first new entry (and query) in the rotary tables; ``cache_seqlens`` by default.
        Without effect where there are no tables.
    q_descale, k_descale, v_descale : float array [batch, kv_heads], optional
        Factors of 8-bit floats. With any of them products are those of float32, which is slower.
    qv, attention_chunk, softcap, pack_gqa, sm_margin, learnable_sink, fp8_format
        As for `flash_attn_func`.
    scheduler_metadata : anything
        Not looked at: how the work is divided is chosen in each call.
    num_splits : int
        Parts of the keys that are attended to at the same time; 0 leaves the choice to `cuattn.plan_decode`'s model.
    Every other argument
        As for `cuattn.compat.flash_attn.flash_attn_with_kvcache`. 8-bit queries need an 8-bit cache.

    Returns
    -------
    out : array [batch, seqlen_q, heads, head_dim_v] or [total_q, heads, head_dim_v], dtype of ``q`` (8 bits: bfloat16)
    softmax_lse : array [batch, heads, seqlen_q] or [heads, total_q], float32 (float64 for float64); only with
        ``return_softmax_lse``

    Raises
    ------
    NotSupportedError
        ``qv``, or ``cache_leftpad`` with a cache whose batch entries (or pages) do not follow one another in memory.
    ArgumentError, CuattnError
        As for `cuattn.compat.flash_attn.flash_attn_with_kvcache`. The cache is as before.

    References
    ----------
    Shah et al., "FlashAttention-3: fast and accurate attention with asynchrony and low-precision", 2024.

    Examples
    --------
    Two sequences with one entry each get two and no new ones, and have one query each:

    >>> import numpy as np
    >>> from cuattn.compat.flash_attn_interface import flash_attn_with_kvcache
    >>> k_cache, v_cache = np.zeros((2, 4, 1, 32), np.float32), np.zeros((2, 4, 1, 1), np.float32)
    >>> q, v = np.zeros((2, 1, 32), np.float32), np.array([3.0, 6.0], np.float32).reshape(2, 1, 1)
    >>> packed = {"cu_seqlens_q": [0, 1, 2], "cu_seqlens_k_new": [0, 2, 2]}
    >>> flash_attn_with_kvcache(q, k_cache, v_cache, q, v, cache_seqlens=1, **packed)[:, 0, 0]
    array([3., 0.], dtype=float32)
    """
    options = logit_options(softmax_scale, causal, qv, window_size, attention_chunk, softcap, learnable_sink)
    options["num_splits"] = check_schedule(num_splits, pack_gqa, sm_margin)
    call = CacheCall(
        *(q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, check_flag("rotary_interleaved", rotary_interleaved)),
        where=Where(cache_seqlens, cache_batch_idx, cache_leftpad, page_table, "page_table", rotary_seqlens),
        options=options,
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q,
        cu_seqlens_k_new=cu_seqlens_k_new,
        codes=Codes(fp8_format, q_descale, k_descale, v_descale),
    )
    return attend_with_cache(call, check_flag("return_softmax_lse", return_softmax_lse))
