"""Memory on the host that a call asks for, refused where the machine has not got it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np

from cuattn.errors import OutOfMemoryError

__all__ = ["allocating", "new_bytes"]

_ALWAYS_TRIED = 2**28


@contextmanager
def allocating(what: str, nbytes: int) -> Iterator[None]:
    """Turn a failure to allocate ``nbytes`` for ``what`` into `OutOfMemoryError`.

    More than the machine has is not even tried: a system that promises memory it has not got would end the process when
    it is written, long after the call. Memory of a device does not count: ``nbytes`` is 0 then.
    """
    if nbytes > _machine_bytes():
        raise OutOfMemoryError(f"{what} takes {nbytes} bytes; this machine has {_machine_bytes()}")
    try:
        yield
    except MemoryError as error:
        raise OutOfMemoryError(f"{what} takes {nbytes} bytes, which cannot be allocated: {error}") from error


def new_bytes(what: str, shape: tuple[int, ...], nbytes: int) -> np.ndarray:
    """New bytes that nothing has written, ``nbytes`` for ``what`` of a shape. Raises `OutOfMemoryError`."""
    if nbytes < _ALWAYS_TRIED:  # without the cost of a message
        try:
            return np.empty(nbytes, np.uint8)
        except MemoryError:
            pass
    with allocating(f"{what} of shape {list(shape)}", nbytes):
        return np.empty(nbytes, np.uint8)


@cache
def _machine_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
