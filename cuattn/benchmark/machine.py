"""Where figures come from: the hardware and software of this machine, without its name or its paths."""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cuattn
from cuattn import environment
from cuattn.benchmark.results import Value
from cuattn.errors import CuattnError
from cuattn.testing.executors import executor_names

PACKAGE = Path(cuattn.__file__).resolve().parent
_CUPY_DISTRIBUTIONS = ("cupy-cuda12x", "cupy-cuda13x", "cupy")


def describe() -> dict[str, Value]:
    """Describe this machine and these versions: what belongs to every result file."""
    return {
        **gpu(),
        "cpu": cpu_model(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "host_isa": host_isa(),
        "host_threads": environment.host_threads(),
        "host_arch": environment.host_arch(),
        "system": f"{platform.system()} {platform.machine()}",
        **versions(),
        **source(),
    }


def now() -> str:
    """The time, UTC, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@functools.cache
def has_gpu() -> bool:
    """Whether a device answers."""
    return "cuda" in executor_names()


@functools.cache
def gpu() -> Mapping[str, Value]:
    """Name and limits of the current device; {"gpu": None} where there is none."""
    if not has_gpu():
        return {"gpu": None, "driver": None}
    import cupy

    device = cupy.cuda.Device()
    properties: Mapping[str, Any] = cupy.cuda.runtime.getDeviceProperties(device.id)
    version = int(cupy.cuda.runtime.driverGetVersion())
    return {
        "gpu": properties["name"].decode(),
        "compute_capability": str(device.compute_capability),
        "num_sms": int(properties["multiProcessorCount"]),
        "l2_bytes": int(properties["l2CacheSize"]),
        "memory_gib": round(properties["totalGlobalMem"] / 2**30, 1),
        "driver": _driver(),
        "driver_cuda": f"{version // 1000}.{version % 1000 // 10}",
    }


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.split()[0] if answer.split() else None


def cpu_model() -> str:
    """The processor's name for itself."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"^model name\s*: *(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.machine()


def host_isa() -> str | None:
    """The instruction set that the host executor uses; None where nothing has run on it in this process."""
    from cuattn.host import library

    interpreter = library.loaded()
    return interpreter.isa if interpreter else None


def nvrtc_version() -> str | None:
    """Version of the NVRTC that compiles here; None where there is none."""
    from cuattn.compile import toolkit

    try:
        return toolkit.find().version
    except CuattnError:
        return None


def versions() -> dict[str, Value]:
    """Versions of NVRTC and of the Python packages that matter; None where one is not installed."""
    result: dict[str, Value] = {"nvrtc": nvrtc_version(), "cupy": cupy_version()}
    for name in ("numpy", "ml_dtypes", "torch"):
        result[name] = _version(name)
    return {**result, "python": platform.python_version(), "cuattn": cuattn.__version__}


def cupy_version() -> str | None:
    """Version of the installed CuPy, such as ``"cupy-cuda12x 14.2.0"``."""
    for name in _CUPY_DISTRIBUTIONS:
        version = _version(name)
        if version is not None:
            return f"{name} {version}"
    return None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def source() -> dict[str, Value]:
    """The commit, where this is a checkout with one, and a hash of the package's files, which there always is."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*")):
        if path.suffix in (".py", ".c", ".h", ".cu", ".cuh"):
            digest.update(f"{path.relative_to(PACKAGE)}\0".encode() + path.read_bytes())
    commit = _git("rev-parse", "HEAD") if (PACKAGE.parent / ".git").exists() else None
    changed = bool(_git("status", "--porcelain", "--", "cuattn")) if commit else None
    return {"commit": commit, "changed_since_commit": changed, "source_sha256": digest.hexdigest()[:16]}


def _git(*arguments: str) -> str | None:
    try:
        answer = subprocess.run(
            ["git", "-C", str(PACKAGE.parent), *arguments], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
