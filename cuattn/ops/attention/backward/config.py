"""Which shape of the backward kernels runs: one frozen row for each tuned shape, legality, and selection.

A row may change speed, and the order of a sum with it, but no result beyond the tolerance. Rows are listed in order of
preference; `select` takes the first that is legal.

Examples
--------
>>> import numpy as np
>>> row = select(np.dtype(np.float16), 64, 64, own="keys", smem_limit_bytes=163 * 1024)
>>> [(launch.grad_qk, launch.grad_v) for launch in row.launches()]
[(True, True)]
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np

from cuattn.dtypes import WARP_SIZE, kernel_types
from cuattn.errors import LaunchError
from cuattn.ops.attention.forward.config import MMA_ROWS, ROW_PADDING_BYTES, products_of
from cuattn.ops.attention.variants import PLAIN, ForwardOptions

__all__ = ["FLASH_BWD_CONFIGS", "SIDES", "FlashBwdConfig", "Launch", "Side", "can_add_dq", "select"]

Side = Literal["queries", "keys"]
#: Who may own the rows that a CTA sums gradients for.
SIDES: tuple[Side, Side] = ("queries", "keys")

_FMA_ROWS = (2, 4, 8)  # rows of a warp of attention_backward_fma.cu: as many as its registers hold
_TERM_BYTES = 4  # lse and delta of a query are floats beside tiles of up to 4 bytes an element


def can_add_dq(products: str, itemsize: int) -> bool:
    """Whether there is a form of the kernel that adds dq in no order: for 16-bit elements."""
    return products == "mma" and itemsize == 2


class Launch(NamedTuple):
    """Which gradients a launch of a row computes: dq or dk, and dv; and whether it adds the part of its keys to dq."""

    grad_qk: bool
    grad_v: bool
    add_dq: bool = False


@dataclass(frozen=True, slots=True)
class FlashBwdConfig:
    """One shape of the backward kernels.

    Attributes
    ----------
    products : "mma" or "fma"
        Who multiplies: tensor cores (16-bit elements, or float32 rounded to tf32), or IEEE fused multiply-adds.
    own : "queries" or "keys"
        Whose gradients a CTA sums: dq of queries, dk and dv of keys.
    itemsize : int
        Bytes of an element.
    max_head_dim : int
        The row serves problems whose larger head dim falls into this bucket or a smaller one.
    block_own, block_other : int
        Rows that a CTA owns, and rows of a tile of the other side.
    num_warps : int
        Warps of a CTA.
    num_stages : int
        Tiles of the other side in shared memory.
    split_grads : bool
        dv and dk in two launches, where the registers do not hold both.
    score_options : bool
        Whether the row has registers to spare for softcap, ALiBi, bias, mask and dropout.
    """

    products: str
    own: Side
    itemsize: int
    max_head_dim: int
    block_own: int
    block_other: int
    num_warps: int
    num_stages: int
    split_grads: bool = False
    score_options: bool = True

    @property
    def source(self) -> str:
        """Name of the kernel file."""
        return "attention_backward" if self.products == "mma" else "attention_backward_fma"

    @property
    def entry(self) -> str:
        """Name of the kernel."""
        return f"cuattn_{self.source}"

    @property
    def num_threads(self) -> int:
        return self.num_warps * WARP_SIZE

    def launches(self, *, add_dq: bool = False) -> tuple[Launch, ...]:
        """The launches of the kernel, in order. ``add_dq``: keys that are owned give dq too, in no order."""
        if self.own == "queries":
            return (Launch(True, False),)
        if self.split_grads:
            return Launch(False, True), Launch(True, False, add_dq)
        return (Launch(True, True, add_dq),)

    @property
    def tile(self) -> tuple[int, int]:
        """Queries and keys of a tile of the logits."""
        queries, keys = self.block_own, self.block_other
        return (queries, keys) if self.own == "queries" else (keys, queries)

    def smem_bytes(self, head_dim: int, head_dim_v: int, *, add_dq: bool = False) -> int:
        """Shared memory of a CTA for the buckets ``head_dim`` and ``head_dim_v``: ``sizeof(Smem)`` of the kernel."""
        rows = self.block_own + self.num_stages * self.block_other
        tiles = rows * ((head_dim + head_dim_v) * self.itemsize + 2 * ROW_PADDING_BYTES)
        if self.products == "mma":
            ds_row = self.block_other * self.itemsize + ROW_PADDING_BYTES if add_dq else 0
            return tiles + 2 * self.num_stages * self.block_other * _TERM_BYTES + self.block_own * ds_row
        weights = self.block_own * (self.block_other * self.itemsize + ROW_PADDING_BYTES)  # P, then dS
        return tiles + weights + 2 * self.tile[0] * self.itemsize

    def is_legal(self, head_dim: int, head_dim_v: int, smem_limit_bytes: int, *, add_dq: bool = False) -> bool:
        """Whether the kernel compiles and launches in this shape (buckets as above)."""
        if self.products == "mma":
            tiling = self.block_own % (MMA_ROWS * self.num_warps) == 0 and self.num_stages >= 2
        else:
            tiling = self.block_own in (rows * self.num_warps for rows in _FMA_ROWS) and self.num_stages == 1
            tiling = tiling and not self.split_grads
        tiling = tiling and self.block_other <= self.num_threads
        fits = self.smem_bytes(head_dim, head_dim_v, add_dq=add_dq) <= smem_limit_bytes
        if add_dq and (self.own != "keys" or not can_add_dq(self.products, self.itemsize)):
            return False
        return tiling and self.block_other % 16 == 0 and self.num_threads <= 1024 and fits

    def constants(
        self,
        dtype_name: str,
        head_dim: int,
        head_dim_v: int,
        options: ForwardOptions = PLAIN,
        *,
        launch: Launch | None = None,
        aligned: bool = True,
        listed: bool = False,
        unrounded: tuple[bool, bool] = (False, False),
    ) -> dict[str, Any]:
        """The compile-time constants of one of the launches. Head dims are buckets, the dtype is that of q; with
        ``listed`` the tiles are those of a list. ``unrounded``: whether dq or dk, and whether dv, are written as the
        float32 numbers that they were summed in.
        """
        if launch is None:
            launch = self.launches()[0]
        constants: dict[str, Any] = {
            **kernel_types(dtype_name, self.products),
            **options.constants(),
            "ALIGNED": aligned,
            "TILE_LIST": listed,
            "OWN_KEYS": self.own == "keys",
            "GRAD_QK": launch.grad_qk,
            "GRAD_V": launch.grad_v,
            "BLOCK_OWN": self.block_own,
            "BLOCK_OTHER": self.block_other,
            "HEAD_DIM": head_dim,
            "HEAD_DIM_V": head_dim_v,
            "NUM_WARPS": self.num_warps,
            "SMEM_BYTES": self.smem_bytes(head_dim, head_dim_v, add_dq=launch.add_dq),
        }
        if self.products == "mma":
            of_qk, of_v = ("float" if wide else constants["Element"] for wide in unrounded)
            constants |= {
                "NUM_STAGES": self.num_stages,
                "ADD_DQ": launch.add_dq,
                "GradientQK": of_qk,
                "GradientV": of_v,
            }
        return constants


# In order of preference; the last of each kind fits into 99 KB of shared memory.
FLASH_BWD_CONFIGS = (
    # 16 bit. Blocks of 128 rows halve what is read of the other side; two row tiles a warp, where the registers hold
    # them, halve what is read of shared memory.
    FlashBwdConfig(
        "mma", "queries", 2, 64, block_own=128, block_other=32, num_warps=4, num_stages=2, score_options=False
    ),
    FlashBwdConfig("mma", "queries", 2, 128, block_own=128, block_other=64, num_warps=8, num_stages=2),
    FlashBwdConfig("mma", "queries", 2, 128, block_own=64, block_other=32, num_warps=4, num_stages=2),
    FlashBwdConfig(
        "mma", "queries", 2, 256, block_own=64, block_other=32, num_warps=4, num_stages=2, score_options=False
    ),
    FlashBwdConfig("mma", "queries", 2, 256, block_own=64, block_other=16, num_warps=4, num_stages=2),
    FlashBwdConfig("mma", "queries", 2, 256, block_own=32, block_other=16, num_warps=2, num_stages=2),
    FlashBwdConfig("mma", "keys", 2, 64, block_own=128, block_other=64, num_warps=8, num_stages=2, score_options=False),
    FlashBwdConfig("mma", "keys", 2, 64, block_own=128, block_other=32, num_warps=8, num_stages=2),
    FlashBwdConfig(
        "mma", "keys", 2, 128, block_own=128, block_other=32, num_warps=8, num_stages=2, score_options=False
    ),
    FlashBwdConfig("mma", "keys", 2, 128, block_own=128, block_other=16, num_warps=8, num_stages=2),
    FlashBwdConfig("mma", "keys", 2, 256, 64, 32, num_warps=4, num_stages=2, split_grads=True, score_options=False),
    FlashBwdConfig("mma", "keys", 2, 256, block_own=64, block_other=16, num_warps=4, num_stages=2, split_grads=True),
    FlashBwdConfig("mma", "keys", 2, 256, block_own=32, block_other=16, num_warps=2, num_stages=2, split_grads=True),
    # float32 in tf32
    FlashBwdConfig("mma", "queries", 4, 64, block_own=64, block_other=32, num_warps=4, num_stages=2),
    FlashBwdConfig("mma", "queries", 4, 128, block_own=64, block_other=16, num_warps=4, num_stages=2),
    FlashBwdConfig("mma", "queries", 4, 256, block_own=32, block_other=16, num_warps=2, num_stages=2),
    FlashBwdConfig("mma", "queries", 4, 256, block_own=16, block_other=16, num_warps=1, num_stages=2),
    FlashBwdConfig("mma", "keys", 4, 64, block_own=64, block_other=32, num_warps=4, num_stages=2),
    FlashBwdConfig("mma", "keys", 4, 128, block_own=64, block_other=16, num_warps=4, num_stages=2),
    FlashBwdConfig("mma", "keys", 4, 256, block_own=32, block_other=16, num_warps=2, num_stages=2, split_grads=True),
    FlashBwdConfig("mma", "keys", 4, 256, block_own=16, block_other=16, num_warps=1, num_stages=2, split_grads=True),
    # float32
    FlashBwdConfig("fma", "queries", 4, 64, block_own=32, block_other=64, num_warps=4, num_stages=1),
    FlashBwdConfig("fma", "queries", 4, 128, block_own=32, block_other=32, num_warps=4, num_stages=1),
    FlashBwdConfig("fma", "queries", 4, 256, block_own=32, block_other=32, num_warps=8, num_stages=1),
    FlashBwdConfig("fma", "queries", 4, 256, block_own=16, block_other=16, num_warps=4, num_stages=1),
    FlashBwdConfig("fma", "keys", 4, 64, block_own=32, block_other=64, num_warps=4, num_stages=1),
    FlashBwdConfig("fma", "keys", 4, 128, block_own=32, block_other=32, num_warps=4, num_stages=1),
    FlashBwdConfig("fma", "keys", 4, 256, block_own=32, block_other=32, num_warps=8, num_stages=1),
    FlashBwdConfig("fma", "keys", 4, 256, block_own=16, block_other=16, num_warps=4, num_stages=1),
    # float64
    FlashBwdConfig("fma", "queries", 8, 64, block_own=32, block_other=32, num_warps=4, num_stages=1),
    FlashBwdConfig("fma", "queries", 8, 128, block_own=32, block_other=32, num_warps=8, num_stages=1),
    FlashBwdConfig("fma", "queries", 8, 192, block_own=32, block_other=16, num_warps=8, num_stages=1),
    FlashBwdConfig("fma", "queries", 8, 256, block_own=16, block_other=16, num_warps=4, num_stages=1),
    FlashBwdConfig("fma", "queries", 8, 256, block_own=8, block_other=16, num_warps=2, num_stages=1),
    FlashBwdConfig("fma", "keys", 8, 64, block_own=32, block_other=32, num_warps=4, num_stages=1),
    FlashBwdConfig("fma", "keys", 8, 128, block_own=32, block_other=32, num_warps=8, num_stages=1),
    FlashBwdConfig("fma", "keys", 8, 192, block_own=32, block_other=16, num_warps=8, num_stages=1),
    FlashBwdConfig("fma", "keys", 8, 256, block_own=16, block_other=16, num_warps=4, num_stages=1, score_options=False),
    FlashBwdConfig("fma", "keys", 8, 256, block_own=16, block_other=16, num_warps=8, num_stages=1),
    FlashBwdConfig("fma", "keys", 8, 256, block_own=8, block_other=16, num_warps=2, num_stages=1, score_options=False),
    FlashBwdConfig("fma", "keys", 8, 256, block_own=8, block_other=16, num_warps=4, num_stages=1),
)


def select(
    dtype: np.dtype[Any],
    head_dim: int,
    head_dim_v: int,
    *,
    own: Side,
    smem_limit_bytes: int,
    options: ForwardOptions = PLAIN,
    tf32: bool = False,
    add_dq: bool = False,
) -> FlashBwdConfig:
    """Select the row for a problem and a side.

    Parameters
    ----------
    dtype : numpy.dtype
        Of q, k and v.
    head_dim, head_dim_v : int
        The buckets of D and E.
    own : "queries" or "keys"
    smem_limit_bytes : int
        Shared memory that one CTA may use.
    options : ForwardOptions
        Of the kernel.
    tf32 : bool
        Whether float32 is multiplied in tf32.
    add_dq : bool
        Whether keys that are owned give dq too.

    Raises
    ------
    LaunchError
        No row fits into the shared memory.
    """
    products, _ = products_of(dtype, tf32)
    return _select(products, own, dtype.itemsize, head_dim, head_dim_v, options.on_scores, smem_limit_bytes, add_dq)


@cache
def _select(
    products: str,
    own: Side,
    itemsize: int,
    head_dim: int,
    head_dim_v: int,
    on_scores: bool,
    smem_limit_bytes: int,
    add_dq: bool,
) -> FlashBwdConfig:
    for row in FLASH_BWD_CONFIGS:
        if (
            row.products == products
            and row.own == own
            and row.itemsize == itemsize
            and max(head_dim, head_dim_v) <= row.max_head_dim
            and row.score_options >= on_scores
            and row.is_legal(head_dim, head_dim_v, smem_limit_bytes, add_dq=add_dq)
        ):
            return row
    raise LaunchError(
        f"attention backward with head dims up to {head_dim} and {head_dim_v} needs more shared memory than the "
        f"{smem_limit_bytes} bytes that a CTA may use"
    )
