"""flash-attn 3 for sequences packed one after the other: [total, heads, head_dim] and cu_seqlens."""

from __future__ import annotations

from typing import Any

import cuattn
from cuattn.compat.flash_attn_interface.options import check_schedule, logit_options
from cuattn.compat.flash_attn_interface.sequences import sequences_of
from cuattn.compat.names import FLASH_ATTN_3
from cuattn.runtime.renaming import renamed
from cuattn.runtime.small_arrays import check_flag


@renamed(FLASH_ATTN_3)
def flash_attn_varlen_func(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Any = None,
    seqused_k: Any = None,
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
    """`cuattn.attention_varlen` with the arguments of flash-attn 3: sequences packed one after the other.

    Parameters
    ----------
    q : array [total_q, heads, head_dim]; dtypes as for `flash_attn_func`
    k : array [total_k, kv_heads, head_dim], dtype of ``q``
    v : array [total_k, kv_heads, head_dim_v], dtype of ``q``
    cu_seqlens_q, cu_seqlens_k : int32 [batch + 1]
        Sequence b has the tokens from cu_seqlens[b] up to, but without, cu_seqlens[b + 1].
    max_seqlen_q, max_seqlen_k : int
        Length of the longest sequence, or more.
    seqused_q, seqused_k : int32 [batch], optional
        Only the first seqused[b] tokens of sequence b take part, and the diagonal is between those. The others are not
        seen, and give zeros. Checked where the host sees them; on a GPU more than a sequence has are cut.
    Every other argument
        As for `flash_attn_func`, of each sequence by itself; the descales are [batch, kv_heads].

    Returns
    -------
    out : array [total_q, heads, head_dim_v], dtype of ``q``; bfloat16 for 8-bit floats
    softmax_lse : array [heads, total_q], float32 (float64 for float64); only with ``return_attn_probs``

    Raises
    ------
    ArgumentError
        Used tokens that the host sees to be more than a sequence has.
    CuattnError
        As for `flash_attn_func`, and what `cuattn.attention_varlen` refuses.

    References
    ----------
    Shah et al., "FlashAttention-3: fast and accurate attention with asynchrony and low-precision", 2024.

    Examples
    --------
    >>> import numpy as np
    >>> from cuattn.compat.flash_attn_interface import flash_attn_varlen_func
    >>> q = np.zeros((5, 1, 32), np.float32)  # two sequences, of 2 and 3 tokens
    >>> v = np.arange(5, dtype=np.float32).reshape(5, 1, 1)
    >>> lengths = np.array([0, 2, 5], np.int32), np.array([0, 2, 5], np.int32), 3, 3
    >>> flash_attn_varlen_func(q, q, v, *lengths, seqused_k=np.array([1, 2], np.int32))[:, 0, 0]
    array([0. , 0. , 2.5, 2.5, 2.5], dtype=float32)
    """
    options = logit_options(softmax_scale, causal, qv, window_size, attention_chunk, softcap, learnable_sink)
    check_schedule(num_splits, pack_gqa, sm_margin)
    check_flag("deterministic", deterministic)
    options |= {"fp8_format": fp8_format, "return_lse": check_flag("return_attn_probs", return_attn_probs)}
    where = sequences_of(
        *({"q": q, "k": k, "v": v}, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k)
    )
    kv_heads = int(where.executor.asarray("k", k).shape[-2]) if where.parts > 1 else 0
    for name, factor in (("q_descale", q_descale), ("k_descale", k_descale), ("v_descale", v_descale)):
        options[name] = where.of_each(name, factor, kv_heads)
    return cuattn.attention_varlen(q, k, v, where.cu_seqlens_q, where.cu_seqlens_k, **where.limits, **options)
