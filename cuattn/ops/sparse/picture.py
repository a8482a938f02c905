"""Block masks as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuattn.scalars import integer

__all__ = ["picture"]


def picture(
    grid: tuple[int, int, int, int], places: Any, shares: NDArray[np.float64], *, width: int, height: int
) -> Iterator[str]:
    """Draw each head of a mask: ``#`` where all is visible, ``+`` where some is, ``.`` where nothing is.

    ``places`` are those of the kept blocks, ``shares`` what is visible of each. A picture has at most ``height`` lines
    and ``width`` characters a line; in a larger mask a character stands for as many blocks as are needed.
    """
    rows, columns = integer("height", height, 1, 2**20), integer("width", width, 1, 2**20)
    batch, heads, nq, nk = grid
    down, across = max(1, -(-nq // rows)), max(1, -(-nk // columns))
    lines, letters = -(-nq // down), -(-nk // across)
    visible = np.zeros((batch, heads, lines, letters))
    np.add.at(visible, (places.batch, places.head, places.query // down, places.key // across), shares)
    blocks = np.multiply.outer(_sizes(nq, down), _sizes(nk, across))
    drawn = np.where(visible == blocks, "#", np.where(visible > 0, "+", "."))
    for b in range(batch):
        for h in range(heads):
            if batch * heads > 1:
                yield f"batch {b}, head {h}:" if batch > 1 else f"head {h}:"
            yield from ("".join(line) for line in drawn[b, h])


def _sizes(count: int, group: int) -> NDArray[np.int64]:
    """Return how many of ``count`` blocks each group has: all of ``group``, and the last what is left."""
    starts = np.arange(0, count, group)
    return np.asarray(np.minimum(group, count - starts))
