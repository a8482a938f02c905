"""dual_chunk_decode over pages of turned keys: what dual_chunk_attention gives for the newest tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cuattn
from cuattn.errors import ArgumentError
from cuattn.testing.dual_chunk_tolerance import assert_dual_chunk_close
from cuattn.testing.rounding import to_numpy
from cuattn.testing.strategies import examples

F16, F32 = np.dtype(np.float16), np.dtype(np.float32)
SEQLENS = (1, 36, 37, 38, 74, 75, 112, 150, 0)


def normal(*shape, dtype=F16, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def cache_of(executor, seqlens, page_size, dtype, chunks, rope, rng):
    """Pages in any order, unused ones NaN, filled by append_kv; and the keys and values as they were, [B, M, G, D]."""
    most = max(max(seqlens), 1)
    keys, values = (rng.standard_normal((len(seqlens), most, 2, 64)).astype(dtype) for _ in range(2))
    max_pages = -(-most // page_size)
    order = rng.permutation(len(seqlens) * max_pages + 3)
    tables = order[: len(seqlens) * max_pages].reshape(len(seqlens), max_pages).astype(np.int32)
    pages = [executor.array(np.full((order.size, page_size, 2, 64), np.nan, dtype)) for _ in range(2)]
    for b, length in enumerate(seqlens):
        places = np.arange(length)
        slots = tables[b, places // page_size].astype(np.int64) * page_size + places % page_size
        new = (executor.array(x[b, :length]) for x in (keys, values))
        positions = cuattn.dual_chunk_positions(places, **chunks)
        cuattn.append_kv(*new, *pages, slots, positions=positions, rope=rope)
    return pages, tables, keys, values


def check(executor, seqlens, num_tokens, page_size, dtype, chunks, seed, **options):
    rng, rope = np.random.default_rng(seed), options.pop("rope", cuattn.Rotary())
    pages, tables, keys, values = cache_of(executor, seqlens, page_size, dtype, chunks, rope, rng)
    q = rng.standard_normal((len(seqlens), num_tokens, 4, 64)).astype(dtype)
    out = executor.guarded(q.shape, dtype)
    result, lse = cuattn.dual_chunk_decode(
        executor.array(q), *pages, tables, seqlens, rope=rope, out=out.array, return_lse=True, **chunks, **options
    )
    assert result is out.array
    out.check()
    result, lse = executor.numpy(result), executor.numpy(lse)
    factors = np.broadcast_to(options.pop("logit_factor", 1.0), len(seqlens))
    options.pop("num_splits", None)
    for b, length in enumerate(seqlens):
        of_sequence = q[b : b + 1], keys[b : b + 1, :length], values[b : b + 1, :length]
        own = {"lse": lse[b : b + 1], "logit_factor": factors[b], "rope": rope, **chunks, **options}
        assert_dual_chunk_close(result[b : b + 1], *of_sequence, **own)


@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
def test_against_float64(executor, dtype):
    @examples(8)
    @given(
        seqlens=st.lists(st.sampled_from(SEQLENS), min_size=1, max_size=3),
        num_tokens=st.sampled_from((1, 1, 3)),
        page_size=st.sampled_from((1, 5, 16, 64)),
        seed=st.integers(0, 2**32 - 1),
        factor=st.sampled_from((1.0, 1.4)),
    )
    def drawn(seqlens, num_tokens, page_size, seed, factor):
        chunks = {"chunk_size": 45, "local_size": 8}
        check(executor, seqlens, num_tokens, page_size, dtype, chunks, seed, logit_factor=factor)

    drawn()


def test_a_factor_a_sequence(executor):
    chunks = {"chunk_size": 45, "local_size": 8}
    check(executor, [112, 40], 2, 16, F16, chunks, 1, logit_factor=[1.0, 1.5], softcap=4.0, scale=0.2)


@pytest.mark.parametrize("num_splits", (1, 5))
def test_any_number_of_splits(executor, num_splits):
    check(executor, [150, 38], 1, 16, F32, {"chunk_size": 20, "local_size": 3}, 2, num_splits=num_splits)


def test_contiguous_cache(executor):
    chunks, seqlens = {"chunk_size": 45, "local_size": 8}, [133, 20]
    q, k, v = (normal(2, n, heads, 64, dtype=F32, seed=heads + n) for n, heads in ((1, 4), (140, 2), (140, 2)))
    turned = cuattn.rope(k, cuattn.dual_chunk_positions(np.arange(140), **chunks))
    arrays = (executor.array(x) for x in (q, turned, v))
    out = executor.numpy(cuattn.dual_chunk_decode(*arrays, None, seqlens, **chunks))
    for b, length in enumerate(seqlens):
        assert_dual_chunk_close(out[b : b + 1], q[b : b + 1], k[b : b + 1, :length], v[b : b + 1, :length], **chunks)


def test_lengths_on_a_device(executor, monkeypatch):
    """They are not looked at: all three parts are launched, and those without keys change nothing."""
    from cuattn.ops.dual_chunk import decode_parts

    chunks, rng = {"chunk_size": 45, "local_size": 8}, np.random.default_rng(3)
    seqlens = [20, 112]
    pages, tables, _, _ = cache_of(executor, seqlens, 16, F32, chunks, cuattn.Rotary(), rng)
    q = executor.array(normal(2, 2, 4, 64, dtype=F32))
    expected = executor.numpy(cuattn.dual_chunk_decode(q, *pages, tables, seqlens, **chunks))
    problem = decode_parts.check(
        q, *pages, tables, seqlens, rope=cuattn.Rotary(), scale=None, logit_factor=1.0, out=None, **chunks
    )
    problem.whole.host_seqlens_k = None
    got = executor.numpy(decode_parts.decode_parts(problem, return_lse=False))
    assert np.allclose(got, expected, atol=1e-6)


def test_tables_have_to_hold_where_queries_stand(executor):
    chunks = {"chunk_size": 45, "local_size": 8}
    q, pages = executor.array(normal(1, 1, 2, 32)), executor.array(normal(8, 16, 2, 32))
    cos, sin = (executor.array(to_numpy(x)) for x in cuattn.rope_frequencies(32, 45))
    tables = [list(range(8))]
    cuattn.dual_chunk_decode(q, pages, pages, tables, [10], rope=cuattn.Rotary(cos=cos, sin=sin), **chunks)
    with pytest.raises(ArgumentError, match="position 45; cos and sin hold the positions 0 to 44"):
        cuattn.dual_chunk_decode(q, pages, pages, tables, [100], rope=cuattn.Rotary(cos=cos, sin=sin), **chunks)
