"""Which key a query may attend to, before any number is computed."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from cuattn.errors import ArgumentError
from cuattn.reference.softmax import Array

__all__ = ["diagonal", "visible"]


def diagonal(
    seqlen_q: int, seqlen_k: int, causal: bool | str = False, diagonal_offset: ArrayLike | None = None
) -> Array:
    """Return the key position ``i + o`` that query i is aligned with, [B or 1, 1, N, 1].

    ``o = M - N`` (the last query sees the last key), 0 with ``causal="top_left"``, or `diagonal_offset` (one integer,
    or one per batch entry) when it is given.
    """
    if not (isinstance(causal, bool | np.bool_) or causal in ("bottom_right", "top_left")):
        raise ArgumentError(f"causal is {causal!r}; allowed are False, True, 'bottom_right' and 'top_left'")
    if diagonal_offset is None:
        diagonal_offset = 0 if isinstance(causal, str) and causal == "top_left" else seqlen_k - seqlen_q
    offset = np.asarray(diagonal_offset, dtype=np.int64).reshape(-1, 1, 1, 1)
    return np.asarray(np.arange(seqlen_q).reshape(1, 1, -1, 1) + offset)


def visible(
    seqlen_q: int,
    seqlen_k: int,
    *,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    mask: ArrayLike | None = None,
    diagonal_offset: ArrayLike | None = None,
    chunk: int | None = None,
) -> Array:
    """Say which key each query may attend to: boolean, broadcastable to [B, H, N, M].

    With `chunk`, only those that lie in one piece of so many keys with key i + o.

    >>> visible(2, 3, causal=True)[0, 0].astype(int).tolist()
    [[1, 1, 0], [1, 1, 1]]
    >>> visible(2, 3, causal="top_left", window=(0, None))[0, 0].astype(int).tolist()
    [[1, 0, 0], [0, 1, 0]]
    >>> visible(4, 4, causal=True, chunk=2)[0, 0].astype(int).tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    """
    key = np.arange(seqlen_k).reshape(1, 1, 1, -1)
    aligned = diagonal(seqlen_q, seqlen_k, causal, diagonal_offset)
    seen = np.ones((1, 1, seqlen_q, seqlen_k), dtype=bool)
    if causal:
        seen = seen & (key <= aligned)
    left, right = window if window is not None else (None, None)
    if left is not None:
        seen = seen & (key >= aligned - left)
    if right is not None:
        seen = seen & (key <= aligned + right)
    if chunk is not None:
        seen = seen & (key // chunk == aligned // chunk)
    if mask is not None:
        seen = seen & np.asarray(mask, dtype=bool)
    return np.asarray(seen)
