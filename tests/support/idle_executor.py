"""A host executor that compiles nothing and starts nothing, for tests of what a call allocates.

It is an object of its own, so what is kept from call to call for an executor, kernels among it, is kept for it alone.
"""

from __future__ import annotations

from typing import Any

import pytest

from cuattn.runtime import executor as executors


class IdleExecutor(executors.HostExecutor):
    """`allocated` has the arrays that it was asked for, in their order."""

    def __init__(self, arch: str) -> None:
        super().__init__(arch)
        self.allocated: list[Any] = []

    def empty(self, shape: Any, dtype: Any) -> Any:
        self.allocated.append(super().empty(shape, dtype))
        return self.allocated[-1]

    def kernel(self, *arguments: Any) -> None:
        pass

    def launch(self, *arguments: Any) -> None:
        pass

    def finish(self, *arrays: Any) -> None:
        pass


def install(monkeypatch: pytest.MonkeyPatch, arch: str = "sm_80") -> IdleExecutor:
    """Calls with NumPy arrays run on the one that is returned."""
    idle = IdleExecutor(arch)
    monkeypatch.setattr(executors, "host_executor", lambda arch: idle)
    return idle
