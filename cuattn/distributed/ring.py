"""Attention over a sequence that is divided among ranks: keys and values go round in a ring.

* Hao Liu, Matei Zaharia and Pieter Abbeel, "Ring attention with blockwise transformers for near-infinite context",
  2023 (arXiv:2310.01889).
* William Brandon et al., "Striped attention: faster ring attention for causal transformers", 2023 (arXiv:2311.09431).
"""

from __future__ import annotations

from typing import Any

from cuattn.distributed.calls import Call, attend, calls
from cuattn.distributed.group import Group
from cuattn.distributed.partitions import Partition
from cuattn.distributed.problem import RingProblem, check_ring
from cuattn.distributed.rotation import Rotation
from cuattn.ops.merge.states import merge_states
from cuattn.scalars import check_flag
from cuattn.typing import ArrayT, Causal, Precision

__all__ = ["ring_attention"]


def ring_attention(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    group: Group,
    *,
    partition: Partition = "zigzag",
    causal: Causal = True,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    dropout_p: float = 0.0,
    dropout_seed: int = 0,
    dropout_offset: int = 0,
    precision: Precision | None = None,
    cu_seqlens: Any = None,
    overlap: bool = True,
    return_lse: bool = False,
) -> Any:
    """`cuattn.attention` of a sequence of which each rank holds a part: of the queries, and of the keys and values.

    In each of R steps a rank computes the attention of its queries to the keys that are with it, and these travel on
    to the next rank. The results of the steps are float32 (float64 for float64) and are rounded once, at the end. No
    rank ever holds more keys than two shares. Every option means what it means for the whole sequence.

    Parameters
    ----------
    q : array [batch, tokens, heads, head_dim]; float16, bfloat16, float32 or float64
        The queries of this rank, in the order of `partition`: those that `shard` returns.
    k : array [batch, tokens_k, kv_heads, head_dim], dtype of ``q``
    v : array [batch, tokens_k, kv_heads, head_dim_v], dtype of ``q``
        The keys and values of this rank. They may be of another sequence, of any length.
    group : Group
        All of whose ranks make this call.
    partition : {"zigzag", "contiguous", "striped"}
        Who holds which tokens; with a causal mask "zigzag" and "striped" give every rank as much to do.
    causal, window, softcap, scale, alibi_slopes, sinks, precision
        As for `cuattn.attention`, by positions in the whole sequence.
    dropout_p, dropout_seed, dropout_offset
        As for `cuattn.attention`: dropped is what one device drops, bit for bit.
    cu_seqlens : integers [sequences + 1], optional
        The arrays hold packed sequences, [tokens, heads, head_dim], each of which is divided among the ranks: these are
        the boundaries in the whole array, for queries and keys alike. The host has to know them.
    overlap : bool
        Send the keys and values on before the step that reads them, so that they travel while it computes. The result
        is the same.
    return_lse : bool
        Return also the log-sum-exp of the logits of this rank's queries.

    Returns
    -------
    out : array [batch, tokens, heads, head_dim_v], dtype of ``q``
        Of this rank's queries. The same bits every time.
    lse : array [batch, heads, tokens], float32 (float64 for float64); only with ``return_lse``

    Raises
    ------
    ArrayTypeError, DTypeError, ShapeError, NonFiniteError, ArgumentError
        As for `cuattn.attention`; ShapeError also for tokens that are not those of the partition.
    MismatchError
        Ranks have called with other shapes or options. Nothing has been sent.
    PeerError, GroupTimeoutError
        Another rank has raised, or does not come.

    References
    ----------
    Liu, Zaharia and Abbeel, "Ring attention with blockwise transformers for near-infinite context", 2023; Brandon et
    al., "Striped attention", 2023.

    Examples
    --------
    >>> import numpy as np
    >>> import cuattn
    >>> from cuattn.distributed import ThreadGroup, ring_attention, shard, unshard
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 50, 2, 32)).astype(np.float32)
    >>> def of_rank(group):
    ...     return unshard(ring_attention(*(shard(x, group) for x in (q, k, v)), group), group)
    >>> whole = cuattn.attention(q, k, v, causal=True)
    >>> bool(np.allclose(ThreadGroup.run(4, of_rank)[0], whole, atol=1e-6))
    True
    """
    check_flag("return_lse", return_lse)
    problem = check_ring(
        "ring_attention",
        q,
        k,
        v,
        group,
        partition=partition,
        cu_seqlens=cu_seqlens,
        overlap=overlap,
        causal=causal,
        window=window,
        softcap=softcap,
        scale=scale,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        dropout_offset=dropout_offset,
        precision=precision,
    )
    with group.together():
        out, lse = forward(problem, overlap=overlap)
    return (out, lse) if return_lse else out


def forward(problem: RingProblem, *, overlap: bool) -> tuple[Any, Any]:
    """Return out and lse of this rank's queries."""
    executor, group, extents = problem.executor, problem.group, problem.of_rank.extents
    xp, layout = executor.xp, problem.queries
    q = problem.by_slots(problem.of_rank.q, layout)
    ring = keys_and_values(problem)
    with executor.on_device():
        total = xp.empty(extents.out_shape, problem.accumulator)
        total_lse = xp.empty(extents.lse_shape, problem.accumulator)
    begun = [False] * len(layout.slots)
    for step in range(group.size):
        moves = step < group.size - 1
        if moves and overlap:
            ring.start()
        k, v = ring.arrays()
        group.traffic.note("compute", step, "attention")
        for number, slot in enumerate(layout.slots):
            where = problem.tokens(total, slot.first, slot.end), total_lse[..., slot.first : slot.end]
            for keys in problem.keys(ring.owner).slots:
                of_keys = problem.tokens(k, keys.first, keys.end), problem.tokens(v, keys.first, keys.end)
                for call in calls(problem, slot, keys):
                    operands = problem.tokens(q, slot.first, slot.end), *of_keys
                    _add(problem, call, operands, where, first=not begun[number])
                    begun[number] = True
        if moves:
            if not overlap:
                ring.start()
            ring.finish()
    for number, slot in enumerate(layout.slots):
        if not begun[number]:
            with executor.on_device():
                problem.tokens(total, slot.first, slot.end)[...] = 0
                total_lse[..., slot.first : slot.end] = -xp.inf
    return _finished(problem, total, total_lse)


def keys_and_values(problem: RingProblem) -> Rotation:
    """Return the ring of keys and values, with those of this rank in it."""
    ring = Rotation(problem.executor, problem.group, problem.shapes_of_keys(), problem.of_rank.dtype, "keys and values")
    own = problem.keys(problem.group.rank)
    with problem.executor.on_device():
        for target, x in zip(ring.arrays(), (problem.of_rank.k, problem.of_rank.v), strict=True):
            target[...] = problem.by_slots(x, own)
    return ring


def _add(
    problem: RingProblem, call: Call, operands: tuple[Any, Any, Any], where: tuple[Any, Any], *, first: bool
) -> None:
    """Compute a call, and merge it into the state of its queries, out and lse; the first one begins it."""
    executor, (out, lse) = problem.executor, where
    with executor.on_device():
        part = out if first else executor.xp.empty(out.shape, out.dtype)
    part_lse = attend(problem, call, *operands, part)
    if first:
        with executor.on_device():
            lse[...] = part_lse
    else:
        merge_states(out, lse, part, part_lse, out=(out, lse))


def _finished(problem: RingProblem, total: Any, lse: Any) -> tuple[Any, Any]:
    """Return out, with the sinks and rounded once, and lse, as the caller has tokens."""
    executor, sinks = problem.executor, problem.of_rank.options.sinks
    if sinks is not None or problem.of_rank.dtype != problem.accumulator:
        out = executor.empty(total.shape, problem.of_rank.dtype)
        new_lse = executor.empty(lse.shape, lse.dtype)
        merge_states(total[None], lse[None], sinks=sinks, out=(out, new_lse))
        executor.finish(out, new_lse)
        total, lse = out, new_lse
    layout = problem.queries
    return problem.as_given(total, layout), problem.as_given(lse, layout, axis=-1)
