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
from cuattn.ops.attention.dropout import DropoutOrigin
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
    if queries.sequence != keys.sequence or not queries.strips:
        return
    step = queries.strips[0].step
    if step > 1 or len(queries.strips) == 1:
        # striped, all sequences begin alike: the longest stands for them
        longest = [Strip(slot.strips[0].start, slot.longest, step) for slot in (queries, keys)]
        alibi = problem.of_rank.options.alibi_slopes is not None
        for piece in pieces(longest[0], longest[1], problem.bands[queries.sequence or 0], alibi=alibi):
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
    if slopes is not None:
        with problem.executor.on_device():
            slopes = slopes[0] if len(slopes) == 1 else slopes if queries.sequence is None else slopes[queries.sequence]
            options["alibi_slopes"] = slopes * piece.slope_factor if piece.slope_factor != 1 else slopes
            if piece.slope_shift:
                shift = _of_rows(problem, slopes * piece.slope_shift, queries)
    if len(options) > len(problem.numbers):
        options["diagonal_offset"] = diagonal
    if problem.dropout:
        first, other = queries.strips[0], keys.strips[0]
        place = queries.sequence or 0, problem.first_head, first.start, other.start, problem.num_heads, first.step
        options |= problem.dropout | {"dropout_origin": DropoutOrigin(*place)}
    return Call(queries, keys, options, shift)


def _of_rows(problem: RingProblem, of_heads: Any, queries: Slot) -> Any:
    """Return numbers [heads] or [batch, heads] for every row of an lse."""
    if of_heads.ndim == 1:
        return of_heads[:, None]
    if not problem.packed:
        return of_heads[:, :, None]
    return problem.executor.xp.repeat(of_heads.T, list(queries.counts), axis=1)


def attend(problem: RingProblem, call: Call, q: Any, k: Any, v: Any, out: Any) -> Any:
    """Write the attention of a call to ``out``, and return its lse. Arrays are those of the two slots."""
    options: dict[str, Any] = {**call.options, "return_lse": True}
    if call.queries.sequence is not None:
        _, lse = attention(q[None], k[None], v[None], out=out[None], **options)
        lse = lse[0]
    elif problem.packed:
        _, lse = attention_varlen(q, k, v, *_sequences(call), out=out, **options)
    else:
        _, lse = attention(q, k, v, out=out, **options)
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
    options: dict[str, Any] = {**call.options, "deterministic": deterministic}
    options |= {"dlse": dlse, **targets}
    if call.queries.sequence is not None:
        options |= {name: None if x is None else x[None] for name, x in (("dlse", dlse), *targets.items())}
        attention_backward(dout[None], q[None], k[None], v[None], out[None], lse[None], **options)
    elif problem.packed:
        attention_varlen_backward(dout, q, k, v, out, lse, *_sequences(call), **options)
    else:
        attention_backward(dout, q, k, v, out, lse, **options)


def _sequences(call: Call) -> tuple[Any, Any]:
    """Return the boundaries of the sequences of two slots."""
    return call.queries.cu_seqlens, call.keys.cu_seqlens
