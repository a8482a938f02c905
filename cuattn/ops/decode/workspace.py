"""The memory that a decode call needs beside its results: what the splits of sequences leave for the merge.

A partial result is what one split saw of one query token: for each head its output, not yet merged, and the maximum
and the sum of its softmax, all of the accumulator's type. A call that splits no sequence needs none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cuattn.errors import ShapeError

if TYPE_CHECKING:
    from cuattn.ops.decode.problem import DecodeProblem

__all__ = ["nbytes", "partials"]


def nbytes(num_partials: int, num_heads: int, head_dim_v: int, itemsize: int) -> int:
    """Return the bytes of so many partial results; ``itemsize`` is that of the accumulator.

    >>> nbytes(num_partials=16, num_heads=8, head_dim_v=128, itemsize=4)
    66560
    """
    return num_partials * num_heads * (head_dim_v + 2) * itemsize


def partials(problem: DecodeProblem, num_partials: int) -> tuple[Any, Any]:
    """Return outputs [num_partials, heads, head_dim_v], states [num_partials, heads, 2]: the caller's memory, or new.

    A state is the maximum and the sum of a softmax. (None, None) for no partial results. Raises `ShapeError` where the
    caller's memory is too small.
    """
    if num_partials == 0:
        return None, None
    extents = problem.extents
    out_shape = num_partials, extents.num_heads, extents.head_dim_v
    state_shape = num_partials, extents.num_heads, 2
    dtype = np.dtype(problem.accumulator)
    if problem.workspace is None:
        return problem.executor.empty(out_shape, dtype), problem.executor.empty(state_shape, dtype)
    needed = nbytes(num_partials, extents.num_heads, extents.head_dim_v, dtype.itemsize)
    if problem.workspace.size < needed:
        raise ShapeError(
            f"workspace has {problem.workspace.size} bytes; {needed} are needed for {num_partials} partial results "
            "(DecodePlan.workspace_size)"
        )
    # The outputs come first: their rows are read 16 bytes at a time, which is what the workspace is aligned to.
    end = needed - num_partials * extents.num_heads * 2 * dtype.itemsize
    out, state = problem.workspace[:end], problem.workspace[end:needed]
    return out.view(dtype).reshape(out_shape), state.view(dtype).reshape(state_shape)
