"""Decoding over a cache that ranks share: results, positions, bytes."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from distributed_calls import SLOPES, on_ranks

from cuattn import reference
from cuattn.distributed import tree_decode_attention
from cuattn.errors import ArgumentError, MismatchError, PeerError
from cuattn.testing.tolerance import assert_attention_close

#: Keys of two sequences on three ranks: some have none.
LENGTHS = ((20, 0), (33, 0), (0, 5))
SHORT = tuple(map(sum, zip(*LENGTHS, strict=True)))


def cache(seed=0, *, seqlen_q=1, lengths=LENGTHS, dims=(32, 32), dtype=np.float32):
    """q, and for each rank keys and values with NaN behind the lengths; and the keys and values of each sequence."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((2, seqlen_q, 4, dims[0])).astype(dtype)
    capacity = max(map(max, lengths)) + 3
    shards = [[np.full((2, capacity, 2, dim), np.nan, dtype) for dim in dims] for _ in lengths]
    whole = [[np.zeros((0, 2, dim), dtype) for dim in dims] for _ in range(2)]
    for of_rank, counts in zip(shards, lengths, strict=True):
        for b, n in enumerate(counts):
            for x, dim, number in zip(of_rank, dims, (0, 1), strict=True):
                x[b, :n] = rng.standard_normal((n, 2, dim))
                whole[b][number] = np.concatenate([whole[b][number], x[b, :n]])
    return q, shards, whole


def decode(executor, q, shards, lengths, **options):
    arrays = [[executor.array(x) for x in of_rank] for of_rank in shards]
    queries = executor.array(q)

    def of_rank(group):
        of = tree_decode_attention(queries, *arrays[group.rank], list(lengths[group.rank]), group, return_lse=True,
                                   **options)  # fmt: skip
        return [executor.numpy(x) for x in of], group.traffic.bytes

    results = on_ranks(len(shards), of_rank)
    for (out, lse), _ in results[1:]:
        assert out.tobytes() == results[0][0][0].tobytes()
        assert lse.tobytes() == results[0][0][1].tobytes()
    return *results[0][0], results[0][1]


def check(out, lse, q, whole, **options):
    for b, (k, v) in enumerate(whole):
        of = {**options}
        if np.ndim(options.get("alibi_slopes")) == 2:
            of["alibi_slopes"] = options["alibi_slopes"][b]
        assert_attention_close(out[b : b + 1], q[b : b + 1], k[None], v[None], lse=lse[b : b + 1], **of)


@pytest.mark.parametrize(
    ("seqlen_q", "options"),
    [
        (1, {}),
        (1, {"sinks": SLOPES, "softcap": 2.0, "scale": 0.3, "causal": False}),
        (1, {"window": (30, 0), "alibi_slopes": SLOPES}),
        (4, {"sinks": SLOPES, "alibi_slopes": np.stack([SLOPES, 2 * SLOPES])}),
        (4, {"causal": "top_left"}),
    ],
)
def test_against_the_reference(executor, seqlen_q, options):
    q, shards, whole = cache(seqlen_q=seqlen_q)
    out, lse, _ = decode(executor, q, shards, LENGTHS, **options)
    check(out, lse, q, whole, **{"causal": True, **options})


@pytest.mark.parametrize("dtype", [np.float64, ml_dtypes.bfloat16])
def test_other_dtypes(executor, dtype):
    q, shards, whole = cache(dtype=dtype)
    out, lse, _ = decode(executor, q, shards, LENGTHS)
    assert out.dtype == dtype
    check(out, lse, q, whole, causal=True)


@pytest.mark.parametrize("sinks", [None, SLOPES])
def test_no_keys_at_all(executor, sinks):
    lengths = ((0, 0), (0, 0))
    q, shards, _ = cache(lengths=lengths)
    out, lse, _ = decode(executor, q, shards, lengths, sinks=sinks)
    assert not out.any()
    np.testing.assert_allclose(lse[0, :, 0], np.full(4, -np.inf) if sinks is None else sinks, rtol=1e-6)


def test_bytes_on_the_wire(executor):
    """2 (R - 1) / R B H (E + 2) 4, however many keys there are."""
    q, shards, _ = cache(dims=(32, 16))
    *_, sent = decode(executor, q, shards, LENGTHS)
    assert sent == Fraction(2 * 2, 3) * 2 * 4 * (16 + 2) * 4


def test_huge_logits(executor):
    """The largest lse goes first: nothing overflows, whichever rank has it."""
    q, shards, whole = cache(lengths=((5, 5), (6, 6)))
    shards[0][0] *= 1e4
    for b in range(2):
        whole[b][0][:5] *= np.float32(1e4)
    out, lse, _ = decode(executor, q, shards, ((5, 5), (6, 6)))
    check(out, lse, q, whole, causal=True)
    assert np.isfinite(reference.attention(q[:1], whole[0][0][None], whole[0][1][None])[0]).all()


def test_refusals():
    q, shards, _ = cache()

    def of_rank(group):
        mine = shards[group.rank]
        with pytest.raises((ArgumentError, PeerError), match="seqlens"):
            tree_decode_attention(q, *mine, [-1 if group.rank == 1 else 3, 0], group)
        with pytest.raises(MismatchError, match="seqlen_q"):
            tree_decode_attention(q if group.rank else q.repeat(2, axis=1), *mine, [3, 3], group)
        return group.traffic.bytes

    assert on_ranks(3, of_rank) == [0] * 3
