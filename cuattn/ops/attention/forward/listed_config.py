"""Which shape of the forward kernels walks over a list of tiles: rows as those of `FLASH_FWD_CONFIGS`, by block size.

A CTA takes ``block_m`` queries, and every tile holds what any of them sees. So there are rows whose queries lie in one
block of the mask, where blocks are small: more would visit keys that few of them see, unless neighbouring blocks see
much the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

import numpy as np

from cuattn.errors import LaunchError
from cuattn.ops.attention.forward.config import FlashFwdConfig, products_of
from cuattn.ops.attention.variants import ForwardOptions

__all__ = ["LISTED_FWD_CONFIGS", "divides", "preferred", "select"]

Row = TypeVar("Row")
#: The number of tiles of so many rows and columns that a mask has.
NumTiles = Callable[[int, int], int]

_LARGE = 64  # rows of a block or of a CTA; with more, little is gained
_MORE_PAIRS = 1.5  # times the pairs of a query and a key that are multiplied at least
_LOADING = (
    16  # what loading a column costs, in rows that it is multiplied with (docs/kernels/block_sparse_attention.md)
)

# In order of preference; those of the fewest queries serve any block size.
LISTED_FWD_CONFIGS = (
    # 16 bit
    FlashFwdConfig("mma", 2, 64, block_m=128, block_n=64, num_warps=4, num_stages=2, score_options=False),
    FlashFwdConfig("mma", 2, 128, block_m=128, block_n=64, num_warps=8, num_stages=2),
    FlashFwdConfig("mma", 2, 64, block_m=64, block_n=64, num_warps=2, num_stages=2, score_options=False),
    FlashFwdConfig("mma", 2, 128, block_m=64, block_n=64, num_warps=4, num_stages=2),
    FlashFwdConfig("mma", 2, 512, block_m=64, block_n=32, num_warps=4, num_stages=2),
    FlashFwdConfig("mma", 2, 64, block_m=32, block_n=64, num_warps=1, num_stages=2, score_options=False),
    FlashFwdConfig("mma", 2, 256, block_m=16, block_n=32, num_warps=1, num_stages=2),
    FlashFwdConfig("mma", 2, 512, block_m=16, block_n=16, num_warps=1, num_stages=2),
    # float32 in tf32
    FlashFwdConfig("mma", 4, 64, block_m=64, block_n=64, num_warps=4, num_stages=2),
    FlashFwdConfig("mma", 4, 128, block_m=64, block_n=32, num_warps=4, num_stages=2),
    FlashFwdConfig("mma", 4, 256, block_m=16, block_n=16, num_warps=1, num_stages=2),
    FlashFwdConfig("mma", 4, 512, block_m=16, block_n=16, num_warps=1, num_stages=1),
    # float32
    FlashFwdConfig("fma", 4, 64, block_m=64, block_n=64, num_warps=8, num_stages=1),
    FlashFwdConfig("fma", 4, 256, block_m=64, block_n=32, num_warps=8, num_stages=1),
    FlashFwdConfig("fma", 4, 512, block_m=16, block_n=16, num_warps=4, num_stages=1),
    # float64
    FlashFwdConfig("fma", 8, 64, block_m=64, block_n=32, num_warps=8, num_stages=1),
    FlashFwdConfig("fma", 8, 256, block_m=16, block_n=16, num_warps=4, num_stages=1),
    FlashFwdConfig("fma", 8, 512, block_m=8, block_n=16, num_warps=2, num_stages=1),
    FlashFwdConfig("fma", 8, 512, block_m=8, block_n=16, num_warps=2, num_stages=0),
)


def divides(rows: int, block: int) -> bool:
    """Whether CTAs of so many rows lie in one block of a mask, all of them or nearly so.

    >>> [divides(64, block) for block in (16, 64, 128, 96, 300)]
    [False, True, True, False, True]
    """
    return block % rows == 0 or block >= 4 * rows


def preferred(
    rows: Sequence[Row], shape: Callable[[Row], tuple[int, int]], block: int, num_tiles: NumTiles | None
) -> Row:
    """Return the first whose CTAs lie in blocks of so many rows; the one with the smallest CTAs where there is none.

    Of small blocks, what neighbours see may be much the same, and then a larger CTA, which reads it for more rows, is
    the better one: where it multiplies little more. ``shape`` is the rows and columns of a tile.
    """
    first = next((row for row in rows if divides(shape(row)[0], block)), min(rows, key=lambda row: shape(row)[0]))
    if num_tiles is None or max(block, shape(first)[0]) >= _LARGE:
        return first
    largest_first = {shape(row)[0]: row for row in reversed(rows)}  # of those with as many rows, the first
    pairs = {row: num_tiles(*shape(row)) * math.prod(shape(row)) for row in largest_first.values()}
    few = [row for row, number in pairs.items() if number <= _MORE_PAIRS * pairs[first]]
    return min(few, key=lambda row: pairs[row] * (1 + _LOADING / shape(row)[0]))


def select(
    dtype: np.dtype[Any],
    head_dim: int,
    head_dim_v: int,
    *,
    block: int,
    smem_limit_bytes: int,
    options: ForwardOptions,
    tf32: bool,
    num_tiles: NumTiles | None = None,
) -> FlashFwdConfig:
    """Select the row for blocks of so many queries; the other arguments are those of the dense `select`.

    ``num_tiles``: of the mask, where it may be asked.

    Raises
    ------
    LaunchError
        No row fits into the shared memory.
    """
    rows = _rows(*products_of(dtype, tf32), head_dim, head_dim_v, options.on_scores, smem_limit_bytes)
    if not rows:
        raise LaunchError(
            f"block-sparse attention with head dims up to {head_dim} and {head_dim_v} columns of v needs more shared "
            f"memory than the {smem_limit_bytes} bytes that a CTA may use"
        )
    return preferred(rows, lambda row: (row.block_m, row.block_n), block, num_tiles)


@cache
def _rows(
    products: str, itemsize: int, head_dim: int, head_dim_v: int, on_scores: bool, smem_limit_bytes: int
) -> list[FlashFwdConfig]:
    return [
        row
        for row in LISTED_FWD_CONFIGS
        if row.serves(products, itemsize, head_dim, head_dim_v, on_scores)
        and row.is_legal(head_dim, head_dim_v, smem_limit_bytes)
    ]
