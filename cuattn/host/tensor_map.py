"""What a tensor map says, and its bytes as the host executor reads them: ``TensorMap`` of bulk_tile.c."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

#: Bytes of a tensor map, and what its address is a multiple of.
MAP_BYTES, MAP_ALIGNMENT = 128, 64
MAX_RANK = 5
#: Width in bytes of the rows that each swizzle permutes; rows are as wide as the box is.
SWIZZLE_BYTES = {"none": 0, "32B": 32, "64B": 64, "128B": 128}
#: By name, the driver's ``CUtensorMapDataType``. Types that only differ in what they mean share a number: a copy does
#: not look at values, and a reduction needs one of those that have their own.
DATA_TYPES = {
    "bool": 0, "uint8": 0, "int8": 0, "float8_e4m3fn": 0, "float8_e5m2": 0, "uint16": 1, "int16": 1, "uint32": 2,
    "int32": 3, "uint64": 4, "int64": 5, "float16": 6, "float32": 7, "float64": 8, "bfloat16": 9,
}  # fmt: skip
FILLS = ("zeros", "nan")
L2_PROMOTIONS = ("none", "64B", "128B", "256B")

#: Tells a map from anything else at its address: the bytes of "cuTM".
MAGIC = 0x4D547563

LAYOUT = np.dtype(
    {
        "names": [
            "magic", "data_type", "rank", "swizzle", "fill", "base", "last", "item_bytes", "strides", "box", "steps",
        ],
        "formats": ["<u4", "u1", "u1", "u1", "u1", "<u8", ("<u4", 5), "<u4", ("<u8", 5), ("<u2", 5), ("u1", 5)],
        "offsets": [0, 4, 5, 6, 7, 8, 16, 36, 40, 80, 90],
        "itemsize": 128,
    }
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class TensorMap:
    """A checked tensor map, made by `cuattn.tensor_map`: a kernel argument on both executors. Keeps its array alive.

    Attributes
    ----------
    array : array, the one that is described
    dims, strides : tuple of int, extents in elements and strides in bytes, innermost first
    box : tuple of int, elements that one copy spans, innermost first
    element_strides : tuple of int, the steps within the box
    swizzle, fill, l2_promotion : str
    value : numpy.void, the 128 bytes that the kernel gets; empty until they are encoded
    """

    array: Any = field(repr=False)
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    element_strides: tuple[int, ...]
    swizzle: str
    fill: str
    l2_promotion: str
    value: np.void = field(default=np.void(b""), repr=False)

    @property
    def box_bytes(self) -> int:
        """Bytes of shared memory that a copy of the box fills, and by which it counts on its mbarrier."""
        total = int(self.array.dtype.itemsize)
        for extent, step in zip(self.box, self.element_strides, strict=True):
            total *= -(-extent // step)
        return total

    @property
    def data_type(self) -> int:
        """Number that the driver gives the element type."""
        return DATA_TYPES[self.array.dtype.name]


def encode(described: TensorMap, address: int) -> np.void:
    """Encode a map of the array at ``address``. ``last`` holds extents minus one, which fit 32 bits."""
    rank = len(described.dims)
    fields = np.zeros((), LAYOUT)
    fields["magic"], fields["data_type"], fields["rank"] = MAGIC, described.data_type, rank
    fields["swizzle"] = tuple(SWIZZLE_BYTES).index(described.swizzle)
    fields["fill"] = FILLS.index(described.fill)
    fields["base"], fields["item_bytes"] = address, described.array.dtype.itemsize
    fields["last"][:rank] = np.asarray(described.dims, np.uint64) - 1
    fields["strides"][:rank] = described.strides
    fields["box"][:rank], fields["box"][rank:] = described.box, 1
    fields["steps"][:rank], fields["steps"][rank:] = described.element_strides, 1
    return np.void(fields.tobytes())
