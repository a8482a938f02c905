"""Which kernels of linear attention there are, and their shapes.

>>> FmaRow("float64", 256, 2, True).slice_cols
8
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

from cuattn.dtypes import ELEMENTS, WARP_SIZE

__all__ = ["BUCKETS", "FEW_TOKENS", "FmaRow", "MmaRow", "Row", "fma_rows", "mma_rows", "select"]

#: Head dims of k that the kernels are compiled for: a state is padded to them in registers.
BUCKETS = (32, 64, 128, 256)
#: A sequence of so many tokens or fewer is computed token by token: a chunk of tensor cores would be mostly empty.
FEW_TOKENS = 16
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


@dataclass(frozen=True, slots=True)
class MmaRow:
    """A shape of linear_attention.cu.

    ``decay``: 0 for none, 1 for one number a state and token, 2 for one for each channel. ``num_stages``: chunks in
    shared memory; with 2 of them the next one loads while one is computed, with 1 other CTAs of the multiprocessor have
    to fill the time.
    """

    dtype_name: str
    head_dim: int
    slice_cols: int
    decay: int
    normalize: bool
    aligned: bool
    num_stages: int

    source = "linear_attention"
    max_heads = 8  # outputs of a CTA: more of them share the state with other CTAs

    @property
    def chunk(self) -> int:
        """Tokens that are computed together."""
        return 32 if self.head_dim > 128 else 64

    @property
    def num_warps(self) -> int:
        return 8 if self.head_dim > 128 else 4

    @property
    def num_threads(self) -> int:
        return self.num_warps * WARP_SIZE

    @property
    def smem_bytes(self) -> int:
        """``sizeof(Smem)`` of the kernel."""
        k_row, v_row = 2 * self.head_dim + _ACCESS_BYTES, 2 * self.slice_cols + _ACCESS_BYTES
        tiles = self.num_stages * self.chunk * (2 * k_row + v_row) + self.head_dim * v_row
        tiles += (self.chunk if self.decay == 2 else 1) * (k_row + 4 * self.head_dim + _ACCESS_BYTES)
        return tiles + 4 * (5 * self.chunk + 1 + self.num_warps)

    def constants(self) -> dict[str, Any]:
        return {
            "Element": ELEMENTS[self.dtype_name][0],
            "HEAD_DIM": self.head_dim,
            "SLICE": self.slice_cols,
            "CHUNK": self.chunk,
            "NUM_WARPS": self.num_warps,
            "NUM_STAGES": self.num_stages,
            "SMEM_BYTES": self.smem_bytes,
            "ALIGNED": self.aligned,
            "DECAY": self.decay,
            "NORMALIZE": self.normalize,
        }


Row = FmaRow | MmaRow


@cache
def select(
    dtype_name: str,
    head_dim: int,
    head_dim_v: int,
    decay: int,
    normalize: bool,
    aligned: bool,
    *,
    num_tokens: int,
    smem_limit_bytes: int,
) -> Row:
    """Return the row for a problem, of sequences of about ``num_tokens``.

    >>> limit = 163 * 1024
    >>> select("float16", 64, 64, 1, True, True, num_tokens=4096, smem_limit_bytes=limit).source
    'linear_attention'
    >>> select("float16", 64, 64, 1, True, True, num_tokens=1, smem_limit_bytes=limit).source
    'linear_attention_fma'
    """
    one_by_one = FmaRow(dtype_name, bucket(head_dim), decay, normalize)
    if _REAL_BYTES.get(ELEMENTS[dtype_name][0]) or num_tokens <= FEW_TOKENS:
        return one_by_one
    slice_cols = 32 if head_dim_v <= 32 and head_dim <= 128 else 64
    row = MmaRow(dtype_name, bucket(head_dim), slice_cols, decay, normalize, aligned, num_stages=1)
    if decay == 2:
        return row if head_dim <= 128 and row.smem_bytes <= smem_limit_bytes else one_by_one
    pipelined = replace(row, num_stages=2)
    return pipelined if 2 * pipelined.smem_bytes <= smem_limit_bytes else row


def fma_rows() -> Iterator[FmaRow]:
    """Return every row of linear_attention_fma.cu that a call can ask for."""
    for dtype_name, head_dim, decay, normalize in product(ELEMENTS, BUCKETS, (0, 1, 2), (True, False)):
        yield FmaRow(dtype_name, head_dim, decay, normalize)


def mma_rows() -> Iterator[MmaRow]:
    """Return every row of linear_attention.cu that a call can ask for."""
    flags = (True, False)
    for dtype_name, head_dim, columns in product(("float16", "bfloat16"), BUCKETS, (32, 64)):
        if columns == 64 or head_dim <= 128:
            for decay, normalize, aligned in product((0, 1, 2) if head_dim <= 128 else (0, 1), flags, flags):
                for num_stages in (1, 2) if head_dim <= 128 and decay < 2 else (1,):
                    yield MmaRow(dtype_name, head_dim, columns, decay, normalize, aligned, num_stages)
