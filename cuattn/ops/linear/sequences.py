"""Where packed sequences lie, as linear attention is told: one list for queries, keys and values."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuattn import environment
from cuattn.errors import DTypeError, ShapeError
from cuattn.ops.attention.sequences import check_cu_seqlens
from cuattn.runtime.executor import Executor

__all__ = ["as_list", "check_sequences"]


def as_list(executor: Executor, cu_seqlens: Any) -> Any:
    """Return ``cu_seqlens`` as an array [batch + 1] of integers, wherever it lies. Raises as `check_sequences`."""
    x = executor.metadata("cu_seqlens", cu_seqlens)
    if x.ndim != 1 or not x.size:
        raise ShapeError(f"cu_seqlens has shape {tuple(x.shape)}; [batch + 1] is needed")
    on_host = isinstance(x, np.ndarray)
    if x.dtype.kind not in "iu" if on_host else x.dtype != np.int32:
        raise DTypeError(f"cu_seqlens has dtype {x.dtype}; {'integers are' if on_host else 'int32 is'} needed")
    return x


def check_sequences(executor: Executor, cu_seqlens: Any, total: int) -> tuple[Any, int | None]:
    """Return what `as_list` returned as int32 where kernels can read it, and the longest length if the host knows it.

    Raises `ArgumentError` for a list that the host can see and that does not ascend from 0 to ``total``.
    """
    values = cu_seqlens if isinstance(cu_seqlens, np.ndarray) else cu_seqlens.get() if environment.check() else None
    longest = None
    if values is not None:
        longest = check_cu_seqlens("cu_seqlens", values.astype(np.int64), total, "max_seqlen", None)
    return executor.put(cu_seqlens, np.int32), longest
