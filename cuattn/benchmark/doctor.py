"""What is installed here, what is not, and the command that mends it: each check is a function that says what it found.

A check that is "broken" keeps something from working that should; "missing" is what this machine does without.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np

import cuattn
from cuattn import compile, environment
from cuattn.benchmark import machine, peers
from cuattn.benchmark.variants import empty_cache
from cuattn.compile import cache, toolkit
from cuattn.compile.sass import nvdisasm
from cuattn.errors import CuattnError

__all__ = ["CHECKS", "Finding", "examine"]

State = Literal["ok", "missing", "broken"]
_NEEDED = ("numpy", "scipy", "ml_dtypes", "click", "rich")
_HALF = """
#include <cuda_fp16.h>
#include <cuda_bf16.h>
extern "C" __global__ void cuattn_doctor(__half* x, __nv_bfloat16* y) {
    x[0] = __half(1.0f);
    y[0] = __nv_bfloat16(1.0f);
}
"""
_SMI = 20  # seconds that nvidia-smi may take


class Finding(NamedTuple):
    """What a check found: what was looked at, how it is, in words, and the command that mends it, if one does."""

    what: str
    state: State
    found: str
    mend: str = ""


def examine() -> list[Finding]:
    """Make every check. One that fails itself is a finding too."""
    found: list[Finding] = []
    for name, check in CHECKS.items():
        try:
            found += check()
        except Exception as error:  # whatever it was, the other checks still have something to say
            found.append(Finding(name, "broken", f"the check failed: {type(error).__name__}: {error}"))
    return found


def packages() -> Iterator[Finding]:
    """What the core needs."""
    for name in _NEEDED:
        try:
            yield Finding(name, "ok", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "broken", "not installed", f"pip install {name}")


def variables() -> Iterator[Finding]:
    """Whether the environment variables mean something, and have values that they may have."""
    wrong = []
    for name in environment.VARIABLES:
        try:
            environment.read(name)
        except CuattnError as error:
            wrong.append((name, str(error)))
    unknown = [name for name in os.environ if name.startswith(environment.PREFIX) and name not in environment.VARIABLES]
    for name, text in wrong:
        yield Finding(name, "broken", text, f"unset {name}")
    for name in unknown:
        yield Finding(name, "broken", "no variable of cuattn has this name", f"unset {name}")
    if not wrong and not unknown:
        values = ", ".join(f"{name}={os.environ[name]}" for name in environment.VARIABLES if name in os.environ)
        yield Finding("environment variables", "ok", values or "none are set")


def cache_folder() -> Iterator[Finding]:
    """Whether the cache can be written, and by nobody else."""
    try:
        folder = cache.require_usable()
        wanted = environment.cache_dir()
    except CuattnError as error:
        yield Finding("cache", "broken", str(error), 'export CUATTN_CACHE_DIR="$HOME/.cache/cuattn"')
        return
    if folder != wanted:
        why = f"{wanted} cannot be used; {folder} is used for now"
        yield Finding("cache", "broken", why, f"mkdir -p {wanted} && chmod 700 {wanted}")
        return
    try:
        with tempfile.NamedTemporaryFile(prefix=".cuattn-tmp-", dir=folder):
            pass
    except OSError as error:
        yield Finding("cache", "broken", f"{folder} cannot be written: {error.strerror}", f"chmod u+rwx {folder}")
        return
    entries = cache.ls()
    size, free = sum(entry.size_bytes for entry in entries), shutil.disk_usage(folder).free
    text = f"{folder}: {len(entries)} entries, {size / 2**20:,.0f} MiB; {free / 2**30:,.1f} GiB are free"
    if free < 2**28:
        yield Finding("cache", "broken", text, "cuattn-bench cache prune --max-size 100MB")
    else:
        yield Finding("cache", "ok", text)


def compiler() -> Iterator[Finding]:
    """Whether NVRTC is there, fits its headers, and compiles."""
    try:
        found = toolkit.find()
    except CuattnError as error:
        yield Finding("NVRTC", "broken", str(error), "pip install 'cuattn[cuda12]'")
        return
    mend = f"pip install 'nvidia-cuda-runtime-cu12=={'.'.join(found.version.split('.')[:2])}.*'"
    if found.major != 12:
        mend = mend.replace("-cu12", "")
    if found.include is None:
        yield Finding("CUDA headers", "broken", f"there are none for NVRTC {found.version}", mend)
        return
    try:
        with empty_cache():
            compile.build_source(_HALF, name="doctor.cu", arch="sm_80", kind="ptx")
    except CuattnError as error:
        first = str(error).strip().splitlines()[0]
        why = f"NVRTC {found.version} cannot compile its headers, {found.include_version}: {first}"
        yield Finding("NVRTC", "broken", why, mend)
        return
    yield Finding("NVRTC", "ok", f"{found.version}, headers {found.include_version}; they compile")


def host_executor() -> Iterator[Finding]:
    """Whether NumPy arrays work, by a small call."""
    from cuattn.host import library

    try:
        isa = library.load().isa
        result = cuattn.softmax(np.array([[0.0, np.log(3.0)]], np.float32))
    except CuattnError as error:
        why = str(error).strip().splitlines()[0]
        mend = "" if shutil.which("cc") or shutil.which("gcc") else "apt-get install gcc"
        yield Finding("host executor", "broken", why, mend)
        return
    right = bool(np.allclose(result, [[0.25, 0.75]], atol=1e-6))
    text = f"{isa}, {environment.host_threads()} threads; a softmax {'is right' if right else f'is wrong: {result}'}"
    yield Finding("host executor", "ok" if right else "broken", text)


def gpu() -> Iterator[Finding]:
    """Driver, CuPy and device, and whether anything else disturbs measurements on it."""
    smi = _smi("driver_version,name,clocks.sm,clocks.max.sm,utilization.gpu,temperature.gpu")
    if not smi:
        yield Finding("driver", "missing", "nvidia-smi does not answer: there is no NVIDIA GPU, or no driver")
    else:
        yield Finding("driver", "ok", smi[0][0])
    cupy = machine.cupy_version()
    if cupy is None:
        state: State = "broken" if smi else "missing"
        yield Finding("CuPy", state, "not installed: NumPy arrays only", "pip install 'cuattn[cuda12]'")
        return
    if not machine.has_gpu():
        answer = "no GPU answers CuPy" if smi else "there is no GPU for it"
        yield Finding("CuPy", "broken" if smi else "missing", f"{cupy}: {answer}", "nvidia-smi" if smi else "")
        return
    yield Finding("CuPy", "ok", cupy)
    described = machine.gpu()
    capability = str(described["compute_capability"])
    supported = int(capability) >= 80
    text = f"{described['gpu']}, compute capability {capability}"
    yield Finding("GPU", "ok" if supported else "broken", text if supported else f"{text}: 8.0 or newer is needed")
    for _, name, clock, limit, busy, heat in smi:
        slow = clock.split()[0].isdecimal() and int(clock.split()[0]) < 0.5 * int(limit.split()[0])
        note = "; it is idle, and measurements begin with a warm-up" if slow else ""
        yield Finding(f"clock of {name}", "ok", f"{clock} of {limit}, {busy} busy, {heat} °C{note}")
    others = [row for row in _smi("pid,used_memory", "--query-compute-apps") if row[0] != str(os.getpid())]
    if others:
        text = ", ".join(f"process {pid} with {memory}" for pid, memory in others)
        yield Finding("other processes", "broken", f"{text}: times taken now are not reproducible", "nvidia-smi")
    else:
        yield Finding("other processes", "ok", "none on the GPU")


def _smi(fields: str, query: str = "--query-gpu") -> list[list[str]]:
    """Ask nvidia-smi; no rows where it does not answer."""
    command = ["nvidia-smi", f"{query}={fields}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_SMI, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines() if line.strip()]
    return [row for row in rows if len(row) == fields.count(",") + 1]


def processor() -> Iterator[Finding]:
    """Whether other programs take the cores that measurements need."""
    cores = environment.host_threads()
    if not hasattr(os, "getloadavg"):
        return
    load = os.getloadavg()[0]
    text = f"{machine.cpu_model()}; load {load:.1f} on {os.cpu_count()} cores, {cores} threads are used"
    busy = load > 0.5 * (os.cpu_count() or 1)
    yield Finding("processor", "ok", text + ("; other programs run: times on it are noisy" if busy else ""))


def extras() -> Iterator[Finding]:
    """What some commands need, and the peers of benchmarks."""
    try:
        yield Finding("nvdisasm", "ok", f"{nvdisasm.find()}, for inspect")
    except CuattnError:
        yield Finding("nvdisasm", "missing", "inspect needs it", "pip install 'cuattn[inspect]'")
    for module, extra, what in (("matplotlib", "plot", "plot"), ("hypothesis", "test", "fuzz and the tests")):
        if importlib.util.find_spec(module) is None:
            yield Finding(module, "missing", f"{what} needs it", f"pip install 'cuattn[{extra}]'")
        else:
            yield Finding(module, "ok", f"{importlib.metadata.version(module)}, for {what}")
    kinds = ("attention", "backward", "softmax", "linear")
    lost = {name: why for kind in kinds for name, why in peers.missing(kind, True, "cuda").items()}
    for name, why in lost.items():
        yield Finding(f"peer {name}", "missing", "not installed", why.removeprefix("not installed: "))


CHECKS: dict[str, Callable[[], Iterator[Finding]]] = {
    "packages": packages,
    "environment variables": variables,
    "cache": cache_folder,
    "NVRTC": compiler,
    "host executor": host_executor,
    "GPU": gpu,
    "processor": processor,
    "extras": extras,
}
