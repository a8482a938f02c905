"""Shapes of the Hopper kernel of differential attention, and which calls it takes.

A row may change speed, never results. Rows are listed in order of preference: `select` takes the first that serves a
call. The rule: what the Hopper kernel of attention takes (`hopper_select.why_not`), and head dims for which tiles of
both streams fit into shared memory. Every other call takes the portable kernels, with the same results.

Examples
--------
>>> row = HOPPER_DIFFERENTIAL_CONFIGS[0]
>>> row.block_m, row.num_threads, row.is_legal(64, 128, 227 * 1024, shared_keys=False)
(64, 384, True)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from cuattn.dtypes import ELEMENT_TYPES
from cuattn.ops.attention.forward.hopper_config import (
    BARRIER_BYTES,
    BUCKETS,
    REGISTER_RANGE,
    REGISTERS,
    SMEM_ALIGNMENT,
    STEP_BYTES,
    WARPGROUP_SIZE,
    WGMMA_ROWS,
    row_bytes,
)
from cuattn.ops.attention.forward import hopper_select
from cuattn.ops.attention.variants import PLAIN, ForwardOptions
from cuattn.ops.differential.arguments import DifferentialProblem

__all__ = ["HOPPER_DIFFERENTIAL_CONFIGS", "HopperDifferentialConfig", "select", "why_not"]

_STREAMS = 2  # a warpgroup for each
_ITEMSIZE = 2
_ACCUMULATOR_BYTES = 4


@dataclass(frozen=True, slots=True)
class HopperDifferentialConfig:
    """One shape of differential_attention_hopper.cu: a warpgroup that loads, and one for each stream.

    Attributes
    ----------
    max_head_dim, max_head_dim_v : int
        The row serves head dims in these buckets or smaller ones.
    row_tiles : int
        Tiles of 64 queries that a warpgroup computes side by side.
    block_n : int
        Keys of a tile.
    num_stages : int
        Tiles of k, and as many of v, in shared memory.
    producer_registers, consumer_registers : int
        Of a thread, once the warpgroups have divided the registers among themselves.
    ping_pong : bool
        Whether the streams take turns, so that one has the tensor cores while the other computes exponentials.
    score_options : bool
        Whether the row has registers to spare for softcap and ALiBi.
    """

    max_head_dim: int
    max_head_dim_v: int
    row_tiles: int
    block_n: int
    num_stages: int = 2
    producer_registers: int = 40
    consumer_registers: int = 232
    ping_pong: bool = True
    score_options: bool = True

    source = "differential_attention_hopper"
    entry = "cuattn_differential_attention_hopper"

    @property
    def block_m(self) -> int:
        """Queries of a tile."""
        return WGMMA_ROWS * self.row_tiles

    @property
    def num_threads(self) -> int:
        return WARPGROUP_SIZE * (1 + _STREAMS)

    def smem_bytes(self, head_dim: int, head_dim_v: int, *, shared_keys: bool) -> int:
        """Shared memory of a CTA for two buckets: tiles of q, k and v, the output that one stream leaves for the other,
        and barriers.
        """
        qk_row, v_row = row_bytes(head_dim * _ITEMSIZE), row_bytes(head_dim_v * _ITEMSIZE)
        key_streams = 1 if shared_keys else _STREAMS
        tiles = _STREAMS * self.block_m * qk_row + self.num_stages * self.block_n * (key_streams * qk_row + v_row)
        total = tiles + self.block_m * head_dim_v * _ACCUMULATOR_BYTES + BARRIER_BYTES
        return -(-total // SMEM_ALIGNMENT) * SMEM_ALIGNMENT

    def serves(self, head_dim: int, head_dim_v: int, options: ForwardOptions) -> bool:
        """Whether the row is meant for a call: buckets of its head dims, its options."""
        return (
            head_dim <= self.max_head_dim
            and head_dim_v <= self.max_head_dim_v
            and (self.score_options or not options.on_scores)
        )

    def is_legal(self, head_dim: int, head_dim_v: int, smem_limit_bytes: int, *, shared_keys: bool) -> bool:
        """Whether the kernel compiles and launches in this shape (buckets as above)."""
        registers = self.producer_registers, self.consumer_registers
        entry = REGISTERS // self.num_threads // 8 * 8  # of a thread when the kernel starts
        return (
            self.row_tiles in (1, 2)
            and self.num_stages >= 2
            and self.block_n in range(STEP_BYTES // _ITEMSIZE, 257, STEP_BYTES // _ITEMSIZE)
            and all(number in REGISTER_RANGE for number in registers)
            and self.producer_registers <= entry <= self.consumer_registers
            and self.producer_registers + _STREAMS * self.consumer_registers <= entry * (1 + _STREAMS)
            and self.smem_bytes(head_dim, head_dim_v, shared_keys=shared_keys) <= smem_limit_bytes
        )

    def constants(
        self,
        dtype_name: str,
        head_dim: int,
        head_dim_v: int,
        options: ForwardOptions = PLAIN,
        *,
        shared_keys: bool = False,
    ) -> dict[str, Any]:
        """The kernel's compile-time constants. Head dims are buckets."""
        return {
            "Element": ELEMENT_TYPES[dtype_name],
            **options.constants(),
            "SHARED_KEYS": shared_keys,
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "CONSUMER_REGISTERS": self.consumer_registers,
            "HEAD_DIM": head_dim,
            "HEAD_DIM_V": head_dim_v,
            "NUM_STAGES": self.num_stages,
            "PING_PONG": self.ping_pong,
            "PRODUCER_REGISTERS": self.producer_registers,
            "SMEM_BYTES": self.smem_bytes(head_dim, head_dim_v, shared_keys=shared_keys),
        }


HOPPER_DIFFERENTIAL_CONFIGS = (
    HopperDifferentialConfig(64, 128, row_tiles=1, block_n=128),
    HopperDifferentialConfig(128, 128, row_tiles=1, block_n=96),
    HopperDifferentialConfig(128, 256, row_tiles=1, block_n=64, score_options=False),
)


def why_not(problem: DifferentialProblem, arch: str, smem_limit_bytes: int) -> str | None:
    """Say why the Hopper kernel, where kernels are compiled for ``arch``, does not take a call; None if it does."""
    reason = hopper_select.why_not(problem, arch)
    if reason is not None or select(problem, smem_limit_bytes) is not None:
        return reason
    extents = problem.extents
    return f"no shape of it serves head dims {extents.head_dim} and {extents.head_dim_v} with the call's options"


def select(problem: DifferentialProblem, smem_limit_bytes: int) -> HopperDifferentialConfig | None:
    """Select the row for a call; None where none serves it."""
    extents = problem.extents
    head_dims = BUCKETS[extents.head_dim], BUCKETS[extents.head_dim_v]
    return select_row(*head_dims, hopper_select.kernel_options(problem.options), extents.shared_keys, smem_limit_bytes)


@cache
def select_row(
    head_dim: int, head_dim_v: int, options: ForwardOptions, shared_keys: bool, smem_limit_bytes: int
) -> HopperDifferentialConfig | None:
    """Select the row for two buckets and options; None where there is none."""
    for row in HOPPER_DIFFERENTIAL_CONFIGS:
        legal = row.is_legal(head_dim, head_dim_v, smem_limit_bytes, shared_keys=shared_keys)
        if legal and row.serves(head_dim, head_dim_v, options):
            return row
    return None
