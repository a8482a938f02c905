"""Ulysses inside and a ring outside; and head_parallel, where nothing moves."""

from __future__ import annotations

import numpy as np
import pytest
from distributed_calls import SLOPES, Results, on_ranks, tensors

from cuattn.distributed import head_parallel, head_parallel_backward, heads_of_rank, usp
from cuattn.errors import ArgumentError, MismatchError, PeerError, ShapeError
from cuattn.testing.gradient_tolerance import assert_gradients_close, assert_varlen_gradients_close
from cuattn.testing.tolerance import assert_attention_close, assert_varlen_close


def grid_of(group, of_ulysses):
    return usp(group.split(group.rank % of_ulysses), group.split(group.rank // of_ulysses))


def nested(executor, ranks, q, k, v, dout, dlse, *, partition="zigzag", cu_seqlens=None, **options):
    """What one device returns, from `ranks` (ring, ulysses) ranks."""
    axis = 0 if cu_seqlens is not None else 1
    where = {"partition": partition, "cu_seqlens": cu_seqlens}

    def places(grid, x):
        return grid.positions(None if cu_seqlens is not None else x.shape[axis], **where)

    def of_rank(group):
        grid = grid_of(group, ranks[1])
        parts = [executor.array(x.take(places(grid, x), axis=axis)) for x in (q, k, v)]
        rows = places(grid, q)
        out, lse = grid.attention(*parts, return_lse=True, **where, **options)
        of_queries = [executor.array(x) for x in (dout.take(rows, axis=axis), dlse.take(rows, axis=-1))]
        grads = grid.attention_backward(of_queries[0], *parts, out, lse, dlse=of_queries[1], **where, **options)
        found = [out, lse, grads.dq, grads.dk, grads.dv]
        return rows, places(grid, k), [executor.numpy(x) for x in found], grads.dsinks

    whole = Results(np.empty_like(dout), np.empty_like(dlse), np.empty_like(q), np.empty_like(k), np.empty_like(v))
    results = on_ranks(ranks[0] * ranks[1], of_rank)
    for rows, keys, found, _ in results:
        for target, x, where_to in zip(whole[:5], found, (rows, rows, rows, keys, keys), strict=True):
            index = (slice(None),) * (target.ndim - 1 if target is whole.lse else axis)
            target[(*index, where_to)] = x
    dsinks = results[0][3]
    return whole._replace(dsinks=None if dsinks is None else executor.numpy(dsinks))


@pytest.mark.parametrize(("ranks", "heads"), [((2, 2), (4, 2)), ((2, 3), (4, 2)), ((1, 2), (3, 1)), ((3, 1), (3, 1))])
def test_against_the_reference(executor, ranks, heads):
    q, k, v, dout, dlse = tensors(heads=heads[0], kv_heads=heads[1], seqlen_q=41)
    options = {"alibi_slopes": SLOPES[: heads[0]], "sinks": SLOPES[: heads[0]], "window": (20, None)}
    options |= {"dropout_p": 0.2, "dropout_seed": 9}
    got = nested(executor, ranks, q, k, v, dout, dlse, **options)
    assert_attention_close(got.out, q, k, v, lse=got.lse, causal=True, **options)
    assert_gradients_close(got, dout, q, k, v, got.out, got.lse, dlse=dlse, causal=True, **options)


def test_packed_sequences(executor):
    q, k, v, dout, dlse = tensors(batch=None)
    cu = [0, 7, 7, 49, 50]
    got = nested(executor, (2, 2), q, k, v, dout, dlse, cu_seqlens=cu, partition="striped")
    assert_varlen_close(got.out, q, k, v, cu, cu, lse=got.lse, causal=True)
    assert_varlen_gradients_close(got, dout, q, k, v, got.out, got.lse, cu, cu, dlse=dlse, causal=True)


def test_what_one_rank_is_refused_all_are():
    q, k, v, *_ = tensors(seqlen_q=16)

    def of_rank(group):
        grid = grid_of(group, 2)
        parts = [x[:, grid.positions(16)] for x in (q, k, v)]
        bad = [parts[0][..., :31] if group.rank == 1 else parts[0], *parts[1:]]
        with pytest.raises(ShapeError if group.rank == 1 else PeerError, match="head dim"):
            grid.attention(*bad)
        with pytest.raises((MismatchError, PeerError), match="softcap"):
            grid.attention(*parts, softcap=1.0 if group.rank == 2 else None)
        with pytest.raises((ShapeError, PeerError), match=r"tokens|refused"):
            grid.attention(*(x[:, : len(x[0]) - group.rank // 3] for x in parts))
        with pytest.raises(ArgumentError, match="chunk"):
            grid.attention(*parts, chunk=4)
        return grid.attention(*parts).shape[1], group.traffic.bytes

    assert on_ranks(4, of_rank) == [(4, 0)] * 4


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 2), (9, 3, 2), (3, 1, 4)])
@pytest.mark.parametrize("own", [False, True])
def test_head_parallel(executor, heads, kv_heads, size, own):
    """All heads given, or those of the rank alone: the same, and no bytes move."""
    q, k, v, dout, dlse = tensors(heads=heads, kv_heads=kv_heads, seqlen_q=33)
    slopes = np.linspace(0.1, 0.5, heads).astype(np.float32)
    options = {"alibi_slopes": slopes, "sinks": slopes, "dropout_p": 0.2}
    counts = {"num_heads": heads, "num_kv_heads": kv_heads} if own else {}

    def of_rank(group):
        queries, keys = heads_of_rank(heads, kv_heads, group)
        given = [q[:, :, queries], k[:, :, keys], v[:, :, keys]] if own else [q, k, v]
        given = [executor.array(x) for x in given]
        out, lse = head_parallel(*given, group, return_lse=True, **counts, **options)
        rows = executor.array(dout[:, :, queries]), executor.array(dlse[:, queries])
        grads = head_parallel_backward(rows[0], *given, out, lse, group, dlse=rows[1], **counts, **options)
        assert group.traffic.bytes == 0
        return queries, keys, [executor.numpy(x) for x in (out, lse, *grads[:3], grads.dsinks)]

    whole = Results(np.empty_like(dout), np.empty_like(dlse), np.empty_like(q), np.zeros_like(k), np.zeros_like(v),
                    np.zeros(heads, np.float32))  # fmt: skip
    for queries, keys, (out, lse, dq, dk, dv, dsinks) in on_ranks(size, of_rank):
        whole.out[:, :, queries], whole.lse[:, queries], whole.dq[:, :, queries] = out, lse, dq
        whole.dk[:, :, keys] += dk
        whole.dv[:, :, keys] += dv
        whole.dsinks[:] += dsinks
    assert_attention_close(whole.out, q, k, v, lse=whole.lse, causal=True, **options)
    assert_gradients_close(whole, dout, q, k, v, whole.out, whole.lse, dlse=dlse, causal=True, **options)


def test_head_parallel_of_packed_sequences(executor):
    q, k, v, *_ = tensors(batch=None)
    cu = [0, 20, 20, 50]

    def of_rank(group):
        return executor.numpy(head_parallel(*(executor.array(x) for x in (q, k, v)), group, cu_seqlens=cu))

    assert_varlen_close(np.concatenate(on_ranks(2, of_rank), axis=1), q, k, v, cu, cu, causal=True)


def test_heads_that_are_not_the_ranks():
    q, k, v, *_ = tensors(seqlen_q=4)

    def of_rank(group):
        with pytest.raises((ShapeError, PeerError), match="heads"):
            head_parallel(q, k, v, group, num_heads=4, num_kv_heads=2)
        with pytest.raises((ArgumentError, PeerError), match="together"):
            head_parallel(q, k, v, group, num_heads=4)
        with pytest.raises(ArgumentError, match="multiple"):
            heads_of_rank(4, 3, group)
        return True

    assert on_ranks(2, of_rank) == [True, True]
