"""Everything that attention refuses: a typed error that names the argument, before anything is launched or written."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from wrong_options import WRONG_OPTIONS, OnDevice

import cuattn
from cuattn.errors import (
    ArgumentError,
    ArrayTypeError,
    DTypeError,
    NonFiniteError,
    OverlapError,
    ShapeError,
)
from cuattn.runtime import executor as executors

FUNCTIONS = (cuattn.attention, cuattn.standard_attention)


@pytest.fixture(autouse=True)
def nothing_is_launched(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr(executors.Executor, "launch", refuse)


def arrays(q=(2, 5, 4, 32), k=(2, 7, 2, 32), v=(2, 7, 2, 24), dtype=np.float16):
    return [np.ones(shape, dtype) for shape in (q, k, v)]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("shapes", "message"),
    (
        ({"q": (5, 4, 32)}, r"q has shape \(5, 4, 32\), rank 3"),
        ({"k": (7, 2, 32)}, "k has shape .* rank 3"),
        ({"v": (2, 7, 2, 24, 1)}, "v has shape .* rank 5"),
        ({"k": (3, 7, 2, 32), "v": (3, 7, 2, 24)}, "k has batch 3 .* q has batch 2"),
        ({"v": (1, 7, 2, 24)}, r"v has shape \(1, 7, 2, 24\) and k has shape \(2, 7, 2, 32\)"),
        ({"v": (2, 8, 2, 24)}, "v has shape .* and k has shape"),
        ({"v": (2, 7, 1, 24)}, "v has shape .* and k has shape"),
        ({"k": (2, 7, 2, 31)}, "k has head dim 31 and q has head dim 32"),
        ({"q": (2, 5, 4, 513), "k": (2, 7, 2, 513)}, "q has head dim 513; allowed are 1 to 512"),
        ({"q": (2, 5, 4, 0), "k": (2, 7, 2, 0)}, "q has head dim 0"),
        ({"v": (2, 7, 2, 513)}, "v has head dim 513"),
        ({"v": (2, 7, 2, 0)}, "v has head dim 0"),
        ({"q": (2, 5, 3, 32)}, "q has 3 heads and k has 2"),
        ({"q": (2, 5, 1, 32)}, "q has 1 heads and k has 2"),
        ({"k": (2, 7, 0, 32), "v": (2, 7, 0, 24)}, "q has 4 heads and k has 0"),
    ),
)
def test_shapes(function, shapes, message):
    with pytest.raises(ShapeError, match=message):
        function(*arrays(**shapes))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_extent_of_two_to_the_31(function):
    q, k, v = arrays()
    long = np.broadcast_to(k[:, :1], (2, 2**31, 2, 32))
    with pytest.raises(ShapeError, match=f"k has shape .* at most {2**31 - 1}"):
        function(q, long, v)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    "dtype", (np.int32, np.complex64, np.bool_, np.uint8, ml_dtypes.float8_e4m3fnuz, ">f2", np.longdouble), ids=str
)
def test_dtypes(function, dtype):
    with pytest.raises(DTypeError, match=r"q has dtype .* allowed are float16, bfloat16, float32, float64"):
        function(*arrays(dtype=dtype))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_dtypes_that_differ(function):
    q, k, v = arrays()
    with pytest.raises(DTypeError, match="v has dtype float32 and q has dtype float16"):
        function(q, k, v.astype(np.float32))
    with pytest.raises(DTypeError, match="k has dtype bfloat16 and q has dtype float16"):
        function(q, k.astype(ml_dtypes.bfloat16), v)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("thing", ([[[[1.0]]]], None, 3.0, "q", np.float16(1)), ids=repr)
def test_no_arrays(function, thing):
    q, k, v = arrays()
    with pytest.raises(ArrayTypeError, match=r"k: .* is no array"):
        function(q, thing, v)
    with pytest.raises(TypeError):  # also under its built-in name
        function(thing, k, v)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_mixed_kinds(function):
    q, k, v = arrays()
    with pytest.raises(ArrayTypeError, match=r"q is a numpy.ndarray on the CPU but k is .*OnDevice on CUDA device 0"):
        function(q, OnDevice(), v)
    with pytest.raises(ArrayTypeError, match=r"q is .* on the CPU but out is .*OnDevice on CUDA device 0"):
        function(q, k, v, out=OnDevice())


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("scale", (np.nan, np.inf, -np.inf, 1e39, np.float32("inf")))
def test_scale_is_finite(function, scale):
    with pytest.raises(NonFiniteError, match="scale is"):
        function(*arrays(), scale=scale)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("scale", ("1", True, 1j, [1.0], np.ones(1)), ids=repr)
def test_scale_is_a_number(function, scale):
    with pytest.raises(ArgumentError, match=r"scale is .* a number or None is allowed"):
        function(*arrays(), scale=scale)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("causal", (None, 1, 0, "left", "", 1.0, np.ones(2, bool)), ids=repr)
def test_causal(function, causal):
    with pytest.raises(ArgumentError, match=r"causal is .* allowed are False, True, 'bottom_right' and 'top_left'"):
        function(*arrays(), causal=causal)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_out(function):
    q, k, v = arrays()
    with pytest.raises(ShapeError, match=r"out has shape \(2, 5, 4, 32\); the result has shape \(2, 5, 4, 24\)"):
        function(q, k, v, out=np.empty((2, 5, 4, 32), np.float16))
    with pytest.raises(DTypeError, match="out has dtype float64; the result has dtype float16, or float32 where"):
        function(q, k, v, out=np.empty((2, 5, 4, 24), np.float64))
    with pytest.raises(ArrayTypeError, match=r"out: .* is no array"):
        function(q, k, v, out=[])
    frozen = np.empty((2, 5, 4, 24), np.float16)
    frozen.flags.writeable = False
    with pytest.raises(ArrayTypeError, match="out is read-only"):
        function(q, k, v, out=frozen)
    buffer = np.empty(5000, np.float16)
    with pytest.raises(OverlapError, match="its elements share memory"):
        function(q, k, v, out=np.lib.stride_tricks.as_strided(buffer, (2, 5, 4, 24), (480, 96, 2, 2)))
    row = np.empty((2, 1, 4, 24), np.float16)
    with pytest.raises(OverlapError, match="its elements share memory"):
        function(
            q, k, v, out=np.lib.stride_tricks.as_strided(row, (2, 5, 4, 24), (row.strides[0], 0, *row.strides[2:]))
        )


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", ("q", "k", "v"))
def test_out_overlaps_an_input(function, name):
    inputs = dict(zip("qkv", arrays(q=(2, 5, 4, 32), k=(2, 5, 4, 32), v=(2, 5, 4, 32)), strict=True))
    with pytest.raises(OverlapError, match=f"memory range of {name};"):
        function(**inputs, out=inputs[name])
    with pytest.raises(OverlapError, match=f"memory range of {name};"):
        function(**inputs, out=inputs[name][::-1, :, ::-1])
    buffer = np.ones(inputs[name].size + 100, np.float16)
    inputs[name] = buffer[:-100].reshape(2, 5, 4, 32)
    with pytest.raises(OverlapError, match=f"memory range of {name};"):
        function(**inputs, out=buffer[100:].reshape(2, 5, 4, 32))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("options", "error", "message"), WRONG_OPTIONS, ids=lambda x: None if callable(x) else str(x)[:40]
)
def test_options(function, options, error, message):
    with pytest.raises(error, match=message):
        function(*arrays(), **options)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_8_bit_floats(function):
    q, k, v = arrays(dtype=ml_dtypes.float8_e4m3fn)
    with pytest.raises(DTypeError, match="k has dtype float8_e5m2 and q has dtype float8_e4m3fn"):
        function(q, k.astype(ml_dtypes.float8_e5m2), v)
    with pytest.raises(ShapeError, match=r"k_descale has shape \[2, 4\]; allowed is \[2, 2\]"):
        function(q, k, v, k_descale=np.ones((2, 4)))
    with pytest.raises(NonFiniteError, match="q_descale holds nan"):
        function(q, k, v, q_descale=np.full((2, 2), np.nan))
    with pytest.raises(DTypeError, match="out has dtype float16; the result has dtype bfloat16"):
        function(q, k, v, out=np.empty((2, 5, 4, 24), np.float16))
    with pytest.raises(DTypeError, match=r"q has dtype uint8 .* or uint8 with fp8_format="):
        function(*(x.view(np.uint8) for x in (q, k, v)))
    with pytest.raises(DTypeError, match=r"q has dtype float8_e4m3fn .* allowed are uint8 and float8_e5m2"):
        function(q, k, v, fp8_format="e5m2")


@pytest.mark.parametrize("function", FUNCTIONS)
def test_out_overlaps_an_option(function):
    out = np.zeros((2, 5, 4, 24), np.float16)
    with pytest.raises(OverlapError, match="memory range of bias;"):
        function(*arrays(), out=out, bias=out.reshape(-1)[:7])
    with pytest.raises(OverlapError, match="memory range of mask;"):
        function(*arrays(), out=out, mask=out.reshape(-1)[:7].view(bool)[:7])


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", ("bias", "mask", "alibi_slopes", "sinks", "diagonal_offset"))
def test_an_option_elsewhere(function, name):
    with pytest.raises(ArrayTypeError, match=rf"{name} is .*OnDevice on CUDA device 0"):
        function(*arrays(), **{name: OnDevice()})


def packed(**changes):
    """Arguments of attention_varlen for two sequences of 2 and 3 queries, 3 and 4 keys."""
    q, k, v = (x[0] for x in arrays())
    return {"q": q, "k": k, "v": v, "cu_seqlens_q": [0, 2, 5], "cu_seqlens_k": [0, 3, 7], **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    (
        ({"q": np.ones((2, 5, 4, 32), np.float16)}, ShapeError, r"q has shape .* rank 3 is needed: \[tokens_q, heads"),
        ({"v": np.ones((7, 1, 24), np.float16)}, ShapeError, r"v has shape .* tokens and heads must be the same"),
        ({"cu_seqlens_q": [0, 5]}, ShapeError, "must have the same length, batch .* 2 in cu_seqlens_q and 3 in"),
        ({"cu_seqlens_q": []}, ShapeError, r"cu_seqlens_q has shape \(0,\)"),
        ({"cu_seqlens_q": [[0, 2, 5]]}, ShapeError, r"cu_seqlens_q has shape \(1, 3\)"),
        ({"cu_seqlens_k": [0.0, 3.0, 7.0]}, DTypeError, "cu_seqlens_k has dtype float64; integers are needed"),
        ({"cu_seqlens_k": None}, ArrayTypeError, "cu_seqlens_k: .*NoneType is no array"),
        ({"cu_seqlens_q": [1, 2, 5]}, ArgumentError, r"cu_seqlens_q\[0\] is 1; the first sequence begins at 0"),
        ({"cu_seqlens_q": [0, 6, 5]}, ArgumentError, "cu_seqlens_q descends from 6 to 5 at index 2"),
        ({"cu_seqlens_k": [0, 3, 6]}, ArgumentError, "cu_seqlens_k ends at 6; it must span all 7 tokens"),
        ({"cu_seqlens_k": [0, 3, 8]}, ArgumentError, "cu_seqlens_k ends at 8; it must span all 7 tokens"),
        ({"max_seqlen_q": 2}, ArgumentError, "max_seqlen_q is 2, but a sequence of cu_seqlens_q has 3 tokens"),
        ({"max_seqlen_k": -1}, ArgumentError, "max_seqlen_k is -1; an integer from 0"),
        ({"max_seqlen_k": 4.0}, ArgumentError, "max_seqlen_k is 4.0"),
        ({"bias": np.zeros((5, 7))}, ShapeError, r"bias has shape \(5, 7\), .* = \[2, 4, 3, 4\]"),
        ({"alibi_slopes": np.ones((3, 4))}, ShapeError, r"alibi_slopes has shape .* allowed is \[4\] or \[2, 4\]"),
        (
            {"out": np.ones((1, 5, 4, 24), np.float16)},
            ShapeError,
            r"out has shape .* the result has shape \(5, 4, 24\)",
        ),
        ({"scale": np.nan}, NonFiniteError, "scale is nan"),
        ({"causal": 1}, ArgumentError, "causal is 1"),
    ),
    ids=lambda x: None if callable(x) else str(x)[:40],
)
def test_packed(changes, error, message):
    with pytest.raises(error, match=message):
        cuattn.attention_varlen(**packed(**changes))


def test_unknown_options():
    with pytest.raises(TypeError, match="is_causal"):
        cuattn.attention(*arrays(), is_causal=True)
    with pytest.raises(TypeError):
        cuattn.attention(*arrays(), 0.5)
