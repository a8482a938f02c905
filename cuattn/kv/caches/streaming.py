"""A cache of keys and values for streams without end: the first tokens of each sequence, and the latest ones.

G. Xiao, Y. Tian, B. Chen, S. Han and M. Lewis, "Efficient streaming language models with attention sinks", 2023
(arXiv:2309.17453).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cuattn.errors import ArgumentError, CacheFullError
from cuattn.kv.caches.books import OpenStep, reading
from cuattn.kv.caches.rows import RowCache, RowSequence, check_number
from cuattn.kv.caches.sequence import check_sequence
from cuattn.kv.caches.step import Step
from cuattn.kv.caches.streaming_step import StreamingStep
from cuattn.messages import shown
from cuattn.ops.rotary.rope import Rotary

__all__ = ["StreamingKVCache"]


class StreamingKVCache(RowCache):
    """Keys and values of the first ``num_sinks`` tokens of each sequence and of its latest ``window`` ones.

    A model that was trained on short texts can go on without end: memory and time of a token stay what they are, and
    the first tokens, on which such models lay much of their attention, are never lost. It is used like a
    `PagedKVCache`::

        with cache.reserve(seqs, counts) as step:
            for layer in range(num_layers):
                step.append(layer, k, v)              # k not rotated
                out = step.attend(layer, q)           # q not rotated
            step.commit()

    Parameters
    ----------
    num_sinks : int, at least 0
        Tokens at the start of a sequence that are kept for good; 4 in the paper.
    window : int, at least 1
        Latest tokens that a token sees, itself among them.
    batch : int
        Sequences that there can be at a time.
    rope : Rotary, optional
        Rotates queries and keys by their positions in the cache. Keys are cached as they are, and rotated whenever they
        are read, because those positions change. None for models without rotations.
    max_chunk : int, at least 1
        Tokens of one sequence that a step may add in any state of the cache. It takes that many slots beside the
        window, which also keep what an aborted step would otherwise have evicted.
    num_layers, num_kv_heads, head_dim, dtype, head_dim_v, kv_format, k_scale, v_scale, array_module
        As for `PagedKVCache`.

    Notes
    -----
    *What a token sees.* Token t of a sequence (from 0) sees the sinks, tokens 0 to min(num_sinks - 1, t), and those of
    the latest ones that there are: tokens max(num_sinks, t - window + 1, e) to t, where e is the first token that was
    not evicted when something was cut off the sequence by `truncate` (without that, e does not matter). These
    are consecutive in the cache, and their places there, 0, 1, 2, ..., are the positions that rotations and ALiBi count
    by; token t has the last one. So each token of a step with several sees exactly what it would see if the tokens came
    one step after the other, also where the window runs over in the middle of the step. As long as nothing is evicted,
    this is causal attention to the whole prefix.

    *Cost.* Tokens of a step that see the same keys, up to the diagonal, are attended to together. Where a step evicts,
    each of its tokens has keys of its own, and reads them for itself.

    *Positions.* ``step.positions`` are positions in the cache. ``seq.length`` counts the tokens of the stream.

    *All or nothing.* A call that raises has changed nothing, as for `PagedKVCache`; neither has a step that is aborted.

    *Threads.* One lock guards the rows and lengths: every method of a cache may be called from any thread. A step, and
    the sequences in it, belong to one thread at a time. On a GPU all work of a cache goes to one stream, or the caller
    orders its streams.

    Raises
    ------
    ArgumentError, DTypeError, ArrayTypeError, NonFiniteError
        A number that is out of range, an unknown dtype, format or module, scales that do not fit.

    References
    ----------
    Xiao et al., "Efficient streaming language models with attention sinks", 2023.

    Examples
    --------
    One sink and the latest two of five tokens, 0, 10, 20, 30 and 40:

    >>> import numpy as np
    >>> import cuattn
    >>> sizes = dict(batch=1, num_layers=1, num_kv_heads=1, head_dim=32, dtype=np.float32)
    >>> cache = cuattn.StreamingKVCache(1, 2, rope=cuattn.Rotary(), **sizes)
    >>> seq = cache.add()
    >>> zeros, values = np.zeros((5, 1, 32), np.float32), np.arange(0, 50, 10, dtype=np.float32)
    >>> with cache.reserve([seq], 5) as step:
    ...     step.append(0, zeros, np.broadcast_to(values[:, None, None], (5, 1, 32)))
    ...     out = step.attend(0, zeros)
    ...     step.commit()
    >>> out[:, 0, 0].round(4)
    array([ 0.    ,  5.    , 10.    , 16.6667, 23.3333], dtype=float32)
    >>> seq.length, cache.cached_tokens(seq).tolist()
    (5, [0, 3, 4])
    """

    _keeps_tokens = False

    def __init__(
        self,
        num_sinks: int,
        window: int,
        *,
        batch: int,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: Any,
        head_dim_v: int | None = None,
        rope: Rotary | None = None,
        max_chunk: int = 16,
        kv_format: str | None = None,
        k_scale: Any = None,
        v_scale: Any = None,
        array_module: Any = np,
    ) -> None:
        self.num_sinks = check_number("num_sinks", num_sinks, least=0)
        self.window = check_number("window", window)
        self.max_chunk = check_number("max_chunk", max_chunk)
        if rope is not None and not isinstance(rope, Rotary):
            raise ArgumentError(f"rope is {shown(rope)}; a cuattn.Rotary or None is allowed")
        self.rope = rope
        of_model = num_layers, num_kv_heads, head_dim, dtype, head_dim_v, kv_format, k_scale, v_scale, array_module
        batch = check_number("batch", batch)
        check_number("batch * (num_sinks + window + max_chunk)", batch * self.slots_per_row)
        super().__init__(batch, self.slots_per_row, 1, *of_model)  # any slot can follow any other: pages of one slot

    @property
    def ring_slots(self) -> int:
        """Slots of a row that tokens behind the sinks take in turn."""
        return self.window + self.max_chunk

    @property
    def slots_per_row(self) -> int:
        return self.num_sinks + self.ring_slots

    @reading
    def cached_tokens(self, seq: RowSequence) -> np.ndarray:
        """Return which tokens of a sequence's stream are in the cache, in the order of their positions there."""
        check_sequence(self, "seq", seq, idle=False)
        return self._cached_tokens(seq)

    def _cached_tokens(self, seq: RowSequence) -> np.ndarray:
        sinks = np.arange(min(self.num_sinks, seq._length))
        return np.concatenate([sinks, np.arange(self.oldest(seq, seq._length), seq._length)])

    def oldest(self, seq: RowSequence, length: Any) -> Any:
        """Return the oldest token behind the sinks that the last of ``length`` (an int or array) tokens sees."""
        return np.maximum(max(seq._first, self.num_sinks), np.asarray(length) - self.window)

    @property
    def _capacity(self) -> int:
        return self.num_sinks + self.window

    def _check_room(self, index: int, seq: RowSequence, count: int) -> None:
        old = max(0, seq._length - int(self.oldest(seq, seq._length)))
        new = seq._length + count - max(seq._length, self.num_sinks)
        if old + new > self.ring_slots:
            raise CacheFullError(
                f"counts[{index}] is {count}: there is room for {self.ring_slots - old} more tokens behind the sinks, "
                f"since no step overwrites what its first token sees; max_chunk={self.max_chunk} at a time always fit"
            )

    def _num_cached(self, seq: RowSequence) -> int:
        return len(self._cached_tokens(seq))

    def _step(self, opened: OpenStep) -> Step:
        return StreamingStep(self, opened)

    def _truncate(self, seq: RowSequence, length: int) -> None:
        oldest = int(self.oldest(seq, seq._length))
        if self.num_sinks < length < oldest:
            raise ArgumentError(
                f"length is {length}, but tokens {self.num_sinks} to {oldest - 1} have been evicted; lengths up to "
                f"{self.num_sinks}, and from {oldest} to {seq._length}, are allowed"
            )
        super()._truncate(seq, length)
        self._journal.assign(seq, "_first", 0 if length <= self.num_sinks else oldest)
