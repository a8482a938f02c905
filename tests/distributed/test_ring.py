"""Ring attention, forward and backward, against the float64 reference of the whole sequence."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from distributed_calls import SLOPES, on_ranks, ring, tensors

import cuattn
from cuattn import reference
from cuattn.distributed import ring_attention, shard
from cuattn.distributed.partitions import PARTITIONS
from cuattn.errors import ArgumentError, DTypeError, MismatchError, PeerError, ShapeError
from cuattn.testing.gradient_tolerance import assert_gradients_close, assert_varlen_gradients_close
from cuattn.testing.tolerance import assert_attention_close, assert_varlen_close

KINDS = pytest.mark.parametrize("kind", PARTITIONS)
BOTH_SLOPES = np.stack([SLOPES, 2 * SLOPES])
#: All options of the list, in few calls; with lengths of queries and keys.
CASES = {
    "causal": (50, 50, {}),
    "window": (50, 50, {"window": (9, 3), "causal": False, "alibi_slopes": SLOPES, "sinks": SLOPES}),
    "open": (33, 50, {"alibi_slopes": BOTH_SLOPES, "causal": False, "softcap": 3.0, "scale": 0.3}),
    "top": (50, 33, {"alibi_slopes": SLOPES, "causal": "top_left", "window": (20, None)}),
    "empty": (50, 20, {"sinks": SLOPES}),  # the first queries see nothing but the sink
    "dropout": (50, 50, {"dropout_p": 0.3, "dropout_seed": 2**40 + 7, "dropout_offset": 3}),
}


@KINDS
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [1, 3])
def test_against_the_reference(executor, kind, case, size):
    seqlen_q, seqlen_k, options = CASES[case]
    q, k, v, dout, dlse = tensors(seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    got = ring(executor, size, q, k, v, dout, dlse, partition=kind, **options)
    options = {"causal": True, **options}
    assert_attention_close(got.out, q, k, v, lse=got.lse, **options)
    assert_gradients_close(got, dout, q, k, v, got.out, got.lse, dlse=dlse, **options)


@KINDS
@pytest.mark.parametrize("case", ["window", "open", "dropout"])
def test_packed_sequences(executor, kind, case):
    options = {"causal": True, **CASES[case][2]}
    if case == "open":
        options["alibi_slopes"] = np.stack([SLOPES, 2 * SLOPES, SLOPES, 3 * SLOPES])
    q, k, v, dout, dlse = tensors(batch=None)
    cu = [0, 7, 7, 49, 50]
    got = ring(executor, 3, q, k, v, dout, dlse, partition=kind, cu_seqlens=cu, **options)
    assert_varlen_close(got.out, q, k, v, cu, cu, lse=got.lse, **options)
    assert_varlen_gradients_close(got, dout, q, k, v, got.out, got.lse, cu, cu, dlse=dlse, **options)


@KINDS
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_fewer_tokens_than_chunks(executor, kind, tokens):
    q, k, v, dout, dlse = tensors(seqlen_q=tokens)
    got = ring(executor, 4, q, k, v, dout, dlse, partition=kind)
    assert got.out.shape == q.shape
    if tokens:
        assert_attention_close(got.out, q, k, v, lse=got.lse, causal=True)
        assert_gradients_close(got, dout, q, k, v, got.out, got.lse, dlse=dlse, causal=True)


def test_float64(executor):
    q, k, v, dout, dlse = tensors(dtype=np.float64)
    got = ring(executor, 2, q, k, v, dout, dlse, alibi_slopes=SLOPES)
    assert_attention_close(got.out, q, k, v, lse=got.lse, causal=True, alibi_slopes=SLOPES)
    assert_gradients_close(got, dout, q, k, v, got.out, got.lse, dlse=dlse, causal=True, alibi_slopes=SLOPES)


def test_error_of_eight_ranks_in_bfloat16(executor):
    """Parts in float32, rounded once: at most 1.25 times the error of one device, by the mean and by the worst."""
    arrays = tensors(dtype=ml_dtypes.bfloat16, batch=1, seqlen_q=130)
    q, k, v, dout, dlse = arrays
    got = ring(executor, 8, *arrays)
    assert_attention_close(got.out, q, k, v, lse=got.lse, causal=True)
    assert_gradients_close(got, dout, q, k, v, got.out, got.lse, dlse=dlse, causal=True)
    on_device = [executor.array(x) for x in arrays]
    out, lse = cuattn.attention(*on_device[:3], causal=True, return_lse=True)
    one = [out, *cuattn.attention_backward(on_device[3], *on_device[:3], out, lse, dlse=on_device[4], causal=True)[:3]]
    exact = [x.astype(np.float64) for x in arrays]
    of_exact = reference.attention(*exact[:3], causal=True)
    wanted = reference.attention_backward(exact[3], *exact[:3], *of_exact, dlse=exact[4], causal=True)
    for x, y, z in zip(got[:1] + got[2:5], one, (of_exact[0], wanted.dq, wanted.dk, wanted.dv), strict=True):
        errors = [np.abs(part.astype(np.float64) - z) for part in (x, executor.numpy(y))]
        assert np.sqrt((errors[0] ** 2).mean()) <= 1.25 * np.sqrt((errors[1] ** 2).mean())
        assert errors[0].max() <= 1.25 * errors[1].max()


def test_strided_views(executor):
    """[batch, heads, seqlen, head_dim] arrays as transposed views, and heads that are every second one."""
    q, k, v, *_ = tensors()
    wide = [np.repeat(x, 2, axis=2) for x in (q, k, v)]

    def of_rank(group):
        parts = [shard(executor.array(x), group)[:, :, ::2] for x in wide]
        views = [x.swapaxes(1, 2).copy().swapaxes(1, 2) for x in parts]
        first, second = (ring_attention(*arrays, group) for arrays in (parts, views))
        plain = ring_attention(*(shard(executor.array(x), group) for x in (q, k, v)), group)
        return all(executor.numpy(x).tobytes() == executor.numpy(plain).tobytes() for x in (first, second))

    assert all(on_ranks(2, of_rank))


@KINDS
def test_the_same_bits_every_time_and_without_overlap(executor, kind):
    arrays = tensors()
    first, second = (ring(executor, 3, *arrays, partition=kind, overlap=overlap) for overlap in (True, False))
    again = ring(executor, 3, *arrays, partition=kind)
    for name in ("out", "lse", "dq", "dk", "dv"):
        bits = [getattr(x, name).tobytes() for x in (first, second, again)]
        assert len(set(bits)) == 1, name


def test_one_rank_is_one_device(executor):
    q, k, v, *_ = tensors()
    got = ring(executor, 1, q, k, v, partition="contiguous")
    out = cuattn.attention(*(executor.array(x) for x in (q, k, v)), causal=True)
    assert got.out.tobytes() == executor.numpy(out).tobytes()


@pytest.mark.parametrize("size", [2, 5])
def test_bytes_on_the_wire(executor, size):
    """(R - 1) B n G (D + E) s, n tokens a rank; backward the same, and R hops of the float32 sums."""
    tokens, heads, kv_heads, dims = 8 * size, 4, 2, (32, 16)
    arrays = tensors(seqlen_q=tokens, heads=heads, kv_heads=kv_heads, dims=dims)
    got = ring(executor, size, *arrays)
    share = 2 * (tokens // size) * kv_heads * sum(dims) * 4
    assert got.bytes == ((size - 1) * share, (size - 1) * share + size * share)


def test_keys_are_sent_before_the_step_that_reads_them(executor):
    """What a rank does, in its order: the next keys and values are on their way when the kernels start."""
    arrays = [executor.array(x) for x in tensors()[:3]]

    def of_rank(group, overlap):
        with group.traffic.events() as events:
            ring_attention(*(shard(x, group) for x in arrays), group, overlap=overlap)
        return [(event.kind, event.step) for event in events]

    ahead = [("send", 0), ("compute", 0), ("wait", 0), ("send", 1), ("compute", 1), ("wait", 1), ("compute", 2)]
    behind = [("compute", 0), ("send", 0), ("wait", 0), ("compute", 1), ("send", 1), ("wait", 1), ("compute", 2)]
    assert on_ranks(3, of_rank, True) == [ahead] * 3
    assert on_ranks(3, of_rank, False) == [behind] * 3


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"softcap": 2.0}, MismatchError, "ranks differ in softcap"),
        ({"alibi_slopes": SLOPES}, MismatchError, "ranks differ in alibi_slopes"),
        ({"partition": "striped"}, MismatchError, "ranks differ in partition"),
        ({"causal": False}, MismatchError, "ranks differ in causal"),
        ({"scale": float("nan")}, ArgumentError, "scale"),
        ({"window": 3}, ArgumentError, "window"),
        ({"partition": "zig"}, ArgumentError, "partition"),
        ({"dropout_p": 2.0}, ArgumentError, "dropout_p"),
    ],
)
def test_options_that_differ(change, error, match):
    """Every rank raises before anything is sent; where one rank's are refused, the others say so."""
    arrays = tensors(seqlen_q=12)[:3]

    def of_rank(group):
        options = change if group.rank == 1 else {}
        with pytest.raises((error, PeerError), match=match):
            ring_attention(*(shard(x, group) for x in arrays), group, **options)
        assert group.traffic.bytes == 0
        group.barrier()
        return True

    assert on_ranks(2, of_rank) == [True, True]


def test_shapes_that_differ():
    q, k, v = tensors(seqlen_q=12)[:3]

    def of_rank(group):
        mine = [shard(x, group) for x in (q, k, v)]
        wrong = {
            "heads": [mine[0][:, :, : 4 - 2 * group.rank], *mine[1:]],
            "dtype": [x.astype(np.float64) if group.rank else x for x in mine],
            "tokens": [x[:, : 6 - group.rank] for x in mine],
        }
        for name, error in (("heads", MismatchError), ("dtype", MismatchError), ("tokens", ShapeError)):
            with pytest.raises(error, match=name):
                ring_attention(*wrong[name], group)
        assert group.traffic.bytes == 0
        return True

    assert on_ranks(2, of_rank) == [True, True]


def test_refusals_of_one_rank():
    q, k, v = tensors(seqlen_q=4)[:3]

    def of_rank(group):
        with pytest.raises(ArgumentError, match="group"):
            ring_attention(q, k, v, None)
        with pytest.raises(DTypeError, match="int32"):
            ring_attention(*(x.astype(np.int32) for x in (q, k, v)), group)
        with pytest.raises(ShapeError, match="rank"):
            ring_attention(q, k, v, group, cu_seqlens=[0, 4])
        with pytest.raises(ArgumentError, match="return_lse"):
            ring_attention(q, k, v, group, return_lse=1)
        return True

    assert on_ranks(1, of_rank) == [True]
