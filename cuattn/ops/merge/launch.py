"""How the kernel of `merge_states` is launched: its variants, the shape of a CTA, strides.

>>> shape = block_shape(num_rows=64, num_parts=2, head_dim=128, pack=8)
>>> shape.lanes, shape.groups, shape.rows
(16, 1, 16)
>>> block_shape(num_rows=64, num_parts=128, head_dim=128, pack=8).groups
8
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from cuattn.addresses import address
from cuattn.dtypes import ELEMENT_TYPES, PACK_BYTES
from cuattn.runtime.executor import Executor
from cuattn.runtime.structs import struct_layout

NUM_THREADS = 256
MAX_LANES = 32
MAX_BLOCK_Z = 64
MAX_GRID_X = 2**31 - 1
MAX_GROUPS = 8
MIN_PARTS_PER_GROUP = 4
ENOUGH_THREADS = 1 << 16  # rows times lanes that fill a GPU of 100 and more SMs without several groups a row


class BlockShape(NamedTuple):
    """Threads of a CTA: lanes share the columns of a row, groups its parts."""

    lanes: int
    groups: int
    rows: int


def block_shape(*, num_rows: int, num_parts: int, head_dim: int, pack: int) -> BlockShape:
    """Choose the threads for ``num_rows`` rows; ``pack`` is the number of columns that a thread takes at once."""
    packs = max(1, -(-head_dim // pack))
    passes = -(-packs // MAX_LANES)
    lanes = -(-packs // passes)
    groups = 1
    if num_rows * lanes < ENOUGH_THREADS:
        groups = max(1, min(MAX_GROUPS, num_parts // MIN_PARTS_PER_GROUP))
    return BlockShape(lanes, groups, min(NUM_THREADS // (lanes * groups), MAX_BLOCK_Z, num_rows))


def constants(element: str, result: str, vectorized: bool) -> dict[str, int | bool | str]:
    """Return the compile-time constants, from the dtype names of the parts and of the result."""
    return {
        "Element": ELEMENT_TYPES[element],
        "Result": ELEMENT_TYPES[result],
        "VECTORIZED": vectorized,
        "NUM_THREADS": NUM_THREADS,
    }


def variants() -> Iterator[dict[str, int | bool | str]]:
    """Return the constants of every kernel that a call can ask for."""
    pairs = [(name, name) for name in ELEMENT_TYPES] + [("float32", "float16"), ("float32", "bfloat16")]
    for element, result in pairs:
        for vectorized in (True, False):
            yield constants(element, result, vectorized)


def usable(x: Any, is_out: bool) -> bool:
    """Whether a kernel can take the array: elements at multiples of their size, those of an out's row adjacent."""
    itemsize = x.dtype.itemsize
    if any(place % itemsize for place in (address(x), *x.strides)):
        return False
    return not is_out or x.shape[-1] <= 1 or x.strides[-1] == itemsize


def launch(
    executor: Executor,
    first: tuple[Any, Any],
    rest: tuple[Any, Any],
    num_parts: int,
    sinks: Any,
    result: tuple[Any, Any],
) -> None:
    """Merge (out, lse) of part 0 and of the ``num_parts - 1`` others, which have one more axis, into ``result``.

    All arrays are `usable`, `sinks` is None or contiguous, and there is at least one row.
    """
    num_rows, head_dim = math.prod(result[1].shape), result[0].shape[-1]
    packed = _layout(result[0].shape, num_parts, *(_element_strides(x) for pair in (first, rest, result) for x in pair))
    element, target = first[0].dtype, result[0].dtype
    pack = PACK_BYTES // element.itemsize
    outs = [result[0], *([first[0]] if num_parts else []), *([rest[0]] if num_parts > 1 else [])]
    vectorized = all(place % (pack * x.dtype.itemsize) == 0 for x in outs for place in _row_places(x))
    kernel = executor.kernel("merge_states", constants(element.name, target.name, vectorized), "cuattn_merge_states")
    shape = block_shape(num_rows=num_rows, num_parts=num_parts, head_dim=head_dim, pack=pack)
    grid = min(-(-num_rows // shape.rows), MAX_GRID_X)
    args = {
        **dict(zip(("g_first_out", "g_first_lse"), first, strict=True)),
        **dict(zip(("g_rest_out", "g_rest_lse"), rest, strict=True)),
        "g_sinks": sinks,
        **dict(zip(("g_out", "g_lse"), result, strict=True)),
        "layout": packed,
    }
    executor.launch(kernel, (grid,), tuple(shape), args)


def _row_places(x: Any) -> Iterator[int]:
    """Return the address and the byte strides that say where rows begin; those of axes of length 1 are arbitrary."""
    yield address(x)
    for extent, stride in zip(x.shape[:-1], x.strides, strict=False):
        if extent > 1:
            yield stride


def _element_strides(x: Any) -> tuple[int, ...]:
    return tuple(stride // x.dtype.itemsize for stride in x.strides)


@lru_cache(maxsize=1024)
def _layout(
    shape: tuple[int, ...],
    num_parts: int,
    first_out: tuple[int, ...],
    first_lse: tuple[int, ...],
    rest_out: tuple[int, ...],
    rest_lse: tuple[int, ...],
    out: tuple[int, ...],
    lse: tuple[int, ...],
) -> np.void:
    *_, seqlen, num_heads, head_dim = shape
    num_rows = math.prod(shape[:-1])

    def of_out(strides: Sequence[int]) -> tuple[int, int, int]:
        return (strides[-4] if len(shape) == 4 else 0), strides[-3], strides[-2]

    def of_lse(strides: Sequence[int]) -> tuple[int, int, int]:
        return (strides[-3] if len(shape) == 4 else 0), strides[-1], strides[-2]

    return struct_layout("merge_states", "MergeLayout").pack(
        num_rows=num_rows,
        first_out=of_out(first_out),
        rest_out=of_out(rest_out),
        out=of_out(out),
        first_lse=of_lse(first_lse),
        rest_lse=of_lse(rest_lse),
        lse=of_lse(lse),
        rest_out_part_stride=rest_out[0],
        rest_lse_part_stride=rest_lse[0],
        seqlen=seqlen,
        num_heads=num_heads,
        num_parts=num_parts,
        head_dim=head_dim,
    )
