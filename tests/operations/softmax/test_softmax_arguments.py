"""softmax, log_softmax and logsumexp: out=, empty arrays, and what is refused before anything is launched."""

from __future__ import annotations

import numpy as np
import pytest

import cuattn
from cuattn import errors
from cuattn.ops.softmax.config import SPLIT, STREAM, SoftmaxConfig
from cuattn.testing import assert_softmax_close, kernels
from cuattn.testing.arrays import Layout, place

FUNCTIONS = (cuattn.softmax, cuattn.log_softmax, cuattn.logsumexp)


def normal(*shape, dtype=np.float32):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


# --- out= ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [None, STREAM, SPLIT], ids=["chosen", "stream", "split"])
def test_in_place(executor, config):
    values = normal(3, 300)
    x = executor.array(place(values))
    assert kernels.softmax(x, out=x, config=config) is x
    assert_softmax_close(executor.numpy(x), values)


def test_in_place_strided(executor):
    """The same memory through two views of equal strides."""
    values = normal(5, 7, 9)
    guarded = place(values, Layout(order=(2, 0, 1), pad=(1, 0, 2)))
    x = executor.array(guarded)
    cuattn.softmax(x, axis=1, out=x[...])
    assert_softmax_close(executor.numpy(x), values, 1)


@pytest.mark.parametrize("keepdims", [False, True])
def test_logsumexp_out(executor, keepdims):
    values = normal(4, 6, 5)
    shape = (4, 1, 5) if keepdims else (4, 5)
    guarded = executor.guarded(shape, np.float32, Layout(pad=(2,) * len(shape)))
    result = cuattn.logsumexp(executor.array(values), axis=1, keepdims=keepdims, out=guarded.array)
    guarded.check()
    assert result is guarded.array
    assert_softmax_close(executor.numpy(result).reshape(4, 5), values, 1, "logsumexp")


def test_unaligned_elements(executor):
    """Elements at odd addresses, in and out: through aligned copies."""
    if executor.name != "host":
        pytest.skip("CuPy arrays are aligned to their elements")
    values = normal(3, 5)
    x, out = (np.full((3, 5), 7, np.dtype([("byte", np.uint8), ("number", np.float32)])) for _ in range(2))
    x["number"] = values
    assert_softmax_close(cuattn.softmax(x["number"], out=out["number"]), values)
    assert_softmax_close(cuattn.logsumexp(x["number"]), values, -1, "logsumexp")
    np.testing.assert_array_equal(x["number"], values)
    assert (out["byte"] == 7).all()


def test_many_axes_that_do_not_fold(executor):
    values = normal(2, 3, 2, 3, 2, 3)
    layout = Layout(order=(5, 1, 3, 0, 2, 4), pad=(1,) * 6)
    guarded = executor.guarded(values.shape, np.float32, layout)
    cuattn.softmax(executor.array(place(values, layout)), axis=2, out=guarded.array)
    guarded.check()
    assert_softmax_close(executor.numpy(guarded.array), values, 2)


def test_overlap_is_refused(executor):
    base = executor.array(normal(4, 20))
    before = executor.numpy(base).copy()
    for x, out in ((base[:, :10], base[:, 5:15]), (base[:3], base[1:]), (base, base[:, ::-1]), (base, base[::-1])):
        with pytest.raises(errors.OverlapError, match="out"):
            cuattn.softmax(x, out=out)
    with pytest.raises(errors.OverlapError, match="out"):
        cuattn.logsumexp(base, axis=1, out=base[:, 0])
    itself = executor.xp.broadcast_to(executor.xp.zeros((1, 20), np.float32), (4, 20))
    if executor.name == "host":
        itself = np.lib.stride_tricks.as_strided(np.zeros(20, np.float32), (4, 20), (0, 4))
    with pytest.raises(errors.OverlapError, match="out"):
        cuattn.softmax(base, out=itself)
    np.testing.assert_array_equal(executor.numpy(base), before)


def test_bad_out(executor):
    x = executor.array(normal(3, 5))
    empty = executor.xp.empty
    with pytest.raises(errors.ShapeError, match=r"out.*\(3, 6\).*\(3, 5\)"):
        cuattn.softmax(x, out=empty((3, 6), np.float32))
    with pytest.raises(errors.ShapeError, match=r"\(3,\)"):
        cuattn.logsumexp(x, out=empty((3, 1), np.float32))
    with pytest.raises(errors.DTypeError, match=r"float16.*float32"):
        cuattn.softmax(x, out=empty((3, 5), np.float16))
    with pytest.raises(errors.DTypeError, match=r"float64.*float32"):
        cuattn.logsumexp(x, out=empty(3, np.float64))
    with pytest.raises(errors.ArrayTypeError, match="out"):
        cuattn.softmax(x, out=[[0.0] * 5] * 3)


def test_read_only_out():
    out = np.zeros((3, 5), np.float32)
    out.flags.writeable = False
    with pytest.raises(errors.ArrayTypeError, match=r"out.*read-only"):
        cuattn.softmax(normal(3, 5), out=out)


# --- empty arrays ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3), (2, 0, 3)])
def test_empty(executor, shape):
    x = executor.xp.empty(shape, np.float16)
    for axis in range(len(shape)):
        for function in (cuattn.softmax, cuattn.log_softmax):
            result = function(x, axis=axis)
            assert result.shape == shape and result.dtype == np.float16
        lse = executor.numpy(cuattn.logsumexp(x, axis=axis))
        assert lse.shape == tuple(np.delete(shape, axis)) and lse.dtype == np.float32
        np.testing.assert_array_equal(lse, -np.inf)
        kept = cuattn.logsumexp(x, axis=axis, keepdims=True, out=executor.xp.zeros_like(lse_out(executor, shape, axis)))
        np.testing.assert_array_equal(executor.numpy(kept), -np.inf)


def lse_out(executor, shape, axis):
    return executor.xp.empty((*shape[:axis], 1, *shape[axis + 1 :]), np.float32)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("axis", [2, -3, 100])
def test_axis_out_of_range(executor, function, axis):
    with pytest.raises(errors.ArgumentError, match=rf"axis is {axis}; an integer from -2 to 1"):
        function(executor.array(normal(2, 3)), axis=axis)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("axis", [None, 1.0, "0", True, (0, 1)])
def test_axis_is_no_integer(executor, function, axis):
    with pytest.raises(errors.ArgumentError, match="axis"):
        function(executor.array(normal(2, 3)), axis=axis)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("algorithm", ["fast", "", None, 2])
def test_unknown_algorithm(executor, function, algorithm):
    with pytest.raises(errors.ArgumentError, match=r"algorithm.*'naive', 'safe' and 'online'"):
        function(executor.array(normal(2, 3)), algorithm=algorithm)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [np.int32, np.bool_, np.complex64, ">f4" if np.little_endian else "<f4"])
def test_bad_dtype(function, dtype):
    with pytest.raises(errors.DTypeError, match=r"x.*float16, bfloat16, float32, float64"):
        function(np.zeros((2, 3), dtype))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("x", [[1.0, 2.0], 3.0, None, "x", np.float32(1)])
def test_no_array(function, x):
    with pytest.raises(errors.ArrayTypeError, match="x"):
        function(x)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_rank_0(executor, function):
    with pytest.raises(errors.ShapeError, match="rank"):
        function(executor.array(np.zeros((), np.float32)))


def test_extent_beyond_32_bits():
    x = np.broadcast_to(np.zeros(1, np.float16), (2**31,))
    with pytest.raises(errors.ShapeError, match=r"2147483648.*at most 2147483647"):
        cuattn.logsumexp(x)


@pytest.mark.parametrize(
    "options",
    [
        dict(num_threads=100, threads_per_row=1),
        dict(num_threads=2048, threads_per_row=32),
        dict(num_threads=96, threads_per_row=96),
        dict(num_threads=128, threads_per_row=64),
        dict(num_threads=256, threads_per_row=32, lanes_span_rows=True),
    ],
)
def test_illegal_configs(options):
    with pytest.raises(ValueError, match="threads"):
        SoftmaxConfig("stream", **options)
