"""The disk cache: files found by a name that contains a hash of everything they were made from.

An entry is ``<key><suffix>`` and beside it ``<key><suffix>.meta``, whose first line is a SHA-256 over the rest of the
meta file and the data. Both are written under a temporary name and moved into place, the meta file last, so a reader
sees an entry whole or not at all. Nothing is locked: two processes that build the same entry write the same bytes.

Code is loaded from here, so the directory must belong to the user and must not be writable by everybody.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

from cuattn import environment
from cuattn.errors import ArgumentError, CacheError, CacheWarning

_MAGIC = "cuattn-cache-1"
_META = ".meta"
_TEMPORARY = ".cuattn-tmp-"

# Where this process writes once the real directory has turned out not to be writable.
_fallback: Path | None = None
_fallback_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class Entry:
    """One cached file: its name, size in bytes (all its files together) and time of last change (seconds, Unix)."""

    name: str
    path: Path
    size_bytes: int
    modified: float


def root() -> Path:
    """The cache directory: exists, belongs to the user, is not writable by everybody.

    When it cannot be created, the process falls back to a temporary directory of its own and warns once.

    Raises
    ------
    CacheError
        The path is no directory, belongs to someone else, or anyone may write to it.
    """
    path = environment.cache_dir()
    try:
        status = path.stat()
    except FileNotFoundError:
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            return _fall_back(path, error)
        status = path.stat()
    except NotADirectoryError as error:
        raise CacheError(f"cache directory {path}: a part of the path is a file") from error
    except OSError as error:
        return _fall_back(path, error)
    _require_private(path, status)
    return path


def _require_private(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISDIR(status.st_mode):
        raise CacheError(f"cache directory {path} is not a directory")
    if not hasattr(os, "getuid"):  # no POSIX owners here; the profile directory is private by default
        return
    if status.st_uid != os.getuid():
        raise CacheError(
            f"cache directory {path} belongs to user {status.st_uid}, not to you ({os.getuid()}): compiled code is "
            "loaded only from a directory of your own; set CUATTN_CACHE_DIR to one"
        )
    if status.st_mode & stat.S_IWOTH:
        raise CacheError(
            f"cache directory {path} is writable by everybody, so anyone could place code in it: "
            "run chmod o-w on it, or set CUATTN_CACHE_DIR to another directory"
        )


def _fall_back(path: Path, error: OSError) -> Path:
    global _fallback
    with _fallback_lock:
        if _fallback is not None:
            return _fallback
        import atexit  # these only when needed: reading from the cache is on the way of every start
        import shutil
        import tempfile

        try:
            _fallback = Path(tempfile.mkdtemp(prefix="cuattn-"))
        except OSError as second:
            raise CacheError(f"neither {path} nor a temporary directory can be written: {error}; {second}") from second
        atexit.register(shutil.rmtree, _fallback, ignore_errors=True)
        warnings.warn(
            f"cannot write to the cache directory {path} ({error.strerror or error}): compiled kernels are kept for "
            "this process only; set CUATTN_CACHE_DIR to a directory that you can write",
            CacheWarning,
            stacklevel=4,
        )
    return _fallback


def read(key: str, suffix: str) -> bytes | None:
    """The cached data, or None when there is none. A damaged entry warns and counts as none."""
    entry = read_with_meta(key, suffix)
    return None if entry is None else entry[0]


def read_with_meta(key: str, suffix: str) -> tuple[bytes, bytes, Path] | None:
    """Like `read`: the data, the meta bytes that `write` was given, and the path of the data file."""
    directory = root()
    for place in dict.fromkeys((directory, _fallback)):
        if place is None:
            continue
        path = place / _file_name(key, suffix)
        try:
            return _load(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            warnings.warn(f"cache entry {path} is damaged ({error}); it is made anew", CacheWarning, stacklevel=3)
    return None


def _load(path: Path) -> tuple[bytes, bytes, Path]:
    for attempt in range(2):
        head, _, meta = path.with_name(path.name + _META).read_bytes().partition(b"\n")
        data = path.read_bytes()
        if head == _head(data, meta):
            return data, meta, path
        if attempt == 0:
            time.sleep(0.02)  # a writer may be between its two moves; that takes microseconds
    raise OSError("wrong checksum")


def _head(data: bytes, meta: bytes) -> bytes:
    digest = hashlib.sha256(len(meta).to_bytes(8, "little") + meta + data).hexdigest()
    return f"{_MAGIC} {digest}".encode()


def write(key: str, suffix: str, data: bytes, *, meta: bytes = b"") -> Path:
    """Store `data` and return its path. Falls back to a temporary directory, with a warning, where writing fails.

    Raises
    ------
    CacheError
        The cache directory is not safe to use, or not even a temporary directory can be written.
    """
    name = _file_name(key, suffix)
    directory = root()
    try:
        return _write_in(directory, name, data, meta)
    except OSError as error:
        fallback = _fall_back(directory, error)
    try:
        return _write_in(fallback, name, data, meta)
    except OSError as error:
        raise CacheError(f"neither {directory} nor {fallback} can be written: {error}") from error


def write_note(entry: Path, suffix: str, text: str) -> None:
    """Put a text beside the entry that `write` returned, for people to read. It is never read back.

    Failing to write it is no error.
    """
    with contextlib.suppress(OSError):
        _replace(entry.with_suffix(suffix), text.encode())


def _write_in(directory: Path, name: str, data: bytes, meta: bytes) -> Path:
    path = directory / name
    _replace(path, data)
    _replace(path.with_name(name + _META), _head(data, meta) + b"\n" + meta)
    return path


def _replace(path: Path, data: bytes) -> None:
    import tempfile

    handle, temporary = tempfile.mkstemp(prefix=_TEMPORARY, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _file_name(key: str, suffix: str) -> str:
    name = key + suffix
    if not name or name != os.path.basename(name) or name.startswith("."):
        raise ArgumentError(f"cache key {key!r} with suffix {suffix!r} is not a plain file name")
    return name


def ls() -> list[Entry]:
    """The entries of the cache, newest first. Entries that vanish meanwhile are left out."""
    entries = []
    for meta_path in root().glob(f"*{_META}"):
        path = meta_path.with_name(meta_path.name.removesuffix(_META))
        try:
            if not meta_path.read_bytes().startswith(_MAGIC.encode()):
                continue
            status, meta_status = path.stat(), meta_path.stat()
        except FileNotFoundError:
            continue
        entries.append(Entry(path.name, path, status.st_size + meta_status.st_size, status.st_mtime))
    return sorted(entries, key=lambda entry: (-entry.modified, entry.name))


def size_bytes() -> int:
    """Bytes that the entries take."""
    return sum(entry.size_bytes for entry in ls())


def clear() -> int:
    """Delete every entry and every left-over temporary file; returns the number of entries deleted.

    Files that are not this cache's stay, so pointing ``CUATTN_CACHE_DIR`` at a directory with other things is safe.
    """
    entries = ls()
    for entry in entries:
        # The meta file goes first: data without it is no entry, so no reader ever finds half of one.
        for path in (entry.path.with_name(entry.name + _META), entry.path, entry.path.with_suffix(".cu")):
            path.unlink(missing_ok=True)
    for path in root().glob(f"{_TEMPORARY}*"):
        path.unlink(missing_ok=True)
    return len(entries)
