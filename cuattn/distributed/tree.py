"""Decoding with a cache that is divided among ranks: each attends to its keys, and two reductions merge the results.

Vasudev Shyam et al., "Tree attention: topology-aware decoding for long-context attention on GPU clusters", 2024
(arXiv:2408.04093).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from cuattn.distributed.agreement import agree_checked
from cuattn.distributed.group import Group, check_group
from cuattn.errors import ArgumentError, CuattnError
from cuattn.ops.attention.dense import attention
from cuattn.ops.attention.params import UNBOUNDED
from cuattn.ops.decode import arguments
from cuattn.ops.decode.dense import decode_attention
from cuattn.ops.decode.problem import DecodeProblem
from cuattn.runtime.executor import Executor
from cuattn.scalars import check_flag
from cuattn.typing import ArrayT, Causal

__all__ = ["tree_decode_attention"]


def tree_decode_attention(
    q: ArrayT,
    k_shard: Any,
    v_shard: Any,
    seqlens: Any,
    group: Group,
    *,
    causal: Causal = True,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    return_lse: bool = False,
) -> Any:
    """`cuattn.decode_attention` over a cache of which each rank holds some keys: no keys move.

    One all_reduce finds the largest log-sum-exp, a second one adds the results, weighted: what goes over the wire does
    not grow with the cache.

    Parameters
    ----------
    q : array [batch, seqlen_q, heads, head_dim]; float16, bfloat16, float32 or float64
        The newest tokens, the same on every rank.
    k_shard : array [batch, capacity, kv_heads, head_dim], dtype of ``q``
    v_shard : array [batch, capacity, kv_heads, head_dim_v], dtype of ``q``
        The keys and values of this rank, those of the newest tokens included. What lies behind a length is not read.
    seqlens : integers [batch]
        How many keys of each sequence this rank holds, 0 included. One query without window and slopes sees all keys,
        whoever holds which. Otherwise positions count: rank 0 holds the first keys of each sequence, rank 1 those that
        follow, and so on, and the host has to know the lengths.
    group : Group
        All of whose ranks make this call.
    causal, window, softcap, scale, alibi_slopes, sinks
        As for `cuattn.decode_attention`, by positions in the whole cache.
    return_lse : bool
        Return also the log-sum-exp of the logits.

    Returns
    -------
    out : array [batch, seqlen_q, heads, head_dim_v], dtype of ``q``
        The same on every rank. The parts are float32 (float64 for float64), and it is rounded once.
    lse : array [batch, heads, seqlen_q], float32 (float64 for float64); only with ``return_lse``

    Raises
    ------
    ArrayTypeError, DTypeError, ShapeError, NonFiniteError, ArgumentError
        As for `cuattn.decode_attention`; ArgumentError also for lengths on a GPU where positions count.
    MismatchError, PeerError, GroupTimeoutError
        As for `ring_attention`.

    References
    ----------
    Shyam et al., "Tree attention", 2024.

    Examples
    --------
    >>> import numpy as np
    >>> import cuattn
    >>> from cuattn.distributed import ThreadGroup, tree_decode_attention
    >>> rng = np.random.default_rng(0)
    >>> q, k = (rng.standard_normal((1, n, 2, 32)).astype(np.float32) for n in (1, 60))
    >>> def of_rank(group):
    ...     mine = k[:, group.rank * 20 : group.rank * 20 + 20]
    ...     return tree_decode_attention(q, mine, mine, [20], group)
    >>> bool(np.allclose(ThreadGroup.run(3, of_rank)[2], cuattn.decode_attention(q, k, k, [60]), atol=1e-6))
    True
    """
    check_flag("return_lse", return_lse)
    options = {
        "causal": causal,
        "window": window,
        "softcap": softcap,
        "scale": scale,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
    }
    call = _checked(q, k_shard, v_shard, seqlens, check_group(group), options)
    with group.together():
        out, lse = _of_rank(call)
        out, lse = _merged(call, group, out, lse)
    return (out, lse) if return_lse else out


@dataclass
class _Call:
    """A call whose arguments have passed every check.

    Attributes
    ----------
    lengths : list of int, or None
        Keys of each sequence on this rank; None where the host does not know.
    positions : bool
        Whether it matters who holds which keys.
    offsets : list of int, or None
        The diagonal of each sequence among the keys of this rank, where positions matter.
    """

    problem: DecodeProblem
    seqlens: Any
    options: dict[str, Any]
    lengths: list[int] | None
    positions: bool
    offsets: list[int] | None = None


def _checked(q: Any, k: Any, v: Any, seqlens: Any, group: Group, options: dict[str, Any]) -> _Call:
    def check() -> _Call:
        with _own_names():
            problem = arguments.check(q, k, v, seqlens, **options)
        bounds, known = problem.options.bounds, problem.host_seqlens_k
        alone = problem.extents.seqlen_q == 1 and bounds.left == UNBOUNDED and bounds.from_end
        positions = not alone or problem.options.alibi_slopes is not None
        if positions and known is None:
            raise ArgumentError(
                "seqlens lies on a GPU; with several queries, a window or slopes the host has to know the lengths"
            )
        return _Call(problem, seqlens, options, None if known is None else known.tolist(), positions)

    def described(call: _Call) -> tuple[dict[str, Any], Any]:
        extents = call.problem.extents
        shapes: dict[str, Any] = {"batch": extents.batch, "seqlen_q": extents.seqlen_q, "heads": extents.num_heads}
        shapes |= {"kv_heads": extents.num_kv_heads, "dims": [extents.head_dim, extents.head_dim_v]}
        return {**shapes, "dtype": str(call.problem.dtype), **options}, call.lengths

    call, said = agree_checked(group, "tree_decode_attention", check, described)
    if not call.positions:
        return call
    before = [sum(counts) for counts in zip(*said[: group.rank], strict=True)] or [0] * len(said[0])
    totals = [sum(counts) for counts in zip(*said, strict=True)]
    bounds, seqlen_q = call.problem.options.bounds, call.problem.extents.seqlen_q
    call.offsets = [(total - seqlen_q) * bounds.from_end - n for total, n in zip(totals, before, strict=True)]
    return call


@contextmanager
def _own_names() -> Iterator[None]:
    """Let errors speak of the arguments by the names that they have here."""
    try:
        yield
    except CuattnError as error:
        names = {"k_cache": "k_shard", "v_cache": "v_shard", "seqlens_k": "seqlens"}
        error.args = (re.sub(r"\b(k_cache|v_cache|seqlens_k)\b", lambda found: names[found[0]], str(error)),)
        raise


def _of_rank(call: _Call) -> tuple[Any, Any]:
    """Return the attention to the keys of this rank, not rounded, and its lse, [batch, heads, seqlen_q]."""
    problem, executor = call.problem, call.problem.executor
    xp, extents = executor.xp, problem.extents
    options = {name: x for name, x in call.options.items() if name not in ("sinks", "causal", "window")}
    real = np.dtype(problem.accumulator)
    with executor.on_device():
        out = xp.empty((extents.batch, extents.seqlen_q, extents.num_heads, extents.head_dim_v), real)
    if call.offsets is None:
        _, lse = decode_attention(
            problem.q, problem.k, problem.v, call.seqlens, causal=False, out=out, return_lse=True, **options
        )
        return out, lse
    options |= {"causal": call.options["causal"], "window": call.options["window"]}
    with executor.on_device():
        lse = xp.empty((extents.batch, extents.num_heads, extents.seqlen_q), real)
    assert call.lengths is not None
    slopes = problem.options.alibi_slopes
    for rows, length, offset in _alike(call.lengths, call.offsets):
        keys = (x[rows, :length] for x in (problem.k, problem.v))
        if slopes is not None:
            options["alibi_slopes"] = slopes[0] if len(slopes) == 1 else slopes[rows]
        _, part = attention(problem.q[rows], *keys, diagonal_offset=offset, out=out[rows], return_lse=True, **options)
        with executor.on_device():
            lse[rows] = part
    return out, lse


def _alike(lengths: list[int], offsets: list[int]) -> list[tuple[slice, int, int]]:
    """Return stretches of sequences with as many keys and one diagonal: each is one call.

    >>> _alike([3, 3, 4], [0, 0, 0])
    [(slice(0, 2, None), 3, 0), (slice(2, 3, None), 4, 0)]
    """
    found: list[tuple[slice, int, int]] = []
    for number, key in enumerate(zip(lengths, offsets, strict=True)):
        if found and found[-1][1:] == key:
            found[-1] = slice(found[-1][0].start, number + 1), *key
        else:
            found.append((slice(number, number + 1), *key))
    return found


def _merged(call: _Call, group: Group, out: Any, lse: Any) -> tuple[Any, Any]:
    """Merge the results of all ranks: the largest lse, then the weighted sums, [batch, heads, seqlen_q, dim + 1]."""
    executor: Executor = call.problem.executor
    xp, dim = executor.xp, out.shape[-1]
    with executor.on_device(), np.errstate(all="ignore"):
        largest = group.all_reduce(xp.ascontiguousarray(lse), "max")
        weights = xp.where(lse == -xp.inf, 0, xp.exp(lse - largest))
        sums = xp.empty((*lse.shape, dim + 1), lse.dtype)
        sums[..., :dim] = out.transpose(0, 2, 1, 3) * weights[..., None]
        sums[..., dim] = weights
        sums = group.all_reduce(sums)
        total = sums[..., dim]
        sinks = call.problem.options.sinks
        if sinks is not None:
            of_rows = xp.broadcast_to(sinks[None, :, None], lse.shape)
            top = xp.maximum(largest, of_rows)
            scale = xp.where(largest == -xp.inf, 0, xp.exp(largest - top))
            sums, largest = sums * scale[..., None], top
            total = total * scale + xp.where(of_rows == -xp.inf, 0, xp.exp(of_rows - top))
        empty = total == 0
        result = xp.where(empty[..., None], 0, sums[..., :dim] / xp.where(empty, 1, total)[..., None])
        lse = xp.where(empty, -xp.inf, largest + xp.log(xp.where(empty, 1, total)))
        result = xp.ascontiguousarray(result.transpose(0, 2, 1, 3)).astype(call.problem.dtype, copy=False)
    return result, lse.astype(call.problem.accumulator, copy=False)
