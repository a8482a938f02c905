"""What goes round a ring: arrays of a rank, one behind the other in one message, in two buffers that take turns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cuattn.distributed.group import Group, Transfer
from cuattn.runtime.executor import Executor

__all__ = ["Rotation"]


class Rotation:
    """Arrays that move on by one rank at a time, from rank r to rank r + 1.

    Parameters
    ----------
    shapes : sequence of sequences of shapes
        Of the arrays, for the share of each rank.
    dtype : dtype
    what : str
        For the record of events.
    """

    def __init__(
        self,
        executor: Executor,
        group: Group,
        shapes: Sequence[Sequence[tuple[int, ...]]],
        dtype: np.dtype[Any],
        what: str,
    ) -> None:
        self.executor, self.group, self.shapes, self.dtype, self.what = executor, group, shapes, dtype, what
        self.hops = 0
        self._transfer: Transfer | None = None
        self._sizes = [sum(math.prod(shape) for shape in of_rank) for of_rank in shapes]
        with executor.on_device():
            xp = executor.xp
            count = 1 if group.size == 1 else 2
            self._buffers = [xp.empty(max(self._sizes), dtype) for _ in range(count)]

    @property
    def owner(self) -> int:
        """The rank whose share is here now."""
        return (self.group.rank - self.hops) % self.group.size

    @property
    def is_moving(self) -> bool:
        """Whether a share is on its way."""
        return self._transfer is not None

    def arrays(self) -> list[Any]:
        """Return the arrays that are here, as views of the buffer."""
        buffer, first, views = self._buffers[self.hops % len(self._buffers)], 0, []
        for shape in self.shapes[self.owner]:
            end = first + math.prod(shape)
            views.append(buffer[first:end].reshape(shape))
            first = end
        return views

    def start(self) -> None:
        """Put what is here on its way to the next rank, and make room for what comes from the one before."""
        group = self.group
        ahead, behind = (group.rank + 1) % group.size, (group.rank - 1) % group.size
        here, there = (self._buffers[(self.hops + i) % 2] for i in range(2))
        coming = (self.owner - 1) % group.size
        group.traffic.note("send", self.hops, self.what)
        self._transfer = group.start_send_recv(
            here[: self._sizes[self.owner]], ahead, there[: self._sizes[coming]], behind
        )

    def finish(self) -> None:
        """Wait until the share of the rank before is here."""
        assert self._transfer is not None
        self.group.traffic.note("wait", self.hops, self.what)
        self._transfer.wait()
        self._transfer = None
        self.hops += 1
