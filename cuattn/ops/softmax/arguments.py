"""What `softmax`, `log_softmax` and `logsumexp` accept: every check that is made before anything is launched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cuattn.ops.softmax.config import ALGORITHMS
from cuattn.runtime.checks import check_apart_or_same, check_axis, check_dtype, check_extents, check_out
from cuattn.runtime.executor import Executor, executor_for
from cuattn.scalars import check_flag, choice

__all__ = ["SoftmaxProblem", "accumulator", "check"]


@dataclass(frozen=True, slots=True, eq=False)
class SoftmaxProblem:
    """A call whose arguments have passed every check."""

    executor: Executor
    output: str  # a key of `OUTPUTS`
    x: Any
    dtype_name: str  # of x
    axis: int  # not negative
    algorithm: str
    shape: tuple[int, ...]  # of the result
    dtype: np.dtype[Any]  # of the result
    out: Any  # None where it is to be allocated


def check(output: str, x: Any, *, axis: Any, algorithm: Any, out: Any, keepdims: Any = False) -> SoftmaxProblem:
    """Make every check of a call, and find the executor it runs on. Raises as documented at `cuattn.softmax`."""
    executor = executor_for(x=x) if out is None else executor_for(x=x, out=out)
    x = executor.asarray("x", x)
    dtype_name = check_dtype("x", x.dtype)
    check_extents("x", x.shape)
    axis = check_axis(axis, x.ndim)
    choice("algorithm", algorithm, ALGORITHMS)
    keepdims = check_flag("keepdims", keepdims)

    shape, dtype = tuple(x.shape), x.dtype
    if output == "logsumexp":
        shape = (*shape[:axis], *((1,) if keepdims else ()), *shape[axis + 1 :])
        dtype = accumulator(dtype)
    if out is not None:
        out = executor.asarray("out", out)
        check_out("out", out, shape, dtype)
        check_apart_or_same("out", out, {"x": x}, "x")
    return SoftmaxProblem(executor, output, x, dtype_name, axis, algorithm, shape, dtype, out)


def accumulator(dtype: Any) -> np.dtype[Any]:
    """Return the dtype that sums of ``dtype`` are kept in."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)
