"""Gradients of dual-chunk attention: parts of ordinary gradients, by how many chunks a query is ahead of a key.

Chenxin An et al., "Training-free long-context scaling of large language models", 2024 (arXiv:2402.17463); Tri Dao,
"FlashAttention-2: faster attention with better parallelism and work partitioning", 2023 (arXiv:2307.08691).
"""

from __future__ import annotations

from typing import Any, Generic, NamedTuple

from cuattn.ops.attention.slow_calls import BACKWARD_FLOPS, warn_if_slow
from cuattn.ops.dual_chunk.backward_parts import check, gradients
from cuattn.ops.rotary.arguments import Rotary
from cuattn.typing import ArrayT

__all__ = ["DualChunkGrads", "dual_chunk_attention_backward"]


class DualChunkGrads(NamedTuple, Generic[ArrayT]):
    """Gradients of dual-chunk attention.

    Attributes
    ----------
    dq, dk, dv : array, of the shape and dtype of q, k and v
    """

    dq: ArrayT
    dk: ArrayT
    dv: ArrayT


def dual_chunk_attention_backward(
    dout: ArrayT,
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    out: ArrayT,
    lse: Any,
    *,
    chunk_size: int,
    local_size: int,
    rope: Rotary = Rotary(),  # noqa: B008 - frozen
    keys_rotated: bool = False,
    scale: float | None = None,
    logit_factor: Any = 1.0,
    softcap: float | None = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
) -> DualChunkGrads[ArrayT]:
    """Gradients of ``(out * dout).sum()``, where ``out, lse = dual_chunk_attention(q, k, v, return_lse=True, ...)``.

    Every option has to be as it was there; ``out`` and ``lse`` are what it returned. Queries that are n chunks ahead of
    their keys are one part, for n = 0, 1, 2, ...: `cuattn.attention_backward` of the queries as they are turned for
    such keys, with ``out`` and ``lse`` of the whole. Gradients are summed in float32 (float64 for float64) and turned
    back. The parts together do the work of one call, in about chunks of keys times as many launches; nothing of
    seqlen_q x seqlen_k elements is made, and the same inputs give the same bits.

    Parameters
    ----------
    dout : array [batch, seqlen_q, heads, head_dim_v], dtype of ``q``
        Gradient of ``out``. It has to be finite.
    q, k, v : arrays
        As for `cuattn.dual_chunk_attention`, with head dims from 1 to 256.
    out : array [batch, seqlen_q, heads, head_dim_v], dtype of ``q``
    lse : array [batch, heads, seqlen_q], float32 (float64 for float64)
    chunk_size, local_size, rope, keys_rotated, scale, logit_factor, softcap, cu_seqlens_q, cu_seqlens_k
        As for `cuattn.dual_chunk_attention`.

    Returns
    -------
    DualChunkGrads(dq, dk, dv)
        Of the shape and dtype of ``q``, ``k`` and ``v``; dk is of ``k`` as it was given, turned or not.

    Raises
    ------
    ArgumentError, NonFiniteError
        As for `cuattn.dual_chunk_attention`.
    ArrayTypeError, DTypeError, ShapeError
        As for `cuattn.attention_backward`.

    References
    ----------
    An et al., "Training-free long-context scaling of large language models", 2024 (arXiv:2402.17463).

    Examples
    --------
    >>> import numpy as np
    >>> import cuattn
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 10, 2, 32)).astype(np.float32)
    >>> chunks = {"chunk_size": 8, "local_size": 2}
    >>> out, lse = cuattn.dual_chunk_attention(q, k, v, return_lse=True, **chunks)
    >>> dq, dk, dv = cuattn.dual_chunk_attention_backward(np.ones_like(out), q, k, v, out, lse, **chunks)
    >>> round(float(dv.sum()), 3)  # the probabilities of each of 10 queries, 2 heads and 32 columns sum to 1
    640.0
    """
    problem = check(
        dout,
        q,
        k,
        v,
        out,
        lse,
        chunk_size=chunk_size,
        local_size=local_size,
        rope=rope,
        keys_rotated=keys_rotated,
        scale=scale,
        logit_factor=logit_factor,
        softcap=softcap,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )
    warn_if_slow(problem.of_call.attention, problem.of_call.packed, work=BACKWARD_FLOPS)
    return DualChunkGrads(*gradients(problem))
