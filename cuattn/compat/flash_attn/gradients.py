"""What the backward functions share: their options, and gradients that lie in one array as their inputs do."""

from __future__ import annotations

from typing import Any

from cuattn.compat.libraries import OPTIONS_2
from cuattn.ops.attention.backward.launch import backward
from cuattn.ops.attention.backward.problem import BackwardProblem
from cuattn.ops.attention.slow_calls import BACKWARD_FLOPS, warn_if_slow
from cuattn.runtime.arrays import zeros

__all__ = ["backward_options", "packed_gradients"]


def backward_options(
    dropout_p: Any,
    softmax_scale: Any,
    causal: Any,
    window_size: Any,
    softcap: Any,
    alibi_slopes: Any,
    deterministic: Any,
    dropout_seed: Any,
    dropout_offset: Any,
) -> dict[str, Any]:
    """The options of `cuattn.attention_backward` for flash-attn's names and values of them."""
    options = OPTIONS_2.options(
        softmax_scale=softmax_scale,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        causal=causal,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        dropout_offset=dropout_offset,
    )
    return options | {"deterministic": deterministic}


def packed_gradients(problem: BackwardProblem, names: tuple[str, ...], axis: int, given: Any) -> tuple[Any, Any]:
    """The gradient of q, and one array with those of ``names`` along ``axis``, each written where it belongs.

    ``given`` is the caller's array of the latter, whose views are in the problem already, or None for a new one.
    """
    warn_if_slow(problem.forward, problem.packed, work=BACKWARD_FLOPS)
    executor, forward = problem.executor, problem.forward
    if given is not None:
        return backward(problem).dq, executor.asarray(f"d{''.join(name[1:] for name in names)}", given)
    shape = list(forward.v.shape)
    shape.insert(axis, len(names))
    if forward.extents.num_heads:
        together = executor.empty(shape, forward.dtype)
    else:  # nobody reads the keys, and no kernel runs
        together = zeros(executor, tuple(shape), forward.dtype)
    for index, name in enumerate(names):
        setattr(problem, name, together[(slice(None),) * axis + (index,)])
    dq = backward(problem).dq
    executor.finish(together)
    return dq, together
