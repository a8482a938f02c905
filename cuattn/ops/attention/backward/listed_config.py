"""Which shapes of the backward kernels walk over lists of tiles: as `FLASH_BWD_CONFIGS`, and by block size."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from cuattn.errors import LaunchError
from cuattn.ops.attention.backward.config import FlashBwdConfig, Side
from cuattn.ops.attention.forward.config import products_of
from cuattn.ops.attention.forward.listed_config import NumTiles, preferred
from cuattn.ops.attention.variants import ForwardOptions

__all__ = ["LISTED_BWD_CONFIGS", "select"]

# In order of preference; those that own the fewest rows serve any block size.
LISTED_BWD_CONFIGS = (
    # 16 bit
    FlashBwdConfig("mma", "queries", 2, 64, 64, 32, num_warps=2, num_stages=2, score_options=False),
    FlashBwdConfig("mma", "queries", 2, 128, 64, 32, num_warps=4, num_stages=2),
    FlashBwdConfig("mma", "queries", 2, 256, 64, 16, num_warps=4, num_stages=2),
    FlashBwdConfig("mma", "queries", 2, 128, 16, 32, num_warps=1, num_stages=2),
    FlashBwdConfig("mma", "queries", 2, 256, 16, 16, num_warps=1, num_stages=2),
    FlashBwdConfig("mma", "keys", 2, 64, 64, 64, num_warps=4, num_stages=2, score_options=False),
    FlashBwdConfig("mma", "keys", 2, 64, 64, 32, num_warps=4, num_stages=2),
    FlashBwdConfig("mma", "keys", 2, 128, 64, 16, num_warps=4, num_stages=2),
    FlashBwdConfig("mma", "keys", 2, 256, 64, 16, num_warps=4, num_stages=2, split_grads=True),
    FlashBwdConfig("mma", "keys", 2, 64, 16, 32, num_warps=1, num_stages=2),
    FlashBwdConfig("mma", "keys", 2, 128, 16, 16, num_warps=1, num_stages=2),
    FlashBwdConfig("mma", "keys", 2, 256, 16, 16, num_warps=1, num_stages=2, split_grads=True),
    # float32 in tf32
    FlashBwdConfig("mma", "queries", 4, 64, 64, 32, num_warps=4, num_stages=2),
    FlashBwdConfig("mma", "queries", 4, 192, 16, 16, num_warps=1, num_stages=2),
    FlashBwdConfig("mma", "queries", 4, 256, 16, 16, num_warps=1, num_stages=2, score_options=False),
    FlashBwdConfig("mma", "keys", 4, 64, 64, 32, num_warps=4, num_stages=2),
    FlashBwdConfig("mma", "keys", 4, 128, 16, 16, num_warps=1, num_stages=2),
    FlashBwdConfig("mma", "keys", 4, 256, 16, 16, num_warps=1, num_stages=2, split_grads=True, score_options=False),
    # float32
    FlashBwdConfig("fma", "queries", 4, 64, 32, 64, num_warps=4, num_stages=1),
    FlashBwdConfig("fma", "queries", 4, 256, 16, 16, num_warps=4, num_stages=1),
    FlashBwdConfig("fma", "keys", 4, 64, 32, 64, num_warps=4, num_stages=1),
    FlashBwdConfig("fma", "keys", 4, 256, 16, 16, num_warps=4, num_stages=1),
    # float64
    FlashBwdConfig("fma", "queries", 8, 64, 32, 32, num_warps=4, num_stages=1),
    FlashBwdConfig("fma", "queries", 8, 256, 16, 16, num_warps=4, num_stages=1),
    FlashBwdConfig("fma", "queries", 8, 256, 8, 16, num_warps=2, num_stages=1),
    FlashBwdConfig("fma", "keys", 8, 64, 32, 32, num_warps=4, num_stages=1),
    FlashBwdConfig("fma", "keys", 8, 256, 16, 16, num_warps=8, num_stages=1),
    FlashBwdConfig("fma", "keys", 8, 256, 8, 16, num_warps=4, num_stages=1),
)


def select(
    dtype: np.dtype[Any],
    head_dim: int,
    head_dim_v: int,
    *,
    own: Side,
    block: int,
    smem_limit_bytes: int,
    options: ForwardOptions,
    tf32: bool,
    num_tiles: NumTiles | None = None,
) -> FlashBwdConfig:
    """Select the row for a side whose blocks have so many rows; the other arguments are those of the dense `select`.

    ``num_tiles``: of the mask, where it may be asked.

    Raises
    ------
    LaunchError
        No row fits into the shared memory.
    """
    products, _ = products_of(dtype, tf32)
    rows = _rows(products, own, dtype.itemsize, head_dim, head_dim_v, options.on_scores, smem_limit_bytes)
    if not rows:
        raise LaunchError(
            f"block-sparse attention backward with head dims up to {head_dim} and {head_dim_v} needs more shared "
            f"memory than the {smem_limit_bytes} bytes that a CTA may use"
        )
    return preferred(rows, lambda row: (row.block_own, row.block_other), block, num_tiles)


@cache
def _rows(
    products: str, own: Side, itemsize: int, head_dim: int, head_dim_v: int, on_scores: bool, smem_limit_bytes: int
) -> list[FlashBwdConfig]:
    fitting = [
        row
        for row in LISTED_BWD_CONFIGS
        if (row.own, row.itemsize) == (own, itemsize)
        and max(head_dim, head_dim_v) <= row.max_head_dim
        and row.score_options >= on_scores
        and row.is_legal(head_dim, head_dim_v, smem_limit_bytes)
    ]
    # Where tensor cores have no registers for what tf32 may do faster, it is done without them.
    return [row for row in fitting if row.products == products] or fitting
