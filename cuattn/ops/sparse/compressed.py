"""The compressed form of a block mask: lists of kept blocks, what is derived from them, and copies on devices."""

from __future__ import annotations

import sys
import threading
import zlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from cuattn.ops.sparse import block_lists
from cuattn.ops.sparse.block_lists import BlockLists, KeyLists, Places
from cuattn.ops.sparse.block_mask_arguments import num_blocks

if TYPE_CHECKING:
    from cuattn.runtime.executor import Executor

__all__ = ["CompressedMask"]


@dataclass(frozen=True, eq=False, repr=False)
class CompressedMask:
    """What a `BlockMask` holds, and what kernels ask of it; two are equal if they hold the same."""

    shape: tuple[int, ...]
    block_size: tuple[int, int]
    elements: NDArray[np.bool_] | None
    _lists: BlockLists
    _tile_lists: dict[Hashable, tuple[Any, ...]] = field(default_factory=dict)  # what `derived` keeps
    _lock: threading.RLock = field(default_factory=threading.RLock)  # what is derived may ask for what else is

    __array_ufunc__ = None  # so that NumPy leaves ``array & mask`` to this class, which refuses it

    @classmethod
    def _of(
        cls,
        shape: tuple[int, ...],
        block_size: tuple[int, int],
        lists: BlockLists,
        elements: NDArray[np.bool_] | None,
    ) -> Self:
        """Make a mask of checked lists and of elements in an array of their own, which are brought into one form."""
        mask = cls(shape, block_size, None, lists)
        for array in lists:
            array.flags.writeable = False
        if elements is not None:
            height, width = block_lists.inside(mask._places, shape[-2:], block_size)  # type: ignore[arg-type]
            elements &= np.arange(block_size[0])[:, None] < height[:, None, None]
            elements &= np.arange(block_size[1]) < width[:, None, None]
            if np.any(np.count_nonzero(elements, axis=(1, 2)) != height * width):
                elements.flags.writeable = False
                object.__setattr__(mask, "elements", elements)
        return mask

    @property
    def seqlen_q(self) -> int:
        """N, the number of queries."""
        return self.shape[-2]

    @property
    def seqlen_k(self) -> int:
        """M, the number of keys."""
        return self.shape[-1]

    @property
    def ndim(self) -> int:
        """The number of axes: 2, 3 with heads, 4 with batch entries."""
        return len(self.shape)

    @property
    def batch(self) -> int:
        """The number of batch entries that have masks of their own; 1 where one mask is for all."""
        return self.shape[0] if self.ndim == 4 else 1

    @property
    def num_heads(self) -> int:
        """The number of heads that have masks of their own; 1 where one mask is for all."""
        return self.shape[-3] if self.ndim > 2 else 1

    @property
    def grid(self) -> tuple[int, int]:
        """(nq, nk): the blocks that the queries and the keys go into."""
        return num_blocks((self.seqlen_q, self.seqlen_k), self.block_size)

    @property
    def nnz(self) -> int:
        """The number of kept blocks, of all heads and batch entries of the mask."""
        return int(self._lists.indices.size)

    @property
    def density(self) -> float:
        """The share of the blocks that are kept; 0 where there are none."""
        total = self.batch * self.num_heads * self.grid[0] * self.grid[1]
        return self.nnz / total if total else 0.0

    @property
    def indptr(self) -> NDArray[np.int32]:
        """Where the list of each block of queries begins, [..., nq + 1]: as `from_csr` takes it."""
        starts, nq = self._lists.indptr, self.grid[0]
        rows = np.arange(self.batch * self.num_heads)[:, None] * nq + np.arange(nq + 1)
        return np.asarray(starts[rows].reshape(*self.shape[:-2], nq + 1))

    @property
    def indices(self) -> NDArray[np.int32]:
        """The kept blocks of keys of each block of queries, ascending, [nnz]; read-only."""
        return self._lists.indices

    @property
    def blocks(self) -> NDArray[np.bool_]:
        """Whether each block is kept, [..., nq, nk]: a new array."""
        kept = np.zeros(self._grid, bool)
        kept[self._places] = True
        return kept.reshape(*self.shape[:-2], *self.grid)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CompressedMask):
            return NotImplemented
        if (self.shape, self.block_size) != (other.shape, other.block_size):
            return False
        pairs: list[tuple[Any, Any]] = [*zip(self._lists, other._lists, strict=True), (self.elements, other.elements)]
        return all(np.array_equal(one, two) for one, two in pairs)

    def __hash__(self) -> int:
        return hash((self.shape, self.block_size, *(zlib.crc32(x.data) for x in self._lists)))

    def __repr__(self) -> str:
        counts = {"batch": self.batch, "heads": self.num_heads}
        leading = "".join(f"{n} {name} x " for name, n in list(counts.items())[4 - self.ndim :])
        elements = "" if self.elements is None else ", elements"
        return (
            f"BlockMask({leading}{self.seqlen_q} x {self.seqlen_k} in blocks of {self.block_size[0]} x "
            f"{self.block_size[1]}, nnz={self.nnz}, density={self.density:.3f}{elements})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        elements = None if self.elements is None else self.elements.copy()
        return _restored, (type(self), self.shape, self.block_size, tuple(x.copy() for x in self._lists), elements)

    def derived(self, executor: Executor, key: Hashable, make: Callable[[], Sequence[NDArray[Any]]]) -> tuple[Any, ...]:
        """Return the arrays that ``make`` makes of the mask, where the executor's kernels read them.

        They are made once for each ``key`` and copied once to each device.
        """
        copies = self._tile_lists.get((executor, key))
        if copies is None:
            with self._lock:
                copies = self._tile_lists.get((executor, key))
                if copies is None:
                    made = self._tile_lists.get(key)
                    if made is None:
                        made = self._tile_lists[key] = tuple(make())
                    copies = tuple(executor.put(array, array.dtype) for array in made)
                    if executor.name == "cuda":  # once: later calls on other streams find them there
                        with executor.on_device():
                            sys.modules["cupy"].cuda.get_current_stream().synchronize()
                    self._tile_lists[executor, key] = copies
        return copies

    def query_lists(self, executor: Executor) -> BlockLists:
        """Return the lists of the blocks of queries where the executor's kernels read them."""
        return BlockLists(*self.derived(executor, "query lists", lambda: self._lists))

    def key_lists(self, executor: Executor) -> KeyLists:
        """Return the lists of the blocks of keys where the executor's kernels read them."""
        return KeyLists(*self.derived(executor, "key lists", lambda: self._key_lists))

    def elements_on(self, executor: Executor) -> Any:
        """Return ``elements`` where the executor's kernels read them; None where there are none."""
        elements = self.elements
        return None if elements is None else self.derived(executor, "elements", lambda: [elements])[0]

    @cached_property
    def _key_lists(self) -> KeyLists:
        return block_lists.by_key(self._lists, self._grid)

    @property
    def _grid(self) -> tuple[int, int, int, int]:
        return self.batch, self.num_heads, *self.grid

    @property
    def _places(self) -> Places:
        return block_lists.places(self._lists, self._grid)

    @property
    def _shares(self) -> NDArray[np.float64]:
        """How much of each kept block is visible."""
        if self.elements is None:
            return np.ones(self.nnz)
        height, width = block_lists.inside(self._places, (self.seqlen_q, self.seqlen_k), self.block_size)
        return np.asarray(np.count_nonzero(self.elements, axis=(1, 2)) / (height * width))

    def _tiles(self, blocks: NDArray[np.bool_]) -> NDArray[np.bool_]:
        at = Places(*np.nonzero(blocks))
        return block_lists.tiles(self._lists, self._grid, self.block_size, self.elements, at)


def _restored(
    kind: type[CompressedMask], shape: tuple[int, ...], block_size: tuple[int, int], lists: Any, elements: Any
) -> CompressedMask:
    """Make the copy of a mask that was pickled."""
    return kind._of(shape, block_size, BlockLists(*lists), elements)
