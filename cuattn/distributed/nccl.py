"""Ranks that have a GPU each, with NCCL between them: CuPy's binding."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from cuattn.distributed.group import DEFAULT_TIMEOUT, Group, Reduction, Transfer
from cuattn.errors import ArgumentError, GroupTimeoutError, PeerError
from cuattn.messages import shown

__all__ = ["NcclGroup"]

_NEEDED = "rank_id", "size", "send", "recv", "allGather", "allReduce"
_LONGEST_SLEEP = 1e-3


class NcclGroup(Group):
    """A rank with a GPU of its own, of a communicator of `cupy.cuda.nccl`.

    Transfers run on a stream of their own, beside the kernels: it waits for what the current stream has done so far,
    and the current stream waits for it where the result is needed. The host waits nowhere, but in the agreement before
    a call (see ``control``) and in `synchronize`.

    Parameters
    ----------
    communicator : cupy.cuda.nccl.NcclCommunicator
        Made on the device that is current, on which all arrays lie.
    timeout : float
        Seconds that `synchronize` and the agreement wait.
    control : Group, optional
        Through which ranks agree on shapes and options, such as an `MpiGroup` of the same ranks: on the host, with no
        wait for the GPU. Without one, the agreement goes through NCCL, and waits.
    checked : bool
        False: ranks do not agree before a call; so it can be captured in a CUDA graph, and costs the host nothing.
    nccl, xp : module, optional
        `cupy.cuda.nccl` and `cupy`, or what has their interface.
    """

    def __init__(
        self,
        communicator: Any,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        control: Group | None = None,
        checked: bool = True,
        nccl: Any = None,
        xp: Any = None,
    ) -> None:
        missing = [name for name in _NEEDED if not hasattr(communicator, name)]
        if missing:
            raise ArgumentError(f"communicator is {shown(communicator)}; a cupy.cuda.nccl.NcclCommunicator is needed")
        xp = importlib.import_module("cupy") if xp is None else xp
        nccl = importlib.import_module("cupy.cuda.nccl") if nccl is None else nccl
        super().__init__(int(communicator.rank_id()), int(communicator.size()), timeout, checked)
        if control is not None and (control.rank, control.size) != (self.rank, self.size):
            raise ArgumentError(
                f"control is rank {control.rank} of {control.size} and communicator rank {self.rank} of {self.size}"
            )
        self._communicator, self._control, self._nccl, self._xp = communicator, control, nccl, xp
        self._stream = xp.cuda.Stream(non_blocking=True)

    def synchronize(self) -> None:
        """Wait until all that was started has run. Raises `GroupTimeoutError` or `PeerError` if it does not."""
        self._check_usable()
        with self._on_stream() as done:
            pass
        self._wait_for(done)

    # --- transfers --------------------------------------------------------------------------------------------------

    def _start(self, send: Any, destination: int, receive: Any, source: int) -> Transfer:
        with self._on_stream(send, receive) as done, self._grouped():
            if send is not None:
                self._communicator.send(*self._message(send), destination, self._stream.ptr)
            if receive is not None:
                self._communicator.recv(*self._message(receive), source, self._stream.ptr)
        return Transfer(lambda: self._xp.cuda.get_current_stream().wait_event(done[0]))

    def _all_to_all(self, send: list[Any], receive: list[Any]) -> None:
        with self._on_stream(*send, *receive) as done, self._grouped():
            for rank in range(self.size):
                if send[rank].size:
                    self._communicator.send(*self._message(send[rank]), rank, self._stream.ptr)
                if receive[rank].size:
                    self._communicator.recv(*self._message(receive[rank]), rank, self._stream.ptr)
        self._xp.cuda.get_current_stream().wait_event(done[0])

    def _all_gather(self, x: Any) -> Any:
        gathered = self._xp.empty((self.size, x.size), np.uint8)
        with self._on_stream(x, gathered) as done:
            if x.size:
                self._communicator.allGather(
                    self._pointer(x), self._pointer(gathered), x.size, self._byte, self._stream.ptr
                )
        self._xp.cuda.get_current_stream().wait_event(done[0])
        return gathered

    def _all_reduce(self, x: Any, op: Reduction) -> Any:
        total = self._xp.empty(x.shape, x.dtype)
        nccl = self._nccl
        kind = {"float32": nccl.NCCL_FLOAT32, "float64": nccl.NCCL_FLOAT64, "int32": nccl.NCCL_INT32}.get(
            x.dtype.name, nccl.NCCL_INT64
        )
        with self._on_stream(x, total) as done:
            if x.size:
                how = nccl.NCCL_SUM if op == "sum" else nccl.NCCL_MAX
                pointers = self._pointer(x), self._pointer(total)
                self._communicator.allReduce(pointers[0], pointers[1], x.size, kind, how, self._stream.ptr)
        self._xp.cuda.get_current_stream().wait_event(done[0])
        return total

    def _gather_control(self, message: bytes) -> list[bytes]:
        if self._control is not None:
            return self._control._gather_control(message)
        sizes = self._host(self._all_gather(self._device(np.array([len(message)], np.int64).view(np.uint8))))
        lengths = sizes.reshape(-1).view(np.int64)
        padded = np.zeros(max(1, int(lengths.max())), np.uint8)
        padded[: len(message)] = np.frombuffer(message, np.uint8)
        said = self._host(self._all_gather(self._device(padded)))
        return [said[rank, : lengths[rank]].tobytes() for rank in range(self.size)]

    # --- streams and failures ---------------------------------------------------------------------------------------

    @contextmanager
    def _on_stream(self, *arrays: Any) -> Iterator[list[Any]]:
        """Let the group's stream follow the current one; the list then holds the event at the end of the block."""
        ready = self._event()
        done: list[Any] = []
        ready.record(self._xp.cuda.get_current_stream())
        self._stream.wait_event(ready)
        try:
            yield done
        except Exception as error:
            self.abort(error)
            raise PeerError(f"NCCL failed on rank {self.rank}: {error}", rank=self.rank) from error
        done.append(self._event())
        done[0].record(self._stream)

    def _event(self) -> Any:
        return self._xp.cuda.Event(disable_timing=True)

    @contextmanager
    def _grouped(self) -> Iterator[None]:
        self._nccl.groupStart()
        try:
            yield
        finally:
            self._nccl.groupEnd()

    @property
    def _byte(self) -> int:
        return int(self._nccl.NCCL_UINT8)

    def _message(self, x: Any) -> tuple[int, int, int]:
        return self._pointer(x), x.size, self._byte

    def _pointer(self, x: Any) -> int:
        return int(x.data.ptr)

    def _device(self, x: Any) -> Any:
        return self._xp.asarray(x)

    def _host(self, x: Any) -> Any:
        ended = self._event()
        ended.record(self._xp.cuda.get_current_stream())
        self._wait_for([ended])
        return self._xp.asnumpy(x)

    def _wait_for(self, events: list[Any]) -> None:
        """Wait on the host for an event, as long as the communicator is well. Raises like `synchronize`."""
        deadline, sleep = time.monotonic() + self.timeout, 1e-5
        check: Callable[[], None] = getattr(self._communicator, "check_async_error", lambda: None)
        failure: PeerError | GroupTimeoutError | None = None
        while not events[0].done:
            try:
                check()
            except Exception as error:
                failure = PeerError(f"NCCL reports to rank {self.rank}: {error}")
            if failure is None and time.monotonic() > deadline:
                failure = GroupTimeoutError(f"rank {self.rank} of {self.size} has waited {self.timeout:g} s for NCCL")
            if failure is not None:
                self._failure = failure
                self._abort(str(failure))
                raise failure
            time.sleep(sleep)
            sleep = min(2 * sleep, _LONGEST_SLEEP)

    def _abort(self, text: str) -> None:
        if self._control is not None:
            self._control.abort(RuntimeError(text))
        abort: Callable[[], None] | None = getattr(self._communicator, "abort", None)
        if abort is not None:
            abort()
