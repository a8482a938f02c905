"""cascade_attention: what paged_attention gives over the prefixes and the own keys together, with fewer bytes read."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cuattn
from cuattn import errors, host
from cuattn.runtime.executor import HostExecutor
from cuattn.testing.strategies import examples

F16, F32 = np.dtype(np.float16), np.dtype(np.float32)
PAGE_SIZE, HEADS, KV_HEADS, HEAD_DIM = 8, 4, 2, 32


def make(batch, seqlen_q, dtype, num_pages=64, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((batch, seqlen_q, HEADS, HEAD_DIM)).astype(dtype)
    k, v = (rng.standard_normal((num_pages, PAGE_SIZE, KV_HEADS, HEAD_DIM)).astype(dtype) for _ in "kv")
    return q, k, v, rng.permutation(num_pages).astype(np.int32)


def concatenated(levels, tables, lengths):
    """The table of each sequence over whole pages of every prefix, then its own."""
    rows, seqlens_k = [], []
    for b, length in enumerate(lengths):
        row, total = [], length
        for prefix in levels:
            starts = [0, len(lengths)] if prefix.group_starts is None else prefix.group_starts
            group = int(np.searchsorted(starts, b, side="right")) - 1
            seqlen = prefix.seqlen if np.ndim(prefix.seqlen) == 0 else prefix.seqlen[group]
            row += list(np.atleast_2d(prefix.block_table)[group][: seqlen // PAGE_SIZE])
            total += seqlen
        rows.append(row + list(tables[b]))
        seqlens_k.append(total)
    width = max(map(len, rows))
    return np.array([row + [-1] * (width - len(row)) for row in rows], np.int32), seqlens_k


def assert_equal(executor, arrays, levels, tables, lengths, **options):
    """To the one call: each part is rounded to the dtype once more, and so is their sum."""
    q, k, v = map(executor.array, arrays)
    out, lse = cuattn.cascade_attention(q, k, v, levels, tables, lengths, return_lse=True, **options)
    levels = [levels] if isinstance(levels, cuattn.SharedPrefix) else levels
    whole_tables, seqlens_k = concatenated(levels, tables, lengths)
    whole, whole_lse = cuattn.paged_attention(q, k, v, whole_tables, seqlens_k, return_lse=True, **options)
    assert out.dtype == whole.dtype and lse.shape == whole_lse.shape
    unit = 2.0**-10 if arrays[0].dtype == F16 else 2.0**-20
    most = float(np.abs(arrays[2][np.isfinite(arrays[2])].astype(np.float64)).max())
    np.testing.assert_allclose(executor.numpy(out), executor.numpy(whole), rtol=0, atol=2 * unit * most)
    np.testing.assert_allclose(executor.numpy(lse), executor.numpy(whole_lse), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
def test_equals_paged_attention_over_all_keys(executor, dtype):
    @examples(10)
    @given(data=st.data())
    def check(data):
        batch, seqlen_q = data.draw(st.sampled_from(((1, 1), (3, 1), (5, 3))))
        *arrays, pages = make(batch, seqlen_q, dtype, seed=data.draw(st.integers(0, 1000)))
        num_prefix = data.draw(st.integers(0, 20))
        shared = cuattn.SharedPrefix(pages[:num_prefix], num_prefix * PAGE_SIZE)
        tables = pages[20 : 20 + 4 * batch].reshape(batch, 4)
        lengths = [data.draw(st.integers(seqlen_q, 4 * PAGE_SIZE)) for _ in range(batch)]
        options = data.draw(
            st.sampled_from(({}, {"sinks": np.array([1, 0, -1, 3], F32)}, {"softcap": 2.0}, {"causal": False}))
        )
        assert_equal(executor, arrays, shared, tables, lengths, **options)

    check()


def test_levels_of_groups(executor):
    """A prompt that all have, and one that two and three of them have; one group without keys, one sequence alone."""
    *arrays, pages = make(6, 1, F32)
    levels = [
        cuattn.SharedPrefix(pages[:5], 5 * PAGE_SIZE),
        cuattn.SharedPrefix(pages[5:14].reshape(3, 3), [3 * PAGE_SIZE, 0, PAGE_SIZE], [0, 2, 5, 6]),
    ]
    tables = pages[14:32].reshape(6, 3)
    assert_equal(executor, arrays, levels, tables, [1, 24, 5, 9, 2, 7], sinks=np.array([1, 0, -1, 3], F32))
    assert_equal(executor, arrays, [], tables, [1, 24, 5, 9, 2, 7])


def test_into_an_array_of_the_caller(executor):
    *arrays, pages = make(3, 1, F16)
    q, k, v = map(executor.array, arrays)
    shared, tables = cuattn.SharedPrefix(pages[:4], 30), pages[4:7].reshape(3, 1)
    out = executor.guarded(q.shape, F16)
    assert cuattn.cascade_attention(q, k, v, shared, tables, [3, 1, 8], out=out.array) is out.array
    out.check()
    again = cuattn.cascade_attention(q, k, v, shared, tables, [3, 1, 8])
    np.testing.assert_array_equal(executor.numpy(out.array), executor.numpy(again))


def test_what_no_sequence_uses_is_not_felt(executor):
    (q, k, v), pages = make(2, 1, F32)[:3], np.arange(64, dtype=np.int32)
    poisoned = [np.full_like(x, np.nan) for x in (k, v)]
    for page, slots in ((0, 8), (1, 5), (2, 8), (3, 2)):
        for x, y in zip(poisoned, (k, v), strict=True):
            x[page, :slots] = y[page, :slots]
    shared, tables = cuattn.SharedPrefix([0, 1, -7], 13), np.array([[2, -1], [3, 99]], np.int32)
    clean, felt = (
        cuattn.cascade_attention(*map(executor.array, (q, *kv)), shared, tables, [8, 2]) for kv in ((k, v), poisoned)
    )
    np.testing.assert_array_equal(executor.numpy(felt), executor.numpy(clean))
    assert pages.size == 64


def test_bytes_read(monkeypatch):
    """K/V of the prefix once for all eight sequences: counted, as the difference that a longer prefix makes."""
    monkeypatch.setattr(HostExecutor, "machine", ("sm_90", 1))  # on which nothing is worth a split
    batch, group = 8, HEADS // KV_HEADS
    *arrays, pages = make(batch, 1, F16, num_pages=64)
    tables = pages[48:56].reshape(batch, 1)

    def read(function):
        counts = []
        for num_prefix in (8, 40):
            with host.profile() as profile:
                function(num_prefix)
            counts.append(profile.bytes["global"]["read"])
        return counts[1] - counts[0]

    def cascade(num_prefix):
        shared = cuattn.SharedPrefix(pages[:num_prefix], num_prefix * PAGE_SIZE)
        cuattn.cascade_attention(*arrays, shared, tables, [8] * batch)

    def alone(num_prefix):
        whole = np.concatenate([np.tile(pages[:num_prefix], (batch, 1)), tables], axis=1)
        cuattn.paged_attention(*arrays, whole, [num_prefix * PAGE_SIZE + 8] * batch, num_splits=1)

    kv_bytes = 32 * PAGE_SIZE * KV_HEADS * 2 * HEAD_DIM * F16.itemsize
    assert batch * group <= 16  # rows of one tile
    shared, repeated = read(cascade), read(alone)
    assert kv_bytes <= shared < 1.2 * kv_bytes  # block tables on top
    assert batch * kv_bytes <= repeated < 1.2 * batch * kv_bytes


def test_refused():
    *arrays, pages = make(2, 2, F32)
    tables = pages[:2].reshape(2, 1)
    shared = cuattn.SharedPrefix(pages[2:4], 16)

    def call(prefixes=shared, lengths=(2, 3), **options):
        cuattn.cascade_attention(*arrays, prefixes, tables, list(lengths), **options)

    with pytest.raises(errors.ArgumentError, match=r"seqlens_k\[1\] is 1; at least the 2 keys"):
        call(lengths=(2, 1))
    call(lengths=(2, 1), causal=False)
    with pytest.raises(errors.ArgumentError, match="causal is 'top_left'"):
        call(causal="top_left")
    with pytest.raises(errors.ArgumentError, match="prefixes holds 3"):
        call(prefixes=[3])
    with pytest.raises(errors.ArgumentError, match="group_starts ends at 1"):
        call(prefixes=shared._replace(group_starts=[0, 1]))
    with pytest.raises(errors.ShapeError, match="with 2 groups"):
        call(prefixes=shared._replace(group_starts=[0, 1, 2]))
    with pytest.raises(errors.DTypeError, match="group_starts has dtype float64"):
        call(prefixes=shared._replace(group_starts=[0.0, 2.0]))
    with pytest.raises(errors.ArgumentError, match=r"seqlens_k\[0\] is 17.*seqlens_k is seqlen"):
        call(prefixes=shared._replace(seqlen=17))
    with pytest.raises(errors.ArgumentError, match="block_tables"):
        call(prefixes=cuattn.SharedPrefix([64, 1], 16))
