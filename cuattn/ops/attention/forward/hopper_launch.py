"""The way from a checked attention problem to the launch of the Hopper kernel: tensor maps, schedule, arguments."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from cuattn.addresses import address
from cuattn.host.tensor_map import TensorMap
from cuattn.ops.attention.arguments import Extents, Problem
from cuattn.ops.attention.forward.hopper_config import ARCH, BUCKETS, SPAN_BYTES, HopperFwdConfig
from cuattn.ops.attention.forward.hopper_schedule import HopperSchedule, dense_schedule, pack_heads, packed_schedule
from cuattn.ops.attention.forward.hopper_select import MAP_ALIGNMENT, kernel_options, longest_seqlen_q
from cuattn.ops.attention.listed import ListedTiles
from cuattn.ops.attention.sequences import PackedSequences
from cuattn.ops.attention.variants import ForwardOptions
from cuattn.ops.operand import Operand
from cuattn.runtime.executor import Executor, Kernel, host_executor
from cuattn.runtime.tensor_map import tensor_map

__all__ = ["HOST_CTAS", "L2_BYTES", "launch", "rows_map"]

#: Persistent CTAs on the host executor: few, so that each computes several tiles even of a small problem.
HOST_CTAS = 4
#: Of the second-level cache, for keys and values. An H100 has 50 MB, and queries and results pass through it as well.
L2_BYTES = 32 << 20


def launch(
    problem: Problem,
    row: HopperFwdConfig,
    operands: tuple[Operand, Operand, Operand, Operand],
    lse: Any,
    params: np.void,
    packed: PackedSequences | None,
    listed: ListedTiles | None = None,
) -> None:
    """Launch the kernel in the shape ``row``. ``operands`` are q, k, v and out, ``params`` the problem's numbers."""
    extents, options = problem.extents, problem.options
    q, k, v, output = operands
    executor = problem.executor if problem.executor.arch == ARCH else host_executor(ARCH)
    if listed is None:
        pack = pack_heads(longest_seqlen_q(problem, packed), extents.heads_per_kv_head, row.block_m)
        compiled, keys_at_once = kernel_options(options), row.block_n
    else:
        pack, compiled, keys_at_once = listed.pack, listed.options, listed.piece
    loaded = _loaded(
        executor,
        row,
        problem.dtype.name,
        BUCKETS[extents.head_dim],
        BUCKETS[extents.head_dim_v],
        compiled,
        packed is not None,
        problem.unrounded,
        listed is not None,
    )
    queries = row.block_m // pack
    if listed is not None:
        work = listed.work
    else:
        work = None if packed is None else packed.work(executor, extents.seqlen_q, queries, options)
    schedule = _schedule(extents, row.block_m, pack, problem.dtype.itemsize, work)
    keys = extents.seqlen_k, extents.num_kv_heads, 1 if extents.packed else extents.batch
    args = {
        "map_q": _query_map(q, extents, pack, queries),
        "map_k": rows_map(k, keys, keys_at_once),
        "map_v": rows_map(v, keys, keys_at_once),
        "g_out": output.array,
        "g_lse": lse,
        **options.pointers(row.source, row.entry),
        "g_cu_seqlens_q": None if packed is None else packed.cu_seqlens_q,
        "g_cu_seqlens_k": None if packed is None else packed.cu_seqlens_k,
        "g_work": work,
        "params": params,
        "schedule": schedule.argument(),
        "g_tile_list": None if listed is None else listed.array,
    }
    at_once = HOST_CTAS if executor.name == "host" else executor.machine[1] * row.ctas_per_sm
    grid = min(schedule.num_tiles, at_once)
    executor.launch(loaded.kernel, (grid,), (row.num_threads,), args, loaded.smem_bytes)


@dataclass(frozen=True, slots=True)
class LoadedKernel:
    kernel: Kernel
    smem_bytes: int


@cache
def _loaded(
    executor: Executor,
    row: HopperFwdConfig,
    dtype_name: str,
    head_dim: int,
    head_dim_v: int,
    options: ForwardOptions,
    packed: bool,
    unrounded: bool,
    listed: bool,
) -> LoadedKernel:
    of_call = {"packed": packed, "unrounded": unrounded, "listed": listed}
    constants = row.constants(dtype_name, head_dim, head_dim_v, options, **of_call)
    kernel = executor.kernel(row.source, constants, row.entry)
    return LoadedKernel(kernel, row.smem_bytes(head_dim, head_dim_v, options))


def _schedule(extents: Extents, block_m: int, pack: int, itemsize: int, work: Any) -> HopperSchedule:
    if work is not None:
        return packed_schedule(extents, pack=pack, num_work=int(work.shape[0]))
    return dense_schedule(extents, pack=pack, block_m=block_m, itemsize=itemsize, l2_bytes=L2_BYTES)


def _query_map(q: Operand, extents: Extents, pack: int, queries: int) -> TensorMap | np.void:
    """Map q as [batch, packs of heads, seqlen, pack, head_dim]: a box is a tile, its rows query by query."""
    batch, seq, head = q.strides
    sizes = pack, extents.seqlen_q, extents.num_heads // pack, 1 if extents.packed else extents.batch
    return _map(q.array, sizes, (head, seq, pack * head, batch), (pack, queries, 1, 1))


def rows_map(x: Operand, sizes: tuple[int, int, int], rows: int) -> TensorMap | np.void:
    """Map an array as [batch, heads, seqlen, head dim], ``sizes`` being seqlen, heads and batch.

    A box is so many rows of one head: a tile, or a piece of one.
    """
    batch, seq, head = x.strides
    return _map(x.array, sizes, (seq, head, batch), (rows, 1, 1))


def _map(array: Any, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]) -> TensorMap | np.void:
    """Make a map of sizes, element strides and box of the axes beyond the columns, innermost first.

    On a GPU its bytes: they depend on nothing but the key below, and making them takes longer than the rest of a call.
    The host executor has to know the array as well.
    """
    if isinstance(array, np.ndarray):
        return _new_map(array, sizes, strides, box)
    key = address(array), array.dtype, array.shape[-1], sizes, strides, box
    value = _encoded.get(key)
    if value is None:
        if len(_encoded) >= _MAX_ENCODED:
            _encoded.clear()
        value = _encoded[key] = _new_map(array, sizes, strides, box).value
    return value


_encoded: dict[tuple[Any, ...], np.void] = {}
_MAX_ENCODED = 4096


def _new_map(array: Any, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]) -> TensorMap:
    itemsize, head_dim = array.dtype.itemsize, array.shape[-1]
    # The stride of an axis with one place leads nowhere, and may be anything: a map wants a multiple of 16 bytes, and
    # whether it may be 0 is not documented.
    nowhere = -(-head_dim * itemsize // MAP_ALIGNMENT) * MAP_ALIGNMENT
    steps = (stride * itemsize if size > 1 else nowhere for size, stride in zip(sizes, strides, strict=True))
    return tensor_map(
        array,
        (SPAN_BYTES // itemsize, *box),
        swizzle="128B",
        dims=(head_dim, *sizes),
        strides=(itemsize, *steps),
    )
