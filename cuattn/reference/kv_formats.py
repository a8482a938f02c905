"""The numbers that codes of a key/value cache stand for, and the codes that numbers become."""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

from cuattn.formats import KV_FORMATS, KVFormat, numpy_dtype
from cuattn.reference.softmax import Array

__all__ = ["Quantized", "dequantize", "encode", "quantize"]


def dequantize(
    codes: ArrayLike,
    kv_format: Any = None,
    *,
    scale: ArrayLike | None = None,
    block_scales: ArrayLike | None = None,
) -> Array:
    """code * scale, or code * block scale * scale: [..., G, D] in float64; the codes themselves if there is no scale.

    `codes` [..., G, D], or [..., G, D / 2] in the formats of 4 bits, of which the low nibble comes first. `scale` is
    one number, [G], or [..., G]; `block_scales` [..., G, blocks] are of neighboring numbers of a head.

    >>> dequantize(np.array([[0x21, 0x7F]], np.uint8), "mxfp4", block_scales=np.array([[128]], np.uint8)).tolist()
    [[1.0, 2.0, -12.0, 12.0]]
    """
    values = np.asarray(codes)
    row = None if kv_format is None else KV_FORMATS[getattr(kv_format, "name", kv_format)]
    if row is not None and row.elements_per_item == 2:
        nibbles = np.stack([values & 15, values >> 4], axis=-1).reshape(*values.shape[:-1], 2 * values.shape[-1])
        values = nibbles.view(ml_dtypes.float4_e2m1fn)
    elif row is not None and values.dtype == np.uint8:
        values = values.view(numpy_dtype(row.code_dtype))
    if scale is None and block_scales is None:
        return values
    numbers = values.astype(np.float64)
    if row is not None and block_scales is not None:
        blocks = np.asarray(block_scales)
        if blocks.dtype == np.uint8:
            blocks = blocks.view(numpy_dtype(str(row.block_scale_dtype)))
        factors = np.repeat(blocks.astype(np.float64), row.block_size, axis=-1)
        numbers = numbers * factors[..., : numbers.shape[-1]]
    if scale is not None:
        numbers = numbers * np.asarray(scale).astype(np.float64)[..., None]
    return numbers


class Quantized(NamedTuple):
    """Codes and scales that stand for numbers [..., D] in a cache."""

    codes: NDArray[Any]  #: [..., D], or uint8 [..., D / 2] in the formats of 4 bits
    scale: NDArray[Any] | None  #: float32 [...], if it was made here
    block_scales: NDArray[Any] | None  #: [..., blocks], in formats that have them


def encode(numbers: ArrayLike, kv_format: str) -> NDArray[Any]:
    """Return the nearest codes, ties to even, one an item, and at most the largest. NaN becomes 0 where it has none.

    >>> encode([2.4, 2.5, 3.5, -100.0], "mxfp4").tolist()
    [2.0, 2.0, 4.0, -6.0]
    """
    row = KV_FORMATS[kv_format]
    near = np.clip(np.asarray(numbers, np.float32), -row.max_code, row.max_code)
    if row.code_dtype == "int8":
        return np.rint(np.nan_to_num(near)).astype(np.int8)
    if row.code_dtype == "float4_e2m1fn":
        near = np.nan_to_num(near)
    return near.astype(numpy_dtype(row.code_dtype))


def quantize(
    numbers: ArrayLike, kv_format: str, *, scale: ArrayLike | None = None, per_slot: bool = False
) -> Quantized:
    """Convert `numbers` [..., D] to codes of number / scale, or number / (block scale * scale), each step in float32.

    `scale`, 1 by default, is one number, [G] or [..., G]; `per_slot` makes one for every D numbers instead, their
    largest magnitude over the largest code. Block scales are made here as well: for "nvfp4" the largest magnitude / 6 /
    scale as e4m3, for "mxfp4" the largest power of two that is not above the largest magnitude / scale / 4.

    A scale of 0 has codes of 0. One of numbers with an infinity is made from the largest float; with a NaN it is NaN,
    unless the codes have a NaN themselves.

    >>> quantize(np.array([0.25, -3.0]), "int8", per_slot=True).codes.tolist()
    [11, -127]
    >>> codes, _, block_scales = quantize(np.array([0.25, -3.0]), "mxfp4")
    >>> dequantize(codes, "mxfp4", block_scales=block_scales).tolist()
    [0.25, -3.0]
    """
    row = KV_FORMATS[kv_format]
    values = np.asarray(numbers).astype(np.float32)
    made = block_scales = None
    factors: NDArray[Any] = np.asarray(1.0 if scale is None else scale, np.float32)
    with np.errstate(divide="ignore", over="ignore", under="ignore", invalid="ignore"):
        if per_slot:
            factors = made = _largest(values, row) / np.float32(row.max_code)
        factors = factors[..., None]
        if row.block_size:
            size, count = values.shape[-1], row.blocks(values.shape[-1])
            padded = np.zeros((*values.shape[:-1], count * row.block_size), np.float32)
            padded[..., :size] = values
            largest = _largest(padded.reshape(*values.shape[:-1], count, row.block_size), row)
            block_scales = _block_scales(largest, factors, row)
            factors = np.repeat(block_scales.astype(np.float32) * factors, row.block_size, axis=-1)[..., :size]
        no_scale = (factors == 0) & ~np.isnan(values)
        codes = encode(np.where(no_scale, np.float32(0), values / factors), kv_format)
    if row.elements_per_item == 2:
        nibbles = codes.view(np.uint8) & 15
        codes = nibbles[..., 0::2] | nibbles[..., 1::2] << 4
    return Quantized(codes, made, block_scales)


def _largest(values: NDArray[Any], row: KVFormat) -> NDArray[Any]:
    """Return the magnitude that a scale is made from, over the last axis."""
    magnitudes = np.abs(values)
    if numpy_dtype(row.code_dtype).name.startswith("float8"):
        magnitudes = np.where(np.isnan(magnitudes), np.float32(0), magnitudes)
    largest = magnitudes.max(axis=-1, initial=0)
    return np.where(np.isinf(largest), np.finfo(np.float32).max, largest).astype(np.float32)


def _block_scales(largest: NDArray[Any], scale: NDArray[Any], row: KVFormat) -> NDArray[Any]:
    dtype = numpy_dtype(str(row.block_scale_dtype))
    if row.name == "nvfp4":
        return np.minimum(largest / np.float32(6) / scale, np.float32(448)).astype(dtype)
    needed: NDArray[Any] = np.asarray(largest / scale)
    needed[np.isinf(needed)] = np.finfo(np.float32).max
    exponent = np.frexp(needed)[1] - 1 - 2  # of the first digit of the number, and of 6
    biased = np.where(needed > 0, np.maximum(exponent + 127, 0), 0)
    return np.where(np.isnan(needed), 255, biased).astype(np.uint8).view(dtype)
