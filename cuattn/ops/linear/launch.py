"""How linear attention is launched: which kernel, in which passes, and what it is told about a problem."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

from cuattn.addresses import address, byte_bounds
from cuattn.dtypes import PACK_BYTES
from cuattn.ops.linear import segments
from cuattn.ops.linear.arguments import LinearProblem
from cuattn.ops.linear.config import FEW_TOKENS, MmaRow, Row, select
from cuattn.ops.linear.options import FEATURE_MAPS
from cuattn.ops.linear.state import LinearState
from cuattn.ops.operand import Operand, deliver, operand, target
from cuattn.runtime.arrays import assign, contiguous
from cuattn.runtime.device_copies import copied
from cuattn.runtime.executor import Executor, Kernel
from cuattn.runtime.structs import struct_layout
from cuattn.scalars import MAX_EXTENT

__all__ = ["forward"]

#: Queries of a CTA where they do not wait for each other.
READ_SEGMENT = 256
_NO_STATE = LinearState(None, None)
_NO_STRIDES = 0, 0, 0


@dataclass(slots=True)
class Pass:
    """One launch: what it reads and writes; None for what it has nothing to do with."""

    q: Operand | None = None
    k: Operand | None = None
    v: Operand | None = None
    out: Operand | None = None
    state_in: LinearState = _NO_STATE
    state_out: LinearState = _NO_STATE
    kept: Any = None  # of each segment: what is left of the state that it began with
    states_in: int = 1
    states_out: int = 1
    num_segments: int = 1
    segment_len: int = MAX_EXTENT


def forward(
    problem: LinearProblem, *, cu_seqlens: Any = None, max_seqlen: int | None = None, need_state: bool = False
) -> tuple[Any, LinearState | None]:
    """Compute out (None without q) and, where it is needed, the state after the last token.

    ``cu_seqlens`` int32 [batch + 1] of packed arrays, where kernels can read it; no sequence is longer than
    ``max_seqlen``, if that is known.
    """
    executor, extents = problem.executor, problem.extents
    need_state = need_state or problem.state_out is not None
    has_out = problem.q is not None
    out = target(executor, problem.out, extents.out_shape, problem.dtype) if has_out else None
    separate = has_out and not problem.options.causal  # first all keys, then the queries
    state = _state_target(problem) if need_state or separate else _NO_STATE
    something = bool(extents.batch and extents.num_states) and (need_state or (out is not None and out.array.size > 0))
    if something:
        k, v = operand(executor, problem.k), operand(executor, problem.v)
        q = operand(executor, problem.q) if has_out else None
        row = _row(problem, k.aligned and v.aligned and (q is None or q.aligned))
        keys = Pass(k=k, v=v, state_in=_state_in(problem, state, row), state_out=state)
        if not separate:
            keys.q, keys.out = q, out
        count = segments.count_segments(problem, row, max_seqlen if extents.packed else extents.seqlen_k)
        if count > 1:
            _prepare_segments(problem, row, keys, count, cu_seqlens)
        if count == 1 or keys.q is not None:
            _launch(problem, row, keys, cu_seqlens)
        if separate and out is not None and out.array.size:
            longest = max_seqlen if extents.packed else extents.seqlen_q
            blocks = 1 if longest is None else max(1, -(-longest // READ_SEGMENT))
            length = READ_SEGMENT if longest is not None else MAX_EXTENT
            queries = Pass(q=q, out=out, state_in=state, num_segments=blocks, segment_len=length)
            _launch(problem, row, queries, cu_seqlens)
    result = None if out is None else deliver(executor, problem.out, out)
    return result, _deliver_state(problem, state) if need_state else None


def _prepare_segments(problem: LinearProblem, row: Row, whole: Pass, count: int, cu_seqlens: Any) -> None:
    """Divide a pass into segments, having computed the state that each of them begins with.

    A pass without queries is done then: the state after the last segment is written as well.
    """
    made, kept = segments.workspace(problem, count)
    last = whole.state_out if whole.q is None else _NO_STATE
    first_ones = Pass(k=whole.k, v=whole.v, state_out=made, kept=kept, states_out=count)
    first_ones.num_segments, first_ones.segment_len = count - (whole.q is not None), segments.SEGMENT
    _launch(problem, row, first_ones, cu_seqlens)
    segments.scan(problem, whole.state_in, made, last, kept)
    whole.state_in, whole.states_in = made, count
    whole.num_segments, whole.segment_len = count, segments.SEGMENT


def _row(problem: LinearProblem, aligned: bool) -> Row:
    extents, decay = problem.extents, problem.decay
    num_tokens = max(extents.seqlen_q, extents.seqlen_k)
    if decay is not None and decay.channels:
        places = (address(decay.array), *(stride * decay.array.dtype.itemsize for stride in decay.strides))
        aligned = aligned and not any(place % PACK_BYTES for place in places)
    return select(
        problem.dtype.name,
        extents.head_dim,
        extents.head_dim_v,
        0 if decay is None else 1 + decay.channels,
        problem.options.normalize,
        aligned,
        num_tokens=min(num_tokens // extents.batch if extents.packed else num_tokens, FEW_TOKENS + 1),
        smem_limit_bytes=problem.executor.smem_limit_bytes,
    )


def _state_target(problem: LinearProblem) -> LinearState:
    """Return what kernels write a state to: the caller's arrays where they are contiguous, else new ones."""
    shape, normalize = problem.extents.state_shape, problem.options.normalize
    given = problem.state_out if problem.state_out is not None else _NO_STATE
    parts: list[Any] = []
    for x, part_shape in ((given.s, shape), (given.z, shape[:3] if normalize else None)):
        if part_shape is None:
            parts.append(None)
        else:
            usable = x is not None and _lies_in_a_row(x)
            parts.append(x if usable else problem.executor.empty(part_shape, problem.accumulator))
    return LinearState(*parts)


def _lies_in_a_row(x: Any) -> bool:
    low, _ = byte_bounds(x)
    return bool(x.flags.c_contiguous) and low % x.dtype.itemsize == 0


def _state_in(problem: LinearProblem, written: LinearState, row: Row) -> LinearState:
    """Return the initial state as a kernel that writes ``written`` can read it.

    Every slice of columns reads all of z, and every block of heads all of s: where one of them writes its part in
    place, the others need a copy.
    """
    if problem.initial_state is None:
        return _NO_STATE
    extents, executor = problem.extents, problem.executor
    blocks = -(-(extents.num_outputs // max(1, extents.num_states)) // row.max_heads)
    slices = -(-extents.head_dim_v // row.slice_cols)
    parts = []
    for x, to, readers in zip(problem.initial_state, written, (blocks, blocks * slices), strict=True):
        if x is not None:
            x = contiguous(executor, x)
            if readers > 1 and to is not None and byte_bounds(x) == byte_bounds(to):
                with executor.on_device():
                    x = copied(x)
        parts.append(x)
    return LinearState(*parts)


def _deliver_state(problem: LinearProblem, written: LinearState) -> LinearState:
    """Return the state for the caller, once the kernel that writes it has been launched."""
    given = problem.state_out if problem.state_out is not None else _NO_STATE
    parts = []
    for x, to in zip(written, given, strict=True):
        if x is not None and x is not to:
            problem.executor.finish(x)
            if to is not None:
                assign(problem.executor, to, x)
                x = to
        parts.append(x)
    return LinearState(*parts)


def _launch(problem: LinearProblem, row: Row, step: Pass, cu_seqlens: Any) -> None:
    extents, options, executor = problem.extents, problem.options, problem.executor
    outputs_per_state = extents.num_outputs // extents.num_states
    heads = min(outputs_per_state, row.max_heads) if step.q is not None else 1
    head_blocks = -(-outputs_per_state // heads) if step.q is not None else 1
    slices = -(-extents.head_dim_v // row.slice_cols)
    decay = problem.decay if step.k is not None else None
    real = "double" if problem.accumulator.itemsize == 8 else "float"
    params = struct_layout(row.source, "LinearParams", real).pack(
        q=_strides(step.q),
        k=_strides(step.k),
        v=_strides(step.v),
        out=_strides(step.out),
        decay=_NO_STRIDES if decay is None else decay.strides,
        num_states=extents.num_states,
        num_outputs=extents.num_outputs,
        outputs_per_q_head=extents.num_outputs // max(1, extents.num_heads),
        states_per_k_head=extents.num_states // extents.num_k_heads,
        states_per_v_head=extents.num_states // extents.num_v_heads,
        seqlen_q=extents.seqlen_q,
        seqlen_k=extents.seqlen_k,
        head_dim=extents.head_dim,
        head_dim_v=extents.head_dim_v,
        num_slices=slices,
        heads_per_cta=heads,
        head_blocks=head_blocks,
        num_segments=step.num_segments,
        segment_len=step.segment_len,
        states_in=step.states_in,
        states_out=step.states_out,
        feature_map=FEATURE_MAPS.index(options.feature_map),
        scale=options.scale,
        eps=options.eps,
    )
    args = {
        "g_q": _array(step.q),
        "g_k": _array(step.k),
        "g_v": _array(step.v),
        "g_decay": None if decay is None else decay.array,
        "g_s_in": step.state_in.s,
        "g_z_in": step.state_in.z,
        "g_out": _array(step.out),
        "g_s_out": step.state_out.s,
        "g_z_out": step.state_out.z,
        "g_cu_seqlens": cu_seqlens,
        "params": params,
    }
    if isinstance(row, MmaRow):
        args["g_kept"] = step.kept
    grid = math.prod((extents.batch, extents.num_states, step.num_segments, head_blocks, slices))
    executor.launch(_kernel(executor, row), (grid,), (row.num_threads,), args, row.smem_bytes)


@cache
def _kernel(executor: Executor, row: Row) -> Kernel:
    return executor.kernel(row.source, row.constants(), f"cuattn_{row.source}")


def _strides(x: Operand | None) -> tuple[int, int, int]:
    return _NO_STRIDES if x is None else x.strides


def _array(x: Operand | None) -> Any:
    return None if x is None else x.array
