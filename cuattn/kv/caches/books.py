"""What every cache has for its books: a lock, a journal, and the steps that are open.

A call of a cache is a transaction: it either happens or does not, whatever is raised in it and whenever. Its changes go
through the journal, and its last act is to commit them. What it could not put back itself, because it was interrupted
again while it did so, the next call puts back first.
"""

from __future__ import annotations

import functools
import itertools
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar

from cuattn.errors import NotSupportedError, StepError
from cuattn.kv.caches.journal import Journal

if TYPE_CHECKING:
    from cuattn.kv.caches.reservation import Reservation
    from cuattn.kv.caches.sequence import Sequence
    from cuattn.kv.caches.step import Step

__all__ = ["Books", "OpenStep", "Unique", "reading", "transaction"]

P = ParamSpec("P")
R = TypeVar("R")
B = TypeVar("B", bound="Books")


class Unique:
    """A thing of which there is one: a copy would own the same pages, and give them back a second time.

    What ``copy.copy`` makes can be looked at, but its cache refuses it. Nothing else makes a copy.
    """

    __slots__ = ()

    def __copy__(self) -> Self:
        other = object.__new__(type(self))
        state = object.__getstate__(self)
        for part in state if isinstance(state, tuple) else (state,):
            for name, value in (part or {}).items():
                object.__setattr__(other, name, value)
        return other

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise NotSupportedError(
            f"a {type(self).__name__} can be neither pickled nor copied deeply: its pages would have two owners"
        )


@dataclass(slots=True, eq=False)
class OpenStep:
    """What a cache knows of a step: enough to give its pages back when nobody has the `Step` any more.

    Attributes
    ----------
    handle : weak reference to Step
        What the caller of ``reserve`` got. If an exception came before it could be kept anywhere, it is dead.
    is_written : bool
        Whether a layer may have been written, in whole or in part.
    """

    sequences: tuple[Sequence, ...]
    counts: tuple[int, ...]
    tokens: list[list[int]]
    _reservation: Reservation
    _appended: set[int] = field(default_factory=set)
    is_open: bool = True
    is_written: bool = False
    handle: weakref.ref[Step] | None = None

    def check_open(self, handle: Step) -> None:
        """Raise `StepError` if the step is over, or if a copy of it is used."""
        if self.handle is None or self.handle() is not handle:
            raise StepError("this is a copy of a step, or was never returned; the step itself is needed")
        if not self.is_open:
            raise StepError("the step is over: it was committed or aborted")

    def check_complete(self, num_layers: int) -> None:
        """Raise `StepError` if a layer is missing."""
        missing = [layer for layer in range(num_layers) if layer not in self._appended]
        if missing and any(self.counts):
            raise StepError(f"layers {missing} have not been appended; commit needs every layer, or abort the step")

    @property
    def is_orphan(self) -> bool:
        return self.handle is None or self.handle() is None


def transaction(method: Callable[Concatenate[B, P], R]) -> Callable[Concatenate[B, P], R]:
    """Decorator: a method of a cache whose changes are made together, or not at all."""

    @functools.wraps(method)
    def call(self: B, *args: P.args, **kwargs: P.kwargs) -> R:
        def change() -> R:
            self._settle()
            try:
                result = method(self, *args, **kwargs)
                self._journal.commit()
                return result
            except BaseException:
                result = None  # a step must not live on in the traceback
                self._journal.undo()
                raise

        return _locked(self, change)

    return call


def reading(method: Callable[Concatenate[B, P], R]) -> Callable[Concatenate[B, P], R]:
    """Decorator: a method of a cache that changes nothing, and finds the books in order."""

    @functools.wraps(method)
    def call(self: B, *args: P.args, **kwargs: P.kwargs) -> R:
        def look() -> R:
            self._settle()
            return method(self, *args, **kwargs)

        return _locked(self, look)

    return call


def _locked(books: Books, act: Callable[[], R]) -> R:
    """Call ``act()`` with the lock, which no exception leaves locked."""
    lock = books._lock
    if books._original() is not books:
        raise NotSupportedError(f"this is a copy of a {type(books).__name__}; the cache itself is needed")
    if _is_owned(lock):
        raise NotSupportedError(
            f"a method of {type(books).__name__} was called while another one was at work in the same thread, by a "
            "signal handler or a finalizer; call it when that has returned"
        )
    try:
        with lock:
            return act()
    except BaseException:
        if _is_owned(lock):  # the exception came when `with` had been left, but the lock not been released
            lock.release()
        raise


class Books(Unique):
    """The base of the caches."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._journal = Journal()
        self._open: dict[OpenStep, None] = {}
        self._sequences: dict[Any, None] = {}  # in any order: each has a number
        self._next_number = itertools.count().__next__
        self._original = weakref.ref(self)

    def _give_up(self, step: OpenStep) -> None:
        """Abort an open step, as a part of a transaction."""
        self._close_step(step)

    @transaction
    def _abort(self, handle: Step) -> None:
        step = handle._opened
        step.check_open(handle)
        self._give_up(step)

    def _open_step(self, step: OpenStep, handle: Step) -> None:
        """Let sequences be in a step, as a part of a transaction."""
        step.handle = weakref.ref(handle)
        self._journal.note(_set_steps, step.sequences, None)
        _set_steps(step.sequences, step)
        self._journal.put(self._open, step, None)

    def _close_step(self, step: OpenStep) -> None:
        """Let sequences be in no step any more, as a part of a transaction."""
        self._journal.note(_set_steps, step.sequences, step)
        _set_steps(step.sequences, None)
        self._journal.drop(self._open, step)
        self._journal.assign(step, "is_open", False)

    def _look(self) -> None:
        """Settle the books before something is read without the lock, if there is a need to."""
        if (self._journal or any(step.is_orphan for step in tuple(self._open))) and not _is_owned(self._lock):
            _locked(self, self._settle)

    def _settle(self) -> None:
        """Undo what an interrupted call left, and abort steps that nobody has. The caller has the lock."""
        if self._journal:
            self._journal.undo()
        for step in tuple(self._open):
            if step.is_orphan:
                try:
                    self._give_up(step)
                    self._journal.commit()
                except BaseException:
                    self._journal.undo()
                    raise


def _is_owned(lock: threading.RLock) -> bool:
    """Whether this thread has the lock."""
    return bool(lock._is_owned())  # type: ignore[attr-defined]


def _set_steps(seqs: tuple[Sequence, ...], step: OpenStep | None) -> None:
    for seq in seqs:
        seq._step = step
