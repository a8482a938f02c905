"""The way from a checked decode problem to its launches: config, schedule, kernel of the splits, kernel that merges."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from cuattn.addresses import address
from cuattn.dtypes import ELEMENT_TYPES
from cuattn.formats import KVFormat
from cuattn.ops.attention.arguments import Extents
from cuattn.ops.attention.variants import LOGIT_FLAGS
from cuattn.ops.decode.arguments import DENSE_CALL
from cuattn.ops.decode.config import FlashDecodeConfig, compiled_dims, select
from cuattn.ops.decode.params import pack_decode
from cuattn.ops.decode.reduce import launch_reduce
from cuattn.ops.decode.scales import Scale
from cuattn.ops.decode.schedule import schedule
from cuattn.ops.decode.workspace import partials
from cuattn.ops.operand import Operand, operand
from cuattn.ops.rotary.arguments import NO_ANGLES
from cuattn.runtime.executor import Executor, Kernel

if TYPE_CHECKING:
    from cuattn.ops.decode.problem import DecodeProblem

__all__ = ["decode", "score_constants"]

Flags: TypeAlias = tuple[tuple[str, bool | str], ...]  # constants of a kernel

_NO_ROTATION: Flags = ("ROTATE", False), ("INTERLEAVED", False), ("TABLES", False), ("Table", "float")


def decode(problem: DecodeProblem, *, return_lse: bool, config: FlashDecodeConfig | None = None) -> Any:
    """Launch the kernels of a problem; returns out, or (out, lse)."""
    executor, extents = problem.executor, problem.extents
    output = problem.output()
    lse = executor.empty(extents.lse_shape, problem.accumulator) if return_lse else None
    if output.array.size:
        _launch(problem, output, lse, config or select_config(problem))
    out = problem.deliver(output)
    if lse is None:
        return out
    executor.finish(lse)
    return out, lse


def select_config(problem: DecodeProblem) -> FlashDecodeConfig:
    """Select the row that a call takes if it does not say another."""
    extents = problem.extents
    most = extents.seqlen_q if problem.max_seqlen_q is None else problem.max_seqlen_q
    return _select(problem.dtype, problem.kv_format, extents, most, problem.executor.smem_limit_bytes)


@lru_cache(maxsize=1024)
def _select(
    dtype: np.dtype[Any], kv_format: KVFormat, extents: Extents, most: int, smem_limit_bytes: int
) -> FlashDecodeConfig:
    return select(
        dtype,
        kv_format,
        *compiled_dims(extents.head_dim, extents.head_dim_v)[:2],
        rows_per_kv_head=most * extents.heads_per_kv_head,
        smem_limit_bytes=smem_limit_bytes,
    )


def _launch(problem: DecodeProblem, output: Operand, lse: Any, config: FlashDecodeConfig) -> None:
    executor, extents, options = problem.executor, problem.extents, problem.options
    q, k, v = (operand(executor, x) for x in (problem.q, problem.k, problem.v))
    flags = (
        ("ALIGNED", _aligned(problem, config, q, k, v)),
        ("PAGED", problem.paged),
        ("SLOT_SCALES", _per_slot(problem.k_scale) or _per_slot(problem.v_scale)),
        *_bounds(problem),
        *_rotation(problem),
    )
    of_call = problem.dtype, problem.kv_format, extents, flags, bool(options.flags), problem.unrounded
    loaded = _loaded(executor, config, *of_call)
    plan = schedule(problem, config)
    partial_out, partial_state = partials(problem, plan.num_partials)
    params = pack_decode(problem, config, plan, q, k, v, output, rotary_vectors=_turns_vectors(problem))
    k_scale, v_scale = (None if scale is None else scale.array for scale in (problem.k_scale, problem.v_scale))
    args = {
        "g_q": q.array,
        "g_k": k.array,
        "g_v": v.array,
        "g_out": output.array,
        "g_lse": lse,
        "g_partial_out": partial_out,
        "g_partial_state": partial_state,
        "g_seqlens_k": problem.seqlens_k,
        "g_block_tables": problem.block_tables,
        "g_cu_seqlens_q": plan.cu_seqlens_q,
        "g_k_scale": k_scale,
        "g_v_scale": v_scale,
        "g_k_block_scales": problem.k_blocks,
        "g_v_block_scales": problem.v_blocks,
        **options.pointers(config.source, config.entry),
        **(NO_ANGLES if problem.rotary is None else problem.rotary.arrays),
        "g_work": plan.work,
        "g_splits": plan.splits,
        "params": params,
    }
    grid = (plan.num_items * loaded.ctas_per_item,)
    executor.launch(loaded.kernel, grid, (config.num_threads,), args, loaded.smem_bytes)
    if plan.num_partials:
        launch_reduce(problem, plan, partial_out, partial_state, output, lse, params)


def _aligned(problem: DecodeProblem, config: FlashDecodeConfig, q: Operand, k: Operand, v: Operand) -> bool:
    """Whether the kernel may read q, keys and values 16 bytes at a time.

    From global memory to registers there is no room for a piece that ends within a row, or in which RoPE turns some.
    """
    aligned = q.aligned and k.aligned and v.aligned
    if config.products == "mma" or not aligned:
        return aligned
    extents, angles, row_format = problem.extents, problem.rotary, problem.kv_format
    rows = [(size * problem.dtype.itemsize) for size in (extents.head_dim, extents.head_dim_v)]
    rows += [row_format.items(size) * row_format.itemsize for size in (extents.head_dim, extents.head_dim_v)]
    if any(size % 16 for size in rows):
        return False
    if angles is None:
        return True
    tables = [x for x in (angles.cos, angles.sin) if x is not None]
    return angles.num_pairs % 8 == 0 and not any((address(x) | x.strides[0]) % 16 for x in tables)


def _turns_vectors(problem: DecodeProblem) -> bool:
    """Whether RoPE turns whole units of 16 bytes of a head."""
    angles = problem.rotary
    return angles is not None and angles.units(2 * angles.num_pairs, problem.dtype.itemsize, True)[0]


def _per_slot(scale: Scale | None) -> bool:
    return scale is not None and scale.per_slot


def _bounds(problem: DecodeProblem) -> Flags:
    """Return which sides of a query's view the kernel has to look at.

    A single token that is aligned with the last key sees nothing beyond it, causal or not.
    """
    bounds = problem.options.bounds
    left, right = bounds.sides
    last = problem.max_seqlen_q == 1 and bounds.from_end
    return ("BOUND_LEFT", left), ("BOUND_RIGHT", (right and not last) or left)


def _rotation(problem: DecodeProblem) -> Flags:
    angles = problem.rotary
    if angles is None:
        return _NO_ROTATION
    table = "float" if angles.cos is None else ELEMENT_TYPES[angles.cos.dtype.name]
    tables = angles.cos is not None
    return ("ROTATE", True), ("INTERLEAVED", angles.interleaved), ("TABLES", tables), ("Table", table)


@dataclass(frozen=True, slots=True, eq=False)
class LoadedKernel:
    """A kernel that is ready, and what its launches for some extents have in common."""

    kernel: Kernel
    ctas_per_item: int
    smem_bytes: int


@lru_cache(maxsize=1024)
def _loaded(
    executor: Executor,
    config: FlashDecodeConfig,
    dtype: np.dtype[Any],
    kv_format: KVFormat,
    extents: Extents,
    flags: Flags,
    options: bool,
    unrounded: bool,
) -> LoadedKernel:
    """Load the kernel of a config. ``options``: what happens to logits is compiled in."""
    bucket, columns, column_blocks = compiled_dims(extents.head_dim, extents.head_dim_v)
    all_flags = {**dict(flags), **score_constants(options)}
    of_call: dict[str, Any] = {"column_blocks": column_blocks, "unrounded": unrounded}
    constants = config.constants(dtype.name, kv_format, bucket, columns, all_flags, **of_call)
    return LoadedKernel(
        executor.kernel(config.source, constants, config.entry),
        extents.num_kv_heads * config.head_blocks(extents.heads_per_kv_head) * column_blocks,
        config.smem_bytes(bucket, columns, kv_format),
    )


def score_constants(options: bool) -> dict[str, Any]:
    """Return what happens to logits, as constants of a kernel: all that a call may have, or nothing.

    Where a call has one of the options, each of the others costs a comparison a tile.
    """
    flags = {name.upper(): options and name in DENSE_CALL.flags for name in LOGIT_FLAGS}
    return {**flags, "BiasElement": "float"}
