"""A stand-in for CuPy whose device memory is host memory and whose kernels are the host executor's.

With it the whole CUDA side of an operation runs where there is no GPU: which executor is chosen, what is converted,
which device and stream are current at a launch, and whether a result comes back as the right kind of array. Reading a
value of an array in Python needs a synchronisation on a GPU; here it is counted, and so are allocations and copies from
the host, which a graph capture does not want either.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import numpy as np

from cuattn import compile as cc
from cuattn import host, launch

__all__ = ["ComputingCupy", "Exporter", "OnCpu", "SimulatedCupy", "installed"]


class Device:
    """``cupy.cuda.Device``: a context that makes a device the current one."""

    current = 0

    def __init__(self, device_id=None):
        self.id = Device.current if device_id is None else device_id
        self.compute_capability = "80"
        self.attributes = {"MultiProcessorCount": 4}

    def __enter__(self):
        self._outer, Device.current = Device.current, self.id

    def __exit__(self, *exc_info):
        Device.current = self._outer


class Array:
    """``cupy.ndarray``: metadata is free, values cost a synchronisation. As CuPy's, it is no `numpy.ndarray`."""

    def __init__(self, array, cupy, device_id):
        self._array, self._cupy = array, cupy
        self.device = SimpleNamespace(id=device_id)

    shape, strides, dtype, ndim, size, nbytes = (
        property(lambda self, name=name: getattr(self._array, name))
        for name in ("shape", "strides", "dtype", "ndim", "size", "nbytes")
    )
    flags = property(lambda self: self._array.flags)

    @property
    def data(self):
        return SimpleNamespace(ptr=self._array.__array_interface__["data"][0])

    def __array__(self, *args, **kwargs):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    def __len__(self):
        return len(self._array)

    def __getitem__(self, index):
        return self._cupy.wrap(self._array[self._cupy.unwrap(index)], self.device.id)

    def __setitem__(self, index, value):
        assert Device.current == self.device.id, "the device of the array is not current"
        self._array[self._cupy.unwrap(index)] = self._cupy.unwrap(value)

    def __getattr__(self, name):
        """Array operations that stay on the device."""
        if name not in {"astype", "copy", "reshape", "swapaxes", "transpose", "view", "ravel", "squeeze", "T", "fill"}:
            raise AttributeError(f"the simulated cupy.ndarray has no {name!r}")
        return self._cupy.forward(getattr(self._array, name), self.device.id)

    def get(self):
        self._cupy.num_synchronizations += 1
        return self._array.copy()

    def _value(self, name):
        self._cupy.num_synchronizations += 1
        return getattr(self._array, name)()

    def item(self):
        return self._value("item")

    def tolist(self):
        return self._value("tolist")

    def __bool__(self):
        return self._value("__bool__")

    def __int__(self):
        return self._value("__int__")

    def __index__(self):
        return self._value("__index__")

    def __float__(self):
        return self._value("__float__")

    def __dlpack_device__(self):
        return 2, self.device.id


class Function:
    """``cupy.RawKernel``: remembers the device and the stream that were current when it was launched."""

    def __init__(self, function, cupy):
        self._function, self._cupy = function, cupy

    def __call__(self, grid, block, args, shared_mem=0):
        self._cupy.launches.append(SimpleNamespace(device=Device.current, stream=self._cupy.stream, args=args))
        assert not any(isinstance(arg, np.ndarray) for arg in args), "a host array went to a device kernel"
        self._function(grid, block, tuple(self._cupy.unwrap(arg) for arg in args), shared_mem=shared_mem)

    @property
    def shared_size_bytes(self):
        return self._function.shared_size_bytes

    @property
    def max_dynamic_shared_size_bytes(self):
        return self._function.max_dynamic_shared_size_bytes

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, num_bytes):
        self._function.max_dynamic_shared_size_bytes = num_bytes


class Exporter:
    """An array of another library on a CUDA device: it has the DLPack protocol and nothing else."""

    def __init__(self, array, device_id=0):
        self.array, self.device_id = array, device_id
        self.streams = []  # what each consumer said it would read on

    def __dlpack_device__(self):
        return 2, self.device_id

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        assert dl_device is None and not copy, "an import that copies"
        self.streams.append(stream)
        return self.array.__dlpack__(max_version=max_version)


class OnCpu:
    """An array of another library on the CPU, likewise."""

    def __init__(self, array):
        self.array = array

    def __dlpack_device__(self):
        return 1, 0

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)


class _OnTheHost:
    """A capsule of simulated device memory, for NumPy to read."""

    def __init__(self, capsule):
        self._capsule = capsule

    def __dlpack_device__(self):
        return 1, 0

    def __dlpack__(self, **options):
        return self._capsule


class SimulatedCupy(ModuleType):
    """The module: NumPy's functions on `Array`, and the parts of ``cupy.cuda`` that launching needs."""

    def __init__(self):
        super().__init__("cupy")
        self.num_synchronizations = self.num_allocations = self.num_uploads = 0
        self.launches = []
        self.stream = "the default stream"
        self.ndarray = Array
        self.cuda = SimpleNamespace(Device=Device)

    def RawModule(self, path):
        module = host.RawModule(path=path)
        return SimpleNamespace(get_function=lambda entry: Function(module.get_function(entry), self))

    def wrap(self, value, device_id=None):
        return Array(value, self, Device.current if device_id is None else device_id)

    def unwrap(self, value):
        if isinstance(value, Array):
            return value._array
        if isinstance(value, tuple):
            return tuple(map(self.unwrap, value))
        return value

    def forward(self, value, device_id):
        if not callable(value):
            return self.wrap(value, device_id)
        return lambda *args, **kwargs: self.wrap(value(*map(self.unwrap, args), **kwargs), device_id)

    def asarray(self, x, dtype=None):
        return x if isinstance(x, Array) and (dtype is None or x.dtype == dtype) else self.array(x, dtype)

    def array(self, x, dtype=None, order="K"):
        self.num_allocations += 1
        self.num_uploads += not isinstance(x, Array)
        return self.wrap(np.array(self.unwrap(x), dtype, order=order))

    def ascontiguousarray(self, x, dtype=None):
        contiguous = isinstance(x, Array) and x.flags.c_contiguous and (dtype is None or x.dtype == dtype)
        return x if contiguous else self.array(x, dtype, order="C")

    def empty(self, shape, dtype):
        self.num_allocations += 1
        return self.wrap(np.empty(shape, dtype))

    def from_dlpack(self, x):
        capsule = x.__dlpack__(stream=self.stream, max_version=(1, 0))
        return self.wrap(np.from_dlpack(_OnTheHost(capsule)), x.__dlpack_device__()[1])

    def __getattr__(self, name):
        if name not in {"zeros", "full", "broadcast_to"}:
            raise AttributeError(f"the simulated cupy has no {name!r}")
        return self.forward(getattr(np, name), None)


class ComputingArray(np.lib.mixins.NDArrayOperatorsMixin, Array):
    """`Array` with arithmetic, which refuses NumPy arrays as CuPy does."""

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        assert method == "__call__" and not options
        if any(isinstance(x, np.ndarray) for x in inputs):
            raise TypeError("Unsupported type <class 'numpy.ndarray'>")
        return self._cupy.wrap(ufunc(*map(self._cupy.unwrap, inputs)), self.device.id)

    def __getitem__(self, index):
        assert not isinstance(index, np.ndarray), "an index on the host"
        return super().__getitem__(index)

    def sum(self, axis):
        return self._cupy.wrap(self._array.sum(axis=axis), self.device.id)

    def mean(self, axis, keepdims):
        return self._cupy.wrap(self._array.mean(axis=axis, keepdims=keepdims), self.device.id)


class ComputingCupy(SimulatedCupy):
    """The module with arrays that compute, and a stream that counts who waits for it in ``stream_waits``."""

    def __init__(self):
        super().__init__()
        self.stream_waits = []
        stream = type("Stream", (), {"synchronize": lambda _: self.stream_waits.append(1)})()
        self.cuda = SimpleNamespace(Device=Device, get_current_stream=lambda: stream)

    def wrap(self, value, device_id=None):
        return ComputingArray(value, self, Device.current if device_id is None else device_id)

    def __getattr__(self, name):
        computing = {"arange", "clip", "concatenate", "maximum", "minimum", "repeat", "searchsorted", "stack"}
        if name in computing | {"take_along_axis", "where", "zeros_like"}:
            return self.forward(getattr(np, name), None)
        return super().__getattr__(name)


@contextmanager
def installed(monkeypatch, module=SimulatedCupy) -> Iterator[SimulatedCupy]:
    """The stand-in as the module ``cupy``, with executors of its own."""
    cupy = module()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(launch.compile, "for_device", lambda device: cc.arch.Target("sm_80", "ptx"))
    launch.cuda_executor.cache_clear()
    try:
        yield cupy
    finally:
        launch.cuda_executor.cache_clear()
