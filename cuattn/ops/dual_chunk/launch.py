"""The way from a checked problem of dual-chunk attention to its launch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from cuattn.head_dims import BUCKETS, COLUMNS
from cuattn.ops.attention.forward.config import FEW_QUERIES, FlashFwdConfig
from cuattn.ops.attention.forward.hopper_select import longest_seqlen_q
from cuattn.ops.attention.params import REALS, pack_params
from cuattn.ops.dual_chunk import tiles
from cuattn.ops.dual_chunk.arguments import DualChunkProblem
from cuattn.ops.dual_chunk.config import constants, entry_of, rotation_constants, select, smem_bytes, source_of
from cuattn.ops.dual_chunk.positions import dual_chunk_positions
from cuattn.ops.operand import Operand, operand
from cuattn.ops.rotary.arguments import Angles, Positions
from cuattn.ops.rotary.rope_arguments import RopeProblem
from cuattn.ops.rotary.rope_launch import rotate
from cuattn.runtime.executor import Executor, Kernel
from cuattn.runtime.structs import struct_layout

__all__ = ["forward", "key_positions", "query_positions", "sequences_of", "turned"]


def forward(problem: DualChunkProblem, *, return_lse: bool, config: FlashFwdConfig | None = None) -> Any:
    """Launch the kernel of a problem, behind that of the keys unless they are turned; returns out, or (out, lse)."""
    executor, call = problem.executor, problem.attention
    output = call.output()
    lse = executor.empty(call.extents.lse_shape, call.accumulator) if return_lse else None
    if output.array.size:
        keys = call.k if problem.keys_rotated else turned(problem, call.k, key_positions(problem))
        q, k, v = (operand(executor, x) for x in (call.q, keys, call.v))
        _launch(problem, q, k, v, output, lse, config)
    out = call.deliver(output)
    if lse is None:
        return out
    executor.finish(lse)
    return out, lse


def key_positions(problem: DualChunkProblem) -> Any:
    """Return where the keys stand, int64 [seqlen_k] or [tokens_k], where kernels read it."""
    executor, packed = problem.executor, problem.packed
    with executor.on_device():
        positions = executor.xp.arange(problem.attention.extents.seqlen_k, dtype=np.int64)
        if packed is not None:
            positions = positions - packed.cu_seqlens_k[sequences_of(executor, packed.cu_seqlens_k, positions)]
        return dual_chunk_positions(positions, *problem.chunking)


def query_positions(problem: DualChunkProblem) -> tuple[Any, Any, Any]:
    """Return where the queries stand to their own chunk, to the one before and to older ones, likewise."""
    executor, packed, chunking = problem.executor, problem.packed, problem.chunking
    extents = problem.attention.extents
    with executor.on_device():
        xp = executor.xp
        places = xp.arange(extents.seqlen_q, dtype=np.int64)
        if packed is None:
            places = places + (extents.seqlen_k - extents.seqlen_q)
        else:
            sequences = sequences_of(executor, packed.cu_seqlens_q, places)
            lengths = packed.cu_seqlens_k[1:] - packed.cu_seqlens_k[:-1]
            places = places + lengths[sequences] - packed.cu_seqlens_q[sequences + 1]
        own = xp.maximum(places, 0) % chunking.length
        far = xp.zeros_like(own) + chunking.far_position
        return own, xp.minimum(own + chunking.length, chunking.chunk_size), far


def sequences_of(executor: Executor, starts: Any, tokens: Any) -> Any:
    """Return the sequence of each token; of those that are in none, any."""
    found = executor.xp.searchsorted(starts, tokens, side="right") - 1
    return executor.xp.clip(found, 0, starts.shape[0] - 2)


def turned(problem: DualChunkProblem, x: Any, positions: Any, *, inverse: bool = False) -> Any:
    """Return ``x`` turned to ``positions`` of its sequence axis, as `cuattn.rope` does it."""
    places = Positions(positions, 0, 1)
    return rotate(RopeProblem(problem.executor, x, places, problem.angles, inverse, None))


def _launch(
    problem: DualChunkProblem,
    q: Operand,
    k: Operand,
    v: Operand,
    output: Operand,
    lse: Any,
    config: FlashFwdConfig | None,
) -> None:
    executor, call, packed, angles = problem.executor, problem.attention, problem.packed, problem.angles
    extents, length = call.extents, problem.chunking.length
    loaded = _loaded(
        executor,
        call.dtype,
        BUCKETS[extents.head_dim],
        *COLUMNS[extents.head_dim_v],
        min(longest_seqlen_q(call, packed), length) <= FEW_QUERIES,
        q.aligned and k.aligned and v.aligned,
        call.options.softcap != 0,
        angles.interleaved,
        None if angles.cos is None else angles.cos.dtype.name,
        config,
    )
    block = loaded.row.block_m
    if packed is None:
        work = None
        lengths = np.array([[extents.seqlen_q], [extents.seqlen_k]], np.int64)
        num_tiles = int(tiles.tile_counts(lengths[0], lengths[1], block, length)[0])
        num_items = extents.batch * num_tiles
    else:
        work = tiles.work(executor, packed, extents.seqlen_q, extents.seqlen_k, block, length)
        num_tiles, num_items = 0, work.shape[0]
    layout = struct_layout(source_of(loaded.row), "DualChunkParams", REALS[call.accumulator])
    more = (
        ("tables", tuple(angles.table_layout)),
        ("far_position", problem.chunking.far_position),
        ("chunk_length", length),
        ("num_tiles", num_tiles),
        ("num_pairs", angles.num_pairs),
        ("rotary_vectors", _turns_vectors(angles, call.dtype.itemsize)),
    )
    args = {
        "g_q": q.array,
        "g_k": k.array,
        "g_v": v.array,
        "g_out": output.array,
        "g_lse": lse,
        "g_logit_factors": problem.logit_factors,
        **angles.arrays,
        "g_cu_seqlens_q": None if packed is None else packed.cu_seqlens_q,
        "g_cu_seqlens_k": None if packed is None else packed.cu_seqlens_k,
        "g_work": work,
        "params": pack_params(layout, call, q, k, v, output, packed=packed, more=more),
    }
    num_ctas = loaded.column_blocks * extents.num_heads * num_items
    executor.launch(loaded.kernel, (num_ctas,), (loaded.row.num_threads,), args, loaded.smem_bytes)


def _turns_vectors(angles: Angles, itemsize: int) -> bool:
    """Whether RoPE turns whole units of 16 bytes of a head."""
    return angles.units(2 * angles.num_pairs, itemsize, True)[0]


@dataclass(frozen=True, slots=True)
class LoadedKernel:
    kernel: Kernel
    row: FlashFwdConfig
    column_blocks: int
    smem_bytes: int


@cache
def _loaded(
    executor: Executor,
    dtype: np.dtype[Any],
    head_dim: int,
    columns: int,
    column_blocks: int,
    few: bool,
    aligned: bool,
    softcap: bool,
    interleaved: bool,
    table_dtype: str | None,
    row: FlashFwdConfig | None,
) -> LoadedKernel:
    """Load the kernel, for ``few`` queries of a chunk or for many, of a row, or of the one that is selected."""
    tables = table_dtype is not None
    if row is None:
        limit = executor.smem_limit_bytes
        row = select(dtype, head_dim, columns, few=few, smem_limit_bytes=limit, softcap=softcap, tables=tables)
    of_kernel = constants(
        row,
        dtype.name,
        head_dim,
        columns,
        column_blocks=column_blocks,
        aligned=aligned,
        softcap=softcap,
        rotation=rotation_constants(dtype.name, interleaved, table_dtype),
    )
    kernel = executor.kernel(source_of(row), of_kernel, entry_of(row))
    return LoadedKernel(kernel, row, column_blocks, smem_bytes(row, head_dim, columns, tables))
