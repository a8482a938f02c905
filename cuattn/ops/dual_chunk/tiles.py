"""How queries are cut into tiles that lie in one chunk each: what kernels/dual_chunk/chunk_block.cuh does, on the host.

>>> tile_counts(np.array([10]), np.array([13]), 4, 8).tolist()
[4]
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuattn.ops.attention.params import UNBOUNDED
from cuattn.ops.attention.sequences import SCHEDULE_THREADS, PackedSequences
from cuattn.runtime.executor import Executor, Kernel

__all__ = ["tile_counts", "work"]

Integers = NDArray[np.int64]


def _first_rows(seqlens_q: Integers, seqlens_k: Integers, length: int) -> Integers:
    """Return how many queries lie in the chunk of the first one; those at negative positions count to chunk 0."""
    first = seqlens_k - seqlens_q
    return np.minimum(seqlens_q, length - np.where(first < 0, first, first % length))


def tile_counts(seqlens_q: Integers, seqlens_k: Integers, block: int, length: int) -> Integers:
    """Return the tiles of at most ``block`` queries of each sequence, for chunks of ``length``."""
    first = _first_rows(seqlens_q, seqlens_k, length)
    chunks, rest = np.divmod(seqlens_q - first, length)
    return np.asarray(-(-first // block) + chunks * -(-length // block) + -(-rest // block))


def work(executor: Executor, packed: PackedSequences, total_q: int, total_k: int, block: int, length: int) -> Any:
    """Return the list of (batch_idx, tile): int32 [num_work, 2], where kernels can read it."""
    if packed.host is None:
        return _device_work(executor, packed, total_q, total_k, block, length)
    seqlens_q, seqlens_k = map(np.diff, packed.host)
    return executor.put(_work_list(seqlens_q, seqlens_k, block, length), np.int32)


def _work_list(seqlens_q: Integers, seqlens_k: Integers, block: int, length: int) -> NDArray[np.int32]:
    """List (batch_idx, tile) of all tiles; those that see the most keys first."""
    counts = tile_counts(seqlens_q, seqlens_k, block, length)
    batch_idx = np.repeat(np.arange(counts.size), counts)
    tile = np.arange(batch_idx.size) - np.repeat(np.cumsum(counts) - counts, counts)
    # Within a sequence, keys rise with the tile; the last tile ends with the last key.
    keys = np.where(counts > 0, seqlens_k, 0)[batch_idx] - (counts[batch_idx] - 1 - tile) * min(block, length)
    order = np.argsort(-keys, kind="stable")
    return np.stack([batch_idx[order], tile[order]], axis=1).astype(np.int32)


def _device_work(
    executor: Executor, packed: PackedSequences, total_q: int, total_k: int, block: int, length: int
) -> Any:
    """Make such a list in the order of the sequences, where only the device knows them; [-1, 0] is no work."""
    # A chunk's last tile may be short, and both the first chunk and the last one of a sequence may be a part.
    capacity = total_q // block + total_q // length + 2 * min(packed.batch, total_q)
    first_work, result = executor.empty(packed.batch + 1, np.int32), executor.empty((capacity, 2), np.int32)
    limits = (UNBOUNDED if limit is None else limit for limit in (packed.max_seqlen_q, packed.max_seqlen_k))
    args = {
        "g_cu_seqlens_q": packed.cu_seqlens_q,
        "g_cu_seqlens_k": packed.cu_seqlens_k,
        "g_first_work": first_work,
        "g_work": result,
        "num_sequences": np.int32(packed.batch),
        "total_q": np.int32(total_q),
        "total_k": np.int32(total_k),
        **dict(zip(("max_seqlen_q", "max_seqlen_k"), map(np.int32, limits), strict=True)),
        "chunk_length": np.int32(length),
        "capacity": np.int32(capacity),
    }
    executor.launch(_schedule_kernel(executor, block), (1,), (SCHEDULE_THREADS,), args)
    executor.finish(first_work, result)
    return result


@cache
def _schedule_kernel(executor: Executor, block: int) -> Kernel:
    constants = {"BLOCK_M": block, "NUM_THREADS": SCHEDULE_THREADS}
    return executor.kernel("dual_chunk_schedule", constants, "cuattn_dual_chunk_schedule")
