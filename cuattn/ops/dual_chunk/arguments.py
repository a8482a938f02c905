"""What dual-chunk attention accepts: every check that is made before anything is launched or written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cuattn.addresses import byte_bounds
from cuattn.dtypes import DTYPES, ELEMENTS
from cuattn.errors import ArgumentError, DTypeError, NonFiniteError
from cuattn.messages import shown
from cuattn.ops.attention import arguments, varlen
from cuattn.ops.attention.arguments import Problem
from cuattn.ops.attention.option_checks import Call
from cuattn.ops.attention.option_checks import scale as check_scale
from cuattn.ops.attention.options import Options
from cuattn.ops.attention.sequences import PackedSequences
from cuattn.ops.dual_chunk.positions import Chunking, check_chunking
from cuattn.ops.rotary import arguments as rotary_arguments
from cuattn.ops.rotary.arguments import Angles, Rotary
from cuattn.runtime.checks import check_apart
from cuattn.runtime.executor import Executor, executor_for
from cuattn.runtime.small_arrays import small_array
from cuattn.scalars import as_real, check_flag, real

__all__ = ["DEFAULTS", "DualChunkProblem", "check", "check_factor", "check_rope"]

#: Of the keywords that a call need not give.
DEFAULTS: dict[str, Any] = {
    "rope": Rotary(),
    "keys_rotated": False,
    "scale": None,
    "logit_factor": 1.0,
    "softcap": None,
    "cu_seqlens_q": None,
    "cu_seqlens_k": None,
}


@dataclass(slots=True)
class DualChunkProblem:
    """A call whose arguments have passed every check."""

    attention: Problem  # causal, its scale times the logit factor if that is a number
    packed: PackedSequences | None
    chunking: Chunking
    rope: Rotary
    angles: Angles
    keys_rotated: bool
    logit_factors: Any  # of the accumulator's type, [batch], or None

    @property
    def executor(self) -> Executor:
        return self.attention.executor


def check(
    q: Any,
    k: Any,
    v: Any,
    *,
    chunk_size: Any,
    local_size: Any,
    rope: Any,
    keys_rotated: Any,
    scale: Any,
    logit_factor: Any,
    softcap: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    out: Any = None,
) -> DualChunkProblem:
    """Make every check of a call. Raises as documented at `cuattn.dual_chunk_attention`."""
    chunking = check_chunking(chunk_size, local_size)
    rope = check_rope(rope)
    keys_rotated = check_flag("keys_rotated", keys_rotated)
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        missing = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_k"
        raise ArgumentError(f"{missing} is None; cu_seqlens_q and cu_seqlens_k are given together or not at all")
    executor = executor_for(q=q, k=k, v=v, **rope.arrays, **({} if out is None else {"out": out}))
    q, k, v = executor.asarray("q", q), executor.asarray("k", k), executor.asarray("v", v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in DTYPES:
            raise DTypeError(f"{name} has dtype {x.dtype} ({x.dtype.str}); allowed are {', '.join(ELEMENTS)} (native)")
    options = {"causal": True, "scale": scale, "softcap": softcap, "out": out}
    packed = None
    if cu_seqlens_q is None:
        problem = arguments.check(q, k, v, **options)
    else:
        problem, packed = varlen.check(q, k, v, cu_seqlens_q, cu_seqlens_k, **options)
    extents = problem.extents
    angles = rotary_arguments.resolve(executor, rope, extents.head_dim, problem.dtype)
    _check_tables(angles, chunking, problem, packed)
    problem.scale, factors = check_factor(executor, logit_factor, problem.scale, problem.dtype, extents.batch)
    if problem.out is not None:
        inputs = {**rope.arrays, **({} if factors is None else {"logit_factor": factors})}
        check_apart("out", byte_bounds(problem.out), {name: byte_bounds(x) for name, x in inputs.items()})
    return DualChunkProblem(problem, packed, chunking, rope, angles, keys_rotated, factors)


def check_rope(rope: Any) -> Rotary:
    """Return ``rope``. Raises `ArgumentError` for anything but a `Rotary`."""
    if not isinstance(rope, Rotary):
        raise ArgumentError(f"rope is {shown(rope)}; a cuattn.Rotary is needed")
    return rope


def check_factor(executor: Executor, value: Any, scale: float, dtype: np.dtype[Any], batch: int) -> tuple[float, Any]:
    """Return the scale times a ``logit_factor`` that is a number; or the scale and an array, as kernels read it."""
    accumulator = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    if as_real(value) is None and not isinstance(value, bool | str | np.generic | None):
        return scale, small_array(executor, "logit_factor", value, ((batch,),), accumulator)
    factor = real("logit_factor", value)
    if factor == 1.0:
        return scale, None
    try:
        check_scale(Options(), Call(executor, (batch, 1, None, None), 1, dtype), scale * factor)
    except NonFiniteError as error:
        raise NonFiniteError(f"logit_factor is {shown(value)}; with it, {error}") from None
    return scale * factor, None


def _check_tables(angles: Angles, chunking: Chunking, problem: Problem, packed: PackedSequences | None) -> None:
    """Raise `ArgumentError` if a query or a key stands at a position that the tables do not hold."""
    if angles.cos is None:
        return
    extents = problem.extents
    if packed is None:
        lengths = [(extents.seqlen_q, extents.seqlen_k)] if extents.batch else []
    elif packed.host is None:
        return
    else:
        lengths = list(zip(*(np.diff(starts).tolist() for starts in packed.host), strict=True))
    last = max((chunking.last_position(*pair) for pair in lengths), default=-1)
    held = int(angles.cos.shape[0])
    if last >= held:
        raise ArgumentError(
            f"a query or a key stands at position {last} of chunks of {chunking.length} (chunk_size - local_size); cos "
            f"and sin hold the positions 0 to {held - 1}"
        )
