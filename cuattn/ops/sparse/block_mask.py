"""`BlockMask`: which blocks of keys each block of queries attends to, and what is visible inside of them.

Scott Gray, Alec Radford and Diederik P. Kingma, "GPU kernels for block-sparse weights", 2017; Rewon Child et al.,
"Generating long sequences with sparse transformers", 2019 (arXiv:1904.10509).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuattn.allocation import allocating
from cuattn.errors import ShapeError
from cuattn.ops.sparse import block_lists, scipy_matrices
from cuattn.ops.sparse.block_lists import BlockLists
from cuattn.ops.sparse.block_mask_arguments import (
    block_size_pair,
    boolean,
    check_csr,
    check_grid,
    integers,
    num_blocks,
    seqlen,
)
from cuattn.ops.sparse.compressed import CompressedMask
from cuattn.ops.sparse.picture import picture
from cuattn.ops.sparse.tile_list import Side, num_tiles

__all__ = ["BlockMask"]

_GRID_AXES = "[nq, nk], [heads or 1, nq, nk] or [batch or 1, heads or 1, nq, nk]"


class BlockMask(CompressedMask):
    """A mask of blocks: immutable, held as compressed lists of the kept blocks; made by one of the methods ``from_*``.

    Query i lies in block I = i // bq, key j in block J = j // bk; the key is visible to the query if the mask keeps
    block (I, J) and, where there are ``elements``, if the element of that block says so. Nothing of N x M is held, and
    what kernels read is copied to a GPU once: one mask serves all layers and calls, from several threads.

    Masks of the same lengths and block sizes are combined by ``&`` and ``|``, inverted by ``~`` and transposed by
    ``.T``; an axis of batch or heads that is 1 or missing stands for every entry. Masks are equal if they have the same
    shape and block size, keep the same blocks and show the same elements of them.

    Attributes
    ----------
    shape : tuple of int
        [N, M], [heads or 1, N, M] or [batch or 1, heads or 1, N, M], as the mask was made.
    block_size : (int, int)
        (bq, bk): queries and keys of a block.
    elements : read-only bool array [nnz, bq, bk], or None
        What is visible in each kept block, in the order of ``indices``; None where everything is.
    """

    @classmethod
    def from_blocks(
        cls, blocks: Any, seqlen_q: int, seqlen_k: int, block_size: Any = 64, elements: Any = None
    ) -> BlockMask:
        """Make a mask of a grid that says which blocks are kept.

        Parameters
        ----------
        blocks : array of bool or of integers, [nq, nk], [heads or 1, nq, nk] or [batch or 1, heads or 1, nq, nk]
            Whether block (I, J) is kept; nq = ceil(N / bq), nk = ceil(M / bk).
        seqlen_q, seqlen_k : int
            N and M.
        block_size : int or (int, int)
            (bq, bk), any sizes of at least 1; one number for both.
        elements : array of bool or of integers [nnz, bq, bk], optional
            What is visible in each kept block, in the order of ``numpy.nonzero(blocks)``. What lies beyond the last
            query or key does not count. It is copied.

        Raises
        ------
        ArrayTypeError, DTypeError
            Not an array of the CPU, or a list, of booleans or integers.
        ShapeError
            A grid of another shape than the lengths need, elements of another shape, or more blocks than int32 counts.
        ArgumentError
            ``block_size`` below 1, or a length below 0.

        Examples
        --------
        >>> import cuattn
        >>> mask = cuattn.BlockMask.from_blocks([[1, 0], [1, 1]], 4, 3, block_size=2)
        >>> mask.todense().astype(int)
        array([[1, 1, 0],
               [1, 1, 0],
               [1, 1, 1],
               [1, 1, 1]])
        """
        seqlens, size = (seqlen("seqlen_q", seqlen_q), seqlen("seqlen_k", seqlen_k)), block_size_pair(block_size)
        grid = boolean("blocks", blocks, range(2, 5), _GRID_AXES)
        check_grid("blocks", grid.shape, seqlens, size)
        lists = block_lists.by_query(_four_axes(grid))
        return cls._of((*grid.shape[:-2], *seqlens), size, lists, _elements(elements, lists, size))

    @classmethod
    def from_dense(cls, mask: Any, block_size: Any = 64) -> BlockMask:
        """Make a mask of one by elements: the blocks in which something is visible, with their elements if needed.

        Parameters
        ----------
        mask : array of bool or of integers, [N, M], [heads or 1, N, M] or [batch or 1, heads or 1, N, M]
            Whether query i sees key j.
        block_size : int or (int, int)
            As for `from_blocks`.

        Raises
        ------
        ArrayTypeError, DTypeError, ShapeError, ArgumentError
            As for `from_blocks`.

        Examples
        --------
        >>> import numpy as np
        >>> import cuattn
        >>> cuattn.BlockMask.from_dense(np.tri(6, dtype=bool), block_size=2)
        BlockMask(6 x 6 in blocks of 2 x 2, nnz=6, density=0.667, elements)
        """
        (bq, bk), dense = block_size_pair(block_size), boolean("mask", mask, range(2, 5), _GRID_AXES)
        full = _four_axes(dense)
        batch, heads, n, m = full.shape
        nq, nk = num_blocks((n, m), (bq, bk))
        told = f"a mask of shape {list(dense.shape)} with block_size = {(bq, bk)}"
        with allocating(told, 2 * batch * heads * nq * bq * nk * bk):
            beyond = (0, nq * bq - n), (0, nk * bk - m)
            split = np.pad(full, ((0, 0), (0, 0), *beyond)).reshape(batch, heads, nq, bq, nk, bk)
            blocks = np.asarray(split.any(axis=(3, 5)))
            elements = split.transpose(0, 1, 2, 4, 3, 5)[blocks]
        return cls._of(dense.shape, (bq, bk), block_lists.by_query(blocks), elements)

    @classmethod
    def from_csr(
        cls, indptr: Any, indices: Any, seqlen_q: int, seqlen_k: int, block_size: Any = 64, elements: Any = None
    ) -> BlockMask:
        """Make a mask of compressed rows: the key blocks that each block of queries keeps.

        Parameters
        ----------
        indptr : integers [nq + 1], [heads or 1, nq + 1] or [batch or 1, heads or 1, nq + 1]
            Block I of the queries keeps indices[indptr[I]] to indices[indptr[I + 1] - 1]. The first is 0, the last the
            number of ``indices``; the lists of a head begin where those of the head before it end.
        indices : integers [nnz]
            Blocks of keys, ascending in each row, each once.
        seqlen_q, seqlen_k, block_size, elements
            As for `from_blocks`.

        Raises
        ------
        ArrayTypeError, DTypeError, ShapeError
            As for `from_blocks`; also ``indptr`` of another number of rows than the lengths need.
        ArgumentError
            Indices out of range, unsorted or repeated, or an ``indptr`` that does not fit them; and as above.

        Examples
        --------
        >>> import cuattn
        >>> cuattn.BlockMask.from_csr([0, 1, 3], [0, 0, 1], 128, 128).blocks.astype(int)
        array([[1, 0],
               [1, 1]])
        """
        seqlens, size = (seqlen("seqlen_q", seqlen_q), seqlen("seqlen_k", seqlen_k)), block_size_pair(block_size)
        starts = integers("indptr", indptr, range(1, 4), "[nq + 1], [heads, nq + 1] or [batch, heads, nq + 1]")
        kept = integers("indices", indices, range(1, 2), "[nnz]")
        grid = num_blocks(seqlens, size)
        check_csr(starts, kept, grid)
        lists = block_lists.listed(np.diff(starts, axis=-1).ravel(), kept)
        return cls._of((*starts.shape[:-1], *seqlens), size, lists, _elements(elements, lists, size))

    @classmethod
    def from_scipy(
        cls, matrix: Any, seqlen_q: int | None = None, seqlen_k: int | None = None, block_size: Any = None
    ) -> BlockMask:
        """Make a mask of sparse matrices of scipy.

        Parameters
        ----------
        matrix : sparse matrix or array of `scipy.sparse`, or a sequence of them a head, or of such a batch entry
            In the format "bsr", a mask by elements, [N, M] or to whole blocks: nonzero is visible, and its blocks are
            those of the mask. In any other, a grid [nq, nk] of blocks: nonzero is kept.
        seqlen_q, seqlen_k : int, optional
            N and M; by default all that the matrix covers.
        block_size : int or (int, int), optional
            By default that of a "bsr" matrix, and 64 for a grid.

        Raises
        ------
        ArrayTypeError
            Not a matrix of scipy, or a sequence of them.
        DTypeError
            A matrix of complex numbers or objects.
        ShapeError
            Blocks or a shape other than ``block_size``, the lengths, or the first matrix say.
        ArgumentError
            As for `from_blocks`.

        Examples
        --------
        >>> import cuattn, scipy.sparse
        >>> cuattn.BlockMask.from_scipy(scipy.sparse.eye_array(3, format="csr"))
        BlockMask(192 x 192 in blocks of 64 x 64, nnz=3, density=0.333)
        """
        leading, matrices = scipy_matrices.flattened(matrix)
        seqlens, size = scipy_matrices.extents(matrices, seqlen_q, seqlen_k, block_size)
        lists, elements = scipy_matrices.read(matrices, num_blocks(seqlens, size), size)
        return cls._of((*leading, *seqlens), size, lists, elements)

    @property
    def T(self) -> BlockMask:
        """The mask with queries and keys exchanged."""
        lists = self._key_lists
        elements = None if self.elements is None else self.elements[lists.order].swapaxes(1, 2).copy()
        shape = (*self.shape[:-2], self.seqlen_k, self.seqlen_q)
        return self._of(shape, self.block_size[::-1], BlockLists(lists.indptr.copy(), lists.indices.copy()), elements)

    def num_tiles(self, of_keys: bool, rows: int, columns: int) -> int:
        """Return how many tiles kernels visit if a CTA has so many rows: queries, or keys (`tile_list`)."""
        key = "number of tiles", of_keys, rows, columns
        with self._lock:
            if key not in self._tile_lists:
                self._tile_lists[key] = (num_tiles(self, Side(of_keys, rows, columns)),)
            return int(self._tile_lists[key][0])

    def todense(self) -> NDArray[np.bool_]:
        """Return the mask by elements, a new array of ``shape``: the one method that needs memory for N x M."""
        (bq, bk), (nq, nk) = self.block_size, self.grid
        with allocating(f"the elements of a mask of shape {list(self.shape)}", 3 * math.prod(self.shape)):
            if self.elements is None:
                return self.blocks[..., np.arange(self.seqlen_q)[:, None] // bq, np.arange(self.seqlen_k) // bk]
            full = np.zeros((self.batch, self.num_heads, nq, nk, bq, bk), bool)
            full[tuple(self._places)] = self.elements
            dense = full.swapaxes(3, 4).reshape(*self.shape[:-2], nq * bq, nk * bk)
            return np.ascontiguousarray(dense[..., : self.seqlen_q, : self.seqlen_k])

    def to_scipy(self) -> Any:
        """Return the mask as a sparse array of scipy, or as a list of one a head, or of such a list a batch entry.

        Without ``elements`` it is the grid [nq, nk] of the kept blocks, in the format "csr"; with them the mask by
        elements, in the format "bsr" and up to whole blocks. `from_scipy` takes both, with the lengths of this mask.
        """
        return scipy_matrices.write(self.indptr, self.indices, self.elements, self.grid, self.block_size)

    def show(self, *, width: int = 64, height: int = 32) -> None:
        """Print a picture of each head: a character for each block, or, of a large mask, for a group of blocks.

        A full block is ``#``, one that is seen in part ``+``, and what is not kept ``.``.

        Examples
        --------
        >>> import numpy as np
        >>> import cuattn
        >>> cuattn.BlockMask.from_dense(np.tri(6, dtype=bool), block_size=2).show()
        BlockMask(6 x 6 in blocks of 2 x 2, nnz=6, density=0.667, elements)
        +..
        #+.
        ##+
        """
        print(self)
        for text in picture(self._grid, self._places, self._shares, width=width, height=height):
            print(text)

    def __and__(self, other: BlockMask) -> BlockMask:
        return self._combined(other, np.logical_and)

    def __or__(self, other: BlockMask) -> BlockMask:
        return self._combined(other, np.logical_or)

    def __invert__(self) -> BlockMask:
        candidates = ~self.blocks.reshape(self._grid)
        elements = None
        if self.elements is not None:
            candidates[tuple(axis[self._shares < 1] for axis in self._places)] = True
            candidates, elements = block_lists.without_empty(candidates, ~self._tiles(candidates))
        return self._of(self.shape, self.block_size, block_lists.by_query(candidates), elements)

    def _combined(self, other: object, combine: np.ufunc) -> BlockMask:
        if not isinstance(other, BlockMask):
            return NotImplemented
        if (self.block_size, self.shape[-2:]) != (other.block_size, other.shape[-2:]):
            raise ShapeError(f"{self} and {other} are combined; lengths and block sizes must be the same")
        try:
            shape = np.broadcast_shapes(self.shape, other.shape)
        except ValueError as error:
            raise ShapeError(f"{self} and {other} are combined; heads or batch entries do not fit") from error
        kept: Any = combine(_four_axes(self.blocks), _four_axes(other.blocks))
        elements = None
        if self.elements is not None or other.elements is not None:
            kept, elements = block_lists.without_empty(kept, combine(self._tiles(kept), other._tiles(kept)))
        return self._of(shape, self.block_size, block_lists.by_query(kept), elements)


def _four_axes(x: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return x.reshape((1,) * (4 - x.ndim) + x.shape)


def _elements(elements: Any, lists: BlockLists, block_size: tuple[int, int]) -> NDArray[np.bool_] | None:
    """Return a copy of the elements of the kept blocks; raises `ShapeError` unless they are [nnz, bq, bk]."""
    if elements is None:
        return None
    given = boolean("elements", elements, range(3, 4), "[nnz, bq, bk]")
    needed = (lists.indices.size, *block_size)
    if given.shape != needed:
        raise ShapeError(f"elements has shape {list(given.shape)}; the mask keeps {needed[0]} blocks: {list(needed)}")
    return given.copy()
