"""Measuring which shape of a kernel is the fastest for a call, on the GPU at hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cuattn.errors import ArgumentError, NotSupportedError
from cuattn.head_dims import BUCKETS, COLUMNS
from cuattn.ops.attention.arguments import Problem
from cuattn.ops.attention.forward import hopper_config as hopper
from cuattn.ops.attention.forward import hopper_select, tuned_rows
from cuattn.ops.attention.forward.config import FLASH_FWD_CONFIGS, products_of
from cuattn.ops.attention.forward.launch import forward
from cuattn.ops.attention.forward.path import check_call
from cuattn.ops.attention.forward.tuned_rows import Row
from cuattn.ops.attention.sequences import PackedSequences
from cuattn.runtime.timer import CudaTimer

__all__ = ["TunedRow", "tune"]


@dataclass(frozen=True, slots=True)
class TunedRow:
    """A kernel shape that `tune` found, and what it measured.

    Attributes
    ----------
    row : FlashFwdConfig or HopperFwdConfig
        The shape that was the fastest.
    times_us : tuple of (row, float)
        Every shape that was tried, and the median time of a call with it in microseconds; the fastest first.
    call_class : str
        The calls that take the row from now on: of this dtype, head dims, options, and lengths up to a factor of two.
    """

    row: Row
    times_us: tuple[tuple[Row, float], ...]
    call_class: str


def tune(q: Any, k: Any, v: Any, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None, **options: Any) -> TunedRow:
    """Time every legal kernel shape for a call of attention on its GPU, and keep the fastest for calls like it.

    `cuattn.attention` and `cuattn.attention_varlen` choose a shape by a table. This replaces the choice by a
    measurement, for calls of the same dtype, head dims (by bucket), options and lengths (by power of two) on GPUs of
    the same name. The result is kept in the user's cache, which other processes read when they start;
    ``cuattn-bench cache clear`` forgets it. Shapes differ in speed, and in results by rounding at most.

    Parameters
    ----------
    q, k, v : CuPy arrays
        As for `cuattn.attention`, or for `cuattn.attention_varlen` with ``cu_seqlens_q`` and ``cu_seqlens_k``.
    cu_seqlens_q, cu_seqlens_k : int32 [batch + 1], optional
        Both or none.
    **options
        Keywords of those functions but ``return_lse``. ``out`` is written once for each timed call.

    Returns
    -------
    TunedRow

    Raises
    ------
    NotSupportedError
        The arrays are NumPy arrays: a time on the host executor says nothing about a GPU.
    ArgumentError
        There is nothing to compute, or only one of ``cu_seqlens_q`` and ``cu_seqlens_k`` is given.
    ArrayTypeError, DTypeError, ShapeError, NonFiniteError, OverlapError
        As for `cuattn.attention`.

    References
    ----------
    Times are medians of CUDA events, with the L2 cache emptied before each call: docs/benchmarks.md.

    Examples
    --------
    >>> import numpy as np
    >>> import cuattn
    >>> q = np.zeros((1, 4096, 16, 128), np.float16)
    >>> cuattn.tune(q, q, q, causal=True)
    Traceback (most recent call last):
        ...
    cuattn.errors.NotSupportedError: tune measures on a GPU: q is a NumPy array; pass CuPy arrays
    """
    problem, packed = check_call(q, k, v, cu_seqlens_q, cu_seqlens_k, **options)
    if problem.executor.name == "host":
        raise NotSupportedError("tune measures on a GPU: q is a NumPy array; pass CuPy arrays")
    extents = problem.extents
    if not (extents.batch and extents.num_heads and extents.seqlen_q and extents.seqlen_k):
        raise ArgumentError(f"there is nothing to compute, and so to measure, with {extents}")
    with problem.executor.on_device():
        timer = CudaTimer()
        times = [(row, _time(timer, problem, packed, row)) for row in candidates(problem)]
    times.sort(key=lambda item: item[1])
    call_class = tuned_rows.call_class(problem, packed)
    tuned_rows.keep(problem.executor, call_class, times[0][0])
    return TunedRow(times[0][0], tuple(times), call_class)


def candidates(problem: Problem) -> list[Row]:
    """List every row that is legal for a call, in the tables' order; of rows that make the same kernel, the first."""
    extents, options, executor = problem.extents, problem.options, problem.executor
    kernels: dict[tuple[Any, ...], Row] = {}
    if hopper_select.why_not(problem, executor.arch) is None:
        buckets = hopper.BUCKETS[extents.head_dim], hopper.BUCKETS[extents.head_dim_v]
        compiled = hopper_select.kernel_options(options)
        for row in hopper.HOPPER_FWD_CONFIGS + hopper.HOPPER_ALTERNATIVES:
            serves = row.serves(*buckets, compiled, 1, problem.dtype.itemsize)
            if serves and row.is_legal(*buckets, executor.smem_limit_bytes, compiled):
                constants = row.constants(problem.dtype.name, *buckets, compiled)
                kernels.setdefault((row.source, *constants.items()), row)
    buckets = BUCKETS[extents.head_dim], COLUMNS[extents.head_dim_v][0]
    compiled = options.kernel_options
    products, itemsize = products_of(problem.dtype, options.tf32)
    for portable in FLASH_FWD_CONFIGS:
        serves = portable.serves(products, itemsize, *buckets, compiled.on_scores)
        if serves and portable.is_legal(*buckets, executor.smem_limit_bytes):
            constants = portable.constants(problem.dtype.name, *buckets, compiled)
            kernels.setdefault((portable.source, *constants.items()), portable)
    return list(kernels.values())


def _time(timer: CudaTimer, problem: Problem, packed: PackedSequences | None, row: Row) -> float:
    return timer.time(lambda: forward(problem, return_lse=False, config=row, packed=packed)).median_us
