"""``out`` of float32 for a q of 16 bits: the result as it was accumulated, of one split or of many."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from unrounded import LAYOUTS, assert_rounds_to, into_float32

import cuattn
from cuattn.errors import DTypeError

F16, BF16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
SEQLENS = [150, 77]


def problem(executor, dtype, cache_dtype=None, seqlen_q=2, head_dim_v=32):
    rng = np.random.default_rng(5)
    q = rng.standard_normal((2, seqlen_q, 4, 32)).astype(dtype)
    k, v = (4 * rng.standard_normal((2, 150, 2, dim)) for dim in (32, head_dim_v))
    return [executor.array(x) for x in (q, k.astype(cache_dtype or dtype), v.astype(cache_dtype or dtype))]


def assert_unrounded(executor, call, shape, layout=None):
    assert_rounds_to(into_float32(executor, call, shape, layout), executor.numpy(call(None)))


@pytest.mark.smoke
@pytest.mark.parametrize("num_splits", (1, 3))
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_contiguous_caches(executor, layout, num_splits):
    q, k, v = problem(executor, F16)
    options = {"num_splits": num_splits, "sinks": np.float32([0, 1, 2, 3])}
    call = lambda out: cuattn.decode_attention(q, k, v, SEQLENS, out=out, **options)  # noqa: E731
    assert_unrounded(executor, call, (2, 2, 4, 32), layout)


def test_pages_and_prompts(executor):
    q, k, v = problem(executor, F16)
    pages = [x.reshape(20, 15, *x.shape[2:]) for x in (k, v)]
    tables = np.arange(20).reshape(2, 10)
    call = lambda out: cuattn.paged_attention(q, *pages, tables, SEQLENS, out=out)  # noqa: E731
    assert_unrounded(executor, call, (2, 2, 4, 32))
    packed = q.reshape(4, 4, 32)
    call = lambda out: cuattn.paged_attention_varlen(packed, *pages, tables, [0, 3, 4], SEQLENS, out=out)  # noqa: E731
    assert_unrounded(executor, call, (4, 4, 32))


@pytest.mark.parametrize("num_splits", (1, 2))
def test_one_row_over_narrow_numbers(executor, num_splits):
    """Which CUDA cores multiply: that kernel reads queries of one type and writes another."""
    q, k, v = problem(executor, BF16, np.int8, seqlen_q=1, head_dim_v=17)
    options = {"num_splits": num_splits, "kv_format": "int8", "k_scale": np.float32(0.1), "v_scale": np.float32(0.2)}
    call = lambda out: cuattn.decode_attention(q[:, :, :2], k, v, SEQLENS, out=out, **options)  # noqa: E731
    assert_unrounded(executor, call, (2, 1, 2, 17))


def test_which_dtypes_are_refused(executor):
    q, k, v = problem(executor, F16)
    with pytest.raises(DTypeError, match="out has dtype float64; the result has dtype float16, or float32 where"):
        cuattn.decode_attention(q, k, v, SEQLENS, out=executor.xp.empty((2, 2, 4, 32), np.float64))
    pages = [x.reshape(20, 15, *x.shape[2:]) for x in (k, v)]
    out = executor.xp.empty((2, 2, 4, 32), np.float32)
    with pytest.raises(DTypeError, match=r"out has dtype float32; the result has dtype float16$"):
        cuattn.cascade_attention(q, *pages, [], np.arange(20).reshape(2, 10), SEQLENS, out=out)
