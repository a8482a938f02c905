"""Which kernel shape runs: one frozen row for each tuned shape, legality, and selection.

A row may change speed, never results. Rows are listed in order of preference; `select` takes the first that is legal,
so an architecture with little shared memory falls through to a smaller row.

Examples
--------
>>> import numpy as np
>>> select(np.dtype(np.float16), 64, 64, seqlen_q=4096, smem_limit_bytes=163 * 1024).block_n
64
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

from cuattn.errors import LaunchError

#: Head dims that kernels are compiled for. A smaller one runs in the next larger bucket, padded on chip.
HEAD_DIM_BUCKETS = (32, 64, 96, 128, 192, 256)
MAX_HEAD_DIM = HEAD_DIM_BUCKETS[-1]
#: The bucket of each head dim from 0 to 256.
BUCKETS = tuple(next(size for size in HEAD_DIM_BUCKETS if head_dim <= size) for head_dim in range(MAX_HEAD_DIM + 1))

#: Element types in CUDA C, and the type that a kernel accumulates in, by dtype name.
ELEMENTS = {
    "float16": ("__half", "float"),
    "bfloat16": ("__nv_bfloat16", "float"),
    "float32": ("float", "float"),
    "float64": ("double", "double"),
}
DTYPES = frozenset(map(np.dtype, (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)))

WARP_SIZE = 32
MMA_ROWS = 16  # query rows of one mma.m16n8k16
FMA_ROWS = 8  # query rows of a warp of attention_forward_f32.cu
FEW_QUERIES = 64  # so many or fewer do not fill the query tile of the large rows
ROW_PADDING_BYTES = 16  # of each row of a tile in shared memory (tiles.cuh)


@dataclass(frozen=True, slots=True)
class FlashFwdConfig:
    """One shape of the forward kernels.

    Attributes
    ----------
    itemsize : int
        Bytes of an element: 2 is the tensor-core kernel, 4 and 8 the one of fused multiply-adds.
    max_head_dim : int
        The row serves problems whose larger head dim falls into this bucket or a smaller one.
    block_m, block_n : int
        Queries and keys of a tile.
    num_warps : int
        Warps of a CTA.
    num_stages : int
        Key tiles in shared memory; 1 alternates the loads of k and v with the two products.
    max_seqlen_q : int
        The row is meant for at most so many queries (`FEW_QUERIES`); 0 is any number.
    """

    itemsize: int
    max_head_dim: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_seqlen_q: int = 0

    @property
    def source(self) -> str:
        """Name of the kernel file."""
        return "attention_forward" if self.itemsize == 2 else "attention_forward_f32"

    @property
    def entry(self) -> str:
        """Name of the kernel."""
        return f"cuattn_{self.source}"

    @property
    def num_threads(self) -> int:
        return self.num_warps * WARP_SIZE

    def smem_bytes(self, head_dim: int, head_dim_v: int) -> int:
        """Shared memory of a CTA for the buckets ``head_dim`` and ``head_dim_v``: ``sizeof(Smem)`` of the kernel."""
        qk_row = head_dim * self.itemsize + ROW_PADDING_BYTES
        v_row = head_dim_v * self.itemsize + ROW_PADDING_BYTES
        tiles = self.block_m * qk_row + self.num_stages * self.block_n * (qk_row + v_row)
        if self.itemsize == 2:  # the output tile takes the place of the others
            return max(tiles, self.block_m * v_row)
        return tiles + self.block_m * (self.block_n * self.itemsize + ROW_PADDING_BYTES)  # the probabilities

    def is_legal(self, head_dim: int, head_dim_v: int, smem_limit_bytes: int) -> bool:
        """Whether the kernel compiles and launches in this shape (buckets as above)."""
        if self.itemsize == 2:
            tiling = self.block_m % (MMA_ROWS * self.num_warps) == 0 and self.num_stages >= 2
        else:
            tiling = self.block_m == FMA_ROWS * self.num_warps and self.num_stages == 1
        fits = self.smem_bytes(head_dim, head_dim_v) <= smem_limit_bytes
        return tiling and self.block_n % 16 == 0 and self.num_threads <= 1024 and fits

    def constants(self, dtype_name: str, head_dim: int, head_dim_v: int, **flags: bool) -> dict[str, Any]:
        """The kernel's compile-time constants; ``flags`` are CAUSAL and ALIGNED."""
        constants: dict[str, Any] = {
            "Element": ELEMENTS[dtype_name][0],
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "HEAD_DIM": head_dim,
            "HEAD_DIM_V": head_dim_v,
            "NUM_WARPS": self.num_warps,
            "SMEM_BYTES": self.smem_bytes(head_dim, head_dim_v),
            **flags,
        }
        if self.itemsize == 2:
            constants["NUM_STAGES"] = self.num_stages
        return constants


@dataclass(frozen=True, slots=True)
class PlainFwdConfig:
    """The shape of attention_plain.cu, the kernel that is written to be read: one query a warp, no shared memory."""

    num_warps: int = 4

    source = "attention_plain"
    entry = "cuattn_attention_plain"

    @property
    def block_m(self) -> int:
        return self.num_warps

    @property
    def num_threads(self) -> int:
        return self.num_warps * WARP_SIZE

    def smem_bytes(self, head_dim: int, head_dim_v: int) -> int:
        return 0

    def constants(self, dtype_name: str, head_dim: int, head_dim_v: int, **flags: bool) -> dict[str, Any]:
        """The kernel's compile-time constants: it takes any head dim and any alignment."""
        element, accumulator = ELEMENTS[dtype_name]
        return {
            "Element": element,
            "Accumulator": accumulator,
            "NUM_WARPS": self.num_warps,
            "CAUSAL": flags["CAUSAL"],
        }


# In order of preference: a row for few queries, then the large one, then what fits into 99 KB of shared memory.
FLASH_FWD_CONFIGS = (
    # 16 bit. Two row tiles a warp where the registers allow it: a fragment of k or v then serves two mma.
    FlashFwdConfig(2, 128, block_m=64, block_n=64, num_warps=4, num_stages=2, max_seqlen_q=FEW_QUERIES),
    FlashFwdConfig(2, 256, block_m=64, block_n=32, num_warps=4, num_stages=2, max_seqlen_q=FEW_QUERIES),
    FlashFwdConfig(2, 64, block_m=128, block_n=64, num_warps=4, num_stages=2),
    FlashFwdConfig(2, 192, block_m=128, block_n=64, num_warps=8, num_stages=2),
    FlashFwdConfig(2, 128, block_m=128, block_n=32, num_warps=4, num_stages=2),
    FlashFwdConfig(2, 256, block_m=128, block_n=32, num_warps=8, num_stages=2),
    FlashFwdConfig(2, 256, block_m=64, block_n=32, num_warps=4, num_stages=2),
    # float32
    FlashFwdConfig(4, 64, block_m=64, block_n=64, num_warps=8, num_stages=1),
    FlashFwdConfig(4, 256, block_m=64, block_n=32, num_warps=8, num_stages=1),
    FlashFwdConfig(4, 256, block_m=32, block_n=16, num_warps=4, num_stages=1),
    # float64
    FlashFwdConfig(8, 64, block_m=64, block_n=32, num_warps=8, num_stages=1),
    FlashFwdConfig(8, 192, block_m=32, block_n=16, num_warps=4, num_stages=1),
    FlashFwdConfig(8, 256, block_m=16, block_n=16, num_warps=2, num_stages=1),
)


def select(
    dtype: np.dtype[Any], head_dim: int, head_dim_v: int, *, seqlen_q: int, smem_limit_bytes: int
) -> FlashFwdConfig:
    """The row for a problem.

    Parameters
    ----------
    dtype : numpy.dtype
        Of q, k and v.
    head_dim, head_dim_v : int
        The buckets of D and E.
    seqlen_q : int
        Queries of a sequence.
    smem_limit_bytes : int
        Shared memory that one CTA may use.

    Raises
    ------
    LaunchError
        No row fits into the shared memory.
    """
    few = FEW_QUERIES if seqlen_q <= FEW_QUERIES else 0
    return _select(dtype.itemsize, head_dim, head_dim_v, few, smem_limit_bytes)


@cache
def _select(itemsize: int, head_dim: int, head_dim_v: int, few: int, smem_limit_bytes: int) -> FlashFwdConfig:
    for row in FLASH_FWD_CONFIGS:
        if (
            row.itemsize == itemsize
            and max(head_dim, head_dim_v) <= row.max_head_dim
            and row.max_seqlen_q in (0, few)
            and row.is_legal(head_dim, head_dim_v, smem_limit_bytes)
        ):
            return row
    raise LaunchError(
        f"attention with head dims up to {head_dim} and {head_dim_v} needs more shared memory than the "
        f"{smem_limit_bytes} bytes that a CTA may use"
    )
