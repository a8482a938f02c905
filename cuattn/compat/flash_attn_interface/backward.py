"""Gradients of flash-attn 3, functions of their own: the package has them inside of automatic differentiation."""

from __future__ import annotations

from typing import Any

import cuattn
from cuattn.compat.arguments import whole_number
from cuattn.compat.flash_attn_interface.options import logit_options
from cuattn.compat.flash_attn_interface.sequences import sequences_of
from cuattn.compat.names import FLASH_ATTN_3
from cuattn.ops.attention.backward.problem import AttentionGrads
from cuattn.runtime.renaming import renamed


@renamed(FLASH_ATTN_3)
def flash_attn_func_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    softmax_lse: Any,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
    *,
    dq: Any = None,
    dk: Any = None,
    dv: Any = None,
    learnable_sink: Any = None,
    attention_chunk: int = 0,
) -> tuple[Any, ...]:
    """Gradients of `flash_attn_func`: `cuattn.attention_backward` with the arguments of flash-attn 3.

    Every option has to be as it was in the forward call.

    Parameters
    ----------
    dout : array [batch, seqlen_q, heads, head_dim_v], dtype of ``q``
        Gradient of ``out``.
    q, k, v : arrays; float16, bfloat16, float32 or float64
    softmax_scale, causal, window_size, softcap, sm_margin, learnable_sink, attention_chunk
        As for `flash_attn_func`; the package has no gradients with chunks.
    out : array [batch, seqlen_q, heads, head_dim_v], dtype of ``q``
    softmax_lse : array [batch, heads, seqlen_q], float32 (float64 for float64)
        Results of `flash_attn_func` with ``return_attn_probs=True``.
    deterministic : bool
        Sum dq in one order. False as in the package: 16-bit dq may differ by roundings from call to call.
    dq, dk, dv : array, shape and dtype of ``q``, ``k`` and ``v``, optional
        Where to write the gradients.

    Returns
    -------
    dq, dk, dv : array, shape and dtype of ``q``, ``k`` and ``v``
    dsink : array [heads], float32 (float64 for float64); only with ``learnable_sink``

    Raises
    ------
    CuattnError
        As for `flash_attn_func`, and what `cuattn.attention_backward` refuses.

    References
    ----------
    Shah et al., "FlashAttention-3: fast and accurate attention with asynchrony and low-precision", 2024.

    Examples
    --------
    >>> import numpy as np
    >>> from cuattn.compat.flash_attn_interface import flash_attn_func, flash_attn_func_backward
    >>> q = np.zeros((1, 2, 1, 32), np.float32)
    >>> out, softmax_lse = flash_attn_func(q, q, q, causal=True, return_attn_probs=True)
    >>> flash_attn_func_backward(np.ones_like(out), q, q, q, out, softmax_lse, causal=True)[2][0, :, 0, 0]
    array([1.5, 0.5], dtype=float32)
    """
    of_logits = softmax_scale, causal, None, window_size, attention_chunk, softcap, learnable_sink
    options = _options(of_logits, deterministic, sm_margin)
    return _results(cuattn.attention_backward(dout, q, k, v, out, softmax_lse, dq=dq, dk=dk, dv=dv, **options))


@renamed(FLASH_ATTN_3)
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
    seqused_q: Any = None,
    seqused_k: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
    *,
    dq: Any = None,
    dk: Any = None,
    dv: Any = None,
    learnable_sink: Any = None,
    attention_chunk: int = 0,
) -> tuple[Any, ...]:
    """Gradients of `flash_attn_varlen_func`: `cuattn.attention_varlen_backward` with the arguments of flash-attn 3.

    Every option has to be as it was in the forward call.

    Parameters
    ----------
    dout : array [total_q, heads, head_dim_v], dtype of ``q``
        Gradient of ``out``.
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k
        As for `flash_attn_varlen_func`. Gradients of tokens that are not used are 0.
    out : array [total_q, heads, head_dim_v], dtype of ``q``
    softmax_lse : array [heads, total_q], float32 (float64 for float64)
        Results of `flash_attn_varlen_func` with ``return_attn_probs=True``.
    Every other argument
        As for `flash_attn_func_backward`.

    Returns
    -------
    dq, dk, dv : array, shape and dtype of ``q``, ``k`` and ``v``
    dsink : array [heads], float32 (float64 for float64); only with ``learnable_sink``

    Raises
    ------
    CuattnError
        As for `flash_attn_varlen_func`, and what `cuattn.attention_varlen_backward` refuses.

    References
    ----------
    Shah et al., "FlashAttention-3: fast and accurate attention with asynchrony and low-precision", 2024.

    Examples
    --------
    >>> import numpy as np
    >>> from cuattn.compat.flash_attn_interface import flash_attn_varlen_func, flash_attn_varlen_func_backward
    >>> q = np.zeros((3, 1, 32), np.float32)  # a sequence of 1 token, and one of 2 of which one is used
    >>> where = np.array([0, 1, 3]), np.array([0, 1, 3]), 2, 2, np.array([1, 1]), np.array([1, 1])
    >>> out, softmax_lse = flash_attn_varlen_func(q, q, q, *where, return_attn_probs=True)
    >>> flash_attn_varlen_func_backward(np.ones_like(out), q, q, q, out, softmax_lse, *where)[2][:, 0, 0]
    array([1., 1., 0.], dtype=float32)
    """
    of_logits = softmax_scale, causal, None, window_size, attention_chunk, softcap, learnable_sink
    options = _options(of_logits, deterministic, sm_margin)
    where = sequences_of(
        *({"q": q, "k": k, "v": v}, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k)
    )
    options |= where.limits | {"dq": dq, "dk": dk, "dv": dv}
    grads = cuattn.attention_varlen_backward(
        dout, q, k, v, out, softmax_lse, where.cu_seqlens_q, where.cu_seqlens_k, **options
    )
    return _results(grads)


def _options(of_logits: tuple[Any, ...], deterministic: Any, sm_margin: Any) -> dict[str, Any]:
    whole_number("sm_margin", sm_margin, "an integer from 0 on")
    return logit_options(*of_logits) | {"deterministic": deterministic}


def _results(grads: AttentionGrads) -> tuple[Any, ...]:
    gradients = grads.dq, grads.dk, grads.dv
    return gradients if grads.dsinks is None else (*gradients, grads.dsinks)
