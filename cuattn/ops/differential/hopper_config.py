"""Shapes of the Hopper kernel of differential attention, and which calls it takes.

A row may change speed, never results. Rows are listed in order of preference: `select` takes the first that serves a
call. The rule: what the Hopper kernel of attention takes (`hopper_select.why_not`), with head dims up to 128 for
queries and 256 for values. Every other call takes the portable kernels, with the same results.

Examples
--------
>>> row = HOPPER_DIFFERENTIAL_CONFIGS[0]
>>> row.block_m, row.num_threads, row.is_legal(64, 128, 227 * 1024, shared_keys=False)
(64, 384, True)
>>> row.is_legal(128, 128, 227 * 1024, shared_keys=False)
False
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from cuattn import compile
from cuattn.dtypes import ELEMENT_TYPES
from cuattn.errors import LaunchError, NotSupportedError
from cuattn.ops.attention.forward import hopper_select
from cuattn.ops.attention.forward.hopper_config import (
    ARCH,
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
from cuattn.ops.attention.variants import PLAIN, ForwardOptions
from cuattn.ops.differential.arguments import DifferentialProblem

__all__ = ["HOPPER_DIFFERENTIAL_CONFIGS", "HopperDifferentialConfig", "require", "select", "select_row", "why_not"]

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
    block_n : int
        Keys of a tile.
    num_stages : int
        Tiles of k, and as many of v, in shared memory.
    producer_registers, consumer_registers : int
        Of a thread, once the warpgroups have divided the registers among themselves.
    ping_pong : bool
        Whether the streams take turns, so that one has the tensor cores while the other computes exponentials.
    """

    max_head_dim: int
    max_head_dim_v: int
    block_n: int
    num_stages: int = 2
    producer_registers: int = 40
    consumer_registers: int = 232
    ping_pong: bool = True

    source = "differential_attention_hopper"
    entry = "cuattn_differential_attention_hopper"

    block_m = WGMMA_ROWS  # queries of a tile
    num_threads = WARPGROUP_SIZE * (1 + _STREAMS)

    def smem_bytes(self, head_dim: int, head_dim_v: int, *, shared_keys: bool) -> int:
        """Shared memory of a CTA for two buckets: tiles of q, k and v, the output that one stream leaves for the other,
        and barriers.
        """
        qk_row, v_row = row_bytes(head_dim * _ITEMSIZE), row_bytes(head_dim_v * _ITEMSIZE)
        key_streams = 1 if shared_keys else _STREAMS
        tiles = _STREAMS * self.block_m * qk_row + self.num_stages * self.block_n * (key_streams * qk_row + v_row)
        total = tiles + self.block_m * head_dim_v * _ACCUMULATOR_BYTES + BARRIER_BYTES
        return -(-total // SMEM_ALIGNMENT) * SMEM_ALIGNMENT

    def is_legal(self, head_dim: int, head_dim_v: int, smem_limit_bytes: int, *, shared_keys: bool) -> bool:
        """Whether the kernel compiles and launches in this shape (buckets as above)."""
        registers = self.producer_registers, self.consumer_registers
        entry = REGISTERS // self.num_threads // 8 * 8  # of a thread when the kernel starts
        return (
            self.num_stages >= 2
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


# In order of preference. The accumulators of a thread take head_dim_v / 2 registers for the output, block_n / 2 for the
# scores and block_n / 4 for the probabilities. What has no place in shared memory takes the next row.
HOPPER_DIFFERENTIAL_CONFIGS = (
    HopperDifferentialConfig(128, 128, block_n=128),
    HopperDifferentialConfig(128, 128, block_n=96),
    HopperDifferentialConfig(128, 256, block_n=64),
)


def why_not(problem: DifferentialProblem, arch: str, smem_limit_bytes: int) -> str | None:
    """Say why the Hopper kernel, where kernels are compiled for ``arch``, does not take a call; None if it does."""
    reason = hopper_select.why_not(problem, arch)
    if reason is not None or select(problem, smem_limit_bytes) is not None:
        return reason
    extents = problem.extents
    return f"no shape of it serves head dims {extents.head_dim} and {extents.head_dim_v}"


def select(problem: DifferentialProblem, smem_limit_bytes: int) -> HopperDifferentialConfig | None:
    """Select the row for a call; None where none serves it."""
    extents = problem.extents
    return select_row(BUCKETS[extents.head_dim], BUCKETS[extents.head_dim_v], extents.shared_keys, smem_limit_bytes)


@cache
def select_row(
    head_dim: int, head_dim_v: int, shared_keys: bool, smem_limit_bytes: int
) -> HopperDifferentialConfig | None:
    """Select the row for two buckets; None where there is none."""
    for row in HOPPER_DIFFERENTIAL_CONFIGS:
        meant = head_dim <= row.max_head_dim and head_dim_v <= row.max_head_dim_v
        if meant and row.is_legal(head_dim, head_dim_v, smem_limit_bytes, shared_keys=shared_keys):
            return row
    return None


def require(problem: DifferentialProblem, row: HopperDifferentialConfig) -> None:
    """Raise `NotSupportedError` or `LaunchError` unless a row that was asked for can take a call.

    Whatever architecture the host executor is set to, it can run this kernel as compiled for its own.
    """
    extents, arch = problem.extents, ARCH if problem.executor.name == "host" else problem.executor.arch
    reason = hopper_select.why_not(problem, arch)
    if reason is not None:
        raise NotSupportedError(f"the Hopper kernel does not take this call: {reason}")
    head_dims = BUCKETS[extents.head_dim], BUCKETS[extents.head_dim_v]
    if not row.is_legal(*head_dims, compile.smem_limit_bytes(arch), shared_keys=extents.shared_keys):
        raise LaunchError(f"{row} is not legal for head dims {extents.head_dim} and {extents.head_dim_v}")
