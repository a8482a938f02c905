"""The launch of the Hopper kernel of differential attention: tensor maps, schedule, arguments."""

from __future__ import annotations

from functools import cache
from typing import Any

from cuattn.ops.attention.forward.hopper_config import ARCH, BUCKETS
from cuattn.ops.attention.forward.hopper_launch import HOST_CTAS, L2_BYTES, rows_map
from cuattn.ops.attention.forward.hopper_schedule import dense_schedule
from cuattn.ops.attention.forward.hopper_select import kernel_options
from cuattn.ops.attention.variants import ForwardOptions
from cuattn.ops.differential.arguments import DifferentialProblem
from cuattn.ops.differential.hopper_config import HopperDifferentialConfig
from cuattn.ops.operand import Operand
from cuattn.runtime.executor import Executor, Kernel, host_executor

__all__ = ["launch"]


def launch(
    problem: DifferentialProblem,
    row: HopperDifferentialConfig,
    operands: tuple[Operand, Operand, Operand],
    args: dict[str, Any],
) -> None:
    """Launch the kernel in the shape ``row``. ``operands`` are q, k and v; ``args`` what portable kernels have too."""
    extents, options = problem.extents, problem.options
    q, k, v = operands
    executor = problem.executor if problem.executor.arch == ARCH else host_executor(ARCH)
    buckets = BUCKETS[extents.head_dim], BUCKETS[extents.head_dim_v]
    kernel = _kernel(executor, row, problem.dtype.name, *buckets, kernel_options(options), extents.shared_keys)
    itemsize = problem.dtype.itemsize
    schedule = dense_schedule(extents, pack=1, block_m=row.block_m, itemsize=itemsize, l2_bytes=L2_BYTES)
    key_heads = extents.num_kv_heads * (1 if extents.shared_keys else 2)
    args = {
        **args,
        "map_q": rows_map(q, (extents.seqlen_q, 2 * extents.num_heads, extents.batch), row.block_m),
        "map_k": rows_map(k, (extents.seqlen_k, key_heads, extents.batch), row.block_n),
        "map_v": rows_map(v, (extents.seqlen_k, extents.num_kv_heads, extents.batch), row.block_n),
        **options.pointers(row.source, row.entry),
        "schedule": schedule.argument(),
    }
    grid = min(schedule.num_tiles, HOST_CTAS if executor.name == "host" else executor.machine[1])
    smem_bytes = row.smem_bytes(*buckets, shared_keys=extents.shared_keys)
    executor.launch(kernel, (grid,), (row.num_threads,), args, smem_bytes)


@cache
def _kernel(
    executor: Executor,
    row: HopperDifferentialConfig,
    dtype_name: str,
    head_dim: int,
    head_dim_v: int,
    options: ForwardOptions,
    shared_keys: bool,
) -> Kernel:
    constants = row.constants(dtype_name, head_dim, head_dim_v, options, shared_keys=shared_keys)
    return executor.kernel(row.source, constants, row.entry)
