"""What one public function takes of the table of options: its keywords, their defaults, and the check of a call.

Most calls have no options, or the same few numbers as the call before: those are not checked again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from cuattn.ops.attention.option_checks import Call
from cuattn.ops.attention.options import OPTIONS, Option, Options
from cuattn.runtime.executor import Executor

__all__ = ["Operation"]

_MAX_KNOWN = 1024
#: Of values whose check depends on nothing but them and the dtype of q.
_PLAIN_TYPES = frozenset((bool, int, float, str, type(None)))
#: What a pair holds, whose type does not say that of its items. Longer tuples are checked against the shapes of a call.
_PLAIN_PAIRS = frozenset((int, type(None)))


class Operation:
    """A function that takes options: those of its family, by its name where one is given that it does not take.

    Attributes
    ----------
    defaults : dict
        Of its keywords.
    flags : frozenset of str
        That its kernels may be compiled with, of `ForwardOptions`.
    """

    def __init__(self, name: str, family: str) -> None:
        self.name, self.family = name, family
        self.rows = tuple(row for row in OPTIONS if family in row.on)
        self.flags = frozenset(row.flag for row in self.rows if row.flag is not None)
        self.defaults = {keyword: default for row in self.rows for keyword, default in row.keywords.items()}
        self._row_of = {keyword: row for row in self.rows for keyword in row.keywords}
        self._always = set()
        if family in ("decode", "cascade", "plan", "differential_decode"):
            self._always = {row for row in self.rows if row.default_with_cache is not None}
            self.defaults |= {row.name: row.default_with_cache for row in self._always}
        self._large = tuple(row.name for row in self.rows if row.large)
        self._known: dict[Any, Options] = {}
        self._known_rows: dict[tuple[str, ...], tuple[Option, ...]] = {}
        self._plain = self._checked({}, (), None)
        self._plain.shared = True

    def refuse_unknown(self, given: Mapping[str, Any]) -> None:
        """Raise `TypeError`, as Python does, for a keyword that the function does not take."""
        if not given.keys() <= self.defaults.keys():
            name = next(name for name in given if name not in self.defaults)
            raise TypeError(f"{self.name}() got an unexpected keyword argument {name!r}")

    def large_arrays(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arrays that have to lie where q does."""
        return {name: x for name in self._large if (x := given.get(name)) is not None}

    def check(
        self,
        given: Mapping[str, Any],
        executor: Executor,
        *,
        logits_shape: tuple[int, int, int | None, int | None],
        num_kv_heads: int,
        dtype: np.dtype[Any],
        streams: int = 1,
    ) -> Options:
        """Check the options of a call; the arguments are those of `Call`. Raises as documented at `cuattn.attention`.

        Of calls without any, or with the same numbers, it is the same object, which nobody changes.
        """
        defaults = self.defaults
        try:
            changed = [
                name
                for name, value in given.items()
                if value is not (default := defaults[name])
                and not (type(value) is type(default) is float and value == default)
            ]
        except KeyError:
            self.refuse_unknown(given)
            raise
        if not changed:
            return self._plain
        key: list[Any] = [dtype]
        for name in changed:
            value = given[name]
            kind = type(value)
            if kind not in _PLAIN_TYPES and not (
                kind is tuple and len(value) == 2 and _PLAIN_PAIRS.issuperset(map(type, value))
            ):
                return self._checked(given, changed, Call(executor, logits_shape, num_kv_heads, dtype, streams))
            key += name, kind, value
        options = self._known.get(tuple(key))
        if options is None:
            options = self._checked(given, changed, Call(executor, logits_shape, num_kv_heads, dtype, streams))
            if options.arrays:  # of a tuple of numbers, say: it lies where this executor's kernels read it
                return options
            if len(self._known) >= _MAX_KNOWN:  # a seed of dropout differs from call to call
                self._known.clear()
            options.shared = True
            self._known[tuple(key)] = options
        return options

    def _checked(self, given: Mapping[str, Any], names: Collection[str], call: Call | None) -> Options:
        """Return the options of a call in which the keywords ``names`` are not what they are by default."""
        options = Options()
        values = given if len(given) == len(self.defaults) else {**self.defaults, **given}
        rows = self._rows_of(tuple(names))
        options.given = tuple([row for row in rows if row.check(options, call, *map(values.__getitem__, row.keywords))])
        return options

    def _rows_of(self, names: tuple[str, ...]) -> tuple[Option, ...]:
        """Return the rows that such a call has, in the order of the table."""
        rows = self._known_rows.get(names)
        if rows is None:
            present = {*map(self._row_of.__getitem__, names), *self._always}
            rows = self._known_rows[names] = tuple(row for row in self.rows if row in present)
        return rows
