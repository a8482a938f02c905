"""Ranks that are threads of one process: for tests, examples and machines without MPI."""

from __future__ import annotations

import contextvars
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cuattn.distributed.group import DEFAULT_TIMEOUT, Group, Reduction, Transfer, describe
from cuattn.errors import DistributedError, GroupTimeoutError, MismatchError, PeerError
from cuattn.scalars import integer

__all__ = ["ThreadGroup"]

MAX_RANKS = 4096


class _World:
    """What the ranks of a group share: letters from rank to rank, and what each says in a collective."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.changed = threading.Condition()
        self.letters: dict[tuple[int, int, int], Any] = {}  # by sender, receiver and number
        self.rounds: dict[int, dict[int, Any]] = {}  # what ranks have said, by the number of the collective
        self.read: dict[int, int] = defaultdict(int)
        self.failure: tuple[int, str] | None = None
        self.parts: dict[tuple[int, Any], _World] = {}  # by the number of the split, and color

    def fail(self, rank: int, text: str) -> None:
        with self.changed:
            if self.failure is None:
                self.failure = rank, text
            parts = list(self.parts.values())
            self.changed.notify_all()
        for part in parts:
            part.fail(-1, f"rank {rank} of the group that this one is part of raised {text}")


class ThreadGroup(Group):
    """A rank that is a thread: made with `run`, or by hand with `create`.

    Kernels on the host executor run outside of Python's lock, so that ranks compute at the same time. NumPy and CuPy
    arrays are good; CuPy's are waited for, since threads know nothing of each other's streams.

    Examples
    --------
    >>> import numpy as np
    >>> from cuattn.distributed import ThreadGroup
    >>> ThreadGroup.run(3, lambda group: group.all_reduce(np.array([float(group.rank)])).tolist())
    [[3.0], [3.0], [3.0]]
    """

    def __init__(self, world: _World, rank: int, timeout: float) -> None:
        super().__init__(rank, world.size, timeout)
        self._world = world
        self._round = 0
        self._sent: Counter[int] = Counter()  # letters to each rank
        self._expected: Counter[int] = Counter()  # letters from each

    @classmethod
    def create(cls, size: int, *, timeout: float = DEFAULT_TIMEOUT) -> list[ThreadGroup]:
        """Return one group for each of ``size`` threads that the caller starts."""
        size = integer("size", size, 1, MAX_RANKS)
        world = _World(size)
        return [cls(world, rank, timeout) for rank in range(size)]

    @classmethod
    def run(
        cls,
        size: int,
        function: Callable[..., Any],
        *arguments: Sequence[Any],
        timeout: float = DEFAULT_TIMEOUT,
    ) -> list[Any]:
        """Call ``function(group, *arguments)`` in ``size`` threads at once, and return what each returned.

        Raises what the first rank to fail raised; the others have raised `PeerError` then.
        """
        groups = cls.create(size, timeout=timeout)
        results: list[Any] = [None] * len(groups)
        errors: list[tuple[int, BaseException]] = []

        def work(group: ThreadGroup) -> None:
            try:
                results[group.rank] = function(group, *arguments)
            except BaseException as error:
                errors.append((group.rank, error))
                group.abort(error)

        threads = [
            threading.Thread(target=contextvars.copy_context().run, args=(work, group), name=f"rank {group.rank}")
            for group in groups
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            own = [error for _, error in errors if not isinstance(error, PeerError)]
            raise own[0] if own else errors[0][1]
        return results

    def split(self, color: int, key: int = 0) -> ThreadGroup:
        """Return the group of the ranks that give the same ``color``, in the order of ``key``, then of ranks."""
        self._check_usable()
        said = self._everybody("split", (color, key, self.rank))
        members = sorted((k, rank) for c, k, rank in said if c == color)
        with self._world.changed:
            world = self._world.parts.setdefault((self._round, color), _World(len(members)))
        return ThreadGroup(world, [rank for _, rank in members].index(self.rank), self.timeout)

    def _start(self, send: Any, destination: int, receive: Any, source: int) -> Transfer:
        world = self._world
        if send is not None:
            with world.changed:
                world.letters[self.rank, destination, self._sent[destination]] = _sent(send)
                self._sent[destination] += 1
                world.changed.notify_all()
        if receive is None:
            return Transfer()
        awaited = source, self.rank, self._expected[source]
        self._expected[source] += 1

        def arrive() -> None:
            self._until(lambda: awaited in world.letters, f"a message of rank {source}")
            with world.changed:
                letter = world.letters.pop(awaited)
            _deliver(letter, receive, source)

        return Transfer(arrive)

    def _all_to_all(self, send: list[Any], receive: list[Any]) -> None:
        for source, letters in enumerate(self._everybody("all_to_all", [_sent(x) for x in send])):
            _deliver(letters[self.rank], receive[source], source)

    def _all_gather(self, x: Any) -> Any:
        parts = self._everybody("all_gather", _sent(x))
        if any(part.nbytes != x.nbytes for part in parts):
            raise MismatchError(f"all_gather: ranks gave {[part.nbytes for part in parts]} bytes; all give as many")
        gathered = _module(x).empty((self.size, x.size), np.uint8)
        for rank, part in enumerate(parts):
            gathered[rank] = part
        return gathered

    def _all_reduce(self, x: Any, op: Reduction) -> Any:
        parts = self._everybody("all_reduce", _sent(x))
        if any(part.shape != x.shape or part.dtype != x.dtype for part in parts):
            raise MismatchError(f"all_reduce: ranks gave {[(part.shape, str(part.dtype)) for part in parts]}")
        total = parts[0].copy()  # in the order of the ranks: the same bits everywhere, every time
        combine = _module(x).add if op == "sum" else _module(x).maximum
        for part in parts[1:]:
            combine(total, part, out=total)
        return total

    def _gather_control(self, message: bytes) -> list[bytes]:
        return self._everybody("agreement", message)

    def _everybody(self, operation: str, said: Any) -> list[Any]:
        """Say something, and return what each rank has said in this round."""
        world, number = self._world, self._round
        self._round += 1
        with world.changed:
            words = world.rounds.setdefault(number, {})
            words[self.rank] = operation, said
            world.changed.notify_all()
        self._until(lambda: len(words) == self.size, f"the {operation} of all ranks")
        with world.changed:
            world.read[number] += 1
            if world.read[number] == self.size:
                del world.rounds[number], world.read[number]
        operations = [words[rank][0] for rank in range(self.size)]
        if set(operations) != {operation}:
            raise MismatchError(f"ranks are in different calls: {', '.join(operations)}")
        return [words[rank][1] for rank in range(self.size)]

    def _until(self, ready: Callable[[], bool], what: str) -> None:
        """Wait for something that another rank does. Raises `PeerError` or `GroupTimeoutError`."""
        world, deadline = self._world, time.monotonic() + self.timeout
        failure: DistributedError | None = None
        with world.changed:
            while not ready():
                remaining = deadline - time.monotonic()
                if world.failure is not None:
                    rank, text = world.failure
                    failure = PeerError(f"rank {rank} raised {text}", rank=rank)
                    break
                if remaining <= 0:
                    failure = GroupTimeoutError(
                        f"rank {self.rank} of {self.size} has waited {self.timeout:g} s for {what}"
                    )
                    break
                world.changed.wait(remaining)
        if failure is not None:
            self._failure = failure
            world.fail(self.rank, describe(failure))
            raise failure

    def _abort(self, text: str) -> None:
        self._world.fail(self.rank, text)


def _module(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return np
    import cupy

    return cupy


def _sent(x: Any) -> Any:
    """Return a copy that any thread may read."""
    copy = x.copy()
    if not isinstance(copy, np.ndarray):
        _module(copy).cuda.get_current_stream().synchronize()
    return copy


def _deliver(letter: Any, receive: Any, source: int) -> None:
    if letter.nbytes != receive.nbytes:
        raise MismatchError(
            f"send and receive do not fit: rank {source} sent {letter.nbytes} bytes for {receive.nbytes}"
        )
    receive[...] = letter
