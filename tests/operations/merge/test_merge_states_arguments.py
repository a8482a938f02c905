"""merge_states: out=, in place, empty arrays, and what is refused before anything is launched."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from simulated_cupy import installed

import cuattn
from cuattn import errors
from cuattn.testing.arrays import Layout, place
from cuattn.testing.merging import assert_merge_close


def make(num_parts=2, batch=(2,), seqlen=5, num_heads=3, head_dim=40, dtype=np.float32):
    rng = np.random.default_rng(0)
    lse_dtype = np.float64 if dtype == np.float64 else np.float32
    outs = rng.standard_normal((num_parts, *batch, seqlen, num_heads, head_dim)).astype(dtype)
    return outs, rng.standard_normal((num_parts, *batch, num_heads, seqlen)).astype(lse_dtype)


# --- out= ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_parts", [2, 24])  # 24: several groups share the parts of a row
@pytest.mark.parametrize("head_dim", [40, 300])  # 300: several passes over the columns
@pytest.mark.parametrize("layout", [Layout(), Layout(pad=(1, 1, 1, 1, 3), offset=1)], ids=["plain", "padded"])
def test_in_place(executor, num_parts, head_dim, layout):
    """Into the first of the stacked parts."""
    outs, lses = make(num_parts, head_dim=head_dim)
    guarded = place(outs, layout).to(executor.xp)
    x, y = guarded.array, executor.array(lses.copy())
    out, lse = cuattn.merge_states(x, y, out=(x[0], y[0]))
    guarded.check()
    assert_merge_close((out, lse), outs, lses)
    np.testing.assert_array_equal(executor.numpy(x)[1:], outs[1:])
    np.testing.assert_array_equal(executor.numpy(y)[1:], lses[1:])


def test_running_merge_of_two_in_place(executor):
    outs, lses = make(3)
    states = [(executor.array(out.copy()), executor.array(lse.copy())) for out, lse in zip(outs, lses, strict=True)]
    total = states[0]
    for state in states[1:]:
        result = cuattn.merge_states(*total, *state, out=total)
        assert result[0] is total[0] and result[1] is total[1]
    assert_merge_close(total, outs, lses, levels=2)


def test_outs_whose_last_axis_is_strided(executor):
    """The results too: through copies."""
    outs, lses = make(2)
    turned = executor.array(place(outs, Layout(order=(0, 4, 1, 2, 3))))
    out = executor.guarded(outs.shape[1:], np.float32, Layout(order=(3, 0, 1, 2)))
    lse = executor.guarded(lses.shape[1:], np.float32, Layout(order=(2, 0, 1), pad=(1, 1, 1)))
    result = cuattn.merge_states(turned, executor.array(lses), out=(out.array, lse.array))
    assert result[0] is out.array
    out.check()
    lse.check()
    assert_merge_close(result, outs, lses)


def test_unaligned_elements(executor):
    if executor.name != "host":
        pytest.skip("CuPy arrays are aligned to their elements")
    outs, lses = make(2)
    record = np.dtype([("byte", np.uint8), ("number", np.float32)])
    x, y, out, lse = (np.zeros(a.shape, record) for a in (outs, lses, outs[0], lses[0]))
    x["number"], y["number"] = outs, lses
    result = cuattn.merge_states(x["number"], y["number"], out=(out["number"], lse["number"]))
    assert_merge_close(result, outs, lses)


def test_sinks_of_any_float_dtype(executor):
    outs, lses = make(2)
    sinks = np.array([0.5, -1, 2])
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64):
        strided = executor.array(np.repeat(sinks.astype(dtype), 2))[::2]
        result = cuattn.merge_states(executor.array(outs), executor.array(lses), sinks=strided)
        assert_merge_close(result, outs, lses, sinks=sinks)


@pytest.mark.parametrize("empty", ["batch", "seqlen", "num_heads", "head_dim", "num_parts"])
def test_zero_length_axes(executor, empty):
    outs, lses = make(**{empty: (0,) if empty == "batch" else 0})
    out, lse = cuattn.merge_states(executor.array(outs), executor.array(lses))
    assert out.shape == outs.shape[1:] and lse.shape == lses.shape[1:]
    if empty == "head_dim":  # there is still a log-sum-exp
        np.testing.assert_allclose(executor.numpy(lse), np.logaddexp(*lses), rtol=1e-6)
    if empty == "num_parts":
        assert (executor.numpy(out) == 0).all() and (executor.numpy(lse) == -np.inf).all()


# --- what is refused -------------------------------------------------------------------------------------------------


def test_overlap_is_refused(executor):
    outs, lses = (executor.array(x) for x in make(3))
    before = executor.numpy(outs).copy()
    for out, lse, named in (
        (outs[1], lses[0], r"out\[0\]"),
        (outs[0], lses[1], r"out\[1\]"),
        (outs[0][:, ::-1], lses[0], r"out\[0\]"),
        (executor.xp.empty_like(outs[0]), outs[0, :, :, :, 0].swapaxes(1, 2), r"out\[1\]"),
    ):
        with pytest.raises(errors.OverlapError, match=named):
            cuattn.merge_states(outs, lses, out=(out, lse))
    with pytest.raises(errors.OverlapError, match=r"out\[0\]"):
        cuattn.merge_states(outs[0], lses[0], outs[1], lses[1], out=(outs[1], lses[0]))
    sinks = executor.xp.zeros(3, np.float32)
    with pytest.raises(errors.OverlapError, match=r"out\[1\]"):
        cuattn.merge_states(
            outs[:, :1, :1], lses[:, :1, :, :1], sinks=sinks, out=(outs[0, :1, :1].copy(), sinks.reshape(1, 3, 1))
        )
    out = executor.xp.empty(outs.shape[1:], np.float32)
    with pytest.raises(errors.OverlapError, match=r"out\[1\]"):  # the two results share memory
        cuattn.merge_states(outs, lses, out=(out, out.reshape(-1)[: lses[0].size].reshape(lses[0].shape)))
    same = np.lib.stride_tricks.as_strided if executor.name == "host" else executor.xp.lib.stride_tricks.as_strided
    with pytest.raises(errors.OverlapError, match="share memory"):
        cuattn.merge_states(outs, lses, out=(same(out, out.shape, (0, *out.strides[1:])), lses[0]))
    np.testing.assert_array_equal(executor.numpy(outs), before)


def test_forms(executor):
    outs, lses = (executor.array(x) for x in make(2))
    with pytest.raises(errors.ArgumentError, match="lse_b is missing"):
        cuattn.merge_states(outs[0], lses[0], outs[1])
    with pytest.raises(errors.ArgumentError, match="out_b is missing"):
        cuattn.merge_states(outs[0], lses[0], None, lses[1])
    for out in (outs[0], (outs[0],), {"out": outs[0]}):
        with pytest.raises(errors.ArgumentError, match=r"pair of arrays \(out, lse\)"):
            cuattn.merge_states(outs, lses, out=out)


def test_bad_shapes(executor):
    outs, lses = (executor.array(x) for x in make(2))
    with pytest.raises(errors.ShapeError, match=r"lses has shape \(2, 2, 5, 3\); \(2, 2, 3, 5\)"):
        cuattn.merge_states(outs, lses.swapaxes(2, 3))
    with pytest.raises(errors.ShapeError, match=r"lses has shape \(1, .*\(2, 2, 3, 5\)"):
        cuattn.merge_states(outs, lses[:1])
    with pytest.raises(errors.ShapeError, match=r"out_b has shape \(2, 4, 3, 40\); \(2, 5, 3, 40\)"):
        cuattn.merge_states(outs[0], lses[0], outs[1, :, :4], lses[1])
    with pytest.raises(errors.ShapeError, match=r"lse_b has shape .*\(2, 3, 5\)"):
        cuattn.merge_states(outs[0], lses[0], outs[1], lses[1, :1])
    with pytest.raises(errors.ShapeError, match=r"sinks has shape \[2\]; allowed is \[3\]"):
        cuattn.merge_states(outs, lses, sinks=executor.xp.zeros(2, np.float32))
    with pytest.raises(errors.ShapeError, match=r"out\[0\] has shape .*\(2, 5, 3, 40\)"):
        cuattn.merge_states(outs, lses, out=(outs[0, :1], lses[0]))
    with pytest.raises(errors.ShapeError, match=r"outs has shape \(3, 40\), rank 2; \[S, B, N, H, E\]"):
        cuattn.merge_states(outs[0, 0, 0], lses)
    with pytest.raises(errors.ShapeError, match=r"out_a has shape \(3, 40\), rank 2; \[B, N, H, E\]"):
        cuattn.merge_states(outs[0, 0, 0], lses[0], outs[0, 0, 0], lses[0])
    wide = np.broadcast_to(np.float32(0), (1, 1, 1, 2**31))
    with pytest.raises(errors.ShapeError, match="at most 2147483647"):
        cuattn.merge_states(wide, np.zeros((1, 1, 1), np.float32))


def test_bad_dtypes(executor):
    outs, lses = (executor.array(x) for x in make(2))
    with pytest.raises(errors.DTypeError, match=r"outs has dtype int32.*float16, bfloat16, float32, float64"):
        cuattn.merge_states(outs.astype(np.int32), lses)
    with pytest.raises(errors.DTypeError, match=r"lses has dtype float64.*float32"):
        cuattn.merge_states(outs, lses.astype(np.float64))
    with pytest.raises(errors.DTypeError, match=r"lses has dtype float32.*float64"):
        cuattn.merge_states(outs.astype(np.float64), lses)
    with pytest.raises(errors.DTypeError, match=r"out_b has dtype float16.*float32"):
        cuattn.merge_states(outs[0], lses[0], outs[1].astype(np.float16), lses[1])
    with pytest.raises(errors.NonFiniteError, match="sinks holds nan"):
        cuattn.merge_states(outs, lses, sinks=[0.0, np.nan, 0.0])
    with pytest.raises(errors.NonFiniteError, match=r"sinks holds 1e\+300"):
        cuattn.merge_states(outs, lses, sinks=np.full(3, 1e300))
    with pytest.raises(errors.DTypeError, match="sinks has dtype bool"):
        cuattn.merge_states(outs, lses, sinks=executor.xp.zeros(3, np.bool_))
    with pytest.raises(errors.DTypeError, match=r"out\[0\] has dtype float64.*float32, float16, bfloat16"):
        cuattn.merge_states(outs, lses, out=(outs[0].astype(np.float64), lses[0]))
    with pytest.raises(errors.DTypeError, match=r"out\[0\] has dtype float32.*float16"):
        cuattn.merge_states(outs.astype(np.float16), lses, out=(outs[0], lses[0]))
    with pytest.raises(errors.DTypeError, match=r"out\[1\] has dtype float16.*float32"):
        cuattn.merge_states(outs, lses, out=(outs[0], lses[0].astype(np.float16)))


def test_other_byte_order_and_read_only_results():
    outs, lses = make(2)
    with pytest.raises(errors.DTypeError, match="native"):
        cuattn.merge_states(outs.astype(outs.dtype.newbyteorder()), lses)
    lse = lses[0].copy()
    lse.flags.writeable = False
    with pytest.raises(errors.ArrayTypeError, match=r"out\[1\] is read-only"):
        cuattn.merge_states(outs, lses, out=(np.empty_like(outs[0]), lse))


def test_lists_are_no_arrays():
    outs, lses = make(2)
    with pytest.raises(errors.ArrayTypeError, match="outs"):
        cuattn.merge_states(list(outs), list(lses))


# --- the CUDA side, without a GPU ------------------------------------------------------------------------------------


def test_device_arrays_without_a_synchronization(monkeypatch):
    with installed(monkeypatch) as cupy:
        outs, lses = make(3)
        sinks = np.array([0.5, -1, 2], np.float32)
        result = cuattn.merge_states(cupy.array(outs), cupy.array(lses), sinks=cupy.array(sinks))
        assert len(cupy.launches) == 1 and cupy.num_synchronizations == 0
        assert_merge_close(tuple(x.get() for x in result), outs, lses, sinks=sinks)
        with pytest.raises(errors.ArrayTypeError, match="lses"):
            cuattn.merge_states(cupy.array(outs), lses)
