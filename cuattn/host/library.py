"""The compiled interpreter: found or built, loaded once, and the C structs it is called with."""

from __future__ import annotations

import contextlib
import ctypes
import tempfile
import threading
import warnings
from pathlib import Path

from .. import environment
from ..errors import CacheError, CacheWarning, CuattnWarning, HostUnavailableError
from . import build, shared_object

MAX_ISAS = 4
_lock = threading.Lock()
_loaded: Library | None = None


class RegionStruct(ctypes.Structure):
    """``Region`` of executor.h."""

    _fields_ = (
        ("base", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("state", ctypes.c_void_p),
        ("writes", ctypes.c_void_p),
        ("reads", ctypes.c_void_p),
        ("granule_log2", ctypes.c_int32),
        ("argument", ctypes.c_int32),
    )


class ReadOnlyStruct(ctypes.Structure):
    """``ReadOnly`` of executor.h."""

    _fields_ = (("base", ctypes.c_uint64), ("end", ctypes.c_uint64), ("argument", ctypes.c_int64))


class CallerStruct(ctypes.Structure):
    """``Caller`` of caller.c."""

    _fields_ = (
        ("release", ctypes.c_void_p),
        ("acquire", ctypes.c_void_p),
        ("call", ctypes.c_void_p),
        ("drop", ctypes.c_void_p),
        ("look", ctypes.c_void_p),
    )


class ReportStruct(ctypes.Structure):
    """``Report`` of executor.h."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("row", ctypes.c_int32),
        ("other_row", ctypes.c_int32),
        ("ctaid", ctypes.c_uint32 * 3),
        ("tid", ctypes.c_uint32 * 3),
        ("address", ctypes.c_uint64),
        ("message", ctypes.c_char * 1024),
    )


class LaunchStruct(ctypes.Structure):
    """``Launch`` of executor.h."""

    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("slots_init", ctypes.c_void_p),
        ("params", ctypes.c_void_p),
        ("side", ctypes.c_void_p),
        ("regions", ctypes.c_void_p),
        ("read_only", ctypes.c_void_p),
        ("sync_objects", ctypes.c_void_p),
        ("count_rows", ctypes.c_void_p),
        ("count_lanes", ctypes.c_void_p),
        ("count_bytes", ctypes.c_void_p),
        ("seed", ctypes.c_uint64),
        ("num_rows", ctypes.c_int64),
        ("init_bytes", ctypes.c_int64),
        ("reg_bytes", ctypes.c_int64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("cluster", ctypes.c_uint32 * 3),
        ("specials", ctypes.c_int32 * 48),
        ("static_smem_bytes", ctypes.c_uint32),
        ("smem_bytes", ctypes.c_uint32),
        ("local_bytes", ctypes.c_uint32),
        ("num_regions", ctypes.c_uint32),
        ("num_read_only", ctypes.c_uint32),
        ("entry_registers", ctypes.c_uint32),
        ("check_mem", ctypes.c_int32),
        ("check_init", ctypes.c_int32),
        ("check_race", ctypes.c_int32),
        ("async_mode", ctypes.c_int32),
        ("random_schedule", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
        ("smem_granule_log2", ctypes.c_int32),
        ("explicit_cluster", ctypes.c_int32),
        ("stop", ctypes.c_int32),
        ("report", ReportStruct),
    )


class ForeignLibraryError(Exception):
    """A shared library that is damaged, or is not the interpreter of this version. The message says in what."""


class Library:
    """The loaded interpreter for one instruction set. Raises `ForeignLibraryError`, `HostUnavailableError`."""

    def __init__(self, image: bytes) -> None:
        try:
            dll = shared_object.load(image)
            dll.cuattn_isa.restype = ctypes.c_char_p
            dll.cuattn_op_name.restype = ctypes.c_char_p
            dll.cuattn_op_name.argtypes = (ctypes.c_char_p, ctypes.c_int)
            dll.cuattn_launch_size.restype = ctypes.c_size_t
            dll.cuattn_runner.restype = dll.cuattn_stopper.restype = ctypes.c_void_p
        except (OSError, AttributeError) as error:
            raise ForeignLibraryError(str(error)) from error
        self.isas = [isa.decode() for i in range(MAX_ISAS) if (isa := dll.cuattn_isa(i))]
        wanted = environment.host_isa()
        if wanted != "auto" and wanted not in self.isas:
            offered = ", ".join(self.isas)
            raise HostUnavailableError(f"CUATTN_HOST_ISA={wanted}: this processor and library offer {offered}")
        self.isa = self.isas[0] if wanted == "auto" else wanted
        name = self.isa.encode()
        if dll.cuattn_launch_size(name) != ctypes.sizeof(LaunchStruct):
            raise ForeignLibraryError("its launch struct has another size")
        self.ops = {dll.cuattn_op_name(name, i).decode(): i for i in range(dll.cuattn_init(name))}
        # Called with the interpreter's lock, and may return with an exception: see running.py.
        self.run = ctypes.PYFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(dll.cuattn_runner(name))
        self.stop_all = ctypes.CFUNCTYPE(None)(dll.cuattn_stopper(name))


def load() -> Library:
    """Load the interpreter, built first if need be. Raises `HostUnavailableError` with the reason."""
    global _loaded
    if _loaded is None:
        with _lock:
            if _loaded is None:
                _loaded = _find_or_build()
    return _loaded


def loaded() -> Library | None:
    """Return the interpreter if this process has loaded it; never build one."""
    return _loaded


def _find_or_build() -> Library:
    """The library of the installation if it belongs to these sources, else the cached one, else a new one."""
    from ..compile import cache

    name = build.library_name()
    installed = Path(__file__).with_name("native") / name
    try:
        return Library(installed.read_bytes())
    except FileNotFoundError:
        pass
    except (OSError, ForeignLibraryError) as error:
        warnings.warn(f"{installed} is not used ({error}): install cuattn again", CuattnWarning, stacklevel=2)
    key, suffix = name.removesuffix(".so"), ".so"
    cached = cache.read(key, suffix)
    if cached is not None:
        try:
            return Library(cached)
        except ForeignLibraryError as error:
            warnings.warn(f"cache entry {name} is not used ({error}); it is made anew", CacheWarning, stacklevel=2)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            data = build.build(Path(scratch), environment.c_compiler()).read_bytes()
        library = Library(data)
    except (build.BuildError, OSError, ForeignLibraryError) as error:
        raise HostUnavailableError(
            f"the host executor is not available: {error}\n"
            "It runs kernels on NumPy arrays; kernels on CuPy arrays do not need it."
        ) from error
    with contextlib.suppress(CacheError):  # it is loaded
        cache.write(key, suffix, data)
    return library


def op_index() -> dict[str, int]:
    """Return the numbers of the handlers by their names."""
    return load().ops
