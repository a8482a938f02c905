"""Drawn problems: any number of ranks, any lengths, any partition, options together, both methods."""

from __future__ import annotations

import numpy as np
from distributed_calls import ring, tensors
from hypothesis import given
from hypothesis import strategies as st

from cuattn.distributed.partitions import PARTITIONS
from cuattn.testing.gradient_tolerance import assert_gradients_close, assert_varlen_gradients_close
from cuattn.testing.strategies import examples
from cuattn.testing.tolerance import assert_attention_close, assert_varlen_close

LENGTHS = st.sampled_from([1, 2, 3, 7, 16, 17, 31, 33, 48, 64, 65])
SIDES = st.none() | st.integers(0, 70)


@st.composite
def options(draw, heads, sequences):
    """Options of one call."""
    found = {"causal": draw(st.sampled_from([True, True, False, "top_left"]))}
    if draw(st.booleans()):
        found["window"] = (draw(SIDES), draw(SIDES))
    if draw(st.booleans()):
        shape = draw(st.sampled_from([(heads,), (sequences, heads)]))
        found["alibi_slopes"] = np.linspace(0.05, 0.7, int(np.prod(shape)), dtype=np.float32).reshape(shape)
    if draw(st.booleans()):
        found["sinks"] = np.linspace(-1, 1, heads, dtype=np.float32)
    if draw(st.booleans()):
        found |= {"dropout_p": 0.4, "dropout_seed": draw(st.integers(0, 2**64 - 1)), "dropout_offset": 5}
    if draw(st.booleans()):
        found["softcap"] = 4.0
    return found


@given(st.data())
@examples(6)
def test_dense(executor, data):
    size, kind = data.draw(st.integers(1, 6)), data.draw(st.sampled_from(PARTITIONS))
    kv_heads, shared = data.draw(st.sampled_from([(1, 3), (2, 2), (2, 1), (1, 5), (3, 1)]))
    n, m = data.draw(LENGTHS), data.draw(LENGTHS)
    method = data.draw(st.sampled_from(["ring", "ring", "ulysses"]))
    chosen = data.draw(options(kv_heads * shared, 2))
    q, k, v, dout, dlse = tensors(7, seqlen_q=n, seqlen_k=m, heads=kv_heads * shared, kv_heads=kv_heads)
    got = ring(executor, size, q, k, v, dout, dlse, partition=kind, method=method, **chosen)
    assert_attention_close(got.out, q, k, v, lse=got.lse, **chosen)
    assert_gradients_close(got, dout, q, k, v, got.out, got.lse, dlse=dlse, **chosen)


@given(st.data())
@examples(4)
def test_packed(executor, data):
    size, kind = data.draw(st.integers(1, 5)), data.draw(st.sampled_from(PARTITIONS))
    lengths = data.draw(st.lists(st.just(0) | LENGTHS, min_size=1, max_size=3))
    cu = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    method = data.draw(st.sampled_from(["ring", "ring", "ulysses"]))
    chosen = data.draw(options(4, len(lengths)))
    q, k, v, dout, dlse = tensors(8, batch=None, seqlen_q=cu[-1])
    got = ring(executor, size, q, k, v, dout, dlse, partition=kind, cu_seqlens=cu, method=method, **chosen)
    assert_varlen_close(got.out, q, k, v, cu, cu, lse=got.lse, **chosen)
    assert_varlen_gradients_close(got, dout, q, k, v, got.out, got.lse, cu, cu, dlse=dlse, **chosen)
