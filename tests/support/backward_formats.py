"""The formats that the backward kernels compute in, and head dims that compile quickly."""

from __future__ import annotations

import ml_dtypes
import numpy as np

F16, BF16, F32, F64 = map(np.dtype, (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))
#: Name to the products of the kernels, the dtype, and the options that ask for the format.
FORMATS = {"float16": ("mma", F16, {}), "tf32": ("mma", F32, {"precision": "tf32"}), "float32": ("fma", F32, {}),
           "float64": ("fma", F64, {})}  # fmt: skip
DIM = (32, 32)
