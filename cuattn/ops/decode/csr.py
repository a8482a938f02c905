"""Block tables from and to the compressed rows of FlashInfer: the pages of all sequences in one list.

Zihao Ye et al., "FlashInfer: efficient and customizable attention engine for LLM inference serving", 2025
(arXiv:2501.01005).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuattn.errors import ArgumentError, DTypeError, ShapeError
from cuattn.runtime.executor import executor_for
from cuattn.scalars import MAX_EXTENT, integer

__all__ = ["block_tables_from_csr", "csr_from_block_tables"]


def block_tables_from_csr(indptr: Any, indices: Any, last_page_len: Any, page_size: int) -> tuple[Any, Any]:
    """Make block tables and lengths of sequences whose pages are listed one after another.

    Parameters
    ----------
    indptr : integers [batch + 1]
        Sequence b has the pages indices[indptr[b]] to indices[indptr[b + 1] - 1]. It begins with 0, ascends, and ends
        with the number of ``indices``.
    indices : integers [num_indices]
        Pages, none negative.
    last_page_len : integers [batch]
        Used slots of each sequence's last page, 1 to ``page_size``. A sequence without pages has 0 keys; its entry is
        0, or anything up to ``page_size``.
    page_size : int
        Slots of a page.

    All three are lists or arrays. Their values decide a shape, so arrays on a GPU are waited for, once: make the tables
    when sequences change, not in every layer.

    Returns
    -------
    block_tables : int32 [batch, max_pages]
        For `cuattn.paged_attention`; max_pages is that of the longest sequence, and what is not used is -1.
    seqlens_k : int32 [batch]
        NumPy arrays, or arrays on the GPU if ``indices`` is there.

    Raises
    ------
    ArrayTypeError, DTypeError, ShapeError
        An argument is no array of integers of the shape above, or ``indptr`` and ``last_page_len`` do not fit.
    ArgumentError
        ``indptr`` that descends, does not begin with 0 or does not end with the number of indices; a negative page; a
        ``last_page_len`` that is negative, above ``page_size``, or 0 for a sequence with pages; a ``page_size`` below
        1; a sequence of 2^31 keys.

    Examples
    --------
    >>> import cuattn
    >>> tables, lengths = cuattn.block_tables_from_csr([0, 2, 3], [7, 4, 5], [3, 16], page_size=16)
    >>> tables
    array([[ 7,  4],
           [ 5, -1]], dtype=int32)
    >>> lengths
    array([19, 16], dtype=int32)
    """
    page_size = integer("page_size", page_size, 1, MAX_EXTENT)
    starts = _host_integers("indptr", indptr, 1)
    pages = _host_integers("indices", indices, 1)
    last = _host_integers("last_page_len", last_page_len, 1)
    if not starts.size:
        raise ShapeError("indptr has shape [0]; [batch + 1] is needed")
    if last.size != starts.size - 1:
        raise ShapeError(f"last_page_len has shape {list(last.shape)}; indptr has {starts.size} entries, batch + 1")
    if starts[0] != 0:
        raise ArgumentError(f"indptr[0] is {starts[0]}; the first sequence begins at 0")
    descends = starts[1:] < starts[:-1]  # a difference may overflow
    if descends.any():
        at = int(np.argmax(descends))
        raise ArgumentError(f"indptr descends from {starts[at]} to {starts[at + 1]} at index {at + 1}; it must ascend")
    if starts[-1] != pages.size:
        raise ArgumentError(f"indptr ends at {starts[-1]}; there are {pages.size} indices")
    num_pages = np.diff(starts)
    _check_range("indices", pages, 0, MAX_EXTENT, "pages are")
    wrong = (last < (num_pages > 0)) | (last > page_size)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise ArgumentError(
            f"last_page_len[{at}] is {last[at]}; a sequence of {num_pages[at]} pages of {page_size} slots has "
            f"{min(1, num_pages[at])} to {page_size} keys on its last page"
        )
    seqlens = np.where(num_pages > 0, (num_pages - 1) * page_size + last, 0)
    _check_range("seqlens_k", seqlens, 0, MAX_EXTENT, "the lengths of sequences are")
    tables = np.full((num_pages.size, int(num_pages.max(initial=0))), -1, np.int32)
    tables[np.arange(tables.shape[1]) < num_pages[:, None]] = pages
    return _where(indices, tables), _where(indices, seqlens.astype(np.int32))


def csr_from_block_tables(block_tables: Any, seqlens_k: Any, page_size: int) -> tuple[Any, Any, Any]:
    """List the pages of all sequences one after another: the reverse of `block_tables_from_csr`.

    Parameters
    ----------
    block_tables : integers [batch, max_pages]
        The pages of each sequence; entries behind ceil(seqlens_k / page_size) are not looked at.
    seqlens_k : integers [batch]
        Keys of each sequence, 0 to max_pages * page_size.
    page_size : int
        Slots of a page.

    Both are lists or arrays; arrays on a GPU are waited for, since values decide a shape.

    Returns
    -------
    indptr : int32 [batch + 1]
    indices : int32 [num_indices]
    last_page_len : int32 [batch]
        1 to ``page_size``; 0 for a sequence without keys. NumPy arrays, or arrays on the GPU if ``block_tables`` is
        there.

    Raises
    ------
    ArrayTypeError, DTypeError, ShapeError
        An argument is no array of integers of the shape above.
    ArgumentError
        A length that is negative or beyond the table, a negative page within it, a ``page_size`` below 1.

    Examples
    --------
    >>> import cuattn
    >>> indptr, indices, last_page_len = cuattn.csr_from_block_tables([[7, 4], [5, -1]], [19, 16], page_size=16)
    >>> indptr.tolist(), indices.tolist(), last_page_len.tolist()
    ([0, 2, 3], [7, 4, 5], [3, 16])
    """
    page_size = integer("page_size", page_size, 1, MAX_EXTENT)
    tables = _host_integers("block_tables", block_tables, 2)
    seqlens = _host_integers("seqlens_k", seqlens_k, 1)
    if seqlens.size != tables.shape[0]:
        raise ShapeError(f"seqlens_k has shape {list(seqlens.shape)}; block_tables has {tables.shape[0]} rows")
    _check_range("seqlens_k", seqlens, 0, tables.shape[1] * page_size, "the tables have room for")
    num_pages = -(-seqlens // page_size)
    indptr = np.concatenate([[0], np.cumsum(num_pages)])
    _check_range("indptr", indptr[-1:], 0, MAX_EXTENT, "numbers of indices are")
    used = np.arange(tables.shape[1]) < num_pages[:, None]
    wrong = used & ((tables < 0) | (tables > MAX_EXTENT))
    if wrong.any():
        b, i = (int(n) for n in np.argwhere(wrong)[0])
        raise ArgumentError(
            f"block_tables[{b}, {i}] is {tables[b, i]}, a page that the {seqlens[b]} keys of sequence {b} need; pages "
            f"are 0 to {MAX_EXTENT}"
        )
    last = np.where(num_pages > 0, seqlens - (num_pages - 1) * page_size, 0)
    return tuple(_where(block_tables, x.astype(np.int32)) for x in (indptr, tables[used], last))


def _host_integers(name: str, x: Any, rank: int) -> NDArray[np.int64]:
    """Return a copy on the host, as int64."""
    executor = executor_for() if isinstance(x, list | tuple) else executor_for(**{name: x})
    x = executor.metadata(name, x)
    if not isinstance(x, np.ndarray):
        x = x.get()
    if x.size == 0 and x.dtype == np.float64:  # a list without elements
        x = x.astype(np.int64)
    if x.dtype.kind not in "iu":
        raise DTypeError(f"{name} has dtype {x.dtype}; integers are needed")
    if x.ndim != rank:
        raise ShapeError(f"{name} has shape {list(x.shape)}, rank {x.ndim}; rank {rank} is needed")
    return x.astype(np.int64)  # what is too large for it becomes negative, which no argument may be


def _check_range(name: str, values: NDArray[np.int64], low: int, high: int, what: str) -> None:
    wrong = (values < low) | (values > high)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise ArgumentError(f"{name}[{at}] is {values[at]}; {what} {low} to {high}")


def _where(like: Any, x: NDArray[np.int32]) -> Any:
    """Return ``x`` on the GPU that ``like`` is on, or itself."""
    if isinstance(like, list | tuple):
        return x
    return executor_for(like=like).put(x, np.int32)
