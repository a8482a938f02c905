"""The padding functions: what may be told in advance, empty arrays, what is refused; the CUDA side without a GPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from simulated_cupy import installed

import cuattn
from cuattn import errors
from cuattn.testing.arrays import Layout, place

MASK = np.array([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1]], bool)
SLOTS = np.flatnonzero(MASK)


def rows(*shape, dtype=np.float32):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


# --- the plan --------------------------------------------------------------------------------------------------------


def test_repr_is_small(executor):
    plan = cuattn.padding_plan(executor.array(MASK))
    assert repr(plan) == "PaddingPlan(5 tokens in 3 x 4 slots, max_seqlen=3)"


def test_counts_that_are_right(executor):
    mask = executor.array(MASK)
    plan = cuattn.padding_plan(mask, num_tokens=5, max_seqlen=3)
    assert (plan.num_tokens, plan.max_seqlen) == (5, 3)
    assert cuattn.padding_plan(mask, num_tokens=np.int64(5), max_seqlen=4).max_seqlen == 4  # a bound is enough
    assert cuattn.padding_plan(mask, max_seqlen=3).num_tokens == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_tokens=4), "num_tokens is 4; the mask has 5 tokens"),
        (dict(num_tokens=6, max_seqlen=3), "num_tokens is 6; the mask has 5 tokens"),
        (dict(num_tokens=5, max_seqlen=2), "max_seqlen is 2; the mask has a sequence of 3 tokens"),
    ],
)
def test_counts_that_are_wrong(executor, monkeypatch, options, message):
    monkeypatch.setenv("CUATTN_CHECK", "1")  # nothing to the host, which always looks
    with pytest.raises(errors.ArgumentError, match=message):
        cuattn.padding_plan(executor.array(MASK), **options)


@pytest.mark.parametrize("count", [-1, 13, 2.0, "5", True, 2**40])
def test_counts_that_are_none(count):
    with pytest.raises(errors.ArgumentError, match=r"num_tokens is .*; an integer from 0 to 12"):
        cuattn.padding_plan(MASK, num_tokens=count)
    with pytest.raises(errors.ArgumentError, match=r"max_seqlen is .*; an integer from 0 to 4"):
        cuattn.padding_plan(MASK, num_tokens=5, max_seqlen=count)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_masks_without_slots(executor, shape):
    plan = cuattn.padding_plan(executor.xp.zeros(shape, bool))
    assert plan.indices.shape == plan.padding.shape == (0,)
    np.testing.assert_array_equal(executor.numpy(plan.cu_seqlens), np.zeros(shape[0] + 1, np.int32))
    assert (plan.num_tokens, plan.max_seqlen) == (0, 0)
    assert cuattn.remove_padding(executor.xp.zeros((*shape, 8), np.float32), plan).shape == (0, 8)
    assert cuattn.restore_padding(executor.xp.zeros((0, 8), np.float32), plan).shape == (*shape, 8)


def test_bad_masks():
    for mask in (MASK.astype(np.float32), MASK.astype(complex), MASK.astype("S1"), MASK.astype(object)):
        with pytest.raises(errors.DTypeError, match="mask has dtype"):
            cuattn.padding_plan(mask)
    for mask in (MASK[0], MASK[None], np.array(True)):
        with pytest.raises(errors.ShapeError, match="rank 2 is needed"):
            cuattn.padding_plan(mask)
    for mask in (None, MASK.tolist(), True):
        with pytest.raises(errors.ArrayTypeError, match="mask"):
            cuattn.padding_plan(mask)


@pytest.mark.parametrize("shape", [(2**16, 2**15), (1, 2**31), (2**31, 0)])
def test_more_slots_than_32_bits(shape):
    with pytest.raises(errors.ShapeError, match="at most 2147483647"):
        cuattn.padding_plan(np.broadcast_to(np.bool_(True), shape))


def test_masks_at_odd_addresses_and_of_other_byte_order():
    record = np.zeros(MASK.shape, np.dtype([("byte", np.uint8), ("mask", np.int32)]))
    record["mask"] = MASK * 7
    np.testing.assert_array_equal(cuattn.padding_plan(record["mask"]).indices, SLOTS)
    np.testing.assert_array_equal(cuattn.padding_plan(MASK.astype(np.dtype(np.int64).newbyteorder())).indices, SLOTS)


@pytest.mark.parametrize("module", [None, np], ids=["default", "numpy"])
def test_array_module_of_the_mask(module):
    np.testing.assert_array_equal(cuattn.padding_plan(MASK, array_module=module).indices, SLOTS)


@pytest.mark.parametrize("module", ["numpy", errors, 3])
def test_unknown_array_modules(module):
    with pytest.raises(errors.ArrayTypeError, match="array_module"):
        cuattn.padding_plan(MASK, array_module=module)


# --- rows ------------------------------------------------------------------------------------------------------------


def test_rows_without_elements(executor):
    plan = cuattn.padding_plan(executor.array(MASK))
    assert cuattn.remove_padding(executor.xp.zeros((3, 4, 2, 0), np.float16), plan).shape == (5, 2, 0)
    assert cuattn.restore_padding(executor.xp.zeros((5, 0), np.float16), plan).shape == (3, 4, 0)


def test_nothing_but_padding(executor):
    plan = cuattn.padding_plan(executor.array(np.zeros((2, 3), bool)))
    assert cuattn.remove_padding(executor.xp.ones((2, 3, 8), np.float16), plan).shape == (0, 8)
    padded = cuattn.restore_padding(executor.xp.ones((0, 8), np.float16), plan)
    np.testing.assert_array_equal(executor.numpy(padded), np.zeros((2, 3, 8), np.float16))


def test_bad_rows(executor):
    plan = cuattn.padding_plan(executor.array(MASK))
    for shape in ((3, 5, 8), (4, 4, 8), (12, 8), (3,)):
        with pytest.raises(errors.ShapeError, match=r"x has shape .*the plan wants \[3, 4, \.\.\.\]"):
            cuattn.remove_padding(executor.xp.zeros(shape, np.float32), plan)
    for shape in ((4, 8), (3, 4, 8), ()):
        with pytest.raises(errors.ShapeError, match=r"x has shape .*the plan wants \[5, \.\.\.\]"):
            cuattn.restore_padding(executor.xp.zeros(shape, np.float32), plan)
    with pytest.raises(errors.ArrayTypeError, match="x"):
        cuattn.remove_padding([[0.0] * 4] * 3, plan)


@pytest.mark.parametrize("dtype", [object, "S3", "V5", np.dtype([("a", np.int64), ("b", np.int16)])])
def test_bad_dtypes(dtype):
    plan = cuattn.padding_plan(MASK)
    with pytest.raises(errors.DTypeError, match=r"x has dtype .*1, 2, 4, 8, 16 bytes"):
        cuattn.remove_padding(np.zeros((3, 4), dtype), plan)
    with pytest.raises(errors.DTypeError, match="x has dtype"):
        cuattn.restore_padding(np.zeros(5, dtype), plan)


def test_bad_out(executor):
    plan, x = cuattn.padding_plan(executor.array(MASK)), executor.array(rows(3, 4, 8))
    empty = executor.xp.empty
    with pytest.raises(errors.ShapeError, match=r"out.*\(6, 8\).*\(5, 8\)"):
        cuattn.remove_padding(x, plan, out=empty((6, 8), np.float32))
    with pytest.raises(errors.DTypeError, match=r"out.*float16.*float32"):
        cuattn.remove_padding(x, plan, out=empty((5, 8), np.float16))
    with pytest.raises(errors.ArrayTypeError, match="out"):
        cuattn.remove_padding(x, plan, out=[[0.0] * 8] * 5)
    with pytest.raises(errors.OverlapError, match="out"):
        cuattn.remove_padding(x, plan, out=x.reshape(12, 8)[:5])
    with pytest.raises(errors.OverlapError, match="out"):
        cuattn.restore_padding(x.reshape(12, 8)[:5], plan, out=x)
    with pytest.raises(errors.OverlapError, match="the plan"):
        cuattn.remove_padding(executor.xp.zeros((3, 4), np.int32), plan, out=plan.indices)
    with pytest.raises(errors.OverlapError, match="the plan"):
        both = executor.xp.zeros(12, np.int32)
        both[:5], both[5:] = plan.indices, plan.padding
        kept = replace(plan, padding=both[5:])
        cuattn.restore_padding(executor.xp.zeros(5, np.int32), kept, out=both.reshape(3, 4))


def test_read_only_out():
    out = np.zeros((5, 8), np.float32)
    out.flags.writeable = False
    with pytest.raises(errors.ArrayTypeError, match=r"out.*read-only"):
        cuattn.remove_padding(rows(3, 4, 8), cuattn.padding_plan(MASK), out=out)


def test_plans_that_do_not_fit_themselves(executor):
    plan, x = cuattn.padding_plan(executor.array(MASK)), executor.array(rows(3, 4, 8))
    for broken, named in (
        (replace(plan, num_tokens=6), "plan.indices"),
        (replace(plan, indices=plan.indices.astype(np.int64)), "plan.indices"),
        (replace(plan, indices=plan.indices[::-1]), "plan.indices"),
        (replace(plan, padding=plan.padding[:-1]), "plan.padding"),
    ):
        with pytest.raises(errors.ShapeError, match=named):
            cuattn.remove_padding(x, broken)
    for plan in (None, (0, 1), MASK):
        with pytest.raises(errors.ArrayTypeError, match=r"plan.*PaddingPlan"):
            cuattn.remove_padding(x, plan)


def test_rows_that_must_be_copied(executor):
    """Two strided axes, in and out; and no copy reaches beyond the gaps."""
    mask = executor.array(MASK)
    plan = cuattn.padding_plan(mask)
    values = rows(3, 4, 3, 5, 2)
    layout, packed_layout = Layout(pad=(0, 0, 1, 1, 1)), Layout(pad=(1, 2, 1, 2))
    packed = executor.guarded((5, 3, 5, 2), np.float32, packed_layout)
    cuattn.remove_padding(executor.array(place(values, layout)), plan, out=packed.array)
    packed.check()
    np.testing.assert_array_equal(executor.numpy(packed.array), values[MASK])
    padded = executor.guarded(values.shape, np.float32, layout)
    cuattn.restore_padding(packed.array, plan, out=padded.array)
    padded.check()
    np.testing.assert_array_equal(executor.numpy(padded.array), np.where(MASK[..., None, None, None], values, 0))


# --- the CUDA side, without a GPU ------------------------------------------------------------------------------------


def test_synchronizations(monkeypatch):
    """One, and none if the number of tokens is known."""
    with installed(monkeypatch) as cupy:
        mask, x = cupy.array(MASK), cupy.array(rows(3, 4, 8))
        plan = cuattn.padding_plan(mask)
        assert cupy.num_synchronizations == 1
        assert (plan.num_tokens, plan.max_seqlen) == (5, 3)
        packed = cuattn.remove_padding(x, plan)
        cuattn.restore_padding(packed, plan)
        assert cupy.num_synchronizations == 1

        told = cuattn.padding_plan(mask, num_tokens=5)
        assert cupy.num_synchronizations == 1
        assert told.max_seqlen == 4  # of which nothing was said
        assert cuattn.padding_plan(mask, num_tokens=5, max_seqlen=3).max_seqlen == 3
        assert cupy.num_synchronizations == 1
        np.testing.assert_array_equal(told.indices.get(), SLOTS)
        np.testing.assert_array_equal(packed.get(), rows(3, 4, 8)[MASK])


def test_a_wrong_number_of_tokens_stays_inside(monkeypatch):
    with installed(monkeypatch) as cupy:
        mask, x = cupy.array(MASK), cupy.array(rows(3, 4, 8))
        for count in (0, 4, 7, 12):
            plan = cuattn.padding_plan(mask, num_tokens=count)
            packed = cuattn.remove_padding(x, plan)
            slots = np.concatenate([SLOTS, np.flatnonzero(~MASK)])[:count]
            np.testing.assert_array_equal(packed.get(), rows(3, 4, 8).reshape(12, 8)[slots])
            assert cuattn.restore_padding(packed, plan).shape == (3, 4, 8)
        monkeypatch.setenv("CUATTN_CHECK", "1")
        with pytest.raises(errors.ArgumentError, match="num_tokens is 4; the mask has 5 tokens"):
            cuattn.padding_plan(mask, num_tokens=4)


def test_a_host_mask_beside_device_data(monkeypatch):
    """Counted on the host, placed by the GPU: nothing is waited for."""
    with installed(monkeypatch) as cupy:
        plan = cuattn.padding_plan(MASK, array_module=cupy)
        assert isinstance(plan.indices, cupy.ndarray) and isinstance(plan.cu_seqlens, cupy.ndarray)
        assert (plan.num_tokens, plan.max_seqlen) == (5, 3)
        assert cupy.num_synchronizations == 0
        assert all(launch.device == 0 for launch in cupy.launches) and len(cupy.launches) == 2
        with pytest.raises(errors.ArgumentError, match="num_tokens is 6; the mask has 5 tokens"):
            cuattn.padding_plan(MASK, num_tokens=6, array_module=cupy)
        packed = cuattn.remove_padding(cupy.array(rows(3, 4, 8)), plan)
        np.testing.assert_array_equal(packed.get(), rows(3, 4, 8)[MASK])


def test_a_host_plan_beside_device_data(monkeypatch):
    with installed(monkeypatch) as cupy:
        plan = cuattn.padding_plan(MASK)
        packed = cuattn.remove_padding(cupy.array(rows(3, 4, 8)), plan)
        padded = cuattn.restore_padding(packed, plan)
        assert cupy.num_synchronizations == 0
        np.testing.assert_array_equal(padded.get(), np.where(MASK[..., None], rows(3, 4, 8), 0))


def test_places_that_do_not_fit(monkeypatch):
    with installed(monkeypatch) as cupy:
        plan = cuattn.padding_plan(cupy.array(MASK))
        with pytest.raises(errors.ArrayTypeError, match=r"x .*plan\.indices"):
            cuattn.remove_padding(rows(3, 4, 8), plan)
        with cupy.cuda.Device(1):
            x = cupy.array(rows(3, 4, 8))
        with pytest.raises(errors.ArrayTypeError, match=r"device 1.*plan\.indices.*device 0"):
            cuattn.remove_padding(x, plan)
        with pytest.raises(errors.ArrayTypeError, match=r"cupy\.asnumpy"):
            cuattn.padding_plan(cupy.array(MASK), array_module=np)
