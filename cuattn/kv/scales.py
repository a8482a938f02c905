"""Scales of cached numbers, as `append_kv` takes them: read where many slots share one, else made and written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cuattn.errors import ArgumentError, DTypeError, NonFiniteError, ShapeError
from cuattn.formats import KVFormat
from cuattn.ops.decode.scales import is_per_slot
from cuattn.runtime.executor import Executor
from cuattn.runtime.small_arrays import small_array
from cuattn.scalars import as_real

__all__ = ["Scale", "check_block_scales", "check_scale"]


@dataclass(frozen=True, slots=True, eq=False)
class Scale:
    """One number, or an array of them, float32; strides in elements, of the axes page, slot and head."""

    value: float = 1.0  # where there is no array
    array: Any = None
    strides: tuple[int, int, int] = (0, 0, 0)
    per_slot: bool = False  # made by the kernel, not read


def check_scale(executor: Executor, name: str, scale: Any, shape: tuple[int, ...], row: KVFormat) -> Scale:
    """Check ``scale``, for pages of ``shape`` [num_pages, page_size, kv_heads]."""
    if scale is None:
        return Scale()
    if not row.quantized:
        raise ArgumentError(f"{name} is given, but pages of {row.name} hold the numbers themselves; leave it out")
    number = as_real(scale)
    if number is not None:
        return Scale(_positive(name, number))
    if is_per_slot(scale):
        return _per_slot(executor, name, scale, shape, row)
    shapes = [()] if row.block_size else [(), shape[2:]]
    array = small_array(executor, name, scale, shapes, np.dtype(np.float32))
    seen = executor.metadata(name, scale)
    if isinstance(seen, np.ndarray) and seen.size:
        _positive(name, float(seen.min()))
    return Scale(array=array, strides=(0, 0, 1 if array.ndim else 0))


def _per_slot(executor: Executor, name: str, scale: Any, shape: tuple[int, ...], row: KVFormat) -> Scale:
    array = executor.asarray(name, scale)
    if row.block_size:
        raise ShapeError(
            f"{name} has shape {tuple(array.shape)}; {row.name} has block scales, and one number for all of them"
        )
    if array.dtype != np.float32:
        raise DTypeError(f"{name} has dtype {array.dtype}; scales of slots are written as float32")
    if tuple(array.shape) != shape:
        raise ShapeError(f"{name} has shape {tuple(array.shape)}; one number, [{shape[2]}] or {list(shape)} is needed")
    page, slot, head = (stride // array.dtype.itemsize for stride in array.strides)
    return Scale(array=array, strides=(page, slot, head), per_slot=True)


def _positive(name: str, smallest: float) -> float:
    """Return a scale, or the smallest of several, as float32 has it."""
    with np.errstate(over="ignore", under="ignore"):
        value = float(np.float32(smallest))
    if not np.isfinite(value):
        raise NonFiniteError(f"{name} is {smallest}; a finite float32 is needed")
    if value <= 0:
        raise ArgumentError(f"{name} holds {smallest}; numbers above 0 are needed, as numbers are divided by it")
    return value


def check_block_scales(
    executor: Executor, name: str, blocks: Any, shape: tuple[int, ...], head_dim: int, row: KVFormat
) -> Any:
    """Check ``blocks`` for pages of ``shape``; None where the format has none."""
    if not row.block_size:
        if blocks is not None:
            raise ArgumentError(f"{name} is given, but {row.name} has no block scales; leave it out")
        return None
    needed = (*shape, row.blocks(head_dim))
    if blocks is None:
        raise ArgumentError(f"{name} is None; {row.name} needs an array {list(needed)} to write block scales into")
    array = executor.asarray(name, blocks)
    if array.dtype.name not in row.block_scale_dtypes:
        raise DTypeError(f"{name} has dtype {array.dtype}; {' or '.join(row.block_scale_dtypes)} is needed")
    if tuple(array.shape) != needed:
        raise ShapeError(f"{name} has shape {tuple(array.shape)}; {list(needed)} is needed")
    return array
