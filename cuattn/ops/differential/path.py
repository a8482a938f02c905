"""Which kernel a call of differential attention takes, in which shape, and why."""

from __future__ import annotations

from typing import Any

from cuattn import compile
from cuattn.head_dims import BUCKETS
from cuattn.ops.attention.forward.hopper_select import kernel_options
from cuattn.ops.attention.forward.path import ForwardPath
from cuattn.ops.differential import arguments, hopper_config
from cuattn.ops.differential.arguments import DifferentialProblem
from cuattn.ops.differential.config import DifferentialConfig, select
from cuattn.ops.differential.hopper_config import HopperDifferentialConfig

__all__ = ["differential_path", "row_of"]


def row_of(
    problem: DifferentialProblem, arch: str, smem_limit_bytes: int
) -> DifferentialConfig | HopperDifferentialConfig:
    """Select the shape for a call where kernels are compiled for ``arch``. Raises `LaunchError` where none fits."""
    if hopper_config.why_not(problem, arch, smem_limit_bytes) is None:
        row = hopper_config.select(problem, smem_limit_bytes)
        assert row is not None
        return row
    extents = problem.extents
    return select(
        problem.dtype,
        BUCKETS[extents.head_dim],
        BUCKETS[extents.head_dim_v],
        shared_keys=extents.shared_keys,
        seqlen_q=extents.seqlen_q,
        smem_limit_bytes=smem_limit_bytes,
        options=problem.options.kernel_options,
    )


def differential_path(q: Any, k: Any, v: Any, lambda_: Any, *, arch: str | None, **options: Any) -> ForwardPath:
    """Say which kernel `cuattn.differential_attention` takes for arguments, and why: see `cuattn.forward_path`."""
    problem = arguments.check(q, k, v, lambda_, **options)
    arch = problem.executor.arch if arch is None else str(arch)
    smem_limit_bytes = compile.smem_limit_bytes(arch)
    why_not = hopper_config.why_not(problem, arch, smem_limit_bytes)
    row = row_of(problem, arch, smem_limit_bytes)
    if why_not is None:
        compiled_with = kernel_options(problem.options)
        reason = f"{arch} has wgmma, and nothing in the call is against it"
    else:
        compiled_with = problem.options.kernel_options
        reason = f"not the Hopper kernel: {why_not}"
    return ForwardPath(row.source, row, compiled_with, arch, reason, tuned=False)
