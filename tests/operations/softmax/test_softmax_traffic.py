"""The softmax algorithms move what their definitions say: counted bytes of global memory, exactly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import cuattn
from cuattn import host
from cuattn.ops.softmax.config import ONCHIP, SPLIT, STREAM, STREAM_SHORT
from cuattn.testing import kernels

READS = {"naive": 1, "safe": 2, "online": 1}  # to find the state of a row; the result takes one more


def counted(output, x, *, algorithm="online", config=None):
    with host.profile() as profile:
        getattr(kernels, output)(x, algorithm=algorithm, config=config)
    return profile.bytes["global"]["read"], profile.bytes["global"]["write"]


@pytest.mark.parametrize("algorithm", ["naive", "safe", "online"])
def test_one_cta_a_row(algorithm):
    x = np.zeros((5, 1000), np.float32)
    assert counted("softmax", x, algorithm=algorithm, config=STREAM) == ((READS[algorithm] + 1) * x.nbytes, x.nbytes)


def test_element_wise_loads_move_the_same_bytes():
    x = np.zeros(5001, np.float32)[1:].reshape(5, 1000)
    assert counted("softmax", x, config=STREAM_SHORT) == (2 * x.nbytes, x.nbytes)


@pytest.mark.parametrize("config", ONCHIP, ids=lambda config: f"{config.threads_per_row}_threads")
def test_rows_on_chip_are_read_once(config):
    x = np.zeros((7, config.max_cols(4) - 4), np.float32)
    assert counted("softmax", x, config=config) == (x.nbytes, x.nbytes)


@pytest.mark.parametrize(("algorithm", "dtype"), [("naive", np.float64), ("safe", np.float32), ("online", np.float32)])
def test_several_ctas_a_row(algorithm, dtype):
    """The same reads and writes, and the states: written once, read once by each CTA of the second launch."""
    x = np.zeros((3, 1000), dtype)
    config = replace(SPLIT, min_chunk_cols=256)
    num_chunks = 4
    states = x.shape[0] * num_chunks * 2 * x.itemsize
    read, written = counted("softmax", x, algorithm=algorithm, config=config)
    assert read == (READS[algorithm] + 1) * x.nbytes + num_chunks * states
    assert written == x.nbytes + states


@pytest.mark.parametrize("algorithm", ["safe", "online"])
def test_logsumexp_writes_one_number_a_row(algorithm):
    x = np.zeros((5, 1000), np.float32)
    assert counted("logsumexp", x, algorithm=algorithm, config=STREAM) == (READS[algorithm] * x.nbytes, 5 * 4)


def test_the_public_function_keeps_short_rows_on_chip():
    x = np.zeros((4, 2048), np.float32)
    with host.profile() as profile:
        cuattn.softmax(x)
    assert profile.launches == 1
    assert profile.bytes["global"] == {"read": x.nbytes, "write": x.nbytes}
