"""NVRTC through ctypes: no CuPy, no driver, no GPU needed."""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cuattn.compile import toolkit
from cuattn.errors import NVRTCNotFoundError

_SUCCESS = 0
_ERROR_COMPILATION = 6
_ERROR_BUILTIN_OPERATION = 7
# Left out of logs: with it, no two compilations of one source would give the same cache entry.
_TIME = re.compile(r"^ptxas info\s*: Compile time = .*\n", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Result:
    """What one compilation gave. ``ptx`` may be there although ``ok`` is False, when it was ptxas that refused it."""

    ok: bool
    log: str
    ptx: bytes
    cubin: bytes


class Library:
    """A loaded NVRTC library."""

    def __init__(self, path: str) -> None:
        # NVRTC opens this one by name. From CUDA 13 on, the wheels' NVRTC does not look in its own folder for it, but a
        # library that the process has already loaded is found.
        for builtins in sorted(Path(path).parent.glob("libnvrtc-builtins.so.*")) if "/" in path else ():
            ctypes.CDLL(str(builtins))
        self._dll = ctypes.CDLL(path)
        self._dll.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = f"{major.value}.{minor.value}"

    def supported_archs(self) -> tuple[int, ...]:
        """Compute capabilities that this NVRTC knows, as ``major * 10 + minor``, without suffixed variants."""
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        numbers = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", numbers)
        return tuple(numbers)

    def compile(self, source: str, name: str, options: Sequence[str], headers: Mapping[str, bytes]) -> Result:
        """Compile one program. `headers` maps the names that ``#include`` uses to contents."""
        program = ctypes.c_void_p()
        contents = (ctypes.c_char_p * len(headers))(*headers.values())
        names = (ctypes.c_char_p * len(headers))(*(key.encode() for key in headers))
        self._call(
            "nvrtcCreateProgram", ctypes.byref(program), source.encode(), name.encode(), len(headers), contents, names
        )
        try:
            argv = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            code = self._dll.nvrtcCompileProgram(program, len(options), argv)
            log = _TIME.sub("", self._text(program, "ProgramLog").decode(errors="replace"))
            if code not in (_SUCCESS, _ERROR_COMPILATION):
                log = f"{self._error(code)}\n{log}"
            if code == _ERROR_BUILTIN_OPERATION:
                raise NVRTCNotFoundError(f"NVRTC cannot load its builtins library: reinstall it. {log}")
            return Result(code == _SUCCESS, log, self._text(program, "PTX"), self._bytes(program, "CUBIN"))
        finally:
            self._dll.nvrtcDestroyProgram(ctypes.byref(program))

    def _bytes(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        # A kind of output that this compilation did not make is an error or has size 0, by version.
        if getattr(self._dll, f"nvrtcGet{what}Size")(program, ctypes.byref(size)) != _SUCCESS or not size.value:
            return b""
        buffer = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, buffer)
        return buffer.raw

    def _text(self, program: ctypes.c_void_p, what: str) -> bytes:
        # NVRTC counts the terminating NUL of a text as part of it.
        return self._bytes(program, what).rstrip(b"\0")

    def _call(self, function: str, *args: object) -> None:
        code = getattr(self._dll, function)(*args)
        if code != _SUCCESS:
            raise NVRTCNotFoundError(f"{function} failed: {self._error(code)}")

    def _error(self, code: int) -> str:
        text: bytes = self._dll.nvrtcGetErrorString(code)
        return text.decode()


@functools.lru_cache(maxsize=1)
def library() -> Library:
    """The NVRTC of `toolkit.find`, loaded on first use.

    Raises
    ------
    NVRTCNotFoundError
        There is none, or it cannot be loaded.
    """
    path = toolkit.find().library
    try:
        return Library(path)
    except OSError as error:
        raise NVRTCNotFoundError(f"NVRTC at {path} cannot be loaded ({error}): {toolkit.INSTALL_HINT}") from error


def version_of(name: str) -> str | None:
    """Version of the library that the system's loader finds under `name`; None when it finds none."""
    try:
        return Library(name).version
    except OSError:
        return None
