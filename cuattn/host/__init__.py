"""The host executor: runs the PTX of CUDA kernels on the CPU, with memory, initialisation and race checks.

A test instrument for kernels that are meant for NVIDIA GPUs. It executes what NVRTC produced, instruction by
instruction, for 32 lanes at a time; see ``docs/host-executor.md``.

>>> import cuattn.host
>>> with cuattn.host.check("mem", "init", "race"), cuattn.host.schedule("random", seed=1):
...     pass  # kernels launched here are checked, in a random order
"""

from __future__ import annotations

from .memory import empty, finish
from .module import RawKernel, RawModule
from .profile import Profile, profile
from .settings import Settings, check, current, schedule

__all__ = [
    "Profile",
    "RawKernel",
    "RawModule",
    "Settings",
    "check",
    "current",
    "empty",
    "finish",
    "profile",
    "schedule",
]
