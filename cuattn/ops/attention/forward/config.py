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

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from cuattn.dtypes import WARP_SIZE, kernel_types
from cuattn.errors import LaunchError
from cuattn.head_dims import MAX_COLUMNS, MAX_HEAD_DIM
from cuattn.ops.attention.variants import EVERYTHING, PLAIN, ForwardOptions

MMA_ROWS = 16  # query rows of one mma.m16n8k16
FMA_ROWS = (4, 8)  # query rows of a warp of attention_forward_fma.cu: as many as its registers hold
FEW_QUERIES = 64  # so many or fewer do not fill the query tile of the large rows
ROW_PADDING_BYTES = 16  # of each row of a tile in shared memory (common/tiles.cuh)


@dataclass(frozen=True, slots=True)
class FlashFwdConfig:
    """One shape of the forward kernels.

    Attributes
    ----------
    products : "mma" or "fma"
        Who multiplies: tensor cores (16-bit elements, or float32 rounded to tf32), or IEEE fused multiply-adds.
    itemsize : int
        Bytes of an element on chip.
    max_head_dim : int
        The row serves problems of which neither the bucket of D nor the columns of a CTA are more.
    block_m, block_n : int
        Queries and keys of a tile.
    num_warps : int
        Warps of a CTA.
    num_stages : int
        Key tiles in shared memory. 1: "fma" alternates the loads of k and v with the two products, "mma" loads a tile
        when the one before is done with. 0, of "fma" alone: there is room for k or v, not for both.
    max_seqlen_q : int
        The row is meant for at most so many queries (`FEW_QUERIES`); 0 is any number.
    score_options : bool
        Whether the row has registers to spare for softcap, ALiBi, bias, mask and dropout.
    """

    products: str
    itemsize: int
    max_head_dim: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_seqlen_q: int = 0
    score_options: bool = True

    @property
    def source(self) -> str:
        """Name of the kernel file."""
        return "attention_forward" if self.products == "mma" else "attention_forward_fma"

    @property
    def entry(self) -> str:
        """Name of the kernel."""
        return f"cuattn_{self.source}"

    @property
    def num_threads(self) -> int:
        return self.num_warps * WARP_SIZE

    def serves(self, products: str, itemsize: int, head_dim: int, head_dim_v: int, on_scores: bool) -> bool:
        """Whether the row is meant for products, head dims as in `smem_bytes`, and options that scores go through."""
        return (
            self.products == products
            and self.itemsize == itemsize
            and max(head_dim, head_dim_v) <= self.max_head_dim
            and self.score_options >= on_scores
        )

    def smem_bytes(self, head_dim: int, head_dim_v: int, beside_tiles: int = 0) -> int:
        """Shared memory of a CTA for the bucket ``head_dim`` and ``head_dim_v`` columns (`cuattn.head_dims`).

        It is ``sizeof(Smem)`` of the kernel; ``beside_tiles``: bytes that another kernel of the row's shape has more.
        """
        qk_row = head_dim * self.itemsize + ROW_PADDING_BYTES
        v_row = head_dim_v * self.itemsize + ROW_PADDING_BYTES
        keys_and_values = self.num_stages * (qk_row + v_row) if self.num_stages else max(qk_row, v_row)
        tiles = self.block_m * qk_row + self.block_n * keys_and_values + beside_tiles
        if self.products == "mma":  # the output tile takes the place of the others
            return max(tiles, self.block_m * v_row)
        return tiles + self.block_m * (self.block_n * self.itemsize + ROW_PADDING_BYTES)  # the probabilities

    def is_legal(self, head_dim: int, head_dim_v: int, smem_limit_bytes: int) -> bool:
        """Whether the kernel compiles and launches in this shape (head dims as in `smem_bytes`)."""
        if self.products == "mma":
            tiling = self.block_m % (MMA_ROWS * self.num_warps) == 0 and self.num_stages >= 1
        else:
            tiling = self.block_m in (rows * self.num_warps for rows in FMA_ROWS) and self.num_stages <= 1
        fits = head_dim_v <= MAX_COLUMNS and self.smem_bytes(head_dim, head_dim_v) <= smem_limit_bytes
        return tiling and self.block_n % 16 == 0 and self.num_threads <= 1024 and fits

    def constants(
        self,
        dtype_name: str,
        head_dim: int,
        head_dim_v: int,
        options: ForwardOptions = PLAIN,
        *,
        aligned: bool = True,
        column_blocks: int = 1,
        listed: bool = False,
        unrounded: bool = False,
    ) -> dict[str, Any]:
        """The kernel's compile-time constants. The dtype is that of q, head dims are as in `smem_bytes`; each of
        ``column_blocks`` CTAs computes so many columns, with ``listed`` the tiles are those of a list, and with
        ``unrounded`` the result is of the accumulator's type.
        """
        constants: dict[str, Any] = {
            **kernel_types(dtype_name, self.products, unrounded=unrounded),
            **options.constants(),
            "ALIGNED": aligned,
            "TILE_LIST": listed,
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "HEAD_DIM": head_dim,
            "HEAD_DIM_V": head_dim_v,
            "COLUMN_BLOCKS": column_blocks,
            "NUM_WARPS": self.num_warps,
            "SMEM_BYTES": self.smem_bytes(head_dim, head_dim_v),
        }
        if self.products == "mma":
            return {**constants, "NUM_STAGES": self.num_stages}
        return {**constants, "ONE_PLACE": self.num_stages == 0}


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
    def block_n(self) -> int:
        """Keys of a tile: 0, as the kernel has no tiles."""
        return 0

    @property
    def num_threads(self) -> int:
        return self.num_warps * WARP_SIZE

    def smem_bytes(self, head_dim: int, head_dim_v: int) -> int:
        return 0

    def constants(
        self,
        dtype_name: str,
        head_dim: int,
        head_dim_v: int,
        options: ForwardOptions = PLAIN,
        *,
        aligned: bool = True,
        column_blocks: int = 1,
        unrounded: bool = False,
    ) -> dict[str, Any]:
        """Return the kernel's compile-time constants: it takes any head dim, any alignment and any option."""
        return {
            **kernel_types(dtype_name, "fma", unrounded=unrounded),
            **replace(EVERYTHING, bias_dtype=options.bias_dtype).constants(),
            "MAX_HEAD_DIM": MAX_COLUMNS if max(head_dim, head_dim_v) <= MAX_COLUMNS else MAX_HEAD_DIM,
            "NUM_WARPS": self.num_warps,
        }


# In order of preference: a row for few queries, then the large one, then what fits into 99 KB of shared memory.
FLASH_FWD_CONFIGS = (
    # 16 bit. Two row tiles a warp where the registers allow it: a fragment of k or v then serves two mma. They do not
    # where the scores have more to go through than the softmax.
    FlashFwdConfig("mma", 2, 128, block_m=64, block_n=64, num_warps=4, num_stages=2, max_seqlen_q=FEW_QUERIES),
    FlashFwdConfig("mma", 2, 256, block_m=64, block_n=32, num_warps=4, num_stages=2, max_seqlen_q=FEW_QUERIES),
    FlashFwdConfig("mma", 2, 64, block_m=128, block_n=64, num_warps=4, num_stages=2, score_options=False),
    FlashFwdConfig("mma", 2, 192, block_m=128, block_n=64, num_warps=8, num_stages=2),
    FlashFwdConfig("mma", 2, 128, block_m=128, block_n=32, num_warps=4, num_stages=2, score_options=False),
    FlashFwdConfig("mma", 2, 256, block_m=128, block_n=32, num_warps=8, num_stages=2),
    FlashFwdConfig("mma", 2, 256, block_m=64, block_n=32, num_warps=4, num_stages=2),
    FlashFwdConfig("mma", 2, 512, block_m=64, block_n=32, num_warps=4, num_stages=2),
    FlashFwdConfig("mma", 2, 512, block_m=32, block_n=16, num_warps=2, num_stages=2),
    # float32 in tf32
    FlashFwdConfig("mma", 4, 64, block_m=64, block_n=64, num_warps=4, num_stages=2),
    FlashFwdConfig("mma", 4, 128, block_m=64, block_n=32, num_warps=4, num_stages=2),
    FlashFwdConfig("mma", 4, 256, block_m=64, block_n=16, num_warps=4, num_stages=2),
    FlashFwdConfig("mma", 4, 256, block_m=32, block_n=16, num_warps=2, num_stages=2),
    FlashFwdConfig("mma", 4, 512, block_m=32, block_n=16, num_warps=2, num_stages=2),
    FlashFwdConfig("mma", 4, 512, block_m=16, block_n=16, num_warps=1, num_stages=1),
    # float32
    FlashFwdConfig("fma", 4, 64, block_m=64, block_n=64, num_warps=8, num_stages=1),
    FlashFwdConfig("fma", 4, 256, block_m=64, block_n=32, num_warps=8, num_stages=1),
    FlashFwdConfig("fma", 4, 256, block_m=32, block_n=16, num_warps=4, num_stages=1),
    FlashFwdConfig("fma", 4, 512, block_m=32, block_n=16, num_warps=4, num_stages=1),
    FlashFwdConfig("fma", 4, 512, block_m=16, block_n=16, num_warps=4, num_stages=1),
    # float64
    FlashFwdConfig("fma", 8, 64, block_m=64, block_n=32, num_warps=8, num_stages=1),
    FlashFwdConfig("fma", 8, 192, block_m=32, block_n=16, num_warps=4, num_stages=1),
    FlashFwdConfig("fma", 8, 256, block_m=16, block_n=16, num_warps=4, num_stages=1),
    FlashFwdConfig("fma", 8, 512, block_m=8, block_n=16, num_warps=2, num_stages=1),
    FlashFwdConfig("fma", 8, 512, block_m=8, block_n=16, num_warps=2, num_stages=0),
)


def products_of(dtype: np.dtype[Any], tf32: bool) -> tuple[str, int]:
    """Return who multiplies elements of a dtype, "mma" or "fma", and their bytes on chip (8-bit ones: 16 bits)."""
    itemsize = max(dtype.itemsize, 2)
    return "mma" if itemsize == 2 or tf32 else "fma", itemsize


def select(
    dtype: np.dtype[Any],
    head_dim: int,
    head_dim_v: int,
    *,
    seqlen_q: int,
    smem_limit_bytes: int,
    options: ForwardOptions = PLAIN,
    tf32: bool = False,
) -> FlashFwdConfig:
    """Select the row for a problem.

    Parameters
    ----------
    dtype : numpy.dtype
        Of q, k and v.
    head_dim, head_dim_v : int
        The bucket of D, and the columns of v that a CTA computes: `cuattn.head_dims`.
    seqlen_q : int
        Queries of a sequence.
    smem_limit_bytes : int
        Shared memory that one CTA may use.
    options : ForwardOptions
        Of the kernel.
    tf32 : bool
        Whether float32 is multiplied in tf32.

    Raises
    ------
    LaunchError
        No row fits into the shared memory.
    """
    few = FEW_QUERIES if seqlen_q <= FEW_QUERIES else 0
    products, itemsize = products_of(dtype, tf32)
    return _select(products, itemsize, head_dim, head_dim_v, few, options.on_scores, smem_limit_bytes)


@cache
def _select(
    products: str, itemsize: int, head_dim: int, head_dim_v: int, few: int, on_scores: bool, smem_limit_bytes: int
) -> FlashFwdConfig:
    for row in FLASH_FWD_CONFIGS:
        if (
            row.serves(products, itemsize, head_dim, head_dim_v, on_scores)
            and row.max_seqlen_q in (0, few)
            and row.is_legal(head_dim, head_dim_v, smem_limit_bytes)
        ):
            return row
    raise LaunchError(
        f"attention with head dims up to {head_dim} and {head_dim_v} columns of v needs more shared memory than the "
        f"{smem_limit_bytes} bytes that a CTA may use"
    )
