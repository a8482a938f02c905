"""The gradient of the sinks, which every query of every rank has a part of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cuattn.distributed.problem import RingProblem

__all__ = ["sink_gradients"]


def sink_gradients(problem: RingProblem, saved: Mapping[str, Any]) -> Any:
    """Return -Σ e^(sink - lse) Δ over the queries of all ranks, [heads]; None without sinks.

    ``saved``: dout, out, lse and dlse of this rank; Δ = rowsum(dout * out) - dlse.
    """
    sinks = problem.of_rank.options.sinks
    if sinks is None:
        return None
    executor, real = problem.executor, problem.accumulator
    with executor.on_device(), np.errstate(all="ignore"):
        xp = executor.xp
        rows = xp.moveaxis((saved["dout"].astype(real) * saved["out"].astype(real)).sum(axis=-1), -1, -2)
        lse = saved["lse"]
        if saved["dlse"] is not None:
            rows = rows - saved["dlse"]
        weights = xp.where(lse == -xp.inf, 0, xp.exp(sinks[:, None] - lse))
        terms = -(weights * rows)
        terms = xp.ascontiguousarray(terms.sum(axis=-1) if problem.packed else terms.sum(axis=(0, 2)))
    return problem.group.all_reduce(terms)
