"""What the block-sparse functions accept: a mask that fits the arrays, beside the checks of attention."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuattn.dtypes import DTYPES, ELEMENTS
from cuattn.errors import ArgumentError, DTypeError, ShapeError
from cuattn.messages import shown
from cuattn.ops.attention import arguments
from cuattn.ops.attention.arguments import Extents, Problem
from cuattn.ops.attention.operation import Operation
from cuattn.ops.sparse.block_mask import BlockMask

__all__ = ["DENSE", "check", "check_dtypes", "check_mask"]

DENSE = Operation("block_sparse_attention", "gradients")


def check(q: Any, k: Any, v: Any, block_mask: Any, *, out: Any = None, **options: Any) -> Problem:
    """Make every check of a call. Raises as documented at `cuattn.block_sparse_attention`."""
    check_mask_type("block_mask", block_mask)
    check_dtypes(q=q, k=k, v=v)
    problem = arguments.check(q, k, v, out=out, operation=DENSE, **options)
    check_mask(block_mask, problem.extents)
    return problem


def check_mask_type(name: str, x: Any) -> None:
    """Raise `ArgumentError` for anything but a `BlockMask`."""
    if not isinstance(x, BlockMask):
        raise ArgumentError(f"{name} is {shown(x)}; a cuattn.BlockMask is needed")


def check_dtypes(**arrays: Any) -> None:
    """Raise `DTypeError` for 8-bit floats, which no kernel with a list of tiles reads."""
    for name, x in arrays.items():
        dtype = getattr(x, "dtype", None)
        if isinstance(dtype, np.dtype) and dtype not in DTYPES:
            raise DTypeError(
                f"{name} has dtype {dtype} ({dtype.str}); block-sparse attention is for {', '.join(ELEMENTS)} (native)"
            )


def check_mask(mask: BlockMask, extents: Extents) -> None:
    """Raise `ShapeError` unless a mask is of these queries, keys, heads and batch entries."""
    for axis, of_mask, of_arrays, array in (
        ("queries", mask.seqlen_q, extents.seqlen_q, "q"),
        ("keys", mask.seqlen_k, extents.seqlen_k, "k"),
    ):
        if of_mask != of_arrays:
            raise ShapeError(f"block_mask is of {of_mask} {axis} and {array} has {of_arrays}; they must be the same")
    check_leading(mask, extents)


def check_leading(mask: BlockMask, extents: Extents) -> None:
    """Raise `ShapeError` unless the heads and batch entries of a mask are 1 or those of the arrays."""
    for axis, of_mask, of_arrays in (
        ("heads", mask.num_heads, extents.num_heads),
        ("batch entries", mask.batch, extents.batch),
    ):
        if of_mask not in (1, of_arrays):
            raise ShapeError(f"block_mask has {of_mask} {axis}; 1 or the {of_arrays} of q are needed")
