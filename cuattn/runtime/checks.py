"""Checks of arrays that every operation makes: results that a caller gives, workspaces, dtypes and extents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from cuattn.addresses import address, byte_bounds, overlaps_itself
from cuattn.dtypes import ELEMENT_TYPES
from cuattn.errors import ArgumentError, ArrayTypeError, DTypeError, OverlapError, ShapeError
from cuattn.scalars import MAX_EXTENT, integer

__all__ = [
    "WORKSPACE_ALIGNMENT",
    "check_apart",
    "check_apart_or_same",
    "check_axis",
    "check_dtype",
    "check_extents",
    "check_out",
    "check_workspace",
    "check_writable",
]

WORKSPACE_ALIGNMENT = 16  # bytes


@lru_cache(maxsize=64)
def check_dtype(name: str, dtype: Any) -> str:
    """Return the name of ``dtype``; DTypeError unless the kernels take it."""
    if dtype.name not in ELEMENT_TYPES or not dtype.isnative:
        raise DTypeError(f"{name}: dtype {dtype} ({dtype.str}); {', '.join(ELEMENT_TYPES)} (native) are allowed")
    return str(dtype.name)


def check_extents(name: str, shape: Sequence[int]) -> None:
    """Raise ShapeError if the kernels cannot count one of the axes."""
    if any(extent > MAX_EXTENT for extent in shape):
        raise ShapeError(f"{name}: shape {tuple(shape)}; an extent may be at most {MAX_EXTENT}")


def check_axis(axis: Any, ndim: int, name: str = "x") -> int:
    """Return ``axis`` of the array ``name`` as a number from 0 to ``ndim`` - 1."""
    if ndim == 0:
        raise ShapeError(f"{name}: an array of rank 0 has no axis; a rank of at least 1 is allowed")
    return integer("axis", axis, -ndim, ndim - 1) % ndim


def check_out(
    name: str,
    x: Any,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    what: str = "result",
    *,
    unrounded: np.dtype[Any] | None = None,
) -> None:
    """Raise unless ``x``, the argument ``name``, is an array that a result of ``shape`` and ``dtype`` can go to.

    ``unrounded``: the dtype that the result has before it is rounded, where ``x`` may be of that one as well.
    """
    if tuple(x.shape) != shape:
        raise ShapeError(f"{name} has shape {tuple(x.shape)}; the {what} has shape {shape}")
    if x.dtype != dtype and (unrounded is None or x.dtype != unrounded):
        wider = "" if unrounded in (None, dtype) else f", or {unrounded} where it is not to be rounded"
        raise DTypeError(f"{name} has dtype {x.dtype}; the {what} has dtype {dtype}{wider}")
    check_writable(name, x)


def check_writable(name: str, x: Any) -> None:
    """Raise unless a kernel may write every element of ``x``, the argument ``name``, and each for itself."""
    if isinstance(x, np.ndarray) and not x.flags.writeable:
        raise ArrayTypeError(f"{name} is read-only; a writable array is needed")
    if overlaps_itself(x):
        raise OverlapError(f"{name} has strides {x.strides} for shape {tuple(x.shape)}: its elements share memory")


def check_apart(name: str, memory: tuple[int, int], inputs: Mapping[str, tuple[int, int]]) -> None:
    """Raise if the argument ``name`` and one of ``inputs`` lie in one memory range; all by their `byte_bounds`."""
    low, high = memory
    for other, (other_low, other_high) in inputs.items():
        if low < other_high and other_low < high:
            raise OverlapError(f"{name} lies in the memory range of {other}; it must not overlap it")


def check_workspace(workspace: Any) -> None:
    """Raise unless ``workspace`` is memory that a call may use: bytes in a row, aligned, writable."""
    if workspace.ndim != 1:
        raise ShapeError(f"workspace has shape {tuple(workspace.shape)}; one axis is needed, of bytes")
    if workspace.dtype != np.uint8:
        raise DTypeError(f"workspace has dtype {workspace.dtype}; uint8 is needed")
    if isinstance(workspace, np.ndarray) and not workspace.flags.writeable:
        raise ArrayTypeError("workspace is read-only; a writable array is needed")
    if workspace.strides != (1,):
        raise ArgumentError(f"workspace has strides {workspace.strides}; a contiguous array is needed")
    if workspace.size and address(workspace) % WORKSPACE_ALIGNMENT:
        raise ArgumentError(
            f"workspace begins at address {address(workspace):#x}; a multiple of {WORKSPACE_ALIGNMENT} bytes is needed"
        )


def check_apart_or_same(name: str, x: Any, others: Mapping[str, Any], same_as: str) -> None:
    """Raise if the argument ``name`` lies in the memory of one of ``others``; it may be ``same_as``, one of them.

    That is: the same array, element for element, for a result that a kernel writes over its input.
    """
    given = others[same_as]
    low, high = byte_bounds(x)
    same = (address(given), given.dtype, given.shape, given.strides) == (address(x), x.dtype, x.shape, x.strides)
    for other, array in others.items():
        other_low, other_high = byte_bounds(array)
        if low < other_high and other_low < high and not (same and other == same_as):
            rule = f"it must be {same_as} itself, element for element, or elsewhere"
            raise OverlapError(f"{name} lies in the memory range of {other}; {rule}")
