"""softmax, log_softmax and logsumexp along one axis of an array.

Maxim Milakov and Natalia Gimelshein, "Online normalizer calculation for softmax", 2018 (arXiv:1805.02867).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from cuattn.ops.softmax import rows
from cuattn.ops.softmax.config import ALGORITHMS, ITEMSIZES, MAX_GRID_Y, SoftmaxConfig, kernel_constants, select
from cuattn.ops.softmax.rows import Rows
from cuattn.runtime.arrays import assign, contiguous, full
from cuattn.runtime.checks import check_apart_or_same, check_axis, check_dtype, check_extents, check_out
from cuattn.runtime.executor import Executor, executor_for
from cuattn.scalars import check_flag, choice
from cuattn.typing import Algorithm, ArrayT

__all__ = ["log_softmax", "logsumexp", "softmax"]


def softmax(x: ArrayT, *, axis: int = -1, algorithm: Algorithm = "online", out: ArrayT | None = None) -> ArrayT:
    """``exp(x) / sum(exp(x))`` along ``axis``.

    A row that is all -inf gives zeros. A NaN or +inf makes its row NaN (with ``"naive"``, a +inf only its own element).

    Parameters
    ----------
    x : array, any shape of rank 1 or more; float16, bfloat16, float32 or float64
        NumPy arrays run on the host executor, CuPy arrays on the GPU. Any strides; contiguous rows whose base and row
        strides are multiples of 16 bytes are the fastest.
    axis : int
        The axis along which the result sums to 1.
    algorithm : {"online", "safe", "naive"}
        ``"online"`` finds maximum and sum in one pass: 2 reads and 1 write of the array, 1 read when a row fits on
        chip. ``"safe"`` finds the maximum first: 3 reads, 1 write. ``"naive"`` subtracts no maximum: 2 reads, 1 write;
        it overflows (inf / inf = NaN) for logits above 88 (709 in float64), and rows whose every exponential
        underflows give zeros. It is here to be compared with.
    out : array, optional; shape and dtype of ``x``
        Where to write the result. It may be ``x`` itself; else it may not lie in the memory range of ``x``.

    Returns
    -------
    array, shape and dtype of ``x``
        Accumulated in float32 (float64 for float64). ``out`` if that was given.

    Raises
    ------
    ArrayTypeError
        ``x`` or ``out`` is no array, or they are not of one kind.
    DTypeError
        A dtype that is not in the list, or an ``out`` of another dtype.
    ShapeError
        Rank 0, an extent of 2**31 or more, or an ``out`` of another shape.
    ArgumentError
        ``axis`` out of range or an unknown ``algorithm``.
    OverlapError
        ``out`` lies in the memory range of ``x`` and is not ``x``, or elements of it share memory.

    References
    ----------
    Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.

    Examples
    --------
    >>> import numpy as np
    >>> import cuattn
    >>> cuattn.softmax(np.log(np.array([[1.0, 3.0]], np.float32))).round(4)
    array([[0.25, 0.75]], dtype=float32)
    """
    return evaluate("softmax", x, axis=axis, algorithm=algorithm, out=out)


def log_softmax(x: ArrayT, *, axis: int = -1, algorithm: Algorithm = "online", out: ArrayT | None = None) -> ArrayT:
    """``x - log(sum(exp(x)))`` along ``axis``: the logarithm of `softmax`, without its underflow.

    A row that is all -inf gives -inf. Parameters, result, errors and paper are those of `softmax`.

    Examples
    --------
    >>> import numpy as np
    >>> import cuattn
    >>> cuattn.log_softmax(np.array([0.0, -200.0], np.float32))
    array([   0., -200.], dtype=float32)
    """
    return evaluate("log_softmax", x, axis=axis, algorithm=algorithm, out=out)


def logsumexp(
    x: ArrayT, *, axis: int = -1, keepdims: bool = False, algorithm: Algorithm = "online", out: ArrayT | None = None
) -> ArrayT:
    """``log(sum(exp(x)))`` along ``axis``, natural logarithm.

    A row that is all -inf, or has no elements, gives -inf; one with a NaN or +inf gives NaN.

    Parameters
    ----------
    x, axis, algorithm
        As for `softmax`; without its write of the array (online: 1 read, safe: 2, naive: 1).
    keepdims : bool
        Keep ``axis`` in the result, with length 1.
    out : array, optional
        Where to write the result; it may not lie in the memory range of ``x``.

    Returns
    -------
    array, shape of ``x`` without ``axis``
        float32, or float64 for float64: the log-sum-exp of float16 logits may be too large for float16.

    Raises
    ------
    ArrayTypeError, DTypeError, ShapeError, ArgumentError, OverlapError
        As for `softmax`.

    References
    ----------
    Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.

    Examples
    --------
    >>> import numpy as np
    >>> import cuattn
    >>> cuattn.logsumexp(np.zeros((2, 8), np.float32), axis=1) / np.log(np.float32(2))
    array([3., 3.], dtype=float32)
    """
    return evaluate("logsumexp", x, axis=axis, algorithm=algorithm, out=out, keepdims=keepdims)


def evaluate(
    output: str,
    x: Any,
    *,
    axis: int,
    algorithm: str,
    out: Any,
    keepdims: bool = False,
    config: SoftmaxConfig | None = None,
) -> Any:
    """Validate, choose a config (unless one is given), allocate, launch. ``output``: a key of `OUTPUTS`."""
    executor = executor_for(x=x) if out is None else executor_for(x=x, out=out)
    x = executor.asarray("x", x)
    check_dtype("x", x.dtype)
    check_extents("x", x.shape)
    axis = check_axis(axis, x.ndim)
    choice("algorithm", algorithm, ALGORITHMS)
    keepdims = check_flag("keepdims", keepdims)

    shape, dtype = tuple(x.shape), x.dtype
    if output == "logsumexp":
        shape = (*shape[:axis], *((1,) if keepdims else ()), *shape[axis + 1 :])
        dtype = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    if out is not None:
        out = executor.asarray("out", out)
        check_out("out", out, shape, dtype)
        check_apart_or_same("out", out, {"x": x}, "x")

    if x.size == 0:  # nothing to launch: no elements, or the log-sum-exp of rows without elements
        if out is None:
            return full(executor, shape, -np.inf, dtype)
        assign(executor, out, -np.inf)
        return out
    result = executor.empty(shape, dtype) if out is None else out
    _compute(executor, output, x, result, axis, algorithm, config)
    if out is None:
        executor.finish(result)
    return result


def _compute(
    executor: Executor, output: str, x: Any, out: Any, axis: int, algorithm: str, config: SoftmaxConfig | None
) -> None:
    target = _without_axis(out, axis) if output == "logsumexp" and out.ndim == x.ndim else out
    layout = rows.fold(x, target, axis)
    if layout is None:  # too many outer axes, or elements that are not aligned
        x = contiguous(executor, x)
        layout = rows.fold(x, target, axis)
    if layout is not None:
        _launch(executor, output, x, target, layout, algorithm, config)
        return
    copy = executor.empty(target.shape, target.dtype)
    layout = rows.fold(x, copy, axis)
    assert layout is not None, "contiguous arrays have at most two outer axes"
    _launch(executor, output, x, copy, layout, algorithm, config)
    executor.finish(copy)
    assign(executor, target, copy)


def _without_axis(x: Any, axis: int) -> Any:
    return x[(*(slice(None),) * axis, 0, ...)]  # with the ellipsis always a view, never a scalar


@dataclass(frozen=True, slots=True)
class _Plan:
    """What to launch for arrays that lie in a certain way."""

    source: str
    constants: dict[str, int | bool | float | str]
    block: tuple[int]
    grid_rows: int
    layout: np.void  # struct RowLayout
    num_chunks: int = 0  # CTAs a row; 0 where only one kernel is launched
    finish_layout: np.void | None = None
    finish_chunks: int = 0


@lru_cache(maxsize=1024)
def _plan(layout: Rows, dtype_name: str, output: str, algorithm: str, config: SoftmaxConfig | None) -> _Plan:
    if config is None:
        config = select(
            num_rows=layout.num_rows,
            num_cols=layout.num_cols,
            itemsize=ITEMSIZES[dtype_name],
            algorithm=algorithm,
            lanes_span_rows=layout.lanes_span_rows,
        )
    vectorized = layout.vectorized and not config.lanes_span_rows
    source, constants = kernel_constants(config, dtype_name, vectorized, output, algorithm)
    block = (config.num_threads,)
    grid_rows = min(config.row_groups(layout.num_rows), config.max_ctas)
    if config.path != "split":
        return _Plan(source, constants, block, grid_rows, layout.pack(layout.num_cols))
    chunk_cols = config.chunk_cols(layout.num_cols)
    packed, num_chunks = layout.pack(chunk_cols), -(-layout.num_cols // chunk_cols)
    finish, finish_chunks = packed, num_chunks
    if output == "logsumexp":  # one number a row: one CTA a row finishes it
        finish, finish_chunks = layout.pack(layout.num_cols), 1
    return _Plan(source, constants, block, min(grid_rows, MAX_GRID_Y), packed, num_chunks, finish, finish_chunks)


def _launch(
    executor: Executor, output: str, x: Any, out: Any, layout: Rows, algorithm: str, config: SoftmaxConfig | None
) -> None:
    plan = _plan(layout, check_dtype("x", x.dtype), output, algorithm, config)
    if not plan.num_chunks:
        kernel = executor.kernel(plan.source, plan.constants, f"cuattn_{plan.source}")
        executor.launch(kernel, (plan.grid_rows,), plan.block, {"g_x": x, "g_out": out, "layout": plan.layout})
        return
    partial = executor.kernel(plan.source, plan.constants, "cuattn_softmax_partial")
    finish = executor.kernel(plan.source, plan.constants, "cuattn_softmax_finish")
    states = executor.empty((layout.num_rows, plan.num_chunks, 2), accumulator(x.dtype))
    args = {"g_x": x, "g_states": states, "layout": plan.layout}
    executor.launch(partial, (plan.num_chunks, plan.grid_rows), plan.block, args)
    args |= {"g_out": out, "num_states": np.uint32(plan.num_chunks), "layout": plan.finish_layout}
    executor.launch(finish, (plan.finish_chunks, plan.grid_rows), plan.block, args)


def accumulator(dtype: Any) -> np.dtype[Any]:
    """The dtype that sums of ``dtype`` are kept in."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)
