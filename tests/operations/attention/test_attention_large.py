"""Sizes beyond 16 and 32 bits: grids, and offsets into arrays of more than 2^31 elements.

The arrays are sparse: of a buffer of gigabytes only the two ends are touched.
"""

from __future__ import annotations

import numpy as np
import pytest
from far_arrays import far_apart, normal, only_the_memory_checker  # noqa: F401

import cuattn
from cuattn import host
from cuattn.testing import assert_attention_close


def test_more_heads_than_a_grid_axis_of_y_or_z(executor):
    """batch * heads beyond 65535 are folded into grid.x."""
    q = normal(65537, 1, 1, 8)
    with host.check():  # the number of CTAs is the point, and the checker would make it slow
        out = cuattn.attention(*(executor.array(x) for x in (q, q, q)))
    np.testing.assert_array_equal(executor.numpy(out), q)


def test_more_sequences_than_a_grid_axis_of_y_or_z(executor):
    q = normal(65537, 1, 8)
    cu_seqlens = np.arange(65538)
    with host.check():
        out = cuattn.attention_varlen(*(executor.array(x) for x in (q, q, q)), cu_seqlens, cu_seqlens)
    np.testing.assert_array_equal(executor.numpy(out), q)


@pytest.mark.parametrize("axis", (0, 1, 2))
@pytest.mark.parametrize("dtype", (np.float16, np.float32), ids=str)
def test_offsets_beyond_32_bits(axis, dtype):
    shape = [1, 1, 1, 8]
    shape[axis] = 2
    near = normal(*shape).astype(dtype)
    far = far_apart(near, axis)
    for arrays in ((far, near, near), (near, far, near), (near, near, far)):
        assert_attention_close(cuattn.attention(*arrays), near, near, near)
    assert_attention_close(cuattn.attention(near, near, near, out=far), near, near, near)


@pytest.mark.parametrize("axis", (0, 1))
def test_packed_offsets_beyond_32_bits(axis):
    """Two tokens, or two heads of one token, of which each token is a sequence."""
    shape = [1, 1, 8]
    shape[axis] = 2
    near = normal(*shape)
    cu_seqlens = np.arange(shape[0] + 1)
    far = far_apart(near, axis)
    for arrays in ((far, near, near), (near, far, near), (near, near, far)):
        np.testing.assert_array_equal(cuattn.attention_varlen(*arrays, cu_seqlens, cu_seqlens), near)
    np.testing.assert_array_equal(cuattn.attention_varlen(near, near, near, cu_seqlens, cu_seqlens, out=far), near)


@pytest.mark.parametrize("axis", (0, 1, 2, 3))
def test_bias_and_mask_offsets_beyond_32_bits(axis):
    q = normal(2, 2, 2, 8)
    shape = [1, 1, 1, 1]
    shape[axis] = 2
    bias = normal(*shape, seed=1)
    mask = np.arange(2).astype(bool).reshape(shape)
    for name, value in (("bias", bias), ("mask", mask)):
        out = cuattn.attention(q, q, q, **{name: far_apart(value, axis)})
        assert_attention_close(out, q, q, q, **{name: value})
