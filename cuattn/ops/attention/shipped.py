"""Which variants stand for a row of the tables of attention, where it is looked at and not called."""

from __future__ import annotations

from typing import Protocol

from cuattn import compile
from cuattn.head_dims import BUCKETS, COLUMNS, HEAD_DIM_BUCKETS
from cuattn.ops.attention.variants import PLAIN, ForwardOptions
from cuattn.ops.registry import ARCHS

__all__ = ["CAUSAL", "NVRTC_MS", "WINDOW", "Row", "largest_head_dim", "nvrtc_ms", "products_mark"]

CAUSAL = ForwardOptions(bound_right=True)
WINDOW = ForwardOptions(bound_left=True, bound_right=True)
NVRTC_MS = 1000  # of a usual call: without options or causal, at usual head dims


class Row(Protocol):
    """A row of a table: forward, backward, or the gradient of a bias."""

    @property
    def max_head_dim(self) -> int: ...
    @property
    def itemsize(self) -> int: ...
    @property
    def products(self) -> str: ...
    def is_legal(self, head_dim: int, head_dim_v: int, smem_limit_bytes: int, /) -> bool: ...


def largest_head_dim(row: Row) -> int:
    """Return the largest bucket for which the row is legal somewhere."""
    limit = max(compile.smem_limit_bytes(arch) for arch in ARCHS)
    sizes = (size for size in HEAD_DIM_BUCKETS if size <= BUCKETS[row.max_head_dim])
    return max(size for size in sizes if row.is_legal(size, COLUMNS[size][0], limit))


def products_mark(row: Row) -> str:
    """Return what the name of a row says about its products, where the dtype does not."""
    return "_tf32" if row.products == "mma" and row.itemsize == 4 else ""


def nvrtc_ms(head_dim: int, options: ForwardOptions) -> int | None:
    """Return what the compilation of a variant may take, in milliseconds."""
    return NVRTC_MS if head_dim <= 128 and options in (PLAIN, CAUSAL) else None
