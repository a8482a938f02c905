"""Arrays of other libraries on the CPU: they run on the host executor, over the same memory, bfloat16 included."""

from __future__ import annotations

import ctypes
import sys

import ml_dtypes
import numpy as np
import pytest
from simulated_cupy import OnCpu

import cuattn
from cuattn import dlpack
from cuattn.errors import ArrayTypeError, OverlapError
from cuattn.testing import assert_attention_close, assert_gradients_close


def make(dtype=np.float16, seed=0):
    """q, k and v for 2 sequences of 5 queries and 7 keys, 4 heads on 2, head dim 32."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for shape in ((2, 5, 4, 32), (2, 7, 2, 32), (2, 7, 2, 32))]


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
    metadata = {"sinks": np.zeros(4, np.float32), "alibi_slopes": np.zeros(4), "diagonal_offset": np.zeros(2, np.int32)}
    for name, x in metadata.items():
        with pytest.raises(ArrayTypeError, match=f"{name} is a masked array"):
            cuattn.attention(*make(), **{name: np.ma.masked_greater(x, 0)})


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


def test_gradients_of_dlpack_on_the_cpu():
    """bfloat16 included; gradients given through DLPack are written where they are."""
    q, k, v = make(ml_dtypes.bfloat16)
    out, lse = cuattn.attention(q, k, v, return_lse=True)
    into = {f"d{name}": np.zeros_like(x) for name, x in (("q", q), ("k", k), ("v", v))}
    given = {name: NarrowOnCpu(x) for name, x in into.items()}
    grads = cuattn.attention_backward(*map(NarrowOnCpu, (out, q, k, v, out)), OnCpu(lse), **given)
    assert [type(x) for x in grads[:3]] == [np.ndarray] * 3
    assert_gradients_close(cuattn.AttentionGrads(**into), out, q, k, v, out, lse)


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
    from cuattn.runtime.executor import executor_for

    for dtype in ("float32", "bfloat16"):
        x = torch_arrays(dtype)[0].transpose(1, 2)[:, ::2]
        array = executor_for(x=x).asarray("x", x)
        assert array.__array_interface__["data"][0] == x.data_ptr()
        assert [stride // array.itemsize for stride in array.strides] == list(x.stride())


def test_the_memory_of_a_narrow_tensor_lives_as_long_as_the_array():
    torch = pytest.importorskip("torch")
    from cuattn.runtime.executor import host_executor

    arrays = [host_executor("sm_80").asarray("x", torch.full((1000,), i, dtype=torch.bfloat16)) for i in range(50)]
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
