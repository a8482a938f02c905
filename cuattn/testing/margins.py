"""How much of what the tolerance rule allows was used: noted by every comparison in a block.

>>> from cuattn.testing.tolerance import assert_within
>>> with margins() as found:
...     assert_within(np.float64([1.25, 2.0]), np.float64([1.0, 2.0]), 0.5, "out")
>>> found.largest
{'out': 0.5}
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Margins", "margins", "note"]


@dataclass
class Margins:
    """The largest error of each result, as a fraction of its bound: at most 1 where all is right."""

    largest: dict[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> float:
        """The largest of all."""
        return max(self.largest.values(), default=0.0)


_open: ContextVar[tuple[Margins, ...]] = ContextVar("cuattn.testing margins", default=())


@contextmanager
def margins() -> Iterator[Margins]:
    """Note the margins of all comparisons in a block."""
    found = Margins()
    token = _open.set((*_open.get(), found))
    try:
        yield found
    finally:
        _open.reset(token)


def note(name: str, error: NDArray[Any], limit: NDArray[Any]) -> None:
    """Note the errors of a result and what is allowed; nothing where nobody asked."""
    if not _open.get():
        return
    with np.errstate(divide="ignore", invalid="ignore"):
        fractions = np.where(error > 0, error / limit, 0.0)
    worst = float(np.max(fractions, initial=0.0))
    for found in _open.get():
        found.largest[name] = max(found.largest.get(name, 0.0), worst)
