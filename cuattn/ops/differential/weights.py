"""Lambda, the factor of the second softmax: how a model makes it, and how calls and kernels take it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from cuattn.dtypes import DTYPES
from cuattn.errors import DTypeError, ShapeError
from cuattn.runtime.executor import Executor, executor_for
from cuattn.runtime.small_arrays import small_array
from cuattn.scalars import as_real, real

__all__ = ["Lambda", "check_lambda", "differential_lambda", "lambda_init"]


def lambda_init(depth: float) -> float:
    """``0.8 - 0.6 e^(-0.3 depth)``: what lambda starts from in the layer at a depth, that of the first being 0.

    Parameters
    ----------
    depth : float, at least 0

    Returns
    -------
    float

    Raises
    ------
    ArgumentError
        ``depth`` is no number, or negative.
    NonFiniteError
        It is not finite.

    References
    ----------
    Ye et al., "Differential transformer", 2024 (arXiv:2410.05258).

    Examples
    --------
    >>> import cuattn
    >>> round(cuattn.lambda_init(0), 9), round(cuattn.lambda_init(11), 9)
    (0.2, 0.7778701)
    """
    number = real("depth", depth, "a finite number of at least 0 is needed", lambda value: value >= 0)
    return 0.8 - 0.6 * math.exp(-0.3 * number)


def differential_lambda(lq1: Any, lk1: Any, lq2: Any, lk2: Any, lambda_init: float) -> Any:
    """``e^(lq1 . lk1) - e^(lq2 . lk2) + lambda_init``: lambda from the vectors that a layer learns.

    Parameters
    ----------
    lq1, lk1, lq2, lk2 : float arrays [head_dim], or [heads, head_dim] for a lambda a head
        All of one shape.
    lambda_init : float
        What `cuattn.lambda_init` gives.

    Returns
    -------
    array [] or [heads], float32 (float64 if one of the arrays is)
        To be passed to `cuattn.differential_attention`. On a GPU nothing waits for it.

    Raises
    ------
    ArrayTypeError
        An argument is no array, or they are not of one kind and on one device.
    DTypeError
        A dtype other than float16, bfloat16, float32 and float64.
    ShapeError
        A rank other than 1 and 2, or shapes that differ.
    ArgumentError, NonFiniteError
        ``lambda_init`` is no finite number.

    References
    ----------
    Ye et al., "Differential transformer", 2024 (arXiv:2410.05258).

    Examples
    --------
    >>> import numpy as np
    >>> import cuattn
    >>> zero, one = np.zeros(4, np.float32), np.ones(4, np.float32)
    >>> float(cuattn.differential_lambda(one, zero, zero, one, 0.25))
    0.25
    """
    given = {"lq1": lq1, "lk1": lk1, "lq2": lq2, "lk2": lk2}
    start = real("lambda_init", lambda_init)
    executor = executor_for(**given)
    arrays = {name: executor.asarray(name, x) for name, x in given.items()}
    shape = tuple(arrays["lq1"].shape)
    for name, x in arrays.items():
        if x.dtype not in DTYPES:
            raise DTypeError(f"{name} has dtype {x.dtype}; float16, bfloat16, float32 and float64 (native) are allowed")
        if x.ndim not in (1, 2):
            raise ShapeError(f"{name} has shape {tuple(x.shape)}; [head_dim] or [heads, head_dim] is needed")
        if tuple(x.shape) != shape:
            raise ShapeError(f"{name} has shape {tuple(x.shape)} and lq1 has shape {shape}; they must be the same")
    wide = np.float64 if any(x.dtype == np.float64 for x in arrays.values()) else np.float32
    with executor.on_device(), np.errstate(over="ignore"):
        q1, k1, q2, k2 = (x.astype(wide) for x in arrays.values())
        return executor.xp.asarray(
            executor.xp.exp((q1 * k1).sum(axis=-1)) - executor.xp.exp((q2 * k2).sum(axis=-1)) + wide(start), wide
        )


@dataclass(frozen=True, slots=True)
class Lambda:
    """Lambda as kernels see it: a number, or an array with element strides of batch, query and head.

    ``shape`` is that of the argument; an array is contiguous, of the accumulator's type.
    """

    number: float
    array: Any
    shape: tuple[int, ...]

    @property
    def strides(self) -> tuple[int, int, int]:
        if len(self.shape) == 3:
            _, seqlen, heads = self.shape
            return seqlen * heads, heads, 1
        return 0, 0, len(self.shape)


def check_lambda(executor: Executor, value: Any, shape: tuple[int, int, int], dtype: np.dtype[Any]) -> Lambda:
    """Check ``lambda_``: a number, an array [], [heads], or ``shape``, which is [batch, seqlen_q, heads].

    An array of that size is data like q: its values are not looked at.
    """
    if value is None or as_real(value) is not None or isinstance(value, bool | str):
        return Lambda(real("lambda_", value), None, ())
    array = executor.metadata("lambda_", value)
    if array.ndim != 3:
        small = small_array(executor, "lambda_", array, ((), (shape[2],), shape), dtype)
        return Lambda(0.0, small, tuple(small.shape))
    if array.dtype.kind not in "iuf" and array.dtype not in DTYPES:
        raise DTypeError(f"lambda_ has dtype {array.dtype}; numbers are needed")
    if tuple(array.shape) != shape:
        raise ShapeError(f"lambda_ has shape {list(array.shape)}; allowed is [] or {[shape[2]]} or {list(shape)}")
    return Lambda(0.0, executor.put(array, dtype), shape)
