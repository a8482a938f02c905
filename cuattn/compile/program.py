"""NVRTC through ctypes, and the process that compiles: run as a program, this file answers requests for compilations.

While NVRTC compiles it replaces the handlers of SIGINT and SIGTERM of its whole process, so Ctrl-C would end an
interpreter that compiles without `KeyboardInterrupt` or ``finally``. Therefore programs are compiled in a process of
their own (`cuattn.compile.workers`). This file stands alone (standard library only): that process imports nothing else.

Requests and answers are frames of byte strings (`write_frame`). A process that compiles ends when its peer does.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SUCCESS = 0
ERROR_COMPILATION = 6
ERROR_BUILTIN_OPERATION = 7

#: First string of the first answer, so that a program that is no compiling process is not taken for one.
GREETING = b"cuattn compiling process 1"
_COUNT, _LENGTH, _FIGURES = struct.Struct("<I"), struct.Struct("<Q"), struct.Struct("<id")
_MAX_STRINGS, _MAX_BYTES = 1 << 16, 1 << 31


class NVRTCError(RuntimeError):
    """A function of NVRTC failed that should not."""


@dataclass(frozen=True, slots=True)
class Result:
    """What one compilation gave. ``ptx`` may be there although ``ok`` is False, when it was ptxas that refused it.

    ``code`` is NVRTC's status, ``cpu_s`` the processor time of the compilation in seconds.
    """

    code: int
    log: str
    ptx: bytes
    cubin: bytes
    cpu_s: float = 0.0

    @property
    def ok(self) -> bool:
        return self.code == SUCCESS


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
            start = time.process_time()
            code = self._dll.nvrtcCompileProgram(program, len(options), argv)
            cpu_s = time.process_time() - start
            log = self._text(program, "ProgramLog").decode(errors="replace")
            if code not in (SUCCESS, ERROR_COMPILATION):
                log = f"{self._error(code)}\n{log}"
            return Result(code, log, self._text(program, "PTX"), self._bytes(program, "CUBIN"), cpu_s)
        finally:
            self._dll.nvrtcDestroyProgram(ctypes.byref(program))

    def _bytes(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        # A kind of output that this compilation did not make is an error or has size 0, by version.
        if getattr(self._dll, f"nvrtcGet{what}Size")(program, ctypes.byref(size)) != SUCCESS or not size.value:
            return b""
        buffer = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, buffer)
        return buffer.raw

    def _text(self, program: ctypes.c_void_p, what: str) -> bytes:
        # NVRTC counts the terminating NUL of a text as part of it.
        return self._bytes(program, what).rstrip(b"\0")

    def _call(self, function: str, *args: object) -> None:
        code = getattr(self._dll, function)(*args)
        if code != SUCCESS:
            raise NVRTCError(f"{function} failed: {self._error(code)}")

    def _error(self, code: int) -> str:
        text: bytes = self._dll.nvrtcGetErrorString(code)
        return text.decode()


# --- frames -----------------------------------------------------------------------------------------------------------


def write_frame(strings: Sequence[bytes], write: Callable[[bytes], object]) -> None:
    """Send byte strings: their number, the length of each, then all of them."""
    lengths = b"".join(_LENGTH.pack(len(string)) for string in strings)
    write(b"".join((_COUNT.pack(len(strings)), lengths, *strings)))


def read_frame(read: Callable[[int], bytes]) -> list[bytes]:
    """What `write_frame` sent. ``read(n)`` gives 1 to n bytes, none at the end. Raises `EOFError`, `ValueError`."""
    (count,) = _COUNT.unpack(_exactly(_COUNT.size, read))
    if count > _MAX_STRINGS:
        raise ValueError(f"a frame of {count} strings")
    lengths = struct.unpack(f"<{count}Q", _exactly(count * _LENGTH.size, read))
    if sum(lengths) > _MAX_BYTES:
        raise ValueError(f"a frame of {sum(lengths)} bytes")
    return [_exactly(length, read) for length in lengths]


def _exactly(size: int, read: Callable[[int], bytes]) -> bytes:
    parts = []
    while size:
        part = read(min(size, 1 << 20))
        if not part:
            raise EOFError("the other process has ended")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def pack_request(source: str, name: str, options: Sequence[str], headers: Mapping[str, bytes]) -> list[bytes]:
    """The strings that ask for one compilation. Relative paths in `options` are of this process's folder."""
    texts = (source, name, str(len(options)), *options, *headers)
    return [_folder(), *(text.encode() for text in texts), *headers.values()]


def _folder() -> bytes:
    try:
        return os.getcwdb()
    except FileNotFoundError:  # it has been deleted
        return b"/"


def _answer(library: Library, request: list[bytes]) -> list[bytes]:
    folder, source, name, count, *rest = request
    num_options = int(count)
    options = [option.decode() for option in rest[:num_options]]
    num_headers = (len(rest) - num_options) // 2
    names = [text.decode() for text in rest[num_options : num_options + num_headers]]
    headers = dict(zip(names, rest[num_options + num_headers :], strict=True))
    os.chdir(folder)
    result = library.compile(source.decode(), name.decode(), options, headers)
    return [_FIGURES.pack(result.code, result.cpu_s), result.log.encode(), result.ptx, result.cubin]


def unpack_answer(answer: list[bytes]) -> Result:
    """The result in the strings of an answer. Raises `NVRTCError`."""
    if len(answer) != 4:
        raise NVRTCError(b" ".join(answer).decode(errors="replace"))
    code, cpu_s = _FIGURES.unpack(answer[0])
    return Result(code, answer[1].decode(), answer[2], answer[3], cpu_s)


# --- the process ------------------------------------------------------------------------------------------------------


def _serve(path: str, channel: int) -> None:
    """Answer requests on a socket until it closes. At that moment the process ends, even inside a compilation."""
    import queue
    import threading

    def write(data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(channel, view) :]

    requests: queue.SimpleQueue[list[bytes]] = queue.SimpleQueue()

    def read_requests() -> None:
        try:
            while True:
                requests.put(read_frame(lambda size: os.read(channel, size)))
        finally:
            os._exit(0)

    threading.Thread(target=read_requests, daemon=True).start()
    try:
        library = Library(path)
    except (OSError, AttributeError, NVRTCError) as error:
        write_frame([GREETING, str(error).encode()], write)
        return
    write_frame([GREETING], write)
    while True:
        request = requests.get()
        try:
            answer = _answer(library, request)
        except (OSError, ValueError, NVRTCError) as error:
            answer = [str(error).encode()]
        write_frame(answer, write)


def version_of(name: str) -> str | None:
    """Version of the library that the system's loader finds under `name`; None when it finds none."""
    try:
        return Library(name).version
    except (OSError, AttributeError, NVRTCError):
        return None


if __name__ == "__main__":
    _serve(sys.argv[1], 0)
