"""A step of a streaming cache: where its tokens go, and which keys each of them sees."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cuattn.addresses import byte_bounds
from cuattn.errors import ArgumentError
from cuattn.kv.caches.rows import RowSequence
from cuattn.kv.caches.step import Step, own_copy
from cuattn.messages import shown
from cuattn.runtime.checks import check_apart, check_out

if TYPE_CHECKING:
    from cuattn.kv.caches.streaming import StreamingKVCache

__all__ = ["StreamingStep"]


class StreamingStep(Step):
    """A step of a `StreamingKVCache`, which `Step` says most about.

    Attributes
    ----------
    positions : int64 array [T]
        Of each token in the cache, when it is the latest one.
    cu_rows : int32 array [R + 1]
        Rows of tokens that see the same keys up to the diagonal: the first token of each, and T behind the last. The
        tokens of a sequence are one row until the window runs over, and then have a row each.
    seqlens_k : int32 array [R]
        Keys that the last token of each row sees.
    block_tables : int32 array [R, max_keys]
        Their slots, in the order of their positions; -1 behind the last one.
    """

    cu_rows = own_copy("_cu_rows")

    def _lay_out(self) -> None:
        cache: StreamingKVCache = self._cache  # type: ignore[assignment]
        self._streaming = cache
        seqs: tuple[Any, ...] = self._opened.sequences
        counts, num_sinks, ring = self._opened.counts, cache.num_sinks, cache.ring_slots
        token, oldest, last = _of_tokens(cache, seqs, counts)
        first_slot = np.repeat([seq.row * cache.slots_per_row for seq in seqs], counts).astype(np.int64)
        in_ring = np.maximum(token - num_sinks, 0)
        self._slot_mapping = first_slot + np.where(token < num_sinks, token, num_sinks + in_ring % ring)
        self._positions = np.where(token < num_sinks, token, num_sinks + token - oldest)
        self._slots = cache._storage.executor.put(self._slot_mapping, np.int64)

        ends = np.flatnonzero(last)
        self._cu_rows = np.concatenate([[0], ends + 1]).astype(np.int32)
        self._sequence_of_row = np.repeat(np.arange(len(seqs)), counts)[ends]
        self._seqlens_k = (self._positions[ends] + 1).astype(np.int32)
        key = np.arange(self._seqlens_k.max(initial=0))
        ring_idx = np.maximum(key - num_sinks, 0) + oldest[ends, None] - num_sinks
        slots = first_slot[ends, None] + np.where(key < num_sinks, key, num_sinks + ring_idx % ring)
        self._block_tables = np.where(key < self._seqlens_k[:, None], slots, -1).astype(np.int32)

    def append(self, layer: int, k: Any, v: Any, *, rope: Any = None, positions: Any = None) -> None:
        """Write the step's keys and values of one layer into the cache; once for each layer.

        As `Step.append`, but keys are not rotated here: their positions change.

        Raises
        ------
        ArgumentError
            There is no such layer; or ``rope`` or ``positions`` are given, which the cache itself has.
        StepError, CuattnError
            As `Step.append`.
        """
        _refuse({"rope": rope, "positions": positions})
        super().append(layer, k, v)

    def attend(self, layer: int, q: Any, **options: Any) -> Any:
        """Attend from each token of the step to what it sees: `StreamingKVCache` says what that is.

        As `Step.attend`, but without ``causal``, ``rope`` and ``rotate_keys``, which the cache decides. A ``window``
        and a ``chunk`` count positions in the cache; ``plan`` is one for the rows of this step.

        Raises
        ------
        ArgumentError
            One of those options is given.
        StepError, CuattnError
            As `Step.attend`.
        """
        _refuse({name: options.pop(name, None) for name in ("causal", "rope", "rotate_keys")})
        return super().attend(layer, q, **options)

    def _attend_packed(self, q: Any, arrays: dict[str, Any], options: dict[str, Any]) -> Any:
        from cuattn.ops.decode.paged import paged_attention_varlen

        rope = self._streaming.rope
        if not np.array_equal(self._sequence_of_row, np.arange(len(self.sequences))):
            options = self._by_row(options)
        most = int(np.diff(self._cu_rows).max(initial=0))
        own: dict[str, Any] = {"cu_seqlens_q": self._cu_rows, "max_seqlen_q": most}
        own |= {"block_tables": self._block_tables, "seqlens_k": self._seqlens_k}
        own |= {"rope": rope, "rotate_keys": rope is not None}
        return paged_attention_varlen(q, **own, **arrays, **options)

    def _attend_batch(self, q: Any, arrays: dict[str, Any], options: dict[str, Any]) -> Any:
        executor, out = self._streaming._storage.executor, options.pop("out", None)
        q = executor.asarray("q", q)
        shape = *q.shape[:3], self._streaming.head_dim_v
        if out is not None:
            out = executor.asarray("out", out)
            check_out("out", out, shape, q.dtype)
            read = {"q": q, **{name: x for name, x in arrays.items() if hasattr(x, "strides")}}
            check_apart("out", byte_bounds(out), {name: byte_bounds(x) for name, x in read.items()})
        with executor.on_device():
            result = self._attend_packed(q.reshape(self.num_tokens, *q.shape[2:]), arrays, options)
            packed, lse = result if options.get("return_lse") else (result, None)
            whole = packed.reshape(shape)
            if out is not None:
                out[...] = whole
                whole = out
            return whole if lse is None else (whole, lse.reshape(q.shape[2], *q.shape[:2]).transpose(1, 0, 2))

    def _by_row(self, options: dict[str, Any]) -> dict[str, Any]:
        """Repeat options for each row that have one entry for each sequence."""
        slopes = options.get("alibi_slopes")
        if slopes is None or np.ndim(slopes) != 2:
            return options
        executor = self._streaming._storage.executor
        slopes = executor.metadata("alibi_slopes", slopes)
        rows = self._sequence_of_row
        if not isinstance(slopes, np.ndarray):
            rows = executor.put(rows, np.int64)
        with executor.on_device():
            return {**options, "alibi_slopes": slopes[rows]}


def _of_tokens(
    cache: StreamingKVCache, seqs: tuple[RowSequence, ...], counts: tuple[int, ...]
) -> tuple[np.ndarray, ...]:
    """Find for every token of a step: its number in its stream, the oldest token of the ring that it sees, whether the
    next one sees another oldest one, or is of another sequence.
    """
    tokens, oldest, last = ([np.empty(0, dtype)] for dtype in (np.int64, np.int64, bool))
    for seq, count in zip(seqs, counts, strict=True):
        if count:
            tokens.append(np.arange(seq._length, seq._length + count))
            oldest.append(cache.oldest(seq, tokens[-1] + 1))
            last.append(np.append(oldest[-1][1:] != oldest[-1][:-1], True))
    return np.concatenate(tokens), np.concatenate(oldest), np.concatenate(last)


def _refuse(options: dict[str, Any]) -> None:
    for name, value in options.items():
        if value is not None:
            raise ArgumentError(f"{name} is {shown(value)}; a streaming cache decides that itself: leave it out")
