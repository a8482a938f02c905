"""`RawModule` and `RawKernel`: PTX, or CUDA C, run on the CPU through the interface of their CuPy namesakes."""

from __future__ import annotations

import ctypes
import hashlib
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from .. import environment
from ..errors import ArgumentError, LaunchError, UnsupportedPTXError
from ..scalars import shown
from ..tensor_map import TensorMap
from . import faults, library, profile, ptx
from .memory import Regions
from .ptx_module import Variable
from .settings import ASYNC_MODES, Settings, current
from .table import PARAM_LINE, Table, build_table

DEFAULT_SMEM_BYTES = 48 * 1024
SMEM_LIMIT = {"sm_80": 163, "sm_86": 99, "sm_87": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}
MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_BLOCK = (1024, 1024, 64)
MAX_CLUSTER = 16  # executor.h; 8 is portable

_race_lock = threading.Lock()  # the order between CTAs is kept in one place of the library


class RawModule:
    """A module of kernels for the host executor; mirrors ``cupy.RawModule``.

    Parameters
    ----------
    code : str, optional
        CUDA C source (compiled by NVRTC), or PTX (recognised by its ``.version`` line).
    path : str or Path, optional
        A ``.ptx`` file instead. Exactly one of ``code`` and ``path``.
    options : sequence of str
        Options for NVRTC.
    arch : str, optional
        Architecture to compile for, ``"sm_80"`` style; default ``CUATTN_HOST_ARCH``.

    Raises
    ------
    ArgumentError
        Neither or both of ``code`` and ``path``.
    CompileError
        NVRTC refuses the source.
    UnsupportedPTXError
        The PTX has something that the executor cannot run.
    HostUnavailableError
        There is no compiled interpreter, and none can be built.

    Examples
    --------
    >>> import numpy as np, cuattn.host
    >>> module = cuattn.host.RawModule(code='''
    ... extern "C" __global__ void twice(float* x, int n) {
    ...   int i = blockIdx.x * blockDim.x + threadIdx.x;
    ...   if (i < n) x[i] *= 2;
    ... }''')
    >>> x = np.arange(4, dtype=np.float32)
    >>> module.get_function("twice")((1,), (32,), (x, np.int32(4)))
    >>> x
    array([0., 2., 4., 6.], dtype=float32)
    """

    def __init__(
        self,
        *,
        code: str | None = None,
        path: str | Path | None = None,
        options: Sequence[str] = (),
        arch: str | None = None,
    ) -> None:
        if (code is None) == (path is None):
            raise ArgumentError("RawModule: give exactly one of code and path")
        if not isinstance("" if code is None else code, str):
            raise ArgumentError(f"RawModule: code is a {type(code).__name__}; a str is needed")
        if not isinstance(options, tuple | list) or not all(isinstance(option, str) for option in options):
            raise ArgumentError(f"RawModule: options is {shown(options)}; a list of str is needed")
        text = Path(path).read_text() if path is not None else code
        assert text is not None
        if ".version" not in text or ".target" not in text:
            from ..compile import build_source

            arch = environment.host_arch() if arch is None else arch
            binary = build_source(text, name="raw_module", arch=arch, kind="ptx", options=options)
            text = binary.image.decode()
        self._tables, self._target = _translate(text)
        self._variables: dict[str, np.ndarray] = {}
        self._kernels: dict[str, RawKernel] = {}

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the kernels."""
        return tuple(self._tables)

    def get_function(self, name: str) -> RawKernel:
        """The kernel called ``name``. Raises `ArgumentError` if there is none."""
        if name not in self._kernels:
            if name not in self._tables:
                raise ArgumentError(f"no kernel {name!r}: the module has {', '.join(self._tables) or 'none'}")
            self._kernels[name] = RawKernel(self, self._tables[name], self._target)
        return self._kernels[name]

    def get_global(self, name: str) -> np.ndarray:
        """The bytes of a ``__device__`` or ``__constant__`` variable, as a writable uint8 array."""
        for table in self._tables.values():
            for variable in table.module_variables:
                if variable.name == name:
                    return self._variable(variable)
        raise ArgumentError(f"no module variable {name!r}")

    def _variable(self, variable: Variable) -> np.ndarray:
        if variable.name not in self._variables:
            raw = np.zeros(variable.size + 256, np.uint8)
            start = -raw.ctypes.data % 256
            array = raw[start : start + variable.size]
            if variable.data:
                array[:] = np.frombuffer(variable.data, np.uint8)
            self._variables[variable.name] = array
        return self._variables[variable.name]


class RawKernel:
    """A kernel on the host executor, called as a ``cupy.RawKernel`` is: ``kernel(grid, block, args, shared_mem=0)``.

    Arguments: NumPy arrays (a pointer to the first element), NumPy scalars (by their dtype), Python ``int`` (int64),
    ``float`` (float64), ``bool``, ``numpy.void`` structs and tensor maps (`cuattn.tensor_map`) by value, and ``None``
    for a null pointer.
    """

    def __init__(self, module: RawModule, table: Table, target: str) -> None:
        self._module = module
        self.table = table
        self.name = table.name
        self._smem_limit = 1024 * SMEM_LIMIT.get(target.rstrip("af"), 227)
        #: Dynamic shared memory that a launch may ask for, in bytes; above 48 KB it must be raised first, as on a GPU.
        self.max_dynamic_shared_size_bytes = max(0, DEFAULT_SMEM_BYTES - table.static_smem_bytes)
        self.shared_size_bytes = table.static_smem_bytes
        self.local_size_bytes = table.local_bytes
        self.max_threads_per_block = table.max_threads
        # The launch struct's part that never changes.
        lib = library.load()
        self._rows = np.ascontiguousarray(table.rows).copy()
        self._rows[:, 0] = [lib.ops[name] for name in table.op_names]
        self._side = table.side.copy()
        self._init = table.slots_init.copy()
        self._variables = []
        for offset, symbol in table.relocations:
            variable = next(v for v in table.module_variables if v.name == symbol)
            array = module._variable(variable)
            self._variables.append(array)
            self._init[offset : offset + 256].view(np.uint64)[:] += np.uint64(array.ctypes.data)

    def __call__(
        self, grid: Sequence[int], block: Sequence[int], args: Sequence[object], *, shared_mem: int = 0
    ) -> None:
        """Run the kernel and wait for it.

        Raises
        ------
        LaunchError
            Grid, block, shared memory or arguments do not fit; nothing has run.
        KernelFault
            A checker found a fault; outputs may be partly written.
        """
        grid3, block3 = _triple("grid", grid), _triple("block", block)
        self._check_launch(grid3, block3, shared_mem)
        params, arrays = self._pack(args)
        settings = current()
        launch = self._launch_struct(grid3, block3, shared_mem, params, settings)
        checks = settings.checks
        regions = None
        if checks:
            named = [*arrays, *((-1, v) for v in (*self._variables, params))]  # parameters have addresses too
            regions = Regions(named, init="init" in checks, race="race" in checks, mem="mem" in checks)
            launch.regions, launch.num_regions = regions.address, regions.count
        counters = self._counters(launch) if profile.active() else None
        if "race" in checks:
            with _race_lock:
                _run(launch)
        else:
            _run(launch)
        if launch.report.kind:
            raise faults.from_report(self.table, launch.report)
        if counters is not None:
            for open_profile in profile.active():
                open_profile.add(self.table, *counters)

    def _check_launch(self, grid: tuple[int, int, int], block: tuple[int, int, int], shared_mem: int) -> None:
        for name, extents, limits in (("grid", grid, MAX_GRID), ("block", block, MAX_BLOCK)):
            for axis, extent, limit in zip("xyz", extents, limits, strict=True):
                if not 1 <= extent <= limit:
                    raise LaunchError(f"{self.name}: {name}.{axis} is {extent}, allowed is 1 to {limit}")
        if grid[0] * grid[1] * grid[2] >= 1 << 32:
            raise LaunchError(f"{self.name}: a grid of {grid} has more CTAs than the host executor takes (2**32 - 1)")
        cluster = self.table.cluster or (1, 1, 1)
        for axis, extent, step in zip("xyz", grid, cluster, strict=True):
            if extent % step:
                raise LaunchError(
                    f"{self.name}: grid.{axis} is {extent}, allowed are multiples of the cluster's {step}"
                )
        if cluster[0] * cluster[1] * cluster[2] > MAX_CLUSTER:
            raise LaunchError(f"{self.name}: a cluster of {cluster}, allowed are at most {MAX_CLUSTER} CTAs")
        threads = block[0] * block[1] * block[2]
        if threads > min(1024, self.table.max_threads):
            raise LaunchError(f"{self.name}: {threads} threads a block, at most {min(1024, self.table.max_threads)}")
        if shared_mem < 0 or shared_mem > self.max_dynamic_shared_size_bytes:
            raise LaunchError(
                f"{self.name}: shared_mem is {shared_mem}, allowed is 0 to {self.max_dynamic_shared_size_bytes} "
                "(raise kernel.max_dynamic_shared_size_bytes first)"
            )
        if self.table.static_smem_bytes + shared_mem > self._smem_limit:
            total = self.table.static_smem_bytes + shared_mem
            raise LaunchError(f"{self.name}: {total} bytes of shared memory, the architecture has {self._smem_limit}")

    def _pack(self, args: Sequence[object]) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
        params = self.table.params
        if len(args) != len(params):
            raise LaunchError(f"{self.name}: {len(args)} arguments, the kernel takes {len(params)}")
        block = bytearray(self.table.param_bytes)
        arrays: list[tuple[int, np.ndarray]] = []
        for index, (arg, (offset, size)) in enumerate(zip(args, params, strict=True)):
            if isinstance(arg, np.ndarray):
                arrays.append((index, arg))
                data = arg.__array_interface__["data"][0].to_bytes(8, "little")
            elif isinstance(arg, TensorMap):
                if not isinstance(arg.array, np.ndarray):
                    raise LaunchError(f"{self.name}: argument {index} is a tensor map of an array on a GPU")
                arrays.append((index, arg.array))
                data = arg.value.tobytes()
            elif isinstance(arg, np.generic):
                data = arg.tobytes()
            elif isinstance(arg, bool):
                data = np.bool_(arg).tobytes()
            elif isinstance(arg, int):
                data = np.int64(arg).tobytes()
            elif isinstance(arg, float):
                data = np.float64(arg).tobytes()
            elif arg is None:
                data = bytes(8)
            else:
                raise LaunchError(f"{self.name}: argument {index} is a {type(arg).__name__}, not an array or a scalar")
            if len(data) != size:
                raise LaunchError(
                    f"{self.name}: argument {index} ({type(arg).__name__}) has {len(data)} bytes, "
                    f"the kernel's parameter {size}"
                )
            block[offset : offset + size] = data
        # Aligned as the kernel declares it and no better: structs that kernels address (tensor maps) ask for 64 bytes.
        raw = np.zeros(len(block) + PARAM_LINE, np.uint8)
        start = (self.table.param_place - raw.ctypes.data) % PARAM_LINE
        aligned = raw[start : start + len(block)]
        aligned[:] = np.frombuffer(block, np.uint8)
        return aligned, arrays

    def _launch_struct(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_mem: int,
        params: np.ndarray,
        settings: Settings,
    ) -> library.LaunchStruct:
        table = self.table
        launch = library.LaunchStruct()
        launch.rows, launch.num_rows = self._rows.ctypes.data, len(self._rows)
        launch.slots_init, launch.init_bytes = self._init.ctypes.data, self._init.nbytes
        launch.reg_bytes = table.reg_bytes
        launch.params = params.ctypes.data
        launch.side = self._side.ctypes.data
        launch.grid[:], launch.block[:], launch.cluster[:] = grid, block, table.cluster or (1, 1, 1)
        launch.explicit_cluster = table.cluster is not None
        launch.entry_registers = table.entry_registers
        launch.specials[:] = table.specials.tolist()
        launch.static_smem_bytes = table.static_smem_bytes + table.dynamic_smem_gap
        launch.smem_bytes = launch.static_smem_bytes + shared_mem
        launch.local_bytes = table.local_bytes
        launch.check_mem = "mem" in settings.checks
        launch.check_init = "init" in settings.checks
        launch.check_race = "race" in settings.checks
        launch.async_mode = ASYNC_MODES.index(settings.async_mode)
        launch.random_schedule = settings.random_schedule
        launch.seed = settings.seed
        launch.num_threads = settings.threads
        launch.smem_granule_log2 = table.smem_granule_log2
        return launch

    def _counters(self, launch: library.LaunchStruct) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        counters = tuple(np.zeros(len(self._rows), np.uint64) for _ in range(3))
        launch.count_rows, launch.count_lanes, launch.count_bytes = (c.ctypes.data for c in counters)
        return counters  # type: ignore[return-value]


def _triple(name: str, extents: Sequence[int]) -> tuple[int, int, int]:
    values = (extents,) if isinstance(extents, int) else tuple(int(x) for x in extents)
    if not 1 <= len(values) <= 3:
        raise LaunchError(f"{name} has {len(values)} extents, allowed are 1 to 3")
    return (*values, 1, 1)[:3]  # type: ignore[return-value]


def _run(launch: library.LaunchStruct) -> None:
    """Run a launch to its end. In the main thread Ctrl-C stops it, even a kernel that never ends."""
    run = library.load().run
    address = ctypes.addressof(launch)
    if threading.current_thread() is not threading.main_thread():
        run(address)
        return
    done = threading.Event()

    def work() -> None:
        run(address)
        done.set()

    # Thread.join is not safe to interrupt and call again in every supported Python; an event is.
    threading.Thread(target=work, name="cuattn-host-launch").start()
    try:
        done.wait()
    except BaseException:
        launch.stop = 1
        done.wait()
        raise


@lru_cache(maxsize=256)
def _translate(text: str) -> tuple[dict[str, Table], str]:
    """Tables of all kernels of a PTX text, from the cache if they are there."""
    from ..compile import cache

    key = f"table-{hashlib.sha256((_translator_hash() + text).encode()).hexdigest()[:20]}"
    cached = cache.read(key, ".tables")
    if cached is not None:
        import pickle

        try:
            tables, target = pickle.loads(cached)
            return tables, target
        except Exception:  # a table of another version of a dependency: translate anew
            pass
    module = ptx.parse(text)
    tables = {name: build_table(module, entry) for name, entry in module.entries.items()}
    if not tables:
        raise UnsupportedPTXError("the PTX has no kernel (.entry)")
    import pickle

    cache.write(key, ".tables", pickle.dumps((tables, module.target), protocol=5))
    return tables, module.target


@lru_cache(maxsize=1)
def _translator_hash() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
