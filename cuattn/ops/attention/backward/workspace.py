"""The memory that the backward pass needs beside its results: what it holds, and how large it is.

Nothing in it grows with seqlen_q * seqlen_k, except one byte for each tile of a bias or mask that itself has an element
for each query and key; and parts of the gradient of a bias take a few times its size where it is small, at most 4 MiB.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cuattn.ops.attention import tile_classes
from cuattn.ops.attention.backward import bias_launch
from cuattn.ops.attention.backward.config import FlashBwdConfig
from cuattn.ops.attention.backward.dq_sums import DqSums
from cuattn.ops.attention.backward.plan import order_free, select_configs

if TYPE_CHECKING:
    from cuattn.ops.attention.backward.problem import BackwardProblem

__all__ = ["allocate", "classes_name", "nbytes"]

_ALIGNMENT = 16  # bytes; of every part

Part = tuple[str, tuple[int, ...], Any]  # name, shape, dtype


def nbytes(problem: BackwardProblem) -> int:
    """Return the bytes of the workspace of a call."""
    parts = _parts(problem, select_configs(problem))
    return sum(_aligned(math.prod(shape) * np.dtype(dtype).itemsize) for _, shape, dtype in parts)


def allocate(problem: BackwardProblem, configs: Sequence[FlashBwdConfig]) -> dict[str, Any]:
    """Return the parts of the workspace by name: in the caller's memory, or each in memory of its own."""
    arrays, offset = {}, 0
    for name, shape, dtype in _parts(problem, configs):
        if problem.workspace is None:
            arrays[name] = problem.executor.empty(shape, dtype)
        else:
            size = math.prod(shape) * np.dtype(dtype).itemsize
            arrays[name] = problem.workspace[offset : offset + size].view(dtype).reshape(shape)
            offset += _aligned(size)
    return arrays


def classes_name(tile: tuple[int, int]) -> str:
    """Name the part with the classes of tiles of so many queries and keys."""
    return f"classes_{tile[0]}x{tile[1]}"


def _parts(problem: BackwardProblem, configs: Sequence[FlashBwdConfig]) -> Iterator[Part]:
    extents, accumulator = problem.forward.extents, problem.forward.accumulator
    yield "lse", extents.lse_shape, accumulator
    yield "delta", extents.lse_shape, accumulator
    if order_free(problem):
        yield "dq", DqSums.shape(extents), np.float32
    options = problem.forward.options
    if problem.listed is None and (options.bias is not None or options.mask is not None):
        for tile in dict.fromkeys(config.tile for config in configs):
            shape = tile_classes.shape(options, *tile)
            if shape is not None:
                yield classes_name(tile), shape, np.uint8
    if problem.return_dbias:
        yield "dbias", (bias_launch.partial_nbytes(problem),), np.uint8


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
