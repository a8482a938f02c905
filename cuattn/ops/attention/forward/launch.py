"""The way from a checked attention problem to the launch of a forward kernel: config, tile classes, arguments."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from cuattn.head_dims import BUCKETS, COLUMNS
from cuattn.ops.attention import tile_classes
from cuattn.ops.attention.arguments import Problem
from cuattn.ops.attention.forward import hopper_launch
from cuattn.ops.attention.forward.config import FEW_QUERIES, FlashFwdConfig, PlainFwdConfig, select
from cuattn.ops.attention.forward.hopper_config import HopperFwdConfig
from cuattn.ops.attention.forward.hopper_select import hopper_row, longest_seqlen_q
from cuattn.ops.attention.forward.tuned_rows import tuned_row
from cuattn.ops.attention.listed import ListedTiles
from cuattn.ops.attention.params import forward_layout, pack_params
from cuattn.ops.attention.sequences import PackedSequences
from cuattn.ops.attention.variants import ForwardOptions
from cuattn.ops.operand import Operand, operand
from cuattn.runtime.executor import Executor, Kernel

__all__ = ["forward"]


def forward(
    problem: Problem,
    *,
    return_lse: bool,
    config: FlashFwdConfig | PlainFwdConfig | HopperFwdConfig | None = None,
    packed: PackedSequences | None = None,
    listed: ListedTiles | None = None,
) -> Any:
    """Launch the kernel of a problem; returns out, or (out, lse). ``listed``: it visits these tiles alone."""
    executor, extents = problem.executor, problem.extents
    if listed is not None:
        config = listed.config
        hopper = config if isinstance(config, HopperFwdConfig) else None
    else:
        config = tuned_row(problem, packed) if config is None else config
        hopper = hopper_row(problem, packed, config)
    output = problem.output()
    lse = executor.empty(extents.lse_shape, problem.accumulator) if return_lse else None
    if output.array.size:
        q, k, v = (operand(executor, x) for x in (problem.q, problem.k, problem.v))
        operands = q, k, v, output
        if hopper is not None:
            params = pack_params(forward_layout(problem.accumulator), problem, *operands, packed=packed)
            hopper_launch.launch(problem, hopper, operands, lse, params, packed, listed)
        else:
            assert not isinstance(config, HopperFwdConfig)
            _launch(problem, operands, lse, packed, config, listed)
    out = problem.deliver(output)
    if lse is None:
        return out
    executor.finish(lse)
    return out, lse


def _launch(
    problem: Problem,
    operands: tuple[Operand, Operand, Operand, Operand],
    lse: Any,
    packed: PackedSequences | None,
    config: FlashFwdConfig | PlainFwdConfig | None,
    listed: ListedTiles | None,
) -> None:
    """Launch a portable kernel. ``operands`` are q, k, v and out."""
    executor, extents, options = problem.executor, problem.extents, problem.options
    q, k, v, output = operands
    head_dims = BUCKETS[extents.head_dim], *COLUMNS[extents.head_dim_v]
    aligned = q.aligned and k.aligned and v.aligned
    few_queries = longest_seqlen_q(problem, packed) <= FEW_QUERIES
    kernel_options = options.kernel_options if listed is None else listed.options
    of_call = kernel_options, options.tf32, aligned, few_queries, listed is not None, problem.unrounded
    loaded = _loaded(executor, problem.dtype, *head_dims, *of_call, config)
    if listed is not None:
        work = listed.work
    else:
        work = None if packed is None else packed.work(executor, extents.seqlen_q, loaded.block_m, options)
    num_blocks = extents.batch * -(-extents.seqlen_q // loaded.block_m) if work is None else work.shape[0]
    classes = None
    if listed is None and (tiles := tile_classes.shape(options, loaded.block_m, loaded.block_n)) is not None:
        classes = tile_classes.find(executor, options, loaded.block_m, loaded.block_n, executor.empty(tiles, np.uint8))
    layout = forward_layout(problem.accumulator)
    args = {
        "g_q": q.array,
        "g_k": k.array,
        "g_v": v.array,
        "g_out": output.array,
        "g_lse": lse,
        "g_tile_class": None if classes is None else classes.array,
        **options.pointers(loaded.source, loaded.entry),
        "g_cu_seqlens_q": None if packed is None else packed.cu_seqlens_q,
        "g_cu_seqlens_k": None if packed is None else packed.cu_seqlens_k,
        "g_work": work,
        "params": pack_params(layout, problem, q, k, v, output, classes=classes, packed=packed),
    }
    if loaded.block_n:  # a kernel without tiles has no list of them
        args["g_tile_list"] = None if listed is None else listed.array
    num_ctas = loaded.column_blocks * extents.num_heads * num_blocks
    executor.launch(loaded.kernel, (num_ctas,), (loaded.num_threads,), args, loaded.smem_bytes)


@dataclass(frozen=True, slots=True)
class LoadedKernel:
    kernel: Kernel
    source: str
    entry: str
    block_m: int
    block_n: int
    column_blocks: int
    num_threads: int
    smem_bytes: int


@cache
def _loaded(
    executor: Executor,
    dtype: np.dtype[Any],
    head_dim: int,
    head_dim_v: int,
    column_blocks: int,
    options: ForwardOptions,
    tf32: bool,
    aligned: bool,
    few_queries: bool,
    listed: bool,
    unrounded: bool,
    config: FlashFwdConfig | PlainFwdConfig | None,
) -> LoadedKernel:
    """Load the kernel of a config, or of the one that is selected; ``head_dim_v`` columns for each column block."""
    if config is None:
        config = select(
            dtype,
            head_dim,
            head_dim_v,
            seqlen_q=FEW_QUERIES if few_queries else FEW_QUERIES + 1,
            smem_limit_bytes=executor.smem_limit_bytes,
            options=options,
            tf32=tf32,
        )
    if isinstance(config, PlainFwdConfig):
        head_dim_v, column_blocks = head_dim_v * column_blocks, 1  # it has a row for itself
        constants = config.constants(dtype.name, head_dim, head_dim_v, options, unrounded=unrounded)
    else:
        of_call: dict[str, Any] = {"aligned": aligned, "column_blocks": column_blocks, "listed": listed}
        constants = config.constants(dtype.name, head_dim, head_dim_v, options, unrounded=unrounded, **of_call)
    kernel = executor.kernel(config.source, constants, config.entry)
    smem_bytes = config.smem_bytes(head_dim, head_dim_v)
    return LoadedKernel(
        kernel,
        config.source,
        config.entry,
        config.block_m,
        config.block_n,
        column_blocks,
        config.num_threads,
        smem_bytes,
    )
