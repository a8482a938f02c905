"""The launch of `rope`: all that comes after the checks."""

from __future__ import annotations

from typing import Any

from cuattn.addresses import address
from cuattn.ops.operand import Operand, operand
from cuattn.ops.rotary.arguments import NUM_THREADS, num_groups
from cuattn.ops.rotary.rope_arguments import RopeProblem
from cuattn.runtime.arrays import assign
from cuattn.runtime.executor import MAX_GRID
from cuattn.runtime.structs import struct_layout

__all__ = ["rotate"]


def rotate(problem: RopeProblem) -> Any:
    """Allocate, unless there is an ``out``, and launch."""
    executor, x = problem.executor, problem.x
    result = executor.empty(x.shape, x.dtype) if problem.out is None else problem.out
    if x.size:
        _compute(problem, result)
    if problem.out is None:
        executor.finish(result)
    return result


def _compute(problem: RopeProblem, out: Any) -> None:
    """Launch on arrays that the kernel can take: copies of those whose last axis is not contiguous."""
    executor = problem.executor
    source = operand(executor, _with_batch(problem.x))
    target = Operand(_with_batch(out))
    if target.direct:
        _launch(problem, source, target)
        return
    copy = executor.empty(out.shape, out.dtype)
    _launch(problem, source, Operand(_with_batch(copy)))
    executor.finish(copy)
    assign(executor, out, copy)


def _with_batch(x: Any) -> Any:
    return x if x.ndim == 4 else x[None]


def _launch(problem: RopeProblem, x: Operand, out: Operand) -> None:
    executor, positions, angles = problem.executor, problem.positions, problem.angles
    batch, seqlen, num_heads, head_dim = out.array.shape
    dtype = out.array.dtype
    vectorized, turned, num_units = angles.units(head_dim, dtype.itemsize, x.aligned and out.aligned)
    if address(x.array) == address(out.array):  # in place: what is not turned is there already
        num_units = turned
    groups = num_groups(num_heads)
    (x_batch, x_seq, x_head), (out_batch, out_seq, out_head) = x.strides, out.strides
    layout = struct_layout("rope", "RopeLayout").pack(
        num_tokens=batch * seqlen,
        seqlen=seqlen,
        x_batch_stride=x_batch,
        x_seq_stride=x_seq,
        x_head_stride=x_head,
        out_batch_stride=out_batch,
        out_seq_stride=out_seq,
        out_head_stride=out_head,
        positions_batch_stride=positions.batch_stride,
        positions_seq_stride=positions.seq_stride,
        num_heads=num_heads,
        num_groups=groups,
        num_pairs=angles.num_pairs,
        num_units=num_units,
        positions_are_64_bit=positions.are_64_bit,
        inverse=problem.inverse,
        vectorized=vectorized,
        tables=angles.table_layout,
    )
    kernel = executor.kernel("rope", angles.constants(dtype), "cuattn_rope")
    grid = min(-(-batch * seqlen * num_units * groups // NUM_THREADS), MAX_GRID[0])
    args = {
        "g_x": x.array,
        "g_out": out.array,
        "g_positions": positions.array,
        **angles.arrays,
        "layout": layout,
    }
    executor.launch(kernel, (grid,), (NUM_THREADS,), args)
