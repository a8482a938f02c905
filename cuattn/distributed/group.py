"""What a group of ranks can do: the operations that everything else in this package is made of.

Arrays are of the kind that the group is made for, contiguous; they travel as bytes, so any dtype does, but where
numbers are added or compared.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from cuattn.distributed.traffic import Traffic
from cuattn.errors import ArgumentError, ArrayTypeError, DistributedError, DTypeError, PeerError
from cuattn.messages import shown
from cuattn.scalars import choice, integer, real

__all__ = ["DEFAULT_TIMEOUT", "Group", "Transfer", "as_bytes", "check_group", "describe"]

#: Seconds that a rank waits for another one.
DEFAULT_TIMEOUT = 300.0

Reduction = Literal["sum", "max"]


class Transfer:
    """A transfer that is under way. What is sent must not change, and what is received not be read, before `wait`."""

    def __init__(self, wait: Callable[[], None] | None = None) -> None:
        self._wait = wait

    def wait(self) -> None:
        """Wait until both sides are done; of arrays on a GPU, let the current stream wait."""
        if self._wait is not None:
            wait, self._wait = self._wait, None
            wait()


class Group(ABC):
    """Ranks that work on one problem: `ThreadGroup`, `MpiGroup` or `NcclGroup`.

    Every rank makes the same calls in the same order. A rank that raises in one of them makes all others raise
    `PeerError`; one that does not come makes them raise `GroupTimeoutError` after ``timeout`` seconds. After either,
    the group is of no use any more.

    Attributes
    ----------
    rank : int
        Of this process or thread, from 0.
    size : int
    timeout : float
        Seconds that a rank waits for another one.
    traffic : Traffic
        Bytes that this rank has sent.
    checked : bool
        Whether ranks agree on shapes and options before each call; what is graph-captured on a GPU cannot.
    """

    def __init__(self, rank: int, size: int, timeout: float, checked: bool = True) -> None:
        self.rank, self.size = rank, size
        self.timeout = real("timeout", timeout, "a positive number of seconds is needed", lambda x: x > 0)
        self.checked = checked
        self.traffic = Traffic()
        self._failure: DistributedError | None = None

    # --- collectives ------------------------------------------------------------------------------------------------

    def start_send_recv(self, send: Any, destination: int | None, receive: Any, source: int | None) -> Transfer:
        """Put a transfer on its way: ``send`` to one rank, ``receive`` from one; the transfer is to be waited for.

        Either may be None, and its rank too: then there is only the other. Transfers between two ranks arrive in the
        order in which they were started.
        """
        self._check_usable()
        outgoing = incoming = None
        if send is not None:
            destination = integer("destination", destination, 0, self.size - 1)
            outgoing = as_bytes("send", send)
        if receive is not None:
            source = integer("source", source, 0, self.size - 1)
            incoming = as_bytes("receive", receive, written=True)
        if outgoing is not None and destination != self.rank:
            self.traffic.count("send_recv", outgoing.nbytes)
        return self._start(outgoing, destination or 0, incoming, source or 0)

    def send_recv(self, send: Any, destination: int | None, receive: Any, source: int | None) -> Any:
        """Send an array to one rank and receive one from another, or one of the two; returns ``receive``."""
        self.start_send_recv(send, destination, receive, source).wait()
        return receive

    def all_to_all(self, send: Sequence[Any], receive: Sequence[Any]) -> None:
        """Send ``send[r]`` to each rank r, and receive ``receive[r]`` from it. The sizes may differ."""
        self._check_usable()
        for name, x in (("send", send), ("receive", receive)):
            if not isinstance(x, list | tuple) or len(x) != self.size:
                raise ArgumentError(f"{name} is {shown(x)}; a list of {self.size} arrays is needed, one for each rank")
        outgoing = [as_bytes("send", x) for x in send]
        incoming = [as_bytes("receive", x, written=True) for x in receive]
        self.traffic.count("all_to_all", sum(x.nbytes for rank, x in enumerate(outgoing) if rank != self.rank))
        self._all_to_all(outgoing, incoming)

    def all_gather(self, x: Any) -> Any:
        """Return the arrays of all ranks, which have one shape and dtype, along a new first axis."""
        self._check_usable()
        sent = as_bytes("x", x)
        self.traffic.count("all_gather", (self.size - 1) * sent.nbytes)
        gathered = self._all_gather(sent)
        return gathered.reshape(-1).view(x.dtype).reshape(self.size, *x.shape)

    def all_reduce(self, x: Any, op: Reduction = "sum") -> Any:
        """Return the element-wise sum or maximum of the arrays of all ranks: the same bits on every rank."""
        self._check_usable()
        choice("op", op, ("sum", "max"))
        _check_array("x", x)
        if x.dtype.name not in ("float32", "float64", "int32", "int64"):
            raise DTypeError(f"x has dtype {x.dtype}; float32, float64, int32 and int64 can be reduced")
        as_bytes("x", x)
        self.traffic.count("all_reduce", Fraction(2 * (self.size - 1) * x.nbytes, self.size))
        return self._all_reduce(x, op)

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        self._check_usable()
        self._gather_control(b"")

    # --- failures ---------------------------------------------------------------------------------------------------

    def abort(self, error: BaseException) -> None:
        """Tell all ranks that this one cannot go on: those that wait for it, now or later, raise `PeerError`."""
        if self._failure is None:
            self._failure = PeerError(f"rank {self.rank} raised {describe(error)}", rank=self.rank)
            self._abort(describe(error))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Block in which an exception of one rank is one of all."""
        try:
            yield
        except BaseException as error:
            self.abort(error)
            raise

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise PeerError(f"the group has failed: {self._failure}", rank=getattr(self._failure, "rank", -1))

    # --- what kinds of groups differ in -----------------------------------------------------------------------------

    def gather_control(self, message: bytes) -> list[bytes]:
        """Return what every rank says, short messages of any length that are counted apart from the data."""
        self._check_usable()
        self.traffic.control_bytes += (self.size - 1) * len(message)
        return self._gather_control(message)

    @abstractmethod
    def _start(self, send: Any, destination: int, receive: Any, source: int) -> Transfer: ...

    @abstractmethod
    def _all_to_all(self, send: list[Any], receive: list[Any]) -> None: ...

    @abstractmethod
    def _all_gather(self, x: Any) -> Any:
        """Return the bytes of all ranks, [size, bytes]."""

    @abstractmethod
    def _all_reduce(self, x: Any, op: Reduction) -> Any: ...

    @abstractmethod
    def _gather_control(self, message: bytes) -> list[bytes]: ...

    @abstractmethod
    def _abort(self, text: str) -> None: ...


def describe(error: BaseException) -> str:
    """Say what an exception of another rank was, in a line."""
    return f"{type(error).__name__}: {error}"[:400]


def check_group(group: Any) -> Group:
    """Return the argument ``group``; raises `ArgumentError` unless it is one."""
    if not isinstance(group, Group):
        raise ArgumentError(f"group is {shown(group)}; a Group is needed: ThreadGroup, MpiGroup or NcclGroup")
    return group


def as_bytes(name: str, x: Any, *, written: bool = False) -> Any:
    """Return a contiguous array as one of bytes, not copied."""
    _check_array(name, x)
    if x.dtype.kind not in "fiubV" or not x.dtype.isnative:
        raise DTypeError(f"{name} has dtype {x.dtype}; floats, integers and bools (native) travel between ranks")
    if not x.flags.c_contiguous:
        raise ArgumentError(f"{name} is not contiguous; what travels between ranks has to be")
    if written and isinstance(x, np.ndarray) and not x.flags.writeable:
        raise ArgumentError(f"{name} is read-only")
    return x.reshape(-1).view(np.uint8)


def _check_array(name: str, x: Any) -> None:
    if type(x) is not np.ndarray and not isinstance(x, getattr(sys.modules.get("cupy"), "ndarray", ())):
        raise ArrayTypeError(f"{name} is {shown(x)}; a NumPy or CuPy array is needed")
