"""Names for the annotations of public functions: the array type that a call is about, and fixed sets of strings.

A function that is given arrays of a type returns arrays of it: `numpy.ndarray`, `cupy.ndarray`, or whatever a checker
of types knows the arguments as.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, TypeVar

__all__ = ["Algorithm", "ArrayT", "Causal", "FP8Format", "KVFormatName", "LseT", "Precision", "Scaling"]

#: The arrays of a call.
ArrayT = TypeVar("ArrayT", bound=Any)
#: Log-sum-exps, where their type may differ from that of the other arrays: float32 beside float16.
LseT = TypeVar("LseT", bound=Any)

Causal: TypeAlias = bool | Literal["bottom_right", "top_left"]
Precision: TypeAlias = Literal["ieee", "tf32", "fp8"]
FP8Format: TypeAlias = Literal["e4m3fn", "e5m2"]
KVFormatName: TypeAlias = Literal[
    "float16", "bfloat16", "float32", "float64", "e4m3fn", "e5m2", "int8", "nvfp4", "mxfp4"
]
Algorithm: TypeAlias = Literal["online", "safe", "naive"]
Scaling: TypeAlias = Literal["linear", "ntk", "yarn", "llama3"]
