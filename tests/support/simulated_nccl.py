"""What `NcclGroup` uses of CuPy, on the host and as late as it may be.

Operations on a communicator's stream wait in a queue until somebody waits for an event behind them: so what is sent is
read at the last moment, and what is received is not there a moment too early. Pointers are those of NumPy arrays.
"""

from __future__ import annotations

import ctypes
import queue
from collections import defaultdict
from types import SimpleNamespace
from typing import ClassVar

import numpy as np

from cuattn.distributed import NcclGroup

__all__ = ["HostNcclGroup", "Wires", "nccl", "world"]

DTYPES = {"NCCL_UINT8": np.uint8, "NCCL_FLOAT32": np.float32, "NCCL_FLOAT64": np.float64}
DTYPES |= {"NCCL_INT32": np.int32, "NCCL_INT64": np.int64}
CODES = {name: code for code, name in enumerate(DTYPES)}
_WAIT = 20.0  # seconds, of a rank for another one


class Stream:
    """A queue of what is to be done; the stream of kernels, which run at once, has nothing in it."""

    by_ptr: ClassVar[dict[int, Stream]] = {}

    def __init__(self, non_blocking=False):
        assert non_blocking
        self.queue, self.done = [], 0
        self.ptr = id(self)
        Stream.by_ptr[self.ptr] = self

    def run(self, position):
        while self.done < position:
            self.done += 1
            self.queue[self.done - 1]()

    def wait_event(self, event):
        """The stream of kernels needs what is behind the event now; the other one only asks for kernels."""
        if event.stream is not self:
            event.stream.run(event.position)


class Event:
    def __init__(self, disable_timing=False):
        assert disable_timing

    def record(self, stream):
        self.stream, self.position = stream, len(stream.queue)

    @property
    def done(self):
        self.stream.run(self.position)
        return True


def _array(ptr, count, code):
    dtype = np.dtype(list(DTYPES.values())[code])
    return np.frombuffer((ctypes.c_char * (count * dtype.itemsize)).from_address(ptr), dtype)


class Wires:
    """What connects the communicators of a group."""

    def __init__(self, size):
        self.size = size
        self.boxes = defaultdict(queue.Queue)


class Communicator:
    """The interface of `cupy.cuda.nccl.NcclCommunicator`."""

    def __init__(self, wires, rank):
        self.wires, self.rank, self.aborted, self.error = wires, rank, False, None

    def rank_id(self):
        return self.rank

    def size(self):
        return self.wires.size

    def check_async_error(self):
        if self.error is not None:
            raise self.error

    def abort(self):
        self.aborted = True

    def _put(self, kind, x, other):
        self.wires.boxes[kind, self.rank, other].put(x.copy())

    def _get(self, kind, other):
        return self.wires.boxes[kind, other, self.rank].get(timeout=_WAIT)

    def send(self, ptr, count, code, peer, stream):
        Stream.by_ptr[stream].queue.append(lambda: self._put("p", _array(ptr, count, code), peer))

    def recv(self, ptr, count, code, peer, stream):
        def receive():
            _array(ptr, count, code)[:] = self._get("p", peer)

        Stream.by_ptr[stream].queue.append(receive)

    def _everybody(self, x):
        for other in range(self.wires.size):
            self._put("all", x, other)
        return np.stack([self._get("all", other) for other in range(self.wires.size)])

    def allGather(self, ptr, target, count, code, stream):
        def gather():
            _array(target, count * self.wires.size, code)[:] = self._everybody(_array(ptr, count, code)).ravel()

        Stream.by_ptr[stream].queue.append(gather)

    def allReduce(self, ptr, target, count, code, op, stream):
        def reduce():
            parts = self._everybody(_array(ptr, count, code))
            _array(target, count, code)[:] = (parts.sum if op == nccl.NCCL_SUM else parts.max)(axis=0)

        Stream.by_ptr[stream].queue.append(reduce)


nccl = SimpleNamespace(**CODES, NCCL_SUM=0, NCCL_MAX=2, groupStart=lambda: None, groupEnd=lambda: None)


class HostNcclGroup(NcclGroup):
    """`NcclGroup` for NumPy arrays."""

    def _pointer(self, x):
        return x.ctypes.data


def world(wires, rank, **keywords):
    """The group of a rank, for the thread that calls this."""
    kernels = Stream(non_blocking=True)
    cuda = SimpleNamespace(Stream=Stream, Event=Event, get_current_stream=lambda: kernels)
    xp = SimpleNamespace(cuda=cuda, empty=np.empty, asarray=np.asarray, asnumpy=np.asarray)
    return HostNcclGroup(Communicator(wires, rank), nccl=nccl, xp=xp, **keywords)
