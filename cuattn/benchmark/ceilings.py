"""What the device can do at most, measured in the run in which it is compared with: a copy and a matrix product."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np

from cuattn.benchmark.results import Record
from cuattn.runtime.timer import CUDA_METHOD, CudaTimer, significant

COPY_BYTES = 2 << 30
MATRIX_SIZE = 8192


def copy(timer: CudaTimer) -> Record:
    """Measure a large device-to-device copy; bytes read and bytes written both count."""
    import cupy

    free, _ = cupy.cuda.runtime.memGetInfo()
    size = min(COPY_BYTES, int(free) // 8) // 4
    source = cupy.arange(size, dtype=np.uint32) * np.uint32(2654435761)  # not compressible
    target = cupy.empty_like(source)
    timing = timer.time(lambda: cupy.copyto(target, source))
    rate = 2 * source.nbytes / timing.median_us / 1e3
    metrics = {**timing.metrics(), "bandwidth_gb_per_s": significant(rate), "bytes": 2 * source.nbytes}
    return Record("ceilings", "copy", metrics, "CuPy copyto", "cuda", CUDA_METHOD, samples=timing.samples())


def matmul(timer: CudaTimer) -> Record:
    """Measure a large product of 16-bit matrices of random numbers: in torch, or else in CuPy."""
    call, provider, case = _product()
    timing = timer.time(call)
    rate = 2 * MATRIX_SIZE**3 / timing.median_us / 1e6
    metrics = {**timing.metrics(), "tflop_per_s": significant(rate)}
    return Record("ceilings", case, metrics, provider, "cuda", CUDA_METHOD, samples=timing.samples())


def _product() -> tuple[Callable[[], Any], str, str]:
    if importlib.util.find_spec("torch"):
        import torch

        a, b = (torch.randn(MATRIX_SIZE, MATRIX_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        out = torch.empty_like(a)
        return lambda: torch.matmul(a, b, out=out), "torch matmul", f"matmul_{MATRIX_SIZE}_bfloat16"
    import cupy

    shape = (MATRIX_SIZE, MATRIX_SIZE)
    x, y = (cupy.random.standard_normal(shape, dtype=np.float32).astype(np.float16) for _ in range(2))
    return lambda: cupy.matmul(x, y), "CuPy matmul", f"matmul_{MATRIX_SIZE}_float16"
