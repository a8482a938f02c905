"""Every kernel of the package by name, ``KERNEL/ROW``, with the constants it is compiled with: what `inspect` takes.

A kernel is a file of ``cuattn/kernels``. A row is one of the constants that calls compile it with: a shape of a table
with its options where there is a table, else what a call on 16-bit arrays would take. Each family says which
(`cuattn.ops.registry`).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from functools import cache

from cuattn.catalogue import groups
from cuattn.errors import ArgumentError
from cuattn.ops.registry import Variant


@cache
def everything() -> tuple[Variant, ...]:
    """All variants of all kernels, in the order of the kernels' names."""
    found = [variant for group in groups().values() for variant in group.variants()]
    return tuple(sorted(found, key=lambda one: one.kernel))


def choose(names: Sequence[str]) -> list[Variant]:
    """Variants that one of the names stands for: ``KERNEL``, all of its rows; ``KERNEL/ROW``; either with wildcards.

    Raises `ArgumentError` for a name that stands for none.
    """
    found: dict[str, Variant] = {}
    for name in names:
        pattern = name if "/" in name else f"{name}/*"
        matching = [one for one in everything() if fnmatch.fnmatchcase(one.name, pattern)]
        if not matching:
            raise ArgumentError(f"no kernel is called {name!r}: {_nearest(name)}")
        found |= {one.name: one for one in matching}
    return list(found.values())


def _nearest(name: str) -> str:
    kernel = name.partition("/")[0]
    rows = [one.row for one in everything() if one.kernel == kernel]
    if rows:
        return f"the rows of {kernel} are {', '.join(rows[:8])}{', ...' if len(rows) > 8 else ''}"
    return f"kernels are {', '.join(dict.fromkeys(one.kernel for one in everything()))}"
