"""What dual-chunk attention has to the bit: rope and causal attention in the first chunk, turned keys, and its work."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest

import cuattn
from cuattn import host
from cuattn.ops.attention.forward.config import select
from cuattn.testing import kernels

F16, BF16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
SMEM = 163 * 1024


def normal(*shape, dtype=F16, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def inputs(executor, seqlen_q, seqlen_k, dtype, *, head_dim=64):
    shapes = (2, seqlen_q, 4, head_dim), (2, seqlen_k, 2, head_dim), (2, seqlen_k, 2, head_dim)
    return [executor.array(normal(*shape, dtype=dtype, seed=seed)) for seed, shape in enumerate(shapes)]


def same_bits(executor, results, expected):
    for got, want in zip(results, expected, strict=True):
        got, want = executor.numpy(got), executor.numpy(want)
        assert got.tobytes() == want.tobytes(), np.argwhere(got != want)[:3]


@pytest.mark.parametrize("dtype", (F16, BF16, F32, F64), ids=str)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), ((50, 50), (1, 60), (33, 61), (70, 41)), ids=str)
def test_one_chunk_is_rope_and_causal_attention(executor, dtype, seqlen_q, seqlen_k):
    """M <= L, in the same row."""
    q, k, v = inputs(executor, seqlen_q, seqlen_k, dtype)
    row = select(dtype, 64, 64, seqlen_q=min(seqlen_q, 61), smem_limit_bytes=SMEM)
    turned = cuattn.rope(q, np.arange(seqlen_q) + seqlen_k - seqlen_q), cuattn.rope(k, np.arange(seqlen_k))
    expected = kernels.attention(*turned, v, causal=True, return_lse=True, config=row)
    for local_size in (3, 100):  # W < L and W > L
        options = {"chunk_size": 61 + local_size, "local_size": local_size, "return_lse": True}
        same_bits(executor, kernels.dual_chunk_attention(q, k, v, config=row, **options), expected)


def test_one_chunk_of_many_tiles(executor):
    q, k, v = inputs(executor, 200, 300, F16)
    row = select(F16, 64, 64, seqlen_q=200, smem_limit_bytes=SMEM)
    turned = cuattn.rope(q, np.arange(100, 300)), cuattn.rope(k, np.arange(300))
    expected = kernels.attention(*turned, v, causal=True, scale=0.2, return_lse=True, config=row)
    options = {"chunk_size": 310, "local_size": 10, "scale": 0.1, "logit_factor": 2.0, "return_lse": True}
    same_bits(executor, kernels.dual_chunk_attention(q, k, v, config=row, **options), expected)


def test_the_first_chunk_of_a_longer_context_is_that_too(executor):
    q, k, v = inputs(executor, 90, 90, F16)
    first = slice(0, 37)
    row = select(F16, 64, 64, seqlen_q=37, smem_limit_bytes=SMEM)
    turned = cuattn.rope(q[:, first], np.arange(37)), cuattn.rope(k[:, first], np.arange(37))
    expected = kernels.attention(*turned, v[:, first], causal=True, config=row)
    out = kernels.dual_chunk_attention(q, k, v, chunk_size=45, local_size=8, config=row)
    same_bits(executor, [executor.numpy(out)[:, first]], [expected])


@pytest.mark.parametrize("dtype", (F16, F64), ids=str)
def test_keys_that_are_turned_already(executor, dtype):
    q, k, v = inputs(executor, 60, 133, dtype)
    options = {"chunk_size": 45, "local_size": 8, "return_lse": True}
    expected = cuattn.dual_chunk_attention(q, k, v, **options)
    turned = cuattn.rope(k, cuattn.dual_chunk_positions(np.arange(133), 45, 8))
    same_bits(executor, cuattn.dual_chunk_attention(q, turned, v, keys_rotated=True, **options), expected)


def test_a_factor_a_sequence_is_that_factor(executor):
    q, k, v = inputs(executor, 60, 133, F16)
    options = {"chunk_size": 45, "local_size": 8, "return_lse": True}
    both = [cuattn.dual_chunk_attention(q, k, v, logit_factor=factor, **options) for factor in (1.5, 2.0)]
    out, lse = cuattn.dual_chunk_attention(q, k, v, logit_factor=[1.5, 2.0], **options)
    for b, expected in enumerate(both):  # of scale times factor one rounding may differ
        assert np.allclose(executor.numpy(out)[b], executor.numpy(expected[0])[b], atol=2e-3)
        assert np.allclose(executor.numpy(lse)[b], executor.numpy(expected[1])[b], atol=1e-5)


def test_chunks_of_a_prompt_are_the_prompt(executor):
    """Any cut of the queries: each call sees the keys so far."""
    q, k, v = inputs(executor, 133, 133, F32)
    options = {"chunk_size": 45, "local_size": 8}
    whole = executor.numpy(cuattn.dual_chunk_attention(q, k, v, **options))
    for cuts in ((0, 40, 41, 90, 133), (0, 37, 74, 133)):
        parts = [
            cuattn.dual_chunk_attention(q[:, first:end], k[:, :end], v[:, :end], **options)
            for first, end in itertools.pairwise(cuts)
        ]
        assert np.allclose(np.concatenate([executor.numpy(x) for x in parts], axis=1), whole, atol=2e-6)


def counted(call):
    with host.profile() as profile:
        call()
    mma = sum(number for opcode, number in profile.opcodes.items() if opcode.startswith("mma"))
    return sum(profile.instructions.values()), mma, profile.launches


@pytest.mark.parametrize("dtype", (F16, BF16), ids=str)
def test_work(dtype):
    """One launch, the products of one causal call, and little more than its instructions."""
    q, k, v = (normal(1, 1024, 2, 64, dtype=dtype, seed=seed) for seed in range(3))
    causal, causal_mma, _ = counted(lambda: cuattn.attention(q, k, v, causal=True))
    options = {"chunk_size": 320, "local_size": 64, "keys_rotated": True}
    dual, dual_mma, launches = counted(lambda: cuattn.dual_chunk_attention(q, k, v, **options))
    assert launches == 1
    assert dual_mma == causal_mma == 69_632
    assert dual <= 1.20 * causal, dual / causal
