"""The warning that the host executor is no place for a problem of some size."""

from __future__ import annotations

import warnings
from typing import Protocol

import numpy as np

from cuattn.errors import SlowHostCallWarning
from cuattn.ops.attention.params import LogitProblem
from cuattn.ops.attention.sequences import PackedSequences
from cuattn.runtime.executor import Executor

SLOW_HOST_FLOPS = 1e11  # a NumPy call of more warns
BACKWARD_FLOPS = 2.5  # times those of forward: five products of that size instead of two

_warned = False


class HostProblem(LogitProblem, Protocol):
    """A problem that knows where it runs."""

    @property
    def executor(self) -> Executor: ...


def warn_if_slow(
    problem: HostProblem, packed: PackedSequences | None = None, *, work: float = 1.0, pairs: float | None = None
) -> None:
    """Warn once a process. To be called by the public function itself: the warning points at its caller.

    ``work`` is how many times the operations of forward the call takes, ``pairs`` how many pairs of a query and a key
    there are, if the caller knows better than the extents.
    """
    global _warned
    if problem.executor.name != "host" or _warned:
        return
    extents, bounds = problem.extents, problem.options.bounds
    if pairs is None:
        pairs = _num_pairs(problem, packed)
    width = bounds.width(1)
    if width is not None:
        queries = extents.seqlen_q if extents.packed else extents.batch * extents.seqlen_q
        pairs = min(pairs, float(queries) * width)
    elif bounds.right == 0:
        pairs /= 2
    flops = work * 2 * pairs * extents.num_heads * (extents.head_dim + extents.head_dim_v)
    if flops > SLOW_HOST_FLOPS:
        _warned = True
        warnings.warn(
            "attention on NumPy arrays runs on the host executor, which interprets the kernel: the "
            f"{flops:.2g} floating-point operations of this call may take minutes; CuPy arrays run on the GPU",
            SlowHostCallWarning,
            stacklevel=3,
        )


def _num_pairs(problem: HostProblem, packed: PackedSequences | None) -> float:
    if packed is None or packed.host is None:
        return float(problem.extents.batch * problem.extents.seqlen_q) * problem.extents.seqlen_k
    seqlens_q, seqlens_k = map(np.diff, packed.host)
    return float(np.dot(seqlens_q.astype(float), seqlens_k))
