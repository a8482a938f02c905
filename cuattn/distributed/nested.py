"""Ulysses inside, a ring outside: a grid of ranks, of which rows divide heads and columns divide tokens.

Jiarui Fang and Shangchun Zhao, "USP: a unified sequence parallelism approach for long context generative AI", 2024
(arXiv:2405.07719).
"""

from __future__ import annotations

from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from cuattn.distributed import ring, ring_gradients
from cuattn.distributed.agreement import agree_checked, refuse
from cuattn.distributed.group import Group, check_group
from cuattn.distributed.head_exchange import HeadExchange
from cuattn.distributed.heads import Heads, arrays_of, of_heads
from cuattn.distributed.partitions import PARTITIONS, Partition, check_cu_seqlens, positions_of
from cuattn.distributed.problem import (
    DistributedOptions,
    check_rank,
    check_ring,
    check_saved,
    with_defaults,
)
from cuattn.distributed.sinks import sink_gradients
from cuattn.errors import ArgumentError, ShapeError
from cuattn.ops.attention.arguments import Problem
from cuattn.ops.attention.backward.problem import AttentionGrads
from cuattn.scalars import MAX_EXTENT, check_flag, choice, integer
from cuattn.typing import ArrayT

__all__ = ["Usp", "usp"]


def usp(ring_group: Group, ulysses_group: Group) -> Usp:
    """Nest Ulysses attention in ring attention: for more ranks than heads, and nodes with a fast network inside.

    Ranks form a grid. Those of a ``ulysses_group``, say the GPUs of one node, exchange heads; those that stand at the
    same place in each, a ``ring_group``, send each other keys and values of these heads.

    Parameters
    ----------
    ring_group, ulysses_group : Group
        The groups of this rank: parts of one, by ``split``.

    Returns
    -------
    Usp
        With the attention and its gradients as methods.

    Raises
    ------
    ArgumentError
        An argument is no group.

    Examples
    --------
    Six ranks, two nodes of three:

    >>> import numpy as np
    >>> import cuattn
    >>> from cuattn.distributed import ThreadGroup, usp
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 50, 3, 32)).astype(np.float32)
    >>> def of_rank(group):
    ...     grid = usp(group.split(group.rank % 3), group.split(group.rank // 3))
    ...     out = grid.attention(*(x[:, grid.positions(50)] for x in (q, k, v)))
    ...     return grid.positions(50), out
    >>> whole = np.empty_like(q)
    >>> for positions, out in ThreadGroup.run(6, of_rank):
    ...     whole[:, positions] = out
    >>> bool(np.allclose(whole, cuattn.attention(q, k, v, causal=True), atol=1e-6))
    True
    """
    return Usp(check_group(ring_group), check_group(ulysses_group))


class Usp:
    """Attention on a grid of ranks, made by `usp`.

    Attributes
    ----------
    ring_group, ulysses_group : Group
    """

    def __init__(self, ring_group: Group, ulysses_group: Group) -> None:
        self.ring_group, self.ulysses_group = ring_group, ulysses_group

    def positions(
        self, n: int | None = None, *, partition: Partition = "zigzag", cu_seqlens: Any = None
    ) -> NDArray[np.int64]:
        """Return the places, in the array of all tokens, of those that this rank holds.

        The ring's partition first; what a rank of the ring would hold is cut into pieces for the ranks that exchange
        heads. ``n``: tokens of the sequence, not needed with ``cu_seqlens``.
        """
        if (n is None) == (cu_seqlens is None):
            raise ArgumentError("positions takes n or cu_seqlens: one of the two")
        choice("partition", partition, PARTITIONS)
        cu = None if cu_seqlens is None else check_cu_seqlens(cu_seqlens)
        total = integer("n", n, 0, MAX_EXTENT) if cu is None else int(cu[-1])
        of_ring = positions_of(total, self.ring_group.rank, self.ring_group.size, partition, cu)
        return of_ring[_pieces(len(of_ring), self.ulysses_group.size)[self.ulysses_group.rank]]

    def attention(
        self,
        q: ArrayT,
        k: ArrayT,
        v: ArrayT,
        *,
        partition: Partition = "zigzag",
        cu_seqlens: Any = None,
        overlap: bool = True,
        return_lse: bool = False,
        **options: Unpack[DistributedOptions],
    ) -> Any:
        """Return attention as `ring_attention` does, of the tokens at `positions`; arguments and errors are its own."""
        check_flag("return_lse", return_lse)
        given = with_defaults("attention", options)
        where = {"partition": partition, "cu_seqlens": cu_seqlens, "overlap": overlap}
        call, exchange, _ = self._checked("usp", q, k, v, where, given, {})
        of_call = arrays_of(given, call.options)

        def attend(run: Heads, q: Any, k: Any, v: Any, out: Any) -> Any:
            own = self._of_run(exchange, run, given, of_call)
            problem = check_ring("usp", q, k, v, self.ring_group, **where, **own)
            found, lse = ring.forward(problem, overlap=overlap)
            with call.executor.on_device():
                out[...] = found
            return lse

        with self.ring_group.together(), self.ulysses_group.together():
            out, lse = exchange.forward(call.q, call.k, call.v, attend, return_lse=return_lse)
        return (out, lse) if return_lse else out

    def attention_backward(
        self,
        dout: ArrayT,
        q: ArrayT,
        k: ArrayT,
        v: ArrayT,
        out: ArrayT,
        lse: Any,
        *,
        partition: Partition = "zigzag",
        cu_seqlens: Any = None,
        overlap: bool = True,
        dlse: Any = None,
        deterministic: bool = True,
        **options: Unpack[DistributedOptions],
    ) -> AttentionGrads[ArrayT]:
        """Return gradients as `ring_attention_backward` does; arguments and errors are its own."""
        given = with_defaults("attention_backward", options)
        where = {"partition": partition, "cu_seqlens": cu_seqlens, "overlap": overlap}
        of_forward = {"dout": dout, "out": out, "lse": lse, "dlse": dlse}
        call, exchange, saved = self._checked("usp backward", q, k, v, where, given, of_forward)
        of_call = arrays_of(given, call.options)

        def differentiate(run: Heads, arrays: tuple[Any, ...], targets: tuple[Any, ...]) -> None:
            dout, q, k, v, out, lse, dlse = arrays
            own = self._of_run(exchange, run, given, of_call)
            problem = check_ring("usp backward", q, k, v, self.ring_group, **where, **own)
            of_run = {"dout": dout, "out": out, "lse": lse, "dlse": dlse}
            found = ring_gradients.backward(problem, of_run, overlap=overlap, deterministic=deterministic)
            with call.executor.on_device():
                for target, x in zip(targets, found, strict=True):
                    target[...] = x

        with self.ring_group.together(), self.ulysses_group.together():
            arrays = saved["dout"], call.q, call.k, call.v, saved["out"], saved["lse"], saved["dlse"]
            found = exchange.backward(arrays, differentiate, partials=call.accumulator)
            with call.executor.on_device():
                dq, dk, dv = (x.astype(call.dtype, copy=False) for x in found)
            dsinks = sink_gradients(call, saved, self.ulysses_group, self.ring_group)
            return AttentionGrads(dq, dk, dv, None, dsinks)

    def _checked(
        self,
        name: str,
        q: Any,
        k: Any,
        v: Any,
        where: dict[str, Any],
        given: dict[str, Any],
        of_forward: dict[str, Any],
    ) -> tuple[Problem, HeadExchange, dict[str, Any]]:
        """Check the arguments of this rank, and agree with both groups."""
        if given.pop("chunk") is not None:
            raise ArgumentError("chunk is given; keys that travel in a ring are not taken in pieces")
        packed, size = where["cu_seqlens"] is not None, self.ulysses_group.size
        lengths = tuple(np.diff(check_cu_seqlens(where["cu_seqlens"])).tolist()) if packed else None

        def described(call: Problem) -> tuple[dict[str, Any], Any]:
            extents = call.extents
            shapes: dict[str, Any] = {"heads": extents.num_heads, "kv_heads": extents.num_kv_heads}
            shapes |= {"dims": [extents.head_dim, extents.head_dim_v], "batch": extents.batch, "dtype": str(call.dtype)}
            return {**shapes, **where, **given, "dlse": of_forward.get("dlse") is not None}, [
                extents.seqlen_q,
                extents.seqlen_k,
            ]

        try:
            call, said = agree_checked(self.ulysses_group, name, lambda: check_rank(q, k, v, lengths, given), described)
            totals = [sum(sizes) for sizes in zip(*said, strict=True)]
            for number, total in enumerate(totals):
                expected = [piece.stop - piece.start for piece in _pieces(total, size)]
                if self.ulysses_group.checked and [sizes[number] for sizes in said] != expected:
                    raise ShapeError(
                        f"ranks hold {[sizes[number] for sizes in said]} tokens; {expected} are needed: usp.positions"
                    )
            saved = check_saved(call, self.ulysses_group, name, **of_forward)
        except Exception as error:
            refuse(self.ring_group, error)
            raise
        agree_checked(self.ring_group, name, lambda: call, lambda call: (described(call)[0], None))
        places = [[np.arange(total)[piece] for piece in _pieces(total, size)] for total in totals]
        extents = call.extents
        exchange = HeadExchange(call.executor, self.ulysses_group, extents.num_heads, extents.num_kv_heads, *places)
        return call, exchange, saved

    def _of_run(
        self, exchange: HeadExchange, run: Heads, given: dict[str, Any], of_call: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the arguments of a ring of some heads."""
        own = {**given, **of_heads(of_call, exchange.own, run, exchange.num_heads)}
        own.pop("dropout_origin", None)  # a ring has its own
        return own | {"heads": (exchange.own.first + run.first, exchange.num_heads)}


def _pieces(total: int, size: int) -> list[slice]:
    return [slice(rank * total // size, (rank + 1) * total // size) for rank in range(size)]
