"""Packed sequences: where each lies among the tokens, and the list of what there is to compute.

Where the host knows the lengths, no CTA is launched for a query that does not exist, and the blocks with the most keys
come first, so that a long sequence among many short ones does not run last and alone. Where only the device knows them,
the list is made there (kernels/attention_schedule.cu), sequence by sequence, and nothing waits for it; entries beyond
its end are CTAs that stop at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuattn import environment
from cuattn.errors import ArgumentError, DTypeError, ShapeError
from cuattn.ops.attention.options import Options
from cuattn.ops.attention.params import UNBOUNDED
from cuattn.runtime.executor import Executor, Kernel
from cuattn.scalars import integer

__all__ = [
    "SCHEDULE_THREADS",
    "PackedSequences",
    "check_cu_seqlens",
    "check_max_seqlen",
    "check_packed",
    "device_work_list",
    "work_list",
]

SCHEDULE_THREADS = 1024


@dataclass(slots=True)
class PackedSequences:
    """The sequences of a packed problem.

    ``cu_seqlens_q`` and ``cu_seqlens_k`` are int32 [batch + 1] where kernels can read them; ``host`` holds both as
    NumPy arrays if the host knows them. No sequence is longer than ``max_seqlen_q``, ``max_seqlen_k``.
    """

    cu_seqlens_q: Any
    cu_seqlens_k: Any
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    host: tuple[NDArray[np.int64], NDArray[np.int64]] | None

    @property
    def batch(self) -> int:
        return int(self.cu_seqlens_q.shape[0]) - 1

    def work(self, executor: Executor, total: int, block: int, options: Options, *, of_keys: bool = False) -> Any:
        """Return the list of (batch_idx, block of queries): int32 [num_work, 2], where kernels can read it.

        ``of_keys``: blocks of keys, for kernels that walk over the queries. ``total`` are the tokens of that side.
        """
        if self.host is None:
            if of_keys:
                return device_work_list(executor, self.cu_seqlens_k, total, block, self.max_seqlen_k)
            return device_work_list(executor, self.cu_seqlens_q, total, block, self.max_seqlen_q)
        return executor.put(work_list(*self.host, block, options, of_keys=of_keys), np.int32)


def device_work_list(executor: Executor, cu_seqlens: Any, total: int, block: int, max_seqlen: int | None) -> Any:
    """Make such a list in the order of the sequences, where only the device knows them; [-1, 0] is no work."""
    batch = int(cu_seqlens.shape[0]) - 1
    capacity = total // block + min(batch, total)
    first_work, work = executor.empty(batch + 1, np.int32), executor.empty((capacity, 2), np.int32)
    limit = UNBOUNDED if max_seqlen is None else max_seqlen
    args = {
        "g_cu_seqlens_q": cu_seqlens,
        "g_first_work": first_work,
        "g_work": work,
        "num_sequences": np.int32(batch),
        "total": np.int32(total),
        "max_seqlen": np.int32(limit),
        "capacity": np.int32(capacity),
    }
    executor.launch(_schedule_kernel(executor, block), (1,), (SCHEDULE_THREADS,), args)
    executor.finish(first_work, work)
    return work


@cache
def _schedule_kernel(executor: Executor, block_m: int) -> Kernel:
    constants = {"BLOCK_M": block_m, "NUM_THREADS": SCHEDULE_THREADS}
    return executor.kernel("attention_schedule", constants, "cuattn_attention_schedule")


def check_packed(
    executor: Executor,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    total_q: int,
    total_k: int,
) -> PackedSequences:
    """Make every check of arguments that say where sequences lie. Raises as documented at `cuattn.attention_varlen`."""
    given = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    arrays = {name: executor.metadata(name, x) for name, x in given.items()}
    for name, x in arrays.items():
        if x.ndim != 1 or not x.size:
            raise ShapeError(f"{name} has shape {tuple(x.shape)}; [batch + 1] is needed")
        on_host = isinstance(x, np.ndarray)
        if x.dtype.kind not in "iu" if on_host else x.dtype != np.int32:
            raise DTypeError(f"{name} has dtype {x.dtype}; {'integers are' if on_host else 'int32 is'} needed")
    if arrays["cu_seqlens_q"].shape != arrays["cu_seqlens_k"].shape:
        lengths = " and ".join(f"{x.size} in {name}" for name, x in arrays.items())
        raise ShapeError(f"cu_seqlens_q and cu_seqlens_k must have the same length, batch + 1; there are {lengths}")
    limits = {
        name: check_max_seqlen(name, x) for name, x in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k))
    }
    known: list[NDArray[np.int64]] = []
    for (name, x), total, limit in zip(arrays.items(), (total_q, total_k), limits, strict=True):
        values = x if isinstance(x, np.ndarray) else x.get() if environment.check() else None
        if values is not None:
            longest = check_cu_seqlens(name, values.astype(np.int64), total, limit, limits[limit])
            if limits[limit] is None:
                limits[limit] = longest
            known.append(values.astype(np.int64))
    on_device = [executor.put(x, np.int32) for x in arrays.values()]
    host = (known[0], known[1]) if len(known) == 2 else None
    return PackedSequences(on_device[0], on_device[1], limits["max_seqlen_q"], limits["max_seqlen_k"], host)


def check_max_seqlen(name: str, value: Any) -> int | None:
    """Return a length that no sequence exceeds, as an int, or None."""
    return None if value is None else integer(name, value, 0, UNBOUNDED, optional=True)


def check_cu_seqlens(name: str, values: NDArray[np.int64], total: int, limit_name: str, limit: int | None) -> int:
    """Return the longest sequence of a list that ascends from 0 to `total`."""
    if values[0] != 0:
        raise ArgumentError(f"{name}[0] is {values[0]}; the first sequence begins at 0")
    descends = values[1:] < values[:-1]  # a difference may overflow
    if descends.any():
        at = int(np.argmax(descends))
        raise ArgumentError(f"{name} descends from {values[at]} to {values[at + 1]} at index {at + 1}; it must ascend")
    if values[-1] != total:
        raise ArgumentError(f"{name} ends at {values[-1]}; it must span all {total} tokens")
    longest = int(np.diff(values).max(initial=0))
    if limit is not None and longest > limit:
        raise ArgumentError(f"{limit_name} is {limit}, but a sequence of {name} has {longest} tokens")
    return longest


def work_list(
    cu_seqlens_q: NDArray[np.int64],
    cu_seqlens_k: NDArray[np.int64],
    block: int,
    options: Options,
    *,
    of_keys: bool = False,
) -> NDArray[np.int32]:
    """List (batch_idx, block) of every block of so many queries, [num_work, 2]; those that see the most keys first.

    ``of_keys``: of keys, and those that the most queries see.

    >>> from cuattn.ops.attention.bounds import Bounds
    >>> work_list(np.array([0, 1, 131]), np.array([0, 9, 139]), 64, Options(bounds=Bounds(right=0))).tolist()
    [[1, 2], [1, 1], [1, 0], [0, 0]]
    """
    seqlens_q, seqlens_k = np.diff(cu_seqlens_q), np.diff(cu_seqlens_k)
    own, other = (seqlens_k, seqlens_q) if of_keys else (seqlens_q, seqlens_k)
    num_blocks = -(-own // block)
    batch_idx = np.repeat(np.arange(num_blocks.size), num_blocks)
    block_idx = np.arange(batch_idx.size) - np.repeat(np.cumsum(num_blocks) - num_blocks, num_blocks)
    first, last = block_idx * block, np.minimum((block_idx + 1) * block, own[batch_idx]) - 1
    bounds, diagonal = options.bounds, options.diagonal_offsets
    if not isinstance(diagonal, np.ndarray):  # one for all, or one that only the device knows
        diagonal = bounds.diagonal(seqlens_q, seqlens_k)
    seen = bounds.queries if of_keys else bounds.keys
    begin, end = seen(first, last, diagonal.astype(np.int64)[batch_idx], other[batch_idx])
    order = np.argsort(np.minimum(begin, end) - end, kind="stable")
    return np.stack([batch_idx[order], block_idx[order]], axis=1).astype(np.int32)
