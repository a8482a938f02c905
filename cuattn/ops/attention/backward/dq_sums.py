"""dq as sums that CTAs add to in no order (backward/dq_sums.cuh): where they lie, their zeros, and dq from them."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from cuattn.dtypes import ELEMENTS, WARP_SIZE
from cuattn.ops.attention.arguments import Extents
from cuattn.ops.operand import Operand
from cuattn.runtime.executor import Executor, Kernel
from cuattn.runtime.structs import struct_layout

if TYPE_CHECKING:
    from cuattn.ops.attention.backward.problem import BackwardProblem

__all__ = ["DqSums"]

_ROWS, _COLS = 16, 8  # of an accumulator of the tensor cores
_NUM_WARPS = 4
_MAX_CTAS = 1024  # that clear the sums; each thread takes many


class DqSums:
    """The sums of a call: an ``array`` of `shape`, and the ``strides`` of a batch entry, a row tile and a head."""

    __slots__ = ("array", "strides")

    def __init__(self, array: Any, extents: Extents) -> None:
        *_, num_heads, tiles, sums = self.shape(extents)
        self.array = array
        self.strides = 0 if extents.packed else num_heads * tiles * sums, sums, tiles * sums

    @staticmethod
    def shape(extents: Extents) -> tuple[int, ...]:
        """[batch, heads, row tiles, sums of one], float32; packed sequences without the batch axis."""
        sums = -(-extents.head_dim // _COLS) * _ROWS * _COLS
        if extents.packed:
            return extents.num_heads, extents.seqlen_q // _ROWS + extents.batch, sums
        return extents.batch, extents.num_heads, -(-extents.seqlen_q // _ROWS), sums

    def clear(self, executor: Executor) -> None:
        """Launch the kernel that writes zeros."""
        num_vectors = self.array.size // 4
        threads = _NUM_WARPS * WARP_SIZE
        kernel = _kernel(executor, "float32", "cuattn_attention_backward_dq_clear")
        grid = min(-(-num_vectors // threads), _MAX_CTAS)
        executor.launch(kernel, (grid,), (threads,), {"g_sums": self.array, "num_vectors": np.int64(num_vectors)})

    def round_to(self, dq: Operand, params: np.void, problem: BackwardProblem) -> None:
        """Launch the kernel that makes ``dq`` of the sums. ``params`` has its strides."""
        if not dq.array.size:
            return
        executor, packed, extents = problem.executor, problem.packed, problem.forward.extents
        work = None
        if packed is not None:
            work = packed.work(executor, extents.seqlen_q, _ROWS, problem.forward.options)
        num_blocks = extents.batch * -(-extents.seqlen_q // _ROWS) if work is None else work.shape[0]
        batch, seq, head = self.strides
        args = {
            "g_sums": self.array,
            "g_dq": dq.array,
            "g_cu_seqlens_q": None if packed is None else packed.cu_seqlens_q,
            "g_cu_seqlens_k": None if packed is None else packed.cu_seqlens_k,
            "g_work": work,
            "sums": struct_layout("attention_backward_dq", "RowStrides").pack(batch=batch, seq=seq, head=head),
            "params": params,
        }
        kernel = _kernel(executor, dq.array.dtype.name, "cuattn_attention_backward_dq")
        executor.launch(kernel, (extents.num_heads * num_blocks,), (_NUM_WARPS * WARP_SIZE,), args)


@cache
def _kernel(executor: Executor, dtype_name: str, entry: str) -> Kernel:
    constants: dict[str, Any] = {"Element": ELEMENTS[dtype_name][0], "NUM_WARPS": _NUM_WARPS}
    return executor.kernel("attention_backward_dq", constants, entry)
