"""Gradients of attention over a sequence that is divided among ranks.

Hao Liu, Matei Zaharia and Pieter Abbeel, "Ring attention with blockwise transformers for near-infinite context", 2023
(arXiv:2310.01889).
"""

from __future__ import annotations

from typing import Any

from cuattn.distributed.calls import calls, gradients
from cuattn.distributed.group import Group
from cuattn.distributed.partitions import Partition
from cuattn.distributed.problem import RingProblem, check_ring, check_saved
from cuattn.distributed.ring import keys_and_values
from cuattn.distributed.rotation import Rotation
from cuattn.distributed.sinks import sink_gradients
from cuattn.ops.attention.backward.problem import AttentionGrads
from cuattn.typing import ArrayT, Causal, Precision

__all__ = ["backward", "ring_attention_backward"]


def ring_attention_backward(
    dout: ArrayT,
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    out: ArrayT,
    lse: Any,
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
    dlse: Any = None,
    deterministic: bool = True,
) -> AttentionGrads[ArrayT]:
    """Gradients of ``(out * dout).sum() + (lse * dlse).sum()`` over all ranks, ``out, lse = ring_attention(...)``.

    Keys and values go round once more, and the sums of their gradients, float32 (float64 for float64), behind them, one
    step further: home.

    Parameters
    ----------
    dout : array [batch, tokens, heads, head_dim_v], dtype of ``q``
        The gradient of this rank's part of the result.
    q, k, v, group
        As for `ring_attention`, with head dims from 1 to 256.
    out, lse
        What it returned, with ``return_lse``.
    partition, causal, window, softcap, scale, alibi_slopes, sinks, dropout_p, dropout_seed, dropout_offset, precision
        As they were there.
    cu_seqlens, overlap
        As for `ring_attention`.
    dlse : array [batch, heads, tokens], float32 (float64 for float64), optional
        Gradient of ``lse``; 0 by default.
    deterministic : bool
        As for `cuattn.attention_backward`.

    Returns
    -------
    AttentionGrads(dq, dk, dv, dbias=None, dsinks)
        dq, dk and dv of this rank's tokens, like q, k and v: sums over the steps, rounded once. dsinks [heads]: the
        same on every rank, summed over all queries.

    Raises
    ------
    ArrayTypeError, DTypeError, ShapeError, NonFiniteError, ArgumentError
        As for `cuattn.attention_backward`.
    MismatchError, PeerError, GroupTimeoutError
        As for `ring_attention`.

    Examples
    --------
    >>> import numpy as np
    >>> from cuattn.distributed import ThreadGroup, ring_attention, ring_attention_backward, shard
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 50, 2, 32)).astype(np.float32)
    >>> def of_rank(group):
    ...     parts = [shard(x, group) for x in (q, k, v)]
    ...     out, lse = ring_attention(*parts, group, return_lse=True)
    ...     return ring_attention_backward(np.ones_like(out), *parts, out, lse, group).dv.sum()
    >>> print(round(sum(ThreadGroup.run(2, of_rank))))  # each query of each head gives weights that sum to 1
    3200
    """
    common = {"dlse": dlse is not None, "deterministic": deterministic}
    problem = check_ring(
        "ring_attention_backward",
        q,
        k,
        v,
        group,
        partition=partition,
        cu_seqlens=cu_seqlens,
        overlap=overlap,
        extra=common,
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
    saved = check_saved(problem.of_rank, group, "ring_attention_backward", dout=dout, out=out, lse=lse, dlse=dlse)
    with group.together():
        dq, dk, dv = backward(problem, saved, overlap=overlap, deterministic=deterministic)
        with problem.executor.on_device():
            dq, dk, dv = (x.astype(problem.of_rank.dtype, copy=False) for x in (dq, dk, dv))
        return AttentionGrads(dq, dk, dv, None, sink_gradients(problem.of_rank, saved, group))


def backward(
    problem: RingProblem, saved: dict[str, Any], *, overlap: bool, deterministic: bool
) -> tuple[Any, Any, Any]:
    """Return dq, dk and dv of this rank's tokens, of the accumulator's type."""
    executor, group, layout = problem.executor, problem.group, problem.queries
    q, dout, out = (problem.by_slots(x, layout) for x in (problem.of_rank.q, saved["dout"], saved["out"]))
    lse, dlse = (problem.lse_by_slots(saved[name], layout) for name in ("lse", "dlse"))
    ring = keys_and_values(problem)
    sums = Rotation(executor, group, problem.shapes_of_keys(), problem.accumulator, "their gradients")
    with executor.on_device():
        dq = executor.xp.zeros(q.shape, problem.accumulator)
    for step in range(group.size):
        moves = step < group.size - 1
        if moves and overlap:
            ring.start()
        group.traffic.note("compute", step, "gradients")
        k, v = ring.arrays()
        with executor.on_device():
            dk, dv = (executor.xp.zeros(x.shape, problem.accumulator) for x in (k, v))
        for slot in layout.slots:
            rows = slot.first, slot.end
            of_slot = tuple(problem.tokens(x, *rows) for x in (dout, q, out)), lse[..., rows[0] : rows[1]]
            (dout_part, q_part, out_part), lse_part = of_slot
            for keys in problem.keys(ring.owner).slots:
                k_part, v_part = (problem.tokens(x, keys.first, keys.end) for x in (k, v))
                targets = [problem.tokens(dq, *rows), *(problem.tokens(x, keys.first, keys.end) for x in (dk, dv))]
                for call in calls(problem, slot, keys):
                    with executor.on_device():
                        parts = [executor.xp.empty(x.shape, x.dtype) for x in targets]
                    gradients(
                        problem,
                        call,
                        (dout_part, q_part, out_part, lse_part),
                        k_part,
                        v_part,
                        dlse=None if dlse is None else dlse[..., rows[0] : rows[1]],
                        deterministic=deterministic,
                        targets=dict(zip(("dq", "dk", "dv"), parts, strict=True)),
                    )
                    with executor.on_device():
                        for target, part in zip(targets, parts, strict=True):
                            target += part
        _pass_on(problem, sums, (dk, dv))
        if moves:
            if not overlap:
                ring.start()
            ring.finish()
    if group.size > 1:
        sums.finish()  # the last hop brings the sums home
    own = problem.keys(group.rank)
    with executor.on_device():
        dk, dv = (problem.as_given(x, own) for x in sums.arrays())
    return problem.as_given(dq, layout), dk, dv


def _pass_on(problem: RingProblem, sums: Rotation, parts: tuple[Any, Any]) -> None:
    """Add this rank's part to the sums that have come with the keys, and send them on."""
    first = not sums.is_moving
    if not first:
        sums.finish()
    with problem.executor.on_device():
        for total, part in zip(sums.arrays(), parts, strict=True):
            if first:
                total[...] = part
            else:
                total += part
    if problem.group.size > 1:
        sums.start()
