"""`RawModule`: PTX, or CUDA C, run on the CPU through the interface of its CuPy namesake."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from .. import environment
from ..errors import ArgumentError, CacheError, NotSupportedError, UnsupportedPTXError
from ..messages import shown
from ..scalars import check_flag
from . import library, names, ptx, table_file
from .kernel import RawKernel
from .ptx_module import Variable
from .table import Table, build_table

VARIABLE_ALIGNMENT = 256  # at least, as of allocated memory


class RawModule:
    """A module of kernels for the host executor; mirrors ``cupy.RawModule``.

    Parameters
    ----------
    code : str, optional
        CUDA C source (compiled by NVRTC), or PTX (recognised by ``.version``, its first directive).
    path : str or Path, optional
        A ``.ptx`` file instead. Exactly one of ``code`` and ``path``.
    options : sequence of str
        Options for NVRTC.
    backend : {"nvrtc"}
    translate_cucomplex, enable_cooperative_groups, jitify : bool
        As in CuPy, where they may be true; here they may not.
    name_expressions : sequence of str, optional
        C++ names of kernels, ``"scale<float, 4>"``, by which `get_function` finds them; templates are instantiated.
    arch : str, optional
        Architecture to compile for, ``"sm_80"`` style; default ``CUATTN_HOST_ARCH``.

    Raises
    ------
    ArgumentError
        Neither or both of ``code`` and ``path``, or an argument of another type than stated.
    NotSupportedError
        Another backend, or an option that must not be true.
    CompileError
        NVRTC refuses the source.
    UnsupportedPTXError
        The PTX is malformed, or has something that the executor cannot run.
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
        code: str | None = None,
        *,
        path: str | Path | None = None,
        options: Sequence[str] = (),
        backend: str = "nvrtc",
        translate_cucomplex: bool = False,
        enable_cooperative_groups: bool = False,
        name_expressions: Sequence[str] | None = None,
        jitify: bool | None = None,
        arch: str | None = None,
    ) -> None:
        if (code is None) == (path is None):
            raise ArgumentError("RawModule: give exactly one of code and path")
        if code is not None and not isinstance(code, str):
            raise ArgumentError(f"RawModule: code is a {type(code).__name__}; a str is needed")
        if path is not None and not isinstance(path, str | os.PathLike):
            raise ArgumentError(f"RawModule: path is a {type(path).__name__}; a str or a Path is needed")
        expressions = () if name_expressions is None else _strings("name_expressions", name_expressions)
        arguments = _strings("options", options)
        if not isinstance(backend, str) or backend != "nvrtc":
            raise NotSupportedError(f"RawModule: backend is {shown(backend)}; only 'nvrtc' is supported")
        refused = {
            "translate_cucomplex": translate_cucomplex,
            "enable_cooperative_groups": enable_cooperative_groups,
            "jitify": jitify is not None and jitify,
        }
        for name, value in refused.items():
            if check_flag(name, value):
                raise NotSupportedError(f"RawModule: {name} is True; the host executor does not support it")
        text = code if code is not None else _read(Path(path))  # type: ignore[arg-type]
        if "\0" in text or not _is_text(text):
            raise ArgumentError("RawModule: the source has characters that no source may have: NUL, lone surrogates")
        named: dict[str, str] = {}
        if not ptx.is_ptx(text):
            from ..compile import build_source

            arch = environment.host_arch() if arch is None else arch
            source = names.ask(text, expressions) if expressions else text
            binary = build_source(source, name="raw_module", arch=arch, kind="ptx", options=arguments)
            text = binary.image.decode()
            if expressions:
                text, named = names.answers(text, expressions)
        tables, target = _translate(text)
        self._hold(tables, target, named)

    def _hold(self, tables: dict[str, Table], target: str, named: dict[str, str]) -> None:
        self._tables, self._target, self._named = tables, target, named
        self._variables: dict[str, np.ndarray] = {}
        self._kernels: dict[str, RawKernel] = {}
        self._lock = threading.RLock()  # two threads must not make two kernels, or a variable twice

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (_translator_hash(), self._tables, self._target, self._named)

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the kernels."""
        return tuple(self._tables)

    def get_function(self, name: str) -> RawKernel:
        """Return the kernel ``name``, as in PTX or in ``name_expressions``. Raises `ArgumentError` if there is none."""
        name = self._named.get(name, name)
        with self._lock:
            if name not in self._kernels:
                if name not in self._tables:
                    raise ArgumentError(f"no kernel {name!r}: the module has {', '.join(self._tables) or 'none'}")
                self._kernels[name] = RawKernel(self, self._tables[name], self._target)
            return self._kernels[name]

    def get_global(self, name: str) -> np.ndarray:
        """Return the bytes of a ``__device__`` or ``__constant__`` variable, as a writable uint8 array."""
        for table in self._tables.values():
            for variable in table.module_variables:
                if variable.name == name:
                    return self._variable(variable)
        raise ArgumentError(f"no module variable {name!r}")

    def _variable(self, variable: Variable) -> np.ndarray:
        with self._lock:
            if variable.name not in self._variables:
                self._variables[variable.name] = _allocate(variable)
            return self._variables[variable.name]


def _allocate(variable: Variable) -> np.ndarray:
    alignment = max(VARIABLE_ALIGNMENT, variable.align)
    try:
        raw = np.zeros(variable.size + alignment, np.uint8)
    except MemoryError as error:
        raise UnsupportedPTXError(f"no memory for the {variable.size} bytes of variable {variable.name}") from error
    start = -raw.ctypes.data % alignment
    array = raw[start : start + variable.size]
    if variable.data:
        array[: len(variable.data)] = np.frombuffer(variable.data, np.uint8)
    return array


def _rebuild(translator: str, tables: dict[str, Table], target: str, named: dict[str, str]) -> RawModule:
    """Make a module from its pickle. Its tables are for one version of the executor, and hold no addresses."""
    if translator != _translator_hash():
        raise ArgumentError("this RawModule was pickled by another version of cuattn: make it anew from its source")
    module = RawModule.__new__(RawModule)
    module._hold(tables, target, named)
    return module


def _strings(name: str, values: Sequence[str]) -> tuple[str, ...]:
    if not isinstance(values, tuple | list) or not all(isinstance(x, str) for x in values):
        raise ArgumentError(f"RawModule: {name} is {shown(values)}; a tuple or list of str is needed")
    return tuple(values)


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except UnicodeDecodeError as error:
        raise UnsupportedPTXError(f"{path} is no text: the host executor runs PTX, not CUBIN") from error


@lru_cache(maxsize=256)
def _translate(text: str) -> tuple[dict[str, Table], str]:
    """Return the tables of all kernels of a PTX text, from the cache if they are there."""
    from ..compile import cache

    key = f"table-{hashlib.sha256((_translator_hash() + text).encode()).hexdigest()[:20]}"
    cached = cache.read(key, ".tables")
    if cached is not None:
        try:
            return table_file.decode(cached, library.op_index())
        except ValueError:  # whole, but nothing that this version writes: translate anew
            pass
    tables, target = build_tables(text)
    with contextlib.suppress(CacheError, ValueError):  # it runs from memory as well
        cache.write(key, ".tables", table_file.encode(tables, target))
    return tables, target


# What reading damaged text may stumble over where no check stands before.
_ACCIDENTS = (ArithmeticError, AssertionError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Switch collections of garbage off in the block.

    A translation makes a hundred thousand small objects and no cycles of them: Python would look through all objects
    of the process again and again, and find nothing. In a process with many that takes longer than the translation.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def build_tables(text: str) -> tuple[dict[str, Table], str]:
    """Build tables of all kernels of a PTX text, and its target. Raises `UnsupportedPTXError`, whatever the text is."""
    try:
        with _uncollected():
            module = ptx.parse(text)
            tables = {name: build_table(module, entry) for name, entry in module.entries.items()}
    except _ACCIDENTS as error:
        raise UnsupportedPTXError(f"malformed PTX: {type(error).__name__}: {error}") from error
    if not tables:
        raise UnsupportedPTXError("the PTX has no kernel (.entry)")
    return tables, module.target


@lru_cache(maxsize=1)
def _translator_hash() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
