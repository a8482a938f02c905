"""Attention over a sequence that is divided among ranks: for the attention itself, heads are divided instead.

Sam Ade Jacobs et al., "DeepSpeed Ulysses: system optimizations for enabling training of extreme long sequence
transformer models", 2023 (arXiv:2309.14509).
"""

from __future__ import annotations

from typing import Any, Unpack

from cuattn.distributed.group import Group
from cuattn.distributed.head_exchange import HeadExchange
from cuattn.distributed.heads import Heads, arrays_of, of_heads
from cuattn.distributed.partitions import Partition, positions_of
from cuattn.distributed.problem import DistributedOptions, RingProblem, check_ring, check_saved, with_defaults
from cuattn.distributed.sinks import sink_gradients
from cuattn.ops.attention.backward.dense import attention_backward
from cuattn.ops.attention.backward.problem import AttentionGrads
from cuattn.ops.attention.backward.varlen import attention_varlen_backward
from cuattn.ops.attention.dense import attention
from cuattn.ops.attention.varlen import attention_varlen
from cuattn.scalars import check_flag
from cuattn.typing import ArrayT

__all__ = ["ulysses_attention", "ulysses_attention_backward"]


def ulysses_attention(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    group: Group,
    *,
    partition: Partition = "zigzag",
    cu_seqlens: Any = None,
    return_lse: bool = False,
    **options: Unpack[DistributedOptions],
) -> Any:
    """`cuattn.attention` of a sequence of which each rank holds a part, by two exchanges of all with all.

    The first gives each rank all tokens of some heads: query heads [r H // R, (r + 1) H // R) and the key/value heads
    that they read, each of which is sent once to every rank that reads it. The second gives the results back. No number
    of heads has to be a multiple of R; ranks beyond the number of heads have nothing to do.

    Parameters
    ----------
    q : array [batch, tokens, heads, head_dim]; float16, bfloat16, float32 or float64
    k : array [batch, tokens_k, kv_heads, head_dim], dtype of ``q``
    v : array [batch, tokens_k, kv_heads, head_dim_v], dtype of ``q``
        What this rank holds, in the order of `partition`: what `shard` returns.
    group : Group
        All of whose ranks make this call.
    partition : {"zigzag", "contiguous", "striped"}
        Who holds which tokens. Each rank has as much to do with any.
    cu_seqlens : integers [sequences + 1], optional
        As for `ring_attention`.
    return_lse : bool
        Return also the log-sum-exp of the logits of this rank's queries.
    causal, window, chunk, softcap, scale, alibi_slopes, sinks, dropout_p, dropout_seed, dropout_offset, precision
        As for `cuattn.attention`, of the whole sequence and of all heads; ``causal`` is True by default.

    Returns
    -------
    out : array [batch, tokens, heads, head_dim_v], dtype of ``q``
        The bits of one device, but for what a row of the kernels' tables chooses by the number of heads.
    lse : array [batch, heads, tokens], float32 (float64 for float64); only with ``return_lse``

    Raises
    ------
    ArrayTypeError, DTypeError, ShapeError, NonFiniteError, ArgumentError
        As for `cuattn.attention`; ShapeError also for tokens that are not those of the partition.
    MismatchError, PeerError, GroupTimeoutError
        As for `ring_attention`.

    References
    ----------
    Jacobs et al., "DeepSpeed Ulysses", 2023.

    Examples
    --------
    >>> import numpy as np
    >>> import cuattn
    >>> from cuattn.distributed import ThreadGroup, shard, ulysses_attention, unshard
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 50, 3, 32)).astype(np.float32)
    >>> def of_rank(group):
    ...     return unshard(ulysses_attention(*(shard(x, group) for x in (q, k, v)), group), group)
    >>> bool(np.allclose(ThreadGroup.run(2, of_rank)[0], cuattn.attention(q, k, v, causal=True), atol=1e-6))
    True
    """
    check_flag("return_lse", return_lse)
    given = with_defaults("ulysses_attention", options)
    where = {"partition": partition, "cu_seqlens": cu_seqlens, "overlap": True}
    problem = check_ring("ulysses_attention", q, k, v, group, **where, **given)
    exchange, boundaries, of_call = _parts(problem, given)

    def attend(run: Heads, q: Any, k: Any, v: Any, out: Any) -> Any:
        make: Any = attention_varlen if boundaries else attention
        own = of_heads(of_call, exchange.own, run, exchange.num_heads)
        return make(q, k, v, *boundaries, out=out, return_lse=True, **own)[1]

    with group.together():
        call = problem.of_rank
        out, lse = exchange.forward(call.q, call.k, call.v, attend, return_lse=return_lse)
    return (out, lse) if return_lse else out


def ulysses_attention_backward(
    dout: ArrayT,
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    out: ArrayT,
    lse: Any,
    group: Group,
    *,
    partition: Partition = "zigzag",
    cu_seqlens: Any = None,
    dlse: Any = None,
    deterministic: bool = True,
    **options: Unpack[DistributedOptions],
) -> AttentionGrads[ArrayT]:
    """Gradients of ``(out * dout).sum() + (lse * dlse).sum()`` over all ranks, ``out, lse = ulysses_attention(...)``.

    Parameters
    ----------
    dout : array [batch, tokens, heads, head_dim_v], dtype of ``q``
        The gradient of this rank's part of the result.
    q, k, v, group
        As for `ulysses_attention`, with head dims from 1 to 256.
    out, lse
        What it returned, with ``return_lse``.
    partition, cu_seqlens
        As they were there, and so are all options.
    dlse : array [batch, heads, tokens], float32 (float64 for float64), optional
        Gradient of ``lse``; 0 by default.
    deterministic : bool
        As for `cuattn.attention_backward`.

    Returns
    -------
    AttentionGrads(dq, dk, dv, dbias=None, dsinks)
        dq, dk and dv of this rank's tokens, like q, k and v. Those of a key/value head that several ranks read are sums
        of float32 parts (float64 for float64), rounded once. dsinks [heads] is the same on every rank.

    Raises
    ------
    ArrayTypeError, DTypeError, ShapeError, NonFiniteError, ArgumentError
        As for `cuattn.attention_backward`.
    MismatchError, PeerError, GroupTimeoutError
        As for `ring_attention`.

    Examples
    --------
    >>> import numpy as np
    >>> from cuattn.distributed import ThreadGroup, shard, ulysses_attention, ulysses_attention_backward
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 50, 2, 32)).astype(np.float32)
    >>> def of_rank(group):
    ...     parts = [shard(x, group) for x in (q, k, v)]
    ...     out, lse = ulysses_attention(*parts, group, return_lse=True)
    ...     return ulysses_attention_backward(np.ones_like(out), *parts, out, lse, group).dv.sum()
    >>> print(round(sum(ThreadGroup.run(2, of_rank))))  # each query of each head gives weights that sum to 1
    3200
    """
    given = with_defaults("ulysses_attention_backward", options)
    where = {"partition": partition, "cu_seqlens": cu_seqlens, "overlap": True}
    common = {"dlse": dlse is not None, "deterministic": deterministic}
    problem = check_ring("ulysses_attention_backward", q, k, v, group, extra=common, **where, **given)
    saved = check_saved(problem.of_rank, group, "ulysses_attention_backward", dout=dout, out=out, lse=lse, dlse=dlse)
    exchange, boundaries, of_call = _parts(problem, given)

    def differentiate(run: Heads, saved: tuple[Any, ...], targets: tuple[Any, ...]) -> None:
        *arrays, dlse = saved
        make: Any = attention_varlen_backward if boundaries else attention_backward
        own = of_heads(of_call, exchange.own, run, exchange.num_heads)
        into = dict(zip(("dq", "dk", "dv"), targets, strict=True))
        make(*arrays, *boundaries, dlse=dlse, deterministic=deterministic, **into, **own)

    with group.together():
        call = problem.of_rank
        arrays = saved["dout"], call.q, call.k, call.v, saved["out"], saved["lse"], saved["dlse"]
        partials = problem.accumulator if exchange.shares_keys else call.dtype
        found = exchange.backward(arrays, differentiate, partials=partials)
        with problem.executor.on_device():
            dq, dk, dv = (x.astype(call.dtype, copy=False) for x in found)
        return AttentionGrads(dq, dk, dv, None, sink_gradients(problem.of_rank, saved, group))


def _parts(problem: RingProblem, given: dict[str, Any]) -> tuple[HeadExchange, tuple[Any, ...], dict[str, Any]]:
    """Return the exchange of a call, the boundaries of its sequences, if packed, and its options."""
    group, call = problem.group, problem.of_rank
    lengths = problem.lengths_q, problem.lengths_k
    places = [
        [positions_of(sum(of), rank, group.size, problem.kind, _boundaries(problem, of)) for rank in range(group.size)]
        for of in lengths
    ]
    exchange = HeadExchange(problem.executor, group, call.extents.num_heads, call.extents.num_kv_heads, *places)
    boundaries = (_boundaries(problem, lengths[0]),) * 2 if problem.packed else ()
    return exchange, boundaries, arrays_of(given, call.options)


def _boundaries(problem: RingProblem, lengths: tuple[int, ...]) -> Any:
    return problem.boundaries(lengths) if problem.packed else None
