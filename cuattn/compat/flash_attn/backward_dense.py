"""Gradients of the functions of dense.py: batches of sequences of one length."""

from __future__ import annotations

from typing import Any

import cuattn
from cuattn.compat.arguments import unpack
from cuattn.compat.flash_attn.gradients import backward_options, packed_gradients
from cuattn.compat.names import FLASH_ATTN, KVPACKED, QKVPACKED
from cuattn.ops.attention.backward import arguments
from cuattn.runtime.renaming import renamed


@renamed(FLASH_ATTN)
def flash_attn_func_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    softmax_lse: Any,
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
    """Gradients of `flash_attn_func`: `cuattn.attention_backward` with the arguments of flash-attn.

    Every option has to be as it was in the forward call.

    Parameters
    ----------
    dout : array [batch, seqlen_q, heads, head_dim_v], dtype of ``q``
        Gradient of ``out``.
    q : array [batch, seqlen_q, heads, head_dim]; float16, bfloat16, float32 or float64
    k : array [batch, seqlen_k, kv_heads, head_dim], dtype of ``q``
    v : array [batch, seqlen_k, kv_heads, head_dim_v], dtype of ``q``
    out : array [batch, seqlen_q, heads, head_dim_v], dtype of ``q``
    softmax_lse : array [batch, heads, seqlen_q], float32 (float64 for float64)
        The first two results of `flash_attn_func` with ``return_attn_probs=True``.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_seed, dropout_offset
        As for `flash_attn_func`.
    deterministic : bool
        True: the same inputs give the same bits, as everywhere in cuattn by default. False, the default of the package:
        dq of 16-bit inputs is summed in no order, as `cuattn.attention_backward` says.
    dq, dk, dv : array, shape and dtype of ``q``, ``k`` and ``v``, optional
        Where to write the gradients. They must not overlap an input or each other.

    Returns
    -------
    dq, dk, dv : array, shape and dtype of ``q``, ``k`` and ``v``

    Raises
    ------
    ArgumentError
        As for `flash_attn_func`.
    CuattnError
        What `cuattn.attention_backward` refuses.

    References
    ----------
    Dao, "FlashAttention-2", 2023.

    Examples
    --------
    >>> import numpy as np
    >>> from cuattn.compat.flash_attn import flash_attn_func, flash_attn_func_backward
    >>> q = np.zeros((1, 2, 1, 32), np.float32)
    >>> v = np.array([1, 3], np.float32).reshape(1, 2, 1, 1)
    >>> out, softmax_lse, _ = flash_attn_func(q, q, v, causal=True, return_attn_probs=True)
    >>> dq, dk, dv = flash_attn_func_backward(np.ones_like(out), q, q, v, out, softmax_lse, causal=True)
    >>> dv[0, :, 0, 0]
    array([1.5, 0.5], dtype=float32)
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
    grads = cuattn.attention_backward(dout, q, k, v, out, softmax_lse, dq=dq, dk=dk, dv=dv, **options)
    return grads.dq, grads.dk, grads.dv


@renamed(FLASH_ATTN | QKVPACKED)
def flash_attn_qkvpacked_func_backward(
    dout: Any,
    qkv: Any,
    out: Any,
    softmax_lse: Any,
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
    """Gradients of `flash_attn_qkvpacked_func`, in one array, where they are written without a copy.

    Parameters
    ----------
    qkv : array [batch, seqlen, 3, heads, head_dim]
    dqkv : array, shape and dtype of ``qkv``, optional
        Where to write the gradients. It must not overlap an input.
    Every other argument
        As for `flash_attn_func_backward`.

    Returns
    -------
    dqkv : array, shape and dtype of ``qkv``

    Raises
    ------
    ShapeError
        ``qkv`` or ``dqkv`` has another rank, or its axis 2 is not 3 long.
    CuattnError
        As for `flash_attn_func_backward`.

    References
    ----------
    Dao, "FlashAttention-2", 2023.

    Examples
    --------
    >>> import numpy as np
    >>> from cuattn.compat.flash_attn import flash_attn_qkvpacked_func, flash_attn_qkvpacked_func_backward
    >>> qkv = np.ones((1, 5, 3, 2, 32), np.float16)
    >>> out, softmax_lse, _ = flash_attn_qkvpacked_func(qkv, return_attn_probs=True)
    >>> flash_attn_qkvpacked_func_backward(np.ones_like(out), qkv, out, softmax_lse).shape
    (1, 5, 3, 2, 32)
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
    layout, names = "[batch, seqlen, 3, heads, head_dim]", ("dq", "dk", "dv")
    q, k, v = unpack("qkv", qkv, layout, 2, 3)
    if dqkv is not None:
        options |= zip(names, unpack("dqkv", dqkv, layout, 2, 3, qkv=qkv), strict=True)
    problem = arguments.check(dout, q, k, v, out, softmax_lse, **options)
    return packed_gradients(problem, names, 2, dqkv)[1]


@renamed(FLASH_ATTN | KVPACKED)
def flash_attn_kvpacked_func_backward(
    dout: Any,
    q: Any,
    kv: Any,
    out: Any,
    softmax_lse: Any,
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
    """Gradients of `flash_attn_kvpacked_func`, those of keys and values in one array, written there without a copy.

    Parameters
    ----------
    q : array [batch, seqlen_q, heads, head_dim]
    kv : array [batch, seqlen_k, 2, kv_heads, head_dim], dtype of ``q``
    dq, dkv : array, shape and dtype of ``q`` and ``kv``, optional
        Where to write the gradients. They must not overlap an input or each other.
    Every other argument
        As for `flash_attn_func_backward`.

    Returns
    -------
    dq, dkv : array, shape and dtype of ``q`` and ``kv``

    Raises
    ------
    ShapeError
        ``kv`` or ``dkv`` has another rank, or its axis 2 is not 2 long.
    CuattnError
        As for `flash_attn_func_backward`.

    References
    ----------
    Dao, "FlashAttention-2", 2023.

    Examples
    --------
    >>> import numpy as np
    >>> from cuattn.compat.flash_attn import flash_attn_kvpacked_func, flash_attn_kvpacked_func_backward
    >>> q, kv = np.ones((1, 3, 4, 32), np.float16), np.ones((1, 5, 2, 2, 32), np.float16)
    >>> out, softmax_lse, _ = flash_attn_kvpacked_func(q, kv, return_attn_probs=True)
    >>> dq, dkv = flash_attn_kvpacked_func_backward(np.ones_like(out), q, kv, out, softmax_lse)
    >>> dq.shape, dkv.shape
    ((1, 3, 4, 32), (1, 5, 2, 2, 32))
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
    layout, names = "[batch, seqlen_k, 2, kv_heads, head_dim]", ("dk", "dv")
    k, v = unpack("kv", kv, layout, 2, 2, q=q)
    if dkv is not None:
        options |= zip(names, unpack("dkv", dkv, layout, 2, 2, q=q), strict=True)
    problem = arguments.check(dout, q, k, v, out, softmax_lse, dq=dq, **options)
    return packed_gradients(problem, names, 2, dkv)
