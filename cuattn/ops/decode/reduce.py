"""How the kernel that merges the splits of sequences is launched: its variants, the shape of a CTA."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from cuattn.addresses import address
from cuattn.dtypes import ELEMENT_TYPES, PACK_BYTES
from cuattn.ops.merge.launch import MAX_GRID_X, NUM_THREADS, block_shape
from cuattn.ops.operand import Operand

if TYPE_CHECKING:
    from cuattn.ops.decode.problem import DecodeProblem
    from cuattn.ops.decode.schedule import Schedule

__all__ = ["constants", "launch_reduce", "variants"]

ENTRY = "cuattn_attention_decode_reduce"


def constants(accumulator: str, result: str, vectorized: bool) -> dict[str, int | bool | str]:
    """Return the compile-time constants, from the dtype names of the partial results and of the result."""
    return {
        "Element": ELEMENT_TYPES[accumulator],
        "Result": ELEMENT_TYPES[result],
        "VECTORIZED": vectorized,
        "NUM_THREADS": NUM_THREADS,
    }


def variants() -> Iterator[dict[str, int | bool | str]]:
    """Return the constants of every kernel that a call can ask for."""
    for result in ELEMENT_TYPES:
        for vectorized in (True, False):
            yield constants("float64" if result == "float64" else "float32", result, vectorized)


def launch_reduce(
    problem: DecodeProblem,
    schedule: Schedule,
    partial_out: Any,
    partial_state: Any,
    output: Operand,
    lse: Any,
    params: np.void,
) -> None:
    """Merge the partial results of every split sequence into ``output`` and ``lse`` (or None), the sinks included.

    Rows of sequences of one split are not touched. ``params`` is the struct that the kernel of the splits was given.
    """
    executor, extents = problem.executor, problem.extents
    num_tokens = extents.seqlen_q if extents.packed else extents.batch * extents.seqlen_q
    num_rows = num_tokens * extents.num_heads
    if num_rows == 0:
        return
    pack = PACK_BYTES // partial_out.dtype.itemsize
    result = output.array
    vectorized = extents.head_dim_v % pack == 0 and _packs_fit(result, pack * result.dtype.itemsize)
    compiled = constants(partial_out.dtype.name, result.dtype.name, vectorized)
    kernel = executor.kernel("attention_decode_reduce", compiled, ENTRY)
    shape = block_shape(num_rows=num_rows, num_parts=schedule.max_splits, head_dim=extents.head_dim_v, pack=pack)
    grid = min(-(-num_rows // shape.rows), MAX_GRID_X)
    args = {
        "g_partial_out": partial_out,
        "g_partial_state": partial_state,
        "g_sinks": problem.options.sinks,
        "g_out": result,
        "g_lse": lse,
        "g_cu_seqlens_q": schedule.cu_seqlens_q,
        "g_splits": schedule.splits,
        "params": params,
    }
    executor.launch(kernel, (grid,), tuple(shape), args)


def _packs_fit(x: Any, pack_bytes: int) -> bool:
    """Whether every row begins at a multiple of ``pack_bytes``; strides of axes of length 1 are arbitrary."""
    strides = (stride for extent, stride in zip(x.shape[:-1], x.strides, strict=False) if extent > 1)
    return all(place % pack_bytes == 0 for place in (address(x), *strides))
