"""What the decode functions accept: every check that is made before anything is launched or written."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuattn.addresses import byte_bounds
from cuattn.errors import ArgumentError
from cuattn.messages import shown
from cuattn.ops.attention.arguments import unrounded_dtype
from cuattn.ops.attention.bounds import Bounds
from cuattn.ops.attention.operation import Operation
from cuattn.ops.decode import lengths, scales, shapes
from cuattn.ops.decode.plan import check_plan
from cuattn.ops.decode.problem import DecodeProblem
from cuattn.ops.decode.shapes import CONTIGUOUS, PACKED, PAGED, Names
from cuattn.ops.rotary import arguments as rotary_arguments
from cuattn.ops.rotary.arguments import Angles, Rotary
from cuattn.runtime.checks import check_apart, check_out, check_workspace
from cuattn.runtime.executor import executor_for
from cuattn.runtime.small_arrays import check_flag

__all__ = ["DENSE_CALL", "PACKED_CALL", "PAGED_CALL", "check", "check_paged", "check_paged_varlen"]

DENSE_CALL = Operation("decode_attention", "decode")
PAGED_CALL = Operation("paged_attention", "decode")
PACKED_CALL = Operation("paged_attention_varlen", "decode")


def check(q: Any, k_cache: Any, v_cache: Any, seqlens_k: Any, **options: Any) -> DecodeProblem:
    """Make every check of a call. Raises as documented at `cuattn.decode_attention`.

    ``may_be_unrounded``: ``out`` may be of the accumulator's type.
    """
    return _check(DENSE_CALL, CONTIGUOUS, q, k_cache, v_cache, seqlens_k, **options)


def check_paged(q: Any, k_pages: Any, v_pages: Any, block_tables: Any, seqlens_k: Any, **options: Any) -> DecodeProblem:
    """Make every check of a call. Raises as documented at `cuattn.paged_attention`."""
    return _check(PAGED_CALL, PAGED, q, k_pages, v_pages, seqlens_k, block_tables=block_tables, **options)


def check_paged_varlen(
    q: Any, k_pages: Any, v_pages: Any, block_tables: Any, cu_seqlens_q: Any, seqlens_k: Any, **options: Any
) -> DecodeProblem:
    """Make every check of a call. Raises as documented at `cuattn.paged_attention_varlen`."""
    tables = {"block_tables": block_tables, "cu_seqlens_q": cu_seqlens_q}
    return _check(PACKED_CALL, PACKED, q, k_pages, v_pages, seqlens_k, **tables, **options)


def _check(
    operation: Operation,
    names: Names,
    q: Any,
    k: Any,
    v: Any,
    seqlens_k: Any,
    *,
    block_tables: Any = None,
    cu_seqlens_q: Any = None,
    max_seqlen_q: Any = None,
    num_splits: Any = None,
    plan: Any = None,
    kv_format: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
    k_block_scales: Any = None,
    v_block_scales: Any = None,
    rope: Any = None,
    rotate_keys: Any = False,
    out: Any = None,
    may_be_unrounded: bool = False,
    workspace: Any = None,
    **options: Any,
) -> DecodeProblem:
    given = {"q": q, names.k: k, names.v: v}
    plain = k_block_scales is v_block_scales is k_scale is v_scale is out is workspace is None
    for name, x in (
        ()
        if plain
        else (
            *(("k_block_scales", k_block_scales), ("v_block_scales", v_block_scales)),
            *(("k_scale", scales.of_slots(k_scale)), ("v_scale", scales.of_slots(v_scale))),
            *(("out", out), ("workspace", workspace)),
        )
    ):
        if x is not None:
            given[name] = x
    if rope is not None:
        if not isinstance(rope, Rotary):
            raise ArgumentError(f"rope is {shown(rope)}; a cuattn.Rotary or None is allowed")
        given |= rope.arrays
    executor = executor_for(**given)
    q, k, v = executor.asarray("q", q), executor.asarray(names.k, k), executor.asarray(names.v, v)
    shapes.check_ranks(names, q, k, v)
    row = shapes.check_dtypes(names, q, k, v, kv_format)
    paged, packed = names is not CONTIGUOUS, names is PACKED

    cu_seqlens = tables = None
    if packed:
        cu_seqlens, max_seqlen = lengths.check_packed_queries(executor, cu_seqlens_q, max_seqlen_q, q.shape[0])
        batch, seqlens_q, seen_seqlens_q = cu_seqlens.array.shape[0] - 1, cu_seqlens.known, cu_seqlens.seen
    else:
        batch, max_seqlen = q.shape[:2]
        seqlens_q = seen_seqlens_q = np.full(batch, max_seqlen, np.int64)
    num_pages, page_size, num_kv_heads = slots = k.shape[:3]
    capacity = page_size
    if paged:
        tables = lengths.integers(executor, "block_tables", block_tables, batch, 2, "[batch, max_pages]")
        capacity = shapes.capacity_of(tables.array, page_size)
    extents = shapes.check_extents(names, q, k, v, batch, capacity, row)
    keys = lengths.check_seqlens_k(executor, seqlens_k, batch, capacity)
    if tables is not None and tables.seen is not None and keys.seen is not None:
        lengths.check_pages(tables.seen, keys.seen, num_pages, page_size)

    shape = batch, extents.num_heads, None, None
    resolved = operation.check(options, executor, logits_shape=shape, num_kv_heads=num_kv_heads, dtype=q.dtype)
    rotate_keys = check_flag("rotate_keys", rotate_keys)
    if rotate_keys and rope is None:
        raise ArgumentError("rotate_keys is True and rope is None; there is nothing to rotate keys by")
    angles = None if rope is None else rotary_arguments.resolve(executor, rope, extents.head_dim, q.dtype)
    if angles is not None and angles.cos is not None and keys.seen is not None:
        _check_positions(angles, resolved.bounds, keys.seen, seen_seqlens_q)
    problem = DecodeProblem(
        executor=executor,
        q=q,
        k=k,
        v=v,
        out=None,
        dtype=q.dtype,
        kv_format=row,
        extents=extents,
        scale=resolved.scale_for(extents.head_dim),
        options=resolved,
        seqlens_k=keys.array,
        host_seqlens_k=keys.known,
        cu_seqlens_q=None if cu_seqlens is None else cu_seqlens.array,
        host_seqlens_q=seqlens_q,
        max_seqlen_q=max_seqlen,
        block_tables=None if tables is None else executor.put(tables.array, np.int32),
        page_size=page_size,
        num_pages=num_pages,
        k_scale=scales.check_scale(executor, "k_scale", k_scale, row, slots),
        v_scale=scales.check_scale(executor, "v_scale", v_scale, row, slots),
        k_blocks=scales.check_block_scales(executor, "k_block_scales", k_block_scales, row, slots, extents.head_dim),
        v_blocks=scales.check_block_scales(executor, "v_block_scales", v_block_scales, row, slots, extents.head_dim_v),
        rotary=angles,
        rotate_keys=rotate_keys,
        num_splits=lengths.check_num_splits(num_splits),
        plan=plan,
        workspace=None,
    )
    problem.plan = check_plan(plan, problem)
    if out is not None or workspace is not None:
        inputs = _memory(names, problem)
        if out is not None:
            problem.out = executor.asarray("out", out)
            unrounded = unrounded_dtype(q.dtype) if may_be_unrounded else None
            check_out("out", problem.out, extents.out_shape, q.dtype, unrounded=unrounded)
            check_apart("out", byte_bounds(problem.out), inputs)
            inputs["out"] = byte_bounds(problem.out)
        if workspace is not None:
            problem.workspace = executor.asarray("workspace", workspace)
            check_workspace(problem.workspace)
            check_apart("workspace", byte_bounds(problem.workspace), inputs)
    return problem


def _check_positions(
    angles: Angles, bounds: Bounds, seqlens_k: NDArray[np.int64], seqlens_q: NDArray[np.int64] | None
) -> None:
    """Raise `ArgumentError` if a query that sees a key, or such a key, is at a position that the tables do not hold."""
    num_positions = int(angles.cos.shape[0])
    longest = int(seqlens_k.max(initial=0))
    if longest > num_positions:
        raise ArgumentError(
            f"cos and sin hold the positions 0 to {num_positions - 1}; seqlens_k[{int(seqlens_k.argmax())}] "
            f"is {longest}"
        )
    if seqlens_q is None or (bounds.right == 0 and bounds.from_end):
        return  # a query at a negative position sees nothing
    early = (seqlens_k > 0) & (seqlens_k < seqlens_q)
    if early.any():
        at = int(np.argmax(early))
        raise ArgumentError(
            f"sequence {at} has {seqlens_k[at]} keys and {seqlens_q[at]} queries, whose first position is "
            f"{seqlens_k[at] - seqlens_q[at]}; cos and sin hold the positions 0 to {num_positions - 1}"
        )


def _memory(names: Names, problem: DecodeProblem) -> dict[str, tuple[int, int]]:
    """Return the memory range of every input of a call."""
    arrays = {"q": problem.q, names.k: problem.k, names.v: problem.v, "seqlens_k": problem.seqlens_k}
    arrays |= {"block_tables": problem.block_tables, "cu_seqlens_q": problem.cu_seqlens_q}
    arrays |= {"k_block_scales": problem.k_blocks, "v_block_scales": problem.v_blocks}
    for name, factor in (("k_scale", problem.k_scale), ("v_scale", problem.v_scale)):
        arrays[name] = None if factor is None else factor.array
    if problem.rotary is not None:
        arrays |= {"cos": problem.rotary.cos, "sin": problem.rotary.sin}
    arrays |= problem.options.arrays
    return {name: byte_bounds(x) for name, x in arrays.items() if x is not None}
