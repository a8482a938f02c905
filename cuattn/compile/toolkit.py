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
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from cuattn.errors import NVRTCNotFoundError

_LIBRARY = re.compile(r"libnvrtc\.so\.(\d+(?:\.\d+)*)")
_DIST_INFO = re.compile(
    r"(nvidia_cuda_nvrtc|nvidia_cuda_runtime|cupy_cuda)_?(?:cu)?(\d*)x?-(\d+)([\d.]*)\.dist-info", re.IGNORECASE
)
# Libraries that the system's loader may know, newest first.
_SYSTEM_NAMES = ("libnvrtc.so.13", "libnvrtc.so.12")
_SYSTEM_PREFIX = "/usr/local/cuda"
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
    """The NVRTC to use: one of CuPy's CUDA major version before others, then the newest.

    Searched are the NVIDIA wheels, ``$CUDA_PATH``, ``$CUDA_HOME``, the environment's prefix, ``/usr/local/cuda`` and
    the system's loader. The answer is kept for the process.

    Raises
    ------
    NVRTCNotFoundError
        There is none, or only one older than CUDA 12.
    """
    dists = _distributions()
    found = [*_wheels(dists), *_installed()]
    usable = [toolkit for toolkit in found if toolkit.major >= 12]
    if not usable:
        usable = list(_from_loader())
    if not usable:
        old = f" (found only {', '.join(toolkit.library for toolkit in found)}, too old)" if found else ""
        raise NVRTCNotFoundError(f"NVRTC 12 or newer was not found{old}: {INSTALL_HINT}")
    cupy_majors = {int(major) for name, major in dists if name == "cupy_cuda"}
    # max keeps the first of equals, so wheels win over an installed toolkit of the same version.
    best = max(usable, key=lambda toolkit: (toolkit.major in cupy_majors, _numbers(toolkit.version)))
    for other in usable:
        if best.include is None and other.major == best.major:
            best = replace(best, include=other.include, include_version=other.include_version)
    if "." not in best.version:  # neither metadata nor a full file name: the library itself has to say
        from cuattn.compile import nvrtc

        best = replace(best, version=nvrtc.version_of(best.library) or best.version)
    return best


def _distributions() -> dict[tuple[str, str], str]:
    """(name, CUDA major version) to version, for the few distributions of interest, from directory names alone."""
    result: dict[tuple[str, str], str] = {}
    for entry in sys.path:
        try:
            file_names = os.listdir(entry or ".")
        except OSError:
            continue
        for file_name in file_names:
            match = _DIST_INFO.fullmatch(file_name)
            if match:
                major = match[2] or match[3]
                result.setdefault((match[1].lower(), major), match[3] + match[4])
    return result


def _wheels(dists: dict[tuple[str, str], str]) -> Iterator[Toolkit]:
    for entry in sys.path:
        base = Path(entry or ".") / "nvidia"
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
    prefixes = (os.environ.get("CUDA_PATH"), os.environ.get("CUDA_HOME"), sys.prefix, _SYSTEM_PREFIX)
    for prefix in dict.fromkeys(Path(prefix) for prefix in prefixes if prefix):
        for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
            for library, version in _libraries(prefix / folder):
                include = _headers(prefix / "include") or _headers(prefix / folder / "../include")
                yield Toolkit(str(library), version, include, _fingerprint(include))


def _from_loader() -> Iterator[Toolkit]:
    from cuattn.compile import nvrtc

    include = _headers(Path("/usr/include"))
    for name in _SYSTEM_NAMES:
        version = nvrtc.version_of(name)
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
    """Stands for the version of headers that come without metadata: their sizes differ from release to release."""
    if include is None:
        return "none"
    sizes = [(include / name).stat().st_size for name in ("cuda_fp16.h", "cuda_bf16.h", "cuda_runtime_api.h")]
    return "size" + "-".join(map(str, sizes))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
