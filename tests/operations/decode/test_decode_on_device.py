"""The CUDA side of the decode functions on a stand-in for CuPy: what is copied, what waits, what nobody looked at; and
calls in which an axis has no length."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from decode_calls import FUNCTIONS, call, quantized
from simulated_cupy import Exporter, installed

import cuattn
from cuattn import errors
from cuattn.reference import decode_attention, paged_attention, paged_attention_varlen

DENSE, PAGED, VARLEN = FUNCTIONS
BOTH = PAGED, VARLEN
REFERENCES = {DENSE: decode_attention, PAGED: paged_attention, VARLEN: paged_attention_varlen}


@pytest.fixture
def cupy(monkeypatch):
    with installed(monkeypatch) as module:
        yield module


def expected(function, arguments):
    return REFERENCES[function](**arguments)[0]


def on(cupy, arguments, names):
    return {name: cupy.asarray(x) if name in names else x for name, x in arguments.items()}


def data_of(arguments):
    return {name for name in arguments if name[:2] in ("q", "k_", "v_")}


def close(result, want):
    np.testing.assert_allclose(np.asarray(result, np.float64), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_nothing_waits(cupy, function):
    """Lengths and tables on the device, beside it as NumPy arrays, or as lists: one result, and no synchronisation."""
    arguments = call(function)
    want = expected(function, arguments)
    data = data_of(arguments)
    lists = {name: x if name in data else x.tolist() for name, x in arguments.items()}
    for given in (on(cupy, arguments, arguments), on(cupy, arguments, data), on(cupy, lists, data)):
        result, lse = function(**given, return_lse=True)
        assert cupy.num_synchronizations == 0
        assert isinstance(result, cupy.ndarray) and isinstance(lse, cupy.ndarray)
        close(result._array, want)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_other_libraries_on_the_device(cupy, function):
    arguments = call(function)
    result = function(**{name: Exporter(x, device_id=2) for name, x in arguments.items()})
    assert result.device.id == 2 and all(launched.device == 2 for launched in cupy.launches)
    close(result._array, expected(function, arguments))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_values_on_the_device_are_not_looked_at(cupy, function, monkeypatch):
    """Unless CUATTN_CHECK asks for it: lengths are cut, and keys on pages that do not exist are zeros."""
    arguments = call(function)
    bad = arguments | {"seqlens_k": np.array([7, 2**31 - 1, -5], np.int32)}
    device = on(cupy, bad, bad)
    with cuattn.host.check("mem", "init", "race"):
        result = function(**device)._array
    assert np.isfinite(result).all() and cupy.num_synchronizations == 0
    first = slice(0, 2) if function is VARLEN else 0
    close(result[first], expected(function, arguments)[first])
    monkeypatch.setenv("CUATTN_CHECK", "1")
    with pytest.raises(errors.ArgumentError, match=r"seqlens_k\[1\] is 2147483647"):
        function(**device)


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("page", (-1, 6, 2**31 - 1, -(2**31)))
def test_pages_on_the_device_are_not_looked_at(cupy, function, page, monkeypatch):
    arguments = call(function)
    arguments["block_tables"][0, 1] = page
    with cuattn.host.check("mem", "init", "race"):
        result = function(**on(cupy, arguments, arguments))._array
    assert np.isfinite(result).all() and cupy.num_synchronizations == 0
    # The page reads as zeros: keys 4 to 6 of sequence 0.
    want = call(function)
    want["k_pages"][1] = want["v_pages"][1] = 0
    close(result, expected(function, want))
    monkeypatch.setenv("CUATTN_CHECK", "1")
    with pytest.raises(errors.ArgumentError, match=rf"block_tables\[0, 1\] is {page}"):
        function(**on(cupy, arguments, arguments))


@pytest.mark.parametrize("garbage", ([0, 9, -3, 6], [5, 5, 5, 5], [-(2**31), 2**31 - 1, 0, 2], [0, 7, 7, 7]))
def test_cu_seqlens_on_the_device_touch_nothing_else(cupy, garbage):
    arguments = call(VARLEN) | {"cu_seqlens_q": np.array(garbage, np.int32)}
    out = cupy.asarray(np.zeros((6, 4, 16), np.float32))
    with cuattn.host.check("mem"):  # sequences that overlap write one place twice
        VARLEN(**on(cupy, arguments, arguments), out=out)
    assert np.isfinite(out._array).all() and cupy.num_synchronizations == 0


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", ("seqlens_k", "block_tables", "cu_seqlens_q"))
def test_dtypes_of_metadata_on_the_device(cupy, function, name):
    arguments = call(function)
    if name not in arguments:
        return
    given = on(cupy, arguments, arguments) | {name: cupy.asarray(arguments[name].astype(np.int64))}
    with pytest.raises(errors.DTypeError, match=f"{name} has dtype int64; int32 is needed on a device"):
        function(**given)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_scales_beside_device_arrays(cupy, function):
    """Small ones may be anywhere; those with an entry for every slot are data, and lie where the cache does."""
    arguments = quantized(function, "int8")
    data = data_of(arguments)
    for scale in (0.125, np.float64(0.125), [0.125, 0.25], np.array([0.125, 0.25]), np.array(0.125, np.float16)):
        result = function(**on(cupy, arguments, data), k_scale=scale, v_scale=scale)
        host = function(**arguments, k_scale=scale, v_scale=scale)
        assert result._array.tobytes() == host.tobytes()
    slots = next(x for name, x in arguments.items() if name.startswith("k_")).shape[:3]
    with pytest.raises(errors.ArrayTypeError, match=r"q is .* on CUDA device 0 but k_scale is .* on the CPU"):
        function(**on(cupy, arguments, data), k_scale=np.ones(slots, np.float32))
    assert cupy.num_synchronizations == 0


@pytest.mark.parametrize("function", FUNCTIONS)
def test_out_and_workspace_take_every_allocation(cupy, function):
    arguments = on(cupy, call(function), call(function))
    shape = (6, 4, 16) if function is VARLEN else (3, 2, 4, 16)
    out, workspace = cupy.empty(shape, np.float32), cupy.empty(1 << 14, np.uint8)
    arguments |= {"out": out, "workspace": workspace, "num_splits": 2}
    if function is VARLEN:
        arguments["max_seqlen_q"] = 2
    assert function(**arguments) is out
    before = cupy.num_allocations
    function(**arguments)
    # The list of work of packed queries is made on the device, and held by two arrays.
    assert cupy.num_allocations - before == (2 if function is VARLEN else 0)
    close(out._array, expected(function, call(function)))


# --- edges -----------------------------------------------------------------------------------------------------------


def empty(**shapes):
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("function", "arguments", "shape", "lse_shape"),
    (
        (DENSE, empty(q=(0, 1, 4, 8), k_cache=(0, 3, 2, 8), v_cache=(0, 3, 2, 5)), (0, 1, 4, 5), (0, 4, 1)),
        (DENSE, empty(q=(2, 0, 4, 8), k_cache=(2, 3, 2, 8), v_cache=(2, 3, 2, 5)), (2, 0, 4, 5), (2, 4, 0)),
        (DENSE, empty(q=(2, 1, 0, 8), k_cache=(2, 3, 2, 8), v_cache=(2, 3, 2, 5)), (2, 1, 0, 5), (2, 0, 1)),
        (DENSE, empty(q=(2, 1, 0, 8), k_cache=(2, 3, 0, 8), v_cache=(2, 3, 0, 5)), (2, 1, 0, 5), (2, 0, 1)),
        (DENSE, empty(q=(2, 1, 4, 8), k_cache=(2, 0, 2, 8), v_cache=(2, 0, 2, 5)), (2, 1, 4, 5), (2, 4, 1)),
        (PAGED, empty(q=(2, 1, 4, 8), k_pages=(0, 3, 2, 8), v_pages=(0, 3, 2, 5)), (2, 1, 4, 5), (2, 4, 1)),
        (PAGED, empty(q=(0, 1, 4, 8), k_pages=(3, 3, 2, 8), v_pages=(3, 3, 2, 5)), (0, 1, 4, 5), (0, 4, 1)),
        (VARLEN, empty(q=(3, 4, 8), k_pages=(0, 3, 2, 8), v_pages=(0, 3, 2, 5)), (3, 4, 5), (4, 3)),
        (VARLEN, empty(q=(0, 4, 8), k_pages=(3, 3, 2, 8), v_pages=(3, 3, 2, 5)), (0, 4, 5), (4, 0)),
    ),
)
@pytest.mark.parametrize("num_splits", (None, 3))
def test_axes_without_length(function, arguments, shape, lse_shape, num_splits):
    batch = 2 if function is VARLEN else arguments["q"].shape[0]
    arguments = arguments | {"seqlens_k": [0] * batch}
    if function is not DENSE:
        arguments["block_tables"] = np.zeros((batch, 0), np.int32)
    if function is VARLEN:
        arguments["cu_seqlens_q"] = [0, 0, arguments["q"].shape[0]]
    out, lse = function(**arguments, num_splits=num_splits, return_lse=True)
    assert out.shape == shape and lse.shape == lse_shape
    assert not out.any() and np.isneginf(lse).all()


def test_no_sequences_at_all():
    q, pages = np.zeros((0, 4, 8), np.float32), np.zeros((3, 3, 2, 8), np.float32)
    assert VARLEN(q, pages, pages, np.zeros((0, 5), np.int32), [0], []).shape == (0, 4, 8)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_more_queries_than_keys(function):
    """The queries at negative positions see nothing under the causal mask, and every key without."""
    for causal in (True, False):
        arguments = call(function) | {"seqlens_k": np.array([7, 1, 0], np.int32)}
        result = function(**arguments, causal=causal)
        close(result, REFERENCES[function](**arguments, causal=causal)[0])
        first = result[2] if function is VARLEN else result[1, 0]
        assert first.any() != causal


@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_empty_sequence_beside_tables_of_rotations(function):
    """Its queries are at negative positions, which no table holds, and see nothing."""
    cos, sin = cuattn.rope_frequencies(32, 8)
    arguments = call(function)
    turned = function(**arguments, rope=cuattn.Rotary(cos=cos, sin=sin))
    close(turned, function(**arguments, rope=cuattn.Rotary()))
    assert not (turned[4:] if function is VARLEN else turned[2]).any()


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("dtype", (np.int64, ">i4", np.int16))
def test_tables_and_lengths_of_any_integers(function, dtype):
    """The tail of a table is garbage, also where int32 has no such number."""
    arguments = call(function)
    want = expected(function, arguments)
    for name in ("block_tables", "seqlens_k", "cu_seqlens_q"):
        if name in arguments:
            arguments[name] = arguments[name].astype(dtype)
    if dtype is np.int64:
        arguments["block_tables"][1, 1], arguments["block_tables"][2] = 2**62, -(2**40)
    close(function(**arguments), want)
    arguments["block_tables"] = np.asfortranarray(arguments["block_tables"])
    close(function(**arguments), want)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_codes_in_arrays_of_bytes(function):
    """uint8 and the dtype of the format are the same bits."""
    arguments = quantized(function, "e4m3fn")
    typed = {name: x.view(ml_dtypes.float8_e4m3fn) if name[:2] in ("k_", "v_") else x for name, x in arguments.items()}
    result = function(**arguments)
    assert function(**typed).tobytes() == function(**typed | {"kv_format": None}).tobytes() == result.tobytes()


def test_a_slow_call_warns(monkeypatch):
    from cuattn.ops.attention import slow_calls

    arguments = call(DENSE)
    monkeypatch.setattr(slow_calls, "_warned", False)
    monkeypatch.setattr(slow_calls, "SLOW_HOST_FLOPS", 1.0)
    with pytest.warns(errors.SlowHostCallWarning, match="may take minutes") as record:
        DENSE(**arguments)
    assert record[0].filename == __file__
