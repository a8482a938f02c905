"""Differential attention: the difference of two softmaxes over the same values.

* Tianzhu Ye, Li Dong, Yuqing Xia, Yutao Sun, Yi Zhu, Gao Huang and Furu Wei, "Differential transformer", 2024
  (arXiv:2410.05258).
"""

from __future__ import annotations

from typing import Any, Literal, Unpack, overload

from cuattn.ops.attention.options import DifferentialOptions
from cuattn.ops.attention.signatures import takes_options
from cuattn.ops.attention.slow_calls import warn_if_slow
from cuattn.ops.differential import arguments
from cuattn.ops.differential.launch import DifferentialState, forward
from cuattn.runtime.small_arrays import check_flag
from cuattn.typing import ArrayT

__all__ = ["DifferentialState", "differential_attention"]


class DifferentialKeywords(DifferentialOptions, total=False):
    """All keywords of `cuattn.differential_attention` but the one that its result depends on."""

    norm: bool
    norm_weight: Any
    eps: float
    output_scale: float
    out: Any


@overload
def differential_attention(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    lambda_: Any,
    *,
    return_state: Literal[False] = ...,
    **keywords: Unpack[DifferentialKeywords],
) -> ArrayT: ...
@overload
def differential_attention(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    lambda_: Any,
    *,
    return_state: Literal[True],
    **keywords: Unpack[DifferentialKeywords],
) -> tuple[ArrayT, DifferentialState[ArrayT]]: ...
@overload
def differential_attention(
    q: ArrayT, k: ArrayT, v: ArrayT, lambda_: Any, *, return_state: bool, **keywords: Unpack[DifferentialKeywords]
) -> ArrayT | tuple[ArrayT, DifferentialState[ArrayT]]: ...
@takes_options(arguments.CALL, before="norm")
def differential_attention(
    q: Any,
    k: Any,
    v: Any,
    lambda_: Any,
    *,
    norm: bool = False,
    norm_weight: Any = None,
    eps: float = 1e-5,
    output_scale: float = 1.0,
    out: Any = None,
    return_state: bool = False,
    **options: Unpack[DifferentialOptions],
) -> Any:
    """``softmax(scale * q1 k1^T) v - lambda * softmax(scale * q2 k2^T) v`` for every pair of heads, in one kernel.

    Query heads 2h and 2h + 1 are q1 and q2 of output head h, which reads value head g = h // (heads // kv_heads). They
    read key heads 2g and 2g + 1 or, if there are as many key heads as value heads, both of them key head g.

    Parameters
    ----------
    q : array [batch, seqlen_q, 2 * heads, head_dim]; float16, bfloat16, float32 or float64
        NumPy arrays run on the host executor, CuPy arrays on the GPU. Any strides; an array whose last axis is not
        contiguous is copied; bases and strides that are multiples of 16 bytes are the fastest.
    k : array [batch, seqlen_k, 2 * kv_heads, head_dim] or [batch, seqlen_k, kv_heads, head_dim], dtype of ``q``
        With as many heads as ``v`` both softmaxes read one key head, and a cache of keys is not twice as large.
    v : array [batch, seqlen_k, kv_heads, head_dim_v], dtype of ``q``
        ``heads`` is a multiple of ``kv_heads``. Head dims are 1 to 256; a layer usually has head_dim_v = 2 head_dim.
    lambda_ : float, or float array [], [heads] or [batch, seqlen_q, heads]
        The factor of the second softmax: one for all, for each head, or for each query of each head. An array of
        another dtype than float32 (float64 for float64) is converted.
    alibi_slopes : float array [2 * heads] or [batch, 2 * heads], optional
        Logits lose ``slope * |i + o - j|``. Slopes [heads] or [batch, heads] are for both softmaxes of a pair.
    bias : array, broadcast to [batch, 2 * heads, seqlen_q, seqlen_k]; float16, bfloat16, float32 or float64; optional
        Added to the logits; -inf hides a key. With ``heads`` heads it is for both softmaxes of a pair.
    mask : bool array, broadcast likewise, optional
        True: attend.
    dropout_p : float, 0 <= dropout_p < 1
        Probability with which a probability is set to 0; the others are divided by 1 - dropout_p. The mask is that of
        `cuattn.dropout_mask` for the heads of ``q``.
    **options
        As for `cuattn.attention`, and the same for both softmaxes.
    norm : bool
        Whether each row of the difference is divided by the root of its mean square plus ``eps``.
    norm_weight : float array [head_dim_v], optional
        What it is multiplied with then.
    eps : float, at least 0
    output_scale : float
        Factor of the result, with or without ``norm``: 1 - `cuattn.lambda_init` of the layer, usually.
    out : array [batch, seqlen_q, heads, head_dim_v], dtype of ``q``, optional
        Where to write the result. It must not overlap an input.
    return_state : bool
        Return also what `cuattn.differential_attention_backward` needs.

    Small arrays (lambda, slopes, weights) may be NumPy arrays or lists beside CuPy arrays.

    Returns
    -------
    out : array [batch, seqlen_q, heads, head_dim_v], dtype of ``q``
        Accumulated in float32 (float64 for float64), the difference included: it is rounded once. A query that sees no
        key gives zeros.
    state : DifferentialState(lse, out1, out2); only with ``return_state``

    Raises
    ------
    ArrayTypeError
        An argument is no array, the arrays are not of one kind or not on one device, or ``out`` is read-only.
    DTypeError
        A dtype that is not in the list, or dtypes that differ.
    ShapeError
        A rank other than 4, extents that do not fit each other, a head dim outside of 1 to 256, an odd number of query
        heads, pairs of them that are no multiple of kv_heads, an option whose shape is not as above.
    NonFiniteError
        A number that is not finite; lambdas a head, slopes or weights that are not, where they are NumPy arrays or
        lists.
    ArgumentError
        Another value of an option than those above; ``norm_weight`` without ``norm``.
    OverlapError
        ``out`` lies in the memory range of an input.

    Warns
    -----
    SlowHostCallWarning
        Once, when a call with NumPy arrays takes more than 10^11 floating-point operations.

    References
    ----------
    Ye et al., "Differential transformer", 2024.

    Examples
    --------
    >>> import numpy as np
    >>> import cuattn
    >>> q, k = np.zeros((1, 2, 2, 32), np.float32), np.zeros((1, 2, 1, 32), np.float32)
    >>> v = np.array([1, 3], np.float32).reshape(1, 2, 1, 1)
    >>> cuattn.differential_attention(q, k, v, 0.25, causal=True)[0, :, 0, 0]
    array([0.75, 1.5 ], dtype=float32)
    """
    arguments.CALL.refuse_unknown(options)
    check_flag("return_state", return_state)
    of_norm = {"norm": norm, "norm_weight": norm_weight, "eps": eps, "output_scale": output_scale}
    problem = arguments.check(q, k, v, lambda_, out=out, **of_norm, **options)
    warn_if_slow(problem, work=2.0)
    return forward(problem, return_state=return_state)
