"""Arrays that the backward functions are to write to: which they take, and the errors that name those they refuse."""

from __future__ import annotations

import numpy as np
import pytest
from test_attention_backward_arguments import GRADIENTS, backward, dense, like, nothing_is_launched, packed  # noqa: F401

import cuattn
from cuattn.addresses import share_elements
from cuattn.errors import ArgumentError, ArrayTypeError, DTypeError, OverlapError, ShapeError
from cuattn.ops.attention.backward import arguments as checks


@pytest.mark.parametrize("name", GRADIENTS)
def test_arrays_to_write_to(name):
    good = like(name)
    with pytest.raises(ShapeError, match=rf"{name} has shape .*; the gradient has shape"):
        backward(**dense(), **{name: good[:, :-1]})
    with pytest.raises(DTypeError, match=f"{name} has dtype float64; the gradient has dtype float16, or float32 where"):
        backward(**dense(), **{name: good.astype(np.float64)})
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
    problem = checks.check(**arguments, dq=dq, dk=dk, dv=dv)
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
        assert checks.check(**arguments, workspace=memory[:size]).workspace.size == size
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
        problem = checks.check(**arguments | {"lse": lse, "dlse": lse})
        for given in (problem.lse, problem.dlse):
            assert given.flags.c_contiguous and (given == values).all()
            assert (given is lse) == lse.flags.c_contiguous
    misaligned = np.zeros(values.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(values.shape)
    misaligned[...] = values
    problem = checks.check(**arguments | {"lse": misaligned})
    assert problem.lse.flags.aligned and (problem.lse == values).all()


def test_gradients_that_no_kernel_can_write_are_copied_to():
    """A last axis that is not contiguous, elements that are not aligned: a new array is written instead."""
    arguments = dense()
    odd = np.zeros(like("dk").nbytes + 1, np.uint8)[1:].view(np.float16).reshape(like("dk").shape)
    dv = np.zeros((2, 7, 2, 48), np.float16)[..., ::2]
    problem = checks.check(**arguments, dq=like("dq")[:, ::-1], dk=odd, dv=dv)
    assert problem.target("dq").array is problem.dq
    for name, given in (("dk", odd), ("dv", dv)):
        target = problem.target(name)
        assert target.array is not given and target.array.shape == given.shape
        target.array[...] = 3
        assert problem.deliver(name, target) is given
        assert (given == 3).all()
