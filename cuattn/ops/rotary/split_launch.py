"""The launch of `split_qkv`: all that comes after the checks."""

from __future__ import annotations

from typing import Any

from cuattn.addresses import address
from cuattn.ops.operand import Operand
from cuattn.ops.rotary.arguments import NUM_THREADS, Angles, num_groups
from cuattn.ops.rotary.split_arguments import SplitProblem
from cuattn.runtime.arrays import assign, contiguous
from cuattn.runtime.executor import MAX_GRID, Executor
from cuattn.runtime.structs import struct_layout

__all__ = ["split"]


def split(problem: SplitProblem) -> tuple[Any, Any, Any]:
    """Compute q, k and v: allocate, unless there is an ``out``, and launch."""
    executor, outs = problem.executor, problem.outs
    results = outs or [executor.empty(shape, problem.qkv.dtype) for shape in problem.shapes]
    _compute(problem, results)
    if not outs:
        executor.finish(*results)
    return results[0], results[1], results[2]


def _compute(problem: SplitProblem, outs: list[Any]) -> None:
    """Launch on arrays that the kernel can take: copies of those whose last axis is not contiguous."""
    executor = problem.executor
    targets = [Operand(_with_batch(x)) for x in outs]
    copies = {i: executor.empty(outs[i].shape, outs[i].dtype) for i, target in enumerate(targets) if not target.direct}
    for i, copy in copies.items():
        targets[i] = Operand(_with_batch(copy))
    if any(target.array.size for target in targets):
        _launch(problem, targets)
    for i, copy in copies.items():
        executor.finish(copy)
        assign(executor, outs[i], copy)


def _with_batch(x: Any) -> Any:
    return x if x.ndim == 4 else x[None]


def _launch(problem: SplitProblem, outs: list[Operand]) -> None:
    executor, plan, dtype = problem.executor, problem.plan, problem.qkv.dtype
    qkv, bias = _row_operand(executor, problem.qkv), problem.bias
    if bias is not None and (bias.strides[0] != dtype.itemsize or address(bias) % dtype.itemsize):
        bias = contiguous(executor, bias)
    aligned = [x.aligned for x in outs] + [address(qkv) % 16 == 0 and qkv.strides[0] % 16 == 0]
    aligned += [bias is None or address(bias) % 16 == 0]
    angles = problem.angles or Angles(0, False)
    vectorized, _, num_units = angles.units(problem.head_dim, dtype.itemsize, all(aligned))
    num_tokens, num_rows = qkv.shape[0], outs[0].array.shape[0] * outs[0].array.shape[1]
    groups = num_groups(problem.num_heads + 2 * problem.num_kv_heads)
    positions = problem.positions
    batch_strides, seq_strides, head_strides = zip(*(x.strides for x in outs), strict=True)
    layout = struct_layout("split_qkv", "SplitLayout").pack(
        num_rows=num_rows,
        num_tokens=num_tokens,
        seqlen=outs[0].array.shape[1],
        qkv_stride=qkv.strides[0] // dtype.itemsize,
        batch_stride=batch_strides,
        seq_stride=seq_strides,
        head_stride=head_strides,
        positions_stride=0 if positions is None else positions.seq_stride,
        num_heads=problem.num_heads,
        num_kv_heads=problem.num_kv_heads,
        head_dim=problem.head_dim,
        num_groups=groups,
        num_pairs=angles.num_pairs,
        num_units=num_units,
        num_sequences=0 if problem.cu_seqlens is None else problem.cu_seqlens.shape[0] - 1,
        positions_are_64_bit=positions is not None and positions.are_64_bit,
        vectorized=vectorized,
        tables=angles.table_layout,
    )
    constants = {**angles.constants(dtype), "ROTATE": problem.angles is not None}
    kernel = executor.kernel("split_qkv", constants, "cuattn_split_qkv")
    grid = min(-(-num_rows * num_units * groups // NUM_THREADS), MAX_GRID[0])
    g_q, g_k, g_v = (x.array for x in outs)
    args = {
        "g_qkv": qkv,
        "g_bias": bias,
        "g_q": g_q,
        "g_k": g_k,
        "g_v": g_v,
        "g_indices": None if plan is None else problem.indices,
        "g_padding": None if plan is None else problem.padding,
        "g_cu_seqlens": problem.cu_seqlens,
        "g_positions": None if positions is None else positions.array,
        **angles.arrays,
        "layout": layout,
    }
    executor.launch(kernel, (grid,), (NUM_THREADS,), args)


def _row_operand(executor: Executor, qkv: Any) -> Any:
    """Return ``qkv`` with rows that the kernel can take: itself, or a copy."""
    itemsize = qkv.dtype.itemsize
    whole = qkv.shape[1] == 1 or qkv.strides[1] == itemsize
    if whole and (address(qkv) | qkv.strides[0]) % itemsize == 0:
        return qkv
    return contiguous(executor, qkv)
