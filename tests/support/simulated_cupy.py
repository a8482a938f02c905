"""A stand-in for CuPy whose device memory is host memory and whose kernels are the host executor's.

With it the whole CUDA side of an operation runs where there is no GPU: which executor is chosen, what is converted,
which device and stream are current at a launch, and whether a result comes back as the right kind of array. Reading a
value of an array in Python needs a synchronisation on a GPU; here it is counted, and so are allocations and copies from
the host, which a graph capture does not want either.

It refuses what CuPy 14 refuses: to make, copy or convert arrays of dtypes that it cannot name in CUDA C (those of 8-bit
floats are views of memory and nothing else), flags that it does not have, NumPy arrays and other objects as arguments
of a kernel, and arguments in a form that its compiled functions do not take. An event happens when the test says so.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import numpy as np

from cuattn import compile as cc
from cuattn import host
from cuattn.runtime import executor as executors

__all__ = ["ComputingCupy", "Exporter", "OnCpu", "SimulatedCupy", "installed"]


def check_named(*dtypes):
    """Raise unless CuPy has a name in CUDA C for each of these."""
    for dtype in map(np.dtype, dtypes):
        if dtype.char not in "?bhilqBHILQefdFD" and dtype.name != "bfloat16":
            raise ValueError(f"Unsupported dtype {dtype}")
        if not dtype.isnative:
            raise ValueError(f"Unsupported dtype {dtype} with big-endian byte-order")


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

    @property
    def flags(self):
        flags = self._array.flags
        return SimpleNamespace(**{name: getattr(flags, name) for name in ("c_contiguous", "f_contiguous", "owndata")})

    @property
    def data(self):
        return SimpleNamespace(ptr=self._array.__array_interface__["data"][0])

    @property
    def __cuda_array_interface__(self):
        return self._array.__array_interface__

    def __array__(self, *args, **kwargs):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    def __len__(self):
        return len(self._array)

    def __getitem__(self, index):
        return self._cupy.wrap(self._array[self._cupy.unwrap(index)], self.device.id)

    def __setitem__(self, index, value):
        assert Device.current == self.device.id, "the device of the array is not current"
        check_named(self.dtype)
        self._array[self._cupy.unwrap(index)] = self._cupy.unwrap(value)

    def __getattr__(self, name):
        """Array operations that stay on the device."""
        if name not in {"astype", "copy", "reshape", "swapaxes", "transpose", "view", "ravel", "squeeze", "T", "fill"}:
            raise AttributeError(f"the simulated cupy.ndarray has no {name!r}")
        result = self._cupy.forward(getattr(self._array, name), self.device.id)
        copies = name in {"astype", "copy", "fill"} or (name in {"reshape", "ravel"} and not self.flags.c_contiguous)
        if not copies:
            return result

        def computed(*args, **kwargs):
            check_named(self.dtype, *(args if name == "astype" else ()))
            return result(*args, **kwargs)

        return computed

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

    def __call__(self, grid, block, args, *, shared_mem=0):
        assert type(grid) is type(block) is tuple, "grid and block are tuples"
        self._cupy.launches.append(SimpleNamespace(device=Device.current, stream=self._cupy.stream, args=args))
        for arg in args:
            if not isinstance(arg, Array | np.generic | None):
                raise TypeError(f"Unsupported type {type(arg)}")
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


class Event:
    """``cupy.cuda.Event``: `done` when the test has let the stream come so far."""

    def __init__(self, cupy):
        self._cupy, self._at = cupy, None

    def record(self, stream=None):
        self._at = len(self._cupy.launches)

    @property
    def done(self):
        return self._at <= self._cupy.num_finished


class SimulatedCupy(ModuleType):
    """The module: NumPy's functions on `Array`, and the parts of ``cupy.cuda`` that launching needs."""

    def __init__(self):
        super().__init__("cupy")
        self.num_synchronizations = self.num_allocations = self.num_uploads = 0
        self.launches = []
        self.stream = "the default stream"
        self.num_finished = 0  # launches that the GPU is done with
        self.is_capturing = False
        self.ndarray = Array
        stream = SimpleNamespace(is_capturing=lambda: self.is_capturing)
        self.cuda = SimpleNamespace(
            Device=Device, Event=lambda *, disable_timing: Event(self), get_current_stream=lambda: stream
        )

    def RawModule(self, *, path):
        if not isinstance(path, str):
            raise TypeError(f"Argument 'path' has incorrect type (expected str, got {type(path).__name__})")
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
        result = np.array(self.unwrap(x), dtype, order=order)
        check_named(result.dtype, *([x.dtype] if isinstance(x, Array) else []))
        return self.wrap(result)

    def ascontiguousarray(self, x, dtype=None):
        contiguous = isinstance(x, Array) and x.flags.c_contiguous and (dtype is None or x.dtype == dtype)
        return x if contiguous else self.array(x, dtype, order="C")

    def empty(self, shape, dtype):
        self.num_allocations += 1
        check_named(dtype)
        return self.wrap(np.empty(shape, dtype))

    def from_dlpack(self, x):
        assert not isinstance(x, Array), "an array of its own"
        capsule = x.__dlpack__(stream=self.stream, max_version=(1, 0))
        return self.wrap(np.from_dlpack(_OnTheHost(capsule)), x.__dlpack_device__()[1])

    def __getattr__(self, name):
        if name not in {"zeros", "full", "broadcast_to"}:
            raise AttributeError(f"the simulated cupy has no {name!r}")
        function = self.forward(getattr(np, name), None)
        if name == "broadcast_to":
            return function

        def made(*args, **kwargs):
            result = function(*args, **kwargs)
            check_named(result.dtype)
            return result

        return made


class ComputingArray(np.lib.mixins.NDArrayOperatorsMixin, Array):
    """`Array` with arithmetic, which refuses NumPy arrays as CuPy does."""

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        assert method == "__call__" and not options
        if any(isinstance(x, np.ndarray) for x in inputs):
            raise TypeError("Unsupported type <class 'numpy.ndarray'>")
        check_named(*(x.dtype for x in inputs if isinstance(x, Array)))
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
        self.cuda.get_current_stream().synchronize = lambda: self.stream_waits.append(1)

    def wrap(self, value, device_id=None):
        return ComputingArray(value, self, Device.current if device_id is None else device_id)

    def __getattr__(self, name):
        computing = {"arange", "clip", "concatenate", "maximum", "minimum", "repeat", "searchsorted", "stack"}
        if name in computing | {"log", "take_along_axis", "where", "zeros_like"}:
            return self.forward(getattr(np, name), None)
        return super().__getattr__(name)


@contextmanager
def installed(monkeypatch, module=SimulatedCupy) -> Iterator[SimulatedCupy]:
    """The stand-in as the module ``cupy``, with executors of its own."""
    cupy = module()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(executors.compile, "for_device", lambda device: cc.arch.Target("sm_80", "ptx"))
    executors.cuda_executor.cache_clear()
    try:
        yield cupy
    finally:
        executors.cuda_executor.cache_clear()
