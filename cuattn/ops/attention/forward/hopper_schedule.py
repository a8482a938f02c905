"""What the CTAs of the Hopper kernel are told about their tiles: HopperSchedule of kernels/hopper/query_tile.cuh.

Its CTAs are persistent: as many as there are multiprocessors, and each takes every so-many-th tile of one list. The
list is ordered so that the keys and values of the heads whose tiles run at the same time stay in the L2 cache.

Examples
--------
>>> extents = Extents(1, 4096, 4096, 32, 8, 128, 128)
>>> dense_schedule(extents, pack=1, block_m=128, itemsize=2, l2_bytes=4 << 20)
HopperSchedule(num_tiles=1024, num_blocks=32, heads_at_once=8, pack=1)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cuattn.ops.attention.arguments import Extents
from cuattn.runtime.structs import struct_layout

__all__ = ["HopperSchedule", "dense_schedule", "pack_heads", "packed_schedule"]

#: Heads are packed where tiles are so much fuller for it. Where they are not, packing costs and gains nothing.
_FULLER = 1.1


@dataclass(frozen=True, slots=True)
class HopperSchedule:
    """How the tiles of a call are ordered: the fields of the struct of the kernel.

    Attributes
    ----------
    num_tiles : int
    num_blocks : int
        Blocks of queries of a sequence; of packed sequences, the entries of the list of work.
    heads_at_once : int
        Heads whose tiles run side by side, counted in packs.
    pack : int
        Query heads of one key/value head that share a tile.
    """

    num_tiles: int
    num_blocks: int
    heads_at_once: int
    pack: int

    def argument(self) -> np.void:
        """Return the schedule as a scalar that both executors pass by value."""
        return struct_layout("attention_forward_hopper", "HopperSchedule").pack(
            num_tiles=self.num_tiles, num_blocks=self.num_blocks, heads_at_once=self.heads_at_once, pack=self.pack
        )


def pack_heads(seqlen_q: int, heads_per_kv_head: int, block_m: int) -> int:
    """Choose how many query heads of a key/value head share a tile: all of them or 1.

    All, where a tile can hold as many queries of each, and where whole tiles of one head would be emptier.

    >>> pack_heads(1, 8, 64), pack_heads(4096, 8, 128), pack_heads(1, 7, 64)
    (8, 1, 1)
    """
    if heads_per_kv_head == 1 or block_m % heads_per_kv_head:
        return 1
    together = -(-seqlen_q * heads_per_kv_head // block_m)
    apart = heads_per_kv_head * -(-seqlen_q // block_m)
    return heads_per_kv_head if apart >= _FULLER * together else 1


def dense_schedule(extents: Extents, *, pack: int, block_m: int, itemsize: int, l2_bytes: int) -> HopperSchedule:
    """Make the schedule of a batch of equal lengths: heads in groups whose keys and values fit into ``l2_bytes``."""
    num_blocks = -(-extents.seqlen_q // (block_m // pack))
    num_packs = extents.batch * (extents.num_heads // pack)
    kv_head_bytes = extents.seqlen_k * (extents.head_dim + extents.head_dim_v) * itemsize
    kv_heads_at_once = max(1, l2_bytes // kv_head_bytes)
    heads_at_once = kv_heads_at_once * (extents.heads_per_kv_head // pack)
    return HopperSchedule(num_packs * num_blocks, num_blocks, min(num_packs, heads_at_once), pack)


def packed_schedule(extents: Extents, *, pack: int, num_work: int) -> HopperSchedule:
    """Make the schedule of packed sequences: a list of work says the order, and each entry is done for all heads."""
    num_packs = extents.num_heads // pack
    return HopperSchedule(num_packs * num_work, num_work, num_packs, pack)
