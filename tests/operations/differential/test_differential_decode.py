"""cuattn.differential_decode: over contiguous caches and pages, against differential attention of each sequence."""

from __future__ import annotations

import numpy as np
import pytest
from differential_calls import F16, F64, make

import cuattn
from cuattn import reference
from cuattn.errors import ArgumentError, DTypeError, OverlapError, ShapeError
from cuattn.testing.differential_tolerance import assert_decoded_close

shared = pytest.mark.parametrize("shared", (False, True), ids=("v1", "v2"))
RNG = np.random.default_rng(11)
LENGTHS = (33, 0, 48, 1)
PAGE = 16


def cache(dtype, *, shared, seqlen_q=2, heads=4, kv_heads=2):
    """q [4, N, 2H, 32] and caches of 48 keys; what lies behind the lengths is NaN."""
    q, k, v = make((len(LENGTHS), seqlen_q, 48, heads, kv_heads, 32, 32), dtype, shared=shared)
    for b, length in enumerate(LENGTHS):
        k[b, length:], v[b, length:] = np.nan, np.nan
    return q, k, v


def in_pages(x):
    """(pages, block table) with the sequences' keys in shuffled pages, and pages that nobody has."""
    batch, capacity = x.shape[:2]
    order = np.random.default_rng(3).permutation(batch * capacity // PAGE + 2)[: batch * capacity // PAGE]
    pages = np.full((order.max() + 1, PAGE, *x.shape[2:]), np.nan, x.dtype)
    pages[order] = x.reshape(-1, PAGE, *x.shape[2:])
    return pages, order.reshape(batch, -1).astype(np.int32)


def assert_right(executor, q, k, v, lambda_, *, options=None, **keywords):
    options = options or {}
    out = cuattn.differential_decode(*map(executor.array, (q, k, v)), lambda_, list(LENGTHS), **options, **keywords)
    assert_decoded_close(executor.numpy(out), q, k, v, lambda_, LENGTHS, **options)
    (k_pages, table), (v_pages, _) = in_pages(k), in_pages(v)
    paged = cuattn.differential_decode(
        *map(executor.array, (q, k_pages, v_pages)), lambda_, list(LENGTHS), block_tables=table, **options, **keywords
    )
    assert_decoded_close(executor.numpy(paged), q, k, v, lambda_, LENGTHS, **options)


@shared
@pytest.mark.parametrize("dtype", (F16, F64), ids=str)
def test_caches(executor, dtype, shared):
    """Empty sequences, one key, several queries, any number of splits."""
    q, k, v = cache(dtype, shared=shared)
    lambda_ = RNG.random((4, 2, 4))
    for num_splits in (1, 3):
        assert_right(executor, q, k, v, lambda_, num_splits=num_splits)


@shared
@pytest.mark.parametrize("slopes", (4, 8))
def test_options(executor, shared, slopes):
    """Slopes for both streams or for each; a norm; the pairing of grouped heads."""
    q, k, v = cache(F16, shared=shared)
    options = {"softcap": 3.0, "alibi_slopes": RNG.random(slopes), "window": (20, None), "norm": True, "scale": 0.3}
    assert_right(
        executor, q, k, v, RNG.random(4), options=options | {"output_scale": 0.8, "norm_weight": RNG.random(32)}
    )


def test_one_token_at_a_time(executor):
    """A sequence decoded step by step is what one causal call makes of it."""
    q, k, v = make((1, 20, 20, 2, 1, 32, 32), F64)
    whole = reference.differential_attention(q, k, v, 0.6, causal=True).out
    arrays = [executor.array(x) for x in (k, v)]
    for step in range(0, 20, 6):
        out = cuattn.differential_decode(executor.array(q[:, step : step + 1]), *arrays, 0.6, [step + 1])
        np.testing.assert_allclose(executor.numpy(out)[:, 0], whole[:, step], rtol=0, atol=1e-12)


def test_out(executor):
    q, k, v = map(executor.array, cache(F16, shared=True))
    out = executor.guarded((4, 2, 4, 32), F16)
    assert cuattn.differential_decode(q, k, v, 0.5, list(LENGTHS), out=out.array) is out.array
    out.check()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    (
        ({"q": np.ones((4, 2, 7, 32), np.float16)}, ShapeError, "q has 7 heads; they come in pairs"),
        ({"k_cache": np.ones((4, 48, 3, 32), np.float16)}, ShapeError, "k_cache has 3 heads and v_cache has 2"),
        ({"k_cache": np.ones((4, 48, 4, 32), np.float32)}, DTypeError, "k_cache has dtype float32 and q"),
        ({"k_cache": np.ones((4, 47, 4, 32), np.float16)}, ShapeError, "v_cache"),
        ({"seqlens_k": [1, 2, 3, 49]}, ArgumentError, "seqlens_k"),
        ({"lambda_": [1.0]}, ShapeError, r"lambda_ has shape \[1\]"),
        ({"alibi_slopes": np.ones(3)}, ShapeError, r"alibi_slopes has shape \[3\]; allowed is \[8\]"),
        ({"num_splits": 0}, ArgumentError, "num_splits is 0"),
        ({"block_tables": [[0], [1], [2], [4]]}, ArgumentError, "block_tables"),
        ({"out": np.ones((4, 2, 8, 32), np.float16)}, ShapeError, "out has shape"),
    ),
)
def test_refused(change, error, message):
    q, k, v = cache(F16, shared=False)
    given = {"q": q, "k_cache": k, "v_cache": v, "lambda_": 0.5, "seqlens_k": list(LENGTHS)}
    with pytest.raises(error, match=message):
        cuattn.differential_decode(**(given | change))


def test_overlap():
    q, k, v = cache(F16, shared=True, seqlen_q=48, heads=2)
    with pytest.raises(OverlapError, match="out lies in the memory range of v_cache"):
        cuattn.differential_decode(q, k, v, 0.5, list(LENGTHS), out=v)
