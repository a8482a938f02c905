"""Which shape of the kernels for the gradient of a bias runs: one frozen row for each shape.

>>> select(np.dtype(np.float16), 64, 64, smem_limit_bytes=99 * 1024).block_n
64
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from cuattn.dtypes import ELEMENTS, WARP_SIZE
from cuattn.errors import LaunchError
from cuattn.ops.attention.forward.config import FMA_ROWS, MMA_ROWS, ROW_PADDING_BYTES
from cuattn.ops.attention.variants import ForwardOptions

__all__ = ["BIAS_BWD_CONFIGS", "BiasBwdConfig", "select"]


@dataclass(frozen=True, slots=True)
class BiasBwdConfig:
    """One shape of attention_backward_bias.cu ("mma") or attention_backward_bias_fma.cu ("fma").

    Attributes
    ----------
    products : "mma" or "fma"
        Who multiplies: tensor cores (16-bit elements, or float32 rounded to tf32), or IEEE fused multiply-adds.
    itemsize : int
        Bytes of an element.
    max_head_dim : int
        The row serves problems whose larger head dim falls into this bucket or a smaller one.
    block_m, block_n : int
        Queries and keys of a tile.
    num_warps : int
        Warps of a CTA.
    """

    products: str
    itemsize: int
    max_head_dim: int
    block_m: int
    block_n: int
    num_warps: int

    @property
    def source(self) -> str:
        """Name of the kernel file."""
        return "attention_backward_bias" if self.products == "mma" else "attention_backward_bias_fma"

    @property
    def entry(self) -> str:
        """Name of the kernel."""
        return f"cuattn_{self.source}"

    @property
    def num_threads(self) -> int:
        return self.num_warps * WARP_SIZE

    def smem_bytes(self, head_dim: int, head_dim_v: int) -> int:
        """Shared memory of a CTA for two buckets: tiles of q, k, dout and v."""
        row_bytes = (head_dim + head_dim_v) * self.itemsize + 2 * ROW_PADDING_BYTES
        return (self.block_m + self.block_n) * row_bytes

    def is_legal(self, head_dim: int, head_dim_v: int, smem_limit_bytes: int) -> bool:
        """Whether the kernel compiles and launches in this shape (buckets as above)."""
        if self.products == "mma":
            tiling = self.block_m % (MMA_ROWS * self.num_warps) == 0
        else:
            tiling = self.block_m in (rows * self.num_warps for rows in FMA_ROWS)
        fits = self.smem_bytes(head_dim, head_dim_v) <= smem_limit_bytes
        return tiling and self.block_n % 16 == 0 and self.block_n <= self.num_threads and fits

    def constants(
        self, dtype_name: str, head_dim: int, head_dim_v: int, options: ForwardOptions, *, aligned: bool = True
    ) -> dict[str, Any]:
        """The kernel's compile-time constants. Head dims are buckets, the dtype is that of q, and there is a bias."""
        return {
            "Element": ELEMENTS[dtype_name][0],
            **options.constants(),
            "ALIGNED": aligned,
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "HEAD_DIM": head_dim,
            "HEAD_DIM_V": head_dim_v,
            "NUM_WARPS": self.num_warps,
            "SMEM_BYTES": self.smem_bytes(head_dim, head_dim_v),
        }


# In order of preference; the last of each kind that a head dim can take fits into 99 KB of shared memory.
BIAS_BWD_CONFIGS = (
    # 16 bit
    BiasBwdConfig("mma", 2, 256, block_m=64, block_n=64, num_warps=4),
    BiasBwdConfig("mma", 2, 256, block_m=64, block_n=32, num_warps=4),
    # float32 in tf32
    BiasBwdConfig("mma", 4, 64, block_m=64, block_n=64, num_warps=4),
    BiasBwdConfig("mma", 4, 128, block_m=64, block_n=32, num_warps=4),
    BiasBwdConfig("mma", 4, 256, block_m=32, block_n=16, num_warps=2),
    # float32
    BiasBwdConfig("fma", 4, 64, block_m=64, block_n=64, num_warps=8),
    BiasBwdConfig("fma", 4, 128, block_m=64, block_n=32, num_warps=8),
    BiasBwdConfig("fma", 4, 256, block_m=32, block_n=32, num_warps=4),
    BiasBwdConfig("fma", 4, 256, block_m=32, block_n=16, num_warps=4),
    # float64
    BiasBwdConfig("fma", 8, 64, block_m=64, block_n=32, num_warps=8),
    BiasBwdConfig("fma", 8, 128, block_m=32, block_n=16, num_warps=4),
    BiasBwdConfig("fma", 8, 256, block_m=16, block_n=16, num_warps=2),
    BiasBwdConfig("fma", 8, 256, block_m=8, block_n=16, num_warps=2),
)


@cache
def select(
    dtype: np.dtype[Any], head_dim: int, head_dim_v: int, *, smem_limit_bytes: int, tf32: bool = False
) -> BiasBwdConfig:
    """Select the row for a problem with elements of ``dtype`` and head dims in two buckets.

    Raises
    ------
    LaunchError
        No row fits into the shared memory that a CTA may use.
    """
    products = "mma" if dtype.itemsize == 2 or tf32 else "fma"
    for row in BIAS_BWD_CONFIGS:
        if (
            row.products == products
            and row.itemsize == dtype.itemsize
            and max(head_dim, head_dim_v) <= row.max_head_dim
            and row.is_legal(head_dim, head_dim_v, smem_limit_bytes)
        ):
            return row
    raise LaunchError(
        f"the gradient of a bias with head dims up to {head_dim} and {head_dim_v} needs more shared memory than the "
        f"{smem_limit_bytes} bytes that a CTA may use"
    )
