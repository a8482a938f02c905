"""Block masks as sparse matrices of scipy, and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuattn.errors import ArrayTypeError, DTypeError, ShapeError
from cuattn.ops.sparse.block_lists import BlockLists, listed
from cuattn.ops.sparse.block_mask_arguments import block_size_pair, check_grid, seqlen

__all__ = ["extents", "flattened", "read", "write"]


def flattened(matrix: Any) -> tuple[tuple[int, ...], list[Any]]:
    """Return the leading axes of a matrix or of nested sequences of matrices, and the matrices in one list."""
    import scipy.sparse

    if scipy.sparse.issparse(matrix):
        if len(matrix.shape) != 2:
            raise ShapeError(f"matrix has shape {list(matrix.shape)}; two axes are needed")
        if matrix.dtype.kind not in "biuf":
            raise DTypeError(f"matrix has dtype {matrix.dtype}; bool, integer and float types are allowed")
        return (), [matrix]
    if not isinstance(matrix, list | tuple):
        raise ArrayTypeError(f"matrix is a {type(matrix).__name__}; a sparse matrix of scipy or a sequence is needed")
    if not matrix:
        raise ShapeError("matrix is an empty sequence; a matrix for each head is needed")
    parts = [flattened(entry) for entry in matrix]
    leading = parts[0][0]
    if len(leading) > 1 or any(other != leading for other, _ in parts):
        raise ShapeError("matrix is neither a sequence of a matrix a head nor one of such a sequence a batch entry")
    return (len(matrix), *leading), [one for _, ones in parts for one in ones]


def extents(
    matrices: list[Any], seqlen_q: Any, seqlen_k: Any, block_size: Any
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the lengths and the block size that the matrices and the arguments say; raises where they differ."""
    first = matrices[0]
    by_elements = first.format == "bsr"
    own = tuple(map(int, first.blocksize)) if by_elements else (64, 64)
    size = own if block_size is None else block_size_pair(block_size)
    for index, matrix in enumerate(matrices):
        if (matrix.format == "bsr") != by_elements or matrix.shape != first.shape:
            raise ShapeError(
                f"matrix {index} has shape {list(matrix.shape)} and format {matrix.format}; the first has "
                f"{list(first.shape)} and {first.format}"
            )
        if by_elements and tuple(matrix.blocksize) != size:
            raise ShapeError(f"matrix {index} has blocks of {tuple(matrix.blocksize)}; {size} are needed")
    whole = first.shape if by_elements else tuple(n * b for n, b in zip(first.shape, size, strict=True))
    given = (("seqlen_q", seqlen_q), ("seqlen_k", seqlen_k))
    q, k = (int(n) if x is None else seqlen(name, x) for (name, x), n in zip(given, whole, strict=True))
    blocks = tuple(n // b for n, b in zip(whole, size, strict=True))
    check_grid("matrix, in blocks," if by_elements else "matrix", blocks, (q, k), size)  # type: ignore[arg-type]
    return (q, k), size  # type: ignore[return-value]


def read(
    matrices: list[Any], grid: tuple[int, int], block_size: tuple[int, int]
) -> tuple[BlockLists, NDArray[np.bool_] | None]:
    """Return the kept blocks of all matrices, and for the format "bsr" their elements."""
    counts, indices, elements = [], [], []
    for matrix in matrices:
        rows, columns, tiles = _kept(matrix)
        counts.append(np.bincount(rows, minlength=grid[0]))
        indices.append(columns)
        elements.append(tiles)
    lists = listed(np.concatenate(counts), np.concatenate(indices))
    if matrices[0].format != "bsr":
        return lists, None
    return lists, np.concatenate(elements).reshape(-1, *block_size)


def _kept(matrix: Any) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.bool_]]:
    """Return row and column of each block that has something nonzero, in the order of rows, and what it has."""
    if matrix.format != "bsr":
        matrix = matrix.tocsr()
    if not matrix.has_canonical_format:  # unsorted, or listed twice: that is the sum, as everywhere in scipy
        matrix = matrix.copy()
        matrix.sum_duplicates()
    nonzero = np.asarray(matrix.data != 0)
    used = nonzero.any(axis=(1, 2)) if nonzero.ndim > 1 else nonzero
    rows = np.repeat(np.arange(matrix.indptr.size - 1), np.diff(matrix.indptr))
    return rows[used], matrix.indices[used], nonzero[used]


def write(
    indptr: NDArray[np.int32],
    indices: NDArray[np.int32],
    elements: NDArray[np.bool_] | None,
    grid: tuple[int, int],
    block_size: tuple[int, int],
) -> Any:
    """Make an array of scipy of each [nq + 1] of ``indptr``, in lists as its other axes are."""
    import scipy.sparse

    if indptr.ndim > 1:
        return list(_each(indptr, indices, elements, grid, block_size))
    kept = slice(int(indptr[0]), int(indptr[-1]))
    own, starts = indices[kept].copy(), indptr - indptr[0]
    if elements is None:
        return scipy.sparse.csr_array((np.ones(own.size, bool), own, starts), shape=grid)
    shape = grid[0] * block_size[0], grid[1] * block_size[1]
    return scipy.sparse.bsr_array((elements[kept].copy(), own, starts), shape=shape, blocksize=block_size)


def _each(indptr: NDArray[np.int32], *others: Any) -> Iterator[Any]:
    return (write(starts, *others) for starts in indptr)
