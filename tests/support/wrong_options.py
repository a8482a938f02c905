"""Options that attention refuses, and what it says."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from cuattn.errors import (
    ArgumentError,
    ArrayTypeError,
    DTypeError,
    NonFiniteError,
    ShapeError,
)


class OnDevice:
    """An array on CUDA device 0, as far as anyone can see from outside."""

    shape, dtype = (2, 7, 2, 32), np.dtype(np.float16)

    def __dlpack_device__(self):
        return 2, 0


HUGE = 2**31
WRONG_OPTIONS = (
    ({"window": 3}, ArgumentError, r"window is 3; a pair \(left, right\) or None"),
    ({"window": "ab"}, ArgumentError, "window is 'ab'; a pair"),
    ({"window": (1, 2, 3)}, ArgumentError, r"window is \(1, 2, 3\); a pair"),
    ({"window": (-1, 0)}, ArgumentError, r"window is \(-1, 0\); each side is None \(unbounded\) or an integer"),
    ({"window": (0, 1.5)}, ArgumentError, "window is .* each side"),
    ({"window": (0, 2**31 - 1)}, ArgumentError, "window is .* from 0 to 2147483646"),
    ({"window": b"ab"}, ArgumentError, "window is b'ab'; a pair"),
    ({"scale": 10**400}, NonFiniteError, "scale is 1000"),
    ({"softcap": 10**400}, NonFiniteError, "softcap is 1000"),
    ({"dropout_p": 10**400}, NonFiniteError, "dropout_p is 1000"),
    ({"dropout_p": np.zeros(1)}, ArgumentError, "dropout_p is array"),
    ({"dropout_p": False}, ArgumentError, "dropout_p is False"),
    ({"dropout_seed": np.zeros(2, int)}, ArgumentError, "dropout_seed is array"),
    ({"sinks": np.ma.ones(4)}, ArrayTypeError, "sinks is a masked array"),
    ({"sinks": np.zeros(4, [("a", "f4")])}, DTypeError, "sinks has dtype"),
    ({"sinks": np.zeros(4, ml_dtypes.int4)}, DTypeError, "sinks has dtype int4"),
    ({"return_lse": 1}, ArgumentError, "return_lse is 1; allowed are False and True"),
    ({"return_lse": np.ones(2)}, ArgumentError, "return_lse is array"),
    ({"window": (True, None)}, ArgumentError, "window is .* each side"),
    ({"softcap": 0}, ArgumentError, "softcap is 0; it must be positive"),
    ({"softcap": -3.0}, ArgumentError, "softcap is -3.0; it must be positive"),
    ({"softcap": 1e39}, ArgumentError, r"softcap is 1e\+39; it must be positive, from 1.18e-38 to 3.4e\+38"),
    ({"softcap": 1e-39}, ArgumentError, "softcap is 1e-39"),
    ({"softcap": np.nan}, NonFiniteError, "softcap is nan"),
    ({"softcap": True}, ArgumentError, "softcap is True of type bool"),
    ({"softcap": "3"}, ArgumentError, "softcap is '3' of type str"),
    ({"bias": np.zeros((1, 1, 5, 8))}, ShapeError, r"bias has shape \(1, 1, 5, 8\), .* = \[2, 4, 5, 7\]"),
    ({"bias": np.zeros((1, 2, 4, 5, 7))}, ShapeError, "bias has shape"),
    ({"bias": np.zeros((2, 1, 1, 7), int)}, DTypeError, "bias has dtype int64; allowed are float16, bfloat16"),
    ({"bias": np.zeros((5, 7), ">f4")}, DTypeError, "bias has dtype >f4"),
    ({"bias": np.zeros((5, 7), bool)}, DTypeError, "bias has dtype bool"),
    ({"bias": [[0.0] * 7] * 5}, ArrayTypeError, "bias: .*list is no array"),
    ({"mask": np.ones((5, 7))}, DTypeError, "mask has dtype float64; bool is needed"),
    ({"mask": np.ones((5, 7), np.uint8)}, DTypeError, "mask has dtype uint8; bool is needed"),
    ({"mask": np.ones((3, 1, 5, 7), bool)}, ShapeError, r"mask has shape \(3, 1, 5, 7\)"),
    ({"mask": True}, ArrayTypeError, "mask: .*bool is no array"),
    ({"alibi_slopes": np.ones(2)}, ShapeError, r"alibi_slopes has shape \[2\]; allowed is \[4\] or \[2, 4\]"),
    ({"alibi_slopes": np.ones((1, 4))}, ShapeError, "alibi_slopes has shape"),
    ({"alibi_slopes": np.ones(4, bool)}, DTypeError, "alibi_slopes has dtype bool; numbers are needed"),
    ({"alibi_slopes": [1.0, np.nan, 1.0, 1.0]}, NonFiniteError, "alibi_slopes holds nan"),
    ({"alibi_slopes": [1e39, 1.0, 1.0, 1.0]}, NonFiniteError, r"alibi_slopes holds 1e\+39"),
    ({"alibi_slopes": ["a"] * 4}, ArrayTypeError, "alibi_slopes holds .* objects"),
    ({"alibi_slopes": [[1.0], [1.0, 2.0]]}, ArrayTypeError, "alibi_slopes cannot be read as an array"),
    ({"alibi_slopes": 0.5}, ArrayTypeError, "alibi_slopes: .*float is no array"),
    ({"sinks": np.zeros((2, 4))}, ShapeError, r"sinks has shape \[2, 4\]; allowed is \[4\]"),
    ({"sinks": [np.inf, 0.0, 0.0, 0.0]}, NonFiniteError, "sinks holds inf"),
    ({"sinks": [False] * 4}, DTypeError, "sinks has dtype bool"),
    ({"dropout_p": 1.0}, ArgumentError, "dropout_p is 1.0"),
    ({"dropout_p": -0.1}, ArgumentError, "dropout_p is -0.1"),
    ({"dropout_p": np.nan}, NonFiniteError, "dropout_p is nan"),
    ({"dropout_p": "0.1"}, ArgumentError, "dropout_p is '0.1'"),
    ({"dropout_p": 0.1, "dropout_seed": -1}, ArgumentError, "dropout_seed is -1"),
    ({"dropout_seed": 2**64}, ArgumentError, "dropout_seed is"),
    ({"dropout_seed": 0.5}, ArgumentError, "dropout_seed is 0.5"),
    ({"dropout_offset": 2**32}, ArgumentError, "dropout_offset is"),
    ({"dropout_origin": (1, 2)}, ArgumentError, r"dropout_origin is \(1, 2\); \(batch, head, query, key\)"),
    ({"dropout_origin": (0, 1, 0, 0)}, ArgumentError, "dropout_origin has head 1 and no num_heads"),
    ({"dropout_origin": (0, 0, -1, 0)}, ArgumentError, "query of dropout_origin is -1"),
    ({"diagonal_offset": 0.5}, ArgumentError, "diagonal_offset is 0.5; an integer or int32"),
    ({"diagonal_offset": True}, ArgumentError, "diagonal_offset is True"),
    ({"diagonal_offset": "0"}, ArgumentError, "diagonal_offset is '0'"),
    ({"diagonal_offset": HUGE}, ArgumentError, "diagonal_offset is 2147483648; its magnitude must be below"),
    ({"diagonal_offset": -HUGE}, ArgumentError, "diagonal_offset is -2147483648"),
    ({"diagonal_offset": np.zeros(3, np.int32)}, ShapeError, r"diagonal_offset has shape \[3\]; allowed is \[2\]"),
    ({"diagonal_offset": np.zeros(2)}, DTypeError, "diagonal_offset has dtype float64; integers are needed"),
    ({"diagonal_offset": [0, HUGE]}, ArgumentError, "diagonal_offset holds a number that is not in the range of int32"),
    ({"precision": "fp16"}, ArgumentError, "precision is 'fp16'; allowed are None, 'ieee', 'tf32' and 'fp8'"),
    ({"precision": "tf32"}, DTypeError, "precision='tf32' is for float32; q has dtype float16"),
    ({"precision": "fp8"}, DTypeError, "precision='fp8' is for float8_e4m3fn; q has dtype float16"),
    ({"q_descale": np.ones((2, 2))}, ArgumentError, "q_descale is for 8-bit floats; q has dtype float16"),
    ({"v_descale": np.ones((2, 2))}, ArgumentError, "v_descale is for 8-bit floats"),
    ({"fp8_format": "e4m3"}, ArgumentError, "fp8_format is 'e4m3'; allowed are None, 'e4m3fn' and 'e5m2'"),
    ({"fp8_format": 8}, ArgumentError, "fp8_format is 8"),
    ({"fp8_format": "e5m2"}, DTypeError, "q has dtype float16 .* allowed are uint8 and float8_e5m2"),
)
