"""The total decay of a segment."""

from __future__ import annotations

from typing import Any

from cuattn.ops.linear.arguments import LinearProblem
from cuattn.runtime.arrays import zeros

__all__ = ["summary_of"]


def summary_of(problem: LinearProblem) -> Any:
    """Return the sum over the tokens of a dense problem of its decays: [B, G], or [B, G, D] of one of each channel."""
    executor, extents, decay = problem.executor, problem.extents, problem.decay
    shape = extents.state_shape[: 3 if decay is not None and decay.channels else 2]
    total = zeros(executor, shape, problem.accumulator)
    if decay is not None and extents.seqlen_k:
        with executor.on_device():
            if decay.array.ndim == 1:
                total[...] = decay.array * extents.seqlen_k
            else:
                total[...] = decay.array.sum(axis=1)
    return total
