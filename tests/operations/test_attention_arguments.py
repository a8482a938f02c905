"""Everything that attention refuses: a typed error that names the argument, before anything is launched or written."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import cuattn
from cuattn import launch
from cuattn.errors import (
    ArgumentError,
    ArrayTypeError,
    DTypeError,
    NonFiniteError,
    NotSupportedError,
    OverlapError,
    ShapeError,
)

FUNCTIONS = (cuattn.attention, cuattn.standard_attention)


@pytest.fixture(autouse=True)
def nothing_is_launched(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr(launch.Executor, "launch", refuse)


def arrays(q=(2, 5, 4, 32), k=(2, 7, 2, 32), v=(2, 7, 2, 24), dtype=np.float16):
    return [np.ones(shape, dtype) for shape in (q, k, v)]


class OnDevice:
    """An array on CUDA device 0, as far as anyone can see from outside."""

    shape, dtype = (2, 7, 2, 32), np.dtype(np.float16)

    def __dlpack_device__(self):
        return 2, 0


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
        ({"q": (2, 5, 4, 257), "k": (2, 7, 2, 257)}, "q has head dim 257; allowed are 1 to 256"),
        ({"q": (2, 5, 4, 0), "k": (2, 7, 2, 0)}, "q has head dim 0"),
        ({"v": (2, 7, 2, 257)}, "v has head dim 257"),
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
    "dtype", (np.int32, np.complex64, np.bool_, ml_dtypes.float8_e4m3fn, ">f2", np.longdouble), ids=str
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
    with pytest.raises(DTypeError, match="out has dtype float32; the result has dtype float16"):
        function(q, k, v, out=np.empty((2, 5, 4, 24), np.float32))
    with pytest.raises(ArrayTypeError, match=r"out: .* is no array"):
        function(q, k, v, out=[])
    frozen = np.empty((2, 5, 4, 24), np.float16)
    frozen.flags.writeable = False
    with pytest.raises(ArrayTypeError, match="out is read-only"):
        function(q, k, v, out=frozen)
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


OPTIONS = {
    "window": (3, 0),
    "softcap": 5.0,
    "bias": np.zeros((1, 1, 5, 7)),
    "mask": np.ones((5, 7), bool),
    "alibi_slopes": np.ones(4),
    "sinks": np.zeros(4),
    "dropout_p": 0.1,
    "dropout_seed": 1,
    "dropout_offset": 1,
    "diagonal_offset": 0,
    "precision": "tf32",
    "q_descale": np.ones((2, 4)),
    "k_descale": np.ones((2, 2)),
    "v_descale": np.ones((2, 2)),
    "fp8_format": "e4m3fn",
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_do_not_work_yet_are_not_ignored(name):
    with pytest.raises(NotSupportedError, match=rf"attention does not support {name} yet"):
        cuattn.attention(*arrays(), **{name: OPTIONS[name]})


def test_unknown_options():
    with pytest.raises(TypeError, match="is_causal"):
        cuattn.attention(*arrays(), is_causal=True)
    with pytest.raises(TypeError):
        cuattn.attention(*arrays(), 0.5)
