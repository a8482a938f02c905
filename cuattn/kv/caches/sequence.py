"""One sequence of a paged cache: its page table, its length, and what is known of its tokens."""

from __future__ import annotations

import functools
import operator
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import numpy as np

from cuattn.errors import ArgumentError, ArrayTypeError, SequenceError
from cuattn.kv.caches.books import Unique
from cuattn.kv.caches.prefix import Node
from cuattn.messages import shown
from cuattn.runtime.places import check_size
from cuattn.scalars import as_integer, integer

if TYPE_CHECKING:
    from cuattn.kv.caches.books import Books, OpenStep
    from cuattn.kv.caches.journal import Journal

__all__ = [
    "Sequence",
    "check_sequence",
    "check_sequences",
    "count_list",
    "grow",
    "listed",
    "new_tokens",
    "token_list",
]

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C")
S = TypeVar("S")


class Sequence(Unique):
    """A sequence of tokens in a `PagedKVCache`, which alone makes and changes it. It cannot be copied or pickled.

    Attributes
    ----------
    length : int
        Tokens whose keys and values are cached.
    tokens : tuple of int
        The tokens that the cache was told, from the first on; there may be more than `length` of them (a prompt that is
        not computed yet), or fewer (nobody said what the others are).
    pages : tuple of int
        The page table: key j is on page ``pages[j // page_size]``, slot ``j % page_size``. Empty while swapped out.
    state : str
        "live", "swapped" or "freed".
    """

    __slots__ = ("_cache", "_host_pages", "_length", "_number", "_pages", "_state", "_step", "_tip", "_tokens")

    def __init__(self, cache: Books, tip: Node, tokens: list[int]) -> None:
        self._cache = cache
        self._number = cache._next_number()  # later sequences have larger ones
        self._tip = tip  # the node of the last full page whose tokens are known; held in the index
        self._tokens = tokens
        self._pages = array("i")
        self._host_pages: list[int] = []
        self._length = 0
        self._state = "live"
        self._step: OpenStep | None = None

    @property
    def length(self) -> int:
        self._cache._look()
        return self._length

    @property
    def tokens(self) -> tuple[int, ...]:
        self._cache._look()
        return tuple(self._tokens)

    @property
    def pages(self) -> tuple[int, ...]:
        self._cache._look()
        return tuple(self._pages)

    @property
    def state(self) -> str:
        self._cache._look()
        return self._state

    def __repr__(self) -> str:
        return f"Sequence({self._length} tokens on {len(self._pages)} pages, {self._state})"


def _check_type(name: str, seq: Any) -> None:
    if not isinstance(seq, Sequence):
        raise ArgumentError(f"{name}: {type(seq).__name__}; a Sequence of this cache is needed, from add() or fork()")


def check_sequence(
    cache: Books, name: str, seq: Any, *, states: tuple[str, ...] = ("live",), idle: bool = True
) -> None:
    """Raise `SequenceError` unless the sequence is one of the cache, in one of the states, and in no open step."""
    _check_type(name, seq)
    if seq._cache is not cache:
        raise SequenceError(f"{name}: {seq!r} belongs to another cache")
    if seq._state not in states:
        raise SequenceError(f"{name}: {seq!r}; one that is {' or '.join(states)} is needed")
    if seq._state != "freed" and seq not in cache._sequences:
        raise SequenceError(f"{name}: {seq!r} is a copy of a sequence; the sequence itself is needed")
    if idle and seq._step is not None:
        raise SequenceError(f"{name}: {seq!r} is in an open step; commit or abort it first")


def listed(method: Callable[Concatenate[C, S, P], R]) -> Callable[Concatenate[C, S, P], R]:
    """Decorator: a method that is given any iterable of sequences, or one, which is read before the cache is locked."""

    @functools.wraps(method)
    def call(self: C, seqs: S, *args: P.args, **kwargs: P.kwargs) -> R:
        given: Any = seqs
        found: Any = [given] if isinstance(given, Sequence) else []
        try:
            for i, seq in enumerate(() if found else given):
                _check_type(f"seqs[{i}]", seq)  # at once: what is no list of sequences may be without an end
                found.append(seq)
        except (MemoryError, ArgumentError):
            raise
        except Exception as error:  # iterators raise what they like
            raise ArgumentError(f"seqs: {type(seqs).__name__}; sequences of this cache are needed") from error
        return method(self, found, *args, **kwargs)

    return call


def check_sequences(cache: Books, seqs: Any, *, states: tuple[str, ...] = ("live",), idle: bool = True) -> list[Any]:
    """Check several sequences, without repetitions; raises as `check_sequence`, or `ArgumentError`."""
    for i, seq in enumerate(seqs):
        check_sequence(cache, f"seqs[{i}]", seq, states=states, idle=idle)
    if len(set(seqs)) != len(seqs):
        raise ArgumentError("seqs names a sequence twice")
    return seqs


def grow(journal: Journal, step: OpenStep) -> None:
    """Add the tokens of a step to its sequences."""
    before = [(seq, seq._length, len(seq._tokens)) for seq in step.sequences]
    journal.note(_shrink, before)
    for seq, count, tokens in zip(step.sequences, step.counts, step.tokens, strict=True):
        seq._length += count
        seq._tokens.extend(tokens)


def _shrink(before: list[tuple[Sequence, int, int]]) -> None:
    for seq, length, num_tokens in before:
        seq._length = length
        del seq._tokens[num_tokens:]


def count_list(counts: Any, batch: int, name: str = "counts", *, most: int = 2**31 - 1) -> list[int]:
    """Return ``batch`` numbers from 0 to ``most``, of a list or of one number for all."""
    if as_integer(counts) is not None:
        return [integer(name, counts, 0, most)] * batch
    if not isinstance(counts, list | tuple) and not _holds_integers(counts):
        raise ArgumentError(f"{name} is {shown(counts)}; an integer or a list of {batch} is needed")
    if len(counts) != batch:
        raise ArgumentError(f"{name} has {len(counts)} numbers for {batch} sequences in seqs")
    return [integer(f"{name}[{i}]", count, 0, most) for i, count in enumerate(counts)]


def new_tokens(seqs: list[Sequence], counts: list[int], tokens: Any) -> list[list[int]]:
    """Return the tokens of a step that its sequences do not know yet, as far as somebody knows them."""
    if tokens is None:
        return [[] for _ in seqs]
    if not isinstance(tokens, list | tuple | np.ndarray):
        raise ArrayTypeError(f"tokens: {type(tokens).__name__}; a list or a NumPy array of integers is needed")
    if isinstance(tokens, np.ndarray) or (len(tokens) and all(as_integer(token) is not None for token in tokens)):
        packed = token_list("tokens", tokens)
        if len(packed) != sum(counts):
            raise ArgumentError(f"tokens has {len(packed)} numbers; {sum(counts)} are reserved by counts")
        starts = np.cumsum([0, *counts]).tolist()
        tokens = [packed[first : first + count] for first, count in zip(starts[:-1], counts, strict=True)]
    if len(tokens) != len(seqs):
        raise ArgumentError(f"tokens has {len(tokens)} entries for {len(seqs)} sequences in seqs")
    new: list[list[int]] = []
    for i, (seq, count, given) in enumerate(zip(seqs, counts, tokens, strict=True)):
        if given is None:
            new.append([])
            continue
        given = token_list(f"tokens[{i}]", given)
        if len(given) != count:
            raise ArgumentError(f"tokens[{i}] has {len(given)} numbers; {count} are reserved by counts")
        known = seq._tokens[seq._length : seq._length + count]
        if given[: len(known)] != known:
            raise ArgumentError(f"tokens[{i}] is {given}, but add() was told that {known} come next")
        # Behind a token that nobody named, no page can be found any more: the others need not be kept.
        new.append(given[len(known) :] if len(seq._tokens) >= seq._length else [])
    return new


def token_list(name: str, tokens: Any) -> list[int]:
    """Return tokens as a list of Python integers; `ArrayTypeError` or `ArgumentError` for anything else."""
    if isinstance(tokens, np.ndarray):
        if not _holds_integers(tokens):
            raise ArgumentError(f"{name} is {shown(tokens)}; integers [n] are needed")
        return check_size(name, tokens).tolist()
    if not isinstance(tokens, list | tuple | range | array):
        raise ArrayTypeError(f"{name}: {type(tokens).__name__}; a list or a NumPy array of integers is needed")
    found = list(tokens)
    if set(map(type, found)) <= {int}:  # nearly always
        return found
    for token in found:
        if as_integer(token) is None:
            raise ArgumentError(f"{name} holds {shown(token)}; integers are needed")
    return [operator.index(token) for token in found]


def _holds_integers(x: Any) -> bool:
    """Whether ``x`` is a NumPy array [n] of integers, none of them masked."""
    is_array = isinstance(x, np.ndarray) and not isinstance(x, np.ma.MaskedArray)
    return is_array and x.ndim == 1 and x.dtype.kind in "iu"
