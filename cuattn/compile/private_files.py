"""Reading files that code is loaded from, only where nobody else could have written them.

A folder or file is *private* when it belongs to this user or to the superuser and neither its group nor others may
write to it. That is looked at on the open descriptor, so what is read is what was looked at. No link is followed in the
last part of a path, nothing but a regular file is read, and a FIFO is not waited for.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

MAX_BYTES = 1 << 30  # of one file: far above what a compiler writes

# Not every platform has these; where there are no owners (Windows), the user's profile is private by itself.
_FOLDER_FLAGS = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)
_FILE_FLAGS = os.O_RDONLY
for _name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):
    _FILE_FLAGS |= getattr(os, _name, 0)


class NotPrivateError(OSError):
    """Somebody else could have written this. The message says who, and how to mend it."""


def why_not_private(path: Path, status: os.stat_result) -> str | None:
    """Why code must not be loaded from what has this status; None when it may be."""
    if not hasattr(os, "geteuid"):
        return None
    if status.st_uid not in (os.geteuid(), 0):
        return f"it belongs to user {status.st_uid}, not to you ({os.geteuid()})"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        who = "everybody" if status.st_mode & stat.S_IWOTH else "its group"
        return f"{who} may write to it, and so place code in it: run chmod go-w {path}"
    return None


def read(folder: Path, name: str) -> bytes:
    """Contents of a private file in a private folder.

    Raises
    ------
    NotPrivateError
        The file or the folder is not private.
    OSError
        There is no such file, it is not a regular one, it is too large, or it cannot be read.
    """
    folder_fd = os.open(folder, _FOLDER_FLAGS)
    try:
        _require_private(folder, os.fstat(folder_fd))
        descriptor = os.open(name, _FILE_FLAGS, dir_fd=folder_fd)
    finally:
        os.close(folder_fd)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        _require_private(folder / name, status)
        if status.st_size > MAX_BYTES:
            raise OSError(errno.EFBIG, f"it has {status.st_size} bytes")
        with open(descriptor, "rb", buffering=0, closefd=False) as file:
            return file.readall()
    finally:
        os.close(descriptor)


def _require_private(path: Path, status: os.stat_result) -> None:
    reason = why_not_private(path, status)
    if reason is not None:
        raise NotPrivateError(errno.EPERM, reason)
