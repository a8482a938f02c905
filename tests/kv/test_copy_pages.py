"""copy_pages: any array, any axis of pages, any strides; bytes as they are."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cuattn
from cuattn import errors, host
from cuattn.kv import copy as copying
from cuattn.testing.arrays import Guarded, Layout, place
from cuattn.testing.strategies import examples

DTYPES = (np.float16, np.int8, np.float32, np.complex128, np.uint8, ml_dtypes.bfloat16, np.int64)


def anything(shape, dtype, seed=0):
    """Random bytes, NaN and the like among them."""
    dtype = np.dtype(dtype)
    raw = np.random.default_rng(seed).integers(0, 256, (*shape, dtype.itemsize), np.uint8)
    return np.ascontiguousarray(raw).view(dtype)[..., 0]


def as_bytes(x):
    return np.ascontiguousarray(x).view(np.uint8)


def copied(pages, src, dst, axis=0):
    """What it must be."""
    wanted = pages.copy()
    for i, j in zip(src, dst, strict=True):
        where = (slice(None),) * axis
        wanted[(*where, j)] = pages[(*where, i)]
    return wanted


@st.composite
def problems(draw):
    ndim = draw(st.integers(1, 6))
    shape = [draw(st.sampled_from((1, 2, 3, 5, 8))) for _ in range(ndim)]
    axis = draw(st.integers(0, ndim - 1))
    shape[axis] = draw(st.sampled_from((2, 5, 7)))
    layout = Layout(
        order=tuple(draw(st.permutations(range(ndim)))),
        pad=tuple(draw(st.sampled_from((0, 0, 0, 1, 8))) for _ in range(ndim)),
        offset=draw(st.sampled_from((0, 0, 1, 8))),
    )
    order = np.random.default_rng(draw(st.integers(0, 99))).permutation(shape[axis])
    count = draw(st.integers(1, shape[axis] // 2))
    src, dst = order[:count], order[count : 2 * count]
    if draw(st.booleans()):
        src = np.full_like(src, src[0])  # one page onto several
    dtype = draw(st.sampled_from(DTYPES))
    flipped = tuple(slice(None, None, draw(st.sampled_from((1, 1, -1)))) for _ in range(ndim))
    return anything(shape, dtype, draw(st.integers(0, 99))), layout, flipped, src, dst, axis


@examples(60)
@given(problem=problems())
def test_against_numpy(executor, problem):
    values, layout, flipped, src, dst, axis = problem
    guarded = place(values, layout).to(executor.xp)
    pages = guarded.array[flipped]
    cuattn.copy_pages(pages, src, dst.tolist(), axis=axis - (values.ndim if axis % 2 else 0))
    guarded.check()
    found = executor.numpy(pages)
    np.testing.assert_array_equal(as_bytes(found), as_bytes(copied(values[flipped], src, dst, axis)))


def test_all_layers_of_a_cache_in_one_launch(executor):
    """Keys and values of each layer, pages on the third axis, and the same with heads before slots."""
    values = anything((3, 2, 6, 4, 2, 32), np.float16)
    for view in (values, values.transpose(0, 1, 2, 4, 3, 5)):
        pages = executor.array(values.copy())
        x = pages if view is values else pages.transpose(0, 1, 2, 4, 3, 5)
        with host.profile() as profile:
            cuattn.copy_pages(x, [5, 0, 5], [1, 2, 4], axis=2)
        np.testing.assert_array_equal(as_bytes(executor.numpy(x)), as_bytes(copied(view, [5, 0, 5], [1, 2, 4], 2)))
        if executor.name == "host":
            moved = 3 * values[:, :, 0].nbytes
            lists = 3 * 256 * 2 * 8  # every thread reads the two pages of its pair
            assert profile.launches == 1
            assert profile.bytes["global"] == {"read": moved + lists, "write": moved}


def test_runs_of_every_size(executor, monkeypatch):
    """Parts of a long run, many short runs, more of both than the grid has CTAs for."""
    monkeypatch.setattr(copying, "MAX_GRID", (2**31 - 1, 2, 3))
    for shape, dtype in (((2, 9000), np.float32), ((2, 3, 1023), np.int8), ((2, 3000, 2), np.int8), ((2, 1), np.int8)):
        values = anything(shape, dtype)
        layout = Layout(pad=(0,) * (len(shape) - 1) + (1,))
        guarded = place(values, layout).to(executor.xp)
        cuattn.copy_pages(guarded.array, [1], [0])
        guarded.check()
        np.testing.assert_array_equal(as_bytes(executor.numpy(guarded.array)), as_bytes(copied(values, [1], [0])))


def test_more_strided_axes_than_the_kernel_counts(executor):
    values = anything((2, 3, 2, 2, 3, 2, 2), np.int16)
    guarded = place(values, Layout(pad=(0, *(1,) * 6))).to(executor.xp)
    cuattn.copy_pages(guarded.array, [2], [1], axis=1)
    guarded.check()
    np.testing.assert_array_equal(executor.numpy(guarded.array), copied(values, [2], [1], 1))


def test_pages_that_nobody_has_looked_at(executor, monkeypatch):
    """A pair with a page that does not exist is skipped."""
    monkeypatch.setattr(copying, "_check_pages", lambda *args: None)
    values = anything((4, 3, 8), np.float32)
    guarded: Guarded = place(values).to(executor.xp)
    cuattn.copy_pages(guarded.array, [0, 4, -1, 2**40, 1, 0], [3, 2, 2, 2, -(2**62), 4])
    guarded.check()
    np.testing.assert_array_equal(as_bytes(executor.numpy(guarded.array)), as_bytes(copied(values, [0], [3])))


def test_lists_with_strides(executor):
    values = anything((6, 3, 8), np.float32)
    pages = executor.array(values.copy())
    src, dst = executor.array(np.array([0, 9, 2, 9, 4, 9])), executor.array(np.array([5, 9, 3, 9, 1], np.int32))
    cuattn.copy_pages(pages, src[::2], dst[::2])
    np.testing.assert_array_equal(as_bytes(executor.numpy(pages)), as_bytes(copied(values, [0, 2, 4], [5, 3, 1])))


@pytest.mark.parametrize(("shape", "axis"), [((0, 3), 0), ((3, 0), 0), ((0, 3), 1)])
def test_nothing_to_copy(executor, shape, axis):
    pages = executor.array(np.zeros(shape, np.float32))
    with host.profile() as profile:
        cuattn.copy_pages(pages, [], [], axis=axis)
        cuattn.copy_pages(executor.array(np.zeros((2, 3))), np.zeros(0, np.int64), [])
    assert profile.launches == 0


REFUSED = [
    ({"src": [0, 4], "dst": [1, 2]}, errors.ArgumentError, r"src\[1\] is 4; pages 0 to 3 exist"),
    ({"src": [0], "dst": [-1]}, errors.ArgumentError, r"dst\[0\] is -1"),
    ({"src": [0, 1], "dst": [2, 2]}, errors.ArgumentError, "dst holds page 2 twice"),
    ({"src": [0, 1], "dst": [1, 2]}, errors.ArgumentError, "page 1 is in src and in dst"),
    ({"src": [3], "dst": [3]}, errors.ArgumentError, "page 3 is in src and in dst"),
    ({"src": [0, 1], "dst": [2]}, errors.ShapeError, "src has shape"),
    ({"src": [[0]], "dst": [[1]]}, errors.ShapeError, "lists of one length"),
    ({"src": [0.5], "dst": [1]}, errors.DTypeError, "src has dtype float64"),
    ({"axis": 2}, errors.ArgumentError, "axis is 2"),
    ({"axis": True}, errors.ArgumentError, "axis is True"),
    ({"pages": 5}, errors.ArrayTypeError, "pages"),
    ({"pages": np.broadcast_to(np.zeros(3), (4, 3))}, errors.ArrayTypeError, "pages is read-only"),
    (
        {"pages": np.lib.stride_tricks.as_strided(np.zeros(9), (4, 3), (16, 8))},
        errors.OverlapError,
        "pages has strides",
    ),
]


@pytest.mark.parametrize(("changes", "error", "match"), REFUSED)
def test_refused(changes, error, match):
    pages = np.arange(12.0).reshape(4, 3)
    given = {"pages": pages, "src": [0], "dst": [1], **changes}
    with pytest.raises(error, match=match):
        cuattn.copy_pages(**given)
    np.testing.assert_array_equal(pages, np.arange(12.0).reshape(4, 3))


def test_lists_inside_of_the_pages():
    memory = np.zeros((4, 3), np.int64)
    memory[0] = 1, 2, 3
    with pytest.raises(errors.OverlapError, match="pages shares memory with dst"):
        cuattn.copy_pages(memory, [0], memory[0, :1])
