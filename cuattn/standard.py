"""Attention as the formula says: matmul, softmax, matmul, with the logits in memory. A baseline to compare with."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuattn import attention_arguments as arguments
from cuattn.config import ELEMENTS, WARP_SIZE

__all__ = ["standard_attention"]

_TILE = 16  # of the two matrix products: one thread a number
_NUM_WARPS = 4  # of the softmax: one row a warp
_SOURCE = "attention_standard"


def standard_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    scale: float | None = None,
    causal: bool | str = False,
    out: Any = None,
    return_lse: bool = False,
    return_probabilities: bool = False,
) -> Any:
    """The unfused baseline of `cuattn.attention`: it stores the logits and the probabilities, seqlen_q x seqlen_k each.

    Parameters
    ----------
    q, k, v, scale, causal, out, return_lse
        As for `cuattn.attention`, with the same dtypes, shapes and errors.
    return_probabilities : bool
        Return also the matrix of probabilities.

    Returns
    -------
    out : array [batch, seqlen_q, heads, head_dim_v], dtype of ``q``
    lse : array [batch, heads, seqlen_q], float32 (float64 for float64); only with ``return_lse``
    probabilities : array [batch, heads, seqlen_q, seqlen_k], dtype of ``q``; only with ``return_probabilities``

    Raises
    ------
    ArrayTypeError, DTypeError, ShapeError, NonFiniteError, ArgumentError, OverlapError
        As for `cuattn.attention`.

    References
    ----------
    Vaswani et al., "Attention is all you need", 2017.

    Examples
    --------
    >>> import numpy as np
    >>> import cuattn
    >>> q = np.zeros((1, 2, 1, 32), np.float32)
    >>> out, probabilities = cuattn.standard_attention(q, q, q, causal=True, return_probabilities=True)
    >>> probabilities[0, 0].tolist()
    [[1.0, 0.0], [0.5, 0.5]]
    """
    problem = arguments.check(q, k, v, scale, causal, out)
    executor, extents, accumulator = problem.executor, problem.extents, problem.accumulator
    dtype = problem.q.dtype
    element, accumulator_name = ELEMENTS[dtype.name]
    constants: dict[str, int | bool | float | str] = {
        "Element": element,
        "Accumulator": accumulator_name,
        "CAUSAL": problem.causal,
        "TILE": _TILE,
        "NUM_WARPS": _NUM_WARPS,
    }
    shape = (*extents.lse_shape, extents.seqlen_k)
    scores, probabilities = executor.empty(shape, accumulator), executor.empty(shape, dtype)
    lse = executor.empty(extents.lse_shape, accumulator)
    output = problem.output()
    q, k, v = (arguments.operand(executor, x) for x in (problem.q, problem.k, problem.v))

    heads = np.int32(extents.num_heads), np.int32(extents.heads_per_kv_head)
    seqlens = np.int32(extents.seqlen_q), np.int32(extents.seqlen_k)
    head_dim, head_dim_v = np.int32(extents.head_dim), np.int32(extents.head_dim_v)
    row_tiles = extents.batch * extents.num_heads * -(-extents.seqlen_q // _TILE)
    args: tuple[Any, ...]
    if scores.size:
        kernel = executor.kernel(_SOURCE, constants, "cuattn_attention_scores")
        args = (q.array, k.array, scores, *q.strides, *k.strides, *heads, *seqlens, head_dim)
        args = (*args, np.int32(problem.diagonal_offset), accumulator(problem.scale))
        executor.launch(kernel, (row_tiles * -(-extents.seqlen_k // _TILE),), (_TILE, _TILE), args)
    if lse.size:
        kernel = executor.kernel(_SOURCE, constants, "cuattn_attention_probabilities")
        args = (scores, probabilities, lse, np.int64(lse.size), np.int32(extents.seqlen_k))
        executor.launch(kernel, (-(-lse.size // _NUM_WARPS),), (_NUM_WARPS * WARP_SIZE,), args)
        kernel = executor.kernel(_SOURCE, constants, "cuattn_attention_output")
        args = (probabilities, v.array, output.array, *v.strides, *output.strides, *heads, *seqlens, head_dim_v)
        executor.launch(kernel, (row_tiles * -(-extents.head_dim_v // _TILE),), (_TILE, _TILE), args)

    executor.finish(scores, probabilities, lse)
    out = problem.deliver(output)
    results = (out, *((lse,) if return_lse else ()), *((probabilities,) if return_probabilities else ()))
    return results if len(results) > 1 else out
