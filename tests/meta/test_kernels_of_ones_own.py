"""`cuattn.testing.kernels`: the public functions under their names, with a kernel shape of one's own choice."""

from __future__ import annotations

import numpy as np
import pytest

import cuattn
from cuattn import host
from cuattn.ops.softmax.config import ONCHIP, STREAM
from cuattn.testing import kernels


def test_every_function_is_a_public_one() -> None:
    assert set(kernels.__all__) <= set(cuattn.__all__)


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_without_a_config_it_is_the_public_function(name: str) -> None:
    x = np.random.default_rng(0).standard_normal((3, 70)).astype(np.float32)
    got, want = getattr(kernels, name)(x, axis=0), getattr(cuattn, name)(x, axis=0)
    assert got.dtype == want.dtype and got.shape == want.shape and got.tobytes() == want.tobytes()


def test_the_config_is_taken() -> None:
    """Rows that stay on chip are read once, others twice."""
    x = np.zeros((4, 256), np.float32)
    reads = []
    for config in (ONCHIP[1], STREAM):
        with host.profile() as profile:
            kernels.softmax(x, config=config)
        reads.append(profile.bytes["global"]["read"])
    assert reads == [x.nbytes, 2 * x.nbytes]
