"""The way from a checked block-sparse problem to its lists of tiles, and to the launch of the forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuattn.head_dims import BUCKETS, COLUMNS
from cuattn.ops.attention.arguments import Problem
from cuattn.ops.attention.backward.config import SIDES
from cuattn.ops.attention.backward.problem import ListedGradients
from cuattn.ops.attention.forward.config import FlashFwdConfig
from cuattn.ops.attention.listed import ListedTiles, listed_options
from cuattn.ops.sparse.block_mask import BlockMask
from cuattn.ops.sparse import backward_config
from cuattn.ops.sparse.config import select
from cuattn.ops.sparse.tile_list import Side, tile_lists
from cuattn.runtime.executor import Executor, host_executor

__all__ = ["backward_tiles", "forward_row", "forward_tiles", "lists_of"]


def forward_row(problem: Problem, block: int, smem_limit_bytes: int) -> FlashFwdConfig:
    """Select the shape in which a call with blocks of so many queries is computed."""
    extents, options = problem.extents, problem.options
    return select(
        problem.dtype,
        BUCKETS[extents.head_dim],
        COLUMNS[extents.head_dim_v][0],
        block=block,
        smem_limit_bytes=smem_limit_bytes,
        options=listed_options(options.variant),
        tf32=options.tf32,
    )


def forward_tiles(problem: Problem, mask: BlockMask) -> ListedTiles:
    """Return the tiles of the queries of a call, made when the mask is first used with tiles of this shape."""
    executor = problem.executor
    row = forward_row(problem, mask.block_size[0], executor.smem_limit_bytes)
    array, work = lists_of(executor, mask, Side(False, row.block_m, row.block_n), problem.extents.batch)
    return ListedTiles(row, listed_options(problem.options.variant), array, work)


def backward_tiles(problem: Problem, mask: BlockMask) -> ListedGradients:
    """Return the tiles of the queries and those of the keys of a call, likewise."""
    executor, extents, options = problem.executor, problem.extents, listed_options(problem.options.variant)
    configs = tuple(
        backward_config.select(
            problem.dtype,
            BUCKETS[extents.head_dim],
            BUCKETS[extents.head_dim_v],
            own=own,
            block=mask.block_size[own == "keys"],
            smem_limit_bytes=executor.smem_limit_bytes,
            options=options,
            tf32=problem.options.tf32,
        )
        for own in SIDES
    )
    sides = (Side(row.own == "keys", row.block_own, row.block_other) for row in configs)
    return ListedGradients(configs, options, tuple(lists_of(executor, mask, side, extents.batch) for side in sides))


def lists_of(executor: Executor, mask: BlockMask, side: Side, batch: int) -> tuple[Any, Any]:
    """Return the list of a mask for one side, and its blocks of rows as (batch entry, block), where kernels read them."""
    key = "tiles", side

    def make() -> Sequence[NDArray[Any]]:
        return tile_lists([mask], side)

    def make_work() -> Sequence[NDArray[Any]]:
        tiles: NDArray[np.int64] = mask.derived(host_executor(executor.arch), key, make)[1]
        return [ordered(np.broadcast_to(tiles, (batch, tiles.shape[1])))]

    return mask.derived(executor, key, make)[0], mask.derived(executor, ("work", side, batch), make_work)[0]


def ordered(tiles: NDArray[np.int64]) -> NDArray[np.int32]:
    """List (row, column) of the numbers that are not negative, the largest first: the longest work is begun first.

    >>> ordered(np.array([[1, 3], [2, -1]])).tolist()
    [[0, 1], [1, 0], [0, 0]]
    """
    row, column = np.nonzero(tiles >= 0)
    order = np.argsort(-tiles[row, column], kind="stable")
    return np.stack([row[order], column[order]], axis=1).astype(np.int32)
