"""The CUDA side of dual-chunk attention on a stand-in for CuPy: nothing waits, wherever the lengths are."""

from __future__ import annotations

import numpy as np
import pytest
from simulated_cupy import ComputingCupy, installed

import cuattn

CHUNKS = {"chunk_size": 20, "local_size": 5}
CU_Q, CU_K = np.array([0, 5, 5, 40], np.int32), np.array([0, 9, 12, 80], np.int32)


@pytest.fixture
def cupy(monkeypatch):
    with installed(monkeypatch, ComputingCupy) as module:
        yield module


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def same(cupy, results, expected):
    assert cupy.num_synchronizations == 0
    for got, want in zip(results, expected, strict=True):
        assert isinstance(got, cupy.ndarray)
        np.testing.assert_allclose(got._array, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("on_device", (False, True))
def test_packed_sequences_and_their_gradients(cupy, on_device):
    arrays = [normal(n, heads, 64, seed=heads + n) for n, heads in ((40, 4), (80, 2), (80, 2))]
    options = {**CHUNKS, "logit_factor": [1.0, 1.5, 0.7]}
    host = {"cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K}
    out, lse = cuattn.dual_chunk_attention(*arrays, return_lse=True, **host, **options)
    grads = cuattn.dual_chunk_attention_backward(out, *arrays, out, lse, **host, **options)
    given = [cupy.asarray(x) for x in arrays]
    lengths = {name: cupy.asarray(x) if on_device else x for name, x in host.items()}
    results = cuattn.dual_chunk_attention(*given, return_lse=True, **lengths, **options)
    same(cupy, results, (out, lse))
    same(cupy, cuattn.dual_chunk_attention_backward(results[0], *given, *results, **lengths, **options), grads)


@pytest.mark.parametrize("on_device", (False, True))
@pytest.mark.parametrize("factor", (1.0, [1.0, 1.5]))
def test_decoding(cupy, on_device, factor):
    q, pages = normal(2, 2, 4, 64), [normal(8, 16, 2, 64, seed=seed) for seed in (1, 2)]
    tables, seqlens = np.array([[3, 1, 5, 0], [4, 2, 6, 7]], np.int32), np.array([52, 14], np.int32)
    expected = cuattn.dual_chunk_decode(q, *pages, tables, seqlens, logit_factor=factor, return_lse=True, **CHUNKS)
    given = [cupy.asarray(x) for x in (q, *pages)]
    where = [cupy.asarray(x) if on_device else x for x in (tables, seqlens)]
    result = cuattn.dual_chunk_decode(*given, *where, logit_factor=factor, return_lse=True, **CHUNKS)
    same(cupy, result, expected)


def test_positions_and_factors(cupy):
    positions, lengths = np.array([0, 5, 31]), np.array([100, 3000])
    same(cupy, [cuattn.dual_chunk_positions(cupy.asarray(positions), 20, 5)], [[0, 5, 1]])
    factor = cuattn.dual_chunk_logit_factor(cupy.asarray(lengths), 1000, "qwen")
    same(cupy, [factor], [cuattn.dual_chunk_logit_factor(lengths, 1000, "qwen")])
