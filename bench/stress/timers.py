"""An exception for a call that takes too long, in any thread."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def raise_after(seconds: float, kind: type[Exception]) -> Iterator[None]:
    """Raise ``kind`` in this thread if the block is not over in time."""
    thread, over, lock = threading.get_ident(), False, threading.Lock()

    def expire() -> None:
        with lock:
            if not over:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(kind))

    timer = threading.Timer(seconds, expire)
    timer.start()
    try:
        yield
    finally:
        with lock:
            over = True
        timer.cancel()
