"""linear_attention against the recurrence in float64: dtypes, head dims, heads, feature maps, layouts."""

from __future__ import annotations

import numpy as np
import pytest
from linear_calls import BF16, DTYPES, F16, F32, F64, decay_like, on, qkv, run, state_like

import cuattn
from cuattn.testing.arrays import Layout, place
from cuattn.testing.linear_tolerance import assert_linear_close

KINDS = (None, "head", "token", "channel")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seqlen", (1, 5, 63, 64, 65, 150))
def test_lengths(executor, dtype, seqlen):
    rng = np.random.default_rng(seqlen)
    q, k, v = qkv(rng, dtype, seqlen, dims=(64, 64), batch=1)
    decay = decay_like(rng, k, v, "token")
    assert_linear_close(*run(executor, q, k, v, decay=decay), q, k, v, decay=decay)


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(dtype, kind) for dtype in DTYPES for kind in KINDS if dtype != BF16 or kind == "token"],
    ids=str,
)
def test_decays_and_states(executor, dtype, kind):
    rng = np.random.default_rng(1)
    q, k, v = qkv(rng, dtype, 83, dims=(32, 32))
    options = {"decay": decay_like(rng, k, v, kind), "initial_state": state_like(rng, k, v)}
    assert_linear_close(*run(executor, q, k, v, **options), q, k, v, **options)


@pytest.mark.parametrize("feature_map", ("elu1", "relu", "square", None))
@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
def test_feature_maps_without_normalisation(executor, dtype, feature_map):
    rng = np.random.default_rng(2)
    q, k, v = qkv(rng, dtype, 70, (4, 2, 2), (64, 64), batch=1)
    options = {"feature_map": feature_map, "normalize": False, "decay": decay_like(rng, k, v, "token")}
    assert_linear_close(*run(executor, q, k, v, **options), q, k, v, **options)


@pytest.mark.parametrize("feature_map", ("relu", "square"))
def test_scale_and_eps(executor, feature_map):
    rng = np.random.default_rng(3)
    q, k, v = qkv(rng, F32, 40, dims=(32, 32))
    options = {"feature_map": feature_map, "scale": 0.25, "eps": 0.5}
    assert_linear_close(*run(executor, q, k, v, **options), q, k, v, **options)
    half = [x.astype(F16) for x in (q, k, v)]
    assert_linear_close(*run(executor, *half, **options), *half, **options)


# (heads of q, k, v): multi-head, grouped with one state a group, multi-query, more values than keys, more keys, and
# fewer queries than states.
HEADS = ((3, 3, 3), (6, 2, 2), (5, 1, 1), (2, 2, 6), (12, 4, 1), (1, 3, 1))


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dtype", (BF16, F32), ids=str)
def test_heads(executor, dtype, heads):
    rng = np.random.default_rng(4)
    q, k, v = qkv(rng, dtype, 67, heads, (32, 32), batch=1)
    decay = decay_like(rng, k, v, "token")
    out, state = run(executor, q, k, v, decay=decay)
    states = max(heads[1:])
    assert out.shape[2] == max(heads[0], states) and state.s.shape[1] == states
    assert_linear_close(out, state, q, k, v, decay=decay)


@pytest.mark.parametrize(("dtype", "count"), ((F16, 11), (F32, 11), (F64, 9)), ids=str)
def test_more_heads_than_a_cta_takes(executor, dtype, count):
    rng = np.random.default_rng(5)
    q, k, v = qkv(rng, dtype, 33, (count, 1, 1), (32, 32), batch=1)
    initial = state_like(rng, k, v)
    assert_linear_close(*run(executor, q, k, v, initial_state=initial), q, k, v, initial_state=initial)


SOME_DIMS = ((1, 1), (33, 70), (100, 40), (128, 128), (200, 65), (256, 256))
OF_DIMS = [(dtype, kind, dims) for dtype, kind in ((F16, "token"), (F32, "channel")) for dims in SOME_DIMS]


@pytest.mark.parametrize(("dtype", "kind", "dims"), [*OF_DIMS, (F16, "channel", (100, 40))], ids=str)
def test_head_dims(executor, dtype, kind, dims):
    rng = np.random.default_rng(6)
    q, k, v = qkv(rng, dtype, 35, (2, 1, 1), dims, batch=1)
    options = {"decay": decay_like(rng, k, v, kind), "initial_state": state_like(rng, k, v)}
    assert_linear_close(*run(executor, q, k, v, **options), q, k, v, **options)


@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), ((5, 70), (70, 5), (300, 40), (0, 9), (9, 0), (1, 1)))
def test_every_query_reads_the_last_state(executor, dtype, seqlen_q, seqlen_k):
    rng = np.random.default_rng(7)
    q, k, v = qkv(rng, dtype, seqlen_q, (4, 2, 2), (32, 32), batch=1, seqlen_k=seqlen_k)
    for initial in (None, state_like(rng, k, v)):
        options = {"causal": False, "initial_state": initial}
        assert_linear_close(*run(executor, q, k, v, **options), q, k, v, **options)


LAYOUTS = (
    Layout(order=(0, 2, 1, 3)),
    Layout(pad=(1, 2, 1, 8), offset=8),
    Layout(pad=(1, 1, 1, 3), offset=1),
    Layout(order=(3, 1, 2, 0)),
)


@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=range(len(LAYOUTS)))
def test_strides(executor, dtype, layout):
    """Padding and surroundings hold NaN; out keeps to its own elements."""
    rng = np.random.default_rng(8)
    q, k, v = qkv(rng, dtype, 66, (2, 1, 2), (32, 32))
    decay = decay_like(rng, k, v, "token")
    placed = [executor.array(place(x, layout)) for x in (q, k, v)]
    turned = executor.array(place(decay.astype(np.float32), Layout(order=(2, 1, 0), pad=(0, 1, 1))))
    out = executor.guarded(v.shape, dtype, layout)
    result = cuattn.linear_attention(*placed, decay=turned, out=out.array)
    assert result is out.array
    out.check()
    assert_linear_close(executor.numpy(result), None, q, k, v, decay=decay.astype(np.float32))


@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
def test_empty(executor, dtype):
    for batch, seqlen, heads in ((0, 5, 2), (2, 0, 2), (1, 5, 0)):
        q, k, v = (executor.xp.zeros((batch, seqlen, heads, 16), dtype) for _ in range(3))
        out, state = cuattn.linear_attention(q, k, v, return_state=True)
        assert out.shape == q.shape and state.s.shape == (batch, heads, 16, 16)
        assert not executor.numpy(state.s).any() and not executor.numpy(state.z).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_denominators_give_zero(executor, dtype):
    """Keys of which relu leaves nothing, and a query of which it leaves nothing."""
    rng = np.random.default_rng(9)
    q, k, v = qkv(rng, dtype, 40, dims=(32, 32), batch=1)
    k[:, :20] = -np.abs(k[:, :20])
    q[:, 30] = -1
    out, state = run(executor, q, k, v, feature_map="relu")
    assert not out[:, :20].any() and not out[:, 30].any() and out[:, 31].all()
    assert_linear_close(out, state, q, k, v, feature_map="relu")


def test_large_sums_in_float16(executor):
    """A state, weights and sums of keys beyond the largest float16 number, 65504."""
    rng = np.random.default_rng(10)
    q, k, v = qkv(rng, F16, 70, dims=(64, 64), batch=1)
    k, v = k * F16.type(40), np.abs(v) * F16.type(90)
    for options in ({"feature_map": "elu1"}, {"feature_map": "square", "normalize": False, "scale": 2e-5}):
        if options["feature_map"] == "elu1":
            past = np.full((1, 2, 64, 64), 1e6, F32), np.full((1, 2, 64), 1e5, F32)
            options["initial_state"] = cuattn.LinearState(*past)
        out, _ = run(executor, q, k, v, **options)
        assert np.isfinite(out).all()
        expected, _ = cuattn.reference.linear_attention(q, k, v, **options)
        np.testing.assert_allclose(out, expected, rtol=0, atol=4e-3 * np.abs(expected).max())


@pytest.mark.parametrize(("dtype", "kind"), ((F16, "token"), (F16, "channel"), (F32, "token")), ids=str)
def test_same_bits(executor, dtype, kind):
    """Again, with random moments of asynchronous copies and orders of warps, and with other chunks asked for."""
    rng = np.random.default_rng(11)
    q, k, v = qkv(rng, dtype, 100, (2, 1, 1), (32, 32), batch=1)
    decay = decay_like(rng, k, v, kind)
    arrays = [on(executor, x) for x in (q, k, v, decay)]
    first = executor.numpy(cuattn.linear_attention(*arrays[:3], decay=arrays[3]))
    for asynchrony, seed in (("eager", 0), ("random", 1), ("random", 2)):
        with executor.active(asynchrony=asynchrony, seed=seed):
            again = executor.numpy(cuattn.linear_attention(*arrays[:3], decay=arrays[3]))
        np.testing.assert_array_equal(again, first)
    for chunk in (16, 32, 64, 128):
        out = executor.numpy(cuattn.linear_attention(*arrays[:3], decay=arrays[3], chunk=chunk))
        assert_linear_close(out, None, q, k, v, decay=decay)
