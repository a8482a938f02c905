"""The element types of arrays: their names in CUDA C, the types that sums are in, and which arrays may have them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

#: Element types in CUDA C, and the type that a kernel accumulates in, by dtype name.
ELEMENTS = {
    "float16": ("__half", "float"),
    "bfloat16": ("__nv_bfloat16", "float"),
    "float32": ("float", "float"),
    "float64": ("double", "double"),
}
#: 8-bit floats: the type in memory. On chip they are __half, which holds them exactly; the result is bfloat16.
STORAGE_8BIT = {"float8_e4m3fn": "struct Float8E4M3", "float8_e5m2": "struct Float8E5M2"}
DTYPES = frozenset(map(np.dtype, (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)))
#: The types in CUDA C alone.
ELEMENT_TYPES = {name: element for name, (element, _) in ELEMENTS.items()}
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FP8_FORMATS = {"e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn), "e5m2": np.dtype(ml_dtypes.float8_e5m2)}
INPUT_DTYPES = DTYPES | frozenset(FP8_FORMATS.values())
WARP_SIZE = 32
PACK_BYTES = 16  # what a thread loads or stores at once


def kernel_types(dtype_name: str, products: str, *, unrounded: bool = False) -> dict[str, Any]:
    """The element types of a kernel: in memory, on chip, of the result, and of the sums.

    ``unrounded``: the result is of the type of the sums.
    """
    types = _rounded_types(dtype_name, products)
    return {**types, "Output": types["Accumulator"]} if unrounded else types


def _rounded_types(dtype_name: str, products: str) -> dict[str, Any]:
    if dtype_name in STORAGE_8BIT:
        element = "__half" if products == "mma" else "float"
        return {
            "Storage": STORAGE_8BIT[dtype_name],
            "Element": element,
            "Output": "__nv_bfloat16",
            "Accumulator": "float",
        }
    element, accumulator = ELEMENTS[dtype_name]
    return {"Storage": element, "Element": element, "Output": element, "Accumulator": accumulator}
