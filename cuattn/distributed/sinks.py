"""The gradient of the sinks, which every query of every rank has a part of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cuattn.distributed.group import Group
from cuattn.ops.attention.arguments import Problem

__all__ = ["sink_gradients"]


def sink_gradients(call: Problem, saved: Mapping[str, Any], *groups: Group) -> Any:
    """Return -Σ e^(sink - lse) Δ over the queries of all ranks of the groups, [heads]; None without sinks.

    ``call``: the tokens of this rank; ``saved``: dout, out, lse and dlse of them. Δ = rowsum(dout * out) - dlse.
    """
    sinks = call.options.sinks
    if sinks is None:
        return None
    executor, real = call.executor, call.accumulator
    with executor.on_device(), np.errstate(all="ignore"):
        xp = executor.xp
        rows = xp.moveaxis((saved["dout"].astype(real) * saved["out"].astype(real)).sum(axis=-1), -1, -2)
        lse = saved["lse"]
        if saved["dlse"] is not None:
            rows = rows - saved["dlse"]
        weights = xp.where(lse == -xp.inf, 0, xp.exp(sinks[:, None] - lse))
        terms = -(weights * rows)
        terms = xp.ascontiguousarray(terms.sum(axis=-1) if terms.ndim == 2 else terms.sum(axis=(0, 2)))
    for group in groups:
        terms = group.all_reduce(terms)
    return terms
