"""The way from a checked block-sparse problem to its lists of tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuattn.head_dims import BUCKETS
from cuattn.ops.attention.arguments import Problem
from cuattn.ops.attention.backward import listed_config as backward_rows
from cuattn.ops.attention.backward.config import SIDES
from cuattn.ops.attention.backward.problem import ListedGradients
from cuattn.ops.attention.forward import hopper_listed
from cuattn.ops.attention.forward.hopper_config import HopperFwdConfig
from cuattn.ops.attention.listed import KeptBlocks, ListedTiles, listed_options, listed_row
from cuattn.ops.attention.sequences import PackedSequences
from cuattn.ops.sparse.block_mask import BlockMask
from cuattn.ops.sparse.tile_list import Side, tile_lists
from cuattn.runtime.executor import Executor, host_executor

__all__ = ["Masks", "backward_tiles", "forward_tiles"]


class Masks:
    """The masks of a call: one for a batch, or one for each of packed sequences. Known by which masks they are."""

    def __init__(self, masks: Sequence[BlockMask], *, packed: bool) -> None:
        self.masks, self.packed = tuple(masks), packed
        self._key = packed, *map(id, self.masks)  # they live as long as this does

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Masks) and self._key == other._key

    def block(self, axis: int) -> int:
        """Return the queries (axis 0) or the keys of a block: of all blocks, where masks differ."""
        return math.gcd(*(mask.block_size[axis] for mask in self.masks)) or 1

    @property
    def kept_blocks(self) -> KeptBlocks:
        """What the forward chooses its tiles by."""
        per_head = any(mask.num_heads > 1 for mask in self.masks)
        return KeptBlocks(self.block(0), self.block(1), per_head, partial(self.num_tiles, False))

    def num_tiles(self, of_keys: bool, rows: int, columns: int) -> int:
        """Return the tiles of all masks together, if a CTA has so many rows of a side."""
        return sum(mask.num_tiles(of_keys, rows, columns) for mask in self.masks)

    def lists(self, executor: Executor, side: Side, batch: int) -> tuple[Any, Any]:
        """Return the list of tiles of a side, and the order of its blocks of rows, where kernels read them."""
        if self.packed:
            return _packed_lists(executor, self, side)
        return _lists(executor, self.masks[0], side, batch)


def forward_tiles(
    problem: Problem, masks: Masks, packed: PackedSequences | None = None, config: HopperFwdConfig | None = None
) -> ListedTiles:
    """Return the tiles of the queries of a call, made when the masks are first used with tiles of this shape.

    A ``config`` of the Hopper kernel is obeyed, or refused by `NotSupportedError`.
    """
    executor, blocks, batch = problem.executor, masks.kept_blocks, problem.extents.batch
    hopper = hopper_listed.select(problem, packed, blocks, config)
    if hopper is None:
        row = listed_row(problem, blocks, executor.smem_limit_bytes)
        lists = masks.lists(executor, Side(False, row.block_m, row.block_n), batch)
        return ListedTiles(row, listed_options(problem.options.variant), *lists)
    side = Side(False, hopper.queries, hopper.row.block_n, hopper.piece)
    lists = masks.lists(executor, side, batch)
    return ListedTiles(hopper.row, hopper.options, *lists, hopper.pack, hopper.piece)


def backward_tiles(problem: Problem, masks: Masks) -> ListedGradients:
    """Return the tiles of the queries and those of the keys of a call, likewise."""
    executor, extents, options = problem.executor, problem.extents, listed_options(problem.options.variant)
    configs = tuple(
        backward_rows.select(
            problem.dtype,
            BUCKETS[extents.head_dim],
            BUCKETS[extents.head_dim_v],
            own=own,
            block=masks.block(own == "keys"),
            smem_limit_bytes=executor.smem_limit_bytes,
            options=options,
            tf32=problem.options.tf32,
            num_tiles=partial(masks.num_tiles, own == "keys"),
        )
        for own in SIDES
    )
    sides = (Side(row.own == "keys", row.block_own, row.block_other) for row in configs)
    return ListedGradients(configs, options, tuple(masks.lists(executor, side, extents.batch) for side in sides))


def _lists(executor: Executor, mask: BlockMask, side: Side, batch: int) -> tuple[Any, Any]:
    """Return the list of one mask, and (batch entry, block) in the order of the work, which the mask keeps."""
    key = "tiles", side

    def make() -> Sequence[NDArray[Any]]:
        return tile_lists([mask], side)

    def make_work() -> Sequence[NDArray[Any]]:
        tiles: NDArray[np.int64] = mask.derived(host_executor(executor.arch), key, make)[1]
        return [ordered(np.broadcast_to(tiles, (batch, tiles.shape[1])))]

    return mask.derived(executor, key, make)[0], mask.derived(executor, ("work", side, batch), make_work)[0]


@lru_cache(maxsize=64)
def _packed_lists(executor: Executor, masks: Masks, side: Side) -> tuple[Any, Any]:
    """Return the same of a mask a sequence, for the last few batches of masks."""
    array, work = tile_lists(masks.masks, side)
    copies = executor.put(array, np.int32), executor.put(ordered(work), np.int32)
    if executor.name == "cuda":  # once: later calls on other streams find them there
        with executor.on_device():
            executor.xp.cuda.get_current_stream().synchronize()
    return copies


def ordered(tiles: NDArray[np.int64]) -> NDArray[np.int32]:
    """List (row, column) of the numbers that are not negative, the largest first: the longest work is begun first.

    >>> ordered(np.array([[1, 3], [2, -1]])).tolist()
    [[0, 1], [1, 0], [0, 0]]
    """
    row, column = np.nonzero(tiles >= 0)
    order = np.argsort(-tiles[row, column], kind="stable")
    return np.stack([row[order], column[order]], axis=1).astype(np.int32)
