"""What a decode call is expected to cost, as far as its splits decide it: docs/theory/flash-decoding.md says why.

The unit of time is what one multiprocessor (SM) needs to draw one tile of keys and values at its even share of the
memory bandwidth. Decoding does little else: a CTA of t tiles takes t units where it has its share for itself, longer
where several CTAs share it, and a fixed cost before and after.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cuattn.compile import occupancy
from cuattn.ops.decode.config import compiled_dims

if TYPE_CHECKING:
    from cuattn.formats import KVFormat
    from cuattn.ops.decode.config import FlashDecodeConfig

__all__ = ["CostModel", "Items", "cost_model"]

# What an SM draws, at its share of the bandwidth (36 GB/s on an H200, 19 on an A100), during ...
CTA_BYTES = 32 * 1024  # ... the fixed part of a CTA: its queries, the first tile under way, its results; about 1 us
REDUCE_BYTES = 96 * 1024  # ... the launch of another kernel, and its first loads; 2 to 3 us
# ... the latency of memory (0.8 us): a CTA with fewer bytes under way does not even draw its share.
SATURATING_BYTES = 32 * 1024
REGISTERS = {"mma": 168, "fma": 224}  # of a thread, about: ptxas says 158 to 248 and 221


@dataclass(frozen=True, slots=True, eq=False)
class CostModel:
    """The machine and the kernel, in tiles.

    Attributes
    ----------
    num_sms, ctas_per_sm : int
        Multiprocessors, and CTAs that fit on one.
    block_n : int
        Keys of a tile.
    cta_cost, reduce_cost, partial_cost : float
        The fixed cost of a CTA; that of the merge; and what it adds for the partial results of each CTA.
    top_speed : float
        Tiles in a unit of time that a CTA reaches when nothing else runs, at most 1.
    read_once : float
        The part of what CTAs read that is left when keys that several CTAs read, for a part of the columns of the
        result each, are counted once.
    """

    num_sms: int
    ctas_per_sm: int
    block_n: int
    cta_cost: float
    reduce_cost: float
    partial_cost: float
    top_speed: float
    read_once: float = 1.0

    @property
    def num_slots(self) -> int:
        """Number of CTAs that run at the same time."""
        return self.num_sms * self.ctas_per_sm

    def even(
        self, num_ctas: NDArray[np.int64], tiles: NDArray[np.int64], split: NDArray[np.bool_]
    ) -> NDArray[np.float64]:
        """Return the time of ``num_ctas`` CTAs of ``tiles`` tiles each, in waves; with a merge if ``split``."""
        waves, rest = np.divmod(num_ctas, self.num_slots)
        full = tiles / self._speed(self.num_slots) + self.cta_cost
        last = np.where(rest > 0, tiles / self._speed(np.maximum(rest, 1)) + self.cta_cost, 0)
        return waves * full + last + self._merge(num_ctas, split)

    def uneven(self, items: Items) -> NDArray[np.float64]:
        """Return the time of CTAs of different sizes, the largest first."""
        alone = items.most_tiles / self.top_speed + self.cta_cost
        # One wave shares the bandwidth. More fill every slot, and end as unevenly as the smallest of them are large.
        shared = items.total_tiles / self.num_sms + self.cta_cost
        full = self._speed(self.num_slots)
        queued = (items.total_tiles / full + items.num_ctas * self.cta_cost) / self.num_slots
        queued = queued + (items.fewest_tiles / full + self.cta_cost) / 2
        time = np.maximum(alone, np.where(items.num_ctas <= self.num_slots, shared, queued))
        return time + self._merge(items.num_ctas, items.split)

    def least(self, total_tiles: float) -> float:
        """Return the time in which the keys and values can be read at all."""
        return self.read_once * total_tiles / self.num_sms

    def _speed(self, num_ctas: int | NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the speed of each of so many CTAs that run at the same time."""
        return np.minimum(self.top_speed, self.num_sms / np.asarray(num_ctas))

    def _merge(self, num_ctas: NDArray[np.int64], split: NDArray[np.bool_]) -> NDArray[np.float64]:
        return np.where(split, self.reduce_cost + num_ctas * (self.partial_cost / self.num_sms), 0.0)


@dataclass(frozen=True, slots=True)
class Items:
    """The CTAs of some candidates, an entry each: how many, and their tiles."""

    num_ctas: NDArray[np.int64]
    total_tiles: float  # the same for all
    most_tiles: NDArray[np.int64]
    fewest_tiles: NDArray[np.int64]
    split: NDArray[np.bool_]


@cache
def cost_model(
    config: FlashDecodeConfig,
    kv_format: KVFormat,
    head_dim: int,
    head_dim_v: int,
    rows: int,
    itemsize: int,
    *,
    arch: str,
    num_sms: int,
) -> CostModel:
    """Make the model for a kernel shape on a machine.

    ``rows`` is the most query rows that a CTA has, ``itemsize`` that of the accumulator.
    """
    bucket, columns, column_blocks = compiled_dims(head_dim, head_dim_v)
    key_bytes, value_bytes = kv_format.bytes_per_head(head_dim), kv_format.bytes_per_head(head_dim_v)
    tile_bytes = config.block_n * (key_bytes + value_bytes / column_blocks)
    smem_bytes = config.smem_bytes(bucket, columns, kv_format)
    ctas = occupancy.ctas_per_sm(
        arch, num_threads=config.num_threads, registers=REGISTERS[config.products], smem_bytes=smem_bytes
    )
    return CostModel(
        num_sms=num_sms,
        ctas_per_sm=max(ctas, 1),
        block_n=config.block_n,
        cta_cost=CTA_BYTES / tile_bytes,
        reduce_cost=REDUCE_BYTES / tile_bytes,
        partial_cost=2 * rows * (head_dim_v / column_blocks + 2) * itemsize / tile_bytes,  # written, and read
        top_speed=min(1.0, max(config.num_stages - 1, 1) * tile_bytes / SATURATING_BYTES),
        read_once=(key_bytes + value_bytes) / (column_blocks * key_bytes + value_bytes),
    )
