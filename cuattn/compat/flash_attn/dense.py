"""flash-attn for batches of sequences of one length: [batch, seqlen, heads, head_dim]."""

from __future__ import annotations

from typing import Any

import cuattn
from cuattn.compat.arguments import results, unpack
from cuattn.compat.libraries import OPTIONS_2
from cuattn.compat.names import FLASH_ATTN, KVPACKED, QKVPACKED
from cuattn.runtime.renaming import renamed
from cuattn.runtime.small_arrays import check_flag


@renamed(FLASH_ATTN)
def flash_attn_func(
    q: Any,
    k: Any,
    v: Any,
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
    """`cuattn.attention` with the arguments of flash-attn.

    Parameters
    ----------
    q : array [batch, seqlen_q, heads, head_dim]; float16, bfloat16, float32 or float64
    k : array [batch, seqlen_k, kv_heads, head_dim], dtype of ``q``
    v : array [batch, seqlen_k, kv_heads, head_dim_v], dtype of ``q``
        Query head h reads key/value head h // (heads // kv_heads).
    dropout_p : float
        Probability that a softmax probability is dropped; 0 <= dropout_p < 1.
    softmax_scale : float, optional
        Factor of the logits; 1 / sqrt(head_dim) by default.
    causal : bool
        Key j is visible to query i when j <= i + seqlen_k - seqlen_q (bottom right).
    window_size : (int, int)
        Keys from i + seqlen_k - seqlen_q - left to i + seqlen_k - seqlen_q + right are visible; -1 is unbounded. With
        ``causal`` both rules hold.
    softcap : float
        Logits become softcap * tanh(logit / softcap); 0 or less is off.
    alibi_slopes : array [heads] or [batch, heads], optional
        Adds -slope * |i + seqlen_k - seqlen_q - j| to the logits.
    deterministic : bool
        Changes nothing: the forward pass always gives the same bits for the same inputs.
    return_attn_probs : bool
        Return also lse, and None in the place of the probabilities.
    dropout_seed, dropout_offset : int
        As for `cuattn.attention`. The seed is needed whenever ``dropout_p`` is not 0.

    Returns
    -------
    out : array [batch, seqlen_q, heads, head_dim_v], dtype of ``q``
    softmax_lse : array [batch, heads, seqlen_q], float32 (float64 for float64); only with ``return_attn_probs``
    S_dmask : None; only with ``return_attn_probs``

    Raises
    ------
    ArgumentError
        A window that is no pair of integers of at least -1, a scale or softcap that is no number, a flag that is no
        bool, or dropout without a seed.
    CuattnError
        What `cuattn.attention` refuses.

    References
    ----------
    Dao, "FlashAttention-2", 2023.

    Examples
    --------
    >>> import numpy as np
    >>> from cuattn.compat.flash_attn import flash_attn_func
    >>> q = np.zeros((1, 2, 1, 32), np.float32)
    >>> v = np.arange(3, dtype=np.float32).reshape(1, 3, 1, 1)
    >>> k = np.zeros((1, 3, 1, 32), np.float32)
    >>> flash_attn_func(q, k, v, 0.0, None, True)[0, :, 0, 0]
    array([0.5, 1. ], dtype=float32)
    >>> flash_attn_func(q, k, v, causal=True, window_size=(0, 0))[0, :, 0, 0]
    array([1., 2.], dtype=float32)
    """
    options = OPTIONS_2.options(
        softmax_scale=softmax_scale,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        causal=causal,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        dropout_offset=dropout_offset,
    )
    check_flag("deterministic", deterministic)
    options["return_lse"] = check_flag("return_attn_probs", return_attn_probs)
    return results(cuattn.attention(q, k, v, **options), return_attn_probs)


@renamed(FLASH_ATTN | QKVPACKED)
def flash_attn_qkvpacked_func(
    qkv: Any,
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
    """`flash_attn_func` for queries, keys and values in one array, which are read where they are.

    Parameters
    ----------
    qkv : array [batch, seqlen, 3, heads, head_dim]
    Every other argument
        As for `flash_attn_func`.

    Returns
    -------
    As for `flash_attn_func`.

    Raises
    ------
    ShapeError
        ``qkv`` has another rank, or its axis 2 is not 3 long.
    CuattnError
        As for `flash_attn_func`.

    References
    ----------
    Dao, "FlashAttention-2", 2023.

    Examples
    --------
    >>> import numpy as np
    >>> from cuattn.compat.flash_attn import flash_attn_qkvpacked_func
    >>> flash_attn_qkvpacked_func(np.ones((1, 5, 3, 2, 32), np.float16)).shape
    (1, 5, 2, 32)
    """
    q, k, v = unpack("qkv", qkv, "[batch, seqlen, 3, heads, head_dim]", 2, 3)
    return flash_attn_func(
        q,
        k,
        v,
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
def flash_attn_kvpacked_func(
    q: Any,
    kv: Any,
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
    """`flash_attn_func` for keys and values in one array, which are read where they are.

    Parameters
    ----------
    q : array [batch, seqlen_q, heads, head_dim]
    kv : array [batch, seqlen_k, 2, kv_heads, head_dim], dtype of ``q``
    Every other argument
        As for `flash_attn_func`.

    Returns
    -------
    As for `flash_attn_func`.

    Raises
    ------
    ShapeError
        ``kv`` has another rank, or its axis 2 is not 2 long.
    CuattnError
        As for `flash_attn_func`.

    References
    ----------
    Dao, "FlashAttention-2", 2023.

    Examples
    --------
    >>> import numpy as np
    >>> from cuattn.compat.flash_attn import flash_attn_kvpacked_func
    >>> flash_attn_kvpacked_func(np.ones((1, 3, 4, 32), np.float16), np.ones((1, 5, 2, 2, 32), np.float16)).shape
    (1, 3, 4, 32)
    """
    k, v = unpack("kv", kv, "[batch, seqlen_k, 2, kv_heads, head_dim]", 2, 2, q=q)
    return flash_attn_func(
        q,
        k,
        v,
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
