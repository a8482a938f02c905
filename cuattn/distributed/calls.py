"""The calls of attention, and of its gradients, that a rank makes for two slots of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from cuattn.distributed.layout import Slot
from cuattn.distributed.partitions import Strip
from cuattn.distributed.pieces import Piece, pieces
from cuattn.distributed.problem import RingProblem
from cuattn.ops.attention.backward.dense import attention_backward
from cuattn.ops.attention.backward.varlen import attention_varlen_backward
from cuattn.ops.attention.dense import attention
from cuattn.ops.attention.varlen import attention_varlen

__all__ = ["Call", "attend", "calls", "gradients"]


@dataclass
class Call:
    """A piece of two slots, with all options of its kernels.

    ``lse_shift``: what the lse of the kernels is above that of the whole sequence, to be broadcast to [B, H, N] or
    [H, T]; None for nothing.
    """

    queries: Slot
    keys: Slot
    options: dict[str, Any]
    lse_shift: Any = None


def calls(problem: RingProblem, queries: Slot, keys: Slot) -> Iterator[Call]:
    """Yield the calls for two slots; none where no query sees a key."""
    slopes = problem.of_rank.options.alibi_slopes
    step = queries.strips[0].step if queries.strips else 1
    if step > 1 or not problem.packed:
        # the strips of all sequences lie alike, but for their lengths
        ends = [Strip(slot.strips[0].start, slot.longest, step) for slot in (queries, keys)] if queries.strips else []
        found = list(pieces(ends[0], ends[1], problem.bands[0], alibi=slopes is not None)) if ends else []
        for piece in found:
            yield _call(problem, queries, keys, piece, piece.diagonal)
        return
    diagonals, seen = [], None
    for strip, other, band in zip(queries.strips, keys.strips, problem.bands, strict=True):
        diagonals.append(strip.start + band.offset - other.start)
        seen = next(pieces(strip, other, band), seen)
    if seen is not None:
        yield _call(problem, queries, keys, seen, np.array(diagonals, np.int32))


def _call(problem: RingProblem, queries: Slot, keys: Slot, piece: Piece, diagonal: Any) -> Call:
    options = dict(problem.numbers)
    if piece.window != (None, None):
        options["window"] = piece.window
    shift, slopes = None, problem.of_rank.options.alibi_slopes
    if options.get("window") is not None or slopes is not None:
        options["diagonal_offset"] = diagonal
    if slopes is not None:
        with problem.executor.on_device():
            slopes = slopes if problem.of_rank.extents.batch > 1 and slopes.shape[0] > 1 else slopes[0]
            options["alibi_slopes"] = slopes * piece.slope_factor if piece.slope_factor != 1 else slopes
            if piece.slope_shift:
                shift = _of_rows(problem, slopes * piece.slope_shift, queries)
    return Call(queries, keys, options, shift)


def _of_rows(problem: RingProblem, of_heads: Any, queries: Slot) -> Any:
    """Return numbers [heads] or [batch, heads] for every row of an lse."""
    if of_heads.ndim == 1:
        return of_heads[:, None]
    if not problem.packed:
        return of_heads[:, :, None]
    return problem.executor.xp.repeat(of_heads.T, problem.executor.xp.asarray(queries.counts), axis=1)


def attend(problem: RingProblem, call: Call, q: Any, k: Any, v: Any, out: Any) -> Any:
    """Write the attention of a call to ``out``, and return its lse. Arrays are those of the two slots."""
    options: dict[str, Any] = {**call.options, "out": out, "return_lse": True}
    if problem.packed:
        _, lse = attention_varlen(q, k, v, *_sequences(call), **options)
    else:
        _, lse = attention(q, k, v, **options)
    if call.lse_shift is not None:
        with problem.executor.on_device():
            lse -= call.lse_shift
    return lse


def gradients(
    problem: RingProblem,
    call: Call,
    saved: tuple[Any, Any, Any, Any],
    k: Any,
    v: Any,
    *,
    dlse: Any,
    deterministic: bool,
    targets: dict[str, Any],
) -> None:
    """Write the gradients of a call to ``targets``, dq, dk and dv. ``saved``: dout, q, out and lse of the queries."""
    dout, q, out, lse = saved
    if call.lse_shift is not None:
        with problem.executor.on_device():
            lse = lse + call.lse_shift
    make: Any = attention_varlen_backward if problem.packed else attention_backward
    boundaries = _sequences(call) if problem.packed else ()
    options = {**call.options, "dlse": dlse, "deterministic": deterministic}
    make(dout, q, k, v, out, lse, *boundaries, **options, **targets)


def _sequences(call: Call) -> tuple[Any, Any]:
    return call.queries.cu_seqlens, call.keys.cu_seqlens
