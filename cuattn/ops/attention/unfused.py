"""Attention as the formula says: matmul, softmax, matmul, with the logits in memory. A baseline to compare with."""

from __future__ import annotations

from typing import Any, Literal, Unpack, overload

import numpy as np

from cuattn.dtypes import ELEMENTS, WARP_SIZE
from cuattn.ops.attention import arguments
from cuattn.ops.attention.arguments import Problem
from cuattn.ops.attention.forward.config import PlainFwdConfig
from cuattn.ops.attention.operation import Operation
from cuattn.ops.attention.options import AttentionKeywords, AttentionOptions
from cuattn.ops.attention.params import forward_layout, pack_params
from cuattn.ops.attention.signatures import takes_options
from cuattn.ops.operand import operand
from cuattn.runtime.executor import Kernel
from cuattn.runtime.small_arrays import check_flag
from cuattn.typing import ArrayT, FP8Format

__all__ = ["standard_attention"]

_SOURCE, _ENTRY = "attention_standard", "cuattn_attention"
_TILE = 16  # of the two matrix products: one thread a number
_NUM_WARPS = 4  # of the softmax: one row a warp
_PROBABILITY_OF_8_BITS = np.dtype(np.float16)  # as in the fused kernels


_OPERATION = Operation("standard_attention", "attention")


@overload
def standard_attention(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    *,
    return_lse: Literal[False] = ...,
    return_probabilities: Literal[False] = ...,
    **keywords: Unpack[AttentionKeywords],
) -> ArrayT: ...
@overload
def standard_attention(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    *,
    return_lse: bool = ...,
    return_probabilities: bool = ...,
    **keywords: Unpack[AttentionKeywords],
) -> ArrayT | tuple[ArrayT, ...]: ...
@takes_options(_OPERATION, before="fp8_format")
def standard_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    fp8_format: FP8Format | None = None,
    out: Any = None,
    return_lse: bool = False,
    return_probabilities: bool = False,
    **options: Unpack[AttentionOptions],
) -> Any:
    """The unfused baseline of `cuattn.attention`: it stores the logits and the probabilities, seqlen_q x seqlen_k each.

    Masks and windows save no work here, and with ``precision="tf32"`` the products are IEEE ones all the same.

    Parameters
    ----------
    q, k, v, fp8_format, out, return_lse
        As for `cuattn.attention`, with the same dtypes, shapes and errors.
    **options
        As for `cuattn.attention`.
    return_probabilities : bool
        Return also the matrix of probabilities: the softmax over the keys, before dropout. (`cuattn.dropout_mask` says
        which of them dropout keeps.) With a sink, a row sums to less than 1.

    Returns
    -------
    out : array [batch, seqlen_q, heads, head_dim_v], dtype of ``q``; bfloat16 for 8-bit floats; or the ``out`` given
    lse : array [batch, heads, seqlen_q], float32 (float64 for float64); only with ``return_lse``
    probabilities : array [batch, heads, seqlen_q, seqlen_k], dtype of ``q``; only with ``return_probabilities``
        float16 for 8-bit floats.

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
    _OPERATION.refuse_unknown(options)
    check_flag("return_lse", return_lse)
    check_flag("return_probabilities", return_probabilities)
    problem = arguments.check(
        q,
        k,
        v,
        fp8_format=fp8_format,
        out=out,
        operation=_OPERATION,
        may_be_unrounded=True,
        **options,
    )
    executor, extents, resolved = problem.executor, problem.extents, problem.options
    batch, num_heads, seqlen_q, seqlen_k = extents.batch, extents.num_heads, extents.seqlen_q, extents.seqlen_k
    shape = batch, num_heads, seqlen_q, seqlen_k
    scores = executor.empty(shape, problem.accumulator)
    probability = _PROBABILITY_OF_8_BITS if problem.dtype.itemsize == 1 else problem.dtype
    weights = executor.empty(shape, probability)  # what the values are multiplied with
    lse = executor.empty(extents.lse_shape, problem.accumulator)
    # Two matrices, if they differ and both are wanted: by what dropout takes, or by the factor of float16.
    both = return_probabilities and (resolved.dropout is not None or probability == np.float16)
    probabilities = executor.empty(shape, probability) if both else None
    output = problem.output()
    queries, keys, values = (operand(executor, x) for x in (problem.q, problem.k, problem.v))
    params = pack_params(forward_layout(problem.accumulator), problem, queries, keys, values, output)
    row_tiles = batch * num_heads * -(-seqlen_q // _TILE)
    if scores.size:
        args = {
            **resolved.pointers(_SOURCE, f"{_ENTRY}_scores"),
            "g_q": queries.array,
            "g_k": keys.array,
            "g_scores": scores,
            "params": params,
        }
        grid = (row_tiles * -(-seqlen_k // _TILE),)
        executor.launch(_kernel(problem, probability, "scores"), grid, (_TILE, _TILE), args)
    if lse.size:
        args = {
            **resolved.pointers(_SOURCE, f"{_ENTRY}_probabilities"),
            "g_scores": scores,
            "g_probabilities": probabilities,
            "g_weights": weights,
            "g_lse": lse,
            "num_rows": np.int64(lse.size),
            "params": params,
        }
        grid = (-(-lse.size // _NUM_WARPS),)
        executor.launch(_kernel(problem, probability, "probabilities"), grid, (_NUM_WARPS * WARP_SIZE,), args)
        args = {
            **resolved.pointers(_SOURCE, f"{_ENTRY}_output"),
            "g_weights": weights,
            "g_v": values.array,
            "g_out": output.array,
            "params": params,
        }
        grid = (row_tiles * -(-extents.head_dim_v // _TILE),)
        executor.launch(_kernel(problem, probability, "output"), grid, (_TILE, _TILE), args)

    executor.finish(scores, weights, lse, *((probabilities,) if both else ()))
    out = problem.deliver(output)
    matrix = probabilities if both else weights
    results = (out, *((lse,) if return_lse else ()), *((matrix,) if return_probabilities else ()))
    return results if len(results) > 1 else out


def _kernel(problem: Problem, probability: np.dtype[Any], name: str) -> Kernel:
    """Load one of the three kernels. They have every option, as the plain kernel has."""
    element = ELEMENTS[probability.name][0]
    unrounded = problem.unrounded and name == "output"
    options = problem.options.kernel_options
    constants = PlainFwdConfig(_NUM_WARPS).constants(problem.dtype.name, 0, 0, options, unrounded=unrounded)
    constants |= {"Probability": element, "Element": element, "TILE": _TILE}
    return problem.executor.kernel(_SOURCE, constants, f"{_ENTRY}_{name}")
