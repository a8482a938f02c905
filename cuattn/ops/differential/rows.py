"""The launch of what goes through every row of a gradient: the norm, the difference, the sums over tokens."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from cuattn.dtypes import ELEMENTS, WARP_SIZE
from cuattn.head_dims import BUCKETS, HEAD_DIM_BUCKETS
from cuattn.ops.attention.params import REALS
from cuattn.ops.differential.arguments import MAX_HEAD_DIM, DifferentialProblem
from cuattn.ops.differential.backward_arguments import Saved
from cuattn.ops.operand import operand
from cuattn.runtime.arrays import zeros
from cuattn.runtime.executor import Executor, Kernel
from cuattn.runtime.structs import struct_layout

__all__ = ["RowGradients", "add", "go_through_rows", "variants"]

_NUM_WARPS = 4
_ENOUGH_CTAS = 1024  # that fill a GPU; more would only make more parts of sums
_THREADS = 256  # of a CTA that adds two arrays


class RowGradients(NamedTuple):
    """What the kernels of attention backward need, and the gradients that are sums over rows."""

    douts: Any  # [batch, seqlen_q, 2 * heads, head_dim_v], contiguous
    lse: Any  # [batch, heads, 2, seqlen_q]: ready
    delta: Any
    dlam: Any
    dnorm_weight: Any


def go_through_rows(problem: DifferentialProblem, saved: Saved) -> RowGradients:
    """Launch the kernels."""
    executor, extents, accumulator = problem.executor, problem.extents, problem.accumulator
    num_tokens, num_heads, columns = extents.batch * extents.seqlen_q, extents.num_heads, extents.head_dim_v
    weight, shape = problem.norm.weight, problem.lambda_.shape
    if not num_tokens * num_heads:
        douts = zeros(executor, (extents.batch, extents.seqlen_q, 2 * num_heads, columns), problem.dtype)
        lse, delta, dlam = (zeros(executor, of, accumulator) for of in (extents.lse_shape, extents.lse_shape, shape))
        return RowGradients(
            douts, lse, delta, dlam, None if weight is None else zeros(executor, (columns,), accumulator)
        )
    num_parts = min(-(-num_tokens // _NUM_WARPS), max(1, _ENOUGH_CTAS // num_heads))
    douts = executor.empty((extents.batch, extents.seqlen_q, 2 * num_heads, columns), problem.dtype)
    lse, delta = (executor.empty(extents.lse_shape, accumulator) for _ in range(2))
    of_rows = executor.empty(shape, accumulator) if len(shape) == 3 else None
    lambda_parts = executor.empty((num_parts, num_heads), accumulator)
    weight_parts = None if weight is None else executor.empty((num_parts * num_heads, columns), accumulator)
    dout, out1, out2 = (operand(executor, x) for x in (saved.dout, saved.out1, saved.out2))
    layout = struct_layout("differential_backward_rows", "DifferentialRowsParams", REALS[accumulator])
    fields = {
        "dout": dout.strides,
        "out1": out1.strides,
        "out2": out2.strides,
        "lambda": problem.lambda_.strides,
        "num_tokens": num_tokens,
        "seqlen_q": extents.seqlen_q,
        "num_heads": num_heads,
        "head_dim_v": columns,
        "num_parts": num_parts,
        "norm": problem.norm.on,
        "base_2": problem.dtype.itemsize == 2 and not problem.options.kernel_options.natural_logits,
        "lambda_value": problem.lambda_.number,
        "eps": problem.norm.eps,
        "output_scale": problem.norm.output_scale,
    }
    args = {
        "g_dout": dout.array,
        "g_out1": out1.array,
        "g_out2": out2.array,
        "g_lse": saved.lse,
        "g_lambda": problem.lambda_.array,
        "g_norm_weight": weight,
        "g_douts": douts,
        "g_ready_lse": lse,
        "g_delta": delta,
        "g_dlambda": of_rows,
        "g_dlambda_parts": lambda_parts,
        "g_dweight_parts": weight_parts,
        "params": layout.pack(**fields),
    }
    kernel = _rows_kernel(executor, problem.dtype.name, BUCKETS[columns])
    executor.launch(kernel, (num_parts * num_heads,), (_NUM_WARPS * WARP_SIZE,), args)
    if of_rows is None:
        of_rows = _sums(executor, lambda_parts, num_heads if shape else 1, accumulator).reshape(shape)
    else:
        executor.finish(of_rows)
    dnorm_weight = None if weight_parts is None else _sums(executor, weight_parts, columns, accumulator)
    return RowGradients(douts, lse, delta, of_rows, dnorm_weight)


def _sums(executor: Executor, parts: Any, num_cols: int, accumulator: type[np.floating[Any]]) -> Any:
    """Sum the columns of a matrix of so many."""
    sums = executor.empty((num_cols,), accumulator)
    args = {
        "g_parts": parts,
        "g_sums": sums,
        "num_rows": np.int64(parts.size // num_cols),
        "num_cols": np.int32(num_cols),
    }
    kernel = _sums_kernel(executor, np.dtype(accumulator).name, "cuattn_differential_backward_sums")
    executor.launch(kernel, (-(-num_cols // _NUM_WARPS),), (_NUM_WARPS * WARP_SIZE,), args)
    executor.finish(sums)
    return sums


def add(executor: Executor, both: Any, dtype: np.dtype[Any]) -> Any:
    """Return ``both[0] + both[1]``, of the accumulator's type, rounded once to ``dtype``."""
    result = executor.empty(both.shape[1:], dtype)
    if result.size:
        args = {"g_both": both, "g_sums": result, "count": np.int64(result.size)}
        kernel = _sums_kernel(executor, dtype.name, "cuattn_differential_backward_add")
        executor.launch(kernel, (-(-result.size // _THREADS),), (_THREADS,), args)
    executor.finish(result)
    return result


def row_constants(dtype_name: str, columns: int) -> dict[str, Any]:
    """Return the constants of the kernel that goes through rows; ``columns`` is a bucket of E."""
    element, accumulator = ELEMENTS[dtype_name]
    return {"Element": element, "Accumulator": accumulator, "HEAD_DIM_V": columns, "NUM_WARPS": _NUM_WARPS}


def sum_constants(dtype_name: str) -> dict[str, Any]:
    """Return the constants of the kernels that add up."""
    element, accumulator = ELEMENTS[dtype_name]
    return {"Element": element, "Accumulator": accumulator, "NUM_WARPS": _NUM_WARPS}


def variants() -> Iterator[tuple[str, dict[str, Any]]]:
    """Return the kernels that a call can ask for, with their constants."""
    for name in ELEMENTS:
        yield "differential_backward_sums", sum_constants(name)
        for columns in HEAD_DIM_BUCKETS:
            if columns <= MAX_HEAD_DIM:
                yield "differential_backward_rows", row_constants(name, columns)


@cache
def _rows_kernel(executor: Executor, dtype_name: str, columns: int) -> Kernel:
    constants = row_constants(dtype_name, columns)
    return executor.kernel("differential_backward_rows", constants, "cuattn_differential_backward_rows")


@cache
def _sums_kernel(executor: Executor, dtype_name: str, entry: str) -> Kernel:
    return executor.kernel("differential_backward_sums", sum_constants(dtype_name), entry)
