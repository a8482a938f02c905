"""Gradients of differential attention.

* Tianzhu Ye, Li Dong, Yuqing Xia, Yutao Sun, Yi Zhu, Gao Huang and Furu Wei, "Differential transformer", 2024
  (arXiv:2410.05258).
* Tri Dao, "FlashAttention-2: faster attention with better parallelism and work partitioning", 2023 (arXiv:2307.08691).
"""

from __future__ import annotations

from typing import Any, Unpack

from cuattn.ops.attention.options import DifferentialOptions
from cuattn.ops.attention.signatures import takes_options
from cuattn.ops.attention.slow_calls import BACKWARD_FLOPS, warn_if_slow
from cuattn.ops.differential import backward_arguments
from cuattn.ops.differential.backward_launch import DifferentialGrads, backward
from cuattn.ops.differential.launch import DifferentialState
from cuattn.typing import ArrayT

__all__ = ["DifferentialGrads", "differential_attention_backward"]


@takes_options(backward_arguments.BACKWARD_CALL, before="norm")
def differential_attention_backward(
    dout: ArrayT,
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    lambda_: Any,
    state: DifferentialState[ArrayT],
    *,
    norm: bool = False,
    norm_weight: Any = None,
    eps: float = 1e-5,
    output_scale: float = 1.0,
    **options: Unpack[DifferentialOptions],
) -> DifferentialGrads[ArrayT]:
    """Gradients of `cuattn.differential_attention`, bit for bit the same every time.

    Every argument that changes the result of forward has to be as it was there.

    Parameters
    ----------
    dout : array [batch, seqlen_q, heads, head_dim_v], dtype of ``q``
        The gradient of the result.
    q : array [batch, seqlen_q, 2 * heads, head_dim]; float16, bfloat16, float32 or float64
    k : array [batch, seqlen_k, 2 * kv_heads, head_dim] or [batch, seqlen_k, kv_heads, head_dim], dtype of ``q``
    v : array [batch, seqlen_k, kv_heads, head_dim_v], dtype of ``q``
    lambda_ : float, or float array [], [heads] or [batch, seqlen_q, heads]
    state : DifferentialState(lse, out1, out2)
        As forward returned it with ``return_state``.
    alibi_slopes, bias, mask, dropout_p
        As for `cuattn.differential_attention`.
    **options
        As for `cuattn.attention`.
    norm, norm_weight, eps, output_scale
        As for `cuattn.differential_attention`.

    Returns
    -------
    DifferentialGrads(dq, dk, dv, dlam, dnorm_weight)
        dq, dk and dv of the shapes and the dtype of q, k and v; dlam of the shape of ``lambda_``, and dnorm_weight
        [head_dim_v] (None without a weight), in float32 (float64 for float64). The gradients of the two softmaxes'
        results are rounded to the dtype of ``q`` on their way to the products, and so are the parts of dv of either.

    Raises
    ------
    ArgumentError
        ``state`` is no triple, or an option as for `cuattn.differential_attention`.
    ArrayTypeError, DTypeError, ShapeError, NonFiniteError
        As for `cuattn.differential_attention`, also for ``dout`` and the arrays of ``state``.

    Warns
    -----
    SlowHostCallWarning
        Once, when a call with NumPy arrays takes more than 10^11 floating-point operations.

    References
    ----------
    Ye et al., "Differential transformer", 2024; Dao, "FlashAttention-2", 2023.

    Examples
    --------
    >>> import numpy as np
    >>> import cuattn
    >>> q, k = np.zeros((1, 2, 2, 32), np.float32), np.zeros((1, 2, 1, 32), np.float32)
    >>> v = np.array([1, 3], np.float32).reshape(1, 2, 1, 1)
    >>> out, state = cuattn.differential_attention(q, k, v, 0.25, causal=True, return_state=True)
    >>> grads = cuattn.differential_attention_backward(np.ones_like(out), q, k, v, 0.25, state, causal=True)
    >>> grads.dv[0, :, 0, 0], float(grads.dlam)
    (array([1.125, 0.375], dtype=float32), -3.0)
    """
    backward_arguments.BACKWARD_CALL.refuse_unknown(options)
    of_norm = {"norm": norm, "norm_weight": norm_weight, "eps": eps, "output_scale": output_scale}
    problem, saved = backward_arguments.check(dout, q, k, v, lambda_, state, **of_norm, **options)
    warn_if_slow(problem, work=2 * BACKWARD_FLOPS)
    return backward(problem, saved)
