"""Packed sequences of which only the first tokens are used: ``seqused_q`` and ``seqused_k`` of flash-attn 3.

`cuattn.attention_varlen` knows no gaps. A sequence with unused tokens is told as three: its used queries and keys; its
unused queries, which see no key; its unused keys, which no query sees. Nothing is copied, and gradients come out right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cuattn.compat.arguments import max_seqlens
from cuattn.compat.cache_tokens import Tokens, packed_tokens
from cuattn.errors import ArgumentError, ShapeError
from cuattn.ops.attention.sequences import check_max_seqlen
from cuattn.ops.decode.lengths import integers
from cuattn.runtime.arrays import module_of
from cuattn.runtime.executor import Executor, executor_for
from cuattn.runtime.small_arrays import small_array

__all__ = ["Sequences", "sequences_of"]

_PARTS = 3


@dataclass(slots=True)
class Sequences:
    """The lists of `cuattn.attention_varlen`, and how many entries a sequence of the caller has in them."""

    executor: Executor
    cu_seqlens_q: Any
    cu_seqlens_k: Any
    limits: dict[str, Any]  # max_seqlen_q and max_seqlen_k
    parts: int

    def of_each(self, name: str, factor: Any, kv_heads: int) -> Any:
        """Numbers [batch, kv_heads], as `cuattn.attention_varlen` takes them for these sequences."""
        if factor is None or self.parts == 1:
            return factor
        batch = (int(self.cu_seqlens_q.shape[0]) - 1) // self.parts
        factor = small_array(self.executor, name, factor, ((batch, kv_heads),), np.dtype(np.float32))
        with self.executor.on_device():
            return module_of(factor).repeat(factor, self.parts, 0)


def sequences_of(
    arrays: dict[str, Any],
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    seqused_q: Any,
    seqused_k: Any,
) -> Sequences:
    """Where the sequences of a call lie; ``arrays`` are q, k and v. Raises as `cuattn.attention_varlen`.

    Of what the host sees, used tokens are checked to be within their sequence; on a device they are cut there.
    """
    executor = executor_for(**arrays)
    limits = max_seqlens(max_seqlen_q, max_seqlen_k)
    if seqused_q is None and seqused_k is None:
        return Sequences(executor, cu_seqlens_q, cu_seqlens_k, limits, 1)
    sides: list[tuple[Tokens, Any]] = []
    for side, x, cu_seqlens, used in (("q", "q", cu_seqlens_q, seqused_q), ("k", "k", cu_seqlens_k, seqused_k)):
        array = executor.asarray(x, arrays[x])
        if array.ndim != 3:
            raise ShapeError(f"{x} has shape {tuple(array.shape)}; [tokens, heads, head_dim] is needed")
        total = int(array.shape[0])
        tokens = packed_tokens(executor, f"cu_seqlens_{side}", cu_seqlens, sides[0][0].batch if sides else None, total)
        sides.append((tokens, _used(executor, side, tokens, used, limits[f"max_seqlen_{side}"])))
    given = [x for tokens, used in sides for x in (tokens.starts, used)]
    xp = module_of(*given)
    with executor.on_device():
        list_q, list_k = (_list(xp, tokens, used, of_queries=i == 0) for i, (tokens, used) in enumerate(sides))
    # An unused rest may be longer than the longest sequence.
    return Sequences(executor, list_q, list_k, {"max_seqlen_q": None, "max_seqlen_k": None}, _PARTS)


def _used(executor: Executor, side: str, tokens: Tokens, used: Any, limit: Any) -> Any:
    limit = check_max_seqlen(f"max_seqlen_{side}", limit)
    if used is None:
        return None
    name = f"seqused_{side}"
    given = integers(executor, name, used, tokens.batch, 1, "[batch]")
    if given.seen is not None and tokens.seen is not None:
        seen = given.seen.astype(np.int64)
        wrong = (seen < 0) | (seen > tokens.seen)
        if wrong.any():
            at = int(np.argmax(wrong))
            raise ArgumentError(f"{name}[{at}] is {seen[at]}; sequence {at} has room for 0 to {tokens.seen[at]}")
        if limit is not None and seen.max(initial=0) > limit:
            raise ArgumentError(f"max_seqlen_{side} is {limit}, but {name} holds {int(seen.max())}")
    return given.array


def _list(xp: Any, tokens: Tokens, used: Any, *, of_queries: bool) -> Any:
    """cu_seqlens of three sequences for each one: used, unused queries, unused keys."""
    starts = xp.asarray(tokens.starts).astype(np.int32)
    first, end = starts[:-1], starts[1:]
    rest = end if used is None else first + xp.clip(xp.asarray(used).astype(np.int32), 0, end - first)
    middle = end if of_queries else rest
    return xp.concatenate((xp.stack((first, rest, middle), 1).reshape(-1), starts[-1:]))
