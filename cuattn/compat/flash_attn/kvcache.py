"""flash-attn for decoding: new keys and values go into a cache, and queries attend to what is then in it."""

from __future__ import annotations

from typing import Any

from cuattn.compat.arguments import whole_number
from cuattn.compat.cache_calls import CacheCall, attend_with_cache
from cuattn.compat.cache_places import Where
from cuattn.compat.libraries import OPTIONS_2
from cuattn.compat.names import WITH_KVCACHE
from cuattn.runtime.renaming import renamed
from cuattn.runtime.small_arrays import check_flag


@renamed(WITH_KVCACHE)
def flash_attn_with_kvcache(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    k: Any = None,
    v: Any = None,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    cache_seqlens: Any = None,
    cache_batch_idx: Any = None,
    cache_leftpad: Any = None,
    block_table: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Any = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Write ``k`` and ``v`` behind the first cache_seqlens[b] entries of the cache, then attend to all of them.

    Below, M = cache_seqlens[b] + seqlen_new is what sequence b has then (seqlen_new = 0 without ``k``).

    Parameters
    ----------
    q : array [batch, seqlen_q, heads, head_dim]; float16, bfloat16, float32 or float64
    k_cache : array [batch_cache, capacity, kv_heads, head_dim], dtype of ``q``
    v_cache : array [batch_cache, capacity, kv_heads, head_dim_v], dtype of ``q``
        Written in place. With ``block_table`` they are pages, [num_blocks, page_block_size, kv_heads, ...]; every page
        size is allowed, not only multiples of 256. Query head h reads key/value head h // (heads // kv_heads).
    k : array [batch, seqlen_new, kv_heads, head_dim], dtype of ``q``, optional
    v : array [batch, seqlen_new, kv_heads, head_dim_v], dtype of ``q``, optional
        Both or neither. They need ``cache_seqlens``.
    rotary_cos, rotary_sin : array [seqlen_ro, rotary_dim / 2], float32, or a 16-bit type that is converted, optional
        Rotates ``k`` at the positions cache_seqlens[b], cache_seqlens[b] + 1, ..., and ``q`` likewise if ``causal`` or
        ``window_size`` is given, else all of ``q`` at cache_seqlens[b]. They need ``k``. Every even rotary_dim works.
    cache_seqlens : int (or 0-d array on the host) or int32 [batch], optional
        Entries of each sequence that are in the cache before the call; all by default. A list or NumPy array is checked
        before anything is written. Of an array on a GPU nothing is: new entries beyond the capacity are dropped there.
    cache_batch_idx : int32 [batch], optional
        The entry of the cache that each sequence has, or its row of ``block_table``; 0, 1, ... by default. With ``k``,
        no two may be the same.
    cache_leftpad : int32 [batch], optional
        Entries at the start of the cache that sequence b does not see. ``cache_seqlens`` and the positions of rotations
        include them.
    block_table : int32 [batch, max_blocks], optional
        The pages of each sequence, in order; entries behind the used ones are not read. It may have more rows where
        ``cache_batch_idx`` says which.
    softmax_scale : float, optional
        Factor of the logits; 1 / sqrt(head_dim) by default.
    causal : bool
        Key j is visible to query i when j <= i + M - seqlen_q (bottom right).
    window_size : (int, int)
        Keys from i + M - seqlen_q - left to i + M - seqlen_q + right are visible; -1 is unbounded.
    softcap : float
        Logits become softcap * tanh(logit / softcap); 0 or less is off.
    rotary_interleaved : bool
        Pairs are the elements (2i, 2i + 1); otherwise (i, i + rotary_dim / 2).
    alibi_slopes : array [heads] or [batch, heads], optional
        Adds -slope * |i + M - seqlen_q - j| to the logits.
    num_splits : int
        Parts of the keys that are attended to at the same time; 0 leaves the choice to `cuattn.plan_decode`'s model.
    return_softmax_lse : bool
        Return also the log-sum-exp.

    Returns
    -------
    out : array [batch, seqlen_q, heads, head_dim_v], dtype of ``q``
    softmax_lse : array [batch, heads, seqlen_q], float32 (float64 for float64); only with ``return_softmax_lse``

    Raises
    ------
    ArgumentError
        Only one of ``k`` and ``v``, or of ``rotary_cos`` and ``rotary_sin``; rotations or new entries without what they
        need; lengths, batch indices or pages that the host sees to be outside of the cache; a value of an option that
        is not allowed. The cache is as before.
    NotSupportedError
        ``cache_leftpad`` with a cache whose batch entries (or pages) do not follow one another in memory.
    CuattnError
        What `cuattn.decode_attention`, `cuattn.paged_attention` and `cuattn.append_kv` refuse, which call a cache with
        ``block_table`` pages; and, with ``k``, a cache that shares memory with ``q``, lengths or a table, which are
        read after it was written. The cache is as before.

    References
    ----------
    Dao, "FlashAttention-2", 2023.

    Examples
    --------
    >>> import numpy as np
    >>> from cuattn.compat.flash_attn import flash_attn_with_kvcache
    >>> k_cache, v_cache = np.zeros((1, 8, 1, 32), np.float32), np.zeros((1, 8, 1, 1), np.float32)
    >>> token = np.zeros((1, 1, 1, 32), np.float32)
    >>> for n in range(3):
    ...     v = np.full((1, 1, 1, 1), n, np.float32)
    ...     out = flash_attn_with_kvcache(token, k_cache, v_cache, token, v, cache_seqlens=n, causal=True)
    ...     print(out[0, 0, 0], v_cache[0, :4, 0, 0])
    [0.] [0. 0. 0. 0.]
    [0.5] [0. 1. 0. 0.]
    [1.] [0. 1. 2. 0.]
    """
    options = OPTIONS_2.options(
        softmax_scale=softmax_scale,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
    )
    options["causal"] = check_flag("causal", causal)
    options["num_splits"] = whole_number("num_splits", num_splits, "0 (chosen) or a positive integer") or None
    call = CacheCall(
        *(q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, check_flag("rotary_interleaved", rotary_interleaved)),
        where=Where(cache_seqlens, cache_batch_idx, cache_leftpad, block_table, "block_table"),
        options=options,
    )
    return attend_with_cache(call, check_flag("return_softmax_lse", return_softmax_lse))
