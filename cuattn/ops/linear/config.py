"""Which kernels of linear attention there are, and their shapes.

>>> fma_row("float64", 200, 2, True).slice_cols
8
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from cuattn.dtypes import ELEMENTS, WARP_SIZE

__all__ = ["BUCKETS", "FmaRow", "fma_row", "fma_rows"]

#: Head dims of k that the kernels are compiled for: a state is padded to them in registers.
BUCKETS = (32, 64, 128, 256)
_REAL_BYTES = {"float": 4, "double": 8}
_ACCESS_BYTES = 16  # of shared memory, by a lane
_TILE_BYTES = 64  # tokens of a tile times the bytes of a number


def bucket(head_dim: int) -> int:
    """Return the head dim that a kernel for ``head_dim`` is compiled for."""
    return next(size for size in BUCKETS if head_dim <= size)


@dataclass(frozen=True, slots=True)
class FmaRow:
    """A shape of linear_attention_fma.cu.

    ``decay``: 0 for none, 1 for one number a state, 2 for one for each channel.
    """

    dtype_name: str
    head_dim: int
    decay: int
    normalize: bool

    source = "linear_attention_fma"
    max_heads = 8  # outputs of a CTA: rows of a tile, so that it still holds a few tokens

    @property
    def real_bytes(self) -> int:
        return _REAL_BYTES[ELEMENTS[self.dtype_name][1]]

    @property
    def num_warps(self) -> int:
        return 8 if self.real_bytes == 8 or self.head_dim > 128 else 4

    @property
    def num_threads(self) -> int:
        return self.num_warps * WARP_SIZE

    @property
    def tokens(self) -> int:
        """Tokens of a tile."""
        return _TILE_BYTES // self.real_bytes

    @property
    def slice_cols(self) -> int:
        """Columns of the state that a CTA computes."""
        lanes_d = 8 if self.head_dim * self.real_bytes <= 512 else self.head_dim * self.real_bytes // 64
        return self.num_warps * (WARP_SIZE // lanes_d) * (8 // self.real_bytes)

    @property
    def smem_bytes(self) -> int:
        """``sizeof(Smem)`` of the kernel."""
        of_decay = self.head_dim if self.decay == 2 else _ACCESS_BYTES // self.real_bytes
        steps = (self.tokens if self.decay else 1) * of_decay
        return self.real_bytes * (2 * self.tokens * (self.head_dim + self.slice_cols) + steps)

    def constants(self) -> dict[str, Any]:
        return {
            "Element": ELEMENTS[self.dtype_name][0],
            "HEAD_DIM": self.head_dim,
            "NUM_WARPS": self.num_warps,
            "TOKENS": self.tokens,
            "SMEM_BYTES": self.smem_bytes,
            "DECAY": self.decay,
            "NORMALIZE": self.normalize,
        }


@cache
def fma_row(dtype_name: str, head_dim: int, decay: int, normalize: bool) -> FmaRow:
    """Return the row for a problem."""
    return FmaRow(dtype_name, bucket(head_dim), decay, normalize)


def fma_rows() -> Iterator[FmaRow]:
    """Return every row that a call can ask for."""
    for dtype_name in ELEMENTS:
        for head_dim in BUCKETS:
            for decay in (0, 1, 2):
                for normalize in (True, False):
                    yield FmaRow(dtype_name, head_dim, decay, normalize)
