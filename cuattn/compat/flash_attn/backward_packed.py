"""Gradients of the functions of packed.py: sequences packed one after the other."""

from __future__ import annotations

from typing import Any

import cuattn
from cuattn.compat.arguments import max_seqlens, unpack
from cuattn.compat.flash_attn.gradients import backward_options, packed_gradients
from cuattn.compat.names import FLASH_ATTN, KVPACKED, QKVPACKED
from cuattn.ops.attention.backward import arguments
from cuattn.runtime.renaming import renamed


@renamed(FLASH_ATTN)
def flash_attn_varlen_func_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    softmax_lse: Any,
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
    *,
    dq: Any = None,
    dk: Any = None,
    dv: Any = None,
    dropout_seed: int | None = None,
    dropout_offset: int = 0,
) -> tuple[Any, Any, Any]:
    """Gradients of `flash_attn_varlen_func`: `cuattn.attention_varlen_backward` with the arguments of flash-attn.

    Every option has to be as it was in the forward call.

    Parameters
    ----------
    dout : array [total_q, heads, head_dim_v], dtype of ``q``
        Gradient of ``out``.
    q : array [total_q, heads, head_dim]; float16, bfloat16, float32 or float64
    k : array [total_k, kv_heads, head_dim], dtype of ``q``
    v : array [total_k, kv_heads, head_dim_v], dtype of ``q``
    out : array [total_q, heads, head_dim_v], dtype of ``q``
    softmax_lse : array [heads, total_q], float32 (float64 for float64)
        The first two results of `flash_attn_varlen_func` with ``return_attn_probs=True``.
    cu_seqlens_q, cu_seqlens_k : int32 [batch + 1]
    max_seqlen_q, max_seqlen_k : int
        As for `flash_attn_varlen_func`.
    Every other argument
        As for `flash_attn_func_backward`, of each sequence by itself.

    Returns
    -------
    dq, dk, dv : array, shape and dtype of ``q``, ``k`` and ``v``

    Raises
    ------
    CuattnError
        As for `flash_attn_varlen_func`, and what `cuattn.attention_varlen_backward` refuses.

    References
    ----------
    Dao, "FlashAttention-2", 2023.

    Examples
    --------
    >>> import numpy as np
    >>> from cuattn.compat.flash_attn import flash_attn_varlen_func, flash_attn_varlen_func_backward
    >>> q = np.zeros((3, 1, 32), np.float32)  # two sequences, of 1 and 2 tokens
    >>> v = np.array([5, 1, 3], np.float32).reshape(3, 1, 1)
    >>> lengths = np.array([0, 1, 3]), np.array([0, 1, 3]), 2, 2
    >>> out, softmax_lse, _ = flash_attn_varlen_func(q, q, v, *lengths, causal=True, return_attn_probs=True)
    >>> grads = flash_attn_varlen_func_backward(np.ones_like(out), q, q, v, out, softmax_lse, *lengths, causal=True)
    >>> grads[2][:, 0, 0]
    array([1. , 1.5, 0.5], dtype=float32)
    """
    options = backward_options(
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        dropout_seed,
        dropout_offset,
    )
    options |= max_seqlens(max_seqlen_q, max_seqlen_k) | {"dq": dq, "dk": dk, "dv": dv}
    grads = cuattn.attention_varlen_backward(dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, **options)
    return grads.dq, grads.dk, grads.dv


@renamed(FLASH_ATTN | QKVPACKED)
def flash_attn_varlen_qkvpacked_func_backward(
    dout: Any,
    qkv: Any,
    out: Any,
    softmax_lse: Any,
    cu_seqlens: Any,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    *,
    dqkv: Any = None,
    dropout_seed: int | None = None,
    dropout_offset: int = 0,
) -> Any:
    """Gradients of `flash_attn_varlen_qkvpacked_func`, in one array, where they are written without a copy.

    Parameters
    ----------
    qkv : array [total, 3, heads, head_dim]
    cu_seqlens : int32 [batch + 1]
    max_seqlen : int
    dqkv : array, shape and dtype of ``qkv``, optional
        Where to write the gradients. It must not overlap an input.
    Every other argument
        As for `flash_attn_varlen_func_backward`.

    Returns
    -------
    dqkv : array, shape and dtype of ``qkv``

    Raises
    ------
    ShapeError
        ``qkv`` or ``dqkv`` has another rank, or its axis 1 is not 3 long.
    CuattnError
        As for `flash_attn_varlen_func_backward`.

    References
    ----------
    Dao, "FlashAttention-2", 2023.

    Examples
    --------
    >>> import numpy as np
    >>> from cuattn.compat.flash_attn import flash_attn_varlen_qkvpacked_func, flash_attn_varlen_qkvpacked_func_backward
    >>> qkv, lengths = np.ones((5, 3, 2, 32), np.float16), (np.array([0, 2, 5]), 3)
    >>> out, softmax_lse, _ = flash_attn_varlen_qkvpacked_func(qkv, *lengths, return_attn_probs=True)
    >>> flash_attn_varlen_qkvpacked_func_backward(np.ones_like(out), qkv, out, softmax_lse, *lengths).shape
    (5, 3, 2, 32)
    """
    options = backward_options(
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        dropout_seed,
        dropout_offset,
    )
    options |= max_seqlens(max_seqlen, max_seqlen)
    layout, names = "[total, 3, heads, head_dim]", ("dq", "dk", "dv")
    q, k, v = unpack("qkv", qkv, layout, 1, 3)
    if dqkv is not None:
        options |= zip(names, unpack("dqkv", dqkv, layout, 1, 3, qkv=qkv), strict=True)
    problem = arguments.check_packed(dout, q, k, v, out, softmax_lse, cu_seqlens, cu_seqlens, **options)
    return packed_gradients(problem, names, 1, dqkv)[1]


@renamed(FLASH_ATTN | KVPACKED)
def flash_attn_varlen_kvpacked_func_backward(
    dout: Any,
    q: Any,
    kv: Any,
    out: Any,
    softmax_lse: Any,
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
    *,
    dq: Any = None,
    dkv: Any = None,
    dropout_seed: int | None = None,
    dropout_offset: int = 0,
) -> tuple[Any, Any]:
    """Gradients of `flash_attn_varlen_kvpacked_func`, keys and values in one array, written there without a copy.

    Parameters
    ----------
    q : array [total_q, heads, head_dim]
    kv : array [total_k, 2, kv_heads, head_dim], dtype of ``q``
    dq, dkv : array, shape and dtype of ``q`` and ``kv``, optional
        Where to write the gradients. They must not overlap an input or each other.
    Every other argument
        As for `flash_attn_varlen_func_backward`.

    Returns
    -------
    dq, dkv : array, shape and dtype of ``q`` and ``kv``

    Raises
    ------
    ShapeError
        ``kv`` or ``dkv`` has another rank, or its axis 1 is not 2 long.
    CuattnError
        As for `flash_attn_varlen_func_backward`.

    References
    ----------
    Dao, "FlashAttention-2", 2023.

    Examples
    --------
    >>> import numpy as np
    >>> from cuattn.compat.flash_attn import flash_attn_varlen_kvpacked_func, flash_attn_varlen_kvpacked_func_backward
    >>> q, kv = np.ones((3, 4, 32), np.float16), np.ones((5, 2, 2, 32), np.float16)
    >>> lengths = np.array([0, 1, 3]), np.array([0, 2, 5]), 2, 3
    >>> out, softmax_lse, _ = flash_attn_varlen_kvpacked_func(q, kv, *lengths, return_attn_probs=True)
    >>> dq, dkv = flash_attn_varlen_kvpacked_func_backward(np.ones_like(out), q, kv, out, softmax_lse, *lengths)
    >>> dq.shape, dkv.shape
    ((3, 4, 32), (5, 2, 2, 32))
    """
    options = backward_options(
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        dropout_seed,
        dropout_offset,
    )
    options |= max_seqlens(max_seqlen_q, max_seqlen_k) | {"dq": dq}
    layout, names = "[total_k, 2, kv_heads, head_dim]", ("dk", "dv")
    k, v = unpack("kv", kv, layout, 1, 2, q=q)
    if dkv is not None:
        options |= zip(names, unpack("dkv", dkv, layout, 1, 2, q=q), strict=True)
    problem = arguments.check_packed(dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, **options)
    return packed_gradients(problem, names, 1, dkv)
