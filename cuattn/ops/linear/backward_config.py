"""The shape of the kernels of the gradients of linear attention, and their constants."""

from __future__ import annotations

from typing import Any, NamedTuple

from cuattn.dtypes import ELEMENTS, PACK_BYTES

__all__ = ["BackwardShape", "constants", "shape_of", "smem_bytes"]


class BackwardShape(NamedTuple):
    """A chunk has ``block`` tokens, and operands are taken in blocks of as many columns, by ``num_warps`` warps."""

    block: int
    num_warps: int

    @property
    def num_threads(self) -> int:
        return 32 * self.num_warps

    def num_blocks(self, extent: int) -> int:
        """Blocks, or chunks, of an extent."""
        return -(-extent // self.block)


_SHAPES = {2: BackwardShape(64, 4), 4: BackwardShape(64, 8), 8: BackwardShape(32, 4)}


def shape_of(itemsize: int) -> BackwardShape:
    """Return the shape for elements of some bytes. Three blocks of 64 x 64 float64 would not fit into 99 KB."""
    return _SHAPES[itemsize]


def smem_bytes(itemsize: int, *, channels: bool) -> dict[str, int]:
    """Bytes of shared memory of a CTA, by the names of the constants."""
    block, num_warps = shape_of(itemsize)
    real = max(4, itemsize)
    operand = block * (block + PACK_BYTES // itemsize) * itemsize
    levels = block.bit_length() - 1
    decay = (block * (2 + 2 * levels) + 4) * real
    terms = (2 * block + num_warps) * real
    numbers = block * real
    tables = (block * block if channels else 1) * real
    plans = {
        "WALK_SMEM_BYTES": 4 * operand + decay + terms + 2 * numbers,
        "ROWS_SMEM_BYTES": max(4 * operand, block * (block + 1) * real) + max(decay, tables) + numbers,
        "DQ_SMEM_BYTES": 3 * operand + decay + numbers + 2 * tables,
        "DK_SMEM_BYTES": 3 * operand + decay + terms + numbers + 2 * tables,
        "DV_SMEM_BYTES": 4 * operand + decay + terms,
    }
    return {name: -(-size // PACK_BYTES) * PACK_BYTES for name, size in plans.items()}


def constants(dtype_name: str, itemsize: int, *, channels: bool, aligned: bool = True) -> dict[str, Any]:
    """Compile-time constants of linear_attention_backward.cu."""
    element, real = ELEMENTS[dtype_name]
    block, num_warps = shape_of(itemsize)
    return {
        "Element": element,
        "Real": real,
        "BLOCK": block,
        "NUM_WARPS": num_warps,
        "ALIGNED": aligned,
        "CHANNELS": channels,
        **smem_bytes(itemsize, channels=channels),
    }
