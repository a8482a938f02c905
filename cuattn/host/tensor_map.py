"""Tensor maps as the host executor reads them: 128 bytes, ``HostTensorMap`` of bulk_map.c."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ..tensor_map import TensorMap

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


def encode(described: TensorMap, address: int) -> np.void:
    """The bytes of a map of the array at ``address``. ``last`` holds extents minus one, which fit 32 bits."""
    from ..tensor_map import FILLS, SWIZZLE_BYTES

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
