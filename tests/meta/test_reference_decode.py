"""The reference of decoding against the definition, key by key."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

import cuattn
from cuattn import reference
from cuattn.testing.decode_problems import cached_problem


def by_hand(q, keys, values, *, scale, softcap=None, slope=0.0, sink=None, left=None, first=0):
    """One query row at position `first`: exponentials one after the other."""
    weights, total = [], 0.0 if sink is None else math.exp(sink)
    for j, key in enumerate(keys):
        if j > first or (left is not None and j < first - left):
            weights.append(0.0)
            continue
        s = scale * float(np.dot(q, key))
        s = s if softcap is None else softcap * math.tanh(s / softcap)
        weights.append(math.exp(s - slope * abs(first - j)))
    total += sum(weights)
    if total == 0:
        return np.zeros(values.shape[1]), -math.inf
    return sum(w * value for w, value in zip(weights, values, strict=True)) / total, math.log(total)


OPTIONS = ({}, {"softcap": 1.5}, {"alibi_slopes": [0.5, 0.25, 1, 2]}, {"sinks": [0.5, 1, -1, 0]}, {"window": (3, 0)})


@pytest.mark.parametrize("page_size", (None, 1, 4))
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_key_by_key(options, page_size):
    problem = cached_problem(
        np.random.default_rng(0), lengths=[9, 0, 2], seqlens_q=3, heads=(4, 2), head_dims=(6, 5), dtype=np.float64,
        page_size=page_size,
    )  # fmt: skip
    function = reference.decode_attention if page_size is None else reference.paged_attention
    out, lse = function(*problem.arrays, **options)
    q, k, v = problem.arrays[:3]
    for b, length in enumerate(problem.seqlens_k):
        if page_size is None:
            keys, values = k[b, :length], v[b, :length]
        else:
            places = [(problem.block_tables[b, j // page_size], j % page_size) for j in range(length)]
            keys, values = (np.array([x[place] for place in places]).reshape(length, *x.shape[2:]) for x in (k, v))
        for i in range(3):
            for h in range(4):
                own, own_lse = by_hand(
                    q[b, i, h], keys[:, h // 2], values[:, h // 2], scale=1 / math.sqrt(6), first=i + length - 3,
                    softcap=options.get("softcap"), slope=options.get("alibi_slopes", [0] * 4)[h],
                    sink=options.get("sinks", [None] * 4)[h], left=options.get("window", (None,))[0],
                )  # fmt: skip
                np.testing.assert_allclose(out[b, i, h], own, rtol=1e-12)
                np.testing.assert_allclose(lse[b, h, i], own_lse, rtol=1e-12)


def test_packed_queries_are_sequences_of_their_own():
    problem = cached_problem(
        np.random.default_rng(0), lengths=[9, 4, 6], seqlens_q=[2, 0, 5], heads=(4, 2), head_dims=(6, 5),
        dtype=np.float64, page_size=4,
    )  # fmt: skip
    out, lse = reference.paged_attention_varlen(*problem.arrays)
    q, k, v, tables, starts, lengths = problem.arrays
    for b in range(3):
        rows = slice(starts[b], starts[b + 1])
        own, own_lse = reference.paged_attention(q[None, rows], k, v, tables[b : b + 1], lengths[b : b + 1])
        np.testing.assert_array_equal(out[rows], own[0])
        np.testing.assert_array_equal(lse[:, rows], own_lse[0])


def test_rotations_depend_on_distances_only():
    """Both turned by their positions: a longer past in front of the window leaves the product as it is."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((1, 1, 1, 8)), rng.standard_normal((1, 20, 1, 8)), rng.standard_normal((1, 20, 1, 8))
    options = {"rope": cuattn.Rotary(base=100.0), "rotate_keys": True, "window": (4, 0)}
    long, _ = reference.decode_attention(q, k, v, [20], **options)
    short, _ = reference.decode_attention(q, k[:, 10:], v[:, 10:], [10], **options)
    np.testing.assert_allclose(long, short, rtol=1e-12)
    turned = reference.rope(k, np.arange(20)[None], base=100.0)
    cached, _ = reference.decode_attention(q, turned, v, [20], **{**options, "rotate_keys": False})
    np.testing.assert_allclose(cached, long, rtol=1e-12)


def test_scales():
    """Per tensor, head and slot; and of blocks."""
    codes = np.arange(-6, 6, dtype=np.int8).reshape(1, 2, 2, 3)
    for scale, full in ((0.5, 0.5), ([2.0, 3.0], [[[[2.0], [3.0]]]]), (np.arange(4.0).reshape(1, 2, 2), None)):
        factors = np.asarray(scale)[..., None] if full is None else np.asarray(full)
        np.testing.assert_array_equal(reference.dequantize(codes, "int8", scale=scale), codes * factors)
    packed = np.array([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 3], np.uint8)  # every code, three times
    blocks = np.array([[1.0, 2.0, 0.5]], ml_dtypes.float8_e4m3fn)
    numbers = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    expected = np.concatenate([factor * sign * numbers for factor in (1, 2, 0.5) for sign in (1, -1)])
    np.testing.assert_array_equal(
        reference.dequantize(packed, "nvfp4", scale=4.0, block_scales=blocks)[0], 4 * expected
    )


def test_what_is_out_of_range():
    pages = np.arange(6.0).reshape(3, 2)
    assert reference.gather_pages(pages, [2, 3, -1, 0], 7).tolist() == [4, 5, 0, 0, 0, 0, 0]
    assert reference.gather_pages(pages, [1], 100).tolist() == [2, 3]
    assert reference.gather_pages(pages, [1], -1).size == 0
    assert reference.gather_pages(pages[:0], [1, 2], 3).tolist() == [0, 0, 0]
