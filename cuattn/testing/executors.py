"""The executors that a test can run on here, with the checkers that belong to a test.

>>> executor = ExecutorUnderTest("host")
>>> executor.numpy(executor.array(np.arange(3.0))).tolist()
[0.0, 1.0, 2.0]
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cuattn import environment
from cuattn.testing.arrays import Guarded, Layout, allocate, surrounded
from cuattn.testing.rounding import to_numpy

__all__ = ["ExecutorUnderTest", "executor_names"]


def _device_answers() -> bool:
    """Whether a GPU can be used. The driver is asked for first: importing CuPy costs half a second."""
    try:
        ctypes.CDLL("libcuda.so.1")
        return int(importlib.import_module("cupy").cuda.runtime.getDeviceCount()) > 0
    except Exception:  # no driver, no CuPy, or a driver without a device: each has its own error type
        return False


def executor_names() -> list[str]:
    """Name the executors: "host", and "cuda" when a device answers."""
    return ["host", "cuda"] if _device_answers() else ["host"]


@dataclass(frozen=True)
class ExecutorUnderTest:
    """One executor as tests see it: `name` is "host" or "cuda"."""

    name: str

    @property
    def xp(self) -> Any:
        """The array module of this executor: numpy or cupy."""
        return np if self.name == "host" else importlib.import_module("cupy")

    def array(self, x: NDArray[Any] | Guarded) -> Any:
        """Copy `x` to an array of this executor, with the strides, the alignment and the surroundings that it has."""
        guarded = x if isinstance(x, Guarded) else surrounded(x)
        return guarded.array if self.xp is np else guarded.to(self.xp).array

    def guarded(self, shape: Sequence[int], dtype: DTypeLike, layout: Layout | None = None) -> Guarded:
        """Make poison of this executor, for ``out=`` and for :meth:`~cuattn.testing.arrays.Guarded.check` later."""
        guarded = allocate(shape, dtype, layout)
        return guarded if self.xp is np else guarded.to(self.xp)

    def numpy(self, x: Any) -> NDArray[Any]:
        """Copy a result to a NumPy array."""
        return to_numpy(x)

    @contextmanager
    def active(self, *, asynchrony: str = "late", seed: int | None = None) -> Iterator[ExecutorUnderTest]:
        """Switch all three checkers on (on the host), and let asynchronous work land as `asynchrony` says.

        "late": when the kernel's own waits force it. "random": at moments drawn from `seed`, which also draws the order
        of warps and CTAs. "eager": at once. `seed` is that of ``CUATTN_HOST_SEED`` when None.
        """
        if self.name != "host":
            yield self
            return
        host = importlib.import_module("cuattn.host")
        with (
            host.check("mem", "init", "race"),
            host.schedule(asynchrony, environment.host_seed() if seed is None else seed),
        ):
            yield self
