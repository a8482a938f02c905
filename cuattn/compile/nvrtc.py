"""The NVRTC of this environment: compiling in processes of its own, and what the library itself can tell.

No CuPy, no driver, no GPU needed.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace

from cuattn.compile import toolkit, workers
from cuattn.compile.program import ERROR_BUILTIN_OPERATION, Library, NVRTCError, Result
from cuattn.errors import NVRTCNotFoundError

__all__ = ["Library", "Result", "compile", "cpu_seconds", "library"]

# Left out of logs: with it, no two compilations of one source would give the same cache entry.
_TIME = re.compile(r"^ptxas info\s*: Compile time = .*\n", re.MULTILINE)


def compile(
    source: str, name: str, options: Sequence[str], headers: Mapping[str, bytes], *, job: workers.Job | None = None
) -> Result:
    """Compile one program.

    Parameters
    ----------
    source, name : str
        The program, and the file name that it seems to have.
    options : sequence of str
    headers : mapping of str to bytes
        The names that ``#include`` uses to contents.
    job : Job, optional
        Compile in another process, where no signal of this one reaches NVRTC, until this job is given up. Else here.

    Raises
    ------
    NVRTCNotFoundError
        There is no NVRTC, it cannot be loaded, or it misses a part of itself.
    CompileError
        NVRTC crashed.
    CannotStart
        With a job: no other process can be started.
    """
    path = toolkit.find().library
    try:
        if job is None:
            result = workers.here(path, source, name, options, headers)
        else:
            result = workers.compile(path, source, name, options, headers, job)
            _add_cpu_seconds(result.cpu_s)
    except (OSError, AttributeError, NVRTCError) as error:
        raise _unusable(path, error) from error
    if result.code == ERROR_BUILTIN_OPERATION:
        raise NVRTCNotFoundError(f"NVRTC cannot load its builtins library: reinstall it. {result.log}")
    return replace(result, log=_TIME.sub("", result.log))


_spent_lock = threading.Lock()
_spent_s = 0.0


def _add_cpu_seconds(seconds: float) -> None:
    global _spent_s
    with _spent_lock:
        _spent_s += seconds


def cpu_seconds() -> float:
    """Processor time that other processes have spent on compilations of this one, in seconds."""
    return _spent_s


@functools.lru_cache(maxsize=1)
def library() -> Library:
    """The NVRTC of `toolkit.find`, loaded into this process on first use, to be asked what it supports.

    Raises
    ------
    NVRTCNotFoundError
        There is none, or it cannot be loaded.
    """
    path = toolkit.find().library
    try:
        return Library(path)
    except (OSError, AttributeError, NVRTCError) as error:
        raise _unusable(path, error) from error


def _unusable(path: str, error: Exception) -> NVRTCNotFoundError:
    return NVRTCNotFoundError(f"NVRTC at {path} cannot be loaded ({error}): {toolkit.INSTALL_HINT}")
