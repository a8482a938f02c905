"""A cache of keys and values in pages: sequences share pages, and grow by whole pages.

W. Kwon, Z. Li, S. Zhuang, Y. Sheng, L. Zheng, C. H. Yu, J. E. Gonzalez, H. Zhang and I. Stoica, "Efficient memory
management for large language model serving with PagedAttention", 2023 (arXiv:2309.06180).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np

from cuattn.errors import ArgumentError
from cuattn.kv.caches import chains, reservation
from cuattn.kv.caches.books import Books, OpenStep, reading, transaction
from cuattn.kv.caches.host_pages import HostPages
from cuattn.kv.caches.pages import PagePool
from cuattn.kv.caches.prefix import PrefixIndex, key_of
from cuattn.kv.caches.sequence import (
    Sequence,
    check_sequence,
    check_sequences,
    count_list,
    grow,
    listed,
    new_tokens,
    token_list,
)
from cuattn.kv.caches.statistics import CacheStats, collect
from cuattn.kv.caches.step import Step, block_tables
from cuattn.kv.caches.storage import PageStorage, check_format, check_scales
from cuattn.kv.caches.swap import swap_in, swap_out
from cuattn.messages import shown
from cuattn.runtime.executor import executor_of_module
from cuattn.scalars import MAX_EXTENT, check_flag, integer

__all__ = ["PagedKVCache"]


class PagedKVCache(Books):
    """Keys and values of many sequences in pages of equal size, as an operating system keeps memory.

    A sequence has a table of pages, and gets the next page when its last one is full: less than one page a sequence is
    wasted, and nothing is moved when it grows. It keeps its pages until it is freed. Sequences share pages: those that
    `fork` makes, and, with ``prefix_caching``, those that begin with the same tokens. A shared page is copied before it
    is written.

    One step of a model over a batch of sequences::

        with cache.reserve(seqs, counts) as step:     # takes every page that is needed, or raises
            for layer in range(num_layers):
                step.append(layer, k, v)              # k, v [T, kv_heads, head_dim], packed
                out = step.attend(layer, q)           # q [T, heads, head_dim]
            step.commit()

    Parameters
    ----------
    num_pages : int
        They are allocated once, here.
    page_size : int
        Slots of a page: tokens of one sequence.
    num_layers, num_kv_heads, head_dim : int
        Of the model. Head dims are 1 to 512.
    dtype : float16, bfloat16, float32 or float64
        Of the keys and values that `Step.append` gets, and of what is stored if there is no ``kv_format``.
    head_dim_v : int, optional
        Of the values, where it is not ``head_dim``.
    kv_format : {None, "e4m3fn", "e5m2", "int8", "nvfp4", "mxfp4"}
        Store 8 or 4 bits a number: see `append_kv`.
    k_scale, v_scale : float or float array [kv_heads] or [num_layers, kv_heads], optional
        Of 8-bit formats: scales that have been calibrated. Without them each slot and head has a scale of its own,
        computed when it is written. "nvfp4" takes one number, by default 1.
    array_module : module
        ``numpy``, or ``cupy``: on the device that is current now.
    prefix_caching : bool
        Keep the pages of freed sequences until their room is needed, and give them to sequences with the same prefix.

    Notes
    -----
    *Pages.* used + cached + free = ``num_pages``: a page is used while a table holds it, cached when none does but its
    prefix can be found, free otherwise. When a step needs more pages than are free, cached pages are evicted: those
    that have been without a sequence for the longest time, the tail of a sequence before its head. What a page holds is
    known by its tokens and by those of every page before it: they are hashed in a chain, and compared, so that a
    collision of hashes can never give wrong keys.

    *All or nothing.* A call that raises has changed nothing. That holds for whatever is raised, an interrupt or a
    `MemoryError` at any moment among them: a call happens at one of its last instructions, and until then all of it is
    undone. (An interrupt that comes after that instruction finds everything done.) A step that ``reserve`` could not
    return is aborted by the next call. Caches, sequences and steps can be neither copied nor pickled.

    *Threads.* One lock guards the tables: every method of a cache may be called from any thread, but not by a signal
    handler or a finalizer that runs in the middle of another call of its thread (`NotSupportedError`). A step, and the
    sequences in it, belong to one thread at a time. On a GPU all work of a cache goes to one stream, or the caller
    orders its streams: pages change hands when a call returns, not when the device gets there.

    *GPUs.* Tables are kept on the host, and nothing here waits for the device but `swap_out`.

    Raises
    ------
    ArgumentError, DTypeError, ArrayTypeError, NonFiniteError
        A number that is not positive, an unknown dtype, format or module, scales that do not fit.

    References
    ----------
    Kwon et al., "Efficient memory management for large language model serving with PagedAttention", 2023.

    Examples
    --------
    >>> import numpy as np
    >>> import cuattn
    >>> cache = cuattn.PagedKVCache(
    ...     8, 4, num_layers=1, num_kv_heads=1, head_dim=32, dtype=np.float32, prefix_caching=True
    ... )
    >>> prompt = [1, 2, 3, 4, 5, 6]
    >>> first = cache.add(prompt)
    >>> with cache.reserve([first], [6]) as step:
    ...     step.append(0, np.ones((6, 1, 32), np.float32), np.ones((6, 1, 32), np.float32))
    ...     step.commit()
    >>> first, first.pages
    (Sequence(6 tokens on 2 pages, live), (0, 1))
    >>> second = cache.add([1, 2, 3, 4, 7])  # its first page is there already
    >>> second.length, second.pages
    (4, (0,))
    >>> cache.stats().used, cache.stats().shared, cache.stats().hits
    (2, 1, 1)
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int = 16,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: Any,
        head_dim_v: int | None = None,
        kv_format: str | None = None,
        k_scale: Any = None,
        v_scale: Any = None,
        array_module: Any = np,
        prefix_caching: bool = False,
    ) -> None:
        super().__init__()
        self.num_pages = integer("num_pages", num_pages, 1, MAX_EXTENT)
        self.page_size = integer("page_size", page_size, 1, MAX_EXTENT)
        self.num_layers = integer("num_layers", num_layers, 1, MAX_EXTENT)
        self.num_kv_heads = integer("num_kv_heads", num_kv_heads, 1, MAX_EXTENT)
        self.head_dim = integer("head_dim", head_dim, 1, MAX_EXTENT)
        self.head_dim_v = self.head_dim if head_dim_v is None else integer("head_dim_v", head_dim_v, 1, MAX_EXTENT)
        self.prefix_caching = check_flag("prefix_caching", prefix_caching)
        executor_of_module(array_module)
        format_row = check_format(dtype, kv_format, {"head_dim": self.head_dim, "head_dim_v": self.head_dim_v})
        self._storage = PageStorage(
            array_module,
            (self.num_pages, self.num_layers, self.page_size, self.num_kv_heads),
            (self.head_dim, self.head_dim_v),
            format_row,
            check_scales(format_row, {"k_scale": k_scale, "v_scale": v_scale}),
        )
        self._index = PrefixIndex(self._journal)
        self._host = HostPages(self._journal)
        self._pool = PagePool(self.num_pages, self._index, self._host.unlink, self._journal)
        self._num_hits = self._num_copies = 0

    @property
    def kv_format(self) -> str:
        """How the numbers are stored; the name of the dtype if they are not quantized."""
        return self._storage.kv_format.name

    @property
    @reading
    def sequences(self) -> tuple[Sequence, ...]:
        """All sequences that have not been freed, in the order in which they were made."""
        return tuple(sorted(self._sequences, key=lambda seq: seq._number))

    @property
    def nbytes(self) -> int:
        """Bytes of all pages, with their scales."""
        return self._storage.nbytes

    def layer_arrays(self, layer: int) -> dict[str, Any]:
        """The pages of one layer, for kernels of one's own: what `paged_attention` takes, by the name of the parameter.

        ``k_pages`` and ``v_pages`` are views [num_pages, page_size, kv_heads, head_dim]; with them come ``kv_format``
        and the scales, if there are any.
        """
        return dict(self._storage.layers[integer("layer", layer, 0, self.num_layers - 1)])

    @listed
    @reading
    def block_tables(self, seqs: Iterable[Sequence]) -> tuple[np.ndarray, np.ndarray]:
        """Return the page tables, int32 [B, max_pages] with -1 behind the last page, and the lengths, int32 [B]."""
        seqs = check_sequences(self, seqs, idle=False)
        return block_tables(seqs), np.array([seq._length for seq in seqs], np.int32)

    @transaction
    def add(self, tokens: Any = None, cache_key: Hashable = None) -> Sequence:
        """Add a new sequence.

        Parameters
        ----------
        tokens : integers [n], optional
            Its prompt, in host memory. With ``prefix_caching``, pages that hold the keys and values of its first tokens
            become its first pages, so that its `Sequence.length` is what need not be computed any more; at least the
            last token is left to compute, since its logits are wanted. `reserve` then takes ``tokens[length:]``, at
            once or in parts.
        cache_key : hashable, optional
            What the keys and values depend on besides the tokens, such as the name of an adapter or a tenant. Only
            sequences whose keys are equal and of one type share prefixes: 1, True, 1.0 and "1" are four keys.

        Raises
        ------
        ArgumentError, ArrayTypeError
            ``tokens`` are no integers, or ``cache_key`` is not hashable.
        """
        known = [] if tokens is None else token_list("tokens", tokens)
        try:
            hash(key_of(cache_key))
        except MemoryError:
            raise
        except Exception as error:  # __hash__ raises what it likes
            raise ArgumentError(f"cache_key is {shown(cache_key)}; something hashable is needed") from error
        seq = Sequence(self, self._index.root(cache_key), known)
        self._index.hold(seq._tip)
        if self.prefix_caching:
            chains.adopt(self._pool, self._index, seq, self.page_size)
        self._journal.assign(self, "_num_hits", self._num_hits + len(seq._pages))
        self._journal.put(self._sequences, seq, None)
        return seq

    @listed
    @transaction
    def reserve(self, seqs: Iterable[Sequence], counts: Any, tokens: Any = None) -> Step:
        """Open a step: room for ``counts`` more tokens in each sequence.

        Every page that the step needs is taken now, those included that must be copied because another table holds
        them; the copies are made now.

        Parameters
        ----------
        seqs : sequences of this cache
            Each once, live, and in no other open step.
        counts : integers [B], or one integer for all
            Tokens that the step adds to each; 0 is allowed.
        tokens : integers [T], or a list of [count] or None for each sequence; optional
            Which tokens they are, where `add` was not told, as for those that have just been sampled. They are what
            other sequences find the pages by; pages with tokens that nobody named are never found.

        Returns
        -------
        Step

        Raises
        ------
        OutOfPagesError
            Fewer pages can be had than are needed.
        SequenceError
            A sequence has been freed, is swapped out, belongs to another cache or to an open step.
        ArgumentError, ArrayTypeError
            ``counts`` or ``tokens`` do not fit the sequences, or a sequence is named twice.
        """
        seqs = check_sequences(self, seqs)
        counts = count_list(counts, len(seqs))
        new = new_tokens(seqs, counts, tokens)
        done = reservation.reserve(
            *(self._journal, self._pool, self._index, self._host, self._storage), seqs, counts, self.page_size
        )
        self._journal.assign(self, "_num_copies", self._num_copies + len(done.copies))
        opened = OpenStep(tuple(seqs), tuple(counts), new, done)
        step = Step(self, opened)
        self._open_step(opened, step)
        return step

    @transaction
    def fork(self, seq: Sequence) -> Sequence:
        """Make another sequence with the same tokens, on the same pages: for several samples of a prompt, or beams.

        No page is copied now. Whichever sequence first writes a page that both hold gets a copy of it.

        Raises
        ------
        SequenceError
            The sequence has been freed, is swapped out, belongs to another cache or to an open step.
        """
        check_sequence(self, "seq", seq)
        other = Sequence(self, seq._tip, list(seq._tokens))
        other._pages.extend(seq._pages)
        other._length = seq._length
        self._index.hold(seq._tip)
        self._pool.share(seq._pages)
        self._journal.put(self._sequences, other, None)
        return other

    @transaction
    def truncate(self, seq: Sequence, length: int) -> None:
        """Keep the first ``length`` tokens of a sequence, and forget the others: tokens that were not accepted.

        Raises
        ------
        ArgumentError
            ``length`` is no integer, negative, or more than the sequence has.
        SequenceError
            The sequence has been freed, is swapped out, belongs to another cache or to an open step.
        """
        check_sequence(self, "seq", seq)
        length = integer("length", length, 0, seq._length)
        num_pages = -(-length // self.page_size)
        if num_pages < len(seq._pages):
            self._pool.release(seq._pages[num_pages:])
            self._journal.cut(seq._pages, num_pages)
        self._journal.cut(seq._tokens, length)
        self._journal.assign(seq, "_length", length)
        chains.step_back(self._index, seq, self.page_size)

    @transaction
    def free(self, seq: Sequence) -> None:
        """Give a sequence up, live or swapped out. Pages that only it had are free, or cached if they can be found.

        Raises
        ------
        SequenceError
            The sequence has been freed already, belongs to another cache or to an open step.
        """
        check_sequence(self, "seq", seq, states=("live", "swapped"))
        self._pool.release(seq._pages)
        for host_page in seq._host_pages:
            self._host.release(host_page)
        self._index.let_go(seq._tip)
        self._journal.cut(seq._pages, 0)
        self._journal.cut(seq._host_pages, 0)
        self._journal.assign(seq, "_state", "freed")
        self._journal.drop(self._sequences, seq)

    @listed
    @transaction
    def swap_out(self, seqs: Sequence | Iterable[Sequence]) -> None:
        """Move sequences to host memory, which needs no room in the cache and may be paged out itself.

        A page that several sequences share is stored once, also if they are swapped out by several calls. On a GPU this
        waits until the pages are there.

        Raises
        ------
        SequenceError
            A sequence has been freed, is swapped out, belongs to another cache or to an open step.
        """
        seqs = check_sequences(self, seqs)
        swap_out(self._journal, self._pool, self._host, self._storage, seqs)

    @listed
    @transaction
    def swap_in(self, seqs: Sequence | Iterable[Sequence]) -> None:
        """Bring sequences back: all of them, or none.

        Pages are shared as they were before, with each other, with sequences that come back later, and with those that
        never left.

        Raises
        ------
        OutOfPagesError
            Fewer pages can be had than are needed.
        SequenceError
            A sequence is not swapped out, or belongs to another cache.
        """
        seqs = check_sequences(self, seqs, states=("swapped",))
        swap_in(self._journal, self._pool, self._host, self._storage, seqs)

    @reading
    def stats(self) -> CacheStats:
        """Return how full the cache is, and what it has done so far."""
        return collect(self)

    def __repr__(self) -> str:
        stats = self.stats()
        return (
            f"PagedKVCache({self.num_pages} pages of {self.page_size} tokens, {self.kv_format}: {stats.used} used, "
            f"{stats.cached} cached, {stats.free} free; {stats.sequences} sequences)"
        )

    @transaction
    def _commit(self, handle: Step) -> None:
        step = handle._opened
        step.check_open(handle)
        step.check_complete(self.num_layers)
        grow(self._journal, step)
        if self.prefix_caching:
            for seq in step.sequences:
                chains.publish(self._index, seq, self.page_size)
        reservation.settle(self._pool, self._index, step._reservation)
        self._close_step(step)

    def _give_up(self, step: OpenStep) -> None:
        reservation.restore(self._journal, self._pool, self._index, step._reservation, written=step.is_written)
        self._close_step(step)
