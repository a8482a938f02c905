"""Arrays of other libraries on a GPU: where they run, that nothing is copied, and that nothing waits.

It all runs on `simulated_cupy`. What only hardware can confirm is in test_interop_cuda.py.
"""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
from option_cases import F16, FEW_FORMATS, FOR_EVERY_DTYPE, OPTION_CASES, option_case
from simulated_cupy import Exporter, OnCpu, installed

import cuattn
from cuattn.compat import flash_attn, scaled_dot_product_attention
from cuattn.errors import ArgumentError, ArrayTypeError
from cuattn.runtime import device_copies
from cuattn.testing import assert_attention_close, assert_varlen_close


@pytest.fixture
def cupy(monkeypatch):
    with installed(monkeypatch) as module:
        yield module


def make(dtype=np.float16, seed=0):
    """q, k and v for 2 sequences of 5 queries and 7 keys, 4 heads on 2, head dim 32."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for shape in ((2, 5, 4, 32), (2, 7, 2, 32), (2, 7, 2, 32))]


def test_dlpack_on_a_cuda_device_is_taken_without_a_copy(cupy):
    arrays = make()
    exporters = [Exporter(x) for x in arrays]
    out, lse = cuattn.attention(*exporters, return_lse=True)
    assert isinstance(out, cupy.ndarray) and isinstance(lse, cupy.ndarray)
    assert_attention_close(out.get(), *arrays, lse=lse.get())
    (launch,) = cupy.launches
    given = [arg.data.ptr for arg in launch.args if isinstance(arg, cupy.ndarray)]
    assert given[:3] == [x.ctypes.data for x in arrays]


def test_exporters_are_told_the_stream_that_is_current(cupy):
    exporters = [Exporter(x) for x in make()]
    cupy.stream = "a stream of the caller"
    cuattn.attention(*exporters)
    assert [exporter.streams for exporter in exporters] == [["a stream of the caller"]] * 3
    assert [launch.stream for launch in cupy.launches] == ["a stream of the caller"]


def test_cupy_arrays_and_dlpack_objects_mix(cupy):
    q, k, v = make()
    out = cuattn.attention(cupy.asarray(q), Exporter(k), Exporter(v))
    assert_attention_close(out.get(), q, k, v)


def test_runs_on_the_device_of_the_arrays(cupy):
    q, k, v = make()
    out = cuattn.attention(*(Exporter(x, device_id=3) for x in (q, k, v)))
    assert out.device.id == 3
    assert {launch.device for launch in cupy.launches} == {3}
    assert cupy.cuda.Device().id == 0
    assert_attention_close(out.get(), q, k, v)


def test_out_is_written_in_place(cupy):
    q, k, v = make()
    memory = np.full((2, 5, 4, 32), np.nan, np.float16)
    out = cuattn.attention(*map(Exporter, (q, k, v)), out=Exporter(memory))
    assert out.data.ptr == memory.ctypes.data
    assert_attention_close(memory, q, k, v)


@pytest.mark.parametrize("kind", ("numpy", "other device", "list"))
@pytest.mark.parametrize("position", (1, 2))
def test_mixed_kinds_name_both_arguments(cupy, position, kind):
    arrays = [Exporter(x) for x in make()]
    x = arrays[position].array
    arrays[position] = {"numpy": x, "other device": Exporter(x, 1), "list": x.tolist()}[kind]
    name = "qkv"[position]
    message = {
        "numpy": rf"q is a simulated_cupy\.Exporter on CUDA device 0 but {name} is a numpy\.ndarray on the CPU",
        "other device": rf"q is .* CUDA device 0 but {name} is .* CUDA device 1",
        "list": rf"{name}: builtins\.list is no array",
    }[kind]
    with pytest.raises(TypeError, match=message) as caught:
        cuattn.attention(*arrays)
    assert isinstance(caught.value, ArrayTypeError)
    assert cupy.launches == []


def test_a_numpy_out_beside_device_arrays(cupy):
    with pytest.raises(ArrayTypeError, match=r"q is .* CUDA device 0 but out is a numpy\.ndarray on the CPU"):
        cuattn.attention(*map(Exporter, make()), out=np.empty((2, 5, 4, 32), np.float16))


OPTIONS = {
    "plain": {},
    "causal": {"causal": True, "return_lse": True},
    "window": {"window": (2, 1), "diagonal_offset": 1},
    "softcap": {"softcap": 4.0},
    "bias": {"bias": np.linspace(-2, 2, 35, dtype=np.float32).reshape(5, 7)},
    "mask": {"mask": np.arange(35).reshape(5, 7) % 3 > 0},
    "dropout": {"dropout_p": 0.3, "dropout_seed": 1},
    "slopes and sinks": {"alibi_slopes": np.float32([0.5, 0, 1, 0.25]), "sinks": np.float32([0, 1, 2, -1])},
    "offsets": {"diagonal_offset": np.int32([-1, 2]), "causal": True},
}


def upload(cupy, x):
    """CuPy takes 8-bit floats as views of bytes only."""
    return cupy.asarray(x.view(np.uint8)).view(x.dtype) if x.itemsize == 1 else cupy.asarray(x)


def test_8_bit_arrays_are_copied_as_bytes(cupy):
    """CuPy has no elementwise kernel for them; the stand-in refuses as it does."""
    x = upload(cupy, make(FEW_FORMATS[-1])[0])
    for refused in (x.copy, lambda: cupy.array(x), lambda: cupy.empty(3, x.dtype), lambda: x.astype(np.float32)):
        with pytest.raises(ValueError, match="Unsupported dtype float8"):
            refused()
    strided = x[..., ::2]
    copy = device_copies.copied(strided)
    assert copy.dtype == x.dtype and copy.flags.c_contiguous
    assert copy.get().tobytes() == np.ascontiguousarray(strided.get()).tobytes()


def test_memory_of_other_libraries_is_held_until_the_kernel_has_read_it(cupy):
    gone = []

    def call():
        array = np.ones((3, 8), np.float32)
        weakref.finalize(array, gone.append, len(cupy.launches))
        cuattn.softmax(Exporter(array))
        cupy.launches[-1].args = ()  # the stand-in's own record

    for _ in range(3):
        call()
        gc.collect()
        assert gone == []  # nothing has run yet
    cupy.num_finished = len(cupy.launches) - 1  # the third is still running
    call()
    gc.collect()
    assert gone == [0, 1]
    cupy.num_finished = len(cupy.launches)
    cupy.is_capturing = True  # in a graph nothing runs: an event would never happen
    call()
    call()
    gc.collect()
    assert gone[:4] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(dtype, name) for dtype in FEW_FORMATS for name in (OPTION_CASES if dtype == F16 else FOR_EVERY_DTYPE)],
    ids=str,
)
def test_device_arrays_give_what_host_arrays_give(cupy, dtype, name):
    """Bit for bit, and without reading a value: that would wait for the GPU, and fail inside a graph capture."""
    arrays, options = make(dtype), option_case(name, (2, 5, 7, 4, 2, 32, 32), dtype)
    expected = cuattn.attention(*arrays, return_lse=True, **options)
    given = {key: cupy.asarray(x) if isinstance(x, np.ndarray) else x for key, x in options.items()}
    results = cuattn.attention(*(upload(cupy, x) for x in arrays), return_lse=True, **given)
    reversed_views = [upload(cupy, np.ascontiguousarray(x[..., ::-1]))[..., ::-1] for x in arrays]
    out = cupy.asarray(np.empty_like(expected[0]))
    assert cuattn.attention(*reversed_views, out=out, **given) is out
    assert cupy.num_synchronizations == 0
    for result, x in zip((*results, out), (*expected, expected[0]), strict=True):
        assert result.get().tobytes() == x.tobytes()


# What a call with out= allocates beside the result: the table of docs/interop.md.
ALLOCATIONS = {"causal": "lse", "bias": "classes of tiles", "mask": "classes of tiles"}


@pytest.mark.parametrize("name", OPTIONS)
def test_memory_that_a_call_with_out_takes(cupy, name):
    given = {key: cupy.asarray(x) if isinstance(x, np.ndarray) else x for key, x in OPTIONS[name].items()}
    arrays = [Exporter(x) for x in (*make(), np.empty((2, 5, 4, 32), np.float16))]
    cupy.num_allocations = cupy.num_uploads = 0
    cuattn.attention(*arrays[:3], out=arrays[3], **given)
    assert (cupy.num_allocations, cupy.num_uploads) == (int(name in ALLOCATIONS), 0)


def test_memory_that_layouts_take(cupy):
    """Strides are free; a last axis that is not contiguous is copied, in and out."""
    q, k, v = make()
    free = [Exporter(x) for x in (q[:, ::-1], k[:, :, ::-1], np.repeat(v, 2, axis=1)[:, ::2])]
    out = np.empty((2, 5, 4, 64), np.float16)
    cuattn.attention(*free, out=Exporter(out[..., :32]))
    assert cupy.num_allocations == 0
    copied = [Exporter(x) for x in (q[..., ::-1], k[..., ::-1], v)]
    cuattn.attention(*copied, out=Exporter(out[..., ::2]))
    assert (cupy.num_allocations, cupy.num_uploads, cupy.num_synchronizations) == (3, 0, 0)
    assert_attention_close(out[..., ::2], q, k, v)


@pytest.mark.parametrize("dtype", (np.float32, np.float64))
@pytest.mark.parametrize("where", ("device", "host"))
def test_memory_that_metadata_takes(cupy, where, dtype):
    """None where it lies on the device as a kernel reads it; else it is copied once, from the host converted before."""
    sinks = np.zeros(4, dtype)
    given = Exporter(sinks) if where == "device" else sinks
    cuattn.attention(*map(Exporter, make()), sinks=given, out=Exporter(np.empty((2, 5, 4, 32), np.float16)))
    expected = (int(dtype == np.float64), 0) if where == "device" else (1, 1)
    assert (cupy.num_allocations, cupy.num_uploads) == expected


@pytest.mark.parametrize(("where", "allocations", "uploads"), (("device", 2, 0), ("host", 3, 3)))
def test_memory_that_packed_sequences_take(cupy, where, allocations, uploads):
    """On the device, the list of work is made there; from the host, it comes along with both lists of lengths."""
    arrays, lengths = make_packed()
    given = [Exporter(x) if where == "device" else x for x in lengths]
    out = Exporter(np.empty_like(arrays[0]))
    cuattn.attention_varlen(*map(Exporter, arrays), *given, out=out)
    assert (cupy.num_allocations, cupy.num_uploads) == (allocations, uploads)


# Small arrays that say something about the others may be host data beside arrays on a GPU.
METADATA = {
    "list": lambda cupy, x: x.tolist(),
    "tuple": lambda cupy, x: tuple(x.tolist()),
    "numpy": lambda cupy, x: x,
    "numpy, another dtype": lambda cupy, x: x.astype(np.float64 if x.dtype.kind == "f" else np.int64),
    "cpu": lambda cupy, x: OnCpu(x),
    "cupy": lambda cupy, x: cupy.asarray(x),
    "dlpack": lambda cupy, x: Exporter(x),
}


@pytest.mark.parametrize("name", ("slopes and sinks", "offsets"))
@pytest.mark.parametrize("kind", METADATA)
def test_metadata_beside_device_arrays(cupy, kind, name):
    arrays = make()
    given = {key: METADATA[kind](cupy, x) if isinstance(x, np.ndarray) else x for key, x in OPTIONS[name].items()}
    out = cuattn.attention(*map(Exporter, arrays), **given)
    assert cupy.num_synchronizations == 0
    assert isinstance(out, cupy.ndarray)
    assert_attention_close(out.get(), *arrays, **OPTIONS[name])


def make_packed():
    rng = np.random.default_rng(5)
    shapes = (90, 4, 32), (75, 2, 32), (75, 2, 32)
    lengths = np.array([0, 3, 3, 80, 90], np.int32), np.array([0, 1, 8, 75, 75], np.int32)
    return [rng.standard_normal(shape).astype(np.float16) for shape in shapes], lengths


@pytest.mark.parametrize("max_seqlens", (False, True))
@pytest.mark.parametrize("kind", METADATA)
def test_lengths_beside_device_arrays(cupy, kind, max_seqlens):
    """On the device or not, they are never waited for."""
    arrays, lengths = make_packed()
    given = [METADATA[kind](cupy, x) for x in lengths]
    options = {"max_seqlen_q": 77, "max_seqlen_k": 67} if max_seqlens else {}
    out, lse = cuattn.attention_varlen(*map(Exporter, arrays), *given, causal=True, return_lse=True, **options)
    assert cupy.num_synchronizations == 0
    assert isinstance(out, cupy.ndarray) and isinstance(lse, cupy.ndarray)
    assert_varlen_close(out.get(), *arrays, *lengths, lse=lse.get(), causal=True)


def test_metadata_that_lies_elsewhere(cupy):
    q, k, v = map(Exporter, make())
    with pytest.raises(ArrayTypeError, match=r"sinks is .*Exporter on CUDA device 1 but the call is on CUDA device 0"):
        cuattn.attention(q, k, v, sinks=Exporter(np.zeros(4, np.float32), 1))
    with pytest.raises(ArrayTypeError, match=r"sinks is .*Exporter on CUDA device 0 but the call is on the CPU"):
        cuattn.attention(*make(), sinks=Exporter(np.zeros(4, np.float32)))
    arrays, lengths = make_packed()
    with pytest.raises(ArrayTypeError, match=r"cu_seqlens_k is .*Exporter on CUDA device 1"):
        cuattn.attention_varlen(*map(Exporter, arrays), lengths[0], Exporter(lengths[1], 1))
    assert cupy.launches == []


@pytest.mark.parametrize("name", ("bias", "mask"))
def test_bias_and_mask_are_arrays_like_q(cupy, name):
    """They can be as large as the logits: host data is no metadata there."""
    with pytest.raises(ArrayTypeError, match=rf"q is .* CUDA device 0 but {name} is a numpy\.ndarray on the CPU"):
        cuattn.attention(*map(Exporter, make()), **OPTIONS[name])


def test_lengths_on_the_device_are_checked_on_request(cupy, monkeypatch):
    """CUATTN_CHECK=1 waits for the GPU; without it, lengths that lead outside are cut."""
    arrays, (cu_seqlens_q, cu_seqlens_k) = make_packed()
    wrong = Exporter(cu_seqlens_q[::-1].copy())
    monkeypatch.setenv("CUATTN_CHECK", "1")
    with pytest.raises(ArgumentError, match="cu_seqlens_q"):
        cuattn.attention_varlen(*map(Exporter, arrays), wrong, Exporter(cu_seqlens_k))
    assert cupy.num_synchronizations > 0


# --- the compatibility functions --------------------------------------------------------------------------------------


def test_packed_qkv_of_another_library(cupy):
    rng = np.random.default_rng(6)
    qkv = rng.standard_normal((2, 9, 3, 4, 32)).astype(np.float16)
    out = flash_attn.flash_attn_qkvpacked_func(Exporter(qkv), causal=True)
    (launch,) = cupy.launches
    given = [arg.data.ptr for arg in launch.args if isinstance(arg, cupy.ndarray)]
    assert given[:3] == [qkv[:, :, index].ctypes.data for index in range(3)]
    assert_attention_close(out.get(), *(qkv[:, :, index] for index in range(3)), causal=True)
    assert cupy.num_synchronizations == 1  # that of this test, to look at the result


def test_packed_kv_beside_a_query_elsewhere(cupy):
    q, k, v = make()
    with pytest.raises(ArrayTypeError, match=r"q is a numpy\.ndarray on the CPU but kv is .* CUDA device 0"):
        flash_attn.flash_attn_kvpacked_func(q, Exporter(np.stack([k, v], 2)))


def test_scaled_dot_product_attention_of_another_library(cupy):
    query, key, value = (np.ascontiguousarray(x.swapaxes(1, 2)) for x in make())
    mask = np.arange(35).reshape(5, 7) % 3 > 0
    out = scaled_dot_product_attention(*map(Exporter, (query, key, value, mask)), enable_gqa=True)
    assert isinstance(out, cupy.ndarray)
    assert cupy.num_synchronizations == 0
    assert_attention_close(out.get().swapaxes(1, 2), *make(), mask=mask)
    with pytest.raises(ArrayTypeError, match=r"query is .* CUDA device 0 but value is a numpy\.ndarray on the CPU"):
        scaled_dot_product_attention(Exporter(query), Exporter(key), value)
    with pytest.raises(ArrayTypeError, match=r"query is .* CUDA device 0 but attn_mask is a numpy\.ndarray"):
        scaled_dot_product_attention(*map(Exporter, (query, key, value)), mask, enable_gqa=True)


@pytest.mark.parametrize("operation", ("softmax", "log_softmax", "logsumexp"))
def test_softmax_of_dlpack_objects(cupy, operation):
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    result = getattr(cuattn, operation)(Exporter(x))
    assert isinstance(result, cupy.ndarray)
    assert cupy.num_synchronizations == 0
    np.testing.assert_array_equal(result.get(), getattr(cuattn, operation)(x))
