"""Which executor an array belongs to, and the checks between an operation and its kernel."""

from __future__ import annotations

import numpy as np
import pytest

from cuattn.errors import ArrayTypeError, EnvironmentVariableError, LaunchError
from cuattn.ops.attention.forward.config import PlainFwdConfig
from cuattn.runtime import executor as executors
from cuattn.runtime.executor import executor_for, host_executor

SOURCE = PlainFwdConfig().constants("float32", 32, 32)


class Foreign:
    """An array of another library: it has nothing but the protocols."""

    def __init__(self, array, device=(1, 0)):
        self._array, self._device = array, device

    def __dlpack_device__(self):
        return self._device

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)


class Convertible:
    def __array__(self, dtype=None, copy=None):
        return np.arange(3.0)


def test_numpy_arrays_run_on_the_host(monkeypatch):
    x = np.zeros(3)
    assert executor_for(x=x, y=x[::2]).name == "host"
    assert executor_for(x=x) is executor_for(y=x)
    monkeypatch.setenv("CUATTN_HOST_ARCH", "sm_90a")
    assert executor_for(x=x).arch == "sm_90a"
    assert executor_for(x=x).smem_limit_bytes == 227 * 1024
    monkeypatch.setenv("CUATTN_HOST_ARCH", "sm_1")
    with pytest.raises(EnvironmentVariableError, match="CUATTN_HOST_ARCH"):
        executor_for(x=x)


def test_foreign_arrays_on_the_cpu_run_on_the_host():
    foreign = Foreign(np.arange(3.0))
    executor = executor_for(x=foreign, y=np.zeros(3), z=Convertible())
    assert executor.name == "host"
    assert executor.asarray("y", foreign).tolist() == executor.asarray("z", Convertible()).tolist() == [0.0, 1.0, 2.0]


def test_foreign_arrays_that_numpy_cannot_read():
    class Broken(Foreign):
        def __dlpack__(self, **options):
            raise BufferError("no such type")

    with pytest.raises(ArrayTypeError, match="b: Broken cannot be read as a NumPy array: no such type"):
        host_executor("sm_80").asarray("b", Broken(None))


def test_places_that_differ():
    on_device, other_device = Foreign(None, (2, 0)), Foreign(None, (2, 1))
    with pytest.raises(ArrayTypeError, match=r"a is .*Foreign on CUDA device 0 but b is a numpy.ndarray on the CPU"):
        executor_for(a=on_device, b=np.zeros(3))
    with pytest.raises(ArrayTypeError, match=r"a is .* CUDA device 0 but b is .* CUDA device 1"):
        executor_for(a=on_device, b=other_device)
    with pytest.raises(ArrayTypeError, match=r"a: .*Foreign .* DLPack device 8"):
        executor_for(a=Foreign(None, (8, 0)))


def test_kernels_are_loaded_once():
    executor = host_executor("sm_80")
    kernel = executor.kernel("attention_plain", SOURCE, "cuattn_attention_plain")
    assert executor.kernel("attention_plain", dict(SOURCE), "cuattn_attention_plain") is kernel
    assert executor.kernel("attention_plain", SOURCE | {"NUM_WARPS": 8}, "cuattn_attention_plain") is not kernel


@pytest.mark.parametrize(
    ("grid", "block", "smem_bytes", "message"),
    (
        ((0,), (32,), 0, "grid.x is 0; 1 to 2147483647"),
        ((2**31,), (32,), 0, "grid.x is 2147483648"),
        ((1, 65536), (32,), 0, "grid.y is 65536; 1 to 65535"),
        ((1, 1, 65536), (32,), 0, "grid.z is 65536"),
        ((1, 1, 1, 1), (32,), 0, "grid has 4 extents"),
        ((1,), (1025,), 0, "block.x is 1025; 1 to 1024"),
        ((1,), (1, 1, 65), 0, "block.z is 65; 1 to 64"),
        ((1,), (32, 33), 0, "1056 threads a block"),
        ((1,), (32,), 163 * 1024 + 1, "166913 bytes of shared memory; a CTA may use 166912 on sm_80"),
        ((1,), (32,), -1, "shared memory"),
    ),
)
def test_launches_that_are_refused(monkeypatch, grid, block, smem_bytes, message):
    executor = host_executor("sm_80")
    kernel = executor.kernel("attention_plain", SOURCE, "cuattn_attention_plain")
    monkeypatch.setattr(executors.HostExecutor, "_start", lambda *args: pytest.fail("launched"))
    with pytest.raises(LaunchError, match=message):
        executor.launch(kernel, grid, block, {}, smem_bytes)
