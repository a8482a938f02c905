"""What only a GPU can confirm of docs/interop.md: real DLPack exporters, streams, graph capture, a second device."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

import cuattn
from cuattn.compat import flash_attn
from cuattn.testing import assert_attention_close, assert_gradients_close, assert_varlen_close
from cuattn.testing.executors import executor_names

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif("cuda" not in executor_names(), reason="no GPU answers"),
]


def make(dtype=np.float16, seed=0, seqlen=200):
    rng = np.random.default_rng(seed)
    shapes = (2, seqlen, 4, 64), (2, seqlen, 2, 64), (2, seqlen, 2, 64)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


@pytest.fixture
def cupy():
    return pytest.importorskip("cupy")


def torch_on_the_gpu():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no GPU")
    return torch


# --- PyTorch ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ("float16", "bfloat16", "float32"))
def test_torch_tensors_are_read_where_they_are(cupy, dtype):
    torch = torch_on_the_gpu()
    arrays = make(np.float32)
    tensors = [torch.from_numpy(x).to("cuda", getattr(torch, dtype)) for x in arrays]
    out = cuattn.attention(*tensors, causal=True)
    assert isinstance(out, cupy.ndarray) and out.dtype.name == dtype
    exact = [cupy.from_dlpack(x).get() for x in tensors]
    assert_attention_close(out.get(), *exact, causal=True)


def test_results_are_written_into_torch_tensors(cupy):
    torch = torch_on_the_gpu()
    arrays = make()
    tensors = [torch.from_numpy(x).cuda() for x in arrays]
    out = torch.empty_like(tensors[0])
    returned = cuattn.attention(*tensors, out=out)
    assert returned.data.ptr == out.data_ptr()
    cupy.cuda.get_current_stream().synchronize()
    assert_attention_close(out.cpu().numpy(), *arrays)


def test_work_of_torch_on_another_stream_is_waited_for_on_the_gpu(cupy):
    """The exporter orders its stream before CuPy's: q is not read before the slow work that makes it is done."""
    torch = torch_on_the_gpu()
    arrays = make()
    k, v = (torch.from_numpy(x).cuda() for x in arrays[1:])
    source, q = torch.from_numpy(arrays[0]).cuda(), torch.zeros(arrays[0].shape, dtype=torch.float16, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)
        q.copy_(source)
        out = cuattn.attention(q, k, v)
    assert_attention_close(out.get(), *arrays)


def test_views_of_packed_torch_tensors(cupy):
    torch = torch_on_the_gpu()
    qkv = np.random.default_rng(1).standard_normal((2, 65, 3, 4, 64)).astype(np.float16)
    out = flash_attn.flash_attn_qkvpacked_func(torch.from_numpy(qkv).cuda(), causal=True)
    assert_attention_close(out.get(), *(qkv[:, :, index] for index in range(3)), causal=True)


def test_gradients_of_torch_tensors(cupy):
    """Read and written where they are."""
    torch = torch_on_the_gpu()
    q, k, v = make()
    out, lse = cuattn.attention(q, k, v, causal=True, return_lse=True)
    arrays = out, q, k, v, out, lse
    dq, dk, dv = (torch.empty_like(torch.from_numpy(x), device="cuda") for x in (q, k, v))
    tensors = [torch.from_numpy(x).cuda() for x in arrays]
    grads = cuattn.attention_backward(*tensors, causal=True, dq=dq, dk=dk, dv=dv)
    assert [x.data.ptr for x in grads[:3]] == [x.data_ptr() for x in (dq, dk, dv)]
    assert_gradients_close(cuattn.AttentionGrads(*(x.get() for x in grads[:3])), *arrays, causal=True)


# --- streams ----------------------------------------------------------------------------------------------------------

DELAY = r"""
extern "C" __global__ void delay(long long clocks) {
  long long start = clock64();
  while (clock64() - start < clocks) {}
}
"""


def test_runs_on_the_current_stream_behind_what_is_there(cupy):
    """q is filled late, on a stream that does not wait for the default one; a launch elsewhere would read zeros."""
    arrays = make()
    source, k, v = map(cupy.asarray, arrays)
    q, out = cupy.zeros_like(source), cupy.zeros_like(source)
    cuattn.attention(q, k, v, out=out)  # compiles and loads
    delay = cupy.RawKernel(DELAY, "delay")
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        delay((1,), (1,), (np.int64(300_000_000),))
        q[...] = source
        cuattn.attention(q, k, v, out=out)
        assert not stream.done  # the call has returned and the stream is still at work: nothing waited for it
    stream.synchronize()
    assert_attention_close(out.get(), *arrays)


# --- graphs -----------------------------------------------------------------------------------------------------------


def capture(cupy, pool, call):
    """The recipe of docs/interop.md: warm up, then capture, all memory from a pool that nothing else uses."""
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream, cupy.cuda.using_allocator(pool.malloc):
        call()
        stream.synchronize()
        stream.begin_capture()
        result = call()
        graph = stream.end_capture()
    return graph, stream, result


def sinks_and_slopes(cupy):
    return {
        "alibi_slopes": cupy.asarray([0.5, 0, 1, 0.25], np.float32),
        "sinks": cupy.asarray([0, 1, 2, -1], np.float32),
    }


GRAPH_OPTIONS = {
    "plain": lambda cupy: {},
    "causal": lambda cupy: {"causal": True},
    "window": lambda cupy: {"window": (20, 3), "softcap": 5.0},
    "dropout": lambda cupy: {"dropout_p": 0.2, "dropout_seed": 3},
    "slopes and sinks": sinks_and_slopes,
    "mask": lambda cupy: {"mask": cupy.asarray(np.arange(200)[:, None] // 70 == np.arange(200) // 70)},
    "bias": lambda cupy: {"bias": cupy.asarray(np.random.default_rng(3).standard_normal((4, 200, 200)), np.float32)},
}


@pytest.mark.parametrize("name", GRAPH_OPTIONS)
def test_a_captured_call_replays_with_new_inputs(cupy, name):
    q, k, v = map(cupy.asarray, make())
    options = GRAPH_OPTIONS[name](cupy)
    out, pool = cupy.empty_like(q), cupy.cuda.MemoryPool()
    graph, stream, result = capture(cupy, pool, lambda: cuattn.attention(q, k, v, out=out, return_lse=True, **options))
    plain = {key: x.get() if isinstance(x, cupy.ndarray) else x for key, x in options.items()}
    for seed in (1, 2):
        arrays = make(seed=seed)
        with stream:
            for target, x in zip((q, k, v), arrays, strict=True):
                target.set(x, stream=stream)
            graph.launch(stream)
        # Allocations of others between replays must not touch what the graph works in.
        cupy.full(1 << 22, 0xFF, np.uint8)
        stream.synchronize()
        assert_attention_close(out.get(), *arrays, lse=result[1].get(), **plain)


@pytest.mark.parametrize("name", GRAPH_OPTIONS)
def test_captured_gradients_replay_with_new_inputs(cupy, name):
    """With all memory given, and dbias in the pool of the graph."""
    options = GRAPH_OPTIONS[name](cupy)
    plain = {key: x.get() if isinstance(x, cupy.ndarray) else x for key, x in options.items()}

    def inputs(seed):
        q, k, v = make(seed=seed)
        return (q, q, k, v, *cuattn.attention(q, k, v, return_lse=True, **plain))

    given = [cupy.asarray(x) for x in inputs(0)]
    into = {f"d{x}": cupy.empty_like(array) for x, array in zip("qkv", given[1:4], strict=True)}
    options |= {"return_dbias": "bias" in options}
    into["workspace"] = cupy.empty(cuattn.attention_backward_workspace_size(*given[1:4], **options), np.uint8)
    pool = cupy.cuda.MemoryPool()
    graph, stream, grads = capture(cupy, pool, lambda: cuattn.attention_backward(*given, **options, **into))
    for seed in (1, 2):
        arrays = inputs(seed)
        with stream:
            for target, x in zip(given, arrays, strict=True):
                target.set(x, stream=stream)
            graph.launch(stream)
        cupy.full(1 << 22, 0xFF, np.uint8)
        stream.synchronize()
        results = cuattn.AttentionGrads(*(None if x is None else x.get() for x in grads))
        assert_gradients_close(results, *arrays, **plain)


def test_a_captured_call_takes_new_lengths(cupy):
    """Lengths that only the device knows: the list of work is made again in each replay."""
    rng = np.random.default_rng(4)
    arrays = [rng.standard_normal(shape).astype(np.float16) for shape in ((300, 4, 64), (300, 2, 64), (300, 2, 64))]
    q, k, v = map(cupy.asarray, arrays)
    cu_seqlens = cupy.asarray([0, 100, 200, 300], np.int32)
    out, pool = cupy.empty_like(q), cupy.cuda.MemoryPool()
    graph, stream, _ = capture(
        cupy, pool, lambda: cuattn.attention_varlen(q, k, v, cu_seqlens, cu_seqlens, causal=True, out=out)
    )
    for lengths in ([0, 1, 299, 300], [0, 0, 300, 300]):
        cu_seqlens.set(np.array(lengths, np.int32), stream=stream)
        graph.launch(stream)
        stream.synchronize()
        lengths = np.array(lengths, np.int32)
        assert_varlen_close(out.get(), *arrays, lengths, lengths, causal=True)


def test_checks_of_values_on_the_device_end_a_capture(cupy, monkeypatch):
    """CUATTN_CHECK=1 waits for the GPU, which a capture does not allow: an error, not a hang."""
    q = cupy.zeros((10, 1, 64), np.float16)
    cu_seqlens, pool = cupy.asarray([0, 10], np.int32), cupy.cuda.MemoryPool()
    cuattn.attention_varlen(q, q, q, cu_seqlens, cu_seqlens)
    monkeypatch.setenv("CUATTN_CHECK", "1")
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream, cupy.cuda.using_allocator(pool.malloc):
        stream.begin_capture()
        try:
            with pytest.raises(Exception, match="apture"):
                cuattn.attention_varlen(q, q, q, cu_seqlens, cu_seqlens)
        finally:
            with contextlib.suppress(cupy.cuda.runtime.CUDARuntimeError):  # the capture was invalidated
                stream.end_capture()


# --- a second device --------------------------------------------------------------------------------------------------


def test_runs_where_the_arrays_are_not_where_the_caller_is(cupy):
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("one GPU only")
    arrays = make()
    with cupy.cuda.Device(1):
        given = [cupy.asarray(x) for x in arrays]
    with cupy.cuda.Device(0):
        out = cuattn.attention(*given)
        assert out.device.id == 1
        assert cupy.cuda.Device().id == 0
        with pytest.raises(TypeError, match=r"q is .* CUDA device 1 but k is .* CUDA device 0"):
            cuattn.attention(given[0], cupy.asarray(arrays[1]), given[2])
    assert_attention_close(out.get(), *arrays)
