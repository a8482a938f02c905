"""How long a call takes.

On the host executor: wall-clock and processor time of the process. On a GPU: CUDA events around each call, the second
level cache emptied before it, and all calls enqueued behind a waiting kernel, so that the time Python takes to launch
is not part of the result.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

HOST_METHOD = "median wall-clock time of calls on the host executor, after one to warm up; not a GPU time"
CUDA_METHOD = "median of CUDA event times, L2 emptied before each call, calls enqueued ahead"

_SOURCE = """
extern "C" __global__ void cuattn_wait(long long cycles) {
    long long start = clock64();
    while (clock64() - start < cycles) {}
}
// Reads count elements and writes nothing (the sum of squares is never negative), so L2 holds clean lines of x.
extern "C" __global__ void cuattn_read(const float4* x, long long count, float* out) {
    float sum = 0.0f;
    long long step = (long long)gridDim.x * blockDim.x;
    for (long long idx = (long long)blockIdx.x * blockDim.x + threadIdx.x; idx < count; idx += step) {
        float4 value = x[idx];
        sum += value.x * value.x + value.y * value.y + value.z * value.z + value.w * value.w;
    }
    if (sum < 0.0f) *out = sum;
}
"""


@dataclass(frozen=True, slots=True)
class Timing:
    """Times of single calls, in microseconds; ``cpu_us`` is the processor time of the process a call (host only)."""

    samples_us: tuple[float, ...]
    cpu_us: float | None = None

    @property
    def median_us(self) -> float:
        return statistics.median(self.samples_us)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles over the median."""
        low, high = np.percentile(self.samples_us, (25, 75))
        return float(high - low) / 2 / self.median_us

    @property
    def cores(self) -> float | None:
        """Processor time over elapsed time: how many cores the process really had (host only)."""
        mean_us = sum(self.samples_us) / len(self.samples_us)
        return None if self.cpu_us is None else self.cpu_us / mean_us

    def __add__(self, other: Timing) -> Timing:
        cpu_us = None
        if self.cpu_us is not None and other.cpu_us is not None:
            mine, others = len(self.samples_us), len(other.samples_us)
            cpu_us = (self.cpu_us * mine + other.cpu_us * others) / (mine + others)
        return Timing(self.samples_us + other.samples_us, cpu_us)

    def metrics(self) -> dict[str, float | int]:
        """Return the times by name, for a `Record`."""
        result: dict[str, float | int] = {
            "time_us": significant(self.median_us),
            "best_us": significant(min(self.samples_us)),
            "spread": significant(self.spread, 2),
            "samples": len(self.samples_us),
        }
        if self.cpu_us is not None and self.cores is not None:
            result["cpu_us"] = significant(self.cpu_us)
            result["cores"] = significant(self.cores, 2)
        return result

    def samples(self) -> dict[str, list[float]]:
        """Return the single times by the name of their median in `metrics`, for a `Record`."""
        return {"time_us": [significant(x, 5) for x in self.samples_us]}


def significant(value: float, digits: int = 4) -> float:
    """Round `value` to so many significant digits."""
    return float(f"{value:.{digits}g}")


def time_host(call: Callable[[], object], *, budget_s: float = 1.0, least: int = 3, most: int = 1000) -> Timing:
    """Time a call that returns when its work is done: `least` calls at least, then until the budget is spent."""
    call()
    samples: list[float] = []
    began, began_cpu = time.perf_counter(), time.process_time()
    while len(samples) < least or (len(samples) < most and time.perf_counter() - began < budget_s):
        start = time.perf_counter()
        call()
        samples.append((time.perf_counter() - start) * 1e6)
    return Timing(tuple(samples), (time.process_time() - began_cpu) * 1e6 / len(samples))


class CudaTimer:
    """Times calls on the current CuPy stream of the current device. Needs a GPU."""

    def __init__(self) -> None:
        import cupy

        self._cupy = cupy
        device = cupy.cuda.Device()
        # More than twice L2, so that nothing of the inputs is left there.
        attributes = device.attributes
        size = max(2 * int(attributes.get("L2CacheSize", 128 << 20)), 32 << 20) + (8 << 20)
        self._buffer = cupy.ones(size // 4, np.float32)
        self._out = cupy.empty(1, np.float32)
        self._num_sms = int(attributes.get("MultiProcessorCount", 128))
        # Cycles a second, rounded up: a clock that runs slower only makes the wait longer.
        self._hertz = 1000 * max(int(attributes.get("ClockRate", 0)), 2_000_000)
        module = _load(divmod(int(device.compute_capability), 10))
        self._wait, self._read = (module.get_function(name) for name in ("cuattn_wait", "cuattn_read"))

    def time(self, call: Callable[[], object], *, repeats: int = 30, warm_up: int = 3, budget_s: float = 0.5) -> Timing:
        """Time a call that enqueues work: `repeats` times, fewer (but 5) where the budget does not allow so many."""
        cupy = self._cupy
        for _ in range(warm_up):
            call()
        self.synchronize()
        start = time.perf_counter()
        call()
        enqueue_s = time.perf_counter() - start
        self.synchronize()
        once_s = time.perf_counter() - start
        repeats = max(5, min(repeats, int(budget_s / max(once_s, 1e-6))))
        events = [(cupy.cuda.Event(), cupy.cuda.Event()) for _ in range(repeats)]
        # The GPU waits until the host has enqueued everything; with twice the time that took, to be sure.
        self.wait(min(2 * repeats * (enqueue_s + 60e-6), 1.0))
        for before, after in events:
            self.flush()
            before.record()
            call()
            after.record()
        self.synchronize()
        elapsed = cupy.cuda.get_elapsed_time
        return Timing(tuple(1000 * elapsed(before, after) for before, after in events))

    def flush(self) -> None:
        """Enqueue a read of a buffer more than twice the size of L2."""
        count = self._buffer.size // 4
        self._read((4 * self._num_sms,), (512,), (self._buffer, np.int64(count), self._out))

    def wait(self, seconds: float) -> None:
        """Enqueue a kernel that takes that long, or somewhat longer."""
        self._wait((1,), (1,), (np.int64(seconds * self._hertz),))

    def release_memory(self) -> None:
        """Give back what CuPy keeps of arrays that are gone: torch has a pool of its own."""
        self._cupy.get_default_memory_pool().free_all_blocks()

    def synchronize(self) -> None:
        """Wait for the device."""
        self._cupy.cuda.Device().synchronize()


def _load(capability: tuple[int, int]) -> Any:
    import cupy

    from cuattn import compile

    target = compile.for_device(capability)
    binary = compile.build_source(_SOURCE, name="benchmark_timer.cu", arch=target.arch, kind=target.kind)
    return cupy.RawModule(path=str(compile.on_disk(binary)))
