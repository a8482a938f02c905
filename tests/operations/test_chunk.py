"""Chunked local attention, in every operation that takes it: of the keys cut into chunks, a query sees one."""

from __future__ import annotations

import numpy as np
import pytest
from attention_calls import assert_right, assert_varlen_right, call
from backward_calls import after_forward
from backward_calls import assert_right as assert_gradients
from hypothesis import given
from hypothesis import strategies as st

import cuattn
from cuattn import errors, host, reference
from cuattn.ops.attention.bounds import Bounds
from cuattn.ops.attention.params import UNBOUNDED
from cuattn.testing import assert_decode_close, assert_paged_close, assert_paged_varlen_close
from cuattn.testing.strategies import DTYPES, examples

F16, BF16, F32, F64 = DTYPES
SIDES = st.one_of(st.just(UNBOUNDED), st.integers(0, 20))


def make(n, m, *, dtype=F16, batch=1, head_dim=40, head_dim_v=24, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (batch, n, 4, head_dim), (batch, m, 2, head_dim), (batch, m, 2, head_dim_v)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "m", "options"),
    [
        (37, 70, {"chunk": 16, "causal": True}),
        (70, 37, {"chunk": 5}),  # the first queries come before key 0, and see nothing
        (70, 150, {"chunk": 50, "window": (9, 3), "causal": "top_left"}),
        (20, 40, {"chunk": 7, "diagonal_offset": -7, "softcap": 5.0}),
    ],
    ids=["causal", "more queries", "window", "offset"],
)
def test_forward(executor, dtype, n, m, options):
    assert_right(executor, *make(n, m, dtype=dtype), **options)


@pytest.mark.parametrize("dtype", [F16, F32], ids=str)
@pytest.mark.parametrize("deterministic", [True, False], ids=["", "order-free"])
def test_gradients(executor, dtype, deterministic):
    bias = np.random.default_rng(3).standard_normal((1, 4, 33, 70)).astype(np.float32)
    saved = after_forward(executor, *make(33, 70, dtype=dtype), chunk=24, causal=True, bias=bias, dlse=True)
    assert_gradients(executor, saved, deterministic=deterministic, return_dbias=True)


def test_packed_sequences(executor):
    """Chunks begin with each sequence, whose queries are its last tokens."""
    q, k, v = (x[0] for x in make(45, 60))
    starts = np.array([0, 5, 5, 45], np.int32), np.array([0, 30, 33, 60], np.int32)
    assert_varlen_right(executor, q, k, v, *starts, chunk=8, causal=True)
    saved = after_forward(executor, q, k, v, *starts, chunk=8, causal=True)
    assert_gradients(executor, saved)


@pytest.mark.parametrize("n", [40, 200])
def test_where_kernels_are_those_of_hopper(executor, monkeypatch, n):
    """The Hopper kernel has a form for chunks."""
    monkeypatch.setenv("CUATTN_HOST_ARCH", "sm_90a")
    q, k, v = make(n, 300, dtype=BF16, head_dim=64, head_dim_v=64)
    path = cuattn.forward_path(*map(executor.array, (q, k, v)), chunk=64, causal=True)
    assert path.kernel == "attention_forward_hopper" and path.options.chunk and "chunk" in str(path)
    assert_right(executor, q, k, v, chunk=64, causal=True)
    assert_right(executor, q, k, v, chunk=100, window=(70, 5), softcap=10.0)


@pytest.mark.parametrize("dtype", [F16, F32], ids=str)
@pytest.mark.parametrize("chunk", [1, 16, 50, 1000])
@pytest.mark.parametrize("num_splits", [None, 3])
def test_decode_is_the_window_of_its_chunk(executor, dtype, chunk, num_splits):
    """A single query at the end of the cache sees the keys of its chunk alone: to the bit those of such a window."""
    q, k, v = (executor.array(x) for x in make(1, 100, dtype=dtype, batch=3, head_dim=64, head_dim_v=64))
    lengths = np.array([100, 37, 1], np.int32)
    out, lse = cuattn.decode_attention(q, k, v, lengths, chunk=chunk, num_splits=num_splits, return_lse=True)
    for b, length in enumerate(lengths):
        window = int(length - 1) % chunk, 0
        one = slice(b, b + 1)
        alone = cuattn.decode_attention(
            q[one], k[one], v[one], lengths[one], window=window, num_splits=num_splits, return_lse=True
        )
        if num_splits is not None:  # else the numbers of splits may differ
            assert executor.numpy(out[one]).tobytes() == executor.numpy(alone[0]).tobytes()
            assert executor.numpy(lse[one]).tobytes() == executor.numpy(alone[1]).tobytes()
    inputs = [executor.numpy(x) for x in (q, k, v)]
    assert_decode_close(executor.numpy(out), *inputs, lengths, lse=executor.numpy(lse), chunk=chunk)


def test_pages(executor):
    q, k, v = make(3, 112, batch=2, head_dim=64, head_dim_v=64)
    pages = [x.reshape(14, 16, 2, 64) for x in (k, v)]
    tables, lengths = np.arange(14, dtype=np.int32).reshape(2, 7), np.array([112, 41], np.int32)
    out = cuattn.paged_attention(executor.array(q), *map(executor.array, pages), tables, lengths, chunk=40)
    assert_paged_close(executor.numpy(out), q, *pages, tables, lengths, chunk=40)
    starts = np.array([0, 3, 6], np.int32)
    packed = cuattn.paged_attention_varlen(
        executor.array(q.reshape(6, 4, 64)), *map(executor.array, pages), tables, starts, lengths, chunk=40
    )
    assert_paged_varlen_close(executor.numpy(packed), q.reshape(6, 4, 64), *pages, tables, starts, lengths, chunk=40)


def test_a_chunk_that_holds_everything_is_none(executor):
    arrays = make(30, 70)
    plain = call(executor, *arrays, window=(70, 70))  # the kernel has both bounds
    for chunk in (70, 2**31 - 1):
        assert all(x.tobytes() == y.tobytes() for x, y in zip(plain, call(executor, *arrays, chunk=chunk), strict=True))


@pytest.mark.parametrize("offset", [2**31 - 1, -(2**31) + 1])
def test_diagonals_far_away(executor, offset):
    """Nothing is seen, and no sum of positions wraps around."""
    out, lse = call(executor, *make(9, 40), chunk=16, diagonal_offset=offset)
    assert not out.any() and (lse == -np.inf).all()


def test_what_no_query_sees_is_not_loaded():
    """Neither forward nor backward looks at a tile of another chunk; the work is that of the chunks."""
    q, k, v = make(64, 512, head_dim=64, head_dim_v=64)
    k[:, :448], v[:, :448] = np.nan, np.nan  # 448 to 511 is the chunk of the last 64 tokens
    with host.profile() as chunked:
        out, lse = cuattn.attention(q, k, v, chunk=64, return_lse=True)
    assert np.isfinite(out.astype(np.float32)).all() and np.isfinite(lse).all()
    grads = cuattn.attention_backward(out, q, k, v, out, lse, chunk=64)
    assert np.isfinite(grads.dq.astype(np.float32)).all()
    assert np.isfinite(grads.dk[:, 448:].astype(np.float32)).all() and not grads.dk[:, :448].any()
    with host.profile() as alone:
        cuattn.attention(q, k[:, 448:], v[:, 448:], chunk=64)
    assert chunked.instructions["mma"] == alone.instructions["mma"]


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "4", 2**31, [4]])
def test_what_is_no_chunk(value):
    q, k, v = make(3, 5)
    with pytest.raises(errors.ArgumentError, match="chunk is "):
        cuattn.attention(q, k, v, chunk=value)
    with pytest.raises(errors.ArgumentError, match="chunk is "):
        cuattn.decode_attention(q, k, v, [5], chunk=value)


@given(
    bounds=st.builds(Bounds, SIDES, SIDES, st.booleans(), st.integers(-20, 20), st.sampled_from([0, 1, 3, 8, 50])),
    seqlens=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    data=st.data(),
)
@examples(100)
def test_what_hosts_plan_with(bounds, seqlens, data):
    """The stretch of keys of some queries, and of queries of some keys, hold exactly what is seen at their ends."""
    n, m = seqlens
    o = int(bounds.diagonal(np.array(n), np.array(m)))
    window = tuple(None if side == UNBOUNDED else side for side in (bounds.left, bounds.right))
    seen = reference.visible(
        n, m, window=window, diagonal_offset=o, **({"chunk": bounds.chunk} if bounds.chunk else {})
    )[0, 0]
    for of_keys, matrix in ((False, seen), (True, seen.T)):
        first = data.draw(st.integers(0, len(matrix) - 1))
        last = data.draw(st.integers(first, len(matrix) - 1))
        stretch = bounds.queries if of_keys else bounds.keys
        begin, end = stretch(np.array(first), np.array(last), np.array(o), np.array(matrix.shape[1]))
        columns = np.flatnonzero(matrix[first : last + 1].any(axis=0))
        if columns.size:
            assert begin <= columns[0] and columns[-1] < end
        one, behind = stretch(np.array(first), np.array(first), np.array(o), np.array(matrix.shape[1]))
        assert max(0, behind - one) == matrix[first].sum()
        width = bounds.width(last - first + 1)
        assert width is None or of_keys or max(0, end - begin) <= width
