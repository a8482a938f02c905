"""Sparse arrays of more than 2^31 elements."""

from __future__ import annotations

import numpy as np
import pytest

from cuattn import host

FAR = 2**31 + 8  # elements between two entries


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float16)


def far_apart(x, axis):
    """A copy of `x`, of two entries along `axis`, with FAR elements from one to the other."""
    assert x.shape[axis] == 2 and x[(slice(None),) * axis + (0,)].size <= FAR
    strides = [0] * x.ndim
    step = x.itemsize
    for other in reversed(range(x.ndim)):
        if other != axis:
            strides[other] = step
            step *= x.shape[other]
    strides[axis] = FAR * x.itemsize
    far = np.lib.stride_tricks.as_strided(np.zeros(2 * FAR, x.dtype), x.shape, strides)
    far[...] = x
    return far


@pytest.fixture(autouse=True)
def only_the_memory_checker():
    with host.check("mem"):  # the others keep a record for every byte
        yield
