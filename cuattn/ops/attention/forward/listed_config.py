"""Which shape of the forward kernels walks over a list of tiles: rows as those of `FLASH_FWD_CONFIGS`, by block size.

A CTA takes ``block_m`` queries, and every tile holds what any of them sees. So there are rows whose queries lie in one
block of the mask, where blocks are small: more would visit keys that few of them see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

import numpy as np

from cuattn.errors import LaunchError
from cuattn.ops.attention.forward.config import FlashFwdConfig, products_of
from cuattn.ops.attention.variants import ForwardOptions

__all__ = ["LISTED_FWD_CONFIGS", "divides", "preferred", "select"]

Row = TypeVar("Row")

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


def preferred(rows: Sequence[Row], size: Callable[[Row], int], block: int) -> Row:
    """Return the first whose CTAs lie in blocks of so many rows; the one with the smallest where there is none."""
    return next((row for row in rows if divides(size(row), block)), min(rows, key=size))


@cache
def select(
    dtype: np.dtype[Any],
    head_dim: int,
    head_dim_v: int,
    *,
    block: int,
    smem_limit_bytes: int,
    options: ForwardOptions,
    tf32: bool,
) -> FlashFwdConfig:
    """Select the row for blocks of so many queries; the other arguments are those of the dense `select`.

    Raises
    ------
    LaunchError
        No row fits into the shared memory.
    """
    products, itemsize = products_of(dtype, tf32)
    rows = [
        row
        for row in LISTED_FWD_CONFIGS
        if row.serves(products, itemsize, head_dim, head_dim_v, options.on_scores)
        and row.is_legal(head_dim, head_dim_v, smem_limit_bytes)
    ]
    if not rows:
        raise LaunchError(
            f"block-sparse attention with head dims up to {head_dim} and {head_dim_v} columns of v needs more shared "
            f"memory than the {smem_limit_bytes} bytes that a CTA may use"
        )
    return preferred(rows, lambda row: row.block_m, block)
