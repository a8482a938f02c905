"""Which shapes of the backward kernels serve a call."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from cuattn.head_dims import BUCKETS
from cuattn.ops.attention.backward.config import SIDES, FlashBwdConfig, Side, can_add_dq, select
from cuattn.ops.attention.backward.problem import BackwardProblem
from cuattn.ops.attention.forward.config import products_of
from cuattn.ops.attention.variants import ForwardOptions

__all__ = ["order_free", "select_configs"]


def order_free(problem: BackwardProblem) -> bool:
    """Whether dq is summed in no order, by the CTAs that own keys: the caller allows it, and there is such a kernel."""
    dtype = problem.forward.dtype
    if problem.listed is not None:  # gathered queries have no sums side by side
        return False
    return not problem.deterministic and can_add_dq(*products_of(dtype, problem.forward.options.tf32))


def select_configs(problem: BackwardProblem) -> tuple[FlashBwdConfig, ...]:
    """Select the rows for queries and for keys; for keys alone where dq is summed in no order."""
    forward = problem.forward
    if problem.listed is not None:
        return problem.listed.configs
    return _select_configs(
        forward.dtype,
        *(BUCKETS[forward.extents.head_dim], BUCKETS[forward.extents.head_dim_v]),
        forward.options.kernel_options,
        forward.options.tf32,
        forward.executor.smem_limit_bytes,
        order_free(problem),
    )


@cache
def _select_configs(
    dtype: np.dtype[Any],
    head_dim: int,
    head_dim_v: int,
    options: ForwardOptions,
    tf32: bool,
    smem_limit_bytes: int,
    add_dq: bool,
) -> tuple[FlashBwdConfig, ...]:
    def row(own: Side) -> FlashBwdConfig:
        return select(
            dtype,
            head_dim,
            head_dim_v,
            own=own,
            smem_limit_bytes=smem_limit_bytes,
            options=options,
            tf32=tf32,
            add_dq=add_dq,
        )

    return (row("keys"),) if add_dq else tuple(row(own) for own in SIDES)
