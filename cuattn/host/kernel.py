"""`RawKernel`: one kernel of a module, launched on the host as its CuPy namesake is on a GPU."""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import LaunchError
from . import arguments, faults, library, memory, running
from .memory import Regions
from .profile import active as open_profiles
from .settings import ASYNC_MODES, Settings, current
from .table import Table

if TYPE_CHECKING:
    from .module import RawModule

DEFAULT_SMEM_BYTES = 48 * 1024
SMEM_LIMIT = {"sm_80": 163, "sm_86": 99, "sm_87": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}
MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_BLOCK = (1024, 1024, 64)
MAX_CLUSTER = 16  # executor.h; 8 is portable


class RawKernel:
    """A kernel on the host executor, called as a ``cupy.RawKernel`` is: ``kernel(grid, block, args, shared_mem=0)``.

    Arguments: NumPy arrays (a pointer to the first element), NumPy scalars (by their dtype), Python ``int`` (64 bits),
    ``float`` (float64), ``complex`` (complex128), ``bool``, ``numpy.void`` structs and tensor maps
    (`cuattn.tensor_map`) by value, and ``None`` for a null pointer. Each must be of the class and size that the kernel
    declares. A write into a read-only array is a fault.

    A copy by `pickle` or `copy.deepcopy` has a module of its own, whose variables hold their initial values.
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

    def __reduce__(self) -> tuple[object, ...]:
        # Addresses belong to this process and to this module: a copy gets a kernel of the copied module.
        state = {"max_dynamic_shared_size_bytes": self.max_dynamic_shared_size_bytes}
        return _kernel_of, (self._module, self.name), state

    def __call__(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[object],
        *,
        shared_mem: int = 0,
        stream: None = None,
    ) -> None:
        """Run the kernel and wait for it; an exception in this thread, such as Ctrl-C, stops it.

        Raises
        ------
        LaunchError
            Grid, block, shared memory or arguments do not fit, or a stream is given; nothing has run.
        KernelFault
            A checker found a fault, or a read-only array was to be written; outputs may be partly written.
        """
        if stream is not None:
            raise LaunchError(f"{self.name}: stream is a {type(stream).__name__}; the host executor has none")
        grid3, block3 = _triple(self.name, "grid", grid), _triple(self.name, "block", block)
        shared_mem = _integer(self.name, "shared_mem", shared_mem)
        self._check_launch(grid3, block3, shared_mem)
        table = self.table
        params, arrays = arguments.pack(self.name, table.params, table.param_bytes, table.param_place, args)
        settings = current()
        launch = self._launch_struct(grid3, block3, shared_mem, params, settings)
        checks = settings.checks
        regions = None
        if checks:
            named = [*arrays, *((-1, v) for v in (*self._variables, params))]  # parameters have addresses too
            regions = Regions(named, init="init" in checks, race="race" in checks, mem="mem" in checks)
            launch.regions, launch.num_regions = regions.address, regions.count
        if not checks & {"mem", "init"}:
            memory.forget(arrays)
        read_only = memory.read_only_stretches(arrays)
        if read_only is not None:
            launch.read_only, launch.num_read_only = ctypes.addressof(read_only), len(read_only)
        profiles = open_profiles()
        counters = self._counters(launch) if profiles else None
        running.run(launch)
        if launch.report.kind:
            raise faults.from_report(self.table, launch.report)
        if counters is not None:
            for profile in profiles:
                profile.add(self.table, *counters)

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
        if threads > self.table.max_threads:
            raise LaunchError(f"{self.name}: {threads} threads a block, at most {self.table.max_threads}")
        if shared_mem < 0 or shared_mem > self.max_dynamic_shared_size_bytes:
            raise LaunchError(
                f"{self.name}: shared_mem is {shared_mem}, allowed is 0 to {self.max_dynamic_shared_size_bytes} "
                "(raise kernel.max_dynamic_shared_size_bytes first)"
            )
        if self.table.static_smem_bytes + shared_mem > self._smem_limit:
            total = self.table.static_smem_bytes + shared_mem
            raise LaunchError(f"{self.name}: {total} bytes of shared memory, the architecture has {self._smem_limit}")

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


def _kernel_of(module: RawModule, name: str) -> RawKernel:
    return module.get_function(name)


def _triple(kernel: str, name: str, extents: Sequence[int]) -> tuple[int, int, int]:
    values = tuple(extents) if isinstance(extents, tuple | list) else (extents,)
    if not 1 <= len(values) <= 3:
        raise LaunchError(f"{kernel}: {name} has {len(values)} extents, allowed are 1 to 3")
    numbers = [_integer(kernel, name, x) for x in values]
    return (*numbers, 1, 1)[:3]  # type: ignore[return-value]


def _integer(kernel: str, name: str, value: object) -> int:
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError as error:
        raise LaunchError(f"{kernel}: {name} is {value!r:.60}, integers are needed") from error
