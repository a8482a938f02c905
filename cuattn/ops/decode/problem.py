"""A decode call whose arguments have passed every check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cuattn.formats import KVFormat
from cuattn.ops.attention.arguments import Extents
from cuattn.ops.attention.options import Options
from cuattn.ops.decode.scales import Scale
from cuattn.ops.operand import Operand, deliver, target
from cuattn.ops.rotary.arguments import Angles
from cuattn.runtime.executor import Executor

if TYPE_CHECKING:
    from cuattn.ops.decode.plan import DecodePlan

__all__ = ["DecodeProblem"]


@dataclass(slots=True)
class DecodeProblem:
    """A call whose arguments have passed every check."""

    executor: Executor
    q: Any  # [batch, seqlen_q, heads, head_dim], or packed [tokens, heads, head_dim]
    k: Any  # [batch, capacity, kv_heads, ...] or [num_pages, page_size, kv_heads, ...]
    v: Any
    out: Any  # as the caller gave it, or None
    dtype: np.dtype[Any]  # of q, and of the result where it is rounded
    kv_format: KVFormat
    extents: Extents  # seqlen_k: the most keys that a sequence may have; seqlen_q of packed queries: all of them
    scale: float
    options: Options
    seqlens_k: Any  # int32 [batch], where kernels read it
    host_seqlens_k: NDArray[np.int64] | None  # the same, where the host knows it
    cu_seqlens_q: Any  # int32 [batch + 1], where kernels read it, or None
    host_seqlens_q: NDArray[np.int64] | None  # [batch]; None where only a device knows it
    max_seqlen_q: int | None  # likewise
    block_tables: Any  # int32 [batch, max_pages], contiguous, or None
    page_size: int  # the capacity, where the cache is contiguous
    num_pages: int  # batch, where the cache is contiguous
    k_scale: Scale | None
    v_scale: Scale | None
    k_blocks: Any  # scales of blocks of numbers, [num_pages, page_size, kv_heads, blocks], or None
    v_blocks: Any
    rotary: Angles | None
    rotate_keys: bool
    num_splits: int | None  # as the caller gave it
    plan: DecodePlan | None
    workspace: Any  # uint8, contiguous, or None

    @property
    def accumulator(self) -> type[np.floating[Any]]:
        """The type that sums are in, and lse is returned in."""
        return np.float64 if self.dtype == np.float64 else np.float32

    @property
    def max_seqlen_k(self) -> int:
        return self.extents.seqlen_k

    @property
    def paged(self) -> bool:
        return self.block_tables is not None

    @property
    def group(self) -> int:
        """Query heads that read one key/value head."""
        return self.extents.heads_per_kv_head

    @property
    def num_pairs(self) -> float:
        """Pairs of a query and a key of one sequence, as far as the host knows."""
        if self.host_seqlens_q is None or self.host_seqlens_k is None:
            return float(self.extents.seqlen_q) * self.extents.seqlen_k
        return float(np.dot(self.host_seqlens_q, self.host_seqlens_k))

    @property
    def unrounded(self) -> bool:
        """Whether the result is of the accumulator's type, where it is usually rounded to another."""
        return self.out is not None and self.out.dtype != self.dtype

    def output(self) -> Operand:
        """Return what a kernel is to write: ``out`` where it can, else a new array that `deliver` copies from."""
        dtype = self.dtype if self.out is None else self.out.dtype
        return target(self.executor, self.out, self.extents.out_shape, dtype)

    def deliver(self, output: Operand) -> Any:
        """Return the array for the caller, once the kernels have been launched."""
        return deliver(self.executor, self.out, output)
