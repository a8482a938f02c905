"""dropout_origin: a part of a larger call drops exactly what is dropped there, wherever it lies."""

from __future__ import annotations

import numpy as np
import pytest
from attention_calls import assert_right, call
from dropout_calls import probabilities
from hypothesis import given
from hypothesis import strategies as st
from idle_executor import install
from test_attention_options import BF16, F16, F32, F64, make

import cuattn
from cuattn import DropoutOrigin
from cuattn.errors import ArgumentError
from cuattn.ops.attention.dropout import check_dropout, check_origin
from cuattn.testing.strategies import examples

DROPOUT = {"dropout_p": 0.4, "dropout_seed": 2**50 + 1, "dropout_offset": 3}
MAX = 2**31 - 1
#: As tensor cores would have it: places that four elements which share a random number have in common.
IN_SQUARES = (
    DropoutOrigin(query=16, key=48),
    DropoutOrigin(1, 2, 32, 16, 5),
    (3, 0, 0, 0),
    DropoutOrigin(2**31 - 2, 2**31 - 3, 2**31 - 128, 2**31 - 80, MAX),
)
#: And others: in none, one or two of the axes at the edge of such a square, and not in steps of 1.
ELSEWHERE = (
    (0, 0, 8, 0),
    (0, 0, 0, 1),
    DropoutOrigin(1, 2, 33, 7, 5),
    DropoutOrigin(0, 1, 3, 9, 4, 3),
    DropoutOrigin(query=16, key=32, step=2),
    DropoutOrigin(0, 0, 5, 2**31 - 71, 2),
)


def part_of(whole, origin, shape):
    """The part of a mask, element by element as `DropoutOrigin` says."""
    origin = DropoutOrigin(*origin)
    rows, columns = (origin[axis] + np.arange(shape[axis]) * origin.step for axis in (2, 3))
    heads = whole[origin.batch : origin.batch + shape[0], origin.head : origin.head + shape[1]]
    return heads[:, :, rows[:, None], columns]


@pytest.mark.smoke
@examples(40)
@given(
    st.tuples(*[st.integers(0, 3)] * 2, *[st.integers(0, 40)] * 2),
    st.integers(0, 2),
    st.sampled_from([1, 1, 2, 3, 8, 16]),
    st.tuples(st.integers(0, 2), st.integers(1, 3), st.integers(0, 20), st.integers(0, 20)),
)
def test_the_mask_of_a_part_is_a_part_of_the_mask(place, more_heads, step, shape):
    """Of the whole call's mask: assembled from parts, it is the same to the bit."""
    heads = place[1] + shape[1] + more_heads
    origin = DropoutOrigin(*place, heads, step)
    last = [place[axis] + step * max(shape[axis] - 1, 0) + 1 for axis in (2, 3)]
    whole = cuattn.dropout_mask(place[0] + shape[0], heads, *last, **DROPOUT)
    part = cuattn.dropout_mask(*shape, **DROPOUT, dropout_origin=origin)
    assert part.shape == shape
    np.testing.assert_array_equal(part, part_of(whole, origin, shape))


def kept_by(executor, dtype, seqlens, **options):
    return probabilities(lambda *x, **given: call(executor, *x, **given), seqlens, dtype, **DROPOUT, **options)[0] > 0


@pytest.mark.smoke
@pytest.mark.parametrize("origin", IN_SQUARES + ELSEWHERE, ids=str)
@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
def test_what_is_kept(executor, dtype, origin):
    """Exactly that part of the mask, in every head and batch entry."""
    mask = cuattn.dropout_mask(2, 2, 70, 70, **DROPOUT, dropout_origin=origin)
    np.testing.assert_array_equal(kept_by(executor, dtype, (70, 70), dropout_origin=origin), mask)


@pytest.mark.parametrize("dtype", (BF16, F64, "tf32"), ids=str)
def test_what_other_kernels_keep(executor, dtype):
    more = {}
    if dtype == "tf32":
        dtype, more = F32, {"precision": "tf32"}
    for origin in (IN_SQUARES[1], ELSEWHERE[3]):
        mask = cuattn.dropout_mask(2, 2, 70, 40, **DROPOUT, dropout_origin=origin)
        np.testing.assert_array_equal(kept_by(executor, dtype, (70, 40), dropout_origin=origin, **more), mask)


@pytest.mark.parametrize("cut", (32, 27))
def test_chunks_drop_what_the_whole_drops(executor, cut):
    """A causal call in four pieces, as ranks of a ring have them: merged, they are the whole call."""
    q, k, v = make((70, 70), F32)
    options = {"causal": "top_left", "alibi_slopes": [0.1, 0.02], "window": (50, 0), **DROPOUT}
    whole, lse = call(executor, q, k, v, **options)
    pieces = ((0, cut), (cut, 70))
    for start_q, stop_q in pieces:
        parts = []
        for start_k, stop_k in pieces:
            of_part = options | {"causal": True, "diagonal_offset": start_q - start_k}
            arrays = q[:, start_q:stop_q], k[:, start_k:stop_k], v[:, start_k:stop_k]
            parts.append(call(executor, *arrays, **of_part, dropout_origin=(0, 0, start_q, start_k)))
        (out_a, lse_a), (out_b, lse_b) = parts
        lse_a, lse_b = (np.ascontiguousarray(x) for x in (lse_a, lse_b))
        out, merged = cuattn.merge_states(out_a, lse_a, out_b, lse_b)
        np.testing.assert_allclose(out, whole[:, start_q:stop_q], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(merged, lse[:, :, start_q:stop_q], rtol=1e-6, atol=1e-6)


def test_heads_of_a_rank_and_sequences_of_a_batch(executor):
    """Every second batch entry and the last two of six heads: with the whole's mask, and the whole's result."""
    q, k, v = make((40, 70), F16, batch=3, heads=(6, 3))
    whole, lse = call(executor, q, k, v, **DROPOUT)
    for b in (0, 2):
        origin = DropoutOrigin(batch=b, head=4, num_heads=6)
        entry = q[b : b + 1, :, 4:], k[b : b + 1, :, 2:], v[b : b + 1, :, 2:]
        out, own = call(executor, *entry, **DROPOUT, dropout_origin=origin)
        np.testing.assert_array_equal(out, whole[b : b + 1, :, 4:])
        np.testing.assert_array_equal(own, lse[b : b + 1, 4:])


def test_packed_and_unfused(executor):
    """Queries and keys count from the start of each sequence."""
    q, k, v = make((40, 70), F32)
    packed = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v)]
    for origin in (IN_SQUARES[1], ELSEWHERE[3]):
        options = {**DROPOUT, "dropout_origin": origin}
        out, _ = call(executor, q, k, v, **options)
        arrays = [executor.array(x) for x in packed]
        other = cuattn.attention_varlen(*arrays, [0, 40, 80], [0, 70, 140], **options)
        np.testing.assert_array_equal(executor.numpy(other).reshape(out.shape), out)
        unfused = cuattn.standard_attention(*(executor.array(x) for x in (q, k, v)), **options)
        np.testing.assert_allclose(executor.numpy(unfused), out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("origin", (IN_SQUARES[1], ELSEWHERE[3]), ids=str)
@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
def test_against_the_reference(executor, dtype, origin):
    assert_right(executor, *make((70, 70), dtype), causal=True, **DROPOUT, dropout_origin=origin)


def test_no_origin_is_the_beginning(executor):
    arrays = make((40, 70), F16)
    out, _ = call(executor, *arrays, **DROPOUT)
    for origin in ((0, 0, 0, 0), DropoutOrigin(), DropoutOrigin(num_heads=2), None):
        again, _ = call(executor, *arrays, **DROPOUT, dropout_origin=origin)
        np.testing.assert_array_equal(again, out)
    without, _ = call(executor, *arrays)
    np.testing.assert_array_equal(call(executor, *arrays, dropout_origin=(1, 0, 3, 3))[0], without)


def test_which_calls_ask_for_every_element():
    for origin in IN_SQUARES + ELSEWHERE:
        part = check_dropout(**DROPOUT).of_part(check_origin(origin, (1, 2, 70, 70)), 2)
        assert part.by_element == (origin in ELSEWHERE)
    q = np.zeros((1, 64, 2, 64), np.float16)
    labels = [cuattn.forward_path(q, q, q, **DROPOUT, dropout_origin=(0, 0, 16, key)).options.label for key in (16, 17)]
    assert labels == ["dropout", "everything_float32"]


WRONG = {
    (1, 2): "dropout_origin is",
    (0, 0, 0, 0, 2): "dropout_origin is",
    "here": "dropout_origin is",
    7: "dropout_origin is",
    (0, 1, 0, 0): "has head 1 and no num_heads",
    DropoutOrigin(head=1, num_heads=2): "has head 1 and num_heads 2",
    DropoutOrigin(num_heads=1): "has head 0 and num_heads 1",
    (0, 0, -1, 0): "query of dropout_origin is -1",
    (2**31, 0, 0, 0): "batch of dropout_origin is",
    (0, 0, 0, 0.5): "key of dropout_origin is 0.5",
    (0, 0, True, 0): "query of dropout_origin is True",
    (0, None, 0, 0): "head of dropout_origin is None",
    DropoutOrigin(step=0): "step of dropout_origin is 0",
    DropoutOrigin(num_heads=2.5): "num_heads of dropout_origin is 2.5",
    DropoutOrigin(query=MAX - 40): "query 2147483607 and step 1; the last of 41",
    DropoutOrigin(key=7, step=2**25): "key 7 and step 33554432; the last of 70",
}


@pytest.mark.parametrize("origin", WRONG, ids=str)
def test_wrong_origins_are_refused(monkeypatch, origin):
    """With dropout and without it, before anything is allocated."""
    q, k, v = make((41, 70), F16)
    idle = install(monkeypatch)
    for options in (DROPOUT, {}):
        with pytest.raises(ArgumentError, match=WRONG[origin]):
            cuattn.attention(q, k, v, **options, dropout_origin=origin)
    assert not idle.allocated
    with pytest.raises(ArgumentError, match=WRONG[origin]):
        cuattn.dropout_mask(2, 2, 41, 70, **DROPOUT, dropout_origin=origin)


def test_the_last_places_of_a_mask_are_allowed():
    for origin in (DropoutOrigin(query=MAX - 41), DropoutOrigin(key=5, step=(MAX - 6) // 69)):
        assert check_origin(origin, (2, 2, 41, 70)) == DropoutOrigin(*origin)
    assert check_origin(DropoutOrigin(query=MAX), (1, 1, 0, 1)).query == MAX
    assert check_origin((0, 0, MAX, MAX), (1, 1, None, None)).key == MAX
