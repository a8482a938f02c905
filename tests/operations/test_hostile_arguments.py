"""Whatever is passed for an argument: a result, or a typed error that names it, before anything has been launched."""

from __future__ import annotations

import inspect
import warnings
from collections import deque
from decimal import Decimal
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from decode_calls import FUNCTIONS as DECODE
from decode_calls import call as decode_call
from simulated_cupy import Exporter, installed

import cuattn
from cuattn.compat import flash_attn, flash_attn_interface, scaled_dot_product_attention
from cuattn.compat.flash_attn import bert_padding
from cuattn.errors import CuattnError
from cuattn.runtime import executor as executors

Q, K, V = (np.full(shape, 0.5, np.float16) for shape in ((2, 5, 4, 32), (2, 7, 2, 32), (2, 7, 2, 32)))
LENGTHS_Q, LENGTHS_K = np.array([0, 3, 3, 10], np.int32), np.array([0, 1, 8, 14], np.int32)


class Raises:
    """Every protocol that a check may ask for, none of which works."""

    def _raise(self, *args, **kwargs):
        raise KeyError("broken")

    __array__ = __dlpack__ = __dlpack_device__ = __index__ = __float__ = __eq__ = __bool__ = __len__ = __iter__ = _raise
    __hash__ = None  # type: ignore[assignment]


class NoCapsule:
    def __dlpack_device__(self):
        return 1, 0

    def __dlpack__(self, **options):
        return 3


def misaligned(x):
    """A copy of ``x`` that begins one byte behind a multiple of its element size."""
    view = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


SCALARS = (
    *(None, True, np.True_, 0, 1, -1, 2**31, 2**63, 2**64, 10**400, np.int8(1), np.uint64(2**64 - 1)),
    *(0.5, -0.5, 1e300, 1e-300, float("nan"), float("inf"), -float("inf"), 1j, np.float16(0.5), np.float32("nan")),
    *(Decimal("0.5"), Fraction(1, 3), Fraction(10**400), "", "a", "ab", "top_left", "tf32", b"ab", bytearray(b"ab")),
)
OBJECTS = (
    *([], [1, 2], (1, 2), (1.5, 2), (None, None), (-1, -1), (2**80, 1), ((1,), 2), [[1], [1, 2]], [None], ["a"]),
    *([1, 2, 3, 4], [float("nan")] * 4, [1e300] * 4, [2**70] * 4, [True] * 4, [1j] * 4, [0, 3, 3, 10], [0, 9, 3, 10]),
    *({}, {1, 2}, range(2), deque([1, 2]), object(), int, np.ndarray, len, ..., slice(1), Raises(), NoCapsule()),
)
ARRAYS = (
    *(np.array(0.5), np.array(1), np.array(True), np.zeros(1), np.zeros(2), np.empty(0), np.arange(2), np.ones(4)),
    *(np.ones(4, dtype) for dtype in (np.float32, ">f4", np.longdouble, bool, complex, "V4", "U1", "M8[s]", "m8[s]")),
    *(np.ones(4, dtype) for dtype in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.int4)),
    *(np.zeros(4, [("a", "f4")]), np.array([1, None, "a", {}], object), np.full(4, 1e300), np.full(4, np.nan)),
    *(np.full(4, 2**64 - 1, np.uint64), np.ma.masked_array(np.ones(4, np.float32), [1, 0, 0, 0])),
    *(np.ones(shape, np.float32) for shape in ((2, 4), (2, 2), (3, 4), (3, 2), (5, 7), (7, 5), (1, 1, 1, 5, 7), (0,))),
    *(LENGTHS_Q, LENGTHS_K, LENGTHS_Q[::-1], LENGTHS_Q + 1, LENGTHS_Q[None], LENGTHS_Q[:1], LENGTHS_Q * 2.0),
    *(np.array([0, 2**62, 2**62 + 1, 10]), np.array([0, -3, 3, 10]), np.ones((5, 7), bool), np.ones((5, 7), int)),
    *(Q, Q[0], Q[None], Q[:0], Q[..., :0], Q[:, :, :0], Q[::-1, ::-1, ::-1, ::-1], K, K[:1], K[..., :8], K[:, :6]),
    *(Q.reshape(10, 4, 32), K.reshape(14, 2, 32), misaligned(Q), np.broadcast_to(Q[:1, :1], Q.shape), Q.tolist()),
    *(Q.astype(dtype) for dtype in (">f2", object, int, np.uint8, bool, np.float32, complex, ml_dtypes.float8_e4m3fn)),
    *(np.zeros((2, 5, 4, 300), np.float16), np.lib.stride_tricks.as_strided(Q, (2, 2**31, 4, 32), (0, 0, 0, 2))),
    np.lib.stride_tricks.as_strided(np.zeros(4096, np.float16), (2, 5, 4, 32), (640, 128, 2, 2)),
)
VALUES = (*SCALARS, *OBJECTS, *ARRAYS)

PACKED = {"q": Q.reshape(10, 4, 32), "k": K.reshape(14, 2, 32), "v": V.reshape(14, 2, 32)}
PACKED |= {"cu_seqlens_q": LENGTHS_Q, "cu_seqlens_k": LENGTHS_K}
OUT, LSE = Q.copy(), np.ones((2, 4, 5), np.float32)
SAVED = {"dout": Q.copy(), "out": OUT, "lse": LSE}
SAVED_PACKED = {"dout": Q.reshape(10, 4, 32), "out": OUT.reshape(10, 4, 32), "lse": np.ones((4, 10), np.float32)}
CALLS = {
    cuattn.attention: {"q": Q, "k": K, "v": V},
    cuattn.standard_attention: {"q": Q, "k": K, "v": V},
    cuattn.attention_varlen: PACKED,
    cuattn.attention_backward: {"q": Q, "k": K, "v": V, **SAVED},
    cuattn.attention_varlen_backward: PACKED | SAVED_PACKED,
    cuattn.attention_backward_workspace_size: {"q": Q, "k": K, "v": V},
    **{function: decode_call(function) for function in DECODE},
    flash_attn.flash_attn_func: {"q": Q, "k": K, "v": V},
    flash_attn.flash_attn_kvpacked_func: {"q": Q, "kv": np.stack([K, V], axis=2)},
    flash_attn.flash_attn_varlen_func: PACKED | {"max_seqlen_q": 7, "max_seqlen_k": 7},
    flash_attn.flash_attn_kvpacked_func_backward: {
        **{"q": Q, "kv": np.stack([K, V], axis=2), "dout": SAVED["dout"], "out": OUT, "softmax_lse": LSE}
    },
    flash_attn_interface.flash_attn_varlen_func: {
        **PACKED,
        "max_seqlen_q": 7,
        "max_seqlen_k": 7,
        "seqused_q": [3, 0, 5],
        "seqused_k": [1, 4, 6],
    },
    flash_attn_interface.flash_attn_combine: {
        "out_partial": np.ones((2, 2, 5, 4, 32), np.float32),
        "lse_partial": np.ones((2, 2, 5, 4), np.float32),
    },
    bert_padding.pad_input: {"hidden_states": Q[0], "indices": [0, 1, 2, 3, 4], "batch": 2, "seqlen": 5},
    scaled_dot_product_attention: {
        **dict(zip(("query", "key", "value"), (x.swapaxes(1, 2) for x in (Q, K, V)), strict=True)),
        "enable_gqa": True,
    },
}
CASES = [(function, name) for function in CALLS for name in inspect.signature(function).parameters]


@pytest.mark.parametrize(("function", "name"), CASES, ids=lambda x: getattr(x, "__name__", x))
def test_anything_for_one_argument(monkeypatch, function, name):
    launches = []
    start = executors.HostExecutor._start
    monkeypatch.setattr(executors.HostExecutor, "_start", lambda *args: launches.append(1) or start(*args))
    refused = 0
    for value in VALUES:
        launches.clear()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                function(**CALLS[function] | {name: value})
        except CuattnError as error:
            refused += 1
            assert launches == [], f"{name}={value!r}: launched before the check"
            assert str(error), f"{name}={value!r}"
        except Exception as error:
            raise AssertionError(f"{name}={value!r}: {type(error).__name__}: {error}") from error
    assert refused > len(VALUES) // 3


ON_DEVICE = (
    *(cuattn.attention, cuattn.attention_varlen, scaled_dot_product_attention),
    *(cuattn.attention_backward, cuattn.attention_varlen_backward),
    *DECODE,
)
METADATA = ("cu_seqlens", "seqlens", "block_tables")


@pytest.mark.parametrize("function", ON_DEVICE)
def test_anything_beside_device_arrays(monkeypatch, function):
    """Likewise where q, k and v are on a GPU (a simulated one), and without waiting for it."""
    exported = {
        name: x if name.startswith(METADATA) or x is True else Exporter(x) for name, x in CALLS[function].items()
    }
    with installed(monkeypatch) as cupy, np.errstate(over="ignore", invalid="ignore"):
        for name in inspect.signature(function).parameters:
            for value in VALUES:
                device = (Exporter(value), cupy.wrap(value)) if type(value) is np.ndarray else ()
                for given in (value, *device):
                    cupy.launches.clear()
                    try:
                        function(**exported | {name: given})
                    except CuattnError:
                        assert cupy.launches == [], f"{name}={value!r}: launched before the check"
                    except Exception as error:
                        raise AssertionError(f"{name}={value!r}: {type(error).__name__}: {error}") from error
        assert cupy.num_synchronizations == 0


@pytest.mark.parametrize(
    "function",
    (
        *(cuattn.attention, cuattn.attention_varlen, cuattn.standard_attention),
        *(cuattn.attention_backward, cuattn.attention_varlen_backward, cuattn.attention_backward_workspace_size),
        *DECODE,
    ),
)
def test_the_error_names_the_argument(function):
    for name in inspect.signature(function).parameters:
        for value in ({}, "no such thing", 2.5j, Raises):
            with pytest.raises(CuattnError, match=rf"\b{name}\b"):
                function(**CALLS[function] | {name: value})
