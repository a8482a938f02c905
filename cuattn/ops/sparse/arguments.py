"""What the block-sparse functions accept: masks that fit the arrays, beside the checks of attention."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuattn.errors import ArgumentError, DTypeError, ShapeError
from cuattn.messages import shown
from cuattn.ops.attention.listed import check_axis, check_lengths
from cuattn.ops.attention.sequences import PackedSequences
from cuattn.ops.sparse.block_mask import BlockMask
from cuattn.ops.sparse.launch import Masks

__all__ = ["check_masks", "mask_of", "masks_of"]


def mask_of(x: Any, name: str = "block_mask") -> BlockMask:
    """Return a `BlockMask`; raises `ArgumentError` for anything else."""
    if not isinstance(x, BlockMask):
        raise ArgumentError(f"{name} is {shown(x)}; a cuattn.BlockMask is needed")
    return x


def masks_of(x: Any, block_size: Any, cu_seqlens: tuple[Any, Any]) -> list[BlockMask]:
    """Return the masks of packed sequences: of a list of them, or of compressed rows with the first of each sequence.

    Raises `ArgumentError` or `ShapeError` where they are none, and whatever `BlockMask.from_csr` does.
    """
    if not isinstance(x, list | tuple):
        raise ArgumentError(f"block_masks is {shown(x)}; a list of masks or (indptr, indices, row_offsets) is needed")
    if not x or any(isinstance(mask, BlockMask) for mask in x) or len(x) != 3:
        return [mask_of(mask, f"block_masks[{index}]") for index, mask in enumerate(x)]
    return _from_rows(*x, block_size, cu_seqlens)


def _from_rows(
    indptr: Any, indices: Any, row_offsets: Any, block_size: Any, cu_seqlens: tuple[Any, Any]
) -> list[BlockMask]:
    """Make a mask of the rows of each sequence, whose lengths the host has to know."""
    lengths = []
    for name, x in zip(("cu_seqlens_q", "cu_seqlens_k"), cu_seqlens, strict=True):
        if not isinstance(x, np.ndarray | list | tuple):
            raise ArgumentError(
                f"{name} is on a GPU; lengths on the CPU are needed with block_masks of compressed rows"
            )
        lengths.append(np.diff(np.asarray(x)))
    starts, offsets = np.asarray(indptr), np.asarray(row_offsets)
    if starts.ndim != 1 or offsets.shape != (lengths[0].size + 1,) or not starts.size:
        raise ShapeError(
            f"block_masks has indptr {list(starts.shape)} and row_offsets {list(offsets.shape)}; [rows + 1] and "
            f"[{lengths[0].size + 1}] are needed"
        )
    if starts.dtype.kind not in "iu" or offsets.dtype.kind not in "iu":
        raise DTypeError("block_masks has indptr or row_offsets that are no integers")
    if offsets[0] != 0 or offsets[-1] != starts.size - 1 or (np.diff(offsets) < 0).any() or (np.diff(starts) < 0).any():
        raise ArgumentError(
            f"block_masks has row_offsets from {offsets[0]} to {offsets[-1]}; they and indptr must ascend, and "
            f"row_offsets from 0 to the {starts.size - 1} rows"
        )
    kept = np.asarray(indices)
    return [
        BlockMask.from_csr(
            starts[first : last + 1] - starts[first], kept[starts[first] : starts[last]], int(n), int(m), block_size
        )
        for first, last, n, m in zip(offsets[:-1], offsets[1:], *lengths, strict=True)
    ]


def check_masks(masks: list[BlockMask], packed: PackedSequences, num_heads: int) -> Masks:
    """Raise `ShapeError` unless there is a mask for each of packed sequences, of its lengths and heads."""
    if len(masks) != packed.batch:
        raise ShapeError(f"block_masks has {len(masks)} masks; one for each of the {packed.batch} sequences is needed")
    for index, mask in enumerate(masks):
        name = f"block_masks[{index}]"
        if packed.host is not None:
            seqlens = (int(starts[index + 1] - starts[index]) for starts in packed.host)
            check_lengths(name, mask, *seqlens)
        check_axis(name, "batch entries", mask.batch, 1)
        check_axis(name, "heads", mask.num_heads, num_heads)
    return Masks(masks, packed=True)
