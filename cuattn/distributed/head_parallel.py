"""Attention of the heads of a rank: the attention of tensor parallelism, where nothing has to be exchanged.

Mohammad Shoeybi et al., "Megatron-LM: training multi-billion parameter language models using model parallelism", 2019
(arXiv:1909.08053).
"""

from __future__ import annotations

from typing import Any, NamedTuple, Unpack

import numpy as np

from cuattn.distributed.agreement import agree_checked
from cuattn.distributed.group import Group, check_group
from cuattn.distributed.heads import Heads, arrays_of, of_heads, runs, split_heads
from cuattn.distributed.partitions import check_cu_seqlens
from cuattn.distributed.problem import DistributedOptions, check_rank, check_saved, with_defaults
from cuattn.errors import ArgumentError, ShapeError
from cuattn.ops.attention import arguments
from cuattn.ops.attention.arguments import Problem
from cuattn.ops.attention.backward.dense import attention_backward
from cuattn.ops.attention.backward.problem import AttentionGrads
from cuattn.ops.attention.backward.varlen import attention_varlen_backward
from cuattn.ops.attention.dense import attention
from cuattn.ops.attention.varlen import attention_varlen
from cuattn.scalars import MAX_EXTENT, check_flag, integer
from cuattn.typing import ArrayT

__all__ = ["head_parallel", "head_parallel_backward", "heads_of_rank"]


def heads_of_rank(num_heads: Any, num_kv_heads: Any, group: Group) -> tuple[slice, slice]:
    """Return which query heads this rank has, and which key/value heads these read.

    Parameters
    ----------
    num_heads, num_kv_heads : int
        Of the whole model; the first is a multiple of the second.
    group : Group

    Returns
    -------
    queries, keys : slice
        Query heads [r H // R, (r + 1) H // R). Two ranks may read one key/value head, and a rank may have no heads.

    Raises
    ------
    ArgumentError
        Numbers that are no numbers of heads, or no group.

    Examples
    --------
    >>> from cuattn.distributed import ThreadGroup, heads_of_rank
    >>> ThreadGroup.run(2, lambda group: heads_of_rank(9, 3, group))
    [(slice(0, 4, None), slice(0, 2, None)), (slice(4, 9, None), slice(1, 3, None))]
    """
    group = check_group(group)
    num_heads = integer("num_heads", num_heads, 1, MAX_EXTENT)
    num_kv_heads = integer("num_kv_heads", num_kv_heads, 1, MAX_EXTENT)
    if num_heads % num_kv_heads:
        raise ArgumentError(f"num_heads is {num_heads}, which is no multiple of num_kv_heads, {num_kv_heads}")
    own = split_heads(num_heads, num_kv_heads, group.size)[group.rank]
    return own.queries, own.keys


def head_parallel(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    group: Group,
    *,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    cu_seqlens: Any = None,
    return_lse: bool = False,
    **options: Unpack[DistributedOptions],
) -> Any:
    """`cuattn.attention` with the heads of this rank alone: no bytes move.

    Parameters
    ----------
    q : array [batch, seqlen, heads, head_dim]; float16, bfloat16, float32 or float64
    k : array [batch, seqlen_k, kv_heads, head_dim], dtype of ``q``
    v : array [batch, seqlen_k, kv_heads, head_dim_v], dtype of ``q``
        All heads, of which the rank's are read; or, with ``num_heads`` and ``num_kv_heads``, the rank's own alone:
        those that `heads_of_rank` names.
    group : Group
        All of whose ranks make this call.
    num_heads, num_kv_heads : int, optional
        Heads of the whole model; both or neither.
    cu_seqlens : integers [sequences + 1], optional
        The arrays hold packed sequences, [tokens, heads, head_dim].
    return_lse : bool
        Return also the log-sum-exp of the logits.
    causal, window, chunk, softcap, scale, alibi_slopes, sinks, dropout_p, dropout_seed, dropout_offset, precision
        As for `cuattn.attention`, of all heads; ``causal`` is True by default.

    Returns
    -------
    out : array [batch, seqlen, own heads, head_dim_v], dtype of ``q``
        Of the rank's heads: what goes into its rows of the next projection, whose results are then to be added.
    lse : array [batch, own heads, seqlen], float32 (float64 for float64); only with ``return_lse``

    Raises
    ------
    ArrayTypeError, DTypeError, ShapeError, NonFiniteError, ArgumentError
        As for `cuattn.attention`; ShapeError also for heads that are not the rank's.
    MismatchError, PeerError, GroupTimeoutError
        As for `ring_attention`.

    References
    ----------
    Shoeybi et al., "Megatron-LM", 2019.

    Examples
    --------
    >>> import numpy as np
    >>> import cuattn
    >>> from cuattn.distributed import ThreadGroup, head_parallel
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 20, 3, 32)).astype(np.float32)
    >>> parts = ThreadGroup.run(2, lambda group: head_parallel(q, k, v, group))
    >>> [part.shape for part in parts]
    [(1, 20, 1, 32), (1, 20, 2, 32)]
    >>> bool(np.allclose(np.concatenate(parts, axis=2), cuattn.attention(q, k, v, causal=True), atol=1e-6))
    True
    """
    check_flag("return_lse", return_lse)
    given = with_defaults("head_parallel", options)
    call = _checked("head_parallel", q, k, v, group, (num_heads, num_kv_heads), cu_seqlens, given)
    executor, xp = call.problem.executor, call.problem.executor.xp
    with executor.on_device():
        out = xp.empty((*call.q.shape[:-1], call.v.shape[-1]), call.v.dtype)
        lse = xp.empty((*call.q.shape[:-3], call.q.shape[-2], call.q.shape[-3]), call.problem.accumulator)
    for run in call.runs:
        arrays = call.q[..., run.queries, :], call.k[..., run.keys, :], call.v[..., run.keys, :]
        make: Any = attention_varlen if call.boundaries else attention
        own = of_heads(call.options, call.own, run, call.num_heads)
        _, part = make(*arrays, *call.boundaries, out=out[..., run.queries, :], return_lse=True, **own)
        with executor.on_device():
            lse[..., run.queries, :] = part
    return (out, lse) if return_lse else out


def head_parallel_backward(
    dout: ArrayT,
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    out: ArrayT,
    lse: Any,
    group: Group,
    *,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    cu_seqlens: Any = None,
    dlse: Any = None,
    deterministic: bool = True,
    **options: Unpack[DistributedOptions],
) -> AttentionGrads[ArrayT]:
    """Gradients of ``(out * dout).sum() + (lse * dlse).sum()``, ``out, lse = head_parallel(...)``: no bytes move.

    Parameters
    ----------
    dout, out : array [batch, seqlen, own heads, head_dim_v], dtype of ``q``
    lse, dlse : array [batch, own heads, seqlen], float32 (float64 for float64); dlse optional
    q, k, v, group, num_heads, num_kv_heads, cu_seqlens
        As for `head_parallel`, and so are all options.
    deterministic : bool
        As for `cuattn.attention_backward`.

    Returns
    -------
    AttentionGrads(dq, dk, dv, dbias=None, dsinks)
        dq of the rank's query heads, dk and dv of the key/value heads that they read: the part of this rank, where
        others read them as well. dsinks [heads]: 0 but for the rank's heads.

    Raises
    ------
    ArrayTypeError, DTypeError, ShapeError, NonFiniteError, ArgumentError
        As for `cuattn.attention_backward`.
    MismatchError, PeerError, GroupTimeoutError
        As for `ring_attention`.

    Examples
    --------
    >>> import numpy as np
    >>> from cuattn.distributed import ThreadGroup, head_parallel, head_parallel_backward
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 20, 2, 32)).astype(np.float32)
    >>> def of_rank(group):
    ...     out, lse = head_parallel(q, k, v, group, return_lse=True)
    ...     return head_parallel_backward(np.ones_like(out), q, k, v, out, lse, group).dv
    >>> [part.shape for part in ThreadGroup.run(2, of_rank)]
    [(1, 20, 1, 32), (1, 20, 1, 32)]
    """
    given = with_defaults("head_parallel_backward", options)
    call = _checked("head_parallel_backward", q, k, v, group, (num_heads, num_kv_heads), cu_seqlens, given)
    arrays = {"dout": dout, "out": out, "lse": lse, "dlse": dlse}
    own_heads = call.own.end - call.own.first
    saved = check_saved(call.problem, group, "head_parallel_backward", own_heads=own_heads, **arrays)
    executor, xp = call.problem.executor, call.problem.executor.xp
    with executor.on_device():
        dq, dk, dv = (xp.empty(x.shape, x.dtype) for x in (call.q, call.k, call.v))
        sinks = call.problem.options.sinks
        dsinks = None if sinks is None else xp.zeros(call.num_heads, call.problem.accumulator)
    for run in call.runs:
        queries, keys = run.queries, run.keys
        rows = {name: None if x is None else x[..., queries, :] for name, x in saved.items()}
        make: Any = attention_varlen_backward if call.boundaries else attention_backward
        found = make(
            rows["dout"],
            call.q[..., queries, :],
            call.k[..., keys, :],
            call.v[..., keys, :],
            rows["out"],
            rows["lse"],
            *call.boundaries,
            dlse=rows["dlse"],
            deterministic=deterministic,
            dq=dq[..., queries, :],
            dk=dk[..., keys, :],
            dv=dv[..., keys, :],
            **of_heads(call.options, call.own, run, call.num_heads),
        )
        if dsinks is not None:
            with executor.on_device():
                dsinks[call.own.first + run.first : call.own.first + run.end] = found.dsinks
    return AttentionGrads(dq, dk, dv, None, dsinks)


class _Call(NamedTuple):
    """A call whose arguments have passed every check; the arrays hold the rank's heads."""

    problem: Problem
    own: Heads
    num_heads: int
    runs: tuple[Heads, ...]
    q: Any
    k: Any
    v: Any
    boundaries: tuple[Any, ...]
    options: dict[str, Any]


def _checked(
    name: str,
    q: Any,
    k: Any,
    v: Any,
    group: Any,
    heads: tuple[int | None, int | None],
    cu_seqlens: Any,
    given: dict[str, Any],
) -> _Call:
    """Check the arguments of this rank, and agree with the others."""
    group = check_group(group)

    def check() -> _Call:
        cu = None if cu_seqlens is None else check_cu_seqlens(cu_seqlens)
        lengths = None if cu is None else tuple((cu[1:] - cu[:-1]).tolist())
        if (heads[0] is None) != (heads[1] is None):
            raise ArgumentError("num_heads and num_kv_heads are needed together, or neither of them")
        executor = arguments.executor_of(q, k, v, None, {})
        arrays = [executor.asarray(what, x) for what, x in (("q", q), ("k", k), ("v", v))]
        whole = arrays
        if heads[0] is not None:
            arguments.check_rank(*arrays, packed=cu is not None)
            heads_of_rank(heads[0], heads[1], group)
            with executor.on_device():  # shapes of all heads, and no memory for them
                whole = [
                    executor.xp.broadcast_to(executor.xp.zeros((), x.dtype), (*x.shape[:-2], number, x.shape[-1]))
                    for x, number in zip(arrays, (heads[0], heads[1], heads[1]), strict=True)
                ]
        problem = check_rank(whole[0], whole[1], whole[2], lengths, given)
        num_heads, num_kv_heads = problem.extents.num_heads, problem.extents.num_kv_heads
        own = split_heads(num_heads, num_kv_heads, group.size)[group.rank]
        if heads[0] is None:
            arrays = [x[..., of, :] for x, of in zip(arrays, (own.queries, own.keys, own.keys), strict=True)]
        for what, x, of in zip(("q", "k", "v"), arrays, (own.queries, own.keys, own.keys), strict=True):
            if x.shape[-2] != of.stop - of.start:
                raise ShapeError(
                    f"{what} has {x.shape[-2]} heads; rank {group.rank} of {group.size} has {of.start} to {of.stop}"
                )
        calls = runs(own, num_heads // max(num_kv_heads, 1))
        boundaries = () if cu is None else (cu.astype(np.int32),) * 2
        found = arrays_of(given, problem.options)
        return _Call(problem, own, num_heads, calls, arrays[0], arrays[1], arrays[2], boundaries, found)

    def described(call: _Call) -> tuple[dict[str, Any], None]:
        extents = call.problem.extents
        shapes: dict[str, Any] = {"heads": call.num_heads, "num_heads": heads, "dtype": str(call.problem.dtype)}
        shapes |= {"shape": [extents.batch, extents.seqlen_q, extents.seqlen_k, extents.head_dim, extents.head_dim_v]}
        return {**shapes, "cu_seqlens": cu_seqlens, **given}, None

    return agree_checked(group, name, check, described)[0]
