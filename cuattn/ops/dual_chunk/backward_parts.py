"""The parts of the gradients of dual-chunk attention: each a call of the backward kernels, with bounds that they know.

Query p sees the keys of the chunk that is n before its own: those that lie in one piece of L keys with key p - n L,
which is what ``chunk=L`` means beside a diagonal n L lower; n = 0 is causal besides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cuattn.ops.attention.backward import arguments as backward_arguments
from cuattn.ops.attention.backward.launch import backward
from cuattn.ops.attention.backward.problem import BackwardProblem
from cuattn.ops.dual_chunk import arguments
from cuattn.ops.dual_chunk.arguments import DualChunkProblem
from cuattn.ops.dual_chunk.launch import key_positions, query_positions, sequences_of, turned

__all__ = ["DualChunkBackwardProblem", "check", "gradients"]


@dataclass(slots=True)
class DualChunkBackwardProblem:
    """A call whose arguments have passed every check."""

    of_call: DualChunkProblem
    whole: BackwardProblem  # as if it were causal attention
    softcap: Any
    cu_seqlens: tuple[Any, ...]  # of the queries and of the keys, or none


def check(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    *,
    scale: Any,
    softcap: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    **options: Any,
) -> DualChunkBackwardProblem:
    """Make every check of a call. Raises as documented at `cuattn.dual_chunk_attention_backward`."""
    cu_seqlens = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    of_call = arguments.check(q, k, v, scale=scale, softcap=softcap, **cu_seqlens, **options)
    given: tuple[Any, ...] = () if cu_seqlens_q is None else (cu_seqlens_q, cu_seqlens_k)
    make = backward_arguments.check_packed if given else backward_arguments.check
    whole = make(dout, q, k, v, out, lse, *given, causal=True, scale=scale, softcap=softcap)
    return DualChunkBackwardProblem(of_call, whole, softcap, given)


def gradients(problem: DualChunkBackwardProblem) -> tuple[Any, Any, Any]:
    """Launch every part, sum them, and turn the sums back; returns dq, dk and dv."""
    with np.errstate(all="ignore"):  # what is infinite or NaN in a part is so in the sum, without a word
        return _gradients(problem)


def _gradients(problem: DualChunkBackwardProblem) -> tuple[Any, Any, Any]:
    of_call = problem.of_call
    executor, call = of_call.executor, of_call.attention
    places, places_k = query_positions(of_call), key_positions(of_call)
    keys = call.k if of_call.keys_rotated else turned(of_call, call.k, places_k)
    dq, dk, dv = None, None, None
    for stand, ahead in enumerate(_distances(of_call)):
        of_turned = None  # gradient of the queries as they are turned for these keys
        queries = _queries(of_call, places[stand])
        for distance in ahead:
            part = _part(problem, queries, keys, distance)
            with executor.on_device():
                of_turned, dk, dv = _sum(of_turned, part.dq), _sum(dk, part.dk), _sum(dv, part.dv)
        if of_turned is None:
            continue
        with executor.on_device():
            if of_call.logit_factors is not None:
                of_turned = of_turned * _of_tokens(of_call, of_call.logit_factors)
            dq = _sum(dq, turned(of_call, of_turned, places[stand], inverse=True))
    if not of_call.keys_rotated:
        dk = turned(of_call, dk, places_k, inverse=True)
    with executor.on_device():
        return tuple(x.astype(call.dtype) for x in (dq, dk, dv))  # type: ignore[union-attr]


def _distances(of_call: DualChunkProblem) -> tuple[range, range, range]:
    """Return by how many chunks queries are ahead of keys that they are turned alike for; the last may have none."""
    seqlen_k, packed = of_call.attention.extents.seqlen_k, of_call.packed
    if packed is not None and packed.max_seqlen_k is not None:
        seqlen_k = min(seqlen_k, packed.max_seqlen_k)
    num_chunks = -(-seqlen_k // of_call.chunking.length)
    return range(1), range(1, min(num_chunks, 2)), range(2, num_chunks)


def _queries(of_call: DualChunkProblem, positions: Any) -> Any:
    """Return the queries turned to ``positions``, and times the factors of the sequences: rounded once."""
    call = of_call.attention
    if of_call.logit_factors is None:
        return turned(of_call, call.q, positions)
    with of_call.executor.on_device():
        rows = turned(of_call, call.q.astype(call.accumulator), positions)
        return (rows * _of_tokens(of_call, of_call.logit_factors)).astype(call.dtype)


def _of_tokens(of_call: DualChunkProblem, of_sequences: Any) -> Any:
    """Return numbers [batch] as a factor of queries."""
    xp, packed = of_call.executor.xp, of_call.packed
    if packed is None:
        return of_sequences[:, None, None, None]
    tokens = xp.arange(of_call.attention.extents.seqlen_q)
    return of_sequences[sequences_of(of_call.executor, packed.cu_seqlens_q, tokens)][:, None, None]


def _part(problem: DualChunkBackwardProblem, queries: Any, keys: Any, distance: int) -> Any:
    """Return the gradients by pairs that lie ``distance`` chunks apart."""
    of_call, whole = problem.of_call, problem.whole
    call, length = of_call.attention, of_call.chunking.length
    options: dict[str, Any] = {
        "scale": call.scale,
        "softcap": problem.softcap,
        "chunk": length,
        "causal": distance == 0,
        "diagonal_offset": _diagonal(of_call, distance * length),
    }
    saved = whole.dout, queries, keys, call.v, whole.out, whole.lse
    executor, real = of_call.executor, np.dtype(call.accumulator)
    arrays = ("dq", queries), ("dk", keys), ("dv", call.v)
    options |= {name: executor.empty(x.shape, real) for name, x in arrays}  # rounded once, when parts are summed
    make = backward_arguments.check_packed if problem.cu_seqlens else backward_arguments.check
    return backward(make(*saved, *problem.cu_seqlens, **options, may_be_unrounded=True))


def _diagonal(of_call: DualChunkProblem, lower: int) -> Any:
    """Return the key that query 0 is aligned with, ``lower`` less: one number, or one a sequence."""
    extents, packed = of_call.attention.extents, of_call.packed
    if packed is None:
        return extents.seqlen_k - extents.seqlen_q - lower
    if packed.host is not None:
        seqlens_q, seqlens_k = map(np.diff, packed.host)
        return seqlens_k - seqlens_q - lower
    with of_call.executor.on_device():
        starts = packed.cu_seqlens_k - packed.cu_seqlens_q
        return (starts[1:] - starts[:-1] - lower).astype(np.int32)


def _sum(total: Any, part: Any) -> Any:
    return part if total is None else total + part
