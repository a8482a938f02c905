"""Memory that operations take, counted: every allocation that an executor makes for them, and how long it lives."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import numpy as np

from cuattn.benchmark.replaced import replaced
from cuattn.runtime.executor import CudaExecutor, HostExecutor


class Allocations:
    """What was allocated in a block.

    Attributes
    ----------
    total_bytes : int
        The sum of all allocations.
    peak_bytes : int
        The largest sum of those that were alive at the same time: results, and temporary arrays beside them.
    """

    def __init__(self) -> None:
        self.total_bytes = 0
        self.peak_bytes = 0
        self._alive_bytes = 0

    def add(self, array: Any) -> None:
        """Count an array until the memory that it lies in is given back."""
        nbytes = int(array.nbytes)
        self.total_bytes += nbytes
        self._alive_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self._alive_bytes)
        weakref.finalize(_owner(array), self._give_back, nbytes).atexit = False

    def _give_back(self, nbytes: int) -> None:
        self._alive_bytes -= nbytes


def _owner(array: Any) -> Any:
    """The object whose end frees the memory: views of the array keep it alive, though not the array itself."""
    if not isinstance(array, np.ndarray):  # CuPy's; the buffer of a NumPy array has no name for bfloat16
        return array.data.mem
    while getattr(array, "base", None) is not None:
        array = array.base
    return array


class allocations:
    """Count what operations allocate in a block, results included, on whichever executor.

    Examples
    --------
    >>> import numpy as np
    >>> import cuattn
    >>> x = np.zeros((4, 8), np.float32)
    >>> with allocations() as allocated:
    ...     y = cuattn.softmax(x)
    >>> allocated.peak_bytes == y.nbytes
    True
    """

    def __enter__(self) -> Allocations:
        found = Allocations()
        self._patches = ExitStack()
        for executor in (HostExecutor, CudaExecutor):
            self._patches.enter_context(replaced(executor, "empty", _counted(executor.empty, found)))
        return found

    def __exit__(self, *error: object) -> None:
        self._patches.close()


def _counted(empty: Callable[..., Any], found: Allocations) -> Callable[..., Any]:
    def counted(executor: Any, shape: Any, dtype: Any) -> Any:
        array = empty(executor, shape, dtype)
        found.add(array)
        return array

    return counted


def of_call(call: Callable[[], Any], inputs: Iterable[Any]) -> tuple[Any, int]:
    """The result of a call, and the bytes of its inputs, its outputs and its temporary arrays at their peak."""
    with allocations() as allocated:
        result = call()
    return result, sum(int(x.nbytes) for x in inputs) + allocated.peak_bytes
