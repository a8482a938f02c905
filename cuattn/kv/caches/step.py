"""One step of a model over some sequences of a paged cache: reserve, append and attend in every layer, commit."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from cuattn.errors import ShapeError, StepError
from cuattn.kv.caches.books import OpenStep, Unique
from cuattn.kv.caches.sequence import Sequence
from cuattn.scalars import integer

if TYPE_CHECKING:
    from cuattn.kv.caches.paged import PagedKVCache

__all__ = ["Step", "block_tables", "own_copy"]


def own_copy(name: str) -> cached_property[np.ndarray]:
    """Property: an array of a step, copied for the caller, who may write into it without effect on the cache."""
    return cached_property(lambda step: getattr(step, name).copy())


class Step(Unique):
    """The tokens that are added to some sequences at once; made by `PagedKVCache.reserve`.

    Its T tokens are packed: those of the first sequence, then those of the second, and so on. Everything that the
    layers share, such as page tables and slots, is made once, when the step is. Usable as a context manager: leaving it
    by an exception aborts the step. A step that nobody has any more, because an exception came before ``reserve`` could
    return it, is aborted by the next call of its cache. It cannot be copied or pickled.

    Attributes
    ----------
    sequences : tuple of Sequence
    num_tokens : int
        T, the tokens of the step.
    counts : int64 array [B]
        Tokens of the step in each sequence.
    cu_seqlens : int32 array [B + 1]
        The first token of each sequence in the packed ones, and T behind the last.
    seqlens_k : int32 array [B]
        Tokens of each sequence with those of the step.
    positions : int64 array [T]
        Of each token in its sequence.
    slot_mapping : int64 array [T]
        Where each token goes: page * page_size + slot.
    block_tables : int32 array [B, max_pages]
        The page tables; -1 behind the last page of a sequence. All arrays here are NumPy arrays, and the caller's own:
        what is written into them changes nothing.
    is_open : bool
        Neither committed nor aborted yet.

    Examples
    --------
    >>> import numpy as np
    >>> import cuattn
    >>> cache = cuattn.PagedKVCache(8, 4, num_layers=1, num_kv_heads=1, head_dim=32, dtype="float32")
    >>> first, second = cache.add(), cache.add()
    >>> step = cache.reserve([first, second], [5, 2])
    >>> step.slot_mapping, step.block_tables.tolist()
    (array([0, 1, 2, 3, 4, 8, 9]), [[0, 1], [2, -1]])
    >>> step.abort()
    >>> cache.stats().used
    0
    """

    counts = own_copy("_counts")
    cu_seqlens = own_copy("_cu_seqlens")
    seqlens_k = own_copy("_seqlens_k")
    positions = own_copy("_positions")
    slot_mapping = own_copy("_slot_mapping")
    block_tables = own_copy("_block_tables")

    def __init__(self, cache: Any, opened: OpenStep) -> None:
        self._cache: PagedKVCache = cache
        self._opened = opened
        self._appended, self._reservation = opened._appended, opened._reservation
        self.sequences = opened.sequences
        self._counts = np.array(opened.counts, np.int64)
        self._cu_seqlens = np.zeros(len(self.sequences) + 1, np.int32)
        np.cumsum(self._counts, out=self._cu_seqlens[1:])
        self.num_tokens = int(self._cu_seqlens[-1])
        self._lay_out()

    def _lay_out(self) -> None:
        """Work out where each token goes, and what it sees."""
        seqs, page_size = self._opened.sequences, self._cache.page_size
        lengths = np.array([seq._length for seq in seqs], np.int64)
        self._seqlens_k = (lengths + self._counts).astype(np.int32)
        self._block_tables = block_tables(seqs)
        owner = np.repeat(np.arange(len(seqs)), self._counts)
        self._positions = np.arange(len(owner)) - self._cu_seqlens[:-1].astype(np.int64)[owner] + lengths[owner]
        page_idx, slot = np.divmod(self._positions, page_size)
        self._slot_mapping = self._block_tables[owner, page_idx].astype(np.int64) * page_size + slot
        put = self._cache._storage.executor.put  # once, for all layers
        self._slots, self._places = put(self._slot_mapping, np.int64), put(self._positions, np.int64)
        self._tables = put(self._block_tables, np.int32)

    @property
    def is_open(self) -> bool:
        self._cache._look()
        return self._opened.is_open

    def append(self, layer: int, k: Any, v: Any, *, rope: Any = None, positions: Any = None) -> None:
        """Write the step's keys and values of one layer into the cache; once for each layer.

        Parameters
        ----------
        layer : int
        k : array [T, kv_heads, head_dim]
        v : array [T, kv_heads, head_dim_v]
            Arrays of the kind that the cache was made with; quantized on their way if the cache is.
        rope : Rotary, optional
            Turns the keys on their way.
        positions : integers [T], optional
            For ``rope``; those of the tokens in their sequences by default.

        Raises
        ------
        StepError
            The step is over, or has the layer already.
        ArgumentError
            There is no such layer.
        CuattnError
            Whatever `append_kv` does not accept. Nothing is written then, and the layer can still be appended.
        """
        from cuattn.kv import append, arguments

        layer = self._check(layer)
        if layer in self._appended:
            raise StepError(f"layer {layer} has been appended in this step already")
        self._check_rows("k", k)
        if rope is not None and positions is None:
            positions = self._places
        pages = self._cache._storage.layers[layer]
        problem = arguments.check(k, v, slot_mapping=self._slots, positions=positions, rope=rope, **pages)
        self._opened.is_written = True  # from here on something may be, whatever happens
        append.write(problem)
        self._appended.add(layer)

    def attend(self, layer: int, q: Any, **options: Any) -> Any:
        """Attend from the step's tokens to all tokens of their sequences, in one layer.

        Parameters
        ----------
        layer : int
            One that has been appended.
        q : array [T, heads, head_dim], or [B, N, heads, head_dim] if every sequence has N tokens in the step
        **options
            As for `paged_attention`: the options of attention, ``causal`` being True by default, and ``rope``,
            ``rotate_keys``, ``num_splits``, ``plan``, ``out``, ``workspace``, ``return_lse``. A ``plan`` is one with
            ``cu_seqlens_q`` for a packed ``q``; without one, the layers of a step share what was planned for the first
            of them.

        Returns
        -------
        out, lse
            As of `paged_attention_varlen`, or of `paged_attention` for a ``q`` with four axes.

        Raises
        ------
        StepError
            The step is over, or the layer has not been appended.
        CuattnError
            Whatever `paged_attention` does not accept.
        """
        layer = self._check(layer)
        if layer not in self._appended:
            raise StepError(f"layer {layer} must be appended before it is attended to")
        arrays = self._cache._storage.layers[layer]
        if getattr(q, "ndim", 0) != 4:
            self._check_rows("q", q)
            return self._attend_packed(q, arrays, options)
        if (self._counts != q.shape[1]).any() or len(self._counts) != q.shape[0]:
            raise ShapeError(
                f"q has shape {tuple(q.shape)}; the step has {len(self._counts)} sequences with "
                f"{self._counts.tolist()} tokens: [{self.num_tokens}, heads, head_dim] fits"
            )
        return self._attend_batch(q, arrays, options)

    def commit(self) -> None:
        """Make the step's tokens part of their sequences.

        Pages that are full now, whose tokens are known, can be found by other sequences from here on.

        Raises
        ------
        StepError
            The step is over, or a layer has not been appended; the step stays open then.
        """
        self._cache._commit(self)

    def abort(self) -> None:
        """Forget the step: the sequences are as they were before it, and its pages are given back.

        What the cache gave up to make room stays given up: evicted pages, and the prefix of a page that was written.

        Raises
        ------
        StepError
            The step is over.
        """
        self._cache._abort(self)

    def __enter__(self) -> Step:
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if kind is not None and self.is_open:
            try:
                self.abort()
            except BaseException:  # an interrupt, which undid the abort: nobody is left to call it again
                if self.is_open:
                    self.abort()
                raise

    def __repr__(self) -> str:
        state = "open" if self.is_open else "over"
        return f"Step({self.num_tokens} tokens of {len(self.sequences)} sequences, {state})"

    def _attend_packed(self, q: Any, arrays: dict[str, Any], options: dict[str, Any]) -> Any:
        """Attend as `attend`, for q [T, heads, head_dim]."""
        from cuattn.ops.decode.paged import paged_attention_varlen

        if self.num_tokens and (self._counts == 1).all() and options.get("plan") is None:
            # One token each: a batch, which needs no list of who works on what.
            if options.get("out") is not None:
                options["out"] = options["out"][:, None]
            found = self._attend_batch(q[:, None], arrays, options)
            return (found[0][:, 0], found[1][:, :, 0].T) if options.get("return_lse") else found[:, 0]
        own: dict[str, Any] = {"cu_seqlens_q": self._cu_seqlens, "max_seqlen_q": int(self._counts.max(initial=0))}
        own |= {"block_tables": self._tables, "seqlens_k": self._seqlens_k}
        return paged_attention_varlen(q, **own, **arrays, **options)

    def _attend_batch(self, q: Any, arrays: dict[str, Any], options: dict[str, Any]) -> Any:
        """Attend as `attend`, for q [B, N, heads, head_dim]."""
        from cuattn.ops.decode.paged import paged_attention

        return paged_attention(q, block_tables=self._tables, seqlens_k=self._seqlens_k, **arrays, **options)

    def _check(self, layer: Any) -> int:
        self._cache._look()
        self._opened.check_open(self)
        return integer("layer", layer, 0, self._cache.num_layers - 1)

    def _check_rows(self, name: str, x: Any) -> None:
        shape = getattr(x, "shape", None)
        if isinstance(shape, tuple) and (len(shape) != 3 or shape[0] != self.num_tokens):
            raise ShapeError(f"{name} has shape {tuple(shape)}; [{self.num_tokens}, heads, head_dim] is needed")


def block_tables(seqs: Collection[Sequence]) -> np.ndarray:
    """Return the page tables of sequences, one a row, with -1 behind the last page."""
    tables = np.full((len(seqs), max((len(seq._pages) for seq in seqs), default=0)), -1, np.int32)
    for row, seq in zip(tables, seqs, strict=True):
        row[: len(seq._pages)] = seq._pages
    return tables
