"""What a forward launch needs to walk over a list of tiles instead of all of them: kernels/attention/tile_list.cuh.

Who makes such lists is above the kernels: masks of blocks do (`cuattn.ops.sparse`), of which no more is known here than
their sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Protocol

import numpy as np

from cuattn.dtypes import DTYPES, ELEMENTS
from cuattn.errors import DTypeError, ShapeError
from cuattn.head_dims import BUCKETS, COLUMNS
from cuattn.ops.attention.arguments import Extents, Problem
from cuattn.ops.attention.forward import listed_config
from cuattn.ops.attention.forward.config import FlashFwdConfig
from cuattn.ops.attention.forward.hopper_config import HopperFwdConfig
from cuattn.ops.attention.variants import EVERYTHING, ForwardOptions

__all__ = [
    "KeptBlocks",
    "ListedTiles",
    "MaskSizes",
    "check_axis",
    "check_lengths",
    "check_listed_dtypes",
    "check_mask",
    "listed_options",
    "listed_row",
]


class MaskSizes(Protocol):
    """What a mask of blocks is for."""

    @property
    def seqlen_q(self) -> int: ...
    @property
    def seqlen_k(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def block_size(self) -> tuple[int, int]: ...
    def num_tiles(self, of_keys: bool, rows: int, columns: int) -> int: ...


@dataclass(frozen=True, slots=True)
class KeptBlocks:
    """What a shape of tiles is chosen by: the blocks of the masks of a call.

    Attributes
    ----------
    queries, keys : int
        Of a block; where masks differ, what divides those of all.
    per_head : bool
        Whether heads may see different keys.
    num_tiles : callable
        How many tiles there are if a CTA has so many queries, and a tile so many keys.
    """

    queries: int
    keys: int
    per_head: bool
    num_tiles: Callable[[int, int], int]

    @classmethod
    def of(cls, mask: MaskSizes) -> KeptBlocks:
        """Return those of one mask."""
        return cls(*mask.block_size, mask.num_heads > 1, partial(mask.num_tiles, False))


@dataclass(frozen=True, slots=True)
class ListedTiles:
    """The tiles that a call visits.

    Attributes
    ----------
    config : FlashFwdConfig or HopperFwdConfig
        The row whose tiles they are.
    options : ForwardOptions
        That the kernel is compiled with: `listed_options`, or those of `hopper_listed`.
    array : int32 array
        The list, where kernels can read it.
    work : int32 array [num_work, 2]
        (batch entry, block of queries) of each CTA of a head, those with the most tiles first.
    pack : int
        Heads of a key/value head that share a CTA of the Hopper kernel.
    piece : int
        Keys that it copies at once.
    """

    config: FlashFwdConfig | HopperFwdConfig
    options: ForwardOptions
    array: Any
    work: Any
    pack: int = 1
    piece: int = 0


@cache
def listed_options(variant: ForwardOptions) -> ForwardOptions:
    """Return the options of the kernel that serves a call with these: none, bounds on both sides, or every option.

    Fewer variants than without a list: what is hidden by position is found in few tiles, those that a bound cuts.
    """
    if variant.on_scores:
        return replace(EVERYTHING, bias_dtype=variant.bias_dtype)
    bounded = variant.bound_left or variant.bound_right
    return replace(variant, bound_left=bounded, bound_right=bounded)


def listed_row(problem: Problem, blocks: KeptBlocks, smem_limit_bytes: int) -> FlashFwdConfig:
    """Select the shape in which the portable kernels compute a call."""
    extents, options = problem.extents, problem.options
    return listed_config.select(
        problem.dtype,
        BUCKETS[extents.head_dim],
        COLUMNS[extents.head_dim_v][0],
        block=blocks.queries,
        smem_limit_bytes=smem_limit_bytes,
        options=listed_options(options.variant),
        tf32=options.tf32,
        num_tiles=blocks.num_tiles,
    )


def check_listed_dtypes(**arrays: Any) -> None:
    """Raise `DTypeError` for 8-bit floats, which no kernel with a list of tiles reads."""
    for name, x in arrays.items():
        dtype = getattr(x, "dtype", None)
        if isinstance(dtype, np.dtype) and dtype not in DTYPES:
            raise DTypeError(
                f"{name} has dtype {dtype} ({dtype.str}); block-sparse attention is for {', '.join(ELEMENTS)} (native)"
            )


def check_mask(mask: MaskSizes, extents: Extents) -> None:
    """Raise `ShapeError` unless a mask is of these queries, keys, heads and batch entries."""
    check_lengths("block_mask", mask, extents.seqlen_q, extents.seqlen_k)
    check_axis("block_mask", "batch entries", mask.batch, extents.batch)
    check_axis("block_mask", "heads", mask.num_heads, extents.num_heads)


def check_lengths(name: str, mask: MaskSizes, seqlen_q: int, seqlen_k: int) -> None:
    """Raise `ShapeError` unless a mask is of so many queries and keys."""
    for axis, of_mask, of_arrays in (("queries", mask.seqlen_q, seqlen_q), ("keys", mask.seqlen_k, seqlen_k)):
        if of_mask != of_arrays:
            raise ShapeError(f"{name} is of {of_mask} {axis}, and there are {of_arrays}; they must be the same")


def check_axis(name: str, axis: str, of_mask: int, of_arrays: int) -> None:
    """Raise `ShapeError` unless an axis of a mask is 1 or as long as that of the arrays."""
    if of_mask not in (1, of_arrays):
        raise ShapeError(f"{name} has {of_mask} {axis}; 1 or {of_arrays} are needed")
