"""Attention of all tokens with the heads of a rank, for callers that have the tokens of a rank with all heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cuattn.distributed.exchange import Divided, Integers, to_heads, to_tokens
from cuattn.distributed.group import Group
from cuattn.distributed.heads import Heads, runs, split_heads
from cuattn.runtime.executor import Executor

__all__ = ["HeadExchange"]

#: Attention of one run of heads: (run, q, k, v, out) -> lse, with views of whole arrays; writes out.
Attend = Callable[[Heads, Any, Any, Any, Any], Any]
#: Gradients of one run of heads: (run, (dout, q, k, v, out, lse, dlse), (dq, dk, dv)), writes the last.
Differentiate = Callable[[Heads, tuple[Any, ...], tuple[Any, ...]], None]


class HeadExchange:
    """The heads of each rank, and where its tokens lie in the whole.

    Parameters
    ----------
    num_heads, num_kv_heads : int
    places_q, places_k : sequence of int64 arrays
        Of the queries and of the keys of each rank.
    """

    def __init__(
        self,
        executor: Executor,
        group: Group,
        num_heads: int,
        num_kv_heads: int,
        places_q: Sequence[Integers],
        places_k: Sequence[Integers],
    ) -> None:
        self.executor, self.group = executor, group
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.places_q, self.places_k = places_q, places_k
        self.heads = split_heads(num_heads, num_kv_heads, group.size)
        self.own = self.heads[group.rank]
        self.runs = runs(self.own, num_heads // max(num_kv_heads, 1))

    @property
    def shares_keys(self) -> bool:
        """Whether two ranks read one key/value head."""
        return sum(heads.kv_end - heads.kv_first for heads in self.heads) > self.num_kv_heads

    def forward(self, q: Any, k: Any, v: Any, attend: Attend, *, return_lse: bool) -> tuple[Any, Any]:
        """Return out and lse (None unless asked for) of this rank's tokens."""
        xp = self.executor.xp
        q, k, v = to_heads(self.executor, self.group, [self._queries(q), self._keys(k), self._keys(v)])
        with self.executor.on_device():
            out = xp.empty((*q.shape[:-1], v.shape[-1]), v.dtype)
            lse = None
        for run in self.runs:
            part = attend(
                run, q[..., run.queries, :], k[..., run.keys, :], v[..., run.keys, :], out[..., run.queries, :]
            )
            with self.executor.on_device():
                if lse is None:
                    lse = xp.empty((*q.shape[:-1], 1), part.dtype)
                lse[..., run.queries, 0] = xp.moveaxis(part, -1, -2)
        wanted = [self._queries(out)]
        if return_lse:
            with self.executor.on_device():
                real = xp.float64 if q.dtype == xp.float64 else xp.float32
                wanted.append(self._queries(xp.empty((*q.shape[:-1], 1), real) if lse is None else lse))
        found = to_tokens(self.executor, self.group, wanted, [self.num_heads] * len(wanted))
        return found[0], self._as_lse(found[1]) if return_lse else None

    def backward(self, saved: Sequence[Any], differentiate: Differentiate, *, partials: Any) -> tuple[Any, Any, Any]:
        """Return dq, dk and dv of this rank's tokens. ``saved``: dout, q, k, v, out, lse and dlse, or None for that.

        ``partials``: dtype of the gradients of each rank, before those of one key/value head are added.
        """
        dout, q, k, v, out, lse, dlse = saved
        rows = [self._queries(self._as_rows(x)) for x in (lse, dlse) if x is not None]
        arrays = [self._queries(dout), self._queries(q), self._keys(k), self._keys(v), self._queries(out), *rows]
        dout, q, k, v, out, *found = to_heads(self.executor, self.group, arrays)
        lse, dlse = [self._as_lse(x) for x in found] + [None] * (2 - len(found))
        xp = self.executor.xp
        with self.executor.on_device():
            dq, dk, dv = (xp.empty(x.shape, partials) for x in (q, k, v))
        for run in self.runs:
            queries, keys = run.queries, run.keys
            differentiate(
                run,
                (
                    *(x[..., queries, :] for x in (dout, q)),
                    *(x[..., keys, :] for x in (k, v)),
                    out[..., queries, :],
                    *(None if x is None else x[..., queries, :] for x in (lse, dlse)),
                ),
                (dq[..., queries, :], dk[..., keys, :], dv[..., keys, :]),
            )
        arrays = [self._queries(dq), self._keys(dk), self._keys(dv)]
        counts = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        dq, dk, dv = to_tokens(self.executor, self.group, arrays, counts)
        return dq, dk, dv

    def _queries(self, x: Any) -> Divided:
        return Divided(x, self.places_q, [heads.queries for heads in self.heads])

    def _keys(self, x: Any) -> Divided:
        return Divided(x, self.places_k, [heads.keys for heads in self.heads])

    def _as_rows(self, lse: Any) -> Any:
        """Return an lse [..., heads, tokens] as an array [..., tokens, heads, 1]."""
        with self.executor.on_device():
            return self.executor.xp.moveaxis(lse, -1, -2)[..., None]

    def _as_lse(self, rows: Any) -> Any:
        with self.executor.on_device():
            return self.executor.xp.ascontiguousarray(self.executor.xp.moveaxis(rows[..., 0], -1, -2))
