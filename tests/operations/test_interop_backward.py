"""Gradients of arrays on a GPU: where they run, what is copied and allocated, and that nothing waits.

It all runs on `simulated_cupy`, as test_interop.py does.
"""

from __future__ import annotations

import numpy as np
import pytest
from option_cases import F16, F64, FOR_EVERY_DTYPE, OPTION_CASES, option_case
from simulated_cupy import Exporter, installed

import cuattn
from cuattn.compat import flash_attn
from cuattn.errors import ArrayTypeError
from cuattn.testing import assert_gradients_close, assert_varlen_gradients_close

SHAPE = 2, 5, 7, 4, 2, 32, 32
NAMES = "dout", "q", "k", "v", "out", "lse"


@pytest.fixture
def cupy(monkeypatch):
    with installed(monkeypatch) as module:
        yield module


def make(dtype=np.float16, **options):
    """dout, q, k, v, out and lse: 2 sequences of 5 queries and 7 keys, 4 heads on 2, head dim 32; NumPy arrays."""
    rng = np.random.default_rng(0)
    q, k, v, dout = (
        rng.standard_normal(shape).astype(dtype)
        for shape in ((2, 5, 4, 32), (2, 7, 2, 32), (2, 7, 2, 32), (2, 5, 4, 32))
    )
    out, lse = cuattn.attention(q, k, v, return_lse=True, **options)
    return dout, q, k, v, out, lse


def make_packed(**options):
    rng = np.random.default_rng(5)
    shapes = (90, 4, 32), (90, 4, 32), (75, 2, 32), (75, 2, 32)
    dout, q, k, v = (rng.standard_normal(shape).astype(np.float16) for shape in shapes)
    lengths = np.array([0, 3, 3, 80, 90], np.int32), np.array([0, 1, 8, 75, 75], np.int32)
    out, lse = cuattn.attention_varlen(q, k, v, *lengths, return_lse=True, **options)
    return (dout, q, k, v, out, lse), lengths


def on_device(cupy, options):
    return {key: cupy.asarray(x) if isinstance(x, np.ndarray) else x for key, x in options.items()}


def to_host(grads):
    return cuattn.AttentionGrads(*(None if x is None else x.get() for x in grads))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, F16) for name in OPTION_CASES), *((name, F64) for name in FOR_EVERY_DTYPE)],
    ids=str,
)
def test_device_arrays_give_what_host_arrays_give(cupy, name, dtype):
    """Bit for bit, and without reading a value: that would wait for the GPU, and fail inside a graph capture."""
    options = option_case(name, SHAPE, dtype)
    arrays = make(dtype, **options)
    options |= {
        "return_dbias": "bias" in options,
        "dlse": np.linspace(-1, 1, 40, dtype=arrays[5].dtype).reshape(2, 4, 5),
    }
    expected = cuattn.attention_backward(*arrays, **options)
    given = on_device(cupy, options)
    results = cuattn.attention_backward(*map(cupy.asarray, arrays), **given)
    reversed_views = [cupy.asarray(np.ascontiguousarray(x[..., ::-1]))[..., ::-1] for x in arrays]
    into = {name: cupy.asarray(np.empty_like(x)) for name, x in zip(("dq", "dk", "dv"), arrays[1:4], strict=True)}
    again = cuattn.attention_backward(*reversed_views, **given, **into)
    assert again[:3] == tuple(into.values())
    assert cupy.num_synchronizations == 0
    for got in (results, again):
        for x, y in zip(got, expected, strict=True):
            assert (x is None) == (y is None)
            assert x is None or x.get().tobytes() == y.tobytes()


def test_runs_on_the_device_and_stream_of_the_caller(cupy):
    arrays = make()
    exporters = [Exporter(x, device_id=3) for x in arrays]
    cupy.stream = "a stream of the caller"
    grads = cuattn.attention_backward(*exporters)
    assert {x.device.id for x in grads[:3]} == {3}
    assert {launch.device for launch in cupy.launches} == {3}
    assert {launch.stream for launch in cupy.launches} == {"a stream of the caller"}
    assert {stream for exporter in exporters for stream in exporter.streams} == {"a stream of the caller"}
    assert cupy.cuda.Device().id == 0
    assert_gradients_close(to_host(grads), *arrays)


def test_dlpack_on_a_cuda_device_is_taken_without_a_copy(cupy):
    arrays = make()
    into = {name: np.full_like(x, np.nan) for name, x in zip(("dq", "dk", "dv"), arrays[1:4], strict=True)}
    grads = cuattn.attention_backward(*map(Exporter, arrays), **{name: Exporter(x) for name, x in into.items()})
    passed = {arg.data.ptr for launch in cupy.launches for arg in launch.args if isinstance(arg, cupy.ndarray)}
    assert {x.ctypes.data for x in (*arrays, *into.values())} <= passed
    assert_gradients_close(cuattn.AttentionGrads(**into), *arrays)
    assert [x.data.ptr for x in grads[:3]] == [x.ctypes.data for x in into.values()]


# What a call with dq=, dk=, dv= and workspace= allocates nevertheless: results.
RESULTS = {"sinks": 1, "sinks_and_mask": 1, "everything": 1}


@pytest.mark.parametrize("name", OPTION_CASES)
def test_a_call_with_all_memory_given_allocates_nothing(cupy, name):
    options = option_case(name, SHAPE, F16)
    arrays = make(F16, **options)
    given = on_device(cupy, options)
    q, k, v = map(Exporter, arrays[1:4])
    size = cuattn.attention_backward_workspace_size(q, k, v, **given)
    workspace = aligned(size)
    into = {name: Exporter(np.empty_like(x)) for name, x in zip(("dq", "dk", "dv"), arrays[1:4], strict=True)}
    cupy.num_allocations = cupy.num_uploads = 0
    cuattn.attention_backward(*map(Exporter, arrays), **given, **into, workspace=Exporter(workspace))
    assert (cupy.num_allocations, cupy.num_uploads) == (RESULTS.get(name, 0), 0)
    assert cupy.num_synchronizations == 0


def aligned(size):
    memory = np.full(size + 16, 0xFF, np.uint8)
    return memory[-memory.ctypes.data % 16 :][:size]


@pytest.mark.parametrize("packed", (False, True), ids=["dense", "packed"])
def test_sums_in_no_order(cupy, packed):
    """deterministic=False takes no more than its workspace, and does not wait either. Packed: a list of work more."""
    options = {"causal": True, "deterministic": False}
    if packed:
        arrays, lengths = make_packed(causal=True)
        named = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), map(Exporter, lengths), strict=True))
    else:
        arrays, named = make(causal=True), {}
    size = cuattn.attention_backward_workspace_size(*map(Exporter, arrays[1:4]), **named, **options)
    options["workspace"] = Exporter(aligned(size))
    into = {name: np.empty_like(x) for name, x in zip(("dq", "dk", "dv"), arrays[1:4], strict=True)}
    given = {name: Exporter(x) for name, x in into.items()}
    cupy.num_allocations = cupy.num_uploads = 0
    function = cuattn.attention_varlen_backward if packed else cuattn.attention_backward
    function(*map(Exporter, arrays), **named, **given, **options)
    assert (cupy.num_allocations, cupy.num_uploads, cupy.num_synchronizations) == (4 if packed else 0, 0, 0)
    grads = cuattn.AttentionGrads(**into)
    if packed:
        assert_varlen_gradients_close(grads, *arrays, *lengths, causal=True)
    else:
        assert_gradients_close(grads, *arrays, causal=True)


def test_the_gradient_of_a_bias_takes_no_memory_but_its_own(cupy):
    bias = np.linspace(-2, 2, 35, dtype=np.float32).reshape(5, 7)
    arrays, on_gpu = make(bias=bias), Exporter(bias)
    size = cuattn.attention_backward_workspace_size(*map(Exporter, arrays[1:4]), bias=on_gpu, return_dbias=True)
    into = {name: Exporter(np.empty_like(x)) for name, x in zip(("dq", "dk", "dv"), arrays[1:4], strict=True)}
    cupy.num_allocations = 0
    options = {"bias": on_gpu, "return_dbias": True, "workspace": Exporter(aligned(size))}
    grads = cuattn.attention_backward(*map(Exporter, arrays), **into, **options)
    assert cupy.num_allocations == 1
    assert_gradients_close(to_host(grads), *arrays, bias=bias)


def test_memory_that_layouts_take(cupy):
    """Strides are free; a last axis that is not contiguous is copied, in and out."""
    arrays = make()
    size = cuattn.attention_backward_workspace_size(*arrays[1:4])
    workspace = Exporter(aligned(size))
    free = [np.repeat(x, 2, axis=1)[:, ::2] for x in arrays[:5]]
    into = [np.empty((*x.shape[:-1], 64), np.float16) for x in arrays[1:4]]
    given = dict(zip(("dq", "dk", "dv"), (Exporter(x[..., :32]) for x in into), strict=True))
    cuattn.attention_backward(*map(Exporter, (*free, arrays[5])), **given, workspace=workspace)
    assert (cupy.num_allocations, cupy.num_synchronizations) == (0, 0)
    copied = [Exporter(np.ascontiguousarray(x[..., ::-1])[..., ::-1]) for x in arrays[:5]]
    given = dict(zip(("dq", "dk", "dv"), (Exporter(x[..., ::2]) for x in into), strict=True))
    cuattn.attention_backward(*copied, Exporter(arrays[5]), **given, workspace=workspace)
    assert (cupy.num_allocations, cupy.num_uploads, cupy.num_synchronizations) == (5 + 3, 0, 0)
    grads = cuattn.AttentionGrads(*(np.ascontiguousarray(x[..., ::2]) for x in into))
    assert_gradients_close(grads, *arrays)


@pytest.mark.parametrize("where", ("device", "host", "list"))
def test_packed_sequences(cupy, where):
    """Lengths on the device are not waited for; those on the host are copied and checked."""
    arrays, lengths = make_packed(causal=True)
    given = [Exporter(x) if where == "device" else x if where == "host" else x.tolist() for x in lengths]
    grads = cuattn.attention_varlen_backward(*map(Exporter, arrays), *given, causal=True)
    assert cupy.num_synchronizations == 0
    assert all(isinstance(x, cupy.ndarray) for x in grads[:3])
    assert_varlen_gradients_close(to_host(grads), *arrays, *lengths, causal=True)


@pytest.mark.parametrize(("where", "allocations", "uploads"), (("device", 4, 0), ("host", 4, 4)))
def test_memory_that_packed_sequences_take(cupy, where, allocations, uploads):
    """Two lists of work, of queries and of keys: made on the device with their offsets, or copied with the lengths."""
    arrays, lengths = make_packed()
    given = [Exporter(x) if where == "device" else x for x in lengths]
    into = {name: Exporter(np.empty_like(x)) for name, x in zip(("dq", "dk", "dv"), arrays[1:4], strict=True)}
    named = {"cu_seqlens_q": given[0], "cu_seqlens_k": given[1]}
    workspace = aligned(cuattn.attention_backward_workspace_size(*map(Exporter, arrays[1:4]), **named))
    cupy.num_allocations = cupy.num_uploads = 0
    cuattn.attention_varlen_backward(*map(Exporter, arrays), **named, **into, workspace=Exporter(workspace))
    assert (cupy.num_allocations, cupy.num_uploads) == (allocations, uploads)


def test_packed_sequences_with_a_workspace(cupy):
    arrays, lengths = make_packed()
    given = [Exporter(x) for x in lengths]
    q, k, v = map(Exporter, arrays[1:4])
    size = cuattn.attention_backward_workspace_size(q, k, v, cu_seqlens_q=given[0], cu_seqlens_k=given[1])
    grads = cuattn.attention_varlen_backward(*map(Exporter, arrays), *given, workspace=Exporter(aligned(size)))
    assert cupy.num_synchronizations == 0
    assert_varlen_gradients_close(to_host(grads), *arrays, *lengths)


@pytest.mark.parametrize("name", ("dout", "out", "lse", "dlse", "dq", "workspace"))
def test_arrays_elsewhere(cupy, name):
    arrays = {key: Exporter(x) for key, x in zip(NAMES, make(), strict=True)}
    x = np.zeros((2, 5, 4, 32), np.float16)
    with pytest.raises(ArrayTypeError, match=rf"q is .* CUDA device 0 but {name} is a numpy\.ndarray on the CPU"):
        cuattn.attention_backward(**arrays | {name: x})
    with pytest.raises(ArrayTypeError, match=rf"q is .* CUDA device 0 but {name} is .* CUDA device 1"):
        cuattn.attention_backward(**arrays | {name: Exporter(x, 1)})
    assert cupy.launches == []


def test_gradients_of_packed_qkv_of_another_library(cupy):
    """One array is allocated for all three gradients, beside the parts of the workspace."""
    rng = np.random.default_rng(6)
    qkv, dout = rng.standard_normal((2, 9, 3, 4, 32)).astype(np.float16), np.ones((2, 9, 4, 32), np.float16)
    q, k, v = (qkv[:, :, index] for index in range(3))
    out, lse = cuattn.attention(q, k, v, causal=True, return_lse=True)
    arrays, options = (dout, qkv, out, lse), {"causal": True, "deterministic": True}
    dqkv = flash_attn.flash_attn_qkvpacked_func_backward(*map(Exporter, arrays), **options)
    assert (cupy.num_allocations, cupy.num_uploads, cupy.num_synchronizations) == (1 + 2, 0, 0)
    assert isinstance(dqkv, cupy.ndarray) and dqkv.shape == qkv.shape
    dq, dk, dv = (dqkv.get()[:, :, index] for index in range(3))
    assert_gradients_close(cuattn.AttentionGrads(dq, dk, dv), dout, q, k, v, out, lse, causal=True)
    memory = np.full_like(qkv, np.nan)
    result = flash_attn.flash_attn_qkvpacked_func_backward(*map(Exporter, arrays), **options, dqkv=Exporter(memory))
    assert result.data.ptr == memory.ctypes.data
    assert memory.tobytes() == dqkv.get().tobytes()
