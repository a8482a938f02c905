"""Everything that the backward functions refuse: a typed error that names the argument, before anything is launched or
written; and what they accept of the arrays to write to."""

from __future__ import annotations

import inspect
import warnings

import ml_dtypes
import numpy as np
import pytest
from test_attention_arguments import WRONG_OPTIONS, OnDevice

import cuattn
from cuattn import backward_arguments, launch, slow_calls
from cuattn.errors import (
    ArgumentError,
    ArrayTypeError,
    DTypeError,
    OverlapError,
    ShapeError,
    SlowHostCallWarning,
)
from cuattn.extents import share_elements


@pytest.fixture(autouse=True)
def nothing_is_launched(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr(launch.Executor, "launch", refuse)


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
    for check, arguments in ((backward_arguments.check, dense()), (backward_arguments.check_packed, packed())):
        with pytest.raises((ArgumentError, DTypeError), match=r"8-bit|uint8"):
            check(**arguments, **options)


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


@pytest.mark.parametrize("name", GRADIENTS)
def test_arrays_to_write_to(name):
    good = like(name)
    with pytest.raises(ShapeError, match=rf"{name} has shape .*; the gradient has shape"):
        backward(**dense(), **{name: good[:, :-1]})
    with pytest.raises(DTypeError, match=f"{name} has dtype float32; the gradient has dtype float16"):
        backward(**dense(), **{name: good.astype(np.float32)})
    frozen = good.copy()
    frozen.flags.writeable = False
    with pytest.raises(ArrayTypeError, match=f"{name} is read-only"):
        backward(**dense(), **{name: frozen})
    with pytest.raises(OverlapError, match=f"{name} has strides .* its elements share memory"):
        backward(**dense(), **{name: np.lib.stride_tricks.as_strided(good, good.shape, (0, *good.strides[1:]))})


@pytest.mark.parametrize("name", (*GRADIENTS, "workspace"))
def test_what_is_written_lies_apart_from_every_input(name):
    bias, mask, sinks = np.zeros((5, 7), np.float16), np.ones((5, 7), bool), np.zeros(4, np.float32)
    slopes, offsets, dlse = np.zeros(4, np.float32), np.zeros(2, np.int32), np.ones((2, 4, 5), np.float32)
    options = {"bias": bias, "mask": mask, "sinks": sinks, "alibi_slopes": slopes, "diagonal_offset": offsets}
    arguments = dense(dlse=dlse, **options)
    needed = cuattn.attention_backward_workspace_size(*(arguments[x] for x in "qkv"), **options)
    nbytes = needed if name == "workspace" else like(name).nbytes
    for other, given in arguments.items():
        memory = np.zeros(nbytes + given.nbytes, np.uint8)
        memory = memory[-memory.ctypes.data % 16 :]
        inside = memory[: given.nbytes].view(given.dtype).reshape(given.shape)
        inside[...] = given
        start = given.nbytes // 2 // 16 * 16
        written = memory[start : start + nbytes]
        if name != "workspace":
            written = written.view(np.float16).reshape(like(name).shape)
        before = memory.copy()
        with pytest.raises(OverlapError, match=rf"{name} lies in the memory range of {other};"):
            backward(**arguments | {other: inside, name: written})
        assert (memory == before).all()


def test_what_is_written_lies_apart_from_the_lengths():
    memory = np.zeros(5 * 4 * 32, np.float16)
    lengths = memory.view(np.int32)[:3]
    lengths[...] = 0, 2, 5
    with pytest.raises(OverlapError, match="dq lies in the memory range of cu_seqlens_q"):
        cuattn.attention_varlen_backward(**packed(cu_seqlens_q=lengths, dq=memory.reshape(5, 4, 32)))


def test_gradients_that_overlap():
    arguments = {name: np.ones((2, 5, 4, 32), np.float16) for name in ("dout", "q", "k", "v", "out")}
    arguments["lse"] = np.ones((2, 4, 5), np.float32)
    together = np.zeros((2, 5, 3, 4, 32), np.float16)
    dq = together[:, :, 0]
    for first, second in (("dq", "dk"), ("dq", "dv"), ("dk", "dv")):
        with pytest.raises(OverlapError, match=f"{first} and {second} share memory"):
            backward(**arguments, **{first: dq, second: dq})
        with pytest.raises(OverlapError, match=f"{first} and {second} share memory"):  # the last row and the first
            flat = np.zeros(2 * dq.size - 32, np.float16)
            views = flat[: dq.size].reshape(dq.shape), flat[dq.size - 32 :].reshape(dq.shape)
            backward(**arguments, **{first: views[0], second: views[1]})
        with pytest.raises(OverlapError, match=f"{first} and {second} share memory"):
            backward(**arguments, **{first: dq, second: dq[::-1, ::-1]})


@pytest.mark.parametrize(
    "views",
    (
        lambda x: (x[:, :, 0], x[:, :, 1], x[:, :, 2]),
        lambda x: (x[:, :, 2, ::-1], x[:, ::-1, 0], x[::-1, :, 1, :, ::-1]),
        lambda x: (
            x.reshape(2, 5, 4, 96)[..., 0::3],
            x.reshape(2, 5, 4, 96)[..., 1::3],
            x.reshape(2, 5, 4, 96)[..., 2::3],
        ),
    ),
    ids=["qkv", "reversed", "elements"],
)
def test_gradients_may_be_interleaved(views):
    arguments = {name: np.ones((2, 5, 4, 32), np.float16) for name in ("dout", "q", "k", "v", "out")}
    arguments["lse"] = np.ones((2, 4, 5), np.float32)
    dq, dk, dv = views(np.zeros((2, 5, 3, 4, 32), np.float16))
    problem = backward_arguments.check(**arguments, dq=dq, dk=dk, dv=dv)
    assert problem.dq is dq and problem.dk is dk and problem.dv is dv


def test_whether_elements_are_shared_is_exact():
    """By NumPy's own search on the arrays themselves."""
    memory = np.zeros(4000, np.int16)
    rng = np.random.default_rng(0)
    answers = set()
    for _ in range(300):
        views = []
        for _ in range(2):
            shape, strides = rng.integers(0, 6, 3), 2 * rng.integers(-20, 60, 3)
            start = 1000 + int(rng.integers(0, 50))
            views.append(np.lib.stride_tricks.as_strided(memory[start:], shape, strides))
        answer = share_elements(*views)
        assert answer == np.shares_memory(*views)
        answers.add(answer)
    assert answers == {False, True}


def test_a_search_that_is_too_long_counts_as_shared():
    """Ranges with large holes, which share nothing; it takes more than one try to say so."""
    memory = np.zeros(2**15, np.uint8)
    first = np.lib.stride_tricks.as_strided(memory, (8, 4, 3), (798, 406, 875))
    second = np.lib.stride_tricks.as_strided(memory[231:], (3, 3, 2), (1092, 420, 35))
    assert not share_elements(first, second)
    assert share_elements(first, second, max_work=1)


def test_workspace():
    arguments = dense()
    needed = cuattn.attention_backward_workspace_size(*(arguments[x] for x in "qkv"))
    memory = np.zeros(2 * needed + 64, np.uint8)
    memory = memory[-memory.ctypes.data % 16 :]
    for workspace, error, message in (
        (memory.reshape(-1, 1)[:needed], ShapeError, r"workspace has shape .*; one axis is needed"),
        (memory[:needed].view(np.int8), DTypeError, "workspace has dtype int8; uint8 is needed"),
        (memory[::2][:needed], ArgumentError, r"workspace has strides \(2,\); a contiguous array is needed"),
        (memory[needed - 1 :: -1], ArgumentError, r"workspace has strides \(-1,\); a contiguous array is needed"),
        (memory[1 : 1 + needed], ArgumentError, "workspace begins at address .*1; a multiple of 16 bytes is needed"),
        (memory[8 : 8 + needed], ArgumentError, "workspace begins at address .*8; a multiple of 16"),
        (memory[: needed - 1], ShapeError, rf"workspace has {needed - 1} bytes; {needed} are needed"),
        (memory[:0], ShapeError, rf"workspace has 0 bytes; {needed} are needed"),
    ):
        with pytest.raises(error, match=message):
            backward(**arguments, workspace=workspace)
    frozen = memory[:needed]
    frozen.flags.writeable = False
    with pytest.raises(ArrayTypeError, match="workspace is read-only"):
        backward(**arguments, workspace=frozen)
    for size in (needed, needed + 7):
        assert backward_arguments.check(**arguments, workspace=memory[:size]).workspace.size == size
    assert needed > 0 and not memory.any()


@pytest.mark.parametrize("name", GRADIENTS)
def test_the_workspace_lies_apart_from_gradients(name):
    arguments = dense()
    needed = cuattn.attention_backward_workspace_size(*(arguments[x] for x in "qkv"))
    memory = np.zeros(needed + like(name).nbytes + 16, np.uint8)
    memory = memory[-memory.ctypes.data % 16 :]
    gradient = memory[needed - 2 :][: like(name).nbytes].view(np.float16).reshape(like(name).shape)
    with pytest.raises(OverlapError, match=f"workspace lies in the memory range of {name}"):
        backward(**arguments, **{name: gradient}, workspace=memory[:needed])


def test_lse_is_made_contiguous():
    """A view in another order, or one that begins between two elements, is copied; nothing else is."""
    arguments = dense()
    values = np.arange(40, dtype=np.float32).reshape(2, 4, 5)
    for lse in (values, values.swapaxes(1, 2).copy().swapaxes(1, 2), np.repeat(values, 2, axis=0)[::2]):
        problem = backward_arguments.check(**arguments | {"lse": lse, "dlse": lse})
        for given in (problem.lse, problem.dlse):
            assert given.flags.c_contiguous and (given == values).all()
            assert (given is lse) == lse.flags.c_contiguous
    misaligned = np.zeros(values.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(values.shape)
    misaligned[...] = values
    problem = backward_arguments.check(**arguments | {"lse": misaligned})
    assert problem.lse.flags.aligned and (problem.lse == values).all()


def test_gradients_that_no_kernel_can_write_are_copied_to():
    """A last axis that is not contiguous, elements that are not aligned: a new array is written instead."""
    arguments = dense()
    odd = np.zeros(like("dk").nbytes + 1, np.uint8)[1:].view(np.float16).reshape(like("dk").shape)
    dv = np.zeros((2, 7, 2, 48), np.float16)[..., ::2]
    problem = backward_arguments.check(**arguments, dq=like("dq")[:, ::-1], dk=odd, dv=dv)
    assert problem.target("dq").array is problem.dq
    for name, given in (("dk", odd), ("dv", dv)):
        target = problem.target(name)
        assert target.array is not given and target.array.shape == given.shape
        target.array[...] = 3
        assert problem.deliver(name, target) is given
        assert (given == 3).all()


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
    monkeypatch.setattr("cuattn.backward.backward", lambda problem: None)
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
