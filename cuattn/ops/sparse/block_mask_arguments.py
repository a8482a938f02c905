"""Checks of what block masks are made from: grids, compressed lists, matrices of scipy, sizes of blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuattn.allocation import allocating
from cuattn.errors import ArgumentError, ArrayTypeError, DTypeError, ShapeError
from cuattn.runtime.executor import executor_for
from cuattn.runtime.places import check_size
from cuattn.scalars import MAX_EXTENT, integer

__all__ = ["block_size_pair", "boolean", "check_csr", "check_grid", "integers", "num_blocks", "seqlen"]

_SQUARE = (64, 64)


def block_size_pair(block_size: Any) -> tuple[int, int]:
    """Return (bq, bk) of one integer or of two."""
    pair = (block_size, block_size) if not isinstance(block_size, tuple | list) else tuple(block_size)
    if len(pair) != 2:
        raise ArgumentError(f"block_size has {len(pair)} entries; an integer or a pair (bq, bk) is allowed")
    names = ("block_size", "block_size") if pair[0] is pair[1] else ("block_size[0]", "block_size[1]")
    bq, bk = (integer(name, size, 1, MAX_EXTENT) for name, size in zip(names, pair, strict=True))
    return bq, bk


def seqlen(name: str, value: Any) -> int:
    """Return a number of queries or of keys."""
    return integer(name, value, 0, MAX_EXTENT)


def num_blocks(seqlens: tuple[int, int], block_size: tuple[int, int]) -> tuple[int, int]:
    """Return (nq, nk), the blocks that the queries and the keys go into."""
    return -(-seqlens[0] // block_size[0]), -(-seqlens[1] // block_size[1])


def boolean(name: str, x: Any, ranks: range, axes: str) -> NDArray[np.bool_]:
    """Return an array of the host, or a list, of booleans; integers count as whether they are zero."""
    x = _on_host(name, x)
    if not x.size and x.dtype == np.float64:  # a list without elements
        x = x.astype(bool)
    if x.dtype.kind not in "biu":
        raise DTypeError(f"{name} has dtype {x.dtype}; bool and integer types are allowed")
    if x.ndim not in ranks:
        raise ShapeError(f"{name} has shape {list(x.shape)}, rank {x.ndim}; needed is {axes}")
    if x.dtype.kind == "b":
        return x
    with allocating(f"{name} of shape {list(x.shape)}", x.size):
        return np.asarray(x != 0)


def integers(name: str, x: Any, ranks: range, axes: str) -> NDArray[np.int64]:
    """Return an array of the host, or a list, of integers as int64."""
    x = check_size(name, _on_host(name, x))
    if not x.size and x.dtype == np.float64:
        x = x.astype(np.int64)
    if x.dtype.kind not in "iu":
        raise DTypeError(f"{name} has dtype {x.dtype}; integers are needed")
    if x.ndim not in ranks:
        raise ShapeError(f"{name} has shape {list(x.shape)}, rank {x.ndim}; needed is {axes}")
    with allocating(f"{name} of shape {list(x.shape)}", 8 * x.size):
        return x.astype(np.int64)  # what is too large for it becomes negative, which no entry may be


def check_grid(name: str, shape: tuple[int, ...], seqlens: tuple[int, int], block_size: tuple[int, int]) -> None:
    """Raise unless the last two axes of ``shape`` are the blocks of the queries and of the keys."""
    needed = num_blocks(seqlens, block_size)
    if tuple(shape[-2:]) != needed:
        raise ShapeError(
            f"{name} has shape {list(shape)}; seqlen_q = {seqlens[0]}, seqlen_k = {seqlens[1]} and block_size = "
            f"{block_size} need [..., {needed[0]}, {needed[1]}]"
        )


def check_csr(indptr: NDArray[np.int64], indices: NDArray[np.int64], grid: tuple[int, int]) -> None:
    """Raise unless lists of ``grid`` = (nq, nk) are what they should be; ``indptr`` is [..., nq + 1]."""
    if indptr.shape[-1] != grid[0] + 1:
        raise ShapeError(
            f"indptr has shape {list(indptr.shape)}; seqlen_q and block_size say {grid[0]} blocks of queries, which "
            f"need [..., {grid[0] + 1}]"
        )
    flat = indptr.ravel()
    if flat.size and flat[0] != 0:
        raise ArgumentError(f"indptr begins with {flat[0]}; the first list begins at 0")
    descends = flat[1:] < flat[:-1]  # a difference may overflow
    if descends.any():
        at = int(np.argmax(descends))
        raise ArgumentError(f"indptr descends from {flat[at]} to {flat[at + 1]} at index {at + 1}; it must ascend")
    if (flat[-1] if flat.size else 0) != indices.size:
        raise ArgumentError(f"indptr ends at {flat[-1] if flat.size else 0}; there are {indices.size} indices")
    heads = indptr.reshape(-1, grid[0] + 1)
    gaps = heads[1:, 0] != heads[:-1, -1]
    if gaps.any():
        at = int(np.argmax(gaps))
        raise ArgumentError(
            f"indptr of head {at + 1} begins with {heads[at + 1, 0]}; the lists before it end at {heads[at, -1]}"
        )
    wrong = (indices < 0) | (indices >= grid[1])
    if wrong.any():
        at = int(np.argmax(wrong))
        raise ArgumentError(f"indices[{at}] is {indices[at]}; there are {grid[1]} blocks of keys, counted from 0")
    row = np.repeat(np.arange(heads[:, :-1].size), np.diff(heads, axis=1).ravel())
    unsorted = (row[1:] == row[:-1]) & (indices[1:] <= indices[:-1])
    if unsorted.any():
        at = int(np.argmax(unsorted))
        raise ArgumentError(
            f"indices[{at + 1}] is {indices[at + 1]} behind {indices[at]}; the blocks of a row ascend, each once"
        )


def _on_host(name: str, x: Any) -> NDArray[Any]:
    """Return an array of the host as it is, a list as an array; raises `ArrayTypeError` for one of a GPU."""
    executor = executor_for() if isinstance(x, list | tuple) else executor_for(**{name: x})
    if executor.name != "host":
        raise ArrayTypeError(f"{name} is on a GPU; a mask is made on the CPU: pass cupy.asnumpy({name})")
    return np.asarray(executor.metadata(name, x) if isinstance(x, list | tuple) else executor.asarray(name, x))
