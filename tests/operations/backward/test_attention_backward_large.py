"""Gradients of sizes beyond 16 and 32 bits: grids, and offsets into arrays of more than 2^31 elements.

The arrays are sparse: of a buffer of gigabytes only the two ends are touched.
"""

from __future__ import annotations

import numpy as np
import pytest
from backward_calls import Saved, after_forward, assert_gradients_right, assert_right, call_backward, same_bits
from far_arrays import far_apart, normal, only_the_memory_checker

import cuattn
from cuattn import host
from cuattn.ops.attention.backward.config import FLASH_BWD_CONFIGS, SIDES

__all__ = ["only_the_memory_checker"]  # a fixture of every test here

#: Rows of the smallest tiles: where the number of CTAs is the point.
SMALL_ROWS = tuple([row for row in FLASH_BWD_CONFIGS if row.itemsize == 2 and row.own == own][-1] for own in SIDES)

NAMES = ("dout", "q", "k", "v", "out")


def one_key(executor, q, starts=()):
    """A call in which every query has one key, whose probability is therefore 1."""
    ones = np.arange(len(q)) % 3 + 1
    dout = np.broadcast_to(ones.reshape(-1, *(1,) * (q.ndim - 1)), q.shape).astype(q.dtype)
    lse = (q.astype(np.float32) ** 2).sum(axis=-1) / np.float32(np.sqrt(8))
    lse = np.ascontiguousarray(lse.T if starts else lse.swapaxes(1, 2))
    return Saved(dout, q, q, q, q, lse, starts=starts)


def assert_only_dv(grads, saved):
    np.testing.assert_array_equal(grads.dv, saved.dout)
    for x in grads[:2]:
        assert x.shape == saved.q.shape
        np.testing.assert_allclose(x.astype(np.float64), 0, atol=0.1)  # dS is 0 up to the rounding of lse


def test_more_heads_than_a_grid_axis_of_y_or_z(executor):
    """batch * heads beyond 65535 are folded into grid.x."""
    saved = one_key(executor, normal(65537, 1, 1, 8))
    with host.check():  # the number of CTAs is the point, and the checker would make it slow
        assert_only_dv(call_backward(executor, saved, configs=SMALL_ROWS), saved)


def test_more_sequences_than_a_grid_axis_of_y_or_z(executor):
    saved = one_key(executor, normal(65537, 1, 8), (np.arange(65538), np.arange(65538)))
    with host.check():
        assert_only_dv(call_backward(executor, saved, configs=SMALL_ROWS), saved)


@pytest.mark.parametrize("axis", (0, 1, 2))
@pytest.mark.parametrize("dtype", (np.float16, np.float32), ids=str)
def test_offsets_beyond_32_bits(executor, axis, dtype):
    shape = [1, 1, 1, 8]
    shape[axis] = 2
    q, k, v = (normal(*shape, seed=seed).astype(dtype) for seed in range(3))
    saved = after_forward(executor, q, k, v, dout=normal(*shape, seed=3).astype(dtype), dlse=True)
    grads = assert_right(executor, saved)
    for name in NAMES:
        far = saved.but(**{name: far_apart(getattr(saved, name), axis)})
        assert same_bits(call_backward(executor, far)[:3], grads[:3]), name
    for name in ("dq", "dk", "dv"):
        target = far_apart(np.zeros(shape, dtype), axis)
        result = call_backward(executor, saved, **{name: executor.array(target)})
        assert same_bits(result[:3], grads[:3]), name


@pytest.mark.parametrize("axis", (0, 1))
def test_packed_offsets_beyond_32_bits(executor, axis):
    """Two tokens, or two heads of one token, of which each token is a sequence of three."""
    shape = [1, 1, 8]
    shape[axis] = 2
    q, k, v = (normal(*shape, seed=seed) for seed in range(3))
    starts = np.int32([0, 0, shape[0]])
    saved = after_forward(executor, q, k, v, starts, starts, dout=normal(*shape, seed=3), dlse=True)
    grads = call_backward(executor, saved)
    assert_gradients_right(grads, saved)
    for name in NAMES:
        far = saved.but(**{name: far_apart(getattr(saved, name), axis)})
        assert same_bits(call_backward(executor, far)[:3], grads[:3]), name
    for name in ("dq", "dk", "dv"):
        target = far_apart(np.zeros(shape, np.float16), axis)
        assert same_bits(call_backward(executor, saved, **{name: executor.array(target)})[:3], grads[:3]), name


@pytest.mark.parametrize("axis", (0, 1, 2, 3))
def test_bias_and_mask_offsets_beyond_32_bits(executor, axis):
    q = normal(2, 2, 2, 8)
    shape = [1, 1, 1, 1]
    shape[axis] = 2
    bias = normal(*shape, seed=1).astype(np.float32)
    mask = np.arange(2).astype(bool).reshape(shape)
    near = {"bias": bias, "mask": mask}
    saved = after_forward(executor, q, q, q, dlse=True, **near)
    grads = assert_right(executor, saved, return_dbias=True)
    for name, value in near.items():
        far = saved.but(options=near | {name: far_apart(value, axis)})
        assert same_bits(call_backward(executor, far, return_dbias=True), grads), name


def test_one_row_and_many_keys(executor):
    """A long walk over the other side, and many blocks that own: more tiles than either has stages."""
    for seqlens in ((1, 1500), (1500, 1), (600, 3)):
        rng = np.random.default_rng(0)
        q, k, v = (rng.standard_normal((1, n, 1, 32)).astype(np.float16) for n in (seqlens[0], *[seqlens[1]] * 2))
        with host.check("mem", "init", "race"):
            assert_right(executor, after_forward(executor, q, k, v, dlse=True))


def test_a_workspace_size_is_counted_beyond_32_bits():
    """Of arrays that are views of one element: nothing is read."""
    q = np.broadcast_to(np.zeros((), np.float16), (4, 2**20, 2**10, 1))
    size = cuattn.attention_backward_workspace_size(q, q, q)
    assert size >= 4 * 2**20 * 2**10 * 4 and isinstance(size, int)
