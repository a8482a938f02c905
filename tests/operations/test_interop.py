"""Arrays of other libraries: where they run, that nothing is copied, and that nothing waits for the GPU.

Without a GPU the CUDA side runs on `simulated_cupy`. What only hardware can confirm is in test_interop_cuda.py.
"""

from __future__ import annotations

import ctypes
import sys

import ml_dtypes
import numpy as np
import pytest
from simulated_cupy import Exporter, installed

import cuattn
from cuattn import dlpack
from cuattn.compat import flash_attn, scaled_dot_product_attention
from cuattn.errors import ArgumentError, ArrayTypeError, OverlapError
from cuattn.testing import assert_attention_close, assert_varlen_close


@pytest.fixture
def cupy(monkeypatch):
    with installed(monkeypatch) as module:
        yield module


def make(dtype=np.float16, seed=0):
    """q, k and v for 2 sequences of 5 queries and 7 keys, 4 heads on 2, head dim 32."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for shape in ((2, 5, 4, 32), (2, 7, 2, 32), (2, 7, 2, 32))]


class OnCpu:
    """An array of another library on the CPU."""

    def __init__(self, array):
        self.array = array

    def __dlpack_device__(self):
        return 1, 0

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)


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


@pytest.mark.parametrize("name", OPTIONS)
def test_no_value_of_an_array_is_read(cupy, name):
    """Reading one would wait for the GPU, and fail inside a graph capture."""
    arrays = make()
    given = {key: cupy.asarray(x) if isinstance(x, np.ndarray) else x for key, x in OPTIONS[name].items()}
    result = cuattn.attention(*map(cupy.asarray, arrays), **given)
    views = [cupy.asarray(np.ascontiguousarray(x[..., ::-1]))[..., ::-1] for x in arrays]
    cuattn.attention(*views, out=cupy.asarray(np.empty_like(arrays[0])), **given)
    assert cupy.num_synchronizations == 0
    options = dict(OPTIONS[name])
    lse = result[1].get() if options.pop("return_lse", False) else None
    out = result if lse is None else result[0]
    assert_attention_close(out.get(), *arrays, lse=lse, **options)


# What a call with out= allocates beside the result: the table of docs/interop.md.
ALLOCATIONS = {"causal": "lse", "bias": "classes of tiles", "mask": "classes of tiles"}


@pytest.mark.parametrize("name", OPTIONS)
def test_memory_that_a_call_with_out_takes(cupy, name):
    given = {key: cupy.asarray(x) if isinstance(x, np.ndarray) else x for key, x in OPTIONS[name].items()}
    arrays = [Exporter(x) for x in (*make(), np.empty((2, 5, 4, 32), np.float16))]
    cupy.num_allocations = cupy.num_uploads = 0
    cuattn.attention(*arrays[:3], out=arrays[3], **given)
    assert (cupy.num_allocations, cupy.num_uploads) == (int(name in ALLOCATIONS), 0)


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
    with pytest.raises(ArrayTypeError, match=r"sinks is .*Exporter on CUDA device 1 but q is on CUDA device 0"):
        cuattn.attention(q, k, v, sinks=Exporter(np.zeros(4, np.float32), 1))
    with pytest.raises(ArrayTypeError, match=r"sinks is .*Exporter on CUDA device 0 but q is on the CPU"):
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


# --- the CPU ---------------------------------------------------------------------------------------------------------


def test_dlpack_on_the_cpu_runs_on_the_host():
    arrays = make()
    out = cuattn.attention(*map(OnCpu, arrays))
    assert type(out) is np.ndarray
    assert_attention_close(out, *arrays)


def test_read_only_inputs_are_taken_and_a_read_only_out_is_not():
    arrays = make()
    for x in arrays:
        x.flags.writeable = False
    assert_attention_close(cuattn.attention(*map(OnCpu, arrays)), *arrays)
    out = np.zeros((2, 5, 4, 32), np.float16)
    out.flags.writeable = False
    for given in (out, OnCpu(out)):
        with pytest.raises(ArrayTypeError, match="out is read-only"):
            cuattn.attention(*arrays, out=given)


def test_out_through_dlpack_that_overlaps_an_input():
    q, k, v = make()
    with pytest.raises(OverlapError, match="out lies in the memory range of q"):
        cuattn.attention(OnCpu(q), k, v, out=OnCpu(q))


def test_masked_arrays_are_refused():
    q, k, v = make()
    with pytest.raises(ArrayTypeError, match="k is a masked array"):
        cuattn.attention(q, np.ma.masked_greater(k, 0), v)


def test_masked_metadata_is_refused():
    arrays, lengths = make_packed()
    for name, x in (("sinks", np.zeros(4, np.float32)), ("alibi_slopes", np.zeros(4)), ("diagonal_offset", lengths[0])):
        with pytest.raises(ArrayTypeError, match=f"{name} is a masked array"):
            cuattn.attention_varlen(*arrays, *lengths, **{name: np.ma.masked_greater(x, 0)})


def test_exporters_that_raise_something_of_their_own():
    class Broken(OnCpu):
        def __dlpack__(self, **options):
            raise KeyError("gone")

    q, k, v = make()
    with pytest.raises(ArrayTypeError, match="Broken cannot be read as a NumPy array: 'gone'"):
        cuattn.attention(q, Broken(k), v)


def test_objects_that_cannot_say_where_they_are():
    with pytest.raises(ArrayTypeError, match=r"q: builtins\.type does not say on which device it is"):
        cuattn.attention(np.ndarray, *make()[1:])


class NarrowOnCpu(OnCpu):
    """An array of `ml_dtypes` as other libraries export it: NumPy does not, so an integer's capsule is relabelled."""

    CODES = {"bfloat16": 4, "float8_e4m3fn": 10, "float8_e5m2": 12, "float8_e4m3fnuz": 11}  # noqa: RUF012

    def __dlpack__(self, **options):
        capsule = self.array.view(f"u{self.array.itemsize}").__dlpack__()
        get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
        get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        dlpack._DLTensor.from_address(get_pointer(capsule, b"dltensor")).code = self.CODES[self.array.dtype.name]
        return capsule


@pytest.mark.parametrize("name", ("bfloat16", "float8_e4m3fn", "float8_e5m2"))
def test_narrow_floats_through_dlpack(name):
    values = np.arange(-12, 12).reshape(4, 6).astype(name)
    for x in (values, values.T, values[1:, ::2], values[::-1], values[:0], values[:1, 0]):
        array = dlpack.from_host(NarrowOnCpu(x))
        assert array.dtype == values.dtype and array.shape == x.shape
        assert array.astype(np.float32).tolist() == x.astype(np.float32).tolist()
        if x.size:
            assert array.__array_interface__["data"][0] == x.__array_interface__["data"][0]


def test_narrow_floats_that_ml_dtypes_has_and_no_kernel_takes():
    with pytest.raises(ArrayTypeError, match="NarrowOnCpu cannot be read as a NumPy array"):
        cuattn.attention(NarrowOnCpu(np.zeros((2, 5, 4, 32), ml_dtypes.float8_e4m3fnuz)), *make()[1:])


def test_the_memory_of_a_capsule_lives_as_long_as_the_array():
    owner = np.arange(1000).astype(ml_dtypes.bfloat16)
    array = dlpack.from_host(NarrowOnCpu(owner))
    references = sys.getrefcount(owner)
    part = array[10:20]
    del array
    assert sys.getrefcount(owner) == references
    del part
    assert sys.getrefcount(owner) < references


def test_bfloat16_on_the_cpu():
    arrays = make(ml_dtypes.bfloat16)
    assert_attention_close(cuattn.attention(*map(NarrowOnCpu, arrays)), *arrays)


def torch_arrays(dtype, **options):
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 5, 4, 32), (2, 7, 2, 32), (2, 7, 2, 32)
    return [torch.randn(shape, generator=generator).to(getattr(torch, dtype)) for shape in shapes]


@pytest.mark.parametrize("dtype", ("float16", "bfloat16", "float32", "float64"))
def test_torch_on_the_cpu(dtype):
    """bfloat16 as well, which NumPy alone does not read."""
    tensors = torch_arrays(dtype)
    out = cuattn.attention(*tensors)
    assert type(out) is np.ndarray and out.dtype.name == dtype
    wide = [np.from_dlpack(x.double()) for x in tensors]
    assert_attention_close(out, *(x.astype(out.dtype) for x in wide))


def test_torch_tensors_are_not_copied():
    from cuattn.launch import executor_for

    for dtype in ("float32", "bfloat16"):
        x = torch_arrays(dtype)[0].transpose(1, 2)[:, ::2]
        array = executor_for(x=x).asarray(x)
        assert array.__array_interface__["data"][0] == x.data_ptr()
        assert [stride // array.itemsize for stride in array.strides] == list(x.stride())


def test_the_memory_of_a_narrow_tensor_lives_as_long_as_the_array():
    torch = pytest.importorskip("torch")
    from cuattn.launch import host_executor

    arrays = [host_executor("sm_80").asarray(torch.full((1000,), i, dtype=torch.bfloat16)) for i in range(50)]
    assert [set(x.astype(int).tolist()) for x in arrays] == [{i} for i in range(50)]


def test_torch_tensors_that_cannot_be_read():
    torch = pytest.importorskip("torch")
    q, k, v = torch_arrays("float32")
    with pytest.raises(ArrayTypeError, match=r"Tensor cannot be read as a NumPy array: .*require gradient"):
        cuattn.attention(q.requires_grad_(), k, v)
    with pytest.raises(ArrayTypeError, match="does not say on which device it is"):
        cuattn.attention(q.detach().to("meta"), k, v)
    unknown = torch.zeros(2, 7, 2, 32).to(torch.float8_e4m3fnuz)
    with pytest.raises(ArrayTypeError, match="cannot be read as a NumPy array"):
        cuattn.attention(q.detach(), unknown, v)


def test_narrow_floats_of_torch_are_those_of_ml_dtypes():
    torch = pytest.importorskip("torch")
    from cuattn.dlpack import from_host

    values = torch.tensor([[0.5, -3.0], [448.0, 0.0]])
    for name, dtype in (("bfloat16", ml_dtypes.bfloat16), ("float8_e4m3fn", ml_dtypes.float8_e4m3fn)):
        array = from_host(values.to(getattr(torch, name)).T)
        assert array.dtype == dtype
        assert array.astype(np.float32).tolist() == values.T.tolist()
    assert from_host(torch.zeros((0, 3), dtype=torch.bfloat16)).shape == (0, 3)
