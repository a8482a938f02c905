"""The way from a source string to a `Binary`: the cache key, the options, the compilation."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cuattn.compile import arch as archs
from cuattn.compile import cache, includes, resources, toolkit
from cuattn.compile.resources import Resources
from cuattn.errors import ArgumentError, NVRTCNotFoundError

if TYPE_CHECKING:
    from cuattn.compile import workers

_FORMAT = "2"  # part of every key: raise it when the meaning of a cached entry changes
_KINDS = ("ptx", "cubin")
_INCLUDE = re.compile(rb"^[ \t]*#[ \t]*include[ \t]*[<\"]([^/>\"]+)[>\"]", re.MULTILINE)
_CUDA_INCLUDE = re.compile(r"^[ \t]*#[ \t]*include[ \t]*<cuda_", re.MULTILINE)
_STANDARD = ("-std", "--std")
_ARCH = ("-arch", "--gpu-architecture")
_READ_ATTEMPTS = 3


@dataclass(frozen=True, slots=True, eq=False)
class Binary:
    """A compiled kernel file.

    Attributes
    ----------
    name : str
        The kernel's name, or what `build_source` was given.
    arch, kind : str
        ``"sm_90a"`` and ``"cubin"``, for example.
    key : str
        Its name in the cache: derived files are stored under it (`cuattn.compile.cache`).
    path : Path
        The file in the cache; ``cupy.RawModule(path=str(path))`` loads it.
    image : bytes
        Its contents: an ELF image, or PTX text without a terminating NUL.
    source : str
        The expanded source.
    resources : mapping of str to Resources
        Entry name to figures; empty for PTX, which has none yet.
    log : str
        What the compiler wrote: warnings, and ptxas's figures.
    """

    name: str
    arch: str
    kind: str
    key: str
    path: Path
    image: bytes
    source: str
    resources: Mapping[str, Resources]
    log: str


_built: dict[str, Binary] = {}
_locks: dict[str, threading.Lock] = {}
_guard = threading.Lock()


def build_source(text: str, *, name: str, arch: str, kind: str, options: Sequence[str] = ()) -> Binary:
    """Compile a source string, or take it from the cache. See `cuattn.compile.build_source`."""
    argv = _options(arch, kind, options)
    read = _includes(text, name, argv)
    key = _key(text, name, argv, arch, read)
    place = f"{cache.root()}/{key}.{kind}"
    with _guard:
        lock = _locks.setdefault(place, threading.Lock())
    with lock:  # two threads that want one kernel compile it once
        binary = _built.get(place)
        if binary is None:
            binary = None if read.volatile else _load(key, text, name, arch, kind)
            if binary is None:
                binary = _make(key, text, name, arch, kind, argv)
            if not read.volatile and binary.key == key:
                _built[place] = binary
    return binary


def forget() -> None:
    """Drop the binaries that this process holds. The disk cache stays."""
    with _guard:
        _built.clear()
        _locks.clear()


def _after_fork() -> None:
    global _guard
    _guard = threading.Lock()  # a thread that does not exist here may hold these
    _locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _options(arch: str, kind: str, extra: Sequence[str]) -> list[str]:
    archs.capability(arch)  # raises for what is not supported
    if kind not in _KINDS:
        raise ArgumentError(f"kind={kind!r} is not known: use one of {', '.join(_KINDS)}")
    if any(option.startswith(_ARCH) for option in extra):
        raise ArgumentError("options must not name an architecture: pass arch=")
    argv = [] if any(option.startswith(_STANDARD) for option in extra) else ["-std=c++17"]
    argv += ["-default-device", "-lineinfo"]
    argv += [f"-arch={arch}", "--ptxas-options=-v"] if kind == "cubin" else [f"-arch={arch.replace('sm_', 'compute_')}"]
    return argv + list(extra)


def _includes(text: str, name: str, argv: Sequence[str]) -> includes.Includes:
    return includes.find(text, name, argv, toolkit.find().include)


def _key(text: str, name: str, argv: Sequence[str], arch: str, read: includes.Includes | None = None) -> str:
    kit = toolkit.find()
    read = read or _includes(text, name, argv)
    parts = (_FORMAT, text, name, *argv, kit.version, kit.include_version, read.digest())
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    readable = re.sub(r"[^A-Za-z0-9_]+", "_", Path(name).stem)[:60].strip("_") or "source"
    return f"{readable}-{arch}-{digest.hexdigest()[:20]}"


def _load(key: str, text: str, name: str, arch: str, kind: str) -> Binary | None:
    found = cache.read_with_meta(key, f".{kind}")
    if found is None:
        return None
    image, meta, path = found
    try:
        fields = json.loads(meta)
        figures = {str(entry): Resources(**row) for entry, row in fields["resources"].items()}
        log = str(fields["log"])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None  # whole, but no entry of this version's
    return Binary(name, arch, kind, key, path, image, text, figures, log)


def _make(key: str, text: str, name: str, arch: str, kind: str, argv: Sequence[str]) -> Binary:
    """Compile and store. Nothing that a signal handler raises meanwhile leaves a compiler or half an entry behind."""
    from cuattn.compile import workers  # not needed when the cache has everything

    try:
        return workers.detached(lambda job: _compile(key, text, name, arch, kind, argv, job))
    except workers.CannotStart:
        return _compile(key, text, name, arch, kind, argv, None)


def _compile(
    key: str, text: str, name: str, arch: str, kind: str, argv: Sequence[str], job: workers.Job | None
) -> Binary:
    from cuattn.compile import diagnose, nvrtc

    kit = toolkit.find()
    if kit.include is None and _CUDA_INCLUDE.search(text):
        raise NVRTCNotFoundError(f"{name} needs the CUDA headers, which were not found: {toolkit.INSTALL_HINT}")
    headers = _system_headers(text, kit.include) if kit.include else {}
    include = [f"-I{kit.include}"] if kit.include else []
    virtual = name if name.startswith("/") else f"/{name}"  # a relative name would pull in the current folder
    for _ in range(_READ_ATTEMPTS):
        result = nvrtc.compile(text, virtual, [*argv, *include], headers, job=job)
        image = result.cubin if kind == "cubin" else result.ptx
        if not result.ok or not image:
            raise diagnose.compile_error(result, text, title=f"{name} for {arch} ({kind})", name=virtual)
        before, key = key, _key(text, name, argv, arch)
        if key == before:
            break
        # A header has changed since its contents entered the key: once more, with what it holds now.
    else:
        key = f"{key}-unsettled"  # somebody writes it all the time: what came of it is looked up by nobody
    figures = resources.parse(result.log)
    binary = Binary(name, arch, kind, key, Path(), image, text, figures, result.log)
    return dataclasses.replace(binary, path=_store(binary))


def _store(binary: Binary) -> Path:
    meta = {
        "name": binary.name,
        "arch": binary.arch,
        "kind": binary.kind,
        "resources": {entry: dataclasses.asdict(row) for entry, row in binary.resources.items()},
        "log": binary.log,
    }
    path = cache.write(binary.key, f".{binary.kind}", binary.image, meta=json.dumps(meta, indent=1).encode())
    cache.write_note(path, ".cu", binary.source)
    return path


def on_disk(binary: Binary) -> Path:
    """Path of a file with the binary's image: stored anew if another process has cleared the cache meanwhile."""
    return binary.path if binary.path.is_file() else _store(binary)


def _system_headers(text: str, include: Path) -> dict[str, bytes]:
    """The CUDA headers that `text` includes, directly or not, each under a virtual absolute path.

    Found through -I alone they would work as well, but the line table would then name the folder they are installed in,
    and the same kernel would differ from machine to machine.
    """
    result: dict[str, bytes] = {}
    pending = [text.encode()]
    while pending:
        for header in _INCLUDE.findall(pending.pop()):
            name = header.decode()
            path = include / name
            if name not in result and path.is_file():
                body = path.read_bytes()
                result[name] = f'#line 1 "/cuda/include/{name}"\n'.encode() + body
                pending.append(body)
    return result
