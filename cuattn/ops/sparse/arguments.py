"""What the block-sparse functions accept: masks that fit the arrays, beside the checks of attention."""

from __future__ import annotations

from typing import Any

from cuattn.errors import ArgumentError, ShapeError
from cuattn.messages import shown
from cuattn.ops.attention.listed import check_axis, check_lengths
from cuattn.ops.attention.sequences import PackedSequences
from cuattn.ops.sparse.block_mask import BlockMask
from cuattn.ops.sparse.block_mask_arguments import block_size_pair, integers
from cuattn.ops.sparse.launch import Masks

__all__ = ["mask_of", "masks_of"]


def mask_of(x: Any, name: str = "block_mask") -> BlockMask:
    """Return a `BlockMask`; raises `ArgumentError` for anything else."""
    if not isinstance(x, BlockMask):
        raise ArgumentError(f"{name} is {shown(x)}; a cuattn.BlockMask is needed")
    return x


def masks_of(x: Any, block_size: Any, packed: PackedSequences, num_heads: int) -> Masks:
    """Return the masks of packed sequences: of a list of them, or of compressed rows with the first of each sequence.

    Raises `ArgumentError` or `ShapeError` unless they are of the lengths and heads of the sequences, and what
    `BlockMask.from_csr` raises.
    """
    size = block_size_pair(block_size)
    if not isinstance(x, list | tuple):
        raise ArgumentError(f"block_masks is {shown(x)}; a list of masks or (indptr, indices, row_offsets) is needed")
    if len(x) == 3 and not any(isinstance(mask, BlockMask) for mask in x):
        indptr, indices, row_offsets = x
        return Masks(_from_rows(indptr, indices, row_offsets, size, packed), packed=True)
    masks = [mask_of(mask, f"block_masks[{index}]") for index, mask in enumerate(x)]
    if len(masks) != packed.batch:
        raise ShapeError(f"block_masks has {len(masks)} masks; one for each of the {packed.batch} sequences is needed")
    for index, mask in enumerate(masks):
        name = f"block_masks[{index}]"
        if packed.host is not None:
            check_lengths(name, mask, *(int(starts[index + 1] - starts[index]) for starts in packed.host))
        check_axis(name, "batch entries", mask.batch, 1)
        check_axis(name, "heads", mask.num_heads, num_heads)
    return Masks(masks, packed=True)


def _from_rows(
    indptr: Any, indices: Any, row_offsets: Any, block_size: tuple[int, int], packed: PackedSequences
) -> list[BlockMask]:
    """Make a mask of the rows of each sequence."""
    if packed.host is None:
        raise ArgumentError(
            "block_masks are compressed rows and cu_seqlens are on a GPU; lengths on the CPU are needed"
        )
    starts = integers("indptr of block_masks", indptr, range(1, 2), "[rows + 1]")
    kept = integers("indices of block_masks", indices, range(1, 2), "[nnz]")
    offsets = integers("row_offsets of block_masks", row_offsets, range(1, 2), "[batch + 1]")
    if not starts.size or offsets.size != packed.batch + 1:
        raise ShapeError(
            f"block_masks has indptr {list(starts.shape)} and row_offsets {list(offsets.shape)}; [rows + 1] and "
            f"[{packed.batch + 1}] are needed"
        )
    rows = starts.size - 1
    if offsets[0] != 0 or offsets[-1] != rows or (offsets[1:] < offsets[:-1]).any():
        raise ArgumentError(f"block_masks has row_offsets that do not ascend from 0 to the {rows} rows")
    if starts[0] != 0 or starts[-1] != kept.size or (starts[1:] < starts[:-1]).any():
        raise ArgumentError(f"block_masks has an indptr that does not ascend from 0 to the {kept.size} indices")
    masks = []
    for b in range(packed.batch):
        own = starts[offsets[b] : offsets[b + 1] + 1]
        seqlen_q, seqlen_k = (int(lengths[b + 1] - lengths[b]) for lengths in packed.host)
        masks.append(BlockMask.from_csr(own - own[0], kept[own[0] : own[-1]], seqlen_q, seqlen_k, block_size))
    return masks
