"""Decoding beyond 16 and 32 bits: grids, and offsets into caches of more than 2^31 elements.

The arrays are sparse: of a buffer of gigabytes only the two ends are touched.
"""

from __future__ import annotations

import numpy as np
import pytest
from far_arrays import far_apart, normal

import cuattn
from cuattn import host


@pytest.fixture(autouse=True)
def only_the_memory_checker():
    with host.check("mem"):  # the others keep a record for every byte
        yield


def test_more_sequences_than_a_grid_axis_of_y_or_z(executor):
    """65,537 sequences of one key, whose value each of them returns."""
    x = normal(65537, 1, 1, 8)
    arrays = [executor.array(x)] * 3
    tables = np.arange(65537, dtype=np.int32)[::-1].reshape(-1, 1)
    with host.check():  # the number of CTAs is the point, and the checker would make it slow
        out = cuattn.paged_attention(*arrays, tables, np.ones(65537, np.int32))
    np.testing.assert_array_equal(executor.numpy(out), x[::-1])


@pytest.mark.parametrize("axis", (0, 1, 2))
@pytest.mark.parametrize("dtype", (np.float16, np.float32), ids=str)
def test_offsets_beyond_32_bits(axis, dtype):
    """Two pages (or sequences), two slots, or two heads, that far apart."""
    shape = [1, 1, 1, 8]
    shape[axis] = 2
    near = normal(*shape).astype(dtype)
    far = far_apart(near, axis)
    q = normal(shape[0], 1, shape[2], 8, seed=1).astype(dtype)
    lengths, pages = np.full(shape[0], shape[1]), np.arange(shape[0]).reshape(-1, 1)
    for num_splits in (1, 2):
        expected = cuattn.decode_attention(q, near, near, lengths, num_splits=num_splits)
        for arrays in ((near, far), (far, near)):
            out = cuattn.decode_attention(q, *arrays, lengths, num_splits=num_splits)
            np.testing.assert_array_equal(out, expected)
            out = cuattn.paged_attention(q, *arrays, pages, lengths, num_splits=num_splits)
            np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("axis", (0, 2))
def test_queries_and_results_beyond_32_bits(axis):
    shape = [1, 1, 1, 8]
    shape[axis] = 2
    q, cache = normal(*shape), normal(shape[0], 3, 1, 8, seed=1)
    lengths = np.full(shape[0], 3)
    expected = cuattn.decode_attention(q, cache, cache, lengths)
    for num_splits in (1, 2):
        out = cuattn.decode_attention(
            far_apart(q, axis), cache, cache, lengths, out=far_apart(q * 0, axis), num_splits=num_splits
        )
        np.testing.assert_allclose(out, expected, rtol=2e-3)


def test_a_page_of_many_slots():
    """A page size and a table entry whose product has more than 31 bits; by stride 0, all slots are one."""
    slots = 2**16 + 1
    pages = np.lib.stride_tricks.as_strided(normal(1, 1, 8), (40000, slots, 1, 8), (0, 0, 16, 2))
    q = normal(1, 1, 1, 8, seed=1)
    table = np.full((1, 3), 39999)
    with host.check():  # the checker would note every slot of all the pages that are one
        for length in (10, 2 * slots + 5):
            out = cuattn.paged_attention(q, pages, pages, table, [length], window=(3, 0))
            np.testing.assert_allclose(out[0, 0, 0], pages[0, 0, 0], rtol=1e-3)
