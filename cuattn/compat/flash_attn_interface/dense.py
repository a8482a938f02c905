"""flash-attn 3 for batches of sequences of one length: [batch, seqlen, heads, head_dim]."""

from __future__ import annotations

from typing import Any

import cuattn
from cuattn.compat.arguments import unpack
from cuattn.compat.flash_attn_interface.options import check_schedule, logit_options
from cuattn.compat.names import FLASH_ATTN_3
from cuattn.errors import ArgumentError, ShapeError
from cuattn.runtime.executor import executor_for
from cuattn.runtime.renaming import renamed
from cuattn.runtime.small_arrays import check_flag


@renamed(FLASH_ATTN_3)
def flash_attn_func(
    q: Any,
    k: Any,
    v: Any,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Any = None,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    learnable_sink: Any = None,
    fp8_format: str | None = None,
) -> Any:
    """`cuattn.attention` with the arguments of flash-attn 3.

    Parameters
    ----------
    q : array [batch, seqlen_q, heads, head_dim]; float16, bfloat16, float32, float64, float8_e4m3fn or float8_e5m2
    k : array [batch, seqlen_k, kv_heads, head_dim], dtype of ``q``
    v : array [batch, seqlen_k, kv_heads, head_dim_v], dtype of ``q``
        Query head h reads key/value head h // (heads // kv_heads).
    softmax_scale : float, optional
        Factor of the logits; 1 / sqrt(head_dim) by default.
    causal : bool
        Key j is visible to query i when j <= i + seqlen_k - seqlen_q (bottom right).
    qv : None
        Not offered.
    q_descale, k_descale, v_descale : float array [batch, kv_heads], optional
        Factors of 8-bit floats.
    window_size : (int, int)
        Keys from i + seqlen_k - seqlen_q - left to i + seqlen_k - seqlen_q + right are visible; -1 is unbounded. A
        pair, or an array of two integers on the host.
    attention_chunk : int
        Keys of the chunk of key i + seqlen_k - seqlen_q alone are visible, of the keys cut into chunks of so many; 0 is
        off.
    softcap : float
        Logits become softcap * tanh(logit / softcap); 0 or less is off.
    num_splits, pack_gqa, sm_margin, deterministic
        Checked, and without effect: how the work is divided is chosen here, and the forward pass always gives the same
        bits for the same inputs.
    return_attn_probs : bool
        Return also lse.
    learnable_sink : float array [heads], optional
        One more logit in the denominator of each row (the name of flash-attn 4): ``sinks`` of `cuattn.attention`.
    fp8_format : {None, "e4m3fn", "e5m2"}
        Reads uint8 arrays as 8-bit floats, as CuPy has no dtype for them.

    Returns
    -------
    out : array [batch, seqlen_q, heads, head_dim_v], dtype of ``q``; bfloat16 for 8-bit floats
    softmax_lse : array [batch, heads, seqlen_q], float32 (float64 for float64); only with ``return_attn_probs``

    Raises
    ------
    NotSupportedError
        ``qv``.
    ArgumentError
        A window that is no pair of integers of at least -1, a number or flag that is none.
    CuattnError
        What `cuattn.attention` refuses.

    References
    ----------
    Shah et al., "FlashAttention-3: fast and accurate attention with asynchrony and low-precision", 2024.

    Examples
    --------
    >>> import numpy as np
    >>> from cuattn.compat.flash_attn_interface import flash_attn_func
    >>> q = np.zeros((1, 2, 1, 32), np.float32)
    >>> v = np.arange(3, dtype=np.float32).reshape(1, 3, 1, 1)
    >>> flash_attn_func(q, np.zeros((1, 3, 1, 32), np.float32), v, causal=True)[0, :, 0, 0]
    array([0.5, 1. ], dtype=float32)
    """
    options = logit_options(softmax_scale, causal, qv, window_size, attention_chunk, softcap, learnable_sink)
    check_schedule(num_splits, pack_gqa, sm_margin)
    check_flag("deterministic", deterministic)
    options |= {"q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale, "fp8_format": fp8_format}
    return cuattn.attention(q, k, v, **options, return_lse=check_flag("return_attn_probs", return_attn_probs))


def flash_attn_qkvpacked_func(
    qkv: Any,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    learnable_sink: Any = None,
    fp8_format: str | None = None,
) -> Any:
    """`flash_attn_func` for queries, keys and values in one array, which are read where they are.

    Parameters
    ----------
    qkv : array [batch, seqlen, 3, heads, head_dim], or [batch, seqlen, num_heads_q + 2 * kv_heads, head_dim]
    num_heads_q : int
        Needed for the second form: the heads are those of q, then of k, then of v.
    Every other argument
        As for `flash_attn_func`.

    Returns
    -------
    As for `flash_attn_func`.

    Raises
    ------
    ShapeError
        ``qkv`` has another rank, its axis 2 is not 3 long, or no two equal numbers of heads are left for k and v.
    ArgumentError
        ``num_heads_q`` is missing or no integer from 1 on.
    CuattnError
        As for `flash_attn_func`.

    References
    ----------
    Shah et al., "FlashAttention-3: fast and accurate attention with asynchrony and low-precision", 2024.

    Examples
    --------
    >>> import numpy as np
    >>> from cuattn.compat.flash_attn_interface import flash_attn_qkvpacked_func
    >>> flash_attn_qkvpacked_func(np.ones((1, 5, 8, 32), np.float16), num_heads_q=4).shape
    (1, 5, 4, 32)
    """
    q, k, v = _split(qkv, num_heads_q)
    return flash_attn_func(
        *(q, k, v, softmax_scale, causal, None, q_descale, k_descale, v_descale, window_size, attention_chunk, softcap),
        deterministic=deterministic,
        sm_margin=sm_margin,
        return_attn_probs=return_attn_probs,
        learnable_sink=learnable_sink,
        fp8_format=fp8_format,
    )


def _split(qkv: Any, num_heads_q: Any) -> list[Any]:
    """Return q, k and v as views of the packed array."""
    array = executor_for(qkv=qkv).asarray("qkv", qkv)
    if array.ndim != 4:
        return unpack("qkv", array, "[batch, seqlen, 3, heads, head_dim]", 2, 3)
    if isinstance(num_heads_q, bool) or not isinstance(num_heads_q, int) or num_heads_q < 1:
        raise ArgumentError(f"num_heads_q is {num_heads_q!r}; an integer from 1 on is needed for a qkv of rank 4")
    of_keys, odd = divmod(int(array.shape[2]) - num_heads_q, 2)
    if odd or of_keys < 1:
        raise ShapeError(
            f"qkv has shape {tuple(array.shape)} and num_heads_q is {num_heads_q}; [batch, seqlen, num_heads_q + 2 * "
            "kv_heads, head_dim] is needed"
        )
    ends = num_heads_q, num_heads_q + of_keys
    return [array[:, :, : ends[0]], array[:, :, ends[0] : ends[1]], array[:, :, ends[1] :]]
