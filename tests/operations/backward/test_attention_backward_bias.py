"""The gradient of a bias: every shape that broadcasts, every dtype, and numbers that are none."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from backward_calls import after_forward, assert_right, call_backward, same_bits
from backward_formats import BF16, DIM, F16, F32, F64
from packed_sequences import LENGTHS, pack
from test_attention_backward import normal

import cuattn
from cuattn import host
from cuattn.ops.attention.backward import bias_launch
from cuattn.ops.attention.backward.bias_config import BIAS_BWD_CONFIGS
from cuattn.runtime.executor import HostExecutor
from cuattn.testing.arrays import Layout, place
from cuattn.testing.options import BIAS_DTYPES, broadcast_shapes, make_bias, make_mask, make_slopes
from cuattn.testing.strategies import fill

FULL = 2, 2, 70, 135
SHAPES = [*broadcast_shapes(FULL), (2, 1, 70, 135), (1, 2, 1, 135)]
FEW_SHAPES = (70, 135), (2, 1, 1, 135), (1, 2, 70, 1), (2, 1, 1)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def with_bias(executor, dtype, shape, *, full=FULL, kind="infinities", bias_dtype=F32, head_dims=(32, 32), **options):
    """What forward saves of a call with a bias of `shape`; two query heads share a key head."""
    batch, heads, *seqlens = full
    bias = make_bias(np.random.default_rng(7), shape, bias_dtype, kind if shape else "normal")
    arrays = normal(dtype, batch, seqlens, (heads, max(heads // 2, 1)), head_dims)
    return after_forward(executor, *arrays, bias=bias, **options)


def dbias_of(executor, saved, **extra):
    return call_backward(executor, saved, return_dbias=True, **extra).dbias


def every_option(shape):
    rng = np.random.default_rng(1)
    return {
        "mask": make_mask(rng, FULL, "blocks", 64),
        "alibi_slopes": make_slopes(rng, (2,)),
        "sinks": np.float32([0.0, -np.inf]),
        "softcap": 5.0,
        "window": (50, 30),
        "diagonal_offset": np.int32([60, -20]),
        "dropout_p": 0.2,
        "dropout_seed": 5 + len(shape),
    }


# --- shapes and dtypes ------------------------------------------------------------------------------------------------


@pytest.mark.smoke
@shapes
@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
def test_summed_over_what_was_broadcast(executor, dtype, shape):
    saved = with_bias(executor, dtype, shape)
    dbias = assert_right(executor, saved, return_dbias=True).dbias
    assert dbias.shape == shape and dbias.dtype == F32


@pytest.mark.parametrize("shape", FEW_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
def test_beside_every_other_option(executor, dtype, shape):
    saved = with_bias(executor, dtype, shape, kind="normal", **every_option(shape))
    assert_right(executor, saved.but(dlse=fill(saved.lse.shape, F32, "normal", np.random.default_rng(3))),
                 return_dbias=True)  # fmt: skip


@pytest.mark.parametrize("bias_dtype", BIAS_DTYPES, ids=str)
def test_dtypes_of_the_bias(executor, bias_dtype):
    for dtype, full in ((F16, FULL), (F64, (2, 1, 17, 40)))[: 1 + (bias_dtype == F16)]:
        for shape in (full[1:], full[3:]):
            saved = with_bias(executor, dtype, shape, full=full, bias_dtype=bias_dtype)
            assert assert_right(executor, saved, return_dbias=True).dbias.dtype == bias_dtype


@pytest.mark.parametrize(("dtype", "options"), [(BF16, {}), (F32, {"precision": "tf32"})], ids=["bfloat16", "tf32"])
def test_other_products(executor, dtype, options):
    for shape in FEW_SHAPES[:2]:
        assert_right(executor, with_bias(executor, dtype, shape, **options), return_dbias=True)


@pytest.mark.parametrize("narrow", (F16, BF16), ids=str)
def test_doubles_are_rounded_once(executor, narrow):
    """One key, Delta = 0 by dlse = rowsum(dout out): dS = P dout v is the product of two doubles, any of which may lie
    beside a tie of the narrow type. By way of float, those within 2^-24 of the tie would go to its wrong side."""
    step = float(ml_dtypes.finfo(narrow).eps)
    near = [0.0, 2.0**-40, -(2.0**-40), 2.0**-30]
    v = np.array([1 + (i + 0.5) * step + e for i in range(3) for e in near] + [1e300, -1e300, 0.0], F64)
    batch = v.size
    q, dout = np.zeros((batch, 1, 1, 8)), np.ones((batch, 1, 1, 8))
    v = np.pad(v.reshape(batch, 1, 1, 1), [(0, 0)] * 3 + [(0, 7)])
    bias = np.zeros((batch, 1, 1, 1), narrow)
    saved = after_forward(executor, q, q, v, dout=dout, bias=bias)
    dbias = dbias_of(executor, saved.but(out=np.zeros_like(v)))
    with np.errstate(over="ignore"):
        expected = v[..., 0].astype(narrow) if narrow == F16 else np.array([_to_bfloat16(x) for x in v[..., 0].ravel()])
    np.testing.assert_array_equal(dbias.ravel().astype(F64), expected.ravel().astype(F64))


def _to_bfloat16(x):
    """The nearest bfloat16, ties to even. The cast of ml_dtypes goes by way of float."""
    if x == 0 or abs(x) > 3.4e38:
        return np.float32(x if x == 0 else math.copysign(math.inf, x))
    unit = 2.0 ** (math.frexp(x)[1] - 8)
    return np.float32(round(x / unit) * unit)


def test_a_view_that_is_broadcast_already_is_taken_by_its_shape(executor):
    """The gradient of np.broadcast_to(bias, full) has the full shape: nothing is summed."""
    saved = with_bias(executor, F16, FULL, kind="normal")
    bias = saved.options["bias"][0, 0]
    viewed = saved.but(options={"bias": np.broadcast_to(bias, FULL)})
    dense = saved.but(options={"bias": np.broadcast_to(bias, FULL).copy()})
    dbias = dbias_of(executor, viewed)
    assert dbias.shape == FULL and dbias.flags.c_contiguous
    assert dbias.tobytes() == dbias_of(executor, dense).tobytes()


@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
def test_where_the_arrays_lie(executor, dtype):
    """Odd head dims, rows that are not aligned, and a bias with gaps: the gradient is the same."""
    saved = with_bias(executor, dtype, FULL, kind="normal", head_dims=(31, 17))
    expected = assert_right(executor, saved, return_dbias=True)
    layout = Layout(order=(0, 2, 1, 3), pad=(0, 1, 2, 3), offset=1)
    moved = {name: place(getattr(saved, name), layout) for name in ("q", "k", "v", "out")}
    bias = place(saved.options["bias"], Layout(order=(3, 0, 1, 2), pad=(1, 0, 2, 0), offset=1)).array
    assert same_bits(call_backward(executor, saved.but(**moved, options={"bias": bias}), return_dbias=True), expected)


ROWS = [(row, dtype, options)
        for dtype, products, options in ((F16, "mma", {}), (F32, "mma", {"precision": "tf32"}), (F32, "fma", {}),
                                         (F64, "fma", {}))
        for row in BIAS_BWD_CONFIGS if row.products == products and row.itemsize == dtype.itemsize]  # fmt: skip


@pytest.mark.parametrize(("row", "dtype", "options"), ROWS, ids=str)
def test_every_row(executor, monkeypatch, row, dtype, options):
    """Right with and without sums over the rows and columns of a tile."""
    monkeypatch.setattr(bias_launch, "select", lambda *_, **__: row)
    for shape in ((2, 37, 70), ()):
        assert_right(executor, with_bias(executor, dtype, shape, full=(1, 2, 37, 70), **options), return_dbias=True)


@pytest.mark.parametrize(("dtype", "head_dims"), [(F16, (256, 255)), (F64, (250, 3))], ids=str)
def test_large_head_dims(executor, dtype, head_dims):
    saved = with_bias(executor, dtype, (2, 37, 70), full=(1, 2, 37, 70), head_dims=head_dims)
    assert_right(executor, saved, return_dbias=True)


# --- what is hidden or not there --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
@pytest.mark.parametrize("options", ({"causal": True}, {"window": (20, 3)}, {"mask": True}), ids=str)
def test_what_is_hidden_is_exactly_zero(executor, dtype, options):
    if "mask" in options:
        options = {"mask": make_mask(np.random.default_rng(0), FULL, "sparse")}
        seen = options["mask"]
    else:
        seen = np.broadcast_to(cuattn.reference.visible(*FULL[2:], **options), FULL)
    saved = with_bias(executor, dtype, FULL, kind="normal", **options)
    dbias = assert_right(executor, saved, return_dbias=True).dbias
    assert not dbias[~seen].any() and (dbias[seen] != 0).mean() > 0.99
    assert not np.signbit(dbias[~seen]).any()


@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
def test_rows_that_are_not_there_give_nothing(executor, dtype):
    """With negative slopes logits rise with the distance: in the padding of the last tile of queries, without end."""
    saved = with_bias(executor, dtype, (2, 1, 1, 135), kind="normal", alibi_slopes=np.float32([-2.0, -3.0]))
    assert_right(executor, saved, return_dbias=True)


def test_a_row_that_is_nan_stays_alone(executor):
    """A +inf in the bias: NaN for what its query sees, 0 for what it does not, and all other rows are right."""
    for dtype in (F16, F32):
        saved = with_bias(executor, dtype, (70, 135), kind="normal", causal=True)
        bias = saved.options["bias"]
        bias[5, 3] = np.inf
        arrays = saved.arrays[1:4]
        dbias = assert_right(
            executor, after_forward(executor, *arrays, dout=saved.dout, **saved.options), return_dbias=True
        ).dbias
        seen = np.arange(135) <= 5 + 65
        assert np.isnan(dbias[5, seen]).all() and not dbias[5, ~seen].any() and np.isfinite(dbias[6:]).all()


@pytest.mark.parametrize("full", ((0, 2, 5, 7), (2, 0, 5, 7), (2, 2, 0, 7), (2, 2, 5, 0), (1, 1, 1, 1)), ids=str)
def test_extents_of_zero_and_one(executor, full):
    for shape in dict.fromkeys(broadcast_shapes(full)[::2]):
        dbias = assert_right(executor, with_bias(executor, F16, shape, full=full), return_dbias=True).dbias
        assert dbias.shape == shape
        if 0 in full:
            assert not dbias.any()


@pytest.mark.parametrize("shape", [(65_537, 1, 1, 1), (1,)], ids=str)
def test_more_batch_entries_than_an_axis_of_a_grid_may_have(executor, monkeypatch, shape):
    """One query and one key whose probability is 1: dS = dout v. On the host only the kernels of dbias run, in the
    smallest CTAs that there are, and without a checker."""
    monkeypatch.setattr(bias_launch, "select", lambda *_, **__: BIAS_BWD_CONFIGS[-1])
    rng = np.random.default_rng(2)
    dout, v = (rng.integers(-8, 9, (65_537, 1, 1, 1)).astype(F64) for _ in range(2))
    zeros = np.zeros_like(v)
    lse = zeros[..., 0]
    start = HostExecutor._start

    def only_bias(self, kernel, *launch):
        if kernel.entry.startswith("cuattn_attention_backward_bias"):
            start(self, kernel, *launch)

    arrays = [executor.array(x) for x in (dout, zeros, zeros, v, zeros, lse)]
    bias = executor.array(np.zeros(shape))
    size = cuattn.attention_backward_workspace_size(*arrays[1:4], bias=bias, return_dbias=True)
    outs = {name: executor.array(np.zeros_like(v)) for name in ("dq", "dk", "dv")}
    outs["workspace"] = executor.array(np.zeros(size, np.uint8))
    with host.check(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostExecutor, "_start", only_bias)
        grads = cuattn.attention_backward(*arrays, bias=bias, return_dbias=True, **outs)
    expected = (dout * v).sum(axis=0 if shape == (1,) else ()).reshape(shape)
    np.testing.assert_array_equal(executor.numpy(grads.dbias), expected)


# --- packed sequences -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
def test_packed(executor, name, dtype):
    """By positions in the sequence; 0 where no sequence reaches."""
    lengths = LENGTHS[name]
    full = len(lengths), 2, *(max(own) + 3 for own in zip(*lengths, strict=True))
    arrays, starts = pack(lengths, dtype)
    limits = {"max_seqlen_q": full[2], "max_seqlen_k": full[3]}
    for shape in broadcast_shapes(full)[:: 2 if name == "mixed" else 4]:
        bias = make_bias(np.random.default_rng(4), shape, F32, "infinities" if shape else "normal")
        saved = after_forward(executor, *arrays, *starts, bias=bias, causal=True, **limits)
        dbias = assert_right(executor, saved, return_dbias=True).dbias
        if shape[2:] == full[2:]:
            assert not dbias[..., -3:, :].any() and not dbias[..., -3:].any()


# --- order and work ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
def test_same_bits_in_any_schedule(executor, dtype):
    for shape in FEW_SHAPES:
        saved = with_bias(executor, dtype, shape)
        expected = call_backward(executor, saved, return_dbias=True)
        for asynchrony, seed in (("random", 2), ("eager", 4)):
            with executor.active(asynchrony=asynchrony, seed=seed):
                assert same_bits(call_backward(executor, saved, return_dbias=True), expected), (shape, seed)


def test_a_logit_of_infinity_is_felt_by_those_who_see_it(executor, format_):
    """lse is NaN there; what is hidden in the same row is exactly 0."""
    dtype, more = format_
    rng = np.random.default_rng(6)
    bias = np.zeros((70, 80), np.float32)
    bias[5, 7] = bias[40, 60] = np.inf
    bias[5, 20:] = -np.inf
    mask = rng.random((70, 80)) < 0.8
    mask[[5, 40], [7, 60]] = True
    saved = after_forward(executor, *normal(dtype, 1, (70, 80), (2, 1), DIM), bias=bias, mask=mask, **more)
    grads = assert_right(executor, saved, return_dbias=True)
    assert np.isnan(grads.dq).any() and np.isnan(grads.dk).any()
    assert np.isfinite(grads.dk[0, 30]).all() or mask[40, 30]
