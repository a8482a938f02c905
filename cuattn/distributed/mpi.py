"""Ranks that are processes, with MPI between them: mpi4py."""

from __future__ import annotations

import time
from typing import Any, cast

import numpy as np

from cuattn.distributed.group import DEFAULT_TIMEOUT, Group, Reduction, Transfer
from cuattn.errors import ArgumentError, DistributedError, GroupTimeoutError, MismatchError, PeerError
from cuattn.messages import shown

__all__ = ["MpiGroup"]

_DATA, _COLLECTIVE, _CONTROL, _ABORT = 1, 2, 3, 4  # tags
_FAST_POLLS = 200
_LONGEST_SLEEP = 1e-3


class MpiGroup(Group):
    """A rank that is a process, of an MPI communicator; start the program with ``mpiexec -n 4 python program.py``.

    Making a group takes all ranks of the communicator, which is duplicated: messages of others do not mix with its own.
    Every wait is a loop that asks MPI whether something has come, so a wait ends when another rank fails, and after
    the timeout.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm, optional
        ``MPI.COMM_WORLD`` by default.
    timeout : float
        Seconds that a rank waits for another one.
    cuda_aware : bool
        Whether this MPI takes addresses on a GPU. Otherwise CuPy arrays travel through the host.
    """

    def __init__(self, comm: Any = None, *, timeout: float = DEFAULT_TIMEOUT, cuda_aware: bool = False) -> None:
        try:
            from mpi4py import MPI
        except ImportError as error:
            raise DistributedError(
                f"MpiGroup needs mpi4py and an MPI library: pip install 'cuattn[mpi]' ({error})"
            ) from error
        if comm is not None and not isinstance(comm, MPI.Comm):
            raise ArgumentError(f"comm is {shown(comm)}; an mpi4py communicator is needed")
        self._mpi = MPI
        self._comm = (MPI.COMM_WORLD if comm is None else comm).Dup()
        self._cuda_aware = cuda_aware
        self._unfinished: list[Any] = []  # after a failure, MPI may still write to these
        super().__init__(self._comm.Get_rank(), self._comm.Get_size(), timeout)

    def split(self, color: int, key: int = 0) -> MpiGroup:
        """Return the group of the ranks that give the same ``color``, in the order of ``key``, then of ranks."""
        self._check_usable()
        part = self._comm.Split(color, key)
        try:
            return MpiGroup(part, timeout=self.timeout, cuda_aware=self._cuda_aware)
        finally:
            part.Free()

    def _start(self, send: Any, destination: int, receive: Any, source: int) -> Transfer:
        requests: list[Any] = []
        incoming = outgoing = None
        if receive is not None:
            incoming = self._room(receive)
            requests.append(self._comm.Irecv(self._buffer(incoming), source, _DATA))
        if send is not None:
            outgoing = self._staged(send)
            requests.append(self._comm.Isend(self._buffer(outgoing), destination, _DATA))

        def arrive() -> None:
            what = f"a message to rank {destination}" if receive is None else f"a message of rank {source}"
            statuses = self._finish(requests, what, (outgoing, incoming))
            if receive is not None:
                self._check_size(statuses[0], incoming, source)
                self._unstage(incoming, receive)

        return Transfer(arrive)

    def _all_to_all(self, send: list[Any], receive: list[Any]) -> None:
        outgoing, incoming = [self._staged(x) for x in send], [self._room(x) for x in receive]
        requests = [self._comm.Irecv(self._buffer(x), rank, _COLLECTIVE) for rank, x in enumerate(incoming)]
        requests += [self._comm.Isend(self._buffer(x), rank, _COLLECTIVE) for rank, x in enumerate(outgoing)]
        statuses = self._finish(requests, "the parts of all ranks", (outgoing, incoming))
        for rank, x in enumerate(incoming):
            self._check_size(statuses[rank], x, rank)
            self._unstage(x, receive[rank])

    def _all_gather(self, x: Any) -> Any:
        outgoing = self._staged(x)
        gathered = _module(x).empty((self.size, x.size), np.uint8)
        incoming = self._room(gathered)
        request = self._comm.Iallgather(self._buffer(outgoing), self._buffer(incoming))
        self._finish([request], "the parts of all ranks", (outgoing, incoming))
        self._unstage(incoming, gathered)
        return gathered

    def _all_reduce(self, x: Any, op: Reduction) -> Any:
        outgoing = self._staged(x)
        total = _module(x).empty(x.shape, x.dtype)
        incoming = self._room(total)
        kind = self._mpi.Datatype.fromcode(x.dtype.char)
        request = self._comm.Iallreduce(
            [outgoing, kind], [incoming, kind], self._mpi.SUM if op == "sum" else self._mpi.MAX
        )
        self._finish([request], f"the {op} of all ranks", (outgoing, incoming))
        self._unstage(incoming, total)
        return total

    def _gather_control(self, message: bytes) -> list[bytes]:
        sizes = np.empty(self.size, np.int64)
        size = np.array([len(message)], np.int64)
        self._finish([self._comm.Iallgather(size, sizes)], "the agreement of all ranks", (size, sizes))
        sent = np.zeros(max(1, int(sizes.max())), np.uint8)
        sent[: len(message)] = np.frombuffer(message, np.uint8)
        said = np.empty((self.size, sent.size), np.uint8)
        self._finish([self._comm.Iallgather(sent, said)], "the agreement of all ranks", (sent, said))
        return [said[rank, : sizes[rank]].tobytes() for rank in range(self.size)]

    # --- waiting ----------------------------------------------------------------------------------------------------

    def _finish(self, requests: list[Any], what: str, buffers: Any) -> list[Any]:
        """Wait until all requests are done. Raises `PeerError` or `GroupTimeoutError`."""
        statuses = [self._mpi.Status() for _ in requests]
        deadline, polls, sleep = time.monotonic() + self.timeout, 0, 1e-5
        failure: DistributedError | None = None
        try:
            while not self._mpi.Request.Testall(requests, statuses):
                failure = self._abort_of_a_peer()
                if failure is None and time.monotonic() > deadline:
                    failure = GroupTimeoutError(
                        f"rank {self.rank} of {self.size} has waited {self.timeout:g} s for {what}"
                    )
                if failure is not None:
                    break
                polls += 1
                if polls > _FAST_POLLS:
                    time.sleep(sleep)
                    sleep = min(2 * sleep, _LONGEST_SLEEP)
        except self._mpi.Exception as error:
            if error.Get_error_class() == self._mpi.ERR_TRUNCATE:
                failure = MismatchError(f"rank {self.rank} got more bytes than it expected: {what}")
            else:
                failure = PeerError(f"MPI failed while rank {self.rank} waited for {what}: {error}")
        if failure is not None:
            self._unfinished.append((requests, buffers))
            self._failure = failure
            raise failure
        return statuses

    def _abort_of_a_peer(self) -> PeerError | None:
        status = self._mpi.Status()
        if not self._comm.Iprobe(self._mpi.ANY_SOURCE, _ABORT, status):
            return None
        text = np.empty(status.Get_count(self._mpi.BYTE), np.uint8)
        self._comm.Recv(text, status.Get_source(), _ABORT)
        rank = status.Get_source()
        return PeerError(f"rank {rank} raised {text.tobytes().decode(errors='replace')}", rank=rank)

    def _abort(self, text: str) -> None:
        message = np.frombuffer(text.encode(), np.uint8).copy()
        for rank in range(self.size):
            if rank != self.rank:
                self._unfinished.append((self._comm.Isend(message, rank, _ABORT), message))

    def _check_size(self, status: Any, receive: Any, source: int) -> None:
        count = status.Get_count(self._mpi.BYTE)
        if count != receive.nbytes:
            raise MismatchError(f"send and receive do not fit: rank {source} sent {count} bytes for {receive.nbytes}")

    # --- arrays on a GPU --------------------------------------------------------------------------------------------

    def _buffer(self, x: Any) -> Any:
        return [x, self._mpi.BYTE]

    def _direct(self, x: Any) -> bool:
        return isinstance(x, np.ndarray) or self._cuda_aware

    def _staged(self, x: Any) -> Any:
        """Return what MPI can send: a copy on the host of what lies on a GPU."""
        if isinstance(x, np.ndarray):
            return x
        if not self._cuda_aware:
            return x.get()
        _module(x).cuda.get_current_stream().synchronize()  # MPI knows nothing of streams
        return x

    def _room(self, x: Any) -> Any:
        """Return where MPI can receive what belongs into ``x``."""
        return self._staged(x) if self._direct(x) else np.empty(x.shape, x.dtype)

    def _unstage(self, received: Any, target: Any) -> None:
        if received is not target and not self._direct(target):
            target.set(received)


def _module(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return np
    import cupy

    return cast(Any, cupy)
