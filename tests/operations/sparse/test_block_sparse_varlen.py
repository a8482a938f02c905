"""Block-sparse attention of packed sequences: each as it would be alone."""

from __future__ import annotations

import numpy as np
import pytest
from attention_calls import prepare
from block_sparse_problems import random_mask
from hypothesis import given
from hypothesis import strategies as st

import cuattn
from cuattn.errors import ArgumentError, ShapeError
from cuattn.testing import assert_attention_close, assert_varlen_gradients_close
from cuattn.testing.strategies import examples, fill

F16 = np.dtype(np.float16)


def batch_of(rng, lengths, block_sizes, *, heads=(2, 1), dims=(64, 64), elements=False, per_head=False):
    """q, k, v, cu_seqlens, masks and what they show."""
    lengths = np.asarray(lengths).reshape(-1, 2)
    starts = [np.concatenate([[0], np.cumsum(side)]).astype(np.int32) for side in lengths.T]
    (h, g), (d, e) = heads, dims
    n, m = (int(x[-1]) for x in starts)
    q, k, v = (fill(shape, F16, "normal", rng) for shape in ((n, h, d), (m, g, d), (m, g, e)))
    leading = (h,) if per_head else ()
    pairs = [
        random_mask(rng, seqlens, size, leading=leading, elements=elements)
        for seqlens, size in zip(lengths, block_sizes, strict=True)
    ]
    return (q, k, v), starts, [mask for mask, _ in pairs], [visible for _, visible in pairs]


def forward(executor, arrays, starts, masks, **options):
    arrays, options = prepare(executor, arrays, options)
    out, lse = cuattn.block_sparse_attention_varlen(*arrays, *starts, masks, return_lse=True, **options)
    return executor.numpy(out), executor.numpy(lse)


def sequences(arrays, starts):
    """q, k, v of each sequence with a batch axis, and its slices of queries and keys."""
    for b in range(len(starts[0]) - 1):
        queries, keys = (slice(int(x[b]), int(x[b + 1])) for x in starts)
        yield [x[None, rows] for x, rows in zip(arrays, (queries, keys, keys), strict=True)], queries, keys


@given(data=st.data())
@examples(10)
def test_each_sequence_as_alone(executor, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    length = st.sampled_from([0, 1, 17, 63, 64, 65, 100])
    lengths = data.draw(st.lists(st.tuples(length, length), max_size=4))
    sizes = data.draw(st.lists(st.sampled_from([(16, 16), (24, 40)]), min_size=len(lengths), max_size=len(lengths)))
    heads = data.draw(st.sampled_from([(2, 1), (3, 3)]))
    how = {"elements": data.draw(st.booleans()), "per_head": data.draw(st.booleans())}
    arrays, starts, masks, visible = batch_of(rng, lengths, sizes, heads=heads, **how)
    options = data.draw(st.sampled_from([{"causal": True}, {"window": (30, 5), "sinks": np.zeros(heads[0], "f4")}]))
    out, lse = forward(executor, arrays, starts, masks, **options)
    for ((q, k, v), rows, _), mask in zip(sequences(arrays, starts), visible, strict=True):
        assert_attention_close(out[None, rows], q, k, v, lse=lse[None, :, rows], mask=mask, **options)


@pytest.mark.parametrize("options", [{}, {"causal": True, "dropout_p": 0.3, "softcap": 5.0}], ids=["plain", "options"])
def test_gradients(executor, options):
    rng = np.random.default_rng(1)
    arrays, starts, masks, visible = batch_of(rng, [(70, 100), (0, 3), (33, 64)], [(16, 16), (16, 16), (24, 24)])
    out, lse = forward(executor, arrays, starts, masks, **options)
    dout = fill(out.shape, F16, "normal", rng)
    saved = [executor.array(x) for x in (dout, *arrays, out, lse)]
    grads = cuattn.block_sparse_attention_varlen_backward(*saved, *starts, masks, **options)
    grads = type(grads)(*(None if x is None else executor.numpy(x) for x in grads))
    shown = np.zeros((3, 1, 70, 100), bool)  # what the masks show, by positions within the sequences
    for b, mask in enumerate(visible):
        shown[b, 0, : mask.shape[0], : mask.shape[1]] = mask
    assert_varlen_gradients_close(grads, dout, *arrays, out, lse, *starts, mask=shown, **options)


def test_compressed_rows_are_masks(executor):
    """Rows of all sequences one after another, and where those of each begin."""
    rng = np.random.default_rng(2)
    arrays, starts, masks, _ = batch_of(rng, [(70, 100), (33, 64)], [(16, 16)] * 2)
    counts = [mask.indptr.size - 1 for mask in masks]
    indptr = np.concatenate([masks[0].indptr, masks[1].indptr[1:] + masks[0].nnz])
    rows = indptr, np.concatenate([mask.indices for mask in masks]), np.concatenate([[0], np.cumsum(counts)])
    expected = forward(executor, arrays, starts, masks, causal=True)
    for got, want in zip(forward(executor, arrays, starts, rows, block_size=16, causal=True), expected, strict=True):
        np.testing.assert_array_equal(got, want)


def test_refusals(executor):
    arrays, starts, masks, _ = batch_of(np.random.default_rng(3), [(8, 8), (8, 8)], [(16, 16)] * 2)
    other = random_mask(np.random.default_rng(0), (9, 8), (16, 16))[0]
    for wrong, error, says in (
        (masks[:1], ShapeError, "has 1 masks"),
        ([masks[0], other], ShapeError, r"block_masks\[1\] is of 9 queries"),
        ([masks[0], None], ArgumentError, r"block_masks\[1\] is None"),
        (masks[0], ArgumentError, "a list of masks"),
        ((np.array([0, 1, 2]), np.array([0, 3]), np.array([0, 1, 2])), ArgumentError, "indices"),
        ((np.array([0, 1, 2]), np.array([0, 0]), np.array([0, 2])), ShapeError, "row_offsets"),
        ((np.array([0, 1, 2]), np.array([0, 0]), np.array([0, 1, 1])), ArgumentError, "row_offsets"),
    ):
        with pytest.raises(error, match=says):
            forward(executor, arrays, starts, wrong)
