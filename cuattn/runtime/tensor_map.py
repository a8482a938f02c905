"""Tensor maps: what the Tensor Memory Accelerator (TMA) of compute capability 9.0 has to know about an array.

A tensor map describes an array of up to five dimensions and the box of it that one ``cp.async.bulk.tensor``
instruction copies. It is passed to a kernel by value, as ``const __grid_constant__ TensorMap map`` (128 bytes, aligned
to 64). One function makes it for both executors, with the same checks: for CuPy arrays the driver encodes it
(``cuTensorMapEncodeTiled``), for NumPy arrays the host executor has an encoding of its own.

Dimensions are listed innermost first throughout, as the hardware counts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cuattn.addresses import address
from cuattn.errors import ArgumentError, ArrayTypeError, DTypeError, NotSupportedError, ShapeError
from cuattn.host import tensor_map as host_encoding
from cuattn.host.tensor_map import DATA_TYPES, FILLS, L2_PROMOTIONS, MAX_RANK, SWIZZLE_BYTES, TensorMap
from cuattn.messages import shown
from cuattn.runtime import tensor_map_driver
from cuattn.scalars import choice, integer

__all__ = ["TensorMap", "tensor_map"]

_MAX_EXTENT, _MAX_STRIDE, _MAX_BOX, _MAX_STEP = 1 << 32, 1 << 40, 256, 8
_ADDRESS_UNIT = 16  # bytes


def tensor_map(
    array: Any,
    box: Sequence[int],
    *,
    swizzle: str = "none",
    interleave: str = "none",
    l2_promotion: str = "128B",
    fill: str = "zeros",
    element_strides: Sequence[int] | None = None,
    dims: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> TensorMap:
    """Describe ``array`` to the TMA, and the box that one copy moves.

    A box is named by the coordinates of its first element. Loads fill what lies outside the array, stores skip it.

    Parameters
    ----------
    array : array, 1 to 5 dimensions, last axis contiguous
        Integers of 8 to 64 bits, float16, bfloat16, float32, float64 or an 8-bit float. Its address is a multiple of 16
        bytes, its other strides are too, not negative and below 2**40.
    box : sequence of int
        Elements in each dimension, **innermost first**, 1 to 256. The innermost takes a multiple of 16 bytes.
    swizzle : {"none", "32B", "64B", "128B"}
        How rows of that many bytes are permuted in 16-byte pieces in shared memory, so that a column of them is read
        without bank conflicts. The innermost extent of the box is then exactly that many bytes.
    interleave : {"none"}
        Channel-interleaved layouts are not supported.
    l2_promotion : {"none", "64B", "128B", "256B"}
        Bytes that a miss brings into the L2 cache.
    fill : {"zeros", "nan"}
        What elements outside the array are loaded as; NaN for floating-point arrays only.
    element_strides : sequence of int, optional
        Steps within the box, 1 to 8, innermost first: only every such element is copied, ``ceil(box / step)`` of them.
        The innermost step is 1.
    dims, strides : sequence of int, optional
        Another view of the same memory: extents in elements and strides in bytes, both innermost first, from the
        array's first element on. The first stride is the item size. Default: the array's own.

    Returns
    -------
    TensorMap

    Raises
    ------
    ArrayTypeError
        ``array`` is neither a NumPy nor a CuPy array.
    DTypeError
        Its dtype has no counterpart, or ``fill="nan"`` for integers.
    ShapeError
        The rank, an extent, the box or its steps are out of range, or the view is larger than the array.
    ArgumentError
        The address, a stride or an option is not one of those allowed.
    NotSupportedError
        An interleaved layout, a swizzled box narrower than the swizzle, or no driver that encodes maps.
    LaunchError
        The driver refuses the map.

    Notes
    -----
    The rules are the driver's for ``cuTensorMapEncodeTiled`` (CUDA Driver API, "Tensor Map Object Management"; PTX ISA,
    "Tensors").

    Examples
    --------
    Tiles of 64 keys by 64 columns of a bfloat16 array [batch, seqlen, num_heads, head_dim]:

    >>> import ml_dtypes, numpy as np
    >>> from cuattn import host
    >>> from cuattn import tensor_map
    >>> k = host.empty((2, 512, 8, 128), ml_dtypes.bfloat16)
    >>> keys = tensor_map(k.transpose(0, 2, 1, 3), (64, 64, 1, 1), swizzle="128B")
    >>> keys.dims, keys.box_bytes
    ((128, 512, 8, 2), 8192)
    """
    _check_array(array)
    choice("tensor_map: swizzle", swizzle, tuple(SWIZZLE_BYTES))
    choice("tensor_map: fill", fill, FILLS)
    choice("tensor_map: l2_promotion", l2_promotion, L2_PROMOTIONS)
    if not isinstance(interleave, str) or interleave != "none":
        raise NotSupportedError(f"tensor_map: interleave is {interleave!r}; only 'none' is supported")
    if fill == "nan" and not array.dtype.name.startswith(("float16", "float32", "float64", "bfloat16")):
        raise DTypeError(
            f"tensor_map: fill='nan' for {array.dtype}; only float16, bfloat16, float32 and float64 have it"
        )
    extents, byte_strides = _view(array, dims, strides)
    steps = (1,) * len(extents) if element_strides is None else _integers("element_strides", element_strides)
    extents_of_box = _integers("box", box)
    _check_box(array.dtype.itemsize, extents, extents_of_box, steps, swizzle)
    described = TensorMap(array, extents, byte_strides, extents_of_box, steps, swizzle, fill, l2_promotion)
    encode = host_encoding.encode if isinstance(array, np.ndarray) else tensor_map_driver.encode
    return replace(described, value=encode(described, address(array)))


def _check_array(array: Any) -> None:
    if not isinstance(array, np.ndarray) and not hasattr(array, "__cuda_array_interface__"):
        raise ArrayTypeError(f"tensor_map: array is a {type(array).__name__}; a NumPy or a CuPy array is needed")
    if array.dtype.name not in DATA_TYPES or not array.dtype.isnative:
        raise DTypeError(f"tensor_map: array has dtype {array.dtype}; allowed are {', '.join(DATA_TYPES)}")
    if address(array) % _ADDRESS_UNIT:
        raise ArgumentError(
            f"tensor_map: the array's address is {address(array):#x}, not a multiple of {_ADDRESS_UNIT} bytes"
        )


def _view(
    array: Any, dims: Sequence[int] | None, strides: Sequence[int] | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return extents and byte strides, innermost first, checked."""
    if (dims is None) != (strides is None):
        raise ArgumentError("tensor_map: dims and strides are given together or not at all")
    itemsize = int(array.dtype.itemsize)
    extents = tuple(reversed(array.shape)) if dims is None else _integers("dims", dims)
    steps = list(reversed(array.strides) if strides is None else _integers("strides", strides))
    if not 1 <= len(extents) <= MAX_RANK:
        raise ShapeError(f"tensor_map: {len(extents)} dimensions; 1 to {MAX_RANK} are allowed")
    if len(steps) != len(extents):
        raise ShapeError(f"tensor_map: {len(steps)} strides for {len(extents)} dims; they must be as many")
    for index, extent in enumerate(extents):
        if not 1 <= extent <= _MAX_EXTENT:
            raise ShapeError(f"tensor_map: dims[{index}] is {extent}; allowed is 1 to 2**32 (dims, innermost first)")
    for index, extent in enumerate(extents):
        if extent == 1:  # never stepped over: whatever NumPy says there, use what a packed array would have
            packed = steps[index - 1] * extents[index - 1] if index else itemsize
            steps[index] = -(-packed // _ADDRESS_UNIT) * _ADDRESS_UNIT if index else itemsize
    if steps[0] != itemsize:
        raise ArgumentError(
            f"tensor_map: strides[0], the innermost, is {steps[0]} bytes; it must be the item size, {itemsize}"
        )
    for index, step in enumerate(steps[1:], 1):
        if step % _ADDRESS_UNIT or not 0 <= step < _MAX_STRIDE:
            raise ArgumentError(
                f"tensor_map: strides[{index}] is {step} bytes; a multiple of {_ADDRESS_UNIT} from 0 to below 2**40 "
                "is allowed (strides, innermost first)"
            )
    last = sum((extent - 1) * step for extent, step in zip(extents, steps, strict=True)) + itemsize
    if last > _bytes_after_start(array):
        raise ShapeError(
            f"tensor_map: dims {extents} with strides {tuple(steps)} reach to byte {last}; "
            f"the array has {_bytes_after_start(array)}"
        )
    return extents, tuple(steps)


def _integers(name: str, values: Any) -> tuple[int, ...]:
    """A list of integers as the caller has it; how large they may be is for others to say."""
    if not isinstance(values, list | tuple | np.ndarray) or np.ndim(values) != 1:
        raise ArgumentError(f"tensor_map: {name} is {shown(values)}; a sequence of integers is needed")
    most = 2**63 - 1
    return tuple(integer(f"tensor_map: {name}[{index}]", value, -most, most) for index, value in enumerate(values))


def _check_box(
    itemsize: int, extents: tuple[int, ...], box: tuple[int, ...], steps: tuple[int, ...], swizzle: str
) -> None:
    for name, values, most in (("box", box, _MAX_BOX), ("element_strides", steps, _MAX_STEP)):
        if len(values) != len(extents):
            raise ShapeError(f"tensor_map: {name} has {len(values)} entries for {len(extents)} dimensions")
        for index, value in enumerate(values):
            if not 1 <= value <= most:
                raise ShapeError(f"tensor_map: {name}[{index}] is {value}; allowed is 1 to {most} (innermost first)")
    if steps[0] != 1:
        raise ShapeError(f"tensor_map: element_strides[0], the innermost, is {steps[0]}; only 1 is allowed")
    inner = box[0] * itemsize
    if inner % _ADDRESS_UNIT:
        raise ShapeError(
            f"tensor_map: box[0] is {box[0]} elements, {inner} bytes; it must be a multiple of {_ADDRESS_UNIT} bytes"
        )
    width = SWIZZLE_BYTES[swizzle]
    if width and inner > width:
        raise ShapeError(f"tensor_map: box[0] is {box[0]} elements, {inner} bytes; swizzle {swizzle!r} allows {width}")
    if width and inner < width:
        raise NotSupportedError(
            f"tensor_map: box[0] is {box[0]} elements, {inner} bytes; with swizzle {swizzle!r} it must be {width} "
            "(the layout of narrower rows is not documented)"
        )


def _bytes_after_start(array: Any) -> int:
    """Return the bytes from the first element to the end of the last that lies behind it; 0 for an empty array."""
    if 0 in array.shape:
        return 0
    behind = ((extent - 1) * max(step, 0) for extent, step in zip(array.shape, array.strides, strict=True))
    return int(sum(behind)) + int(array.dtype.itemsize)
