"""The prefix sum over a padding mask: which chunks, and the two launches."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuattn.addresses import address, as_bytes
from cuattn.runtime.arrays import contiguous, full
from cuattn.runtime.executor import Executor
from cuattn.runtime.structs import struct_layout

NUM_THREADS = 256
MAX_CHUNKS = 1024  # every CTA of the scan adds up the counts of all chunks
MIN_CHUNK_SLOTS = 1024


def scan(executor: Executor, mask: Any) -> tuple[Any, Any]:
    """Return all slots, tokens first, int32 [B * N], and cu_seqlens int32 [B + 1]."""
    batch, seqlen = mask.shape
    num_slots = batch * seqlen
    if num_slots == 0:
        return executor.empty(0, np.int32), full(executor, (batch + 1,), 0, np.int32)
    itemsize = mask.dtype.itemsize
    if any(stride % itemsize for stride in (address(mask), *mask.strides)):
        mask = contiguous(executor, mask)
    chunk_slots = max(MIN_CHUNK_SLOTS, -(-num_slots // MAX_CHUNKS))
    chunk_slots = -(-chunk_slots // NUM_THREADS) * NUM_THREADS
    num_chunks = -(-num_slots // chunk_slots)
    batch_stride, seq_stride = mask.strides
    layout = struct_layout("padding_plan", "MaskLayout").pack(
        batch_stride=batch_stride,
        seq_stride=seq_stride,
        item_bytes=itemsize,
        seqlen=seqlen,
        num_slots=num_slots,
        chunk_slots=chunk_slots,
    )
    counts = executor.empty(num_chunks, np.int32)
    order, cu_seqlens = executor.empty(num_slots, np.int32), executor.empty(batch + 1, np.int32)
    count, place = (
        executor.kernel("padding_plan", {"NUM_THREADS": NUM_THREADS}, f"cuattn_padding_{name}")
        for name in ("count", "scan")
    )
    args = {"g_mask": as_bytes(mask), "g_counts": counts, "layout": layout}
    executor.launch(count, (num_chunks,), (NUM_THREADS,), args)
    args |= {"g_order": order, "g_cu_seqlens": cu_seqlens}
    executor.launch(place, (num_chunks,), (NUM_THREADS,), args)
    executor.finish(order, cu_seqlens)
    return order, cu_seqlens
