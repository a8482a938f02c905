"""Where the queries and keys of each sequence are: lengths, packed queries, block tables, and every check of them.

What the host can see (lists and NumPy arrays) is checked by value before anything runs. What is on a device stays
there, unseen unless ``CUATTN_CHECK`` is set: the kernels cut lengths that are out of range, and keys on pages that do
not exist are zeros to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuattn import environment
from cuattn.errors import ArgumentError, DTypeError, ShapeError
from cuattn.ops.attention.sequences import check_cu_seqlens, check_max_seqlen
from cuattn.runtime.executor import Executor
from cuattn.scalars import integer

__all__ = [
    "MAX_SPLITS",
    "Integers",
    "check_num_splits",
    "check_packed_queries",
    "check_pages",
    "check_seqlens_k",
    "integers",
]

MAX_SPLITS = 2**16


@dataclass(frozen=True, slots=True, eq=False)
class Integers:
    """Integer metadata: the array as it lies, what may be planned with, and what may be looked at for errors.

    ``known`` is None for an array on a device; ``seen`` is not, where ``CUATTN_CHECK`` asks to look at such.
    """

    array: Any
    known: NDArray[np.signedinteger[Any]] | None
    seen: NDArray[np.signedinteger[Any]] | None


def integers(executor: Executor, name: str, x: Any, batch: int | None, rank: int, layout: str) -> Integers:
    """Check integer metadata of ``rank`` axes, the first of extent ``batch`` if that is not None.

    Raises `ArrayTypeError`, `DTypeError` or `ShapeError`, whose message shows the ``layout``.
    """
    x = executor.metadata(name, x)
    on_host = isinstance(x, np.ndarray)
    if on_host and x.size == 0 and x.dtype == np.float64:  # a list without elements
        x = x.astype(np.int32)
    if x.dtype.kind not in "iu" if on_host else x.dtype != np.int32:
        needed = "integers are needed" if on_host else "int32 is needed on a device"
        raise DTypeError(f"{name} has dtype {x.dtype}; {needed}")
    if x.ndim != rank or (batch is not None and x.shape[0] != batch):
        known = "" if batch is None else f", with batch {batch}"
        raise ShapeError(f"{name} has shape {list(x.shape)}; {layout} is needed{known}")
    if on_host:
        return Integers(x, x, x)
    return Integers(x, None, x.get() if environment.check() else None)


def check_seqlens_k(executor: Executor, x: Any, batch: int, capacity: int) -> Integers:
    """Check the number of keys of every sequence: int32 [batch] where kernels read it, int64 where the host does."""
    given = integers(executor, "seqlens_k", x, batch, 1, "[batch]")
    array = executor.put(given.array, np.int32)
    if given.seen is None:
        return Integers(array, None, None)
    seen = given.seen.astype(np.int64)
    if batch and int(seen.view(np.uint64).max()) > capacity:  # as unsigned numbers, negative ones are large
        at = int(np.argmax((seen < 0) | (seen > capacity)))
        raise ArgumentError(f"seqlens_k[{at}] is {given.seen[at]}; the cache holds 0 to {capacity} keys a sequence")
    return Integers(array, None if given.known is None else seen, seen)


def check_packed_queries(
    executor: Executor, cu_seqlens_q: Any, max_seqlen_q: Any, total: int
) -> tuple[Integers, int | None]:
    """Check where the queries of each sequence lie, and find the most of one sequence.

    The first is int32 [batch + 1] where kernels read it, and how many each has, [batch], where the host does.
    """
    given = integers(executor, "cu_seqlens_q", cu_seqlens_q, None, 1, "[batch + 1]")
    if not given.array.size:
        raise ShapeError("cu_seqlens_q has shape [0]; [batch + 1] is needed")
    limit = check_max_seqlen("max_seqlen_q", max_seqlen_q)
    array = executor.put(given.array, np.int32)
    if given.seen is None:
        return Integers(array, None, None), limit
    seen = given.seen.astype(np.int64)
    longest = check_cu_seqlens("cu_seqlens_q", seen, total, "max_seqlen_q", limit)
    lengths = np.diff(seen)
    if given.known is None:
        return Integers(array, None, lengths), limit
    return Integers(array, lengths, lengths), longest


def check_pages(
    tables: NDArray[np.signedinteger[Any]], seqlens_k: NDArray[np.int64], num_pages: int, page_size: int
) -> None:
    """Raise `ArgumentError` if a page with a key of a sequence does not exist. Entries behind are not looked at.

    >>> check_pages(np.array([[0, 1, -7], [1, -7, 99]], np.int32), np.array([20, 5]), 2, 16)
    """
    if not tables.size:
        return
    num_used = -(-seqlens_k // page_size)
    most = int(num_used.max())
    used = tables[:, :most]
    # As above, one comparison sees both ends.
    pages = used.view(np.uint32) if used.dtype == np.int32 else used.astype(np.int64).view(np.uint64)
    if not most or int(pages.max()) < num_pages:
        return
    wrong = (pages >= num_pages) & (np.arange(most) < num_used[:, None])
    if wrong.any():
        b, i = (int(n) for n in np.argwhere(wrong)[0])
        raise ArgumentError(
            f"block_tables[{b}, {i}] is {tables[b, i]}, a page that the {seqlens_k[b]} keys of sequence {b} need; "
            f"there are the pages 0 to {num_pages - 1}"
        )


def check_num_splits(value: Any) -> int | None:
    """Check the number of parts that the keys of each sequence are split into, or None."""
    return None if value is None else integer("num_splits", value, 1, MAX_SPLITS, optional=True)
