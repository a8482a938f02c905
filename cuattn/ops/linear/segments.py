"""Segments of long sequences: where there are fewer CTAs than multiprocessors, more of them share a sequence.

What each segment makes of nothing is computed for all of them at once, a scan turns that into the state that each
begins with (kernels/linear_attention_scan.cu), and then all segments compute their outputs at once. The lengths of
segments do not depend on the machine, and sums are made in one order: the same call gives the same bits.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from cuattn.ops.linear.arguments import LinearProblem
from cuattn.ops.linear.config import MmaRow, Row
from cuattn.ops.linear.state import LinearState
from cuattn.runtime.executor import Executor, Kernel
from cuattn.runtime.structs import struct_layout

__all__ = ["MIN_SEGMENTS", "SEGMENT", "count_segments", "scan", "workspace"]

#: Tokens of a segment.
SEGMENT = 1024
#: With fewer segments, what they cost (keys and values are read twice) is not worth it.
MIN_SEGMENTS = 8
SCAN_THREADS = 256
SCAN_SOURCE = "linear_attention_scan"


def count_segments(problem: LinearProblem, row: Row, longest: int | None) -> int:
    """Return how many segments each sequence is computed in; 1 for as a whole. ``longest``: None if nobody knows."""
    extents = problem.extents
    if not isinstance(row, MmaRow) or longest is None:
        return 1
    num_segments = -(-longest // SEGMENT)
    ctas = extents.batch * extents.num_states * -(-extents.head_dim_v // row.slice_cols)
    return num_segments if num_segments >= MIN_SEGMENTS and ctas < problem.executor.machine[1] else 1


def workspace(problem: LinearProblem, num_segments: int) -> tuple[LinearState, Any]:
    """Allocate a state for each segment, and what a segment keeps of the rows of the state before it."""
    batch, num_states, *shape = problem.extents.state_shape
    empty, dtype = problem.executor.empty, problem.accumulator
    rows = batch, num_states, num_segments, shape[0]
    z = empty(rows, dtype) if problem.options.normalize else None
    return LinearState(empty((*rows, shape[1]), dtype), z), empty(rows, dtype)


def scan(problem: LinearProblem, initial: LinearState, made: LinearState, last: LinearState, kept: Any) -> None:
    """Replace what segments ``made`` by the states that they begin with, the first with ``initial``.

    ``last``: where the state after the last segment goes, if there are arrays in it. Otherwise the last segment need
    not have made anything yet.
    """
    extents, executor = problem.extents, problem.executor
    numbers = extents.head_dim * (extents.head_dim_v + problem.options.normalize)
    blocks = -(-numbers // SCAN_THREADS)
    args = {
        "g_s_in": initial.s,
        "g_z_in": initial.z,
        "g_kept": kept,
        "g_s": made.s,
        "g_z": made.z,
        "g_s_last": last.s,
        "g_z_last": last.z,
        "params": struct_layout(SCAN_SOURCE, "ScanParams").pack(
            num_segments=made.s.shape[2], head_dim=extents.head_dim, head_dim_v=extents.head_dim_v, blocks=blocks
        ),
    }
    grid = math.prod((extents.batch, extents.num_states, blocks))
    executor.launch(_scan_kernel(executor), (grid,), (SCAN_THREADS,), args)


def scan_constants() -> dict[str, Any]:
    """Return the constants of the scan."""
    return {"NUM_THREADS": SCAN_THREADS}


@cache
def _scan_kernel(executor: Executor) -> Kernel:
    return executor.kernel(SCAN_SOURCE, scan_constants(), f"cuattn_{SCAN_SOURCE}")
