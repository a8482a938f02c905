"""How rows are moved between a padded array and a packed one: strides, the unit of a copy, and the launch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from cuattn.addresses import address
from cuattn.runtime.structs import struct_layout

NUM_THREADS = 256
MAX_UNIT_BYTES = 16
MAX_GRID_Y = 65535


@dataclass(frozen=True, slots=True)
class Movement:
    """A launch that moves rows: ``rows_per_cta`` rows a CTA, in units of ``unit_bytes``."""

    unit_bytes: int
    block: tuple[int, int]
    num_segments: int
    layout: np.void  # struct RowsLayout

    def grid(self, num_rows: int) -> tuple[int, int]:
        return -(-num_rows // self.block[1]), min(self.num_segments, MAX_GRID_Y)


def fold(padded: Any, packed: Any) -> Movement | None:
    """Fold ``padded`` [B, N, ...] and ``packed`` [T, ...] into a movement; None if a row has too many strided axes.

    A row may not be empty. Without tokens there are no packed rows, and it does not matter how they would lie.

    >>> padded, packed = np.zeros((2, 8, 3, 64), np.float16), np.zeros((9, 3, 64), np.float16)
    >>> movement = fold(padded, packed)
    >>> movement.num_segments, movement.unit_bytes
    (1, 16)
    """
    alignment = (address(padded) | address(packed)) % MAX_UNIT_BYTES
    packed_strides = packed.strides if len(packed) else padded.strides[1:]
    return _fold(padded.shape, padded.dtype.itemsize, padded.strides, len(packed), packed_strides, alignment)


@lru_cache(maxsize=1024)
def _fold(
    shape: tuple[int, ...],
    itemsize: int,
    padded_strides: tuple[int, ...],
    num_tokens: int,
    packed_strides: tuple[int, ...],
    alignment: int,
) -> Movement | None:
    segments = _segments(shape[2:], itemsize, padded_strides[2:], packed_strides[1:])
    if len(segments) > 2:
        return None
    (num_segments, *segment_strides), (segment_bytes, _, _) = [(1, 0, 0), *segments][-2:]
    # The stride of an axis of length 1 is arbitrary.
    batch_stride = padded_strides[0] if shape[0] > 1 else 0
    seq_stride = padded_strides[1] if shape[1] > 1 else 0
    token_stride = packed_strides[0] if num_tokens > 1 else 0
    strides = batch_stride, seq_stride, segment_strides[0], token_stride, segment_strides[1]
    unit_bytes = math.gcd(MAX_UNIT_BYTES, alignment, segment_bytes, *strides)
    segment_units = segment_bytes // unit_bytes
    num_passes = -(-segment_units // NUM_THREADS)
    block_x = -(-segment_units // num_passes)
    layout = struct_layout("padding_rows", "RowsLayout").pack(
        batch_stride=batch_stride,
        seq_stride=seq_stride,
        padded_segment_stride=segment_strides[0],
        token_stride=token_stride,
        packed_segment_stride=segment_strides[1],
        num_segments=num_segments,
        segment_units=segment_units,
        unit_bytes=unit_bytes,
        seqlen=shape[1],
        num_slots=shape[0] * shape[1],
        num_tokens=num_tokens,
    )
    return Movement(unit_bytes, (block_x, NUM_THREADS // block_x), num_segments, layout)


def _segments(
    shape: Sequence[int], itemsize: int, padded_strides: Sequence[int], packed_strides: Sequence[int]
) -> list[tuple[int, int, int]]:
    """Return the axes (extent, stride, stride) of a row, merged where memory has them as one; the last one is bytes."""
    merged: list[tuple[int, int, int]] = []
    for extent, *strides in (*zip(shape, padded_strides, packed_strides, strict=True), (itemsize, 1, 1)):
        if extent == 1:
            continue
        if merged and [stride * extent for stride in strides] == list(merged[-1][1:]):
            merged[-1] = (merged[-1][0] * extent, strides[0], strides[1])
        else:
            merged.append((extent, strides[0], strides[1]))
    if not merged or merged[-1][1:] != (1, 1):  # elements of one byte
        merged.append((1, 1, 1))
    return merged
