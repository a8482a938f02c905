"""Calls of distributed attention: the arrays of all ranks, and what one device computes of the whole."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from cuattn.distributed import (
    ThreadGroup,
    ring_attention,
    ring_attention_backward,
    shard,
    ulysses_attention,
    ulysses_attention_backward,
    unshard,
)

__all__ = ["SLOPES", "Results", "on_ranks", "ring", "tensors"]

TIMEOUT = 60.0
SLOPES = np.array([0.5, 0.25, 0.125, 0.0625], np.float32)


class Results(NamedTuple):
    """Arrays of all tokens, and the bytes that rank 0 sent in forward and in backward."""

    out: Any
    lse: Any
    dq: Any = None
    dk: Any = None
    dv: Any = None
    dsinks: Any = None
    bytes: tuple[int, int] = (0, 0)

    dbias = None  # what the comparison of gradients asks for


def tensors(seed=0, *, batch=2, seqlen_q=50, seqlen_k=None, heads=4, kv_heads=2, dims=(32, 32), dtype=np.float32):
    """q, k, v, dout and dlse; packed without a batch."""
    rng = np.random.default_rng(seed)
    seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
    lead = () if batch is None else (batch,)
    q, k, v, dout = (
        rng.standard_normal((*lead, *shape)).astype(dtype)
        for shape in (
            (seqlen_q, heads, dims[0]),
            (seqlen_k, kv_heads, dims[0]),
            (seqlen_k, kv_heads, dims[1]),
            (seqlen_q, heads, dims[1]),
        )
    )
    real = np.float64 if dtype == np.float64 else np.float32
    return q, k, v, dout, rng.standard_normal((*lead, heads, seqlen_q)).astype(real)


def on_ranks(size, function, *arguments, timeout=TIMEOUT):
    """Results of a function of a group on so many threads."""
    return ThreadGroup.run(size, function, *arguments, timeout=timeout)


METHODS = {
    "ring": (ring_attention, ring_attention_backward),
    "ulysses": (ulysses_attention, ulysses_attention_backward),
}


def ring(
    executor, size, q, k, v, dout=None, dlse=None, *, partition="zigzag", cu_seqlens=None, method="ring", **options
):
    """Ring attention (or another method) of whole arrays, and gradients with a dout: as one device returns them."""
    attend, differentiate = METHODS[method]
    q, k, v, dout, dlse = (None if x is None else executor.array(x) for x in (q, k, v, dout, dlse))
    axis = 1 if cu_seqlens is None else 0
    where = {"partition": partition, "cu_seqlens": cu_seqlens}

    def of_rank(group):
        def own(x, axis=axis):
            return None if x is None else shard(x, group, axis=axis, **where)

        def whole(x, axis=axis):
            return executor.numpy(unshard(x, group, axis=axis, **where))

        parts = [own(x) for x in (q, k, v)]
        group.traffic.reset()
        out, lse = attend(*parts, group, return_lse=True, **where, **options)
        sent = group.traffic.bytes
        if dout is None:
            return Results(whole(out), whole(lse, -1), bytes=(sent, 0))
        group.traffic.reset()
        arguments = (own(dout), *parts, out, lse, group)
        grads = differentiate(*arguments, dlse=own(dlse, -1), **where, **options)
        sent_back = group.traffic.bytes
        found = [whole(out), whole(lse, -1), whole(grads.dq), whole(grads.dk), whole(grads.dv)]
        dsinks = None if grads.dsinks is None else executor.numpy(grads.dsinks)
        return Results(*found, dsinks, (sent, sent_back))

    return on_ranks(size, of_rank)[0]
