"""Shapes of the Hopper forward kernel: one frozen row for each tuned shape, and legality.

A row may change speed, never results. Rows are listed in order of preference: `hopper_select` takes the first that
serves a call.

Examples
--------
>>> row = HOPPER_FWD_CONFIGS[0]
>>> row.block_m, row.num_threads, row.is_legal(128, 128, 227 * 1024)
(64, 256, True)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cuattn.dtypes import kernel_types
from cuattn.ops.attention.forward.config import FEW_QUERIES
from cuattn.ops.attention.variants import PLAIN, ForwardOptions

__all__ = [
    "ARCH",
    "BUCKETS",
    "HEAD_DIM_BUCKETS",
    "HOPPER_ALTERNATIVES",
    "HOPPER_FWD_CONFIGS",
    "MAX_HEAD_DIM",
    "HopperFwdConfig",
    "row_bytes",
]

#: The only architecture that has these instructions.
ARCH = "sm_90a"

#: Head dims that the kernel is compiled for. A smaller one is padded with zeros on the way into shared memory.
HEAD_DIM_BUCKETS = (64, 96, 128, 192, 256)
MAX_HEAD_DIM = HEAD_DIM_BUCKETS[-1]
#: The bucket of each head dim from 0 to `MAX_HEAD_DIM`.
BUCKETS = tuple(next(size for size in HEAD_DIM_BUCKETS if head_dim <= size) for head_dim in range(MAX_HEAD_DIM + 1))

WARPGROUP_SIZE = 128
WGMMA_ROWS = 64  # query rows of a warpgroup
SPAN_BYTES = 128  # of a row of a swizzled tile: wider tiles are several of them, one behind the other
STEP_BYTES = 32  # of the summed index, in one wgmma
SMEM_ALIGNMENT = 1024  # bytes after which the swizzle repeats
BARRIER_BYTES = 256  # room for the mbarriers behind the tiles
ROW_ENDS_BYTES = 8  # of a row: the first key that it sees, and the one behind the last
RESERVED_BYTES = 1024  # of shared memory, beside what a CTA asks for
REGISTERS = 65536  # of a multiprocessor
REGISTER_RANGE = range(24, 257, 8)  # what setmaxnreg takes


@dataclass(frozen=True, slots=True)
class HopperFwdConfig:
    """One shape of attention_forward_hopper.cu: a warpgroup that loads, and others that compute 64 queries each.

    Attributes
    ----------
    max_head_dim, max_head_dim_v : int
        The row serves head dims in these buckets or smaller ones.
    num_consumers : int
        Warpgroups that compute.
    block_n : int
        Keys of a tile.
    num_stages : int
        Tiles of k, and as many of v, in shared memory.
    producer_registers, consumer_registers : int
        Of a thread, once the warpgroups have divided the registers among themselves.
    ping_pong : bool
        Whether consumers take turns, so that one has the tensor cores while another computes exponentials.
    max_seqlen_q : int
        The row is meant for at most so many query rows (`FEW_QUERIES`); 0 is any number.
    score_options : bool
        Whether the row has registers to spare for softcap and ALiBi.
    chunks : bool
        Whether it has some for chunks.
    itemsize : int
        Of q, k and v: 2, or 1 for e4m3, whose values are transposed on the way (hopper/transpose_e4m3.cuh).
    ctas_per_sm : int
        CTAs that share a multiprocessor: 2, where one consumer alone would leave its tensor cores idle.
    """

    max_head_dim: int
    max_head_dim_v: int
    num_consumers: int
    block_n: int
    num_stages: int
    producer_registers: int
    consumer_registers: int
    ping_pong: bool = False
    max_seqlen_q: int = 0
    score_options: bool = True
    chunks: bool = True
    itemsize: int = 2
    ctas_per_sm: int = 1

    source = "attention_forward_hopper"
    entry = "cuattn_attention_forward_hopper"

    @property
    def block_m(self) -> int:
        """Query rows of a tile."""
        return WGMMA_ROWS * self.num_consumers

    @property
    def num_threads(self) -> int:
        return WARPGROUP_SIZE * (1 + self.num_consumers)

    @property
    def entry_registers(self) -> int:
        """Registers of a thread when the kernel starts: all that so many threads can have, in units of 8."""
        return REGISTERS // (self.num_threads * self.ctas_per_sm) // 8 * 8

    def smem_bytes(self, head_dim: int, head_dim_v: int, options: ForwardOptions = PLAIN) -> int:
        """Shared memory of a CTA for the buckets ``head_dim`` and ``head_dim_v``: tiles of q, k, v, then barriers and,
        with chunks, what the rows of a tile see.
        """
        qk_row, v_row = row_bytes(head_dim * self.itemsize), row_bytes(head_dim_v * self.itemsize)
        tiles = self.block_m * qk_row + self.num_stages * self.block_n * (qk_row + v_row)
        if self.itemsize == 1:  # values once more, transposed
            tiles += self.num_stages * head_dim_v * row_bytes(self.block_n)
        row_ends = ROW_ENDS_BYTES * self.block_m if options.chunk else 0
        return -(-(tiles + BARRIER_BYTES + row_ends) // SMEM_ALIGNMENT) * SMEM_ALIGNMENT

    def serves(self, head_dim: int, head_dim_v: int, options: ForwardOptions, num_rows: int, itemsize: int = 2) -> bool:
        """Whether the row is meant for a call: buckets of its head dims, its options, its query rows of a sequence."""
        return (
            itemsize == self.itemsize
            and head_dim <= self.max_head_dim
            and head_dim_v <= self.max_head_dim_v
            and (self.score_options or not options.on_scores)
            and (self.chunks or not options.chunk)
            and (self.max_seqlen_q == 0 or num_rows <= self.max_seqlen_q)
        )

    def is_legal(self, head_dim: int, head_dim_v: int, smem_limit_bytes: int, options: ForwardOptions = PLAIN) -> bool:
        """Whether the kernel compiles and launches in this shape (buckets as above)."""
        registers = self.producer_registers, self.consumer_registers
        divided = self.producer_registers + self.num_consumers * self.consumer_registers
        smem_bytes = self.smem_bytes(head_dim, head_dim_v, options)
        return (
            1 <= self.num_consumers <= 3
            and self.num_stages >= 2
            and self.block_n in range(STEP_BYTES // self.itemsize, 257, STEP_BYTES // self.itemsize)
            and all(number in REGISTER_RANGE for number in registers)
            and self.producer_registers <= self.entry_registers <= self.consumer_registers
            and divided * WARPGROUP_SIZE <= self.entry_registers * self.num_threads
            and not (self.ping_pong and self.num_consumers == 1)
            and (smem_bytes + RESERVED_BYTES) * self.ctas_per_sm <= smem_limit_bytes + RESERVED_BYTES
        )

    def constants(
        self,
        dtype_name: str,
        head_dim: int,
        head_dim_v: int,
        options: ForwardOptions = PLAIN,
        *,
        packed: bool = False,
        unrounded: bool = False,
        listed: bool = False,
    ) -> dict[str, Any]:
        """The kernel's compile-time constants. Head dims are buckets, the dtype is that of q; ``packed`` sequences.

        With ``unrounded`` the result is of the accumulator's type, with ``listed`` the tiles are those of a list.
        """
        types = kernel_types(dtype_name, "mma", unrounded=unrounded)
        return {
            "Element": types["Storage"],
            "Output": types["Output"],
            **options.constants(),
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "CHUNK": options.chunk,
            "CONSUMER_REGISTERS": self.consumer_registers,
            "CTAS_PER_SM": self.ctas_per_sm,
            "HEAD_DIM": head_dim,
            "HEAD_DIM_V": head_dim_v,
            "NUM_CONSUMERS": self.num_consumers,
            "NUM_STAGES": self.num_stages,
            "PACKED": packed,
            "PING_PONG": self.ping_pong,
            "PRODUCER_REGISTERS": self.producer_registers,
            "SMEM_BYTES": self.smem_bytes(head_dim, head_dim_v, options),
            "TILE_LIST": listed,
        }


def row_bytes(num_bytes: int) -> int:
    """Return the bytes of a row of a tile in shared memory: whole spans."""
    return -(-num_bytes // SPAN_BYTES) * SPAN_BYTES


def _row(
    head_dim: int,
    head_dim_v: int,
    num_consumers: int,
    block_n: int,
    registers: tuple[int, int] | None = None,
    **others: Any,
) -> HopperFwdConfig:
    """Make a row that divides the registers so that the consumers have the most and the producer has enough."""
    producer, consumer = registers or {1: (56, 256), 2: (40, 232), 3: (32, 160)}[num_consumers]
    return HopperFwdConfig(
        head_dim,
        head_dim_v,
        num_consumers,
        block_n,
        num_stages=2,
        producer_registers=producer,
        consumer_registers=consumer,
        **others,
    )


# In order of preference: rows for few queries, then the large ones by head dim. The accumulators of a thread take
# head_dim_v / 2 registers for the output, block_n / 2 for the scores and block_n / 4 for the probabilities.
HOPPER_FWD_CONFIGS = (
    _row(128, 128, 1, 128, max_seqlen_q=FEW_QUERIES),
    _row(256, 256, 1, 80, max_seqlen_q=FEW_QUERIES, score_options=False),
    _row(256, 256, 1, 64, max_seqlen_q=FEW_QUERIES),
    _row(64, 64, 3, 112, ping_pong=True),
    _row(96, 96, 2, 192, ping_pong=True),
    _row(128, 128, 2, 176, ping_pong=True, chunks=False),
    _row(128, 128, 2, 160, ping_pong=True),
    _row(192, 128, 2, 128),
    _row(192, 192, 2, 112),
    _row(256, 256, 2, 80, score_options=False),
    _row(256, 256, 2, 64),
    # e4m3: producers that transpose need registers of their own, probabilities half as many
    _row(128, 128, 1, 128, max_seqlen_q=FEW_QUERIES, itemsize=1),
    _row(256, 256, 1, 96, max_seqlen_q=FEW_QUERIES, itemsize=1),
    _row(64, 64, 2, 224, registers=(56, 224), ping_pong=True, itemsize=1),
    _row(96, 96, 2, 160, registers=(56, 224), ping_pong=True, itemsize=1),
    _row(128, 128, 2, 192, registers=(56, 224), ping_pong=True, itemsize=1),
    _row(192, 192, 2, 128, registers=(56, 224), itemsize=1),
    _row(256, 256, 2, 96, registers=(56, 224), chunks=False, itemsize=1),
    _row(256, 256, 2, 64, registers=(56, 224), itemsize=1),
)

#: Rows that are selected nowhere; `cuattn.tune` measures them as well.
HOPPER_ALTERNATIVES = (
    _row(64, 64, 3, 112),
    _row(64, 64, 2, 176, ping_pong=True),
    _row(96, 96, 2, 176, ping_pong=True),
    _row(128, 128, 2, 128, ping_pong=True),
)
