"""The factors of quantized keys and values, and every check of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cuattn.addresses import address
from cuattn.errors import ArgumentError, DTypeError, ShapeError
from cuattn.formats import KVFormat
from cuattn.messages import shown
from cuattn.runtime.arrays import contiguous
from cuattn.runtime.executor import Executor
from cuattn.runtime.small_arrays import small_array
from cuattn.scalars import as_real

__all__ = ["Scale", "check_block_scales", "check_scale", "is_per_slot", "of_slots"]

_FLOAT32 = np.dtype(np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Scale:
    """Factors of cached numbers, float32; strides in elements, of the axes page (or batch), slot and head.

    One per tensor (every stride 0), one a head (only the head's stride may be above 0), or one a slot and head.
    """

    array: Any
    strides: tuple[int, int, int]
    per_slot: bool


def is_per_slot(value: Any) -> bool:
    """Whether a value can only be an array with an entry for every slot: data of a cache's size, not a small array."""
    try:
        return bool(value.ndim == 3)
    except Exception:  # no array, or a foreign object that raises what it likes
        return False


def of_slots(value: Any) -> Any:
    """Return ``value`` if it has an entry for every slot, so that it must lie where the cache does; else None."""
    return value if value is not None and is_per_slot(value) else None


def check_scale(
    executor: Executor, name: str, value: Any, kv_format: KVFormat, slots: tuple[int, int, int]
) -> Scale | None:
    """Check ``k_scale`` or ``v_scale``, of a cache whose first axes are ``slots``: pages (or batch), slots, heads."""
    if value is None:
        return None
    if not kv_format.quantized:
        raise ArgumentError(f"{name} is given, but {kv_format.name} is not a quantized format; None is needed")
    if isinstance(value, bool | np.bool_ | str):
        raise ArgumentError(f"{name} is {shown(value)}; a number or an array of numbers is allowed")
    number = as_real(value)
    if number is not None:
        value = np.asarray(number)
    if not is_per_slot(value):
        shapes: tuple[tuple[int, ...], ...] = ((),) if kv_format.block_size else ((), slots[2:])
        array = small_array(executor, name, value, shapes, _FLOAT32)
        return Scale(array, (0, 0, 0 if array.size == 1 else 1), False)
    array = executor.asarray(name, value)
    if kv_format.block_size:
        raise ShapeError(f"{name} has shape {list(array.shape)}; {kv_format.name} has one factor per tensor: []")
    if array.dtype != _FLOAT32:
        raise DTypeError(f"{name} has dtype {array.dtype} ({array.dtype.str}); float32 (native) is needed")
    if tuple(array.shape) != slots:
        raise ShapeError(f"{name} has shape {list(array.shape)}; allowed is [] or {[slots[2]]} or {list(slots)}")
    if (address(array) | array.strides[0] | array.strides[1] | array.strides[2]) % 4:
        array = contiguous(executor, array)
    page, slot, head = array.strides
    return Scale(array, (page // 4, slot // 4, head // 4), True)


def check_block_scales(
    executor: Executor, name: str, value: Any, kv_format: KVFormat, slots: tuple[int, int, int], head_dim: int
) -> Any:
    """Check ``k_block_scales`` or ``v_block_scales``: bytes, the last axis contiguous; None for a format without."""
    if value is None:
        if kv_format.block_size:
            raise ArgumentError(f"{name} is None; {kv_format.name} needs a scale for {kv_format.block_size} numbers")
        return None
    if not kv_format.block_size:
        raise ArgumentError(f"{name} is given, but {kv_format.name} has no block scales; None is needed")
    array = executor.asarray(name, value)
    if array.dtype.name not in kv_format.block_scale_dtypes:
        allowed = " or ".join(kv_format.block_scale_dtypes)
        raise DTypeError(f"{name} has dtype {array.dtype}; {allowed} is needed for {kv_format.name}")
    shape = (*slots, kv_format.blocks(head_dim))
    if tuple(array.shape) != shape:
        raise ShapeError(f"{name} has shape {list(array.shape)}; {list(shape)} is needed")
    if array.strides[3] != 1 and shape[3] > 1:
        array = contiguous(executor, array)
    return array
