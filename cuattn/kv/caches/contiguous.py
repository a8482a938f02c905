"""A cache of keys and values with room for the longest sequence set aside for every one."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuattn.errors import CacheFullError
from cuattn.kv.caches.books import OpenStep
from cuattn.kv.caches.rows import RowCache, RowSequence, check_number
from cuattn.kv.caches.step import Step

__all__ = ["KVCache"]


class KVCache(RowCache):
    """Keys and values in one array [batch, max_seqlen, kv_heads, head_dim] a layer.

    The plain cache: nothing is looked up, nothing is shared, and every sequence takes the memory of ``max_seqlen``
    tokens from the start. It is used like a `PagedKVCache`, so that a program can take the one or the other::

        with cache.reserve(seqs, counts) as step:     # raises if a sequence would become too long
            for layer in range(num_layers):
                step.append(layer, k, v)              # k, v [T, kv_heads, head_dim], packed
                out = step.attend(layer, q)           # q [T, heads, head_dim], or [B, N, heads, head_dim]
            step.commit()

    What needs pages is not here: ``fork``, ``swap_out`` and ``swap_in``.

    Parameters
    ----------
    batch : int
        Sequences that there can be at a time.
    max_seqlen : int
        Tokens that each can have.
    num_layers, num_kv_heads, head_dim, dtype, head_dim_v, kv_format, k_scale, v_scale, array_module
        As for `PagedKVCache`.

    Notes
    -----
    *All or nothing.* A call that raises has changed nothing, as for `PagedKVCache`. Tokens of a step that is aborted
    have been written behind the last token of their sequence, where nobody reads them.

    *Threads.* One lock guards the rows and lengths: every method of a cache may be called from any thread. A step, and
    the sequences in it, belong to one thread at a time. On a GPU all work of a cache goes to one stream, or the caller
    orders its streams.

    Raises
    ------
    ArgumentError, DTypeError, ArrayTypeError, NonFiniteError
        A number that is not positive, an unknown dtype, format or module, scales that do not fit.

    Examples
    --------
    >>> import numpy as np
    >>> import cuattn
    >>> cache = cuattn.KVCache(2, 8, num_layers=1, num_kv_heads=1, head_dim=32, dtype=np.float32)
    >>> seq = cache.add()
    >>> for value in (1, 5):
    ...     with cache.reserve([seq], 1) as step:
    ...         step.append(0, np.zeros((1, 1, 32), np.float32), np.full((1, 1, 32), value, np.float32))
    ...         out = step.attend(0, np.zeros((1, 1, 32), np.float32))
    ...         step.commit()
    >>> out[0, 0, :2], seq.length
    (array([3., 3.], dtype=float32), 2)
    >>> cache.stats().cached, cache.stats().waste
    (2, 6)
    """

    def __init__(
        self,
        batch: int,
        max_seqlen: int,
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
    ) -> None:
        self.max_seqlen = check_number("max_seqlen", max_seqlen)
        of_model = num_layers, num_kv_heads, head_dim, dtype, head_dim_v, kv_format, k_scale, v_scale, array_module
        super().__init__(batch, 1, self.max_seqlen, *of_model)  # a row is one page

    def layer_arrays(self, layer: int) -> dict[str, Any]:
        """The arrays of one layer, for kernels of one's own: what `decode_attention` takes, by the parameter's name.

        ``k_cache`` and ``v_cache`` are views [batch, max_seqlen, kv_heads, head_dim]; with them come ``kv_format`` and
        the scales, if there are any. Sequence ``seq`` has entry ``seq.row`` of the batch.

        Raises
        ------
        ArgumentError
            There is no such layer.
        """
        layer = check_number("layer", layer, 0, self.num_layers - 1)
        return {name.replace("pages", "cache"): x for name, x in self._storage.layers[layer].items()}

    @property
    def _capacity(self) -> int:
        return self.max_seqlen

    def _check_room(self, index: int, seq: RowSequence, count: int) -> None:
        if seq._length + count > self.max_seqlen:
            raise CacheFullError(
                f"seqs[{index}] has {seq._length} tokens and counts[{index}] is {count}; max_seqlen is "
                f"{self.max_seqlen}"
            )

    def _num_cached(self, seq: RowSequence) -> int:
        return seq._length

    def _step(self, opened: OpenStep) -> Step:
        return ContiguousStep(self, opened)


class ContiguousStep(Step):
    """A step of a `KVCache`. Rows that follow one another are attended to without a look at any table."""

    def _attend_batch(self, q: Any, arrays: dict[str, Any], options: dict[str, Any]) -> Any:
        from cuattn.ops.decode.dense import decode_attention

        rows = self._block_tables[:, 0]
        if (np.diff(rows) != 1).any() or not rows.size:
            return super()._attend_batch(q, arrays, options)
        own = slice(int(rows[0]), int(rows[-1]) + 1)
        names = {name.replace("pages", "cache"): x for name, x in arrays.items()}
        of_slots = {name: x[own] for name, x in names.items() if getattr(x, "ndim", 0) >= 3}
        return decode_attention(q, seqlens_k=self._seqlens_k, **{**names, **of_slots}, **options)
