"""Gradients of attention, without storing the logits.

Probabilities are computed again from q, k and the log-sum-exp that forward returned.

* Tri Dao, Daniel Y. Fu, Stefano Ermon, Atri Rudra and Christopher Ré, "FlashAttention: fast and memory-efficient exact
  attention with IO-awareness", 2022 (arXiv:2205.14135).
* Tri Dao, "FlashAttention-2: faster attention with better parallelism and work partitioning", 2023 (arXiv:2307.08691).
"""

from __future__ import annotations

from typing import Any, Unpack

from cuattn.ops.attention.backward import arguments
from cuattn.ops.attention.backward import workspace as workspace_parts
from cuattn.ops.attention.backward.launch import backward
from cuattn.ops.attention.backward.problem import AttentionGrads
from cuattn.ops.attention.operation import Operation
from cuattn.ops.attention.options import GradientOptions
from cuattn.ops.attention.signatures import takes_options
from cuattn.ops.attention.slow_calls import BACKWARD_FLOPS, warn_if_slow
from cuattn.typing import ArrayT

__all__ = ["AttentionGrads", "attention_backward", "attention_backward_workspace_size"]


@takes_options(arguments.DENSE, before="dlse")
def attention_backward(
    dout: ArrayT,
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    out: ArrayT,
    lse: Any,
    *,
    dlse: Any = None,
    deterministic: bool = True,
    return_dbias: bool = False,
    dq: ArrayT | None = None,
    dk: ArrayT | None = None,
    dv: ArrayT | None = None,
    workspace: Any = None,
    **options: Unpack[GradientOptions],
) -> AttentionGrads[ArrayT]:
    """Gradients of ``(out * dout).sum() + (lse * dlse).sum()``, where ``out, lse = attention(q, k, v, ...)``.

    Every option that changes the result of `cuattn.attention` has to be as it was there, and dropout drops what it
    dropped there; ``out`` and ``lse`` are what it returned. With P = exp(logit - lse), Z the dropout factors (0 or
    1 / (1 - dropout_p); 1 without dropout) and Δ = rowsum(dout * out) - dlse: dv = (P * Z)^T dout,
    dS = P * (Z * (dout v^T) - Δ), dq = scale * dS k and dk = scale * dS^T q. No array of seqlen_q x seqlen_k elements
    is made, and no element is summed in an order that changes from run to run, unless ``deterministic`` is False.

    Parameters
    ----------
    dout : array [batch, seqlen_q, heads, head_dim_v], dtype of ``q``
        Gradient of ``out``. It has to be finite, also for queries that see no key.
    q : array [batch, seqlen_q, heads, head_dim]; float16, bfloat16, float32 or float64
    k : array [batch, seqlen_k, kv_heads, head_dim], dtype of ``q``
    v : array [batch, seqlen_k, kv_heads, head_dim_v], dtype of ``q``
        As for `cuattn.attention`, but for 8-bit floats, which have no gradients, and with head dims from 1 to 256. Any
        strides, of ``dout`` and ``out`` as well; an array whose last axis is not contiguous is copied.
    out : array [batch, seqlen_q, heads, head_dim_v], dtype of ``q``
    lse : array [batch, heads, seqlen_q], float32 (float64 for float64)
        Exact to 2^-24 of its size: where that is felt, from about 10^7 on, P is within a factor of e^(2^-22 |lse|), and
        at most 1.
        As forward returned them. An lse that is not contiguous is copied.
    **options
        As for `cuattn.attention`.
    dlse : array [batch, heads, seqlen_q], float32 (float64 for float64), optional
        Gradient of ``lse``; 0 by default.
    deterministic : bool
        True: the same inputs give the same bits. False: dq of 16-bit inputs is summed in float32 in no order, by atomic
        additions, which takes five products of the size of q k^T instead of seven, and a float32 number of workspace
        for each element of dq. dk, dv, and other dtypes are as with True.
    return_dbias : bool
        Compute the gradient of ``bias`` too.
    dq, dk, dv : array, shape and dtype of ``q``, ``k`` and ``v``, or float32 for 16-bit inputs; optional
        Where to write the gradients. float32 takes each as it was summed, before it is rounded to 16 bits: a part that
        is to be added to others. They must not lie in the memory range of an input, nor share an element with each
        other: interleaved views of one array are good. One whose last axis is not contiguous is copied to.
    workspace : uint8 array of one axis, optional
        Memory to use instead of an allocation, at least `cuattn.attention_backward_workspace_size` bytes, contiguous,
        at a multiple of 16 bytes. What it holds afterwards means nothing.

    Returns
    -------
    AttentionGrads(dq, dk, dv, dbias, dsinks)
        dq, dk and dv have the shape and dtype of ``q``, ``k`` and ``v``, or are the arrays given; dk and dv are summed
        over the query heads that read a key/value head. dbias: shape and dtype of ``bias``, summed over the axes that
        it was broadcast over, or None. dsinks: array [heads], float32 (float64 for float64), or None without ``sinks``.
        Queries that see no key give and get zeros. Sums are in float32 (float64 for float64).

    Raises
    ------
    ArrayTypeError
        An argument is no array, the arrays are not of one kind or not on one device, or one to write to is read-only.
    DTypeError
        A dtype that is not in the list, or dtypes that do not fit each other.
    ShapeError
        A shape that does not fit those of ``q``, ``k`` and ``v``; a head dim outside of 1 to 256; a workspace that is
        too small.
    NonFiniteError, ArgumentError
        As for `cuattn.attention`; ArgumentError also for ``return_dbias`` without a bias, and for a workspace that is
        not contiguous or not aligned.
    OverlapError
        An array to write to lies in the memory range of an input, or shares an element with another one.

    Warns
    -----
    SlowHostCallWarning
        Once, when a call with NumPy arrays takes more than 10^11 floating-point operations: 2.5 times those of forward.

    References
    ----------
    Dao et al., "FlashAttention", 2022; Dao, "FlashAttention-2", 2023.

    Examples
    --------
    Two queries, causal: the first sees only the first key, the second sees both alike.

    >>> import numpy as np
    >>> import cuattn
    >>> q = np.zeros((1, 2, 1, 32), np.float32)
    >>> v = np.array([1, 3], np.float32).reshape(1, 2, 1, 1)
    >>> out, lse = cuattn.attention(q, q, v, causal=True, return_lse=True)
    >>> grads = cuattn.attention_backward(np.ones_like(out), q, q, v, out, lse, causal=True)
    >>> grads.dv[0, :, 0, 0]
    array([1.5, 0.5], dtype=float32)
    >>> bias = np.zeros((2, 2), np.float32)
    >>> cuattn.attention_backward(out, q, q, v, out, lse, causal=True, bias=bias, return_dbias=True).dbias
    array([[ 0.,  0.],
           [-1.,  1.]], dtype=float32)
    """
    arguments.DENSE.refuse_unknown(options)
    problem = arguments.check(
        dout,
        q,
        k,
        v,
        out,
        lse,
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
    warn_if_slow(problem.forward, work=BACKWARD_FLOPS)
    return backward(problem)


_SIZE = Operation("attention_backward_workspace_size", "gradients")


@takes_options(_SIZE, before="deterministic")
def attention_backward_workspace_size(
    q: Any,
    k: Any,
    v: Any,
    *,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    deterministic: bool = True,
    return_dbias: bool = False,
    **options: Unpack[GradientOptions],
) -> int:
    """Return the bytes that ``workspace`` of `cuattn.attention_backward` or `cuattn.attention_varlen_backward` needs.

    The arguments are those of the call, and every option has its name and its default, so that one dictionary of
    options serves both. Only shapes, dtypes and the kind of array matter, not values and strides: for a problem that
    is not there yet, ``numpy.broadcast_to(numpy.float16(0), shape)``, or CuPy's, stands for an array. The size grows
    with seqlen_q and seqlen_k, never with their product, unless there is a bias or a mask that does so itself.

    Parameters
    ----------
    q : array [batch, seqlen_q, heads, head_dim], or [tokens_q, heads, head_dim] with ``cu_seqlens_q``
    k : array [batch, seqlen_k, kv_heads, head_dim], or [tokens_k, kv_heads, head_dim]
    v : array [batch, seqlen_k, kv_heads, head_dim_v], or [tokens_k, kv_heads, head_dim_v]
    cu_seqlens_q, cu_seqlens_k : int32 [batch + 1], optional
        Both, for `cuattn.attention_varlen_backward`, where the host knows the lengths or does not, as in the call.
    max_seqlen_q, max_seqlen_k, deterministic, return_dbias
        As for these functions.
    **options
        As for `cuattn.attention`.

    Returns
    -------
    int

    Raises
    ------
    CuattnError
        What those functions refuse.

    Examples
    --------
    >>> import numpy as np
    >>> import cuattn
    >>> q = np.broadcast_to(np.float16(0), (1, 4096, 8, 64))
    >>> size = cuattn.attention_backward_workspace_size(q, q, q, causal=True)
    >>> 0 < size < 4096 * 4096
    True
    """
    _SIZE.refuse_unknown(options)
    problem = arguments.check_sizes(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        deterministic=deterministic,
        return_dbias=return_dbias,
        operation=_SIZE,
        **options,
    )
    return workspace_parts.nbytes(problem)
