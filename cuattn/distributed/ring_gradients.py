"""Gradients of attention over a sequence that is divided among ranks.

Hao Liu, Matei Zaharia and Pieter Abbeel, "Ring attention with blockwise transformers for near-infinite context", 2023
(arXiv:2310.01889).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cuattn.distributed.agreement import agree_checked
from cuattn.distributed.calls import calls, gradients
from cuattn.distributed.group import Group
from cuattn.distributed.partitions import Partition
from cuattn.distributed.problem import RingProblem, check_ring
from cuattn.distributed.ring import keys_and_values
from cuattn.distributed.rotation import Rotation
from cuattn.errors import DTypeError, ShapeError
from cuattn.ops.attention.backward.problem import AttentionGrads
from cuattn.typing import ArrayT, Causal, Precision

__all__ = ["ring_attention_backward"]


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
    saved, _ = agree_checked(
        group,
        "ring_attention_backward",
        lambda: _check_saved(problem, {"dout": dout, "out": out, "lse": lse, "dlse": dlse}),
        lambda _: ({}, None),
    )
    with group.together():
        return _backward(problem, saved, overlap=overlap, deterministic=deterministic)


def _check_saved(problem: RingProblem, saved: dict[str, Any]) -> dict[str, Any]:
    """Return what forward returned, and the gradients of it, as arrays of the executor."""
    extents = problem.of_rank.extents
    found: dict[str, Any] = {}
    for name, x in saved.items():
        if x is None and name == "dlse":
            found[name] = None
            continue
        of_lse = name in ("lse", "dlse")
        shape = extents.lse_shape if of_lse else extents.out_shape
        dtype = problem.accumulator if of_lse else problem.of_rank.dtype
        x = found[name] = problem.executor.asarray(name, x)
        if tuple(x.shape) != shape:
            raise ShapeError(f"{name} has shape {tuple(x.shape)}; {shape} is needed for these q, k and v")
        if x.dtype != dtype:
            raise DTypeError(f"{name} has dtype {x.dtype}; {np.dtype(dtype)} is needed")
    return found


def _backward(
    problem: RingProblem, saved: dict[str, Any], *, overlap: bool, deterministic: bool
) -> AttentionGrads[Any]:
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
        found = [problem.as_given(dq, layout), *(problem.as_given(x, own) for x in sums.arrays())]
        dq, dk, dv = (x.astype(problem.of_rank.dtype) for x in found)
    return AttentionGrads(dq, dk, dv, None, _dsinks(problem, saved))


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


def _dsinks(problem: RingProblem, saved: dict[str, Any]) -> Any:
    """Return the gradient of the sinks: -Σ e^(sink - lse) Δ over the queries of all ranks."""
    sinks = problem.of_rank.options.sinks
    if sinks is None:
        return None
    executor, real = problem.executor, problem.accumulator
    with executor.on_device(), np.errstate(all="ignore"):
        xp = executor.xp
        rows = xp.moveaxis((saved["dout"].astype(real) * saved["out"].astype(real)).sum(axis=-1), -1, -2)
        lse = saved["lse"]
        if saved["dlse"] is not None:
            rows = rows - saved["dlse"]
        weights = xp.where(lse == -xp.inf, 0, xp.exp(sinks[:, None] - lse))
        terms = -(weights * rows)
        terms = xp.ascontiguousarray(terms.sum(axis=-1) if problem.packed else terms.sum(axis=(0, 2)))
    return problem.group.all_reduce(terms)
