"""Finding NVRTC and the CUDA headers, without loading or importing either.

The version of NVRTC belongs to the key of every cached kernel, so it is needed on every start. It is read from names on
disk (of the wheel's metadata directory, or of the library file), because loading the library, or asking CuPy, takes
longer than the whole rest of a cached start.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cuattn import environment
from cuattn.compile import program
from cuattn.errors import NVRTCNotFoundError

_LIBRARY = re.compile(r"libnvrtc\.so\.(\d+(?:\.\d+)*)")
_DIST_INFO = re.compile(
    r"(nvidia_cuda_nvrtc|nvidia_cuda_runtime|cupy_cuda)_?(?:cu)?(\d*)x?-(\d+)([\d.]*)\.dist-info", re.IGNORECASE
)
# Libraries that the system's loader may know, newest first.
_SYSTEM_NAMES = ("libnvrtc.so.13", "libnvrtc.so.12")
_SYSTEM_PREFIX = "/usr/local/cuda"
_LIBRARY_FOLDERS = ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")
OLDEST_MAJOR = 12
INSTALL_HINT = 'install the CUDA extra, pip install "cuattn[cuda12]" or "cuattn[cuda13]"'


@dataclass(frozen=True, slots=True)
class Toolkit:
    """An NVRTC and the headers that go with it.

    Attributes
    ----------
    library : str
        Path of the shared library, or a name that the system's loader knows.
    version : str
        Version of NVRTC, as exact as it can be had without loading it: ``"12.9.86"``.
    include : Path or None
        Directory of ``cuda_fp16.h``; None when no headers were found.
    include_version : str
        Version of the headers.
    """

    library: str
    version: str
    include: Path | None
    include_version: str

    @property
    def major(self) -> int:
        return int(self.version.split(".")[0])


@functools.lru_cache(maxsize=1)
def find() -> Toolkit:
    """The NVRTC to use: that of ``CUATTN_NVRTC``, else the one of the environment that CuPy takes its libraries from.

    Searched are, in this order, the NVIDIA wheels of the environment, its prefix, ``$CUDA_PATH``, ``$CUDA_HOME``,
    ``/usr/local/cuda`` and the system's loader. The first that has one decides, whatever the others have; of several
    wheels, the newest. Where CuPy is installed, only its CUDA major version counts. Neither the current folder nor that
    of the program is searched. The answer is kept for the process.

    Raises
    ------
    NVRTCNotFoundError
        There is none, only one of another major version than CuPy's, or only one older than CUDA 12.
    """
    dists = _distributions()
    chosen = environment.nvrtc()
    if chosen is not None:
        return _complete(_named(chosen), *_wheels(dists), *_installed())
    wheels = sorted(_wheels(dists), key=lambda toolkit: _numbers(toolkit.version), reverse=True)
    found = [*wheels, *_installed()]
    if not any(toolkit.major >= OLDEST_MAJOR for toolkit in found):
        found += _from_loader()
    cupy = {int(major) for name, major in dists if name == "cupy_cuda" and int(major) >= OLDEST_MAJOR}
    usable = [toolkit for toolkit in found if toolkit.major >= OLDEST_MAJOR and (not cupy or toolkit.major in cupy)]
    if not usable:
        raise NVRTCNotFoundError(_why_none(found, cupy))
    return _complete(*usable)


def _why_none(found: Sequence[Toolkit], cupy: set[int]) -> str:
    newest = max((toolkit.major for toolkit in found), default=0)
    reason = "too old" if newest < OLDEST_MAJOR else f"CuPy is for CUDA {', '.join(map(str, sorted(cupy)))}"
    only = f" (found only {', '.join(toolkit.library for toolkit in found)}: {reason})" if found else ""
    return f"NVRTC {OLDEST_MAJOR} or newer was not found{only}: {INSTALL_HINT}, or set CUATTN_NVRTC"


def _complete(best: Toolkit, *others: Toolkit) -> Toolkit:
    """Add headers of another toolkit of its major version, and a version, where a toolkit has none of its own."""
    for other in others:
        if best.include is None and other.major == best.major:
            best = replace(best, include=other.include, include_version=other.include_version)
    if "." not in best.version:  # neither metadata nor a full file name: the library itself has to say
        best = replace(best, version=program.version_of(best.library) or best.version)
    return best


def _named(path: Path) -> Toolkit:
    """What ``CUATTN_NVRTC`` names: a library, or the newest of a folder, and the headers that lie near it."""
    folders = [path, *(path / folder for folder in _LIBRARY_FOLDERS)]
    found = [pair for folder in folders for pair in _libraries(folder)]
    if path.is_file() and (match := _LIBRARY.fullmatch(path.name)):
        found = [(path, match[1])]
    if not found:
        raise NVRTCNotFoundError(f"CUATTN_NVRTC={path} is neither a file libnvrtc.so.* nor a folder that has one")
    library, version = max(found, key=lambda pair: _numbers(pair[1]))
    if match := _LIBRARY.fullmatch(library.resolve().name):
        version = match[1]  # the file that a link leads to has the whole version in its name
    near = ("../include", "../../../include", "../../cuda_runtime/include")
    places = (_headers(Path(os.path.normpath(library.parent / folder))) for folder in near)
    include = next((place for place in places if place), None)
    return Toolkit(str(library), version, include, _fingerprint(include))


def search_path() -> list[str]:
    """The folders of ``sys.path`` that packages are installed in: not the current folder, nor the program's own."""
    here = {_STARTED_IN, _current_folder(), os.path.dirname(os.path.abspath(sys.argv[0] if sys.argv else ""))}
    installed = ("site-packages", "dist-packages")
    return [
        entry
        for entry in sys.path
        if os.path.isabs(entry) and (entry not in here or os.path.basename(entry) in installed)
    ]


def _current_folder() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it has been deleted
        return ""


_STARTED_IN = _current_folder()


def _distributions() -> dict[tuple[str, str], str]:
    """Find the version by (name, CUDA major version) of the distributions of interest, from directory names alone."""
    result: dict[tuple[str, str], str] = {}
    for entry in search_path():
        try:
            file_names = os.listdir(entry)
        except OSError:
            continue
        for file_name in file_names:
            match = _DIST_INFO.fullmatch(file_name)
            if match:
                major = match[2] or match[3]
                result.setdefault((match[1].lower(), major), match[3] + match[4])
    return result


def _wheels(dists: dict[tuple[str, str], str]) -> Iterator[Toolkit]:
    for entry in search_path():
        base = Path(entry) / "nvidia"
        # CUDA 12 wheels have a folder a component, CUDA 13 wheels share one a major version.
        for folder in ("cuda_nvrtc", "cu13", "cu14"):
            for library, version in _libraries(base / folder / "lib"):
                major = version.split(".")[0]
                shared = base / folder if folder != "cuda_nvrtc" else base / "cuda_runtime"
                exact = dists.get(("nvidia_cuda_nvrtc", major))
                include_version = dists.get(("nvidia_cuda_runtime", major))
                include = _headers(shared / "include")
                yield Toolkit(str(library), exact or version, include, include_version or _fingerprint(include))


def _installed() -> Iterator[Toolkit]:
    variables = (os.environ.get(name, "") for name in ("CUDA_PATH", "CUDA_HOME"))
    for prefix in dict.fromkeys(map(Path, (sys.prefix, *variables, _SYSTEM_PREFIX))):
        if not prefix.is_absolute():
            continue
        pairs = [pair for folder in _LIBRARY_FOLDERS for pair in _libraries(prefix / folder)]
        # A link has the major version in its name only: the whole name is the better one.
        for library, version in sorted(pairs, key=lambda pair: _numbers(pair[1]), reverse=True):
            include = _headers(prefix / "include") or _headers(library.parent / "../include")
            yield Toolkit(str(library), version, include, _fingerprint(include))


def _from_loader() -> Iterator[Toolkit]:
    # An empty or relative entry makes the loader search the current folder, a common mistake in shell scripts.
    if not all(map(os.path.isabs, os.environ.get("LD_LIBRARY_PATH", "/").split(":"))):
        return
    include = _headers(Path("/usr/include"))
    for name in _SYSTEM_NAMES:
        version = program.version_of(name)
        if version is not None:
            yield Toolkit(name, version, include, _fingerprint(include))


def _libraries(folder: Path) -> Iterator[tuple[Path, str]]:
    """NVRTC libraries in a folder, with the version that their names tell: the major version at least."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return
    for name in names:
        match = _LIBRARY.fullmatch(name)
        if match:
            yield folder / name, match[1]


def _headers(folder: Path) -> Path | None:
    return folder if (folder / "cuda_fp16.h").is_file() else None


def _fingerprint(include: Path | None) -> str:
    """A stand-in for the version of headers that come without metadata: their sizes differ from release to release."""
    if include is None:
        return "none"
    sizes = [(include / name).stat().st_size for name in ("cuda_fp16.h", "cuda_bf16.h", "cuda_runtime_api.h")]
    return "size" + "-".join(map(str, sizes))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
