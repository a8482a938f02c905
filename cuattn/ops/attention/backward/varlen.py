"""Gradients of attention over sequences of different lengths, packed one after another without padding.

* Tri Dao, Daniel Y. Fu, Stefano Ermon, Atri Rudra and Christopher Ré, "FlashAttention: fast and memory-efficient exact
  attention with IO-awareness", 2022 (arXiv:2205.14135).
* Tri Dao, "FlashAttention-2: faster attention with better parallelism and work partitioning", 2023 (arXiv:2307.08691).
"""

from __future__ import annotations

from typing import Any, Unpack

from cuattn.ops.attention.backward import arguments
from cuattn.ops.attention.backward.launch import backward
from cuattn.ops.attention.backward.problem import AttentionGrads
from cuattn.ops.attention.options import GradientOptions
from cuattn.ops.attention.signatures import takes_options
from cuattn.ops.attention.slow_calls import BACKWARD_FLOPS, warn_if_slow
from cuattn.typing import ArrayT

__all__ = ["attention_varlen_backward"]


@takes_options(arguments.PACKED, before="dlse")
def attention_varlen_backward(
    dout: ArrayT,
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    out: ArrayT,
    lse: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dlse: Any = None,
    deterministic: bool = True,
    return_dbias: bool = False,
    dq: ArrayT | None = None,
    dk: ArrayT | None = None,
    dv: ArrayT | None = None,
    workspace: Any = None,
    **options: Unpack[GradientOptions],
) -> AttentionGrads[ArrayT]:
    """`cuattn.attention_backward` of each sequence of a packed batch: the gradients of `cuattn.attention_varlen`.

    Every option that changes the result of `cuattn.attention_varlen` has to be as it was there.

    Parameters
    ----------
    dout : array [tokens_q, heads, head_dim_v], dtype of ``q``
    q : array [tokens_q, heads, head_dim]; float16, bfloat16, float32 or float64
    k : array [tokens_k, kv_heads, head_dim], dtype of ``q``
    v : array [tokens_k, kv_heads, head_dim_v], dtype of ``q``
    out : array [tokens_q, heads, head_dim_v], dtype of ``q``
    lse : array [heads, tokens_q], float32 (float64 for float64)
        As forward returned it; exact to 2^-24 of its size, which is felt as `cuattn.attention_backward` says.
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        As for `cuattn.attention_varlen`, and the same as there.
    **options
        As for `cuattn.attention`.
    dlse : array [heads, tokens_q], float32 (float64 for float64), optional
    deterministic, return_dbias, dq, dk, dv, workspace
        As for `cuattn.attention_backward`.

    Options with a batch axis have one entry a sequence, and positions are those within the sequence, as for
    `cuattn.attention_varlen`.

    Returns
    -------
    AttentionGrads(dq, dk, dv, dbias, dsinks)
        As `cuattn.attention_backward`; dbias is summed over all sequences where the bias has no batch axis.

    Raises
    ------
    ArrayTypeError, DTypeError, ShapeError, NonFiniteError, ArgumentError, OverlapError
        As for `cuattn.attention_backward` and `cuattn.attention_varlen`.

    References
    ----------
    Dao et al., "FlashAttention", 2022; Dao, "FlashAttention-2", 2023.

    Examples
    --------
    Sequences of one, none and two tokens:

    >>> import numpy as np
    >>> import cuattn
    >>> q = np.zeros((3, 1, 32), np.float32)
    >>> v = np.array([5, 1, 3], np.float32).reshape(3, 1, 1)
    >>> lengths = [0, 1, 1, 3], [0, 1, 1, 3]
    >>> out, lse = cuattn.attention_varlen(q, q, v, *lengths, causal=True, return_lse=True)
    >>> grads = cuattn.attention_varlen_backward(np.ones_like(out), q, q, v, out, lse, *lengths, causal=True)
    >>> grads.dv[:, 0, 0]
    array([1. , 1.5, 0.5], dtype=float32)
    """
    arguments.PACKED.refuse_unknown(options)
    problem = arguments.check_packed(
        dout,
        q,
        k,
        v,
        out,
        lse,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        dlse=dlse,
        deterministic=deterministic,
        return_dbias=return_dbias,
        dq=dq,
        dk=dk,
        dv=dv,
        workspace=workspace,
        may_be_unrounded=True,
        **options,
    )
    warn_if_slow(problem.forward, problem.packed, work=BACKWARD_FLOPS)
    return backward(problem)
