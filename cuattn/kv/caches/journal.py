"""What a call has changed in a cache so far, so that all of it can be undone at any moment.

Exceptions may come from anywhere: a signal, another thread, an allocation that fails. So each change is written down
before it is made, as what was there before. A call ends by forgetting what was written down, which is one store: until
then everything can be put back, and from then on it has happened.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

__all__ = ["Journal"]

_ABSENT = object()


class Journal:
    """Entries, each a function that puts something back and its arguments: what was there, and not how it changed.

    So putting back twice is harmless, and so is putting back what has not been changed yet. Neither a change of a
    container nor a store is ever half done: those below are one call of the interpreter's own.

    Examples
    --------
    >>> journal, pages, length = Journal(), {"a": 1}, [5]
    >>> journal.put(pages, "b", 2)
    >>> journal.drop(pages, "a")
    >>> journal.extend(length, [6, 7])
    >>> pages, length
    ({'b': 2}, [5, 6, 7])
    >>> journal.undo()
    >>> pages, length, bool(journal)
    ({'a': 1}, [5], False)
    """

    __slots__ = ("_entries",)

    def __init__(self) -> None:
        self._entries: list[tuple[Callable[..., object], tuple[Any, ...]]] = []

    def __bool__(self) -> bool:
        """Whether there is something that could be undone."""
        return bool(self._entries)

    def note(self, restore: Callable[..., object], *before: Any) -> None:
        """Note that ``restore(*before)`` undoes what comes next; it may be called twice, and before that is done."""
        self._entries.append((restore, before))

    def assign(self, obj: Any, name: str, value: Any) -> None:
        """Set an attribute."""
        self._entries.append((setattr, (obj, name, getattr(obj, name))))
        setattr(obj, name, value)

    def put(self, items: dict[Any, Any], key: Any, value: Any) -> None:
        """Set an entry of a dictionary. Undone, a key that was there is there, but perhaps in another order."""
        self._entries.append((_put_back, (items, key, items.get(key, _ABSENT))))
        items[key] = value

    def drop(self, items: dict[Any, Any], key: Any) -> None:
        """Delete an entry of a dictionary; its order is not kept either."""
        self._entries.append((_put_back, (items, key, items[key])))
        del items[key]

    def write(self, items: list[Any] | array[int], index: int, value: Any) -> None:
        """Set an entry of a list or an array."""
        self._entries.append((items.__setitem__, (index, items[index])))
        items[index] = value

    def extend(self, items: list[Any] | array[int], values: Any) -> None:
        """Put values behind a list or an array."""
        self._entries.append((_set_tail, (items, len(items), items[:0])))
        items.extend(values)

    def cut(self, items: list[Any] | array[int], length: int) -> None:
        """Keep the first ``length`` entries of a list or an array."""
        self._entries.append((_set_tail, (items, length, items[length:])))
        del items[length:]

    def commit(self) -> None:
        """Keep what was done: nothing of it can be undone any more."""
        self._entries = []

    def undo(self) -> None:
        """Put everything back, the last change first. Where this is interrupted, call it again."""
        entries = self._entries
        while entries:
            restore, before = entries[-1]
            restore(*before)
            entries.pop()


def _put_back(items: dict[Any, Any], key: Any, value: Any) -> None:
    if value is _ABSENT:
        items.pop(key, None)
    else:
        items[key] = value


def _set_tail(items: list[Any] | array[int], start: int, tail: Any) -> None:
    items[start:] = tail
