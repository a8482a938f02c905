"""Which decode kernel runs, and in which shape: frozen rows, legality, and selection.

A row may change speed, never results beyond rounding. Rows are listed in order of preference; `select` takes the first
that is legal.

Examples
--------
>>> row = select(np.dtype(np.float16), KV_FORMATS["float16"], 128, 128, rows_per_kv_head=8, smem_limit_bytes=163 * 1024)
>>> row.block_m, row.block_n, row.tokens_per_block(8)
(16, 64, 2)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from cuattn.dtypes import ELEMENTS, WARP_SIZE
from cuattn.errors import LaunchError
from cuattn.formats import KV_FORMATS, KVFormat
from cuattn.head_dims import BUCKETS, COLUMNS, MAX_COLUMNS
from cuattn.ops.attention.forward.config import MMA_ROWS, ROW_PADDING_BYTES

__all__ = ["FLASH_DECODE_CONFIGS", "FlashDecodeConfig", "compiled_dims", "select"]

_PART_PADDING = 4  # numbers, of each row of a warp's output in shared memory
_BLOCK = 16  # the fewest numbers that share a block scale


@dataclass(frozen=True, slots=True)
class FlashDecodeConfig:
    """One shape of the decode kernels.

    Attributes
    ----------
    products : "mma" or "fma"
        Who multiplies: tensor cores (16-bit elements), or IEEE fused multiply-adds in float or double.
    itemsize : int
        Bytes of an element of the products.
    max_head_dim : int
        The row serves problems of which neither the bucket of D nor the columns of a CTA are more.
    block_m : int
        Query rows of a CTA: tokens times the heads that share a key/value head.
    block_n : int
        Keys of a tile, the unit of which splits are made.
    warps_m, warps_n : int
        Warps along the rows, and along the keys of a tile.
    num_stages : int
        Tiles in shared memory.
    max_rows : int
        The row is meant for at most so many query rows of a key/value head; 0 is any number.
    """

    products: str
    itemsize: int
    max_head_dim: int
    block_m: int
    block_n: int
    warps_m: int
    warps_n: int
    num_stages: int
    max_rows: int = 0

    @property
    def source(self) -> str:
        """Name of the kernel file."""
        return "attention_decode" if self.products == "mma" else "attention_decode_fma"

    @property
    def entry(self) -> str:
        """Name of the kernel."""
        return f"cuattn_{self.source}"

    @property
    def num_threads(self) -> int:
        return self.warps_m * self.warps_n * WARP_SIZE

    def heads_per_block(self, group: int) -> int:
        """Return how many query heads a CTA has, of ``group`` that share a key/value head."""
        return min(group, self.block_m)

    def tokens_per_block(self, group: int) -> int:
        """Return how many query tokens a CTA has."""
        return max(1, self.block_m // group)

    def head_blocks(self, group: int) -> int:
        """Return how many CTAs the heads of one key/value head are spread over."""
        return -(-group // self.block_m)

    def smem_bytes(self, head_dim: int, head_dim_v: int, kv_format: KVFormat) -> int:
        """Shared memory of a CTA for two of `compiled_dims`: ``sizeof(Smem)`` of the kernel."""
        if self.products == "fma":  # what the warps have found, and nothing else
            return self.warps_n * self.block_m * (head_dim_v + 2) * self.itemsize
        k_row, v_row = (size * self.itemsize + ROW_PADDING_BYTES for size in (head_dim, head_dim_v))
        tile = self.block_n * (k_row + v_row)
        if kv_format.itemsize == self.itemsize:
            tiles = self.num_stages * tile
        else:
            stored = sum(
                kv_format.items(size) * kv_format.itemsize + ROW_PADDING_BYTES + 4 + size // _BLOCK
                for size in (head_dim, head_dim_v)
            )
            tiles = tile + self.num_stages * self.block_n * stored
        parts = self.warps_n * self.block_m * 4 * (2 + head_dim_v + _PART_PADDING)
        return max(self.block_m * k_row + tiles, parts)

    def is_legal(self, head_dim: int, head_dim_v: int, kv_format: KVFormat, smem_limit_bytes: int) -> bool:
        """Whether the kernel compiles and launches in this shape (head dims as in `smem_bytes`)."""
        if self.products == "mma":
            tiling = self.block_m % (MMA_ROWS * self.warps_m) == 0 and self.block_n % (16 * self.warps_n) == 0
            tiling = tiling and self.num_stages >= 2
        else:
            keys = self.keys_per_lane(head_dim, head_dim_v)
            tiling = self.block_m % self.warps_m == 0 and keys >= 1 and self.num_stages == 1
        fits = self.smem_bytes(head_dim, head_dim_v, kv_format) <= smem_limit_bytes
        return tiling and self.num_threads <= 1024 and head_dim_v <= MAX_COLUMNS and fits

    def keys_per_lane(self, head_dim: int, head_dim_v: int) -> int:
        """Keys of a tile that one lane of attention_decode_fma.cu has a part of: KEYS of decode/decode_lanes.cuh."""
        rows = lanes = self.block_m // self.warps_m
        most_columns = (8 if rows >= 8 else 16) * 4 // self.itemsize
        narrow, wide = sorted((head_dim, head_dim_v))
        while lanes < WARP_SIZE and 2 * lanes <= narrow // 2 and lanes * most_columns < wide:
            lanes *= 2
        return self.block_n * lanes // (self.warps_n * WARP_SIZE)

    def constants(
        self,
        dtype_name: str,
        kv_format: KVFormat,
        head_dim: int,
        head_dim_v: int,
        flags: dict[str, Any],
        *,
        column_blocks: int = 1,
        unrounded: bool = False,
    ) -> dict[str, Any]:
        """The kernel's compile-time constants. Head dims and column blocks: `compiled_dims`; the dtype is that of q;
        ``flags``: `launch`; with ``unrounded`` the result is of the accumulator's type.
        """
        query, accumulator = ELEMENTS[dtype_name]
        of_q = {"Element": query} if self.products == "mma" else {"Element": accumulator, "Query": query}
        return {
            "Storage": kv_format.storage,
            **of_q,
            "Output": accumulator if unrounded else query,
            "Accumulator": accumulator,
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "HEAD_DIM": head_dim,
            "HEAD_DIM_V": head_dim_v,
            "COLUMN_BLOCKS": column_blocks,
            "WARPS_M": self.warps_m,
            "WARPS_N": self.warps_n,
            "NUM_STAGES": self.num_stages,
            "SMEM_BYTES": self.smem_bytes(head_dim, head_dim_v, kv_format),
            **flags,
        }


# In order of preference.
FLASH_DECODE_CONFIGS = (
    # 16 bit. One tile of rows, whose keys the warps share: a token or a few. Then as many rows as a prefill has.
    FlashDecodeConfig("mma", 2, 128, block_m=16, block_n=64, warps_m=1, warps_n=4, num_stages=2, max_rows=16),
    FlashDecodeConfig("mma", 2, 256, block_m=16, block_n=32, warps_m=1, warps_n=2, num_stages=2, max_rows=16),
    FlashDecodeConfig("mma", 2, 128, block_m=64, block_n=64, warps_m=4, warps_n=1, num_stages=2),
    FlashDecodeConfig("mma", 2, 256, block_m=64, block_n=32, warps_m=4, warps_n=1, num_stages=2),
    FlashDecodeConfig("mma", 2, 256, block_m=32, block_n=32, warps_m=2, warps_n=1, num_stages=2),
    FlashDecodeConfig("mma", 2, 512, block_m=16, block_n=32, warps_m=1, warps_n=2, num_stages=2, max_rows=16),
    FlashDecodeConfig("mma", 2, 512, block_m=16, block_n=16, warps_m=1, warps_n=1, num_stages=2, max_rows=16),
    FlashDecodeConfig("mma", 2, 512, block_m=64, block_n=16, warps_m=4, warps_n=1, num_stages=2),
    FlashDecodeConfig("mma", 2, 512, block_m=32, block_n=16, warps_m=2, warps_n=1, num_stages=2),
    # float32, and what float32 holds but 16 bits do not. The rows of a warp share what it reads; a prefill has more.
    FlashDecodeConfig("fma", 4, 64, block_m=1, block_n=128, warps_m=1, warps_n=4, num_stages=1, max_rows=1),
    FlashDecodeConfig("fma", 4, 128, block_m=1, block_n=64, warps_m=1, warps_n=4, num_stages=1, max_rows=1),
    FlashDecodeConfig("fma", 4, 256, block_m=1, block_n=32, warps_m=1, warps_n=4, num_stages=1, max_rows=1),
    FlashDecodeConfig("fma", 4, 64, block_m=4, block_n=64, warps_m=1, warps_n=4, num_stages=1, max_rows=4),
    FlashDecodeConfig("fma", 4, 128, block_m=4, block_n=32, warps_m=1, warps_n=4, num_stages=1, max_rows=4),
    FlashDecodeConfig("fma", 4, 256, block_m=4, block_n=16, warps_m=1, warps_n=4, num_stages=1, max_rows=4),
    FlashDecodeConfig("fma", 4, 64, block_m=8, block_n=32, warps_m=1, warps_n=4, num_stages=1, max_rows=16),
    FlashDecodeConfig("fma", 4, 128, block_m=8, block_n=16, warps_m=1, warps_n=4, num_stages=1, max_rows=16),
    FlashDecodeConfig("fma", 4, 256, block_m=8, block_n=8, warps_m=1, warps_n=4, num_stages=1, max_rows=16),
    FlashDecodeConfig("fma", 4, 64, block_m=32, block_n=8, warps_m=4, warps_n=1, num_stages=1),
    FlashDecodeConfig("fma", 4, 128, block_m=32, block_n=4, warps_m=4, warps_n=1, num_stages=1),
    FlashDecodeConfig("fma", 4, 256, block_m=32, block_n=2, warps_m=4, warps_n=1, num_stages=1),
    FlashDecodeConfig("fma", 4, 512, block_m=1, block_n=16, warps_m=1, warps_n=4, num_stages=1, max_rows=1),
    FlashDecodeConfig("fma", 4, 512, block_m=4, block_n=8, warps_m=1, warps_n=4, num_stages=1, max_rows=16),
    FlashDecodeConfig("fma", 4, 512, block_m=16, block_n=2, warps_m=4, warps_n=1, num_stages=1),
    # float64
    FlashDecodeConfig("fma", 8, 64, block_m=1, block_n=32, warps_m=1, warps_n=4, num_stages=1, max_rows=1),
    FlashDecodeConfig("fma", 8, 128, block_m=1, block_n=16, warps_m=1, warps_n=4, num_stages=1, max_rows=1),
    FlashDecodeConfig("fma", 8, 256, block_m=1, block_n=8, warps_m=1, warps_n=4, num_stages=1, max_rows=1),
    FlashDecodeConfig("fma", 8, 64, block_m=4, block_n=32, warps_m=1, warps_n=4, num_stages=1, max_rows=8),
    FlashDecodeConfig("fma", 8, 128, block_m=4, block_n=16, warps_m=1, warps_n=4, num_stages=1, max_rows=8),
    FlashDecodeConfig("fma", 8, 256, block_m=4, block_n=8, warps_m=1, warps_n=4, num_stages=1, max_rows=8),
    FlashDecodeConfig("fma", 8, 64, block_m=16, block_n=8, warps_m=4, warps_n=1, num_stages=1),
    FlashDecodeConfig("fma", 8, 128, block_m=16, block_n=4, warps_m=4, warps_n=1, num_stages=1),
    FlashDecodeConfig("fma", 8, 256, block_m=16, block_n=2, warps_m=4, warps_n=1, num_stages=1),
    FlashDecodeConfig("fma", 8, 512, block_m=1, block_n=8, warps_m=1, warps_n=4, num_stages=1, max_rows=1),
    FlashDecodeConfig("fma", 8, 512, block_m=2, block_n=4, warps_m=1, warps_n=4, num_stages=1, max_rows=8),
    FlashDecodeConfig("fma", 8, 512, block_m=8, block_n=1, warps_m=4, warps_n=1, num_stages=1),
)

_MIN_COLUMNS = 64  # where D is more than `MAX_COLUMNS`: a row of q then takes all lanes of a warp, two columns each


@cache
def compiled_dims(head_dim: int, head_dim_v: int) -> tuple[int, int, int]:
    """Return what head dims are compiled for: the bucket of D, the columns of a CTA, the CTAs of a row.

    >>> compiled_dims(64, 512), compiled_dims(512, 8)
    ((64, 256, 2), (512, 64, 1))
    """
    bucket, (columns, blocks) = BUCKETS[head_dim], COLUMNS[head_dim_v]
    return bucket, max(columns, _MIN_COLUMNS) if bucket > MAX_COLUMNS else columns, blocks


def select(
    dtype: np.dtype[Any],
    kv_format: KVFormat,
    head_dim: int,
    head_dim_v: int,
    *,
    rows_per_kv_head: int,
    smem_limit_bytes: int,
) -> FlashDecodeConfig:
    """Select the row for a problem.

    Parameters
    ----------
    dtype : numpy.dtype
        Of q.
    kv_format : KVFormat
        Of keys and values.
    head_dim, head_dim_v : int
        Two of `compiled_dims`.
    rows_per_kv_head : int
        Query tokens of the longest sequence, times the query heads that share a key/value head.
    smem_limit_bytes : int
        Shared memory that one CTA may use.

    Raises
    ------
    LaunchError
        No row fits into the shared memory.
    """
    return _select(dtype, kv_format.name, head_dim, head_dim_v, rows_per_kv_head, smem_limit_bytes)


def _on_cuda_cores(dtype: np.dtype[Any], kv_format: KVFormat, num_rows: int) -> bool:
    """Whether products are fused multiply-adds in float or double.

    Of 16-bit queries: those on mxfp4 in float16, which does not reach its block scales; and a single row on narrow
    numbers, which are more work to bring to tensor cores than to multiply (docs/kernels/attention_decode.md).
    """
    if dtype.itemsize > 2:
        return True
    return kv_format.quantized and (num_rows == 1 or (kv_format.name == "mxfp4" and dtype == np.float16))


@cache
def _select(
    dtype: np.dtype[Any], format_name: str, head_dim: int, head_dim_v: int, num_rows: int, smem_limit_bytes: int
) -> FlashDecodeConfig:
    kv_format = KV_FORMATS[format_name]
    wanted = ("fma", max(dtype.itemsize, 4)) if _on_cuda_cores(dtype, kv_format, num_rows) else ("mma", 2)
    for row in FLASH_DECODE_CONFIGS:
        if (
            (row.products, row.itemsize) == wanted
            and max(head_dim, head_dim_v) <= row.max_head_dim
            and (row.max_rows == 0 or num_rows <= row.max_rows)
            and row.is_legal(head_dim, head_dim_v, kv_format, smem_limit_bytes)
        ):
            return row
    raise LaunchError(
        f"decoding with head dims up to {head_dim} and {head_dim_v} columns of v needs more shared memory than the "
        f"{smem_limit_bytes} bytes that a CTA may use"
    )
