"""The launches of `softmax`, `log_softmax` and `logsumexp`: all that comes after the checks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from cuattn.ops.softmax import rows
from cuattn.ops.softmax.arguments import SoftmaxProblem, accumulator
from cuattn.ops.softmax.config import ITEMSIZES, MAX_GRID_Y, SoftmaxConfig, kernel_constants, select
from cuattn.ops.softmax.rows import RowView
from cuattn.runtime.arrays import assign, contiguous, full

__all__ = ["compute"]


def compute(problem: SoftmaxProblem, config: SoftmaxConfig | None = None) -> Any:
    """Choose a config, unless one is given, allocate, launch."""
    executor, x, out = problem.executor, problem.x, problem.out
    if x.size == 0:  # nothing to launch: no elements, or the log-sum-exp of rows without elements
        if out is None:
            return full(executor, problem.shape, -np.inf, problem.dtype)
        assign(executor, out, -np.inf)
        return out
    result = executor.empty(problem.shape, problem.dtype) if out is None else out
    _compute(problem, result, config)
    if out is None:
        executor.finish(result)
    return result


def _compute(problem: SoftmaxProblem, out: Any, config: SoftmaxConfig | None) -> None:
    executor, x, axis = problem.executor, problem.x, problem.axis
    target = _without_axis(out, axis) if problem.output == "logsumexp" and out.ndim == x.ndim else out
    layout = rows.fold(x, target, axis)
    if layout is None:  # too many outer axes, or elements that are not aligned
        x = contiguous(executor, x)
        layout = rows.fold(x, target, axis)
    if layout is not None:
        _launch(problem, x, target, layout, config)
        return
    copy = executor.empty(target.shape, target.dtype)
    layout = rows.fold(x, copy, axis)
    assert layout is not None, "contiguous arrays have at most two outer axes"
    _launch(problem, x, copy, layout, config)
    executor.finish(copy)
    assign(executor, target, copy)


def _without_axis(x: Any, axis: int) -> Any:
    return x[(*(slice(None),) * axis, 0, ...)]  # with the ellipsis always a view, never a scalar


@dataclass(frozen=True, slots=True)
class _Launches:
    """The launches for arrays that lie in a certain way."""

    source: str
    constants: dict[str, int | bool | float | str]
    block: tuple[int]
    grid_rows: int
    layout: np.void  # struct RowLayout
    num_chunks: int = 0  # CTAs a row; 0 where only one kernel is launched
    finish_layout: np.void | None = None
    finish_chunks: int = 0


@lru_cache(maxsize=1024)
def _launches(layout: RowView, dtype_name: str, output: str, algorithm: str, config: SoftmaxConfig | None) -> _Launches:
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
        return _Launches(source, constants, block, grid_rows, layout.pack(layout.num_cols))
    chunk_cols = config.chunk_cols(layout.num_cols)
    packed, num_chunks = layout.pack(chunk_cols), -(-layout.num_cols // chunk_cols)
    finish, finish_chunks = packed, num_chunks
    if output == "logsumexp":  # one number a row: one CTA a row finishes it
        finish, finish_chunks = layout.pack(layout.num_cols), 1
    return _Launches(source, constants, block, min(grid_rows, MAX_GRID_Y), packed, num_chunks, finish, finish_chunks)


def _launch(problem: SoftmaxProblem, x: Any, out: Any, layout: RowView, config: SoftmaxConfig | None) -> None:
    executor = problem.executor
    launches = _launches(layout, problem.dtype_name, problem.output, problem.algorithm, config)
    if not launches.num_chunks:
        kernel = executor.kernel(launches.source, launches.constants, f"cuattn_{launches.source}")
        executor.launch(
            kernel, (launches.grid_rows,), launches.block, {"g_x": x, "g_out": out, "layout": launches.layout}
        )
        return
    partial = executor.kernel(launches.source, launches.constants, "cuattn_softmax_partial")
    finish = executor.kernel(launches.source, launches.constants, "cuattn_softmax_finish")
    states = executor.empty((layout.num_rows, launches.num_chunks, 2), accumulator(x.dtype))
    args = {"g_x": x, "g_states": states, "layout": launches.layout}
    executor.launch(partial, (launches.num_chunks, launches.grid_rows), launches.block, args)
    args |= {"g_out": out, "num_states": np.uint32(launches.num_chunks), "layout": launches.finish_layout}
    executor.launch(finish, (launches.finish_chunks, launches.grid_rows), launches.block, args)
