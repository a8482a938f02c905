"""Poisoned surroundings: every layout keeps its values, and every stray write is found."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cuattn.errors import ArgumentError
from cuattn.testing.arrays import GUARD_BYTES, GuardBandError, Layout, allocate, place, surrounded
from cuattn.testing.executors import ExecutorUnderTest
from cuattn.testing.strategies import DTYPES, dtypes, examples, layouts

SHAPES = st.tuples(*[st.integers(0, 4)] * 4)


@examples(150)
@given(SHAPES, dtypes(), layouts())
def test_placed_values_are_kept_and_the_rest_is_poison(shape, dtype, layout):
    values = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    guarded = place(values, layout)
    assert guarded.array.shape == shape and guarded.array.dtype == dtype
    assert guarded.array.tobytes() == values.tobytes()
    guarded.check()
    assert guarded.byte_offset % 256 == layout.offset * dtype.itemsize % 256
    assert guarded.array.ctypes.data % 256 == guarded.byte_offset % 256
    assert guarded.array.strides == tuple(s * dtype.itemsize for s in layout.strides(shape))
    assert (guarded.root[:GUARD_BYTES] == 0xFF).all() and (guarded.root[-GUARD_BYTES:] == 0xFF).all()
    assert int((guarded.root != 0xFF).sum()) <= values.nbytes


@examples(150)
@given(st.tuples(*[st.integers(1, 4)] * 4), dtypes(), layouts(), st.data())
def test_every_stray_byte_is_found(shape, dtype, layout, data):
    guarded = allocate(shape, dtype, layout)
    inside = np.zeros(guarded.root.size, bool)
    for index in np.ndindex(*shape):
        at = guarded.byte_offset + sum(i * s for i, s in zip(index, guarded.array.strides, strict=True))
        inside[at : at + dtype.itemsize] = True
    stray = data.draw(st.sampled_from(np.flatnonzero(~inside).tolist()))
    guarded.array[...] = 0
    guarded.check()
    guarded.root[stray] ^= data.draw(st.sampled_from([1, 128, 255]))
    with pytest.raises(GuardBandError, match="1 poison bytes"):
        guarded.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_poison_is_nan(dtype):
    assert np.isnan(allocate((3, 5), dtype).array.astype(np.float64)).all()


def test_off_by_one_is_located():
    guarded = allocate((2, 3), np.float32, Layout(pad=(0, 1)))
    flat = guarded.root.view(np.float32)
    first = guarded.byte_offset // 4
    flat[first - 1] = 0.0
    with pytest.raises(GuardBandError, match=r"4 before the array.*lies -4 bytes from"):
        guarded.check()
    guarded.root[...] = 0xFF
    flat[first + 3] = 0.0
    with pytest.raises(GuardBandError, match=r"4 in its gaps.*lies 12 bytes from"):
        guarded.check()
    guarded.root[...] = 0xFF
    flat[first + 7] = 0.0
    with pytest.raises(GuardBandError, match=r"4 behind it.*lies 28 bytes from"):
        guarded.check()


def test_transposed_layout():
    guarded = place(np.arange(24.0).reshape(1, 2, 3, 4), Layout(order=(0, 2, 1, 3)))
    np.testing.assert_array_equal(guarded.array.transpose(0, 2, 1, 3).strides, (24 * 8, 8 * 8, 4 * 8, 8))
    assert guarded.array.transpose(0, 2, 1, 3).flags.c_contiguous


@pytest.mark.parametrize("layout", [Layout(order=(0, 0)), Layout(order=(0, 1, 2)), Layout(pad=(1,))])
def test_layouts_must_fit(layout):
    with pytest.raises(ArgumentError, match="does not fit"):
        allocate((2, 3), np.float32, layout)


@examples(60)
@given(SHAPES, dtypes(), layouts())
def test_copies_keep_strides_alignment_and_surroundings(shape, dtype, layout):
    guarded = place(np.ones(shape, dtype), layout)
    copy = guarded.to(np)
    assert not np.shares_memory(copy.root, guarded.root)
    assert copy.array.strides == guarded.array.strides
    assert copy.array.ctypes.data % 256 == guarded.array.ctypes.data % 256
    assert copy.array.tobytes() == guarded.array.tobytes()
    copy.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_surrounded_finds_the_base_of_a_view(dtype):
    base = np.arange(2 * 5 * 3 * 4).reshape(2, 5, 3, 4).astype(dtype)
    for owner in (base, base.transpose(0, 2, 1, 3).copy(order="K"), np.asfortranarray(base)):
        view = owner[1:, 1:3, ::2]
        copy = surrounded(view).to(np).array
        np.testing.assert_array_equal(copy, view)
        assert copy.strides == view.strides
        assert copy.ctypes.data % 256 == view.ctypes.data % 256


def test_host_executor_passes_arrays_on_as_they_are():
    executor = ExecutorUnderTest("host")
    x = np.arange(12.0).reshape(3, 4)[:, 1:3]
    assert executor.array(x) is x
    guarded = place(x)
    assert executor.array(guarded) is guarded.array
    assert executor.xp is np
    result = executor.guarded((2, 2), np.float32)
    result.array[...] = 1
    result.check()
    np.testing.assert_array_equal(executor.numpy(result.array), np.ones((2, 2)))
