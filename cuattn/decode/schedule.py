"""What the CTAs of a decode call do: the work items of the grid, and into how many splits the keys of a sequence go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cuattn.decode.config import FlashDecodeConfig

if TYPE_CHECKING:
    from cuattn.decode.arguments import DecodeProblem

__all__ = ["Schedule", "schedule"]


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """Work items, as kernels/decode_block.cuh reads them.

    Attributes
    ----------
    num_items : int
        Items of the grid, splits included; each is a CTA for every key/value head and block of heads.
    num_splits : int
        Of every sequence; 1 where ``splits`` says it.
    work : int32 [num_work, 2 or 3] where kernels read it, or None
    work_columns : int
        0 without ``work``.
    splits : int32 [batch, 2] where kernels read it, or None
        Number of splits of each sequence, and its first partial result.
    num_partials : int
        Rows [heads, head_dim_v] of partial results; 0 where no sequence is split.
    max_splits : int
        The most splits of a sequence.
    """

    num_items: int
    num_splits: int = 1
    work: Any = None
    work_columns: int = 0
    splits: Any = None
    num_partials: int = 0
    max_splits: int = 1


def schedule(problem: DecodeProblem, config: FlashDecodeConfig) -> Schedule:
    """The work items of a call."""
    extents = problem.extents
    num_splits = problem.num_splits or 1
    total = extents.seqlen_q if extents.packed else extents.batch * extents.seqlen_q
    partials = total * num_splits if num_splits > 1 else 0
    tokens = config.tokens_per_block(problem.group)
    if problem.host_seqlens_q is None:
        raise NotImplementedError
    if not extents.packed:
        return Schedule(extents.batch * -(-extents.seqlen_q // tokens) * num_splits, num_splits, num_partials=partials, max_splits=num_splits)
    num_blocks = -(-problem.host_seqlens_q // tokens)
    batch_idx = np.repeat(np.arange(num_blocks.size), num_blocks)
    block = np.arange(batch_idx.size) - np.repeat(np.cumsum(num_blocks) - num_blocks, num_blocks)
    work = problem.executor.put(np.stack([batch_idx, block], axis=1), np.int32)
    return Schedule(work.shape[0] * num_splits, num_splits, work, 2, num_partials=partials, max_splits=num_splits)
