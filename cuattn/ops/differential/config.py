"""Which shape of the kernels of differential attention runs: one frozen row for each tuned shape, and selection.

A row may change speed, never results. Rows are listed in order of preference; `select` takes the first that is legal.

Examples
--------
>>> select(np.dtype(np.float16), 64, 128, shared_keys=False, seqlen_q=4096, smem_limit_bytes=163 * 1024).block_m
128
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from cuattn.dtypes import ELEMENT_TYPES, WARP_SIZE
from cuattn.errors import LaunchError
from cuattn.ops.attention.forward.config import FEW_QUERIES, FMA_ROWS, MMA_ROWS, ROW_PADDING_BYTES
from cuattn.ops.attention.variants import PLAIN, ForwardOptions

__all__ = ["DIFFERENTIAL_CONFIGS", "DifferentialConfig", "select"]


@dataclass(frozen=True, slots=True)
class DifferentialConfig:
    """One shape of the kernels.

    Attributes
    ----------
    products : "mma" or "fma"
        Who multiplies: tensor cores (16-bit elements), or IEEE fused multiply-adds.
    itemsize : int
        Bytes of an element.
    max_head_dim, max_head_dim_v : int
        The row serves head dims in these buckets or smaller ones.
    block_m, block_n : int
        Queries and keys of a tile.
    num_warps : int
        Warps of a CTA, half of them for each stream.
    num_stages : int
        Key tiles in shared memory. Of "fma", 1 alternates the loads of k and v with the two products, and with 0 there
        is room for k or v, not for both.
    max_seqlen_q : int
        The row is meant for at most so many queries; 0 is any number.
    score_options : bool
        Whether the row has registers to spare for softcap, ALiBi, bias, mask and dropout.
    """

    products: str
    itemsize: int
    max_head_dim: int
    max_head_dim_v: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_seqlen_q: int = 0
    score_options: bool = True

    @property
    def source(self) -> str:
        """Name of the kernel file."""
        return "differential_attention" if self.products == "mma" else "differential_attention_fma"

    @property
    def entry(self) -> str:
        """Name of the kernel."""
        return f"cuattn_{self.source}"

    @property
    def num_threads(self) -> int:
        return self.num_warps * WARP_SIZE

    def smem_bytes(self, head_dim: int, head_dim_v: int, *, shared_keys: bool) -> int:
        """Shared memory of a CTA for two buckets: ``sizeof(Smem)`` of the kernel."""
        qk_row = head_dim * self.itemsize + ROW_PADDING_BYTES
        v_row = head_dim_v * self.itemsize + ROW_PADDING_BYTES
        keys = self.block_n * qk_row * (1 if shared_keys else 2)
        values = self.block_n * v_row
        queries = 2 * self.block_m * qk_row
        if self.products == "mma":  # a row of the outputs in float takes the place of two of elements
            return max(queries + self.num_stages * (keys + values), 2 * self.block_m * v_row)
        probabilities = 2 * self.block_m * (self.block_n * self.itemsize + ROW_PADDING_BYTES)
        place = keys + values if self.num_stages else max(keys, values)
        return queries + max(place, self.block_m * v_row) + probabilities

    def is_legal(self, head_dim: int, head_dim_v: int, smem_limit_bytes: int, *, shared_keys: bool) -> bool:
        """Whether the kernel compiles and launches in this shape (buckets as above)."""
        stream_warps = self.num_warps // 2
        if self.products == "mma":
            tiling = self.block_m % (MMA_ROWS * stream_warps) == 0 and self.num_stages >= 2
        else:
            tiling = self.block_m in (rows * stream_warps for rows in FMA_ROWS) and self.num_stages <= 1
        fits = self.smem_bytes(head_dim, head_dim_v, shared_keys=shared_keys) <= smem_limit_bytes
        return tiling and self.num_warps % 2 == 0 and self.block_n % 16 == 0 and self.num_threads <= 1024 and fits

    def constants(
        self,
        dtype_name: str,
        head_dim: int,
        head_dim_v: int,
        options: ForwardOptions = PLAIN,
        *,
        shared_keys: bool = False,
        aligned: bool = True,
    ) -> dict[str, Any]:
        """The kernel's compile-time constants. Head dims are buckets."""
        constants: dict[str, Any] = {
            "Element": ELEMENT_TYPES[dtype_name],
            **options.constants(),
            "SHARED_KEYS": shared_keys,
            "ALIGNED": aligned,
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "HEAD_DIM": head_dim,
            "HEAD_DIM_V": head_dim_v,
            "NUM_WARPS": self.num_warps,
            "SMEM_BYTES": self.smem_bytes(head_dim, head_dim_v, shared_keys=shared_keys),
        }
        if self.products == "mma":
            return {**constants, "NUM_STAGES": self.num_stages}
        return {**constants, "ONE_PLACE": self.num_stages == 0}


# In order of preference: a row for few queries, then the large one; the last of each kind fits into 99 KB.
DIFFERENTIAL_CONFIGS = (
    # 16 bit. Two row tiles a warp where the registers allow it, as in attention: a fragment of k or v serves two mma.
    DifferentialConfig("mma", 2, 128, 128, block_m=64, block_n=64, num_warps=8, num_stages=2, max_seqlen_q=FEW_QUERIES),
    DifferentialConfig("mma", 2, 64, 64, block_m=128, block_n=64, num_warps=8, num_stages=2, score_options=False),
    DifferentialConfig("mma", 2, 128, 128, block_m=128, block_n=32, num_warps=8, num_stages=2, score_options=False),
    DifferentialConfig("mma", 2, 128, 128, block_m=64, block_n=64, num_warps=8, num_stages=2),
    DifferentialConfig("mma", 2, 256, 256, block_m=64, block_n=32, num_warps=8, num_stages=2),
    DifferentialConfig("mma", 2, 256, 256, block_m=64, block_n=16, num_warps=8, num_stages=2),
    DifferentialConfig("mma", 2, 256, 256, block_m=32, block_n=16, num_warps=4, num_stages=2),
    # float32
    DifferentialConfig("fma", 4, 128, 128, block_m=32, block_n=32, num_warps=8, num_stages=1),
    DifferentialConfig("fma", 4, 256, 256, block_m=32, block_n=16, num_warps=8, num_stages=1),
    DifferentialConfig("fma", 4, 256, 256, block_m=16, block_n=16, num_warps=8, num_stages=1),
    # float64
    DifferentialConfig("fma", 8, 128, 128, block_m=32, block_n=16, num_warps=8, num_stages=1),
    DifferentialConfig("fma", 8, 128, 256, block_m=16, block_n=16, num_warps=8, num_stages=1),
    DifferentialConfig("fma", 8, 256, 256, block_m=8, block_n=16, num_warps=4, num_stages=0),
)


def select(
    dtype: np.dtype[Any],
    head_dim: int,
    head_dim_v: int,
    *,
    shared_keys: bool,
    seqlen_q: int,
    smem_limit_bytes: int,
    options: ForwardOptions = PLAIN,
) -> DifferentialConfig:
    """Select the row for a problem whose head dims fall into two buckets.

    Raises
    ------
    LaunchError
        No row fits into the shared memory that a CTA may use.
    """
    few = FEW_QUERIES if seqlen_q <= FEW_QUERIES else 0
    return _select(dtype.itemsize, head_dim, head_dim_v, shared_keys, few, options.on_scores, smem_limit_bytes)


@cache
def _select(
    itemsize: int,
    head_dim: int,
    head_dim_v: int,
    shared_keys: bool,
    few: int,
    on_scores: bool,
    smem_limit_bytes: int,
) -> DifferentialConfig:
    for row in DIFFERENTIAL_CONFIGS:
        if (
            row.itemsize == itemsize
            and head_dim <= row.max_head_dim
            and head_dim_v <= row.max_head_dim_v
            and row.score_options >= on_scores
            and row.max_seqlen_q in (0, few)
            and row.is_legal(head_dim, head_dim_v, smem_limit_bytes, shared_keys=shared_keys)
        ):
            return row
    raise LaunchError(
        f"differential attention with head dims up to {head_dim} and {head_dim_v} needs more shared memory than the "
        f"{smem_limit_bytes} bytes that a CTA may use"
    )
