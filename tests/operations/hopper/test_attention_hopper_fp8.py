"""The Hopper forward kernel on e4m3 arrays: both products in 8 bits, right by the rule of ``precision="fp8"``."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from attention_calls import prepare
from hypothesis import given
from hypothesis import strategies as st

import cuattn
from cuattn import host, reference
from cuattn.errors import ArgumentError, DTypeError, LaunchError, NotSupportedError
from cuattn.ops.attention.forward.hopper_config import HOPPER_FWD_CONFIGS
from cuattn.testing import assert_attention_close, assert_varlen_close, kernels
from cuattn.testing.strategies import VALUE_KINDS, examples, fill

E4M3, E5M2 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)
ROWS = [row for row in HOPPER_FWD_CONFIGS if row.itemsize == 1]
#: One consumer, whose tiles of 64 by 128 are soon full.
SMALL = ROWS[0]
FP8 = {"precision": "fp8"}
DESCALES = ("q_descale", "k_descale", "v_descale")


def make(seqlens, *, heads=(1, 1), head_dims=(64, 64), batch=1, seed=0, kind="normal"):
    rng = np.random.default_rng(seed)
    return [fill((batch, seqlens[i > 0], heads[i > 0], head_dims[i > 1]), E4M3, kind, rng) for i in range(3)]


def call(executor, *arrays, config=SMALL, **options):
    arrays, options = prepare(executor, arrays, {**FP8, **options})
    out, lse = kernels.attention(*arrays, config=config, return_lse=True, **options)
    return executor.numpy(out), executor.numpy(lse)


def assert_right(executor, *arrays, config=SMALL, **options):
    out, lse = call(executor, *arrays, config=config, **options)
    assert_attention_close(out, *arrays, lse=lse, **FP8, **options)
    return out, lse


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"d{row.max_head_dim}_{row.block_m}x{row.block_n}")
def test_every_row(executor, row):
    """Two blocks of queries and three tiles of keys, the last of both cut."""
    head_dim = min(row.max_head_dim, 256)
    seqlens = row.block_m + 5, 2 * row.block_n + 33
    assert_right(executor, *make(seqlens, head_dims=(head_dim, row.max_head_dim_v)), config=row, causal=True)


@pytest.mark.parametrize("asynchrony, seed", [("eager", 1), ("late", 2), ("random", 3), ("random", 4)])
def test_checkers_and_schedules(asynchrony, seed):
    """Nothing is read before it has landed, whoever runs first; and the bits are always the same."""
    arrays = make((70, 300), heads=(2, 1))
    options = {**FP8, "config": SMALL, "causal": True, "return_lse": True}
    expected = kernels.attention(*arrays, **options)
    with host.check("all"), host.schedule(asynchrony, seed):
        got = kernels.attention(*arrays, **options)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(one.view(np.uint8), other.view(np.uint8))


@pytest.mark.parametrize("seqlen_k", [1, 15, 31, 32, 33, 127, 128, 129])
def test_key_counts_around_groups_and_tiles(executor, seqlen_k):
    assert_right(executor, *make((3, seqlen_k), seed=seqlen_k))


@pytest.mark.parametrize("head_dims", [(16, 16), (64, 128), (80, 48), (128, 64), (96, 112)])
def test_head_dims(executor, head_dims):
    assert_right(executor, *make((9, 150), head_dims=head_dims))


OPTIONS = {
    "causal": {"causal": True},
    "window": {"window": (40, 9)},
    "softcap": {"softcap": 3.0},
    "alibi": {"alibi_slopes": np.array([0.25, 0.5], np.float32), "causal": True},
    "sinks": {"sinks": np.array([2.0, -1.0], np.float32)},
    "negative_scale": {"scale": -0.2},
    "no_scale": {"scale": 0.0},
    "everything": {
        **{"softcap": 5.0, "alibi_slopes": np.array([0.1, 0.2], np.float32), "window": (90, 30)},
        **{"sinks": np.array([0.5, 1.0], np.float32), "diagonal_offset": 3},
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(executor, name):
    assert_right(executor, *make((75, 200), heads=(2, 1)), **OPTIONS[name])


@pytest.mark.parametrize("given_names", [*((name,) for name in DESCALES), DESCALES], ids="-".join)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_descales_belong_to_batch_and_kv_head(executor, given_names, softcap):
    rng = np.random.default_rng(1)
    descales = {name: np.exp2(rng.uniform(-2, 1, (2, 2))).astype(np.float32) for name in given_names}
    assert_right(executor, *make((5, 60), heads=(4, 2), batch=2), softcap=softcap, **descales)


def test_constant_values_come_back(executor):
    """The mean of one number is that number but for the rounding of probabilities, whatever the descales."""
    q, k, v = make((64, 256))
    v = np.full_like(v, 2.0)
    out, _ = assert_right(executor, q, k, v, v_descale=np.full((1, 1), 0.5, np.float32))
    assert np.abs(out.astype(np.float32) - 1).max() < 1 / 16


def test_small_probabilities_count(executor):
    """A thousand keys, each with 2^-10 of the weight of the largest: without a factor, e4m3 would lose them all."""
    q, k, v = make((1, 1024))
    q[:], k[:], v[:] = 0, 0, 0
    q[..., 0], k[0, 0, 0, 0], v[0, 1:] = 1.0, 1.0, 1.0
    scale = float(np.log(2.0**10))
    out, _ = assert_right(executor, q, k, v, scale=scale)
    expected, _ = reference.attention(q, k, v, scale=scale)
    assert expected.max() > 0.4
    np.testing.assert_allclose(out.astype(np.float64), expected, rtol=1 / 16)


def test_lse_is_that_of_unrounded_probabilities(executor):
    q, k, v = make((20, 300), seed=4)
    _, lse = call(executor, q, k, v)
    _, expected = reference.attention(q, k, v)
    np.testing.assert_allclose(lse, expected, atol=2e-5)


def test_special_values_are_where_they_are_in_the_reference(executor):
    q, k, v = make((66, 140), seed=2)
    v[0, 3, 0, 5] = np.nan
    q[0, 65, 0, 0] = np.nan
    assert_right(executor, q, k, v)
    assert_right(executor, q, k, v, causal="top_left")


STARTS = np.array([0, 40, 40, 170], np.int32), np.array([0, 50, 90, 230], np.int32)


@pytest.mark.parametrize("row", [SMALL, ROWS[3]], ids=["small", "large"])
def test_packed_sequences(executor, row):
    """NaN in the keys and values of a sequence stay in it: no tile takes them along from behind another's end."""
    rng = np.random.default_rng(3)
    q, k, v = (fill((n, heads, 64), E4M3, "normal", rng) for n, heads in ((170, 2), (230, 1), (230, 1)))
    for x in (k, v):
        x[50:90] = np.nan  # of the sequence without queries
    arrays, options = prepare(executor, [q, k, v, *STARTS], {**FP8, "causal": True})
    out, lse = kernels.attention_varlen(*arrays, config=row, return_lse=True, **options)
    out, lse = executor.numpy(out), executor.numpy(lse)
    assert_varlen_close(out, q, k, v, *STARTS, lse=lse, causal=True, **FP8)


@examples(6)
@given(data=st.data())
def test_random_problems(executor, data):
    draw = data.draw
    heads = draw(st.sampled_from([(1, 1), (2, 2), (4, 2), (6, 1)]))
    seqlens = draw(st.tuples(st.integers(1, 140), st.integers(1, 280)))
    head_dims = draw(st.tuples(*2 * [st.sampled_from([16, 48, 64, 112, 128])]))
    kind = draw(st.sampled_from(VALUE_KINDS))
    options = {"causal": draw(st.booleans()), "window": draw(st.sampled_from([None, (30, 5), (None, 60)]))}
    arrays = make(seqlens, heads=heads, head_dims=head_dims, seed=draw(st.integers(0, 1000)), kind=kind)
    assert_right(executor, *arrays, **options)


def test_only_on_request():
    """Without precision="fp8" probabilities keep the bits that they have in the portable kernel."""
    q, k, v = make((1000, 1000), head_dims=(128, 128))
    path = cuattn.forward_path(q, k, v, arch="sm_90a")
    assert path.kernel == "attention_forward" and "fp8" in path.reason
    path = cuattn.forward_path(q, k, v, arch="sm_90a", **FP8)
    assert path.kernel == "attention_forward_hopper" and path.row in ROWS
    masked = cuattn.forward_path(q, k, v, arch="sm_90a", mask=np.ones(1000, bool), **FP8)
    assert masked.kernel == "attention_forward" and "mask" in masked.reason


def test_other_architectures_may_round_less():
    """The portable kernel serves the same call, by the stricter rule."""
    arrays = make((40, 70))
    out = cuattn.attention(*arrays, **FP8)
    assert_attention_close(out, *arrays)


def test_wrong_calls():
    arrays = make((4, 4))
    with pytest.raises(NotSupportedError, match='products of 8 bits are for precision="fp8"'):
        kernels.attention(*arrays, config=SMALL)
    with pytest.raises(LaunchError, match="elements of 2 bytes; the call has float8_e4m3fn"):
        kernels.attention(*arrays, config=HOPPER_FWD_CONFIGS[0], **FP8)
    for other in (np.float16, np.float32, E5M2):
        with pytest.raises(DTypeError, match="precision='fp8' is for float8_e4m3fn"):
            cuattn.attention(*(x.astype(other) for x in arrays), **FP8)
    with pytest.raises(ArgumentError, match="'tf32' and 'fp8'"):
        cuattn.attention(*arrays, precision="fp4")
