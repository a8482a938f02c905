"""The one place that picks the executor, loads kernels, checks launches and packs arguments.

The kind of the arrays decides where an operation runs: `numpy.ndarray` on the host executor (the kernel's PTX,
interpreted on the CPU), `cupy.ndarray` on the GPU (the same kernel's CUBIN). Everything above `Executor.launch` is the
same code for both.

Examples
--------
>>> import numpy as np
>>> from cuattn.runtime.executor import executor_for
>>> executor_for(x=np.zeros(3, np.float32)).name
'host'
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from cuattn import compile, environment
from cuattn.addresses import is_foreign
from cuattn.errors import ArrayTypeError, CuattnError, DTypeError, LaunchError
from cuattn.host.tensor_map import TensorMap
from cuattn.messages import shown
from cuattn.runtime.device_copies import copied
from cuattn.runtime.imported import Held
from cuattn.runtime.places import HOST, check_size, describe, host_array, host_list, place, unreadable
from cuattn.runtime.signature import Signature

MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_BLOCK = (1024, 1024, 64)
MAX_THREADS = 1024
HOST_MACHINE = "sm_90", 132  # what a plan for NumPy arrays is made for: an H200
DEFAULT_SMEM_BYTES = 48 * 1024  # a kernel that wants more than this has to ask for it

Constants = Mapping[str, compile.Constant]


@dataclass(eq=False)
class Kernel:
    """One loaded entry point. ``function`` is a `cupy.RawKernel` or a `cuattn.host.RawKernel`."""

    name: str
    entry: str
    function: Any
    static_smem_bytes: int
    signature: Signature
    dynamic_smem_bytes: int = field(init=False)  # what the function has been allowed so far
    checked: set[tuple[Any, ...]] = field(default_factory=set)  # launch shapes that passed the checks

    def __post_init__(self) -> None:
        self.dynamic_smem_bytes = DEFAULT_SMEM_BYTES - self.static_smem_bytes


class Executor(ABC):
    """Where an operation runs. Use `executor_for`; the subclasses differ only in how they load, allocate and launch.

    Attributes
    ----------
    name : "host" or "cuda"
    arch : str, the architecture that kernels are compiled for
    smem_limit_bytes : int, shared memory that one CTA may use
    machine : (str, int), architecture and multiprocessors of the GPU that launches are planned for
    xp : the module of its arrays, `numpy` or `cupy`
    """

    name: str
    machine: tuple[str, int]
    xp: Any

    def __init__(self, arch: str) -> None:
        self.arch = arch
        self.smem_limit_bytes = compile.smem_limit_bytes(arch)
        self._kernels: dict[tuple[Any, ...], Kernel] = {}
        self._lock = threading.RLock()

    def kernel(self, source_name: str, constants: Constants, entry: str) -> Kernel:
        """Compile (or find in the cache) and load entry ``entry`` of ``kernels/<source_name>.cu``; memoised."""
        key = (source_name, entry, *constants.items())
        kernel = self._kernels.get(key)
        if kernel is None:
            with self._lock:  # two threads must not load the same module twice
                kernel = self._kernels.get(key)
                if kernel is None:
                    kernel = self._kernels[key] = self._load(source_name, constants, entry)
        return kernel

    def launch(
        self, kernel: Kernel, grid: Sequence[int], block: Sequence[int], args: Mapping[str, Any], smem_bytes: int = 0
    ) -> None:
        """Check the launch against the limits of the architecture, then start it.

        ``args``, by the names of the kernel's parameters, are arrays (passed as a pointer to their first element; None
        is a null pointer), NumPy scalars, packed structs and tensor maps (by value). Before anything starts, raises
        `LaunchError` when grid, block, shared memory or the kind of an argument are not legal, and `DeclarationError`
        when a name is missing or unknown.
        """
        shape = (*grid, 0, *block, smem_bytes)
        if shape not in kernel.checked:
            self._check(kernel, grid, block, smem_bytes)
            if len(kernel.checked) >= 4096:  # a server sees ever new shapes: the memo must not grow for ever
                kernel.checked.clear()
            kernel.checked.add(shape)
        self._start(kernel, tuple(grid), tuple(block), kernel.signature.bind(args), smem_bytes)

    def on_device(self) -> AbstractContextManager[Any]:
        """Context in which array operations work on the executor's device, whichever is current outside."""
        return nullcontext()

    @abstractmethod
    def asarray(self, name: str, x: Any) -> Any:
        """Take the argument ``name`` as an array of this executor's kind, without a copy. Raises `ArrayTypeError`."""

    @abstractmethod
    def metadata(self, name: str, x: Any) -> Any:
        """Take a small array that says something about others: without a copy, where it lies; a list as a NumPy array.

        Host data is good beside arrays on a GPU, not the other way round. Raises `ArrayTypeError` or `ShapeError`.
        """

    @abstractmethod
    def put(self, x: Any, dtype: Any) -> Any:
        """Return what `metadata` returned, contiguous and of ``dtype``, where kernels can read it."""

    @abstractmethod
    def empty(self, shape: int | Sequence[int], dtype: Any) -> Any:
        """Allocate an array to be written by a kernel. On the host it counts as never written until `finish`."""

    @abstractmethod
    def finish(self, *arrays: Any) -> None:
        """Hand arrays from `empty` to the caller. On the host this raises if a byte of one was never written."""

    @abstractmethod
    def _load(self, source_name: str, constants: Constants, entry: str) -> Kernel:
        """Compile and load, without a memo."""

    def _start(
        self, kernel: Kernel, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], smem_bytes: int
    ) -> None:
        kernel.function(grid, block, args, shared_mem=smem_bytes)

    def _check(self, kernel: Kernel, grid: Sequence[int], block: Sequence[int], smem_bytes: int) -> None:
        for what, extents, limits in (("grid", grid, MAX_GRID), ("block", block, MAX_BLOCK)):
            if not 1 <= len(extents) <= 3:
                raise LaunchError(f"{kernel.entry}: {what} has {len(extents)} extents; 1 to 3 are allowed")
            for axis, extent, limit in zip("xyz", extents, limits, strict=False):
                if not 1 <= extent <= limit:
                    raise LaunchError(f"{kernel.entry}: {what}.{axis} is {extent}; 1 to {limit} are allowed")
        num_threads = int(np.prod(block))
        if num_threads > MAX_THREADS:
            raise LaunchError(f"{kernel.entry}: {num_threads} threads a block; at most {MAX_THREADS} are allowed")
        total = smem_bytes + kernel.static_smem_bytes
        if smem_bytes < 0 or total > self.smem_limit_bytes:
            raise LaunchError(
                f"{kernel.entry}: {total} bytes of shared memory; a CTA may use {self.smem_limit_bytes} on {self.arch}"
            )
        if smem_bytes > kernel.dynamic_smem_bytes:
            kernel.function.max_dynamic_shared_size_bytes = smem_bytes
            kernel.dynamic_smem_bytes = smem_bytes


class HostExecutor(Executor):
    """NumPy arrays: the kernel's PTX on the CPU."""

    name = "host"
    machine = HOST_MACHINE
    xp = np

    def asarray(self, name: str, x: Any) -> np.ndarray[Any, Any]:
        return x if type(x) is np.ndarray else host_array(name, x)

    def metadata(self, name: str, x: Any) -> np.ndarray[Any, Any]:
        if type(x) is not np.ndarray:
            if isinstance(x, list | tuple):
                return host_list(name, x)
            found = place(name, x)
            if found != HOST:
                raise ArrayTypeError(f"{name} is {describe(found, x)} but the call is on the CPU")
            x = host_array(name, x)
        return check_size(name, x)

    def put(self, x: Any, dtype: Any) -> np.ndarray[Any, Any]:
        return np.ascontiguousarray(x, dtype)

    def empty(self, shape: int | Sequence[int], dtype: Any) -> Any:
        return _host_memory().new_array((shape,) if isinstance(shape, int) else tuple(shape), np.dtype(dtype))

    def finish(self, *arrays: Any) -> None:
        _host_memory().finish(*arrays)

    def _load(self, source_name: str, constants: Constants, entry: str) -> Kernel:
        from cuattn import host

        binary = compile.build(source_name, constants, arch=self.arch, kind="ptx")
        function = host.RawModule(code=binary.image.decode()).get_function(entry)
        signature = Signature(source_name, constants, entry)
        signature.check_sizes([parameter.size for parameter in function.table.params])
        return Kernel(source_name, entry, function, int(function.shared_size_bytes), signature)


class CudaExecutor(Executor):
    """CuPy arrays on one device: the kernel's CUBIN on the GPU, on CuPy's current stream of that device."""

    name = "cuda"

    def __init__(self, device_id: int) -> None:
        import cupy

        self.xp = cupy
        self.device_id = device_id
        self._held = Held(cupy)
        target = compile.for_device(divmod(int(cupy.cuda.Device(device_id).compute_capability), 10))
        self._image_kind = target.kind
        super().__init__(target.arch)
        with self.on_device():
            self.machine = target.arch, int(cupy.cuda.Device().attributes["MultiProcessorCount"])

    def on_device(self) -> AbstractContextManager[Any]:
        device: AbstractContextManager[Any] = self.xp.cuda.Device(self.device_id)
        return device

    def asarray(self, name: str, x: Any) -> Any:
        if isinstance(x, self.xp.ndarray):
            return x
        try:
            with self.on_device():
                array = self.xp.from_dlpack(x) if hasattr(x, "__dlpack__") else self.xp.asarray(x)
        except Exception as error:  # exporters raise what they like
            raise unreadable(name, x, "CuPy", error) from error
        self._held.add(array)
        return array

    def metadata(self, name: str, x: Any) -> Any:
        if type(x) is not np.ndarray:
            if isinstance(x, list | tuple):
                return host_list(name, x)
            found = place(name, x)
            if found not in (HOST, self.device_id):
                raise ArrayTypeError(f"{name} is {describe(found, x)} but the call is on CUDA device {self.device_id}")
            x = host_array(name, x) if found == HOST else self.asarray(name, x)
            if found != HOST and is_foreign(x.dtype):
                raise DTypeError(f"{name} has dtype {x.dtype}, which a GPU has not; pass it from the CPU")
        return check_size(name, x)

    def put(self, x: Any, dtype: Any) -> Any:
        if isinstance(x, np.ndarray):  # converted here, it goes over once and takes no kernel
            x = np.ascontiguousarray(x, dtype)
        with self.on_device():
            x = self.xp.asarray(x)
            lies_well = x.flags.c_contiguous and x.data.ptr % x.dtype.itemsize == 0  # kernels load whole elements
            return x if lies_well and x.dtype == dtype else copied(x, dtype)

    def empty(self, shape: int | Sequence[int], dtype: Any) -> Any:
        with self.on_device():
            return self.xp.empty(shape, dtype)

    def finish(self, *arrays: Any) -> None:
        """Nothing to do: a GPU does not track what was written."""

    def _load(self, source_name: str, constants: Constants, entry: str) -> Kernel:
        binary = compile.build(source_name, constants, arch=self.arch, kind=self._image_kind)
        with self.on_device():
            function = self.xp.RawModule(path=str(compile.on_disk(binary))).get_function(entry)
            signature = Signature(source_name, constants, entry)
            return Kernel(source_name, entry, function, int(function.shared_size_bytes), signature)

    def _start(
        self, kernel: Kernel, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], smem_bytes: int
    ) -> None:
        with self.on_device():
            kernel.function(grid, block, self._values(kernel, args), shared_mem=smem_bytes)
            self._held.launched()

    def _values(self, kernel: Kernel, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return arguments as CuPy passes them: a tensor map as its bytes."""
        values = []
        for index, arg in enumerate(args):
            if isinstance(arg, TensorMap) and isinstance(arg.array, np.ndarray):
                raise LaunchError(
                    f"{kernel.entry}: argument {index} is a tensor map of a NumPy array; the GPU needs its own"
                )
            values.append(arg.value if isinstance(arg, TensorMap) else arg)
        return tuple(values)

    def _check(self, kernel: Kernel, grid: Sequence[int], block: Sequence[int], smem_bytes: int) -> None:
        with self.on_device():  # the shared-memory attribute belongs to the device's function
            super()._check(kernel, grid, block, smem_bytes)


def executor_of_module(array_module: Any) -> Executor:
    """Return the executor for new arrays of ``numpy``, or ``cupy`` on its current device. Raises `ArrayTypeError`."""
    name = array_module.__name__ if isinstance(array_module, ModuleType) else None
    if name not in ("numpy", "cupy"):
        raise ArrayTypeError(f"array_module is {shown(array_module)}; the modules numpy and cupy are allowed")
    if name == "numpy":
        return host_executor(environment.host_arch())
    try:
        return executor_for(array_module=array_module.empty(0, np.uint8))
    except CuattnError:
        raise
    except Exception as error:  # no driver
        raise ArrayTypeError(f"array_module is cupy, which cannot be used here: {error}") from error


@cache
def _host_memory() -> Any:
    """Return the module of the host executor's arrays, which a program without NumPy arrays never imports."""
    from cuattn.host import memory

    return memory


@cache
def host_executor(arch: str) -> HostExecutor:
    """Return the executor for NumPy arrays, kernels compiled for ``arch``."""
    return HostExecutor(arch)


@cache
def cuda_executor(device_id: int) -> CudaExecutor:
    """Return the executor for CuPy arrays on device ``device_id``."""
    return CudaExecutor(device_id)


def executor_for(**arrays: Any) -> Executor:
    """Return the executor on which the named arrays live.

    NumPy arrays, and CPU objects with ``__dlpack__`` or ``__array__``, run on the host executor; CuPy arrays, and
    objects with ``__dlpack__`` or ``__cuda_array_interface__`` on a CUDA device, on that GPU. CuPy is imported only
    when it is needed.

    Raises
    ------
    ArrayTypeError
        An argument is no array, or two of them live in different places; the message names them.
    """
    for x in arrays.values():
        if type(x) is not np.ndarray:
            break
    else:
        return host_executor(environment.host_arch())
    places = {name: place(name, x) for name, x in arrays.items()}
    (first_name, first), *others = places.items()
    for name, found in others:
        if found != first:
            raise ArrayTypeError(
                f"{first_name} is {describe(first, arrays[first_name])} but {name} is "
                f"{describe(found, arrays[name])}; all arrays of a call must be of one kind and on one device"
            )
    if first == HOST:
        return host_executor(environment.host_arch())
    try:
        return cuda_executor(first)
    except CuattnError:  # a device that no kernel is made for
        raise
    except Exception as error:  # no CuPy, no driver, or no such device
        raise ArrayTypeError(
            f"{first_name} is {describe(first, arrays[first_name])}, which cannot be used here: {error}"
        ) from error
