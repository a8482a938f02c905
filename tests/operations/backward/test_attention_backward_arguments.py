"""What the backward functions refuse of inputs: a typed error that names the argument, before anything is launched or
written. Arrays to write to are in test_attention_backward_outputs.py."""

from __future__ import annotations

import inspect
import warnings

import ml_dtypes
import numpy as np
import pytest
from wrong_options import WRONG_OPTIONS, OnDevice

import cuattn
from cuattn.errors import (
    ArgumentError,
    ArrayTypeError,
    DTypeError,
    ShapeError,
    SlowHostCallWarning,
)
from cuattn.ops.attention import slow_calls
from cuattn.runtime import executor as executors


@pytest.fixture(autouse=True)
def nothing_is_launched(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr(executors.Executor, "launch", refuse)


def dense(dtype=np.float16, **changes):
    """Arguments of attention_backward: 2 sequences of 5 queries and 7 keys, 4 heads on 2, head dims 32 and 24."""
    shapes = {
        **{"dout": (2, 5, 4, 24), "q": (2, 5, 4, 32), "k": (2, 7, 2, 32), "v": (2, 7, 2, 24)},
        **{"out": (2, 5, 4, 24), "lse": (2, 4, 5)},
    }
    lse_dtype = np.float64 if dtype == np.float64 else np.float32
    made = {name: np.ones(shape, lse_dtype if name == "lse" else dtype) for name, shape in shapes.items()}
    return made | changes


def packed(**changes):
    """Arguments of attention_varlen_backward for the first of these sequences, as two of 2 and 3 queries."""
    made = {name: x[0] for name, x in dense().items()}
    return made | {"cu_seqlens_q": [0, 2, 5], "cu_seqlens_k": [0, 3, 7]} | changes


def backward(**arguments):
    return cuattn.attention_backward(**arguments)


def like(name, layout=dense):
    return np.zeros_like(layout()[name[1:]])


GRADIENTS = ("dq", "dk", "dv")
SAVED = ("dout", "out", "lse", "dlse")


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("shape", ((2, 5, 4, 32), (5, 4, 24), (2, 5, 4), (2, 4, 7), (), (4, 5)), ids=str)
def test_shapes_of_what_forward_returned(name, shape):
    of_lse = name in ("lse", "dlse")
    expected = r"\(2, 4, 5\)" if of_lse else r"\(2, 5, 4, 24\)"
    x = np.ones(shape, np.float32 if of_lse else np.float16)
    with pytest.raises(ShapeError, match=rf"{name} has shape .*; {expected} is needed for these q, k and v"):
        backward(**dense(**{name: x}))


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("dtype", (np.float16, np.float32, np.float64), ids=str)
@pytest.mark.parametrize("wrong", (np.float16, np.float32, np.float64, ml_dtypes.bfloat16, ">f4", int, bool), ids=str)
def test_dtypes_of_what_forward_returned(name, dtype, wrong):
    arguments = dense(dtype)
    expected = arguments["lse" if name == "dlse" else name].dtype
    if np.dtype(wrong) == expected:
        return
    x = np.ones(arguments["lse"].shape if name == "dlse" else arguments[name].shape, wrong)
    with pytest.raises(DTypeError, match=rf"{name} has dtype .*; {expected} \(native\) is needed"):
        backward(**arguments | {name: x})


@pytest.mark.parametrize("dtype", (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.uint8, np.int32, ">f2"), ids=str)
def test_there_are_no_gradients_of_other_dtypes(dtype):
    with pytest.raises(DTypeError, match=r"q has dtype .*; gradients are for float16, bfloat16, float32, float64"):
        backward(**dense(dtype))
    k = np.ones((2, 7, 2, 32), dtype)
    with pytest.raises(DTypeError, match=r"k has dtype .*; gradients are for"):
        backward(**dense(k=k))


@pytest.mark.parametrize("options", ({"fp8_format": "e4m3fn"}, {"q_descale": np.ones((2, 2))}), ids=str)
def test_there_are_no_options_of_8_bit_floats(options):
    with pytest.raises(TypeError, match=next(iter(options))):
        backward(**dense(), **options)
    with pytest.raises(TypeError, match=next(iter(options))):
        cuattn.attention_varlen_backward(**packed(), **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"k": np.ones((2, 7, 2, 31), np.float16)}, "k has head dim 31 and q has head dim 32"),
        ({"q": np.ones((5, 4, 32), np.float16)}, r"q has shape \(5, 4, 32\), rank 3"),
        ({"q": np.ones((2, 5, 3, 32), np.float16)}, "q has 3 heads and k has 2"),
        ({"v": np.ones((2, 8, 2, 24), np.float16)}, "v has shape"),
    ),
)
def test_what_forward_refuses_of_arrays(changes, message):
    with pytest.raises(ShapeError, match=message):
        backward(**dense(**changes))


OF_BACKWARD = inspect.signature(cuattn.attention_backward).parameters


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [case for case in WRONG_OPTIONS if set(case[0]) <= set(OF_BACKWARD)],
    ids=lambda x: None if callable(x) else str(x)[:40],
)
def test_what_forward_refuses_of_options(options, error, message):
    with pytest.raises(error, match=message):
        backward(**dense(), **options)
    with pytest.raises(error, match=message):
        cuattn.attention_backward_workspace_size(*(dense()[name] for name in "qkv"), **options)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    (
        ({"q": np.ones((2, 5, 4, 32), np.float16)}, ShapeError, r"q has shape .* rank 3 is needed: \[tokens_q, heads"),
        ({"cu_seqlens_q": [0, 5]}, ShapeError, "must have the same length"),
        ({"cu_seqlens_k": [0, 3, 6]}, ArgumentError, "cu_seqlens_k ends at 6; it must span all 7 tokens"),
        ({"max_seqlen_q": 2}, ArgumentError, "max_seqlen_q is 2, but a sequence of cu_seqlens_q has 3 tokens"),
        ({"bias": np.zeros((5, 7))}, ShapeError, r"bias has shape \(5, 7\), .* = \[2, 4, 3, 4\]"),
        ({"dout": np.ones((5, 4, 32), np.float16)}, ShapeError, r"dout has shape .*; \(5, 4, 24\) is needed"),
        ({"lse": np.ones((1, 4, 5), np.float32)}, ShapeError, r"lse has shape .*; \(4, 5\) is needed"),
        ({"dlse": np.ones((5, 4), np.float32)}, ShapeError, r"dlse has shape .*; \(4, 5\) is needed"),
        ({"dk": np.ones((1, 7, 2, 32), np.float16)}, ShapeError, r"dk has shape .*; the gradient has .* \(7, 2, 32\)"),
        ({"return_dbias": True}, ArgumentError, "return_dbias is True and bias is None"),
        ({"deterministic": 0}, ArgumentError, "deterministic is 0"),
    ),
    ids=lambda x: None if callable(x) else str(x)[:40],
)
def test_packed(changes, error, message):
    with pytest.raises(error, match=message):
        cuattn.attention_varlen_backward(**packed(**changes))


@pytest.mark.parametrize("name", ("deterministic", "return_dbias"))
@pytest.mark.parametrize("value", (None, 1, 0, "yes", np.ones(1, bool)), ids=repr)
def test_flags(name, value):
    with pytest.raises(ArgumentError, match=rf"{name} is .*; allowed are False and True"):
        backward(**dense(bias=np.zeros((5, 7))), **{name: value})


def test_a_gradient_of_no_bias():
    with pytest.raises(ArgumentError, match="return_dbias is True and bias is None"):
        backward(**dense(), return_dbias=True)


@pytest.mark.parametrize("name", ("dout", "out", "lse", "dlse", *GRADIENTS, "workspace"))
def test_arrays_of_one_kind_on_one_device(name):
    with pytest.raises(ArrayTypeError, match=rf"q is .* on the CPU but {name} is .*OnDevice on CUDA device 0"):
        backward(**dense(**{name: OnDevice()}))
    with pytest.raises(ArrayTypeError, match=rf"{name}: builtins\.list is no array"):
        backward(**dense(**{name: []}))


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"cu_seqlens_q": [0, 5]}, "cu_seqlens_k is None and cu_seqlens_q is given"),
        ({"cu_seqlens_k": [0, 7]}, "cu_seqlens_q is None and cu_seqlens_k is given"),
        ({"max_seqlen_q": 3}, "max_seqlen_q is given without cu_seqlens_q"),
        ({"max_seqlen_k": 3}, "max_seqlen_k is given without cu_seqlens_q"),
        ({"return_dbias": True}, "return_dbias is True and bias is None"),
    ),
    ids=str,
)
def test_workspace_size(changes, message):
    with pytest.raises(ArgumentError, match=message):
        cuattn.attention_backward_workspace_size(*(dense()[name] for name in "qkv"), **changes)


def test_signatures():
    """One order of options everywhere; the size of the workspace takes every option that a call takes."""
    forward = [name for name in inspect.signature(cuattn.attention).parameters if "descale" not in name]
    options = [name for name in forward[3:] if name not in ("fp8_format", "out", "return_lse")]
    own = ["dlse", "deterministic", "return_dbias", "dq", "dk", "dv", "workspace"]
    arrays = ["dout", "q", "k", "v", "out", "lse"]
    lengths = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
    assert list(OF_BACKWARD) == arrays + options + own
    assert list(inspect.signature(cuattn.attention_varlen_backward).parameters) == arrays + lengths + options + own
    sizes = inspect.signature(cuattn.attention_backward_workspace_size).parameters
    assert list(sizes) == ["q", "k", "v", *lengths, *options, "deterministic", "return_dbias"]
    defaults = inspect.signature(cuattn.attention).parameters
    for parameters in (OF_BACKWARD, sizes):
        assert all(parameters[name].default == defaults[name].default for name in options)
        assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in options)


def test_a_slow_call_warns_at_two_fifths_of_the_work_of_forward(monkeypatch):
    monkeypatch.setattr("cuattn.ops.attention.backward.dense.backward", lambda problem: None)
    arguments = dense()
    forward_flops = 2 * 2 * 5 * 7 * 4 * (32 + 24)
    for limit, warns in ((2.4 * forward_flops, True), (2.6 * forward_flops, False)):
        monkeypatch.setattr(slow_calls, "SLOW_HOST_FLOPS", limit)
        monkeypatch.setattr(slow_calls, "_warned", False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            backward(**arguments)
        assert [w.category for w in caught] == [SlowHostCallWarning] * warns
        assert all(w.filename == __file__ for w in caught)
