"""The CUDA side of rope and split_qkv, on a stand-in for CuPy: what is copied, what waits, what nobody looked at."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from simulated_cupy import Exporter, installed

import cuattn
from cuattn import Rotary, errors
from cuattn.ops.rotary.arguments import turn_words
from cuattn.testing.rotary_tolerance import assert_rope_close, assert_split_qkv_close


@pytest.fixture
def cupy(monkeypatch):
    with installed(monkeypatch) as module:
        waited = module.num_synchronizations

        def synchronize():
            module.num_synchronizations += 1

        stream = type(
            "Stream", (), {"synchronize": staticmethod(synchronize), "is_capturing": staticmethod(lambda: False)}
        )
        module.cuda.get_current_stream = lambda: stream
        assert waited == 0
        yield module
        turn_words.cache_clear()  # it holds arrays of this stand-in


def normal(*shape, dtype=np.float32):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def on(cupy, plan):
    return replace(plan, **{name: cupy.asarray(getattr(plan, name)) for name in ("indices", "padding", "cu_seqlens")})


def test_nothing_waits_and_nothing_is_copied(cupy):
    """Once the turns of a base are on the device, which is when its kernel is loaded."""
    x, positions = normal(2, 5, 3, 16), np.arange(5, dtype=np.int32)
    on_device, places, out = cupy.asarray(x), cupy.asarray(positions), cupy.empty((2, 5, 3, 16), np.float32)
    cuattn.rope(on_device, places, out=out)
    assert cupy.num_synchronizations == 1
    counts = cupy.num_uploads, cupy.num_allocations
    assert cuattn.rope(on_device, places, out=out) is out
    assert cuattn.rope(on_device, places, inverse=True, out=out) is out
    assert (cupy.num_synchronizations, cupy.num_uploads, cupy.num_allocations) == (1, *counts)
    cuattn.rope(on_device, places, out=out)
    assert_rope_close(out.get(), x, np.arange(5))


def test_host_positions_are_copied_without_waiting(cupy):
    x = normal(5, 3, 16)
    cuattn.rope(cupy.asarray(x), [0] * 5)
    for positions in (np.arange(5), list(range(5)), np.arange(5, dtype=np.uint8)):
        waited, uploads = cupy.num_synchronizations, cupy.num_uploads
        result = cuattn.rope(cupy.asarray(x), positions)
        assert (cupy.num_synchronizations, cupy.num_uploads) == (waited, uploads + 2)  # x by this test itself
        assert_rope_close(result.get(), x, np.arange(5))


def test_other_libraries_on_the_device(cupy):
    x, positions = normal(5, 3, 16), np.arange(5)
    result = cuattn.rope(Exporter(x), Exporter(positions))
    assert isinstance(result, cupy.ndarray)
    assert_rope_close(result.get(), x, positions)


def test_positions_on_the_device_are_not_looked_at(cupy, monkeypatch):
    """Unless CUATTN_CHECK asks for it."""
    cos, sin = cuattn.rope_frequencies(16, 4)
    x, positions = cupy.asarray(normal(3, 1, 16)), cupy.asarray(np.array([1, 4, 2]))
    tables = {"cos": cupy.asarray(cos), "sin": cupy.asarray(sin)}
    result = cuattn.rope(x, positions, **tables).get()
    assert np.isnan(result[1]).all() and np.isfinite(result[[0, 2]]).all()
    monkeypatch.setenv("CUATTN_CHECK", "1")
    with pytest.raises(errors.ArgumentError, match=r"positions\[1\] is 4"):
        cuattn.rope(x, positions, **tables)


@pytest.mark.parametrize("dtype", [np.int16, np.uint32, np.float32, np.bool_])
def test_positions_of_other_dtypes_on_the_device(cupy, dtype):
    with pytest.raises(errors.DTypeError, match=r"positions has dtype .*; int32 and int64 are allowed on a device"):
        cuattn.rope(cupy.asarray(normal(3, 1, 8)), cupy.asarray(np.zeros(3, dtype)))


def test_arrays_of_both_kinds_are_refused(cupy):
    x, (cos, sin) = normal(3, 1, 8), cuattn.rope_frequencies(8, 4)
    with pytest.raises(errors.ArrayTypeError, match=r"x is .* on the CPU but positions is .* on CUDA device 0"):
        cuattn.rope(x, cupy.asarray(np.arange(3)))
    with pytest.raises(errors.ArrayTypeError, match=r"x is .* but cos is"):
        cuattn.rope(cupy.asarray(x), [0, 1, 2], cos=cos, sin=sin)
    with pytest.raises(errors.ArrayTypeError, match=r"qkv is .* but plan\.indices is"):
        cuattn.split_qkv(normal(3, 24), num_heads=1, plan=on(cupy, cuattn.padding_plan(np.ones((1, 3), bool))))


def test_each_device_has_its_turns(cupy):
    for device_id in (0, 2):
        x = Exporter(normal(3, 1, 8), device_id)
        result = cuattn.rope(x, [0, 1, 2])
        assert result.device.id == device_id
        arrays = [arg for arg in cupy.launches[-1].args if isinstance(arg, cupy.ndarray)]
        assert {array.device.id for array in arrays} == {device_id}
        assert_rope_close(result.get(), x.array, np.arange(3))


@pytest.mark.parametrize("on_device", [False, True], ids=["plan of NumPy arrays", "plan of CuPy arrays"])
def test_split_qkv_with_a_plan(cupy, on_device):
    mask = np.array([[0, 1, 1], [1, 0, 0]])
    host_plan = cuattn.padding_plan(mask)
    plan = on(cupy, host_plan) if on_device else host_plan
    qkv, bias = normal(3, 48), normal(48)
    arrays = cupy.asarray(qkv), cupy.asarray(bias)
    results = cuattn.split_qkv(*arrays, num_heads=4, num_kv_heads=1, rope=Rotary(), plan=plan)
    waited, uploads = cupy.num_synchronizations, cupy.num_uploads
    again = cuattn.split_qkv(*arrays, num_heads=4, num_kv_heads=1, rope=Rotary(), plan=plan)
    assert (cupy.num_synchronizations, cupy.num_uploads) == (waited, uploads + (0 if on_device else 3))
    options = {"num_heads": 4, "num_kv_heads": 1, "rope": {}, "plan": host_plan}
    for outs in (results, again):
        assert_split_qkv_close([x.get() for x in outs], qkv, bias, **options)


def test_cu_seqlens_on_the_device(cupy):
    qkv, cu_seqlens = normal(4, 24), np.array([0, 1, 4])
    options = {"num_heads": 1, "cu_seqlens": cu_seqlens}
    for given in (cu_seqlens, cu_seqlens.tolist(), cupy.asarray(cu_seqlens.astype(np.int32))):
        results = cuattn.split_qkv(cupy.asarray(qkv), num_heads=1, rope=Rotary(), cu_seqlens=given)
        assert_split_qkv_close([x.get() for x in results], qkv, rope={}, **options)
    with pytest.raises(errors.DTypeError, match="cu_seqlens has dtype int64; int32"):
        cuattn.split_qkv(cupy.asarray(qkv), num_heads=1, rope=Rotary(), cu_seqlens=cupy.asarray(cu_seqlens))


@pytest.mark.parametrize("garbage", [[7, -3, 2**31 - 1], [0, 0, 0], [4, 4, 4], [-(2**31)] * 3])
def test_cu_seqlens_that_nobody_checked_touch_nothing_else(cupy, garbage):
    """They give other positions, never another address; the mem checker is on."""
    cos, sin = (cupy.asarray(table) for table in cuattn.rope_frequencies(8, 4))
    starts = cupy.asarray(np.array(garbage, np.int32))
    with cuattn.host.check("mem", "init", "race"):
        _, _, v = cuattn.split_qkv(
            cupy.asarray(normal(4, 24)), num_heads=1, rope=Rotary(cos=cos, sin=sin), cu_seqlens=starts
        )
    np.testing.assert_array_equal(v.get().reshape(4, 8), normal(4, 24)[:, 16:])
