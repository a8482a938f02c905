"""Differential attention on Hopper: right in every row, at every edge of its tiles, with every option that it takes.

On the host executor the kernel is forced with ``config=``; on a GPU these tests need compute capability 9.0.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
from differential_calls import BF16, F16, assert_right, call, make

import cuattn
from cuattn import compile
from cuattn.ops.attention.shipped import CAUSAL
from cuattn.ops.differential import hopper_launch
from cuattn.ops.differential.hopper_config import HOPPER_DIFFERENTIAL_CONFIGS as ROWS
from cuattn.testing import kernels
from cuattn.testing.arrays import Layout, place
from cuattn.testing.differential_tolerance import assert_differential_close

#: The row of most tests: D and E are 64 at most, tiles have 128 keys.
SMALL = ROWS[0]
RNG = np.random.default_rng(5)


def same_bits(one, other):
    return all(x.tobytes() == y.tobytes() for x, y in zip((one[0], *one[1]), (other[0], *other[1]), strict=True))


# --- every shape ------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("row", "head_dims", "dtype", "shared", "causal"),
    [(0, (64, 128), F16, True, True), (1, (128, 128), BF16, False, True), (2, (128, 256), F16, False, False)],
    ids=str,
)
def test_every_row(executor, row, head_dims, dtype, shared, causal):
    """Two tiles of queries, of which the last has few, and three of keys; tiles with and without a masked part."""
    seqlens = ROWS[row].block_m + 9, 2 * ROWS[row].block_n + 5
    q, k, v = make((1, *seqlens, 1, 1, *head_dims), dtype, shared=shared)
    assert_right(executor, q, k, v, 0.6, config=ROWS[row], causal=causal)


@pytest.mark.parametrize("shared", (False, True), ids=("v1", "v2"))
@pytest.mark.parametrize(
    "seqlens",
    ((1, 1), (63, 127), (64, 128), (65, 129), (64, 257), (66, 64), (1, 300)),
    ids=str,
)
def test_edges_of_tiles(executor, seqlens, shared):
    q, k, v = make((1, *seqlens, 1, 1, 64, 64), F16, shared=shared)
    assert_right(executor, q, k, v, 0.7, config=SMALL, causal=True)


@pytest.mark.parametrize("shared", (False, True), ids=("v1", "v2"))
@pytest.mark.parametrize("heads", ((3, 1), (10, 2)), ids=str)
def test_groups(executor, heads, shared):
    """Groups of 3 and 5 pairs; more tiles than CTAs, so that the place of the second output is used again."""
    q, k, v = make((1, 70, 40, *heads, 64, 64), F16, shared=shared)
    assert_right(executor, q, k, v, np.linspace(-0.5, 1.5, heads[0]), config=SMALL, causal=True)


@pytest.mark.parametrize("head_dims", ((8, 64), (40, 16), (64, 8)), ids=str)
def test_head_dims_are_filled_up(executor, head_dims):
    q, k, v = make((1, 66, 130, 1, 1, *head_dims), F16)
    assert_right(executor, q, k, v, 0.7, config=SMALL, causal=True, norm=True)


# --- lambda, norms, options -------------------------------------------------------------------------------------------


def test_lambda(executor):
    """A number, an array of rank 0, one for each head, one for each query of each head."""
    q, k, v = make((2, 66, 20, 3, 1, 64, 64), F16)
    of_rows = np.random.default_rng(1).random((2, 66, 3)).astype(np.float32)
    for lam in (0, -1.5, np.array(0.3), np.float32([0.1, 0.2, 0.3]), of_rows):
        assert_right(executor, q, k, v, lam, config=SMALL, causal=True)


@pytest.mark.parametrize(
    "options",
    (
        {"norm": True, "eps": 0.0},
        {"norm": True, "norm_weight": RNG.standard_normal(40).astype(np.float32), "output_scale": -0.2},
        {"output_scale": 0.25},
    ),
    ids=("norm", "weight", "scale"),
)
def test_norm(executor, options):
    """In rows that end within a bucket: what fills them up is no part of the mean, and no weight is read for it."""
    q, k, v = make((1, 40, 60, 2, 1, 64, 40), F16)
    assert_right(executor, q, k, v, 0.6, config=SMALL, causal=True, **options)


def test_equal_streams(executor):
    """Where both softmaxes are the same, lambda = 1 leaves exactly 0, also divided by its norm."""
    q, k, v = make((1, 70, 140, 2, 1, 64, 64), F16, shared=True)
    q[:, :, 1::2] = q[:, :, ::2]
    for eps in (0.0, 1e-5):
        out, _ = call(executor, q, k, v, 1.0, config=SMALL, causal=True, norm=True, eps=eps)
        assert not out.any()


#: Two options on scores at least: one kernel, that has them all, serves every call.
BOTH = {"softcap": 20.0, "alibi_slopes": np.float32([0.1, 0.4])}
OPTIONS = {
    "both": {},
    "own_slopes": {"alibi_slopes": RNG.random((1, 4)).astype(np.float32)},
    "negative_scale": {"scale": -0.4, "causal": True},
    "window": {"window": (30, 9)},
    "top_left": {"causal": "top_left"},
    "diagonal_offset": {"causal": True, "diagonal_offset": np.int32([-67])},
    "chunk": {"chunk": 37},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_option(executor, name):
    q, k, v = make((1, 70, 200, 2, 1, 64, 64), BF16)
    assert_right(executor, q, k, v, 0.6, config=SMALL, **{**BOTH, **OPTIONS[name]})


@pytest.mark.parametrize("scale", (-0.4, 0.0))
def test_scales_that_are_not_positive(executor, scale):
    q, k, v = make((1, 70, 140, 1, 1, 64, 64), F16)
    assert_right(executor, q, k, v, 0.6, config=SMALL, causal=True, scale=scale)


def test_rows_without_keys(executor):
    """Queries before the first key give 0, and so do tiles of them; their lse is -inf."""
    q, k, v = make((1, 140, 20, 2, 1, 64, 64), F16)
    out, state = assert_right(executor, q, k, v, 0.6, config=SMALL, causal=True, norm=True, eps=0.0)
    assert not out[:, :120].any() and np.isneginf(state.lse[..., :120]).all()
    assert out[:, 120:].any()


# --- what must not matter ---------------------------------------------------------------------------------------------


def test_asynchrony_and_schedule_change_no_bit(executor):
    arrays = make((1, 130, 300, 1, 1, 64, 64), F16)
    expected = call(executor, *arrays, 0.6, config=SMALL, causal=True)
    for asynchrony, seed in (("late", 1), ("random", 2), ("random", 3), ("eager", 4)):
        with executor.active(asynchrony=asynchrony, seed=seed):
            found = call(executor, *arrays, 0.6, config=SMALL, causal=True)
            assert same_bits(found, expected), (asynchrony, seed)


def test_the_order_of_tiles_changes_no_bit(executor, monkeypatch):
    """One CTA for everything, or one for each tile; heads one after the other, or all of them side by side."""
    arrays = make((2, 70, 140, 2, 1, 64, 64), F16, shared=True)
    expected = call(executor, *arrays, 0.6, config=SMALL, causal=True)
    for num_ctas, l2_bytes in ((1, 1), (3, 140 * 128 * 2), (1000, 1 << 30)):
        monkeypatch.setattr(hopper_launch, "HOST_CTAS", num_ctas)
        monkeypatch.setattr(hopper_launch, "L2_BYTES", l2_bytes)
        assert same_bits(call(executor, *arrays, 0.6, config=SMALL, causal=True), expected)


def test_a_state_changes_no_bit_of_the_result(executor):
    q, k, v = map(executor.array, make((1, 70, 140, 2, 1, 64, 64), F16))
    with_state, _ = kernels.differential_attention(q, k, v, 0.6, config=SMALL, causal=True, return_state=True)
    without = kernels.differential_attention(q, k, v, 0.6, config=SMALL, causal=True)
    assert executor.numpy(with_state).tobytes() == executor.numpy(without).tobytes()


@pytest.mark.parametrize(
    "layout",
    (Layout(order=(0, 2, 1, 3)), Layout(pad=(1, 2, 1, 8)), Layout(offset=8), Layout(order=(0, 3, 1, 2))),
    ids=("heads_first", "padded", "offset", "last_axis_strided"),
)
def test_layouts_change_no_bit(executor, layout):
    arrays = make((2, 66, 140, 2, 1, 64, 64), F16)
    expected = call(executor, *arrays, 0.6, config=SMALL, causal=True)
    placed = [place(x, layout).array for x in arrays]
    assert same_bits(call(executor, *placed, 0.6, config=SMALL, causal=True), expected)
    target = executor.guarded(expected[0].shape, F16, Layout(order=layout.order, pad=layout.pad, offset=1))
    moved = map(executor.array, arrays)
    kernels.differential_attention(*moved, 0.6, config=SMALL, causal=True, out=target.array)
    target.check()
    assert executor.numpy(target.array).tobytes() == expected[0].tobytes()


def test_nan_beyond_the_arrays_is_never_felt(executor):
    """Rows that a copy reads beyond the last key, and beyond the last query, are of the next batch entry: NaN here."""
    q, k, v = make((2, 70, 130, 1, 1, 64, 64), F16)
    for x in (q, k, v):
        x[1] = np.nan
    out, state = call(executor, q, k, v, 0.6, config=SMALL, causal=True)
    first = [x[:1] for x in (q, k, v)]
    parts = type(state)(*(x[:1] for x in state))
    assert_differential_close(out[:1], *first, 0.6, state=parts, causal=True)
    assert np.isnan(out[1]).all()


def test_tiles_that_no_query_sees_are_not_read(executor):
    """NaN in the key tiles before a window, and behind it."""
    q, k, v = make((1, 60, 640, 1, 1, 64, 64), BF16)
    options = {**BOTH, "alibi_slopes": np.float32([0.1]), "diagonal_offset": 270, "window": (10, 40)}
    for x in (k, v):
        x[:, :256] = x[:, 384:] = np.nan
    out, _ = call(executor, q, k, v, 0.6, config=SMALL, **options)
    assert np.isfinite(out.astype(np.float32)).all()


def test_gradients_take_its_state(executor):
    """The gradients of the state of this kernel and of the portable one's agree within what 16 bits lose."""
    q, k, v = make((1, 40, 70, 2, 1, 32, 32), F16)
    arrays = [executor.array(x) for x in (q, k, v)]
    grads = []
    for config in (SMALL, None):
        out, state = kernels.differential_attention(*arrays, 0.6, config=config, causal=True, return_state=True)
        grads.append(cuattn.differential_attention_backward(out, *arrays, 0.6, state, causal=True))
    for name in ("dq", "dk", "dv", "dlam"):
        one, other = (executor.numpy(getattr(x, name)).astype(np.float64) for x in grads)
        assert np.abs(one - other).max() <= 2.0**-8 * np.abs(other).max(), name


def test_registers_go_from_the_producer_to_the_consumers():
    """As many as the row says: the executor has as many as a thread asks for, a GPU has not."""
    constants = SMALL.constants("float16", 64, 64, CAUSAL, shared_keys=False)
    ptx = compile.build(SMALL.source, constants, arch="sm_90a", kind="ptx").image.decode()
    found = re.findall(r"setmaxnreg\.(inc|dec)\.sync\.aligned\.u32\s+(\d+);", ptx)
    assert sorted(found) == [("dec", f"{SMALL.producer_registers}"), ("inc", f"{SMALL.consumer_registers}")]
