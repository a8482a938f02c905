"""One step of a model over some sequences of a paged cache: reserve, append and attend in every layer, commit."""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import TYPE_CHECKING, Any

import numpy as np

from cuattn.caches.reservation import Reservation
from cuattn.caches.sequence import Sequence
from cuattn.errors import ShapeError, StepError
from cuattn.scalars import integer

if TYPE_CHECKING:
    from cuattn.caches.paged import PagedKVCache

__all__ = ["Step"]


class Step:
    """The tokens that are added to some sequences at once; made by `PagedKVCache.reserve`.

    Its T tokens are packed: those of the first sequence, then those of the second, and so on. Everything that the
    layers share, such as page tables and slots, is made once, when the step is. Usable as a context manager: leaving it
    by an exception aborts the step.

    Attributes
    ----------
    sequences : tuple of Sequence
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
        The page tables; -1 behind the last page of a sequence. All arrays here are NumPy arrays.
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

    def __init__(
        self, cache: PagedKVCache, seqs: Items[Sequence], counts: Items[int], tokens: list[list[int]], done: Reservation
    ) -> None:
        self._cache = cache
        self._new_tokens = tokens
        self._reservation = done
        self._appended: set[int] = set()
        self.is_open = True
        self.sequences = tuple(seqs)
        self.counts = np.array(counts, np.int64)
        self.cu_seqlens = np.zeros(len(seqs) + 1, np.int32)
        np.cumsum(self.counts, out=self.cu_seqlens[1:])
        lengths = np.array([seq._length for seq in seqs], np.int64)
        self.seqlens_k = (lengths + self.counts).astype(np.int32)
        self.block_tables = block_tables(seqs)
        owner = np.repeat(np.arange(len(seqs)), self.counts)
        self.positions = np.arange(len(owner)) - self.cu_seqlens[:-1].astype(np.int64)[owner] + lengths[owner]
        page_idx, slot = np.divmod(self.positions, cache.page_size)
        self.slot_mapping = self.block_tables[owner, page_idx].astype(np.int64) * cache.page_size + slot
        put = cache._storage.executor.put  # once, for all layers
        self._slots, self._places = put(self.slot_mapping, np.int64), put(self.positions, np.int64)
        self._tables = put(self.block_tables, np.int32)

    @property
    def num_tokens(self) -> int:
        """T, the tokens of the step."""
        return int(self.cu_seqlens[-1])

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
        from cuattn.paging.append import append_kv

        layer = self._check(layer)
        if layer in self._appended:
            raise StepError(f"layer {layer} has been appended in this step already")
        self._check_rows("k", k)
        if rope is not None and positions is None:
            positions = self._places
        pages = self._cache._storage.layers[layer]
        append_kv(k, v, slot_mapping=self._slots, positions=positions, rope=rope, **pages)
        self._appended.add(layer)

    def attend(self, layer: int, q: Any, **options: Any) -> Any:
        """Attention of the step's tokens to all tokens of their sequences, in one layer.

        Parameters
        ----------
        layer : int
            One that has been appended.
        q : array [T, heads, head_dim], or [B, N, heads, head_dim] if every sequence has N tokens in the step
        **options
            As for `paged_attention`: ``scale``, ``causal`` (True by default), ``window``, ``softcap``,
            ``alibi_slopes``, ``sinks``, ``rope``, ``rotate_keys``, ``num_splits``, ``plan``, ``out``, ``workspace``,
            ``return_lse``. A ``plan`` is one with ``cu_seqlens_q`` for a packed ``q``; without one, the layers of a
            step share what was planned for the first of them.

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
        if (self.counts != q.shape[1]).any() or len(self.counts) != q.shape[0]:
            raise ShapeError(
                f"q has shape {tuple(q.shape)}; the step has {len(self.counts)} sequences with {self.counts.tolist()} "
                f"tokens: [{self.num_tokens}, heads, head_dim] fits"
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
        with self._cache._lock:
            self._check_open()
            missing = [layer for layer in range(self._cache.num_layers) if layer not in self._appended]
            if missing and self.num_tokens:
                raise StepError(f"layers {missing} have not been appended; commit needs every layer, or abort the step")
            self._cache._commit(self)

    def abort(self) -> None:
        """Forget the step: the sequences are as they were before it, and its pages are given back.

        What the cache gave up to make room stays given up: evicted pages, and the prefix of a page that was written.

        Raises
        ------
        StepError
            The step is over.
        """
        with self._cache._lock:
            self._check_open()
            self._cache._abort(self)

    def __enter__(self) -> Step:
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if kind is not None and self.is_open:
            self.abort()

    def __repr__(self) -> str:
        state = "open" if self.is_open else "over"
        return f"Step({self.num_tokens} tokens of {len(self.sequences)} sequences, {state})"

    def _attend_packed(self, q: Any, arrays: dict[str, Any], options: dict[str, Any]) -> Any:
        """`attend` of q [T, heads, head_dim]."""
        from cuattn.decode.paged import paged_attention_varlen

        if self.num_tokens and (self.counts == 1).all() and options.get("plan") is None:
            # One token each: a batch, which needs no list of who works on what.
            if options.get("out") is not None:
                options["out"] = options["out"][:, None]
            found = self._attend_batch(q[:, None], arrays, options)
            return (found[0][:, 0], found[1][:, :, 0].T) if options.get("return_lse") else found[:, 0]
        own: dict[str, Any] = {"cu_seqlens_q": self.cu_seqlens, "max_seqlen_q": int(self.counts.max(initial=0))}
        own |= {"block_tables": self._tables, "seqlens_k": self.seqlens_k}
        return paged_attention_varlen(q, **own, **arrays, **options)

    def _attend_batch(self, q: Any, arrays: dict[str, Any], options: dict[str, Any]) -> Any:
        """`attend` of q [B, N, heads, head_dim]."""
        from cuattn.decode.paged import paged_attention

        return paged_attention(q, block_tables=self._tables, seqlens_k=self.seqlens_k, **arrays, **options)

    def _check_open(self) -> None:
        if not self.is_open:
            raise StepError("the step is over: it was committed or aborted")

    def _check(self, layer: Any) -> int:
        self._check_open()
        return integer("layer", layer, 0, self._cache.num_layers - 1)

    def _check_rows(self, name: str, x: Any) -> None:
        shape = getattr(x, "shape", None)
        if isinstance(shape, tuple) and (len(shape) != 3 or shape[0] != self.num_tokens):
            raise ShapeError(f"{name} has shape {tuple(shape)}; [{self.num_tokens}, heads, head_dim] is needed")


def block_tables(seqs: Items[Sequence]) -> np.ndarray:
    """The page tables of sequences, one a row, with -1 behind the last page."""
    tables = np.full((len(seqs), max((len(seq._pages) for seq in seqs), default=0)), -1, np.int32)
    for row, seq in zip(tables, seqs, strict=True):
        row[: len(seq._pages)] = seq._pages
    return tables
