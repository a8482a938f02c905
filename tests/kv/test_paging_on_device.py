"""The CUDA side of append_kv, copy_pages and slot_mapping on a stand-in for CuPy: what waits, what is copied, what
nobody looked at."""

from __future__ import annotations

import numpy as np
import pytest
from simulated_cupy import Exporter, installed

import cuattn
from cuattn import Rotary, errors, reference
from cuattn.ops.rotary.arguments import turn_words


@pytest.fixture
def cupy(monkeypatch):
    with installed(monkeypatch) as module:
        module.cuda.get_current_stream().synchronize = lambda: None
        yield module
        turn_words.cache_clear()  # it holds arrays of this stand-in


def normal(*shape, dtype=np.float32):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def codes(x, name):
    return reference.quantize(x, name).codes.view(np.uint8)


def test_nothing_waits_and_nothing_is_copied(cupy):
    """A step of a model that has everything on the device: slots, positions and scales."""
    k = normal(3, 2, 16)
    new, slots, positions = cupy.asarray(k), cupy.asarray(np.array([5, -1, 2])), cupy.asarray(np.arange(3))
    pages = [cupy.asarray(np.zeros((2, 3, 2, 16), np.uint8)) for _ in "kv"]
    scale = cupy.asarray(np.float32([0.5, 2]))
    options = {"kv_format": "e4m3fn", "rope": Rotary(), "positions": positions, "k_scale": scale, "v_scale": 2.0}
    cuattn.append_kv(new, new, *pages, slots, **options)
    counts = cupy.num_synchronizations, cupy.num_uploads, cupy.num_allocations
    assert cuattn.append_kv(new, new, *pages, slots, **options) is None
    cuattn.copy_pages(pages[0], cupy.asarray(np.array([1])), cupy.asarray(np.array([0], np.int32)))
    assert (cupy.num_synchronizations, cupy.num_uploads, cupy.num_allocations) == (
        counts[0],
        counts[1] + 2,
        counts[2] + 2,
    )
    wanted = codes(k / np.float32(2), "e4m3fn")
    np.testing.assert_array_equal(pages[1].get()[1, 2], wanted[0])
    np.testing.assert_array_equal(pages[1].get()[0, 2], wanted[2])
    np.testing.assert_array_equal(pages[0].get()[0], pages[0].get()[1])


def test_lists_on_the_host_are_looked_at_and_copied_without_waiting(cupy):
    x = cupy.asarray(normal(2, 1, 8))
    pages = [cupy.asarray(np.zeros((2, 2, 1, 8), np.float32)) for _ in "kv"]
    cuattn.append_kv(x, x, *pages, [3, 0])
    assert cupy.num_synchronizations == 0
    np.testing.assert_array_equal(pages[0].get().reshape(4, 8)[[3, 0]], normal(2, 1, 8)[:, 0])
    with pytest.raises(errors.ArgumentError, match=r"slot_mapping\[0\] is 4"):
        cuattn.append_kv(x, x, *pages, [4, 0])
    with pytest.raises(errors.ArgumentError, match="k_scale holds"):
        ints = [cupy.asarray(np.zeros((2, 2, 1, 8), np.int8)) for _ in "kv"]
        cuattn.append_kv(x, x, *ints, [1, 0], k_scale=[-1.0])
    with pytest.raises(errors.ArgumentError, match="dst holds page 1 twice"):
        cuattn.copy_pages(pages[0], [0, 0], [1, 1])


def test_what_lies_on_the_device_is_looked_at_only_on_request(cupy, monkeypatch):
    x = cupy.asarray(normal(2, 1, 8))
    pages = [cupy.asarray(np.zeros((2, 2, 1, 8), np.float32)) for _ in "kv"]
    slots, page = cupy.asarray(np.array([4, 1])), cupy.asarray(np.array([2]))
    tables, lengths = cupy.asarray(np.array([[0, -1], [1, 0]], np.int32)), cupy.asarray(np.array([1, 3], np.int32))
    cuattn.append_kv(x, x, *pages, slots)
    cuattn.copy_pages(pages[0], page, cupy.asarray(np.array([0])))
    # The second page of sequence 0 is none, and sequence 1 has room for one token.
    found = cuattn.slot_mapping(tables, lengths, 2, page_size=2)
    assert cupy.num_synchronizations == 0
    np.testing.assert_array_equal(found.get(), [1, -1, 1, -1])
    found = cuattn.slot_mapping(tables, cupy.asarray(np.array([0, -1])), 2, page_size=2)
    np.testing.assert_array_equal(found.get(), [0, 1, -1, 2])
    np.testing.assert_array_equal(pages[0].get().reshape(4, 8)[[0, 2, 3]], 0)
    np.testing.assert_array_equal(pages[0].get().reshape(4, 8)[1], normal(2, 1, 8)[1, 0])
    monkeypatch.setenv("CUATTN_CHECK", "1")
    for call, match in (
        (lambda: cuattn.append_kv(x, x, *pages, slots), r"slot_mapping\[0\] is 4"),
        (lambda: cuattn.copy_pages(pages[0], page, [0]), r"src\[0\] is 2"),
        (lambda: cuattn.slot_mapping(tables, [0, 0], 3, page_size=2), r"block_tables\[0, 1\] is -1"),
        (lambda: cuattn.slot_mapping(tables, lengths, 2, page_size=2), "sequence 1 has 3 tokens and gets 2"),
    ):
        with pytest.raises(errors.ArgumentError, match=match):
            call()


def test_slot_mapping_of_tables_on_the_device(cupy):
    tables = np.array([[3, 1], [0, 2]], np.int32)
    wanted = cuattn.slot_mapping(tables, [3, 0], [2, 5], 4)
    for given in (cupy.asarray(tables), Exporter(tables), cupy.asarray(tables.astype(np.int64))):
        for lengths in ([3, 0], cupy.asarray(np.array([3, 0]))):
            found = cuattn.slot_mapping(given, lengths, [2, 5], 4)
            assert isinstance(found, cupy.ndarray)
            np.testing.assert_array_equal(found._array, wanted)
    with pytest.raises(errors.ArrayTypeError, match="counts is a Array"):
        cuattn.slot_mapping(tables, [3, 0], cupy.asarray(np.array([2, 5])), 4)


def test_arrays_of_other_libraries_are_written_in_place(cupy):
    x, pages = normal(2, 1, 8), [np.zeros((2, 2, 1, 8), np.float32) for _ in "kv"]
    given = [Exporter(array, 1) for array in (x, x, *pages)]
    cuattn.append_kv(*given, [3, 0])
    assert cupy.launches[-1].device == 1
    for side in pages:
        np.testing.assert_array_equal(side.reshape(4, 8)[[3, 0]], x[:, 0])


def test_arrays_of_two_places_are_refused(cupy):
    x, pages = normal(2, 1, 8), np.zeros((2, 2, 1, 8), np.int8)
    device_pages = [cupy.asarray(pages) for _ in "kv"]
    with pytest.raises(errors.ArrayTypeError, match=r"k is .* on the CPU but k_pages is .* on CUDA device 0"):
        cuattn.append_kv(x, x, *device_pages, [0, 1])
    with pytest.raises(errors.ArrayTypeError, match="but k_scale is"):
        new = cupy.asarray(x)
        cuattn.append_kv(new, new, *device_pages, [0, 1], k_scale=np.zeros((2, 2, 1), np.float32))
    with pytest.raises(errors.ArrayTypeError, match=r"pages is .* but src is"):
        cuattn.copy_pages(pages, cupy.asarray(np.array([0])), [1])
