"""Gradients of dual-chunk attention: against float64, whose own are held against finite differences."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cuattn
from cuattn import reference
from cuattn.ops.dual_chunk import arguments as dual_chunk_arguments
from cuattn.ops.dual_chunk import backward_parts
from cuattn.reference.dual_chunk import chunks_ahead, query_positions
from cuattn.testing.dual_chunk_tolerance import assert_dual_chunk_gradients_close
from cuattn.testing.rounding import to_numpy
from cuattn.testing.strategies import examples

F16, BF16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
CHUNKS = {"chunk_size": 45, "local_size": 8}


def normal(*shape, dtype=F16, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def check(executor, dtype, seqlen_q, seqlen_k, *, batch=1, heads=(4, 2), seed=0, **options):
    q, k, v = (
        normal(batch, n, h, 64, dtype=dtype, seed=seed + i)
        for i, (n, h) in enumerate(((seqlen_q, heads[0]), (seqlen_k, heads[1]), (seqlen_k, heads[1])))
    )
    arrays = [executor.array(x) for x in (q, k, v)]
    out, lse = cuattn.dual_chunk_attention(*arrays, return_lse=True, **options)
    dout = normal(*q.shape, dtype=dtype, seed=seed + 3)
    grads = cuattn.dual_chunk_attention_backward(executor.array(dout), *arrays, out, lse, **options)
    assert_dual_chunk_gradients_close([executor.numpy(x) for x in grads], dout, q, k, v, **options)


@pytest.mark.parametrize("dtype", (F16, F32, F64), ids=str)
def test_against_float64(executor, dtype):
    @examples(4)
    @given(
        seqlens=st.sampled_from(((70, 70), (1, 133), (40, 120), (50, 30), (20, 20))),
        chunking=st.sampled_from(((45, 8), (20, 3), (8, 7), (90, 70))),
        heads=st.sampled_from(((4, 2), (3, 1))),
        keys_rotated=st.booleans(),
        factor=st.sampled_from((1.0, 1.5, [0.7, 1.5])),
        seed=st.integers(0, 1000),
    )
    def drawn(seqlens, chunking, heads, keys_rotated, factor, seed):
        options = {"chunk_size": chunking[0], "local_size": chunking[1], "keys_rotated": keys_rotated}
        batch = 2 if isinstance(factor, list) else 1
        check(executor, dtype, *seqlens, batch=batch, heads=heads, seed=seed, logit_factor=factor, **options)

    drawn()


def test_softcap(executor):
    check(executor, F32, 60, 90, softcap=3.0, scale=0.3, **CHUNKS)


@pytest.mark.parametrize("on_device", (False, True))
def test_packed_sequences(executor, on_device):
    seqlens = [(30, 30), (0, 9), (5, 133), (40, 17), (1, 60)]
    cu_q, cu_k = (np.cumsum([0, *column]).astype(np.int32) for column in zip(*seqlens, strict=True))
    q, dout = (normal(cu_q[-1], 4, 64, dtype=F32, seed=seed) for seed in (1, 4))
    k, v = (normal(cu_k[-1], 2, 64, dtype=F32, seed=seed) for seed in (2, 3))
    options = {**CHUNKS, "logit_factor": [1.0, 2.0, 1.5, 1.0, 0.5]}
    packed = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    arrays = [executor.array(x) for x in (q, k, v)]
    out, lse = cuattn.dual_chunk_attention(*arrays, return_lse=True, **packed, **options)
    saved = (executor.array(dout), *arrays, out, lse)
    gradients = unseen if on_device else cuattn.dual_chunk_attention_backward
    grads = [executor.numpy(x) for x in gradients(*saved, **packed, **options)]
    factors = options.pop("logit_factor")
    for b in range(len(seqlens)):
        rows, columns = slice(*cu_q[b : b + 2]), slice(*cu_k[b : b + 2])
        own = [x[None, part] for x, part in zip(grads, (rows, columns, columns), strict=True)]
        of_sequence = dout[None, rows], q[None, rows], k[None, columns], v[None, columns]
        assert_dual_chunk_gradients_close(own, *of_sequence, logit_factor=factors[b], **options)


def unseen(*saved, **options):
    """The gradients as if only the device knew the lengths."""
    problem = backward_parts.check(*saved, **dual_chunk_arguments.DEFAULTS | options)
    problem.of_call.packed.host = None
    return backward_parts.gradients(problem)


def test_one_chunk_is_the_gradient_of_rope_and_causal_attention(executor):
    q, k, v, dout = (executor.array(normal(1, 40, 2, 64, dtype=F32, seed=seed)) for seed in range(4))
    places = np.arange(40)
    turned = cuattn.rope(q, places), cuattn.rope(k, places)
    out, lse = cuattn.attention(*turned, v, causal=True, return_lse=True)
    expected = cuattn.attention_backward(dout, *turned, v, out, lse, causal=True)
    grads = cuattn.dual_chunk_attention_backward(dout, q, k, v, out, lse, chunk_size=50, local_size=10)
    back = cuattn.rope(expected.dq, places, inverse=True), cuattn.rope(expected.dk, places, inverse=True)
    for got, want in zip(grads, (*back, expected.dv), strict=True):
        assert np.allclose(executor.numpy(got), executor.numpy(want), atol=1e-6)


@pytest.mark.parametrize("options", ({}, {"softcap": 1.5}, {"keys_rotated": True, "logit_factor": [1.0, 1.6]}), ids=str)
def test_the_reference_is_the_derivative(options):
    """Central differences of the reference itself, in a direction drawn for each array."""
    rng = np.random.default_rng(5)
    chunks = {"chunk_size": 7, "local_size": 2, **options}
    q, k, v = (rng.standard_normal((2, n, h, 6)) for n, h in ((11, 4), (19, 2), (19, 2)))
    out, _ = reference.dual_chunk_attention(q, k, v, **chunks)
    dout = rng.standard_normal(out.shape)
    grads = reference.dual_chunk_attention_backward(dout, q, k, v, **chunks)
    for i, gradient in enumerate(grads):
        direction, step = rng.standard_normal(gradient.shape), 1e-6
        moved = []
        for sign in (1, -1):
            arrays = [x + sign * step * direction if j == i else x for j, x in enumerate((q, k, v))]
            moved.append((reference.dual_chunk_attention(*arrays, **chunks)[0] * dout).sum())
        difference = (moved[0] - moved[1]) / (2 * step)
        assert abs(difference - (gradient * direction).sum()) <= 1e-7 * max(1, abs(difference))


def test_positions_of_queries_are_those_of_the_definition():
    """Distances up to W are what they are, and none is above C."""
    for chunk_size, local_size in ((8, 2), (45, 8), (20, 10), (9, 4)):
        length = chunk_size - local_size
        places = np.arange(5 * length)
        keys = reference.dual_chunk_positions(places, chunk_size, local_size)
        ahead = chunks_ahead(places.size, places.size, length)
        seen = np.select(
            [ahead == part for part in range(3)],
            [x[:, None] - keys[None] for x in query_positions(places, chunk_size, local_size)],
            0,
        )
        true = places[:, None] - places[None]
        near = (ahead >= 0) & (true <= local_size)
        assert np.array_equal(seen[near], true[near])
        assert seen.max() <= chunk_size
        assert to_numpy(seen[ahead >= 0]).min() >= 0
