"""What GPUs can do at most, by their data sheets, and how long work takes at least."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from cuattn.errors import ArgumentError
from cuattn.estimate.numbers import count, named

__all__ = ["GPU", "GPUS", "Roofline", "arithmetic_intensity", "roofline"]


@dataclass(frozen=True, slots=True)
class GPU:
    """Ceilings of a GPU: 16-bit tensor-core FLOP/s without sparsity, sums in float32; bytes a second; bytes of memory.

    `arch` is what its kernels are compiled for, `sms` how many multiprocessors it has. `fp32_flops_per_s` and
    `fp64_flops_per_s` are those of fused multiply-adds outside of tensor cores.
    """

    flops_per_s: float
    bytes_per_s: float
    memory_bytes: int
    arch: str
    sms: int
    fp32_flops_per_s: float = 0.0
    fp64_flops_per_s: float = 0.0


GB = 10**9

#: The SXM form, where there are several.
GPUS: dict[str, GPU] = {
    "A100-40GB": GPU(312e12, 1555e9, 40 * GB, "sm_80", 108, 19.5e12, 9.7e12),
    "A100": GPU(312e12, 2039e9, 80 * GB, "sm_80", 108, 19.5e12, 9.7e12),
    "A10": GPU(125e12, 600e9, 24 * GB, "sm_86", 72, 31.2e12, 0.49e12),
    "RTX-3090": GPU(71e12, 936e9, 24 * GB, "sm_86", 82, 35.6e12, 0.56e12),
    "L4": GPU(121e12, 300e9, 24 * GB, "sm_89", 58, 30.3e12, 0.49e12),
    "L40S": GPU(362e12, 864e9, 48 * GB, "sm_89", 142, 91.6e12, 1.4e12),
    "RTX-4090": GPU(165.2e12, 1008e9, 24 * GB, "sm_89", 128, 82.6e12, 1.3e12),
    "H100": GPU(989.4e12, 3350e9, 80 * GB, "sm_90a", 132, 66.9e12, 33.5e12),
    "H200": GPU(989.4e12, 4800e9, 141 * GB, "sm_90a", 132, 66.9e12, 33.5e12),
}


class Roofline(NamedTuple):
    """What work takes at least on a GPU.

    `time_s` is the larger of what the arithmetic and what the memory take; `bound` says which; `intensity` is FLOPs a
    byte, `ridge` where the GPU changes from one bound to the other; `flops_per_s` is what can be reached.
    """

    time_s: float
    bound: Literal["compute", "memory"]
    intensity: float
    ridge: float
    flops_per_s: float


def arithmetic_intensity(flops: int, bytes: int) -> float:
    """Return FLOPs a byte: infinite for work that touches no memory.

    >>> arithmetic_intensity(600, 200)
    3.0
    """
    work, moved = count("flops", flops), count("bytes", bytes)
    return work / moved if moved else (math.inf if work else 0.0)


def roofline(gpu: str | GPU, flops: int, bytes: int) -> Roofline:
    """Say how long work takes at least, arithmetic and memory overlapping perfectly.

    Parameters
    ----------
    gpu : str or GPU
        One of `GPUS` by name, or ceilings of your own.
    flops, bytes : int
        What is computed, and what is moved between the GPU and its memory.

    Returns
    -------
    Roofline

    Examples
    --------
    >>> roofline("H200", 10**12, 48 * 10**9)
    Roofline(time_s=0.01, bound='memory', intensity=20.833333333333332, ridge=206.125, flops_per_s=100000000000000.0)
    """
    of = gpu if isinstance(gpu, GPU) else named("gpu", gpu, GPUS)
    if not (of.flops_per_s > 0 and of.bytes_per_s > 0):
        raise ArgumentError(f"gpu is {of}; ceilings above 0 are needed")
    intensity, ridge = arithmetic_intensity(flops, bytes), of.flops_per_s / of.bytes_per_s
    compute, memory = flops / of.flops_per_s, bytes / of.bytes_per_s
    time = max(compute, memory)
    return Roofline(
        time, "memory" if memory > compute else "compute", intensity, ridge, flops / time if time else of.flops_per_s
    )
