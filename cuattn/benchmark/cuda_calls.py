"""Latencies of calls on a GPU: compiling and loading, what Python costs, what a small problem takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import cuattn
from cuattn.benchmark import peers
from cuattn.benchmark.replaced import replaced
from cuattn.benchmark.results import Record
from cuattn.benchmark.suite import Step, failure
from cuattn.benchmark.variants import empty_cache
from cuattn.runtime.executor import CudaExecutor, cuda_executor
from cuattn.runtime.timer import significant
from cuattn.testing.cases import AttentionCase

CALLS = 200
QUEUED = 50  # calls between two synchronizations: the queue must not fill up, or the host waits for the device
SMALL = AttentionCase(1, 128, 8, 64, dtype="float16")


def call_steps() -> list[Step]:
    """Steps that measure compilation and loading, then calls."""
    return [
        Step("latency", "first_call_cuda", 4.0, first_call),
        Step("latency", "call_overhead_cuda", 3.0, call_overhead),
    ]


def first_call() -> Iterator[Record]:
    """Time a call whose kernel nobody has compiled, one whose kernel is in the disk cache, and one that is loaded."""
    arrays = SMALL.make_inputs(0, _cupy())
    times = {}
    with empty_cache():
        cuattn.compile.build_source("", name="nothing.cu", arch="sm_80", kind="ptx")  # NVRTC is loaded from here on
        for name in ("compile_ms", "cached_load_ms", "call_ms"):
            if name == "cached_load_ms":
                cuattn.compile.forget()
            if name != "call_ms":
                forget_loaded()
            times[name] = significant(1e3 * _synchronized(lambda: SMALL.run(arrays)))
        forget_loaded()
    yield Record(
        "latency",
        "first_call_cuda",
        times,
        executor="cuda",
        method="one call each, to its synchronized end: with an empty cache, from the disk cache, and again",
    )


def forget_loaded() -> None:
    """Make the executor of this process, and with it the plans that hold its kernels, start anew."""
    cuda_executor.cache_clear()
    _cupy().clear_memo()  # CuPy keeps loaded modules by their path


def call_overhead() -> Iterator[Record]:
    """Microseconds that Python takes for a call, on its way to the device, of cuattn and of torch."""
    case, arrays = SMALL, SMALL.make_inputs(0, _cupy())
    device = _cupy().cuda.Device()
    own = lambda: cuattn.attention(*(arrays[name] for name in "qkv"))  # noqa: E731
    own()
    with replaced(CudaExecutor, "_start", lambda *arguments: None):
        without_launch = enqueue_us(own, device)
    metrics = {
        "enqueue_us": enqueue_us(own, device),
        "overhead_us": without_launch,
        "latency_us": latency_us(own, device),
    }
    yield Record("latency", case.name, metrics, executor="cuda", method=_METHOD, goals={"overhead_us": "<= 60"})
    for peer in peers.call_peers():
        try:
            call = peer.prepare(case, arrays)
            call()
            figures = {"enqueue_us": enqueue_us(call, device), "latency_us": latency_us(call, device)}
            yield Record("latency", case.name, figures, peer.name, "cuda", _METHOD)
        except Exception as error:  # a peer may refuse in its own ways
            yield Record("latency", case.name, {}, peer.name, "cuda", _METHOD, error=failure(error))


_METHOD = (
    f"medians of {CALLS} calls: enqueue_us is until the call returns, overhead_us the same with the launch taken out, "
    "latency_us until the device is synchronized"
)


def enqueue_us(call: Callable[[], Any], device: Any) -> float:
    """Microseconds until the call returns."""
    times = []
    for index in range(CALLS):
        if index % QUEUED == 0:
            device.synchronize()
        start = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - start))
    device.synchronize()
    return significant(statistics.median(times))


def latency_us(call: Callable[[], Any], device: Any) -> float:
    """Microseconds until the device is synchronized."""
    times = []
    for _ in range(CALLS):
        start = time.perf_counter()
        call()
        device.synchronize()
        times.append(1e6 * (time.perf_counter() - start))
    return significant(statistics.median(times))


def _synchronized(call: Callable[[], Any]) -> float:
    device = _cupy().cuda.Device()
    device.synchronize()
    start = time.perf_counter()
    call()
    device.synchronize()
    return time.perf_counter() - start


def _cupy() -> Any:
    import cupy

    return cupy
