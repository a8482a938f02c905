"""From a source string to a `Binary`: the cache key, the options, the compilation."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cuattn.compile import arch as archs
from cuattn.compile import cache, resources, toolkit
from cuattn.compile.resources import Resources
from cuattn.errors import ArgumentError, NVRTCNotFoundError

_FORMAT = "1"  # part of every key: raise it when the meaning of a cached entry changes
_KINDS = ("ptx", "cubin")
_INCLUDE = re.compile(rb"^[ \t]*#[ \t]*include[ \t]*[<\"]([^/>\"]+)[>\"]", re.MULTILINE)
_CUDA_INCLUDE = re.compile(r"^[ \t]*#[ \t]*include[ \t]*<cuda_", re.MULTILINE)
_STANDARD = ("-std", "--std")
_ARCH = ("-arch", "--gpu-architecture")
# Options that make the result depend on files whose contents the key does not hold.
_READS_FILES = ("-I", "--include-path", "-include", "--pre-include", "-pch", "--pch", "--use-pch")


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
    key = _key(text, name, argv, arch)
    place = f"{cache.root()}/{key}.{kind}"
    with _guard:
        lock = _locks.setdefault(place, threading.Lock())
    with lock:  # two threads that want one kernel compile it once
        binary = _built.get(place)
        if binary is None:
            # What an option makes the compiler read is not in the key, so the disk may hold a stale version.
            volatile = any(option.startswith(_READS_FILES) for option in options)
            binary = None if volatile else _load(key, text, name, arch, kind)
            if binary is None:
                binary = _make(key, text, name, arch, kind, argv)
            if not volatile:
                _built[place] = binary
    return binary


def forget() -> None:
    """Drop the binaries that this process holds. The disk cache stays."""
    with _guard:
        _built.clear()
        _locks.clear()


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


def _key(text: str, name: str, argv: Sequence[str], arch: str) -> str:
    kit = toolkit.find()
    parts = (_FORMAT, text, name, *argv, kit.version, kit.include_version)
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
    fields = json.loads(meta)
    figures = {entry: Resources(**row) for entry, row in fields["resources"].items()}
    return Binary(name, arch, kind, key, path, image, text, figures, fields["log"])


def _make(key: str, text: str, name: str, arch: str, kind: str, argv: Sequence[str]) -> Binary:
    from cuattn.compile import diagnose, nvrtc  # not needed when the cache has everything

    kit = toolkit.find()
    if kit.include is None and _CUDA_INCLUDE.search(text):
        raise NVRTCNotFoundError(f"{name} needs the CUDA headers, which were not found: {toolkit.INSTALL_HINT}")
    headers = _system_headers(text, kit.include) if kit.include else {}
    include = [f"-I{kit.include}"] if kit.include else []
    virtual = name if name.startswith("/") else f"/{name}"  # a relative name would pull in the current folder
    result = nvrtc.library().compile(text, virtual, [*argv, *include], headers)
    image = result.cubin if kind == "cubin" else result.ptx
    if not result.ok or not image:
        raise diagnose.compile_error(result, text, title=f"{name} for {arch} ({kind})", name=virtual)
    figures = resources.parse(result.log)
    meta = {
        "name": name,
        "arch": arch,
        "kind": kind,
        "nvrtc": kit.version,
        "headers": kit.include_version,
        "options": list(argv),
        "resources": {entry: dataclasses.asdict(row) for entry, row in figures.items()},
        "log": result.log,
    }
    path = cache.write(key, f".{kind}", image, meta=json.dumps(meta, indent=1).encode())
    cache.write_note(path, ".cu", text)
    return Binary(name, arch, kind, key, path, image, text, figures, result.log)


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
