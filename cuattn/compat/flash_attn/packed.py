"""flash-attn for sequences packed one after the other: [total, heads, head_dim] and cu_seqlens."""

from __future__ import annotations

from typing import Any

import numpy as np

import cuattn
from cuattn.compat.arguments import max_seqlens, results, unpack
from cuattn.compat.libraries import OPTIONS_2
from cuattn.compat.names import FLASH_ATTN, KVPACKED, QKVPACKED, VARLEN
from cuattn.errors import ArgumentError, NotSupportedError, ShapeError
from cuattn.ops.attention.sequences import check_cu_seqlens, check_max_seqlen
from cuattn.ops.decode.lengths import integers
from cuattn.runtime.executor import executor_for
from cuattn.runtime.renaming import renamed
from cuattn.runtime.small_arrays import check_flag


@renamed(VARLEN)
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
    block_table : int32 [batch, max_blocks], optional
        ``k`` and ``v`` are then pages, [num_blocks, page_block_size, kv_heads, ...] of any page size, and these are the
        pages of each sequence, in order. Entries behind the used ones are not read; ``cu_seqlens_k`` says how many keys
        a sequence has and no longer where they lie.
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
        ``block_table`` and dropout.
    ArgumentError
        Lengths that the host sees to be wrong; more keys than ``block_table`` has room for.
    CuattnError
        As for `flash_attn_func`, and what `cuattn.attention_varlen` (or `cuattn.paged_attention_varlen`, for which
        pages are k_pages and v_pages) refuses.

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
    options = OPTIONS_2.options(
        softmax_scale=softmax_scale,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        causal=causal,
    )
    dropout = OPTIONS_2.options(dropout_p=dropout_p, dropout_seed=dropout_seed, dropout_offset=dropout_offset)
    check_flag("deterministic", deterministic)
    options["return_lse"] = check_flag("return_attn_probs", return_attn_probs)
    options |= max_seqlens(max_seqlen_q, max_seqlen_k)
    if block_table is None:
        options |= dropout
        result = cuattn.attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, **options)
    else:
        if dropout["dropout_p"] != 0:
            raise NotSupportedError(
                f"dropout_p is {dropout_p} beside block_table; attention over pages drops nothing: 0 is allowed"
            )
        longest = options.pop("max_seqlen_k")
        seqlens_k = _seqlens_of_pages(q, k, v, cu_seqlens_k, longest, block_table)
        result = cuattn.paged_attention_varlen(q, k, v, block_table, cu_seqlens_q, seqlens_k, **options)
    return results(result, return_attn_probs)


def _seqlens_of_pages(q: Any, k: Any, v: Any, cu_seqlens_k: Any, max_seqlen_k: Any, block_table: Any) -> Any:
    """The keys of each sequence, checked where the host sees them, under the names that the caller knows."""
    executor = executor_for(q=q, k=k, v=v)
    tables = integers(executor, "block_table", block_table, None, 2, "[batch, max_blocks]").array
    batch, max_blocks = tables.shape
    given = integers(executor, "cu_seqlens_k", cu_seqlens_k, batch + 1, 1, "[batch + 1], as block_table has rows,")
    pages = executor.asarray("k", k)
    if pages.ndim != 4:
        raise ShapeError(
            f"k has shape {tuple(pages.shape)}; with block_table pages are needed: [num_blocks, page_block_size, "
            "kv_heads, head_dim]"
        )
    limit = check_max_seqlen("max_seqlen_k", max_seqlen_k)
    if given.seen is not None:
        starts = given.seen.astype(np.int64)
        longest = check_cu_seqlens("cu_seqlens_k", starts, int(starts[-1]), "max_seqlen_k", limit)
        if longest > max_blocks * pages.shape[1]:
            at = int(np.diff(starts).argmax())
            raise ArgumentError(
                f"cu_seqlens_k gives sequence {at} {longest} keys; its row of block_table has room for "
                f"{max_blocks * pages.shape[1]}"
            )
    with executor.on_device():
        return given.array[1:] - given.array[:-1]


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
