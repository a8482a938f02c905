"""Tensor maps: the checks, what the driver is asked, the host's own encoding, and their way into a kernel."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import cuattn.host as host
from cuattn import errors
from cuattn.host import tensor_map as host_encoding
from cuattn.host.tensor_map import DATA_TYPES, TensorMap
from cuattn.runtime import tensor_map_driver
from cuattn.runtime.executor import CudaExecutor, Kernel
from cuattn.runtime.tensor_map import tensor_map

BF16 = np.dtype(ml_dtypes.bfloat16)


def aligned(shape, dtype=BF16):
    return host.empty(shape, dtype)


def test_dimensions_are_innermost_first():
    described = tensor_map(aligned((2, 10, 4, 128)).transpose(0, 2, 1, 3), (64, 8, 1, 1), swizzle="128B")
    assert described.dims == (128, 10, 4, 2)
    assert described.strides == (2, 1024, 256, 10240)
    assert described.box_bytes == 64 * 8 * 2


def test_steps_make_the_copy_smaller():
    assert tensor_map(aligned((40, 64)), (64, 9), element_strides=(1, 4)).box_bytes == 64 * 3 * 2


def test_a_dimension_of_one_may_have_any_stride():
    array = aligned((3, 1, 64))
    odd = np.lib.stride_tricks.as_strided(array, array.shape, (128, 6, 2))
    assert tensor_map(odd, (64, 1, 1)).strides == (2, 128, 128)
    assert tensor_map(aligned((5, 1)), (8, 1), dims=(1, 1), strides=(2, 2)).strides == (2, 16)


BIG = np.lib.stride_tricks.as_strided(np.zeros(2), (2, 2), (1 << 40, 8))
REFUSED = {
    "list": (lambda: tensor_map([1.0], (1,)), errors.ArrayTypeError, "array is a list"),
    "complex": (lambda: tensor_map(aligned(16, np.complex64), (2,)), errors.DTypeError, "complex64"),
    "big endian": (lambda: tensor_map(aligned(16, ">f4"), (4,)), errors.DTypeError, ">f4"),
    "address": (lambda: tensor_map(aligned(64)[1:], (8,)), errors.ArgumentError, "not a multiple of 16 bytes"),
    "swizzle": (lambda: tensor_map(aligned(64), (8,), swizzle="96B"), errors.ArgumentError, "swizzle is '96B'"),
    "fill": (lambda: tensor_map(aligned(64), (8,), fill="ones"), errors.ArgumentError, "fill is 'ones'"),
    "promotion": (lambda: tensor_map(aligned(64), (8,), l2_promotion="1B"), errors.ArgumentError, "l2_promotion is"),
    "interleave": (lambda: tensor_map(aligned(64), (8,), interleave="16B"), errors.NotSupportedError, "interleave is"),
    "nan": (lambda: tensor_map(aligned(64, np.int32), (4,), fill="nan"), errors.DTypeError, "fill='nan' for int32"),
    "nan of 8 bits": (
        lambda: tensor_map(aligned(64, ml_dtypes.float8_e5m2), (16,), fill="nan"), errors.DTypeError, "fill='nan'"
    ),
    "rank 0": (lambda: tensor_map(aligned(()), ()), errors.ShapeError, "0 dimensions; 1 to 5"),
    "rank 6": (lambda: tensor_map(aligned((1,) * 5 + (8,)), (8,) + (1,) * 5), errors.ShapeError, "6 dimensions"),
    "empty": (lambda: tensor_map(aligned((0, 8)), (8, 1)), errors.ShapeError, r"dims\[1\] is 0"),
    "extent": (
        lambda: tensor_map(aligned(8), (8,), dims=(8, 2**32 + 1), strides=(2, 0)), errors.ShapeError, r"dims\[1\] is"
    ),
    "inner stride": (lambda: tensor_map(aligned((8, 16))[:, ::2], (8, 1)), errors.ArgumentError, "is 4 bytes; it must"),
    "stride": (lambda: tensor_map(aligned((8, 12)), (8, 1)), errors.ArgumentError, r"strides\[1\] is 24 bytes"),
    "negative": (lambda: tensor_map(aligned((8, 16))[::-1], (8, 1)), errors.ArgumentError, r"strides\[1\] is -32"),
    "large stride": (lambda: tensor_map(BIG, (2, 1)), errors.ArgumentError, "below 2"),
    "dims alone": (lambda: tensor_map(aligned(64), (8,), dims=(64,)), errors.ArgumentError, "given together"),
    "count": (lambda: tensor_map(aligned(64), (8,), dims=(64,), strides=(2, 16)), errors.ShapeError, "2 strides for 1"),
    "beyond": (
        lambda: tensor_map(aligned((4, 16)), (8, 1), dims=(16, 5), strides=(2, 32)), errors.ShapeError, "to byte 160"
    ),
    "box rank": (lambda: tensor_map(aligned((4, 16)), (8,)), errors.ShapeError, "box has 1 entries for 2"),
    "box 0": (lambda: tensor_map(aligned((4, 16)), (8, 0)), errors.ShapeError, r"box\[1\] is 0"),
    "box 257": (lambda: tensor_map(aligned((4, 16)), (8, 257)), errors.ShapeError, r"box\[1\] is 257"),
    "box bytes": (lambda: tensor_map(aligned((4, 16)), (4, 1)), errors.ShapeError, "8 bytes; it must be a multiple"),
    "wide": (lambda: tensor_map(aligned((4, 64)), (64, 1), swizzle="64B"), errors.ShapeError, "128 bytes; swizzle"),
    "narrow": (lambda: tensor_map(aligned((4, 64)), (32, 1), swizzle="128B"), errors.NotSupportedError, "64 bytes"),
    "steps": (
        lambda: tensor_map(aligned((4, 16)), (8, 1), element_strides=(1, 9)), errors.ShapeError, r"strides\[1\] is 9"
    ),
    "inner step": (
        lambda: tensor_map(aligned((4, 16)), (8, 1), element_strides=(2, 1)), errors.ShapeError, "only 1 is allowed"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_driver_would_refuse_is_refused_in_words(name):
    make, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        make()


def test_the_limits_themselves_are_allowed():
    tensor_map(aligned((256, 512)), (256, 256), element_strides=(1, 8))
    tensor_map(aligned(8), (8, 256), dims=(8, 2**32), strides=(2, 0))
    for width, swizzle in ((16, "32B"), (32, "64B"), (64, "128B")):
        tensor_map(aligned((4, 64)), (width, 1), swizzle=swizzle)


def test_the_host_encoding():
    array = aligned((3, 20, 64), np.float32)
    described = tensor_map(array, (32, 7, 2), swizzle="128B", fill="nan", element_strides=(1, 2, 1))
    assert described.value.dtype == np.dtype("V128")
    fields = np.frombuffer(described.value.tobytes(), host_encoding.LAYOUT)[0]
    assert fields["base"] == array.ctypes.data
    assert (fields["rank"], fields["swizzle"], fields["fill"], fields["item_bytes"]) == (3, 3, 1, 4)
    assert fields["last"].tolist() == [63, 19, 2, 0, 0]
    assert fields["strides"].tolist() == [4, 256, 5120, 0, 0]
    assert fields["box"].tolist() == [32, 7, 2, 1, 1]
    assert fields["steps"].tolist() == [1, 2, 1, 1, 1]


# ---- the driver's back end


class FakeArray:
    """What `tensor_map` looks at of a CuPy array."""

    def __init__(self, shape, dtype, pointer=0x7F0000000100):
        like = np.empty(shape, dtype)
        self.shape, self.strides, self.dtype = like.shape, like.strides, like.dtype
        self.data = SimpleNamespace(ptr=pointer)
        self.__cuda_array_interface__ = {}


@pytest.fixture
def driver(monkeypatch):
    """The driver's function, called through C: it notes what it is asked, and writes where it is told."""
    calls = []

    def encode(place, data_type, rank, address, dims, strides, box, steps, *modes):
        lists = (
            list(values[:count]) for values, count in ((dims, rank), (strides, rank - 1), (box, rank), (steps, rank))
        )
        calls.append((place, data_type, rank, address, *lists, *modes))
        ctypes.memmove(place, driver.data, len(driver.data))
        return driver.status

    function = ctypes.CFUNCTYPE(ctypes.c_int, *tensor_map_driver.ARGUMENT_TYPES)(encode)
    driver = SimpleNamespace(status=0, calls=calls, data=bytes(range(128)))
    monkeypatch.setattr(tensor_map_driver, "encoder", lambda: function)
    return driver


def test_the_driver_gets_the_arguments_in_its_order(driver):
    array = FakeArray((2, 30, 96), BF16)
    described = tensor_map(
        array, (64, 16, 1), swizzle="128B", fill="nan", l2_promotion="256B", element_strides=(1, 2, 1)
    )
    ((_, data_type, rank, address, dims, strides, box, steps, *modes),) = driver.calls
    assert (data_type, rank, address) == (9, 3, 0x7F0000000100)  # CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
    assert (dims, strides, box, steps) == ([96, 30, 2], [192, 5760], [64, 16, 1], [1, 2, 1])
    assert modes == [0, 3, 3, 1]  # not interleaved, swizzle of 128 bytes, promotion to 256, NaN
    assert described.value.tobytes() == driver.data


def test_the_driver_writes_to_an_aligned_address(driver):
    kept = [bytearray(17 * k + 1) for k in range(20)]  # so that memory is taken at other places
    for _ in range(20):
        tensor_map(FakeArray((4, 64), BF16), (64, 1))
        kept.append(bytearray(23 * len(kept)))
    assert {call[0] % 64 for call in driver.calls} == {0}


def test_a_map_of_one_dimension_has_no_strides(driver):
    tensor_map(FakeArray((64,), BF16), (64,))
    assert driver.calls[0][4:6] == ([64], [])


@pytest.mark.parametrize("name", DATA_TYPES)
def test_element_types_by_their_driver_names(driver, name):
    names = ("uint8", "uint16", "uint32", "int32", "uint64", "int64", "float16", "float32", "float64", "bfloat16")
    dtype = np.dtype(getattr(ml_dtypes, name) if hasattr(ml_dtypes, name) else name)
    tensor_map(FakeArray((4, 128), dtype), (16, 1))
    known = names[driver.calls[0][1]]
    assert known == name or (known == f"uint{8 * dtype.itemsize}" and name not in ("float16", "bfloat16"))


def test_a_refusal_of_the_driver(driver):
    driver.status = 1
    with pytest.raises(errors.LaunchError, match=r"driver refuses TensorMap\(dims=\(64, 4\).*: error 1"):
        tensor_map(FakeArray((4, 64), BF16), (64, 1))


def test_without_a_driver(monkeypatch):
    monkeypatch.setattr(tensor_map_driver, "_LIBRARY", "no such library")
    tensor_map_driver.encoder.cache_clear()
    with pytest.raises(errors.NotSupportedError, match="needs a driver of CUDA 12 or newer"):
        tensor_map(FakeArray((4, 64), BF16), (64, 1))
    tensor_map_driver.encoder.cache_clear()


def test_the_checks_are_the_same_for_a_gpu(driver):
    with pytest.raises(errors.ArgumentError, match="not a multiple of 16 bytes"):
        tensor_map(FakeArray((4, 64), BF16, pointer=0x1008), (64, 1))
    with pytest.raises(errors.ShapeError, match=r"box\[1\] is 300"):
        tensor_map(FakeArray((4, 64), BF16), (64, 300))
    assert not driver.calls


# ---- as an argument

KERNEL = r"""
struct alignas(64) TensorMap { unsigned long long opaque[16]; };
extern "C" __global__ void k(int first, const __grid_constant__ TensorMap map, unsigned long long* out) {
  asm volatile("prefetch.tensormap [%0];" :: "l"(&map) : "memory");
  if (threadIdx.x < 16) out[threadIdx.x] = map.opaque[threadIdx.x];
  if (threadIdx.x == 16) out[16] = reinterpret_cast<unsigned long long>(&map) % 64 + first;
}
"""


def test_a_kernel_gets_the_bytes_at_an_aligned_address():
    described = tensor_map(aligned((4, 64)), (64, 2))
    out = np.zeros(17, np.uint64)
    with host.check("all"):
        host.RawModule(code=KERNEL, arch="sm_90a").get_function("k")((1,), (32,), (np.int32(5), described, out))
    assert out[:16].tobytes() == described.value.tobytes() and out[16] == 5


def test_a_map_of_the_other_executor_is_refused(driver):
    kernel = host.RawModule(code=KERNEL, arch="sm_90a").get_function("k")
    on_gpu = tensor_map(FakeArray((4, 64), BF16), (64, 2))
    with pytest.raises(errors.LaunchError, match="argument 1 is a tensor map of an array on a GPU"):
        kernel((1,), (32,), (np.int32(5), on_gpu, np.zeros(17, np.uint64)))
    executor = CudaExecutor.__new__(CudaExecutor)
    fake_kernel = Kernel("source", "entry", None, 0, None)
    assert executor._values(fake_kernel, (np.int32(1), on_gpu)) == (np.int32(1), on_gpu.value)
    with pytest.raises(errors.LaunchError, match="entry: argument 0 is a tensor map of a NumPy array"):
        executor._values(fake_kernel, (tensor_map(aligned((4, 64)), (64, 2)),))


def test_something_else_where_a_tensor_map_should_be():
    kernel = host.RawModule(code=KERNEL, arch="sm_90a").get_function("k")
    with pytest.raises(errors.MemoryFaultError, match="there is no tensor map at"):
        kernel((1,), (32,), (np.int32(5), np.void(bytes(128)), np.zeros(17, np.uint64)))


def test_the_array_of_a_map_may_be_read_by_its_address():
    """It counts among the arrays that the launch was given."""
    code = r"""
struct alignas(64) TensorMap { unsigned long long opaque[16]; };
extern "C" __global__ void k(const __grid_constant__ TensorMap map, const float* x, float* y) {
  y[threadIdx.x] = x[threadIdx.x];
}
"""
    x, y = aligned((32,), np.float32), np.zeros(32, np.float32)
    x[:] = np.arange(32)
    host.finish(x)
    described = tensor_map(x, (32,))
    assert isinstance(described, TensorMap)
    kernel = host.RawModule(code=code, arch="sm_90a").get_function("k")
    with host.check("all"):
        kernel((1,), (32,), (described, np.uint64(x.ctypes.data), y))
    assert (y == x).all()
