"""Arrays of other libraries on a GPU, kept alive until the kernels that read them are done.

A CuPy array over the memory of another library gives that memory back when it is collected: at the end of a call,
while the kernel may have yet to begin on CuPy's stream. Its library knows nothing of that stream, and may hand the
memory to somebody else. So what a call has imported is held until an event behind its launches has happened.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Any


@dataclass
class _Imports:
    """What a thread has imported for its call, and the event behind the latest launch since."""

    arrays: list[Any] = field(default_factory=list)
    event: Any = None


class Held(threading.local):
    """The imports of a thread on one device."""

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self._latest = _Imports()
        self._earlier: deque[_Imports] = deque()

    def add(self, array: Any) -> None:
        """Hold an array that was imported for the launches to come."""
        if self._latest.event is not None:  # there was a launch: this is of another call
            self._earlier.append(self._latest)
            self._latest = _Imports()
        self._release()
        self._latest.arrays.append(array)

    def launched(self) -> None:
        """Note that a kernel was launched on the current stream of the current device, and may read what is held."""
        latest = self._latest
        if not latest.arrays:
            return
        stream = self._cupy.cuda.get_current_stream()
        if stream.is_capturing():  # nothing runs, and what a graph reads its owner keeps alive
            latest.arrays.clear()
            return
        if latest.event is None:
            latest.event = self._cupy.cuda.Event(disable_timing=True)
        latest.event.record(stream)

    def _release(self) -> None:
        """Let go of what has been read."""
        while self._earlier and self._earlier[0].event.done:
            self._earlier.popleft()
