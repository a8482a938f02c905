"""Compiling kernels: expand the source, ask NVRTC, keep the result.

`source` gives the one string that everything is compiled from, `build` the CUBIN or PTX of a kernel of this package,
and `build_source` the same for any CUDA C string. Results are cached on disk by content (`cuattn.compile.cache`): the
key holds the expanded source, the options, every file that either makes the compiler read, and the versions of NVRTC
and its headers, so an edit anywhere builds anew and nothing stale is ever loaded. No GPU, driver or CuPy is needed.

Examples
--------
>>> from cuattn import compile
>>> text = 'extern "C" __global__ void scale(float* x) { x[threadIdx.x] *= 2.0f; }'
>>> binary = compile.build_source(text, name="scale.cu", arch="sm_80", kind="cubin")
>>> binary.resources["scale"].spill_stores
0
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from cuattn.compile import builder, cache, expand
from cuattn.compile.arch import Target, smem_limit_bytes
from cuattn.compile.builder import Binary
from cuattn.compile.expand import Constant, kernel_names
from cuattn.compile.resources import Resources

__all__ = [
    "Binary",
    "Constant",
    "Resources",
    "Target",
    "build",
    "build_source",
    "cache",
    "for_device",
    "forget",
    "kernel_names",
    "on_disk",
    "smem_limit_bytes",
    "source",
]

_memo: dict[object, Binary] = {}


def source(kernel: str, constants: Mapping[str, Constant], *, directory: Path | None = None) -> str:
    """The expanded source of a kernel: one string, self-contained but for the CUDA headers.

    Parameters
    ----------
    kernel : str
        Name of a file in ``cuattn/kernels`` without ``.cu``: ``"attention_forward"``.
    constants : mapping
        Name to value. An int becomes ``constexpr int`` (``long long`` where it must), a bool ``constexpr bool``, a
        float ``constexpr float``; a str is a type: ``{"Element": "__half"}`` becomes ``using Element = __half;``.
    directory : Path, optional
        Another folder to take kernels and their headers from.

    Returns
    -------
    str
        It also compiles through ``cupy.RawModule(code=..., options=("-std=c++17", "-default-device"))``.

    Raises
    ------
    ArgumentError
        There is no such kernel, or a constant cannot be written in C.
    CompileError
        An ``#include`` names no file, or stands inside ``#if``.
    """
    return expand.expand(kernel, constants, expand.KERNELS if directory is None else Path(directory))


def build(
    kernel: str, constants: Mapping[str, Constant], *, arch: str, kind: str, directory: Path | None = None
) -> Binary:
    """Compile a kernel of this package, or take it from this process or from the disk cache.

    Parameters
    ----------
    kernel, constants, directory
        As for `source`.
    arch : str
        ``"sm_80"``, ``"sm_90a"``, ...
    kind : str
        ``"cubin"``, or ``"ptx"`` (compiled for ``compute_80``, ``compute_90a``, ...).

    Returns
    -------
    Binary

    Raises
    ------
    ArgumentError, CompileError
        As for `source`; also for an unknown `arch` or `kind`, and when NVRTC refuses the source.
    NotSupportedError
        `arch` is older than sm_80.
    NVRTCNotFoundError
        The kernel is not in the cache, and there is no NVRTC.
    CacheError
        There is no directory to keep what is compiled, not even a temporary one.
    """
    # This is on the way of every call, so the key is as cheap as it can be. The types belong to it because 1, 1.0 and
    # True are equal; the order of the constants does too, which at worst finds the same binary once more.
    key = (
        kernel,
        arch,
        kind,
        directory,
        os.environ.get("CUATTN_CACHE_DIR"),
        tuple(constants.items()),
        tuple(map(type, constants.values())),
    )
    binary = _memo.get(key)
    if binary is None:
        text = source(kernel, constants, directory=directory)
        name = f"{expand.VIRTUAL_ROOT}{kernel}.cu"
        binary = _memo[key] = builder.build_source(text, name=name, arch=arch, kind=kind)
    return binary


def build_source(text: str, *, name: str, arch: str, kind: str, options: Sequence[str] = ()) -> Binary:
    """Compile a CUDA C string, or take it from the cache.

    Parameters
    ----------
    text : str
        The source. ``<cuda_fp16.h>`` and the other CUDA headers are found.
    name : str
        A file name for messages and line tables: ``"scale.cu"``.
    arch, kind : str
        As for `build`.
    options : sequence of str
        More options for NVRTC.

    Returns
    -------
    Binary

    Raises
    ------
    ArgumentError, NotSupportedError, CompileError, NVRTCNotFoundError, CacheError
        As for `build`.
    """
    return builder.build_source(text, name=name, arch=arch, kind=kind, options=options)


def on_disk(binary: Binary) -> Path:
    """A file with the image of a binary, for programs that read files.

    That is ``binary.path``, unless another process has cleared the cache meanwhile: then it is stored anew.

    Raises
    ------
    CacheError
        As for `build`.
    """
    return builder.on_disk(binary)


def for_device(capability: tuple[int, int]) -> Target:
    """What to compile for on a device of that compute capability. See `cuattn.compile.arch.for_device`."""
    from cuattn.compile import arch, nvrtc

    return arch.for_device(capability, nvrtc.library().supported_archs())


def forget() -> None:
    """Drop the compiled kernels that this process holds in memory. The disk cache stays."""
    _memo.clear()
    builder.forget()
