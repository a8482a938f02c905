"""Which heads a rank has, where heads are divided among ranks.

Rank r has the query heads [r H // R, (r + 1) H // R), and the key/value heads that these read. No number has to be
divisible by another: two ranks may read one key/value head, and a rank's query heads may begin in the middle of those
that share one.

>>> split_heads(9, 3, 2)
(Heads(first=0, end=4, kv_first=0, kv_end=2), Heads(first=4, end=9, kv_first=1, kv_end=3))
>>> runs(split_heads(9, 3, 2)[1], 3)  # head 4 and 5 read the first of its key/value heads, the others the second
(Heads(first=0, end=2, kv_first=0, kv_end=1), Heads(first=2, end=5, kv_first=1, kv_end=2))
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from cuattn.ops.attention.dropout import DropoutOrigin
from cuattn.ops.attention.options import Options

__all__ = ["Heads", "arrays_of", "of_heads", "runs", "split_heads"]


class Heads(NamedTuple):
    """Query heads ``first`` to ``end``, and key/value heads ``kv_first`` to ``kv_end``."""

    first: int
    end: int
    kv_first: int
    kv_end: int

    @property
    def queries(self) -> slice:
        return slice(self.first, self.end)

    @property
    def keys(self) -> slice:
        return slice(self.kv_first, self.kv_end)


@lru_cache(maxsize=1024)
def split_heads(num_heads: int, num_kv_heads: int, size: int) -> tuple[Heads, ...]:
    """Return the heads of each rank."""
    shared = num_heads // max(num_kv_heads, 1)
    found = []
    for rank in range(size):
        first, end = rank * num_heads // size, (rank + 1) * num_heads // size
        kv = (first // shared, (end - 1) // shared + 1) if end > first else (0, 0)
        found.append(Heads(first, end, *kv))
    return tuple(found)


@lru_cache(maxsize=1024)
def runs(own: Heads, shared: int) -> tuple[Heads, ...]:
    """Return the calls of attention for the heads of a rank: in each, every key/value head is read by as many.

    Heads count from the first of the rank. ``shared``: query heads that read one key/value head, in the whole.
    """
    found: list[Heads] = []
    for kv in range(own.kv_first, own.kv_end):
        first, end = max(own.first, kv * shared), min(own.end, (kv + 1) * shared)
        run = Heads(first - own.first, end - own.first, kv - own.kv_first, kv + 1 - own.kv_first)
        if found and (found[-1].end - found[-1].first) == (end - first) * (found[-1].kv_end - found[-1].kv_first):
            run = found.pop()._replace(end=run.end, kv_end=run.kv_end)
        found.append(run)
    return tuple(found)


def arrays_of(given: Mapping[str, Any], checked: Options) -> dict[str, Any]:
    """Return the options that a call has, slopes and sinks as arrays: what `of_heads` takes a part of."""
    options = {name: x for name, x in given.items() if x is not None}
    for name in ("alibi_slopes", "sinks"):
        if name in options:
            options[name] = getattr(checked, name)
    if len(options.get("alibi_slopes", ())) == 1:
        options["alibi_slopes"] = options["alibi_slopes"][0]
    return options


def of_heads(options: Mapping[str, Any], own: Heads, run: Heads, num_heads: int) -> dict[str, Any]:
    """Return the options of the whole call, with ``num_heads``, for one run of the heads of a rank."""
    heads = slice(own.first + run.first, own.first + run.end)
    found = dict(options)
    for name in ("alibi_slopes", "sinks"):
        if name in options:
            found[name] = options[name][..., heads]
    if options.get("dropout_p"):
        found["dropout_origin"] = DropoutOrigin(0, heads.start, 0, 0, num_heads)
    return found
