"""Decoding in dual chunks: the keys of a query's own chunk, of the one before, and older ones, each a decode call.

Every token is a sequence of its own here, as tokens of one sequence may lie in two chunks. Its last key is its own, so
that ``chunk=L`` bounds the first part; the second ends where the chunk begins, and so does the third one chunk earlier.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cuattn.addresses import byte_bounds
from cuattn.errors import ArgumentError
from cuattn.ops.decode import arguments
from cuattn.ops.decode.launch import decode
from cuattn.ops.decode.problem import DecodeProblem
from cuattn.ops.dual_chunk.arguments import check_factor, check_rope
from cuattn.ops.dual_chunk.positions import Chunking, check_chunking
from cuattn.ops.merge.states import merge_states
from cuattn.ops.rotary import arguments as rotary_arguments
from cuattn.ops.rotary.arguments import Angles, Positions
from cuattn.ops.rotary.rope_arguments import RopeProblem
from cuattn.ops.rotary.rope_launch import rotate
from cuattn.runtime.arrays import assign
from cuattn.runtime.checks import check_apart
from cuattn.runtime.executor import executor_for

__all__ = ["DualChunkDecodeProblem", "check", "decode_parts"]


@dataclass(slots=True)
class DualChunkDecodeProblem:
    """A call whose arguments have passed every check."""

    whole: DecodeProblem  # as if it were plain decoding; its scale times the logit factor if that is a number
    chunking: Chunking
    angles: Angles
    logit_factors: Any  # of the accumulator's type, [batch], or None
    options: dict[str, Any]  # of the parts


def check(
    q: Any,
    k_pages: Any,
    v_pages: Any,
    block_tables: Any,
    seqlens_k: Any,
    *,
    chunk_size: Any,
    local_size: Any,
    rope: Any,
    scale: Any,
    logit_factor: Any,
    out: Any,
    **options: Any,
) -> DualChunkDecodeProblem:
    """Make every check of a call. Raises as documented at `cuattn.dual_chunk_decode`."""
    chunking, rope = check_chunking(chunk_size, local_size), check_rope(rope)
    options_of_whole = {"scale": scale, "out": out, **options}
    if block_tables is None:
        whole = arguments.check(q, k_pages, v_pages, seqlens_k, **options_of_whole)
    else:
        whole = arguments.check_paged(q, k_pages, v_pages, block_tables, seqlens_k, **options_of_whole)
    executor, extents = whole.executor, whole.extents
    if rope.arrays:
        executor_for(q=whole.q, **rope.arrays)  # all in one place
    angles = rotary_arguments.resolve(executor, rope, extents.head_dim, whole.dtype)
    whole.scale, factors = check_factor(executor, logit_factor, whole.scale, whole.dtype, extents.batch)
    if whole.out is not None:
        inputs = {**rope.arrays, **({} if factors is None else {"logit_factor": factors})}
        check_apart("out", byte_bounds(whole.out), {name: byte_bounds(x) for name, x in inputs.items()})
    problem = DualChunkDecodeProblem(whole, chunking, angles, factors, options)
    if angles.cos is not None and whole.host_seqlens_k is not None:
        _check_tables(angles, tokens_of(problem))
    return problem


class Tokens(NamedTuple):
    """The tokens of a call, [batch * seqlen_q] of each: where the three parts of their keys end, and where they stand.

    Where the host knows the lengths these are NumPy arrays, else arrays of the device.
    """

    ends: tuple[Any, Any, Any]  # of the keys up to each, up to its chunk, and up to the chunk before
    positions: tuple[Any, Any, Any]


def tokens_of(problem: DualChunkDecodeProblem) -> Tokens:
    """Return what the parts need to know of every token."""
    whole, chunking = problem.whole, problem.chunking
    extents, lengths = whole.extents, whole.host_seqlens_k
    xp = np if lengths is not None else whole.executor.xp
    with whole.executor.on_device():
        if lengths is None:
            lengths = whole.seqlens_k.astype(np.int64)
        tokens = xp.arange(extents.seqlen_q, dtype=np.int64)
        ends = (lengths[:, None] - (extents.seqlen_q - 1) + tokens[None]).reshape(-1)
        ends = xp.clip(ends, 0, extents.seqlen_k)
        last = xp.maximum(ends - 1, 0)
        chunk = last // chunking.length
        own = last - chunk * chunking.length
        far = xp.zeros_like(own) + chunking.far_position
        of_parts = ends, chunk * chunking.length, xp.maximum(chunk - 1, 0) * chunking.length
        return Tokens(of_parts, (own, xp.minimum(own + chunking.length, chunking.chunk_size), far))


def _check_tables(angles: Angles, tokens: Tokens) -> None:
    """Raise `ArgumentError` if a token with a key to see stands at a position that the tables do not hold."""
    held = int(angles.cos.shape[0])
    for ends, positions in zip(*tokens, strict=True):
        last = int(positions[ends > 0].max(initial=-1))
        if last >= held:
            raise ArgumentError(f"a query stands at position {last}; cos and sin hold the positions 0 to {held - 1}")


def decode_parts(problem: DualChunkDecodeProblem, *, return_lse: bool) -> Any:
    """Turn the queries, launch the decode kernels of each part, and merge; returns out, or (out, lse)."""
    whole = problem.whole
    executor, extents = whole.executor, whole.extents
    tokens = tokens_of(problem)
    num_tokens = extents.batch * extents.seqlen_q
    # Where the host knows that no token has keys of a part, it is not launched.
    known = isinstance(tokens.ends[0], np.ndarray)
    num_parts = 1 + sum(not known or bool((ends > 0).any()) for ends in tokens.ends[1:])
    queries = _turned(problem, tokens, num_parts)
    shape = num_tokens, 1, extents.num_heads, extents.head_dim_v
    outs = executor.empty((num_parts, *shape), whole.accumulator if num_parts > 1 else whole.dtype)
    pages = _pages(problem)
    lses = []
    for part in range(num_parts):
        bounds: dict[str, Any] = {"chunk": problem.chunking.length} if part < 2 else {}
        ends = tokens.ends[part]
        of_part = arguments.check_paged(
            queries[part][:, None],
            whole.k,
            whole.v,
            pages,
            ends if known else ends.astype(np.int32),
            scale=whole.scale,
            out=outs[part],
            may_be_unrounded=True,
            **bounds,
            **problem.options,
        )
        lses.append(decode(of_part, return_lse=True)[1])
    with executor.on_device():
        out, lse = outs[0], lses[0]
        if num_parts > 1:
            stacked = executor.xp.stack(tuple(lses))
            out, lse = merge_states(outs, stacked, out=(executor.empty(shape, whole.dtype), stacked[0]))
        executor.finish(out)
        out = out.reshape(extents.out_shape)
        if whole.out is not None:
            assign(executor, whole.out, out)
            out = whole.out
        if not return_lse:
            return out
        rows = lse.reshape(extents.batch, extents.seqlen_q, extents.num_heads).transpose(0, 2, 1)
        return out, executor.xp.ascontiguousarray(rows)


def _turned(problem: DualChunkDecodeProblem, tokens: Tokens, num_parts: int) -> Any:
    """Return the queries of every token as each part needs them, [num_parts, tokens, heads, head_dim]: one launch."""
    whole = problem.whole
    executor, extents, xp = whole.executor, whole.extents, whole.executor.xp
    with executor.on_device():
        positions = executor.put(xp.stack(tuple(xp.asarray(x) for x in tokens.positions[:num_parts])), np.int64)
        rows = whole.q.reshape(-1, extents.num_heads, extents.head_dim)
        if problem.logit_factors is not None:  # rounded once, turned and multiplied
            rows = rows.astype(whole.accumulator)
        rows = xp.broadcast_to(rows, (num_parts, *rows.shape))
    places = Positions(positions, positions.shape[1], 1)
    turned = rotate(RopeProblem(executor, rows, places, problem.angles, False, None))
    if problem.logit_factors is None:
        return turned
    with executor.on_device(), np.errstate(all="ignore"):
        factors = xp.repeat(problem.logit_factors, extents.seqlen_q)
        return (turned * factors[:, None, None]).astype(whole.dtype)


def _pages(problem: DualChunkDecodeProblem) -> Any:
    """Return the pages of the sequence of every token, [tokens, max_pages]; those of a contiguous cache: one each."""
    whole = problem.whole
    executor, extents = whole.executor, whole.extents
    with executor.on_device():
        tables = whole.block_tables
        if tables is None:
            tables = executor.xp.arange(extents.batch, dtype=np.int32)[:, None]
        return tables if extents.seqlen_q == 1 else executor.xp.repeat(tables, extents.seqlen_q, axis=0)
