"""Arguments of a launch: of the class, size, range and byte order that the kernel declares, or refused."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import cuattn.host as host
from cuattn import errors

SOURCE = r"""
#include <cuda_fp16.h>
#include <cuda_bf16.h>
struct Pair { int a, b; };
extern "C" __global__ void f32(double* o, float a) { o[0] = a; }
extern "C" __global__ void f64(double* o, double a) { o[0] = a; }
extern "C" __global__ void i8(double* o, signed char a) { o[0] = a; }
extern "C" __global__ void i16(double* o, short a) { o[0] = a; }
extern "C" __global__ void i32(double* o, int a) { o[0] = a; }
extern "C" __global__ void i64(double* o, long long a) { o[0] = (double)a; }
extern "C" __global__ void u64(double* o, unsigned long long a) { o[0] = (double)a; }
extern "C" __global__ void bit(double* o, bool a) { o[0] = a; }
extern "C" __global__ void half_(double* o, __half a) { o[0] = __half2float(a); }
extern "C" __global__ void brain(double* o, __nv_bfloat16 a) { o[0] = __bfloat162float(a); }
extern "C" __global__ void pair(double* o, Pair a) { o[0] = a.a + 100 * a.b; }
extern "C" __global__ void complex_(double* o, double2 a) { o[0] = a.x + 100 * a.y; }
extern "C" __global__ void pointer(double* o, const double* a) { o[0] = a ? a[0] : -1; }
"""

PAIR = np.void(np.array([3, 2], np.int32).tobytes())
RECORD = np.array((3, 2), [("a", "<i4"), ("b", "<i4")])[()]


@pytest.fixture(scope="module")
def module():
    return host.RawModule(SOURCE, arch="sm_80")


def value_of(module, name, arg):
    out = np.full(1, -7.0)
    with host.check("all"):
        module.get_function(name)((1,), (1,), (out, arg))
    return out[0]


@pytest.mark.parametrize(
    ("name", "arg", "expected"),
    [
        ("f32", np.float32(2.5), 2.5),
        ("f64", np.float64(2.5), 2.5),
        ("f64", 2.5, 2.5),
        ("i8", np.int8(-3), -3),
        ("i8", np.uint8(7), 7),
        ("i16", np.int16(-300), -300),
        ("i32", np.int32(-3), -3),
        ("i32", np.uint32(3), 3),
        ("i64", -3, -3),
        ("i64", np.int64(1 << 40), 1 << 40),
        ("u64", (1 << 64) - 2048, 2.0**64 - 2048),
        ("bit", True, 1),
        ("bit", np.bool_(True), 1),
        ("half_", np.float16(2.5), 2.5),
        ("brain", ml_dtypes.bfloat16(2.5), 2.5),
        ("pair", PAIR, 203),
        ("pair", RECORD, 203),
        ("complex_", 3 + 2j, 203),
        ("complex_", np.complex128(3 + 2j), 203),
        ("pointer", np.array([5.0]), 5),
        ("pointer", None, -1),
    ],
)
def test_values_of_the_declared_class_arrive(module, name, arg, expected):
    assert value_of(module, name, arg) == expected


@pytest.mark.parametrize(
    ("name", "arg", "match"),
    [
        ("f64", 2, "argument 1 .int. is 2, the kernel's parameter is a 64-bit floating-point number"),
        ("f64", np.int64(2), "floating-point number"),
        ("f64", np.array([2.0]), "argument 1 is an array, the kernel's parameter is a 64-bit floating-point number"),
        ("f64", None, "argument 1 is None"),
        ("i64", 3.0, "argument 1 .float. is 3.0, the kernel's parameter is a 64-bit integer"),
        ("i64", np.float64(3), "64-bit integer"),
        ("i64", np.datetime64("2020-01-01"), "64-bit integer"),
        ("i64", np.bytes_(b"12345678"), "64-bit integer"),
        ("i64", PAIR, "64-bit integer"),
        ("i64", np.complex64(1), "64-bit integer"),
        ("u64", 1 << 64, "does not fit 64 bits"),
        ("u64", -(1 << 63) - 1, "does not fit 64 bits"),
        ("f32", np.int32(5), "argument 1 .int32. is np.int32.5., the kernel's parameter is a 32-bit floating-point"),
        ("f32", 5.0, "has 8 bytes, the kernel's parameter 4 .a Python number has 8"),
        ("i32", np.float32(2), "32-bit integer"),
        ("i32", True, "has 1 bytes"),
        ("i8", 7, "has 8 bytes, the kernel's parameter 1"),
        ("half_", np.int16(2), "struct of 2 bytes"),
        ("brain", np.uint16(2), "struct of 2 bytes"),
        ("pair", np.int64(2), "struct of 8 bytes"),
        ("pair", np.zeros(2, np.int32), "argument 1 is an array, the kernel's parameter is a struct of 8 bytes"),
        ("pair", np.array((3, 2), [("a", ">i4"), ("b", ">i4")])[()], "struct of 8 bytes"),
        ("pair", "12345678", "argument 1 is a str"),
        ("pointer", b"12345678", "argument 1 is a bytes"),
        ("pointer", [1.0], "argument 1 is a list"),
        ("pointer", 1.5, "is a pointer: pass an array, or None"),
        ("pointer", 64, "none of the arrays of this launch is there"),
        ("pointer", np.array([1.0], ">f8"), "has the other byte order"),
        ("pointer", np.array([1.0, None], object), "holds Python objects"),
        ("pointer", np.zeros(1, [("a", "f8")]), "is structured"),
        ("pointer", np.zeros(1, "M8[s]"), "no counterpart"),
        ("pointer", np.zeros(1, np.longdouble), "no counterpart"),
        ("pointer", np.array(["text"]), "no counterpart"),
        ("pointer", np.ma.masked_greater(np.arange(3.0), 1), "masked array"),
    ],
)
def test_what_would_be_read_as_something_else_is_refused(module, name, arg, match):
    out = np.full(1, -7.0)
    with pytest.raises(errors.LaunchError, match=match):
        module.get_function(name)((1,), (1,), (out, arg))
    assert out[0] == -7


def test_an_address_inside_an_array_of_the_launch_is_a_pointer(module):
    out = np.array([0.0, 5.0])
    with host.check("all"):
        module.get_function("pointer")((1,), (1,), (out, out.ctypes.data + 8))
    assert out[0] == 5


@pytest.mark.parametrize(
    ("declared", "arg", "match"),
    [
        (".param .u64 .ptr .global .align 4 numbers", np.uint64(3), "argument 1 numbers"),
        (".param .u64 numbers", np.zeros(1), "argument 1 numbers is an array"),  # .ptr stands at the other one only
        (".param .s32 number", np.uint32(1 << 31), "argument 1 number .* signed"),
        (".param .f16 number", ml_dtypes.bfloat16(1), "16-bit floating-point"),
        (".param .f32 number", np.uint32(1), "32-bit floating-point"),
        (".param .b32 bits", np.float64(1), "8 bytes"),
    ],
)
def test_the_declaration_of_a_parameter_decides(declared, arg, match):
    kernel = host.RawModule(DECLARING % declared).get_function("k")
    with pytest.raises(errors.LaunchError, match=match):
        kernel((1,), (1,), (np.zeros(1), arg))


DECLARING = """.version 7.8
.target sm_80
.address_size 64
.visible .entry k(.param .u64 .ptr .align 8 out, %s) { ret; }
"""


def test_bits_are_taken_as_they_are():
    kernel = host.RawModule(DECLARING % ".param .b32 bits").get_function("k")
    for arg in (np.float32(1), np.int32(1), np.uint32(1)):
        kernel((1,), (1,), (np.zeros(1), arg))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"args": np.zeros((2, 2))}, "args is a ndarray"),
        ({"grid": (1.5,)}, "grid is 1.5"),
        ({"block": ("x",)}, "block is 'x'"),
        ({"shared_mem": 2.0}, "shared_mem is 2.0"),
        ({"stream": object()}, "stream is a object"),
    ],
)
def test_a_launch_of_the_wrong_form_is_refused(module, change, match):
    call = {"grid": (1,), "block": (1,), "args": (np.zeros(1), 1), **change}
    with pytest.raises(errors.LaunchError, match=match):
        module.get_function("i64")(call.pop("grid"), call.pop("block"), call.pop("args"), **call)


# ---- writability

WRITING = r"""
extern "C" __global__ void store(float* o, const float* x) { o[threadIdx.x] = x ? x[threadIdx.x] : 7; }
extern "C" __global__ void atomic(float* o, const float* x) { atomicAdd(o + threadIdx.x, 1.0f); }
extern "C" __global__ void generic(float* o, const float* x) {
  float mine = 1;
  float* p = x ? o : &mine;
  *(volatile float*)p = 7;
}
"""


def read_only(tmp_path, kind):
    if kind == "flag":
        x = np.zeros(4, np.float32)
        x.flags.writeable = False
    elif kind == "bytes":
        x = np.frombuffer(bytes(16), np.float32)
    elif kind == "broadcast":
        x = np.broadcast_to(np.float32(0), (4,))
    else:
        np.zeros(4, np.float32).tofile(tmp_path / "data")
        x = np.memmap(tmp_path / "data", np.float32, "r")
    return x


@pytest.mark.parametrize("checks", [(), ("mem",), ("race",), ("init",)])
@pytest.mark.parametrize("kind", ["flag", "bytes", "broadcast", "memmap"])
def test_a_write_into_a_read_only_array_is_a_fault(tmp_path, kind, checks):
    module = host.RawModule(WRITING)
    x = read_only(tmp_path, kind)
    other = np.ones(4, np.float32)
    with host.check(*checks):
        for name in ("store", "atomic", "generic"):
            with pytest.raises(errors.MemoryFaultError, match="argument 0, a read-only array"):
                module.get_function(name)((1,), (4,), (x, other))
        assert (np.asarray(x) == 0).all()
        module.get_function("store")((1,), (4,), (other, x if kind != "broadcast" else x.copy()))  # it may be read
    assert (other == 0).all()


def test_memory_that_a_writable_array_covers_may_be_written():
    """An argument may be a read-only view of another one."""
    kernel = host.RawModule(WRITING).get_function("store")
    whole = np.zeros(12, np.float32)
    view = whole[:]
    view.flags.writeable = False
    kernel((1,), (4,), (whole[4:8], view))
    with pytest.raises(errors.MemoryFaultError, match="argument 1, a read-only array"):
        kernel((1,), (5,), (whole[4:8], view))
    assert whole.tolist() == [0] * 12


def test_a_bulk_store_into_a_read_only_array_is_a_fault():
    code = r"""
extern "C" __global__ void k(float* o) {
  __shared__ alignas(16) float s[32];
  s[threadIdx.x] = 1;
  asm volatile("fence.proxy.async;" ::: "memory");
  __syncthreads();
  if (threadIdx.x) return;
  unsigned at = (unsigned)__cvta_generic_to_shared(s);
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], 128;" :: "l"(o), "r"(at) : "memory");
  asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;" ::: "memory");
}
"""
    kernel = host.RawModule(code, arch="sm_90a").get_function("k")
    x = host.empty(32, np.float32)
    x[:] = 0
    kernel((1,), (32,), (x,))
    assert (x == 1).all()
    x.flags.writeable = False
    for checks in ((), ("all",)):
        with host.check(*checks), pytest.raises(errors.MemoryFaultError, match="argument 0, a read-only array"):
            kernel((1,), (32,), (x,))
