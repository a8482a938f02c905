"""Ulysses: heads divided instead of tokens, for any numbers of heads and ranks."""

from __future__ import annotations

import numpy as np
import pytest
from distributed_calls import SLOPES, on_ranks, ring, tensors
from hypothesis import given
from hypothesis import strategies as st

from cuattn.distributed import shard, ulysses_attention
from cuattn.distributed.heads import runs, split_heads
from cuattn.errors import MismatchError
from cuattn.testing.gradient_tolerance import assert_gradients_close, assert_varlen_gradients_close
from cuattn.testing.strategies import examples
from cuattn.testing.tolerance import assert_attention_close, assert_varlen_close


@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 9))
@examples(100)
def test_heads_of_ranks(kv_heads, shared, size):
    heads = kv_heads * shared
    ranks = split_heads(heads, kv_heads, size)
    assert [h for of in ranks for h in range(of.first, of.end)] == list(range(heads))
    for rank, of in enumerate(ranks):
        assert (of.first, of.end) == (rank * heads // size, (rank + 1) * heads // size)
        assert set(range(of.kv_first, of.kv_end)) == {h // shared for h in range(of.first, of.end)}
        read = {}
        for run in runs(of, shared):
            each = (run.end - run.first) // (run.kv_end - run.kv_first)
            for h in range(run.first, run.end):
                read[of.first + h] = of.kv_first + run.kv_first + (h - run.first) // each
        assert read == {h: h // shared for h in range(of.first, of.end)}
        assert len(runs(of, shared)) <= 3


#: Heads, key/value heads and ranks: whole groups, parts of groups, ranks without heads.
HEADS = [(4, 2, 2), (4, 2, 3), (3, 1, 2), (3, 1, 4), (9, 3, 2)]


@pytest.mark.parametrize(("heads", "kv_heads", "size"), HEADS)
def test_against_the_reference(executor, heads, kv_heads, size):
    q, k, v, dout, dlse = tensors(heads=heads, kv_heads=kv_heads, seqlen_q=33)
    slopes = np.linspace(0.1, 0.5, heads).astype(np.float32)
    options = {"alibi_slopes": slopes, "sinks": slopes - 0.2, "window": (20, None)}
    options |= {"dropout_p": 0.3, "dropout_seed": 5}
    got = ring(executor, size, q, k, v, dout, dlse, method="ulysses", **options)
    options["causal"] = True
    assert_attention_close(got.out, q, k, v, lse=got.lse, **options)
    assert_gradients_close(got, dout, q, k, v, got.out, got.lse, dlse=dlse, **options)


@pytest.mark.parametrize("kind", ["contiguous", "striped"])
def test_packed_sequences(executor, kind):
    q, k, v, dout, dlse = tensors(batch=None)
    cu, options = [0, 7, 7, 49, 50], {"alibi_slopes": np.stack([SLOPES, 2 * SLOPES, SLOPES, 3 * SLOPES])}
    got = ring(executor, 3, q, k, v, dout, dlse, partition=kind, cu_seqlens=cu, method="ulysses", **options)
    options["causal"] = True
    assert_varlen_close(got.out, q, k, v, cu, cu, lse=got.lse, **options)
    assert_varlen_gradients_close(got, dout, q, k, v, got.out, got.lse, cu, cu, dlse=dlse, **options)


def test_other_keys_and_chunks(executor):
    q, k, v, *_ = tensors(seqlen_q=20, seqlen_k=50)
    got = ring(executor, 2, q, k, v, method="ulysses", causal=False, chunk=16)
    assert_attention_close(got.out, q, k, v, lse=got.lse, chunk=16)


def test_bytes_on_the_wire(executor):
    """(R - 1) / R B n (H D + G (D + E) + H E) s, n tokens a rank, and lse beside them."""
    size, heads, kv_heads, dims, tokens = 2, 4, 2, (32, 16), 12
    arrays = tensors(seqlen_q=size * tokens, heads=heads, kv_heads=kv_heads, dims=dims)
    got = ring(executor, size, *arrays[:3], method="ulysses")
    of_token = heads * dims[0] + kv_heads * sum(dims) + heads * dims[1]
    assert got.bytes[0] == (size - 1) * 2 * tokens * (of_token + heads) * 4 // size


def test_a_key_value_head_is_sent_once_to_each_rank_that_reads_it():
    """One key/value head for four ranks: it goes to the three others, and no further copies do."""
    tokens, dim, size = 4, 8, 4
    q, k, v, *_ = tensors(batch=1, seqlen_q=size * tokens, heads=4, kv_heads=1, dims=(dim, dim))

    def of_rank(group):
        ulysses_attention(*(shard(x, group) for x in (q, k, v)), group)
        return group.traffic.bytes

    assert on_ranks(size, of_rank) == [(size - 1) * tokens * dim * 4 * (1 + 2 + 1)] * size


def test_the_same_bits_every_time(executor):
    arrays = tensors(heads=4, kv_heads=1)
    first, second = (ring(executor, 3, *arrays, method="ulysses") for _ in range(2))
    for name in ("out", "lse", "dq", "dk", "dv"):
        assert getattr(first, name).tobytes() == getattr(second, name).tobytes(), name


def test_refusals():
    arrays = tensors(seqlen_q=8)[:3]

    def of_rank(group):
        parts = [shard(x, group) for x in arrays]
        with pytest.raises(TypeError, match="bias"):
            ulysses_attention(*parts, group, bias=None)
        with pytest.raises(MismatchError, match="chunk"):
            ulysses_attention(*parts, group, chunk=3 + group.rank)
        return group.traffic.bytes

    assert on_ranks(2, of_rank) == [0, 0]
