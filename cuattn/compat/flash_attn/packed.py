"""flash-attn for sequences packed one after the other: [total, heads, head_dim] and cu_seqlens."""

from __future__ import annotations

from typing import Any

import cuattn
from cuattn.compat.arguments import dropout_options, results, score_options, unpack
from cuattn.compat.names import FLASH_ATTN, KVPACKED, QKVPACKED
from cuattn.errors import NotSupportedError
from cuattn.metadata import check_flag
from cuattn.renaming import renamed


@renamed(FLASH_ATTN)
def flash_attn_varlen_func(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Any = None,
    *,
    dropout_seed: int | None = None,
    dropout_offset: int = 0,
) -> Any:
    """`cuattn.attention_varlen` with the arguments of flash-attn: sequences packed one after the other.

    Parameters
    ----------
    q : array [total_q, heads, head_dim]; float16, bfloat16, float32 or float64
    k : array [total_k, kv_heads, head_dim], dtype of ``q``
    v : array [total_k, kv_heads, head_dim_v], dtype of ``q``
    cu_seqlens_q, cu_seqlens_k : int32 [batch + 1]
        Sequence b has the tokens from cu_seqlens[b] up to, but without, cu_seqlens[b + 1].
    max_seqlen_q, max_seqlen_k : int
        Length of the longest sequence, or more.
    block_table : None
        Keys in pages: not working yet.
    Every other argument
        As for `flash_attn_func`, of each sequence by itself.

    Returns
    -------
    out : array [total_q, heads, head_dim_v], dtype of ``q``
    softmax_lse : array [heads, total_q], float32 (float64 for float64); only with ``return_attn_probs``
    S_dmask : None; only with ``return_attn_probs``

    Raises
    ------
    NotSupportedError
        ``block_table`` is given.
    CuattnError
        As for `flash_attn_func`, and what `cuattn.attention_varlen` refuses.

    References
    ----------
    Dao, "FlashAttention-2", 2023.

    Examples
    --------
    >>> import numpy as np
    >>> from cuattn.compat.flash_attn import flash_attn_varlen_func
    >>> q = np.zeros((5, 1, 32), np.float32)  # two sequences, of 2 and 3 tokens
    >>> v = np.arange(5, dtype=np.float32).reshape(5, 1, 1)
    >>> cu_seqlens = np.array([0, 2, 5], np.int32)
    >>> flash_attn_varlen_func(q, q, v, cu_seqlens, cu_seqlens, 3, 3, causal=True)[:, 0, 0]
    array([0. , 0.5, 2. , 2.5, 3. ], dtype=float32)
    """
    if block_table is not None:
        raise NotSupportedError(
            "block_table is given: attention over pages does not work yet; pass keys and values as packed arrays"
        )
    options = score_options(softmax_scale, window_size, softcap, alibi_slopes)
    options |= dropout_options(dropout_p, dropout_seed, dropout_offset)
    check_flag("deterministic", deterministic)
    options["return_lse"] = check_flag("return_attn_probs", return_attn_probs)
    options |= {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
    result = cuattn.attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, causal=causal, **options)
    return results(result, return_attn_probs)


@renamed(FLASH_ATTN | QKVPACKED)
def flash_attn_varlen_qkvpacked_func(
    qkv: Any,
    cu_seqlens: Any,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    dropout_seed: int | None = None,
    dropout_offset: int = 0,
) -> Any:
    """`flash_attn_varlen_func` for queries, keys and values in one array, which are read where they are.

    Parameters
    ----------
    qkv : array [total, 3, heads, head_dim]
    cu_seqlens : int32 [batch + 1]
    max_seqlen : int
    Every other argument
        As for `flash_attn_varlen_func`.

    Returns
    -------
    As for `flash_attn_varlen_func`.

    Raises
    ------
    ShapeError
        ``qkv`` has another rank, or its axis 1 is not 3 long.
    CuattnError
        As for `flash_attn_varlen_func`.

    References
    ----------
    Dao, "FlashAttention-2", 2023.

    Examples
    --------
    >>> import numpy as np
    >>> from cuattn.compat.flash_attn import flash_attn_varlen_qkvpacked_func
    >>> flash_attn_varlen_qkvpacked_func(np.ones((5, 3, 2, 32), np.float16), np.array([0, 2, 5], np.int32), 3).shape
    (5, 2, 32)
    """
    q, k, v = unpack("qkv", qkv, "[total, 3, heads, head_dim]", 1, 3)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        dropout_seed=dropout_seed,
        dropout_offset=dropout_offset,
    )


@renamed(FLASH_ATTN | KVPACKED)
def flash_attn_varlen_kvpacked_func(
    q: Any,
    kv: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    dropout_seed: int | None = None,
    dropout_offset: int = 0,
) -> Any:
    """`flash_attn_varlen_func` for keys and values in one array, which are read where they are.

    Parameters
    ----------
    q : array [total_q, heads, head_dim]
    kv : array [total_k, 2, kv_heads, head_dim], dtype of ``q``
    Every other argument
        As for `flash_attn_varlen_func`.

    Returns
    -------
    As for `flash_attn_varlen_func`.

    Raises
    ------
    ShapeError
        ``kv`` has another rank, or its axis 1 is not 2 long.
    CuattnError
        As for `flash_attn_varlen_func`.

    References
    ----------
    Dao, "FlashAttention-2", 2023.

    Examples
    --------
    >>> import numpy as np
    >>> from cuattn.compat.flash_attn import flash_attn_varlen_kvpacked_func
    >>> q, kv = np.ones((3, 4, 32), np.float16), np.ones((5, 2, 2, 32), np.float16)
    >>> flash_attn_varlen_kvpacked_func(q, kv, np.array([0, 1, 3]), np.array([0, 2, 5]), 2, 3).shape
    (3, 4, 32)
    """
    k, v = unpack("kv", kv, "[total_k, 2, kv_heads, head_dim]", 1, 2, q=q)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        dropout_seed=dropout_seed,
        dropout_offset=dropout_offset,
    )
