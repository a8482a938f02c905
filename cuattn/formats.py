"""How the numbers of a key/value cache are stored: plain floats, or 8 and 4 bits with scales beside them.

A cached number is code * scale, or code * block scale * scale where neighboring numbers of a head share a block scale.
The formats of 4 bits and their block scales are those of B. Darvish Rouhani et al., "Microscaling data formats for deep
learning", 2023 (arXiv:2310.10537); "nvfp4" is the same with smaller blocks, whose scales have a mantissa.

Examples
--------
>>> resolve("k_pages", np.dtype(np.uint8), "nvfp4").items(128)
64
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from cuattn.dtypes import ELEMENTS, STORAGE_8BIT
from cuattn.errors import DTypeError
from cuattn.scalars import choice

__all__ = ["KV_FORMATS", "KVFormat", "resolve"]


@dataclass(frozen=True, slots=True, eq=False)
class KVFormat:
    """One way to store cached numbers.

    Attributes
    ----------
    name : str
        What ``kv_format=`` takes; a plain format has the name of its dtype.
    dtypes : tuple of str
        Names of the dtypes that an array of codes may have; all have items of one size.
    storage : str
        The type of an item in CUDA C.
    max_code : float
        The largest number that a code stands for. 0 for plain formats, which have no scale.
    elements_per_item : int
        Numbers in one item of the array; the first is in the lowest bits.
    block_size : int
        Neighboring numbers of a head that share a block scale; 0 where there are no block scales.
    block_scale_dtypes : tuple of str
        Names of the dtypes that an array of block scales may have, one byte an item.
    code_dtype, block_scale_dtype : str
        Names of the `ml_dtypes` or NumPy dtypes that say what the bits of a code and of a block scale mean.
    """

    name: str
    dtypes: tuple[str, ...]
    storage: str
    code_dtype: str
    max_code: float = 0.0
    elements_per_item: int = 1
    block_size: int = 0
    block_scale_dtypes: tuple[str, ...] = ()

    @property
    def quantized(self) -> bool:
        """Whether numbers are codes that a scale multiplies."""
        return self.max_code > 0

    @property
    def block_scale_dtype(self) -> str | None:
        return self.block_scale_dtypes[0] if self.block_scale_dtypes else None

    @property
    def itemsize(self) -> int:
        """Bytes of an item."""
        return np.dtype(self.dtypes[-1]).itemsize

    def items(self, head_dim: int) -> int:
        """Items of a head: the last extent of an array of codes. The head dim is a multiple of `elements_per_item`."""
        return head_dim // self.elements_per_item

    def blocks(self, head_dim: int) -> int:
        """Block scales of a head, the last extent of their array; 0 where there are none."""
        return -(-head_dim // self.block_size) if self.block_size else 0

    def bytes_per_head(self, head_dim: int) -> int:
        """Bytes of one head of one slot: codes and block scales."""
        return self.items(head_dim) * self.itemsize + self.blocks(head_dim)


_FLOATS = tuple(KVFormat(name, (name,), storage, name) for name, (storage, _) in ELEMENTS.items())

_QUANTIZED = (
    KVFormat("e4m3fn", ("float8_e4m3fn", "uint8"), STORAGE_8BIT["float8_e4m3fn"], "float8_e4m3fn", max_code=448.0),
    KVFormat("e5m2", ("float8_e5m2", "uint8"), STORAGE_8BIT["float8_e5m2"], "float8_e5m2", max_code=57344.0),
    KVFormat("int8", ("int8",), "struct Int8", "int8", max_code=127.0),
    KVFormat(
        "nvfp4",
        ("uint8",),
        "struct NvFp4",
        "float4_e2m1fn",
        max_code=6.0,
        elements_per_item=2,
        block_size=16,
        block_scale_dtypes=("float8_e4m3fn", "uint8"),
    ),
    KVFormat(
        "mxfp4",
        ("uint8",),
        "struct MxFp4",
        "float4_e2m1fn",
        max_code=6.0,
        elements_per_item=2,
        block_size=32,
        block_scale_dtypes=("float8_e8m0fnu", "uint8"),
    ),
)

#: Every format, by name.
KV_FORMATS = {row.name: row for row in (*_FLOATS, *_QUANTIZED)}

# What an array of such a dtype holds if nothing else is said; uint8 may hold anything.
_IMPLIED = {dtype: row for row in KV_FORMATS.values() for dtype in row.dtypes if dtype != "uint8"}
_IN_UINT8 = ", ".join(row.name for row in KV_FORMATS.values() if "uint8" in row.dtypes)


def resolve(name: str, dtype: Any, kv_format: Any = None) -> KVFormat:
    """The format of the cache array ``name``.

    Parameters
    ----------
    name : str
        Of the argument, for messages.
    dtype : numpy.dtype
        Of the array.
    kv_format : str, optional
        As the user gave it. None: what the dtype says; uint8 says nothing.

    Raises
    ------
    ArgumentError
        No format has that name.
    DTypeError
        The format is not stored in arrays of this dtype, or the dtype alone says no format.

    Examples
    --------
    >>> resolve("k_cache", np.dtype(np.float16)).storage
    '__half'
    >>> resolve("k_cache", np.dtype(np.int8)).max_code
    127.0
    """
    if not dtype.isnative:
        raise DTypeError(f"{name} has dtype {dtype} ({dtype.str}); native byte order is needed")
    if kv_format is None:
        if dtype.name not in _IMPLIED:
            raise DTypeError(
                f"{name} has dtype {dtype}; {', '.join(_IMPLIED)} are allowed, and uint8 with kv_format {_IN_UINT8}"
            )
        return _IMPLIED[dtype.name]
    choice("kv_format", kv_format, KV_FORMATS, optional=True)
    row = KV_FORMATS[kv_format]
    if dtype.name not in row.dtypes:
        raise DTypeError(f"{name} has dtype {dtype}; kv_format {row.name} is stored in {' or '.join(row.dtypes)}")
    return row


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The dtype of that name, narrow floats included.

    >>> numpy_dtype("float8_e8m0fnu").itemsize
    1
    """
    return np.dtype(getattr(ml_dtypes, name, name))
