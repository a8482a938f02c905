"""What a group has sent: bytes of each collective, and the order of events.

>>> traffic = Traffic()
>>> traffic.count("send_recv", 96)
>>> traffic.count("all_reduce", Fraction(2 * 3 * 64, 4))
>>> traffic.bytes, traffic["all_reduce"], traffic.calls["send_recv"]
(192, 96, 1)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import NamedTuple

__all__ = ["Event", "Traffic"]


class Event(NamedTuple):
    """Something that a rank did.

    Attributes
    ----------
    kind : {"send", "compute", "wait"}
        A transfer is put on its way, kernels are started, a transfer is waited for.
    step : int
    what : str
    """

    kind: str
    step: int
    what: str


class Traffic:
    """Bytes that one rank has put on the wire, by collective: what the algorithm sends, not what a library adds.

    ``send_recv`` and ``all_to_all`` count what goes to other ranks, ``all_gather`` its own part once for each of them,
    and ``all_reduce`` the 2 (R - 1) / R of its argument that a ring of R ranks takes. The agreement on shapes and
    options before a call is counted apart, in ``control_bytes``.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all that was counted."""
        self.calls: Counter[str] = Counter()
        self.control_bytes = 0
        self._bytes: dict[str, Fraction] = {}
        self._events: list[Event] | None = None

    def count(self, collective: str, nbytes: int | Fraction) -> None:
        """Add a call of a collective."""
        self.calls[collective] += 1
        self._bytes[collective] = self._bytes.get(collective, Fraction(0)) + nbytes

    def __getitem__(self, collective: str) -> int | Fraction:
        return _whole(self._bytes.get(collective, Fraction(0)))

    @property
    def bytes(self) -> int | Fraction:
        """The bytes of all collectives; a fraction where a sum was not divisible by the number of ranks."""
        return _whole(sum(self._bytes.values(), Fraction(0)))

    @contextmanager
    def events(self) -> Iterator[list[Event]]:
        """Record in a list what the rank does, in its order, for a ``with`` block."""
        before, self._events = self._events, []
        try:
            yield self._events
        finally:
            self._events = before

    def note(self, kind: str, step: int, what: str) -> None:
        """Record an event, if anybody listens."""
        if self._events is not None:
            self._events.append(Event(kind, step, what))


def _whole(number: Fraction) -> int | Fraction:
    return int(number) if number.denominator == 1 else number
