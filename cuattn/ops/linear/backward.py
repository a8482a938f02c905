"""Gradients of linear attention, chunk by chunk, from the inputs alone.

* Songlin Yang et al., "Gated linear attention transformers with hardware-efficient training", 2023 (arXiv:2312.06635).
* Tri Dao and Albert Gu, "Transformers are SSMs", 2024 (arXiv:2405.21060).
"""

from __future__ import annotations

from typing import Any

from cuattn.errors import DTypeError, ShapeError
from cuattn.ops.linear import arguments, backward_launch
from cuattn.ops.linear.backward_launch import BackwardProblem, LinearGrads
from cuattn.ops.linear.options import FeatureMap
from cuattn.ops.linear.state import as_state, check_state, named_arrays
from cuattn.typing import ArrayT

__all__ = ["LinearGrads", "linear_attention_backward"]


def linear_attention_backward(
    dout: ArrayT,
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    *,
    causal: bool = True,
    feature_map: FeatureMap | None = "elu1",
    normalize: bool = True,
    eps: float = 0.0,
    scale: float | None = None,
    decay: Any = None,
    initial_state: Any = None,
    chunk: int | None = None,
    dstate: Any = None,
) -> LinearGrads[ArrayT]:
    """Gradients of ``(out * dout).sum() + (state.s * dstate.s).sum() + (state.z * dstate.z).sum()``.

    ``out, state = linear_attention(q, k, v, ..., return_state=True)`` with the same options; neither is needed here,
    all is computed again. The gradients go through the feature map and the normalisation. No array of N x M elements
    is made: one state is kept for each chunk of 64 tokens (32 for float64), and every sum has a fixed order, so that
    the same inputs give the same bits.

    Parameters
    ----------
    dout : array [B, N, O, E], dtype of ``q``
        Gradient of the output.
    q : array [B, N, H, D]; float16, bfloat16, float32 or float64
    k : array [B, M, Gk, D], dtype of ``q``
    v : array [B, M, Gv, E], dtype of ``q``
        As for `cuattn.linear_attention`, and so are all options. The gradient of a head that several states, or
        outputs, read is the sum over them.
    causal, feature_map, normalize, eps, scale, decay, initial_state
        What the forward was given.
    chunk : {16, 32, 64, 128}, optional
        Accepted for the sake of the forward; the gradients have chunks of their own.
    dstate : LinearState, optional
        Gradient of the state after the last token. Its z may be None for zeros. Default: zeros.

    Returns
    -------
    grads : LinearGrads
        ``dq``, ``dk`` and ``dv`` like ``q``, ``k`` and ``v``; ``ddecay`` of the shape of the decay (None without one)
        and ``dinitial_state`` (None without an initial state) in float32, float64 for float64; ``dbeta`` is None. A
        decay of -inf gets exactly 0: nothing of the past is left behind it. Where a denominator is 0, the output is
        0 and has no gradient. The derivative of "relu" at 0 is 0.

    Raises
    ------
    ArrayTypeError
        An argument is no array, or they are not all of one kind.
    DTypeError
        A dtype that is not allowed, or another than that of ``q``.
    ShapeError
        ``dout`` has not the shape of the output, or as for `cuattn.linear_attention`.
    ArgumentError, NonFiniteError
        As for `cuattn.linear_attention`.

    References
    ----------
    Yang et al., "Gated linear attention transformers with hardware-efficient training", 2023 (arXiv:2312.06635).

    Examples
    --------
    Of the sum of all outputs; with weights that sum to 1, each value gets the share that the outputs had of it:

    >>> import numpy as np
    >>> import cuattn
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 40, 2, 16)).astype(np.float32)
    >>> grads = cuattn.linear_attention_backward(np.ones_like(v), q, k, v, decay=[-0.1, -0.2])
    >>> grads.ddecay.shape, bool(np.allclose(grads.dv.sum(axis=1), 40, rtol=1e-5))
    ((2,), True)
    """
    state = None if dstate is None else as_state("dstate", dstate)
    problem = arguments.check(
        q,
        k,
        v,
        causal=causal,
        feature_map=feature_map,
        normalize=normalize,
        eps=eps,
        scale=scale,
        decay=decay,
        initial_state=initial_state,
        chunk=chunk,
        extra={"dout": dout} | named_arrays("dstate", state),
    )
    executor, extents = problem.executor, problem.extents
    gradient = executor.asarray("dout", dout)
    if tuple(gradient.shape) != extents.out_shape:
        raise ShapeError(f"dout has shape {tuple(gradient.shape)}; that of the output, {extents.out_shape}, is needed")
    if gradient.dtype != problem.dtype:
        raise DTypeError(f"dout has dtype {gradient.dtype} and q has dtype {problem.dtype}; they must be equal")
    if state is not None:
        state = check_state(
            executor,
            "dstate",
            state,
            extents.state_shape,
            problem.accumulator,
            normalize=problem.options.normalize and state.z is not None,
        )
    return backward_launch.backward(BackwardProblem(problem, gradient, state))
