"""The disk cache: files found by a name that contains a hash of everything they were made from.

An entry is ``<key><suffix>`` and beside it ``<key><suffix>.meta``, whose first line is a SHA-256 over the name, the
rest of the meta file and the data. Both are written under a temporary name and moved into place, the meta file last, so
a reader sees an entry whole or not at all. Nothing is locked: two processes that build the same entry write the same
bytes, and any file may vanish at any moment.

Code is loaded from here. Trusted is what only this user, or the superuser, could have written: the folder and each file
belong to one of them, and nobody else may write to them (`cuattn.compile.private_files`). The hash is no signature; it
finds damage. Whoever can write as this user can run code as this user anyway.
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
from cuattn.compile import private_files
from cuattn.errors import ArgumentError, CacheError, CacheWarning, EnvironmentVariableError

_FAMILY = b"cuattn-cache-"  # how the meta files of every version begin
_MAGIC = "cuattn-cache-2"
_META = ".meta"
_WRITE_ATTEMPTS = 3
_TEMPORARY = ".cuattn-tmp-"

# Where this process writes once the real directory has turned out not to be usable.
_fallback: Path | None = None
_fallback_lock = threading.Lock()
_warned: set[Path] = set()


@dataclass(frozen=True, slots=True)
class Entry:
    """One cached file: its name, size in bytes (all its files together) and time of last change (seconds, Unix)."""

    name: str
    path: Path
    size_bytes: int
    modified: float


def root() -> Path:
    """The cache directory. It exists, and nobody but this user and the superuser may write to it.

    When there is no such directory, the process falls back to a temporary one and warns once: of the user where no
    directory was asked for, of its own where it was.

    Raises
    ------
    CacheError
        There is no usable directory, and no temporary one can be made.
    EnvironmentVariableError
        ``CUATTN_CACHE_DIR`` is set to something that is no path.
    """
    try:
        path = environment.cache_dir()
    except EnvironmentVariableError:
        if os.environ.get("CUATTN_CACHE_DIR"):
            raise
        return _fall_back(Path("~/.cache/cuattn"), "there is no home directory")
    reason = _why_not_usable(path)
    return path if reason is None else _fall_back(path, reason)


def _why_not_usable(path: Path) -> str | None:
    """Why a directory, made if need be, cannot be the cache; None when it can."""
    try:
        try:
            status = path.stat()
        except FileNotFoundError:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = path.stat()
    except OSError as error:
        return error.strerror or str(error)
    if not stat.S_ISDIR(status.st_mode):
        return "it is not a directory"
    return private_files.why_not_private(path, status)


def require_usable() -> Path:
    """Do as `root`, for those who look after the cache: one that was asked for and cannot be used is an error.

    Raises
    ------
    CacheError, EnvironmentVariableError
    """
    if os.environ.get("CUATTN_CACHE_DIR"):
        path = environment.cache_dir()
        reason = _why_not_usable(path)
        if reason is not None:
            raise CacheError(f"cache directory {path} cannot be used: {reason}")
    return root()


def _fall_back(path: Path, reason: str) -> Path:
    global _fallback
    with _fallback_lock:
        if _fallback is None or not _fallback.is_dir():  # cleaners of temporary folders exist
            try:
                _fallback = _users_temporary_folder() or _own_temporary_folder()
            except OSError as second:
                raise CacheError(
                    f"neither {path} ({reason}) nor a temporary directory can be used as the cache: {second}"
                ) from second
        found = _fallback
        is_known = path in _warned
        _warned.add(path)
    if not is_known:
        warnings.warn(
            f"the cache directory {path} cannot be used ({reason}): compiled kernels are kept in {found}, "
            f"{'for this process only' if found.name != _users_name() else 'a temporary folder'}; "
            "set CUATTN_CACHE_DIR to a directory that you, and nobody else, can write",
            CacheWarning,
            stacklevel=4,
        )
    return found


def _users_name() -> str:
    return f"cuattn-{os.geteuid()}" if hasattr(os, "geteuid") else ""


def _users_temporary_folder() -> Path | None:
    """A folder for users without a home, such as those of services: else each start would compile everything anew."""
    import tempfile  # only when needed: reading from the cache is on the way of every start

    if os.environ.get("CUATTN_CACHE_DIR") or not _users_name():
        return None
    path = Path(tempfile.gettempdir(), _users_name())
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        status = path.lstat()
    except OSError:
        return None
    # Anybody may have made it before: a link, or a folder that is not this user's, is left alone.
    is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    return path if is_own and private_files.why_not_private(path, status) is None else None


def _own_temporary_folder() -> Path:
    import atexit
    import shutil
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="cuattn-"))
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # not in the children of a fork, which use it as well
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def read(key: str, suffix: str) -> bytes | None:
    """Read cached data; None when there is none. A damaged entry warns and counts as none."""
    entry = read_with_meta(key, suffix)
    return None if entry is None else entry[0]


def read_with_meta(key: str, suffix: str) -> tuple[bytes, bytes, Path] | None:
    """Read, like `read`, the data, the meta bytes that `write` was given, and the path of the data file."""
    directory = root()
    name = _file_name(key, suffix)
    for place in dict.fromkeys((directory, _fallback)):
        if place is None:
            continue
        try:
            return _load(place, name)
        except FileNotFoundError:
            continue
        except private_files.NotPrivateError as error:
            _warn_of(place / name, f"is not used: {error.strerror}")
        except (OSError, MemoryError) as error:
            _warn_of(place / name, f"is damaged ({error})")
    return None


def _warn_of(path: Path, what: str) -> None:
    warnings.warn(f"cache entry {path} {what}; it is made anew", CacheWarning, stacklevel=4)


def _load(folder: Path, name: str) -> tuple[bytes, bytes, Path]:
    for attempt in range(2):
        head, _, meta = private_files.read(folder, name + _META).partition(b"\n")
        data = private_files.read(folder, name)
        if head == _head(name, data, meta):
            return data, meta, folder / name
        if attempt == 0:
            time.sleep(0.02)  # a writer may be between its two moves; that takes microseconds
    raise OSError("wrong checksum")


def _head(name: str, data: bytes, meta: bytes) -> bytes:
    digest = hashlib.sha256()
    for part in (name.encode(), meta):
        digest.update(len(part).to_bytes(8, "little") + part)
    digest.update(data)
    return f"{_MAGIC} {digest.hexdigest()}".encode()


def write(key: str, suffix: str, data: bytes, *, meta: bytes = b"") -> Path:
    """Store `data` and return its path. Falls back to a temporary directory, with a warning, where writing fails.

    Raises
    ------
    CacheError
        Not even a temporary directory can be written.
    """
    name = _file_name(key, suffix)
    for _ in range(_WRITE_ATTEMPTS):
        directory = root()
        try:
            return _write_in(directory, name, data, meta)
        except FileNotFoundError as error:  # another process has cleared the cache, or removed it
            problem: OSError = error
        except OSError as error:
            problem = error
            break
    fallback = _fall_back(directory, problem.strerror or str(problem))
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
    _replace(path.with_name(name + _META), _head(name, data, meta) + b"\n" + meta)
    return path


def _replace(path: Path, data: bytes) -> None:
    import tempfile

    handle, temporary = tempfile.mkstemp(prefix=_TEMPORARY, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        try:
            os.replace(temporary, path)
        except IsADirectoryError:
            os.rmdir(path)  # an empty one is nobody's loss
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _file_name(key: str, suffix: str) -> str:
    name = key + suffix
    if not name or name != os.path.basename(name) or name.startswith("."):
        raise ArgumentError(f"cache key {key!r} with suffix {suffix!r} is not a plain file name")
    return name


def ls() -> list[Entry]:
    """The entries of the cache, newest first, but for those that vanish meanwhile. Raises as `require_usable`."""
    entries = []
    folder = require_usable()
    for meta_path in folder.glob(f"*{_META}"):
        path = meta_path.with_name(meta_path.name.removesuffix(_META))
        try:
            if not private_files.read(folder, meta_path.name).startswith(_FAMILY):
                continue
            status, meta_status = path.lstat(), meta_path.lstat()
        except OSError:  # gone meanwhile, or no file of this cache
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
        _delete(entry)
    for path in root().glob(f"{_TEMPORARY}*"):
        with contextlib.suppress(OSError):
            path.unlink()
    return len(entries)


def prune(*, max_bytes: int | None = None, older_than_s: float | None = None, dry_run: bool = False) -> list[Entry]:
    """Delete old entries and return them, the oldest first; with ``dry_run`` only say which.

    Parameters
    ----------
    max_bytes : int, optional
        Entries go, the oldest first, until the others take no more than this.
    older_than_s : float, optional
        Entries that were made more than so many seconds ago go.

    Raises
    ------
    ArgumentError
        A limit is negative.
    CacheError, EnvironmentVariableError
        As `require_usable`.
    """
    for name, limit in (("max_bytes", max_bytes), ("older_than_s", older_than_s)):
        if limit is not None and not limit >= 0:
            raise ArgumentError(f"{name} is {limit}; a number from 0 on is allowed")
    entries = ls()[::-1]
    total = sum(entry.size_bytes for entry in entries)
    now, gone = time.time(), []
    for entry in entries:
        too_old = older_than_s is not None and now - entry.modified > older_than_s
        too_much = max_bytes is not None and total > max_bytes
        if too_old or too_much:
            total -= entry.size_bytes
            gone.append(entry)
            if not dry_run:
                _delete(entry)
    return gone


def _delete(entry: Entry) -> None:
    # The meta file goes first: data without it is no entry, so no reader ever finds half of one.
    for path in (entry.path.with_name(entry.name + _META), entry.path, entry.path.with_suffix(".cu")):
        with contextlib.suppress(OSError):  # gone already, or a folder that has taken its place
            path.unlink()
