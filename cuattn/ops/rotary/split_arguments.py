"""What `split_qkv` accepts: every check that is made before anything is launched or written."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from cuattn.addresses import byte_bounds
from cuattn.errors import ArgumentError, ArrayTypeError, DTypeError, OverlapError, ShapeError
from cuattn.ops.padding.plan import PaddingPlan, check_plan
from cuattn.ops.rotary import arguments
from cuattn.ops.rotary.arguments import Angles, Positions, Rotary
from cuattn.runtime.arrays import contiguous
from cuattn.runtime.checks import check_dtype
from cuattn.runtime.executor import Executor, executor_for
from cuattn.scalars import MAX_EXTENT, integer


@dataclass(slots=True)
class SplitProblem:
    """A call whose arguments have passed every check."""

    executor: Executor
    qkv: Any
    bias: Any
    num_heads: int
    num_kv_heads: int
    head_dim: int
    angles: Angles | None
    positions: Positions | None
    indices: Any
    padding: Any
    cu_seqlens: Any
    plan: PaddingPlan | None
    outs: list[Any]  # for q, k and v; empty where they are to be allocated

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of q, k and v."""
        leading = (self.qkv.shape[0],) if self.plan is None else (self.plan.batch, self.plan.seqlen)
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        return [(*leading, n, self.head_dim) for n in heads]


def check(
    qkv: Any,
    bias: Any,
    num_heads: Any,
    num_kv_heads: Any,
    rope: Any,
    positions: Any,
    cu_seqlens: Any,
    plan: Any,
    out: Any,
    *,
    look: bool = True,
) -> SplitProblem:
    """Make every check of a call, and find the executor it runs on. Raises as documented at `cuattn.split_qkv`.

    Without ``look``, positions that the host sees go unchecked, as a device's do.
    """
    plan = None if plan is None else check_plan(plan)
    _check_kinds(rope, positions, cu_seqlens, plan, out)
    outs = dict(zip(("out[0]", "out[1]", "out[2]"), out, strict=True)) if out is not None else {}
    executor = _executor(qkv, bias, rope, positions, cu_seqlens, plan, outs)
    qkv, bias = _check_inputs(executor, qkv, bias)
    num_heads, num_kv_heads = _check_heads(num_heads, num_kv_heads)
    head_dim = _check_width(qkv, num_heads, num_kv_heads)
    num_tokens = qkv.shape[0]
    angles = None if rope is None else arguments.resolve(executor, rope, head_dim, qkv.dtype)
    places = None
    if positions is not None and angles is not None:
        places = arguments.check_positions(executor, positions, (num_tokens,), angles, look=look)
    indices = padding = None
    if plan is not None:
        indices, padding, cu_seqlens = _check_plan(executor, plan, num_tokens, angles if places is None else None)
    elif cu_seqlens is not None:
        cu_seqlens = _check_cu_seqlens(executor, cu_seqlens, num_tokens, angles)
    outs = {name: executor.asarray(name, x) for name, x in outs.items()}
    problem = SplitProblem(
        executor=executor,
        qkv=qkv,
        bias=bias,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        angles=angles,
        positions=places,
        indices=indices,
        padding=padding,
        cu_seqlens=cu_seqlens,
        plan=plan,
        outs=list(outs.values()),
    )
    _check_outs(problem, outs)
    return problem


def _check_kinds(rope: Any, positions: Any, cu_seqlens: Any, plan: Any, out: Any) -> None:
    """Check which arguments may be given together."""
    if rope is not None and not isinstance(rope, Rotary):
        raise ArrayTypeError(f"rope is a {type(rope).__name__}; a cuattn.Rotary or None is needed")
    if out is not None and not (isinstance(out, tuple | list) and len(out) == 3):
        raise ArgumentError(f"out is {type(out).__name__}; a tuple of three arrays (q, k, v) or None is needed")
    for name, value in (("positions", positions), ("cu_seqlens", cu_seqlens)):
        if value is not None and rope is None:
            raise ArgumentError(f"{name} is given without rope, and only that uses it")
    if cu_seqlens is not None and (plan is not None or positions is not None):
        raise ArgumentError("cu_seqlens is given beside positions or plan, which say where tokens are; leave it out")
    if rope is not None and positions is None and cu_seqlens is None and plan is None:
        raise ArgumentError("rope is given, but none of positions, cu_seqlens and plan: positions are not known")


def _executor(
    qkv: Any, bias: Any, rope: Any, positions: Any, cu_seqlens: Any, plan: Any, outs: dict[str, Any]
) -> Executor:
    """Find where all arrays live; positions and the like count only if they are on a device."""
    metadata = {"positions": positions, "cu_seqlens": cu_seqlens}
    if plan is not None:
        metadata |= {"plan.indices": plan.indices, "plan.padding": plan.padding, "plan.cu_seqlens": plan.cu_seqlens}
    arrays = {"qkv": qkv} | ({} if bias is None else {"bias": bias}) | ({} if rope is None else rope.arrays) | outs
    on_device = {name: x for name, x in metadata.items() if x is not None and arguments.on_device(name, x)}
    return executor_for(**arrays, **on_device)


def _check_inputs(executor: Executor, qkv: Any, bias: Any) -> tuple[Any, Any]:
    qkv = executor.asarray("qkv", qkv)
    check_dtype("qkv", qkv.dtype)
    if qkv.ndim != 2:
        raise ShapeError(f"qkv has shape {tuple(qkv.shape)}; [tokens, (heads + 2 kv_heads) * head_dim] is needed")
    if max(qkv.shape) > MAX_EXTENT:
        raise ShapeError(f"qkv has shape {tuple(qkv.shape)}; an extent may be at most {MAX_EXTENT}")
    if bias is None:
        return qkv, None
    bias = executor.asarray("bias", bias)
    if bias.dtype != qkv.dtype:
        raise DTypeError(f"bias has dtype {bias.dtype} and qkv has dtype {qkv.dtype}; they must be the same")
    if tuple(bias.shape) != tuple(qkv.shape[1:]):
        raise ShapeError(f"bias has shape {tuple(bias.shape)}; {tuple(qkv.shape[1:])} is needed, a row of qkv")
    return qkv, bias


def _check_heads(num_heads: Any, num_kv_heads: Any) -> tuple[int, int]:
    num_heads = integer("num_heads", num_heads, 1, MAX_EXTENT)
    num_kv_heads = num_heads if num_kv_heads is None else integer("num_kv_heads", num_kv_heads, 1, MAX_EXTENT)
    if num_heads % num_kv_heads:
        raise ArgumentError(f"num_heads is {num_heads} and num_kv_heads {num_kv_heads}; a multiple of it is needed")
    return num_heads, num_kv_heads


def _check_width(qkv: Any, num_heads: int, num_kv_heads: int) -> int:
    """Return the head dim."""
    width, all_heads = int(qkv.shape[1]), num_heads + 2 * num_kv_heads
    if width % all_heads:
        raise ShapeError(
            f"qkv has rows of {width} elements; a multiple of num_heads + 2 num_kv_heads = {all_heads} is needed"
        )
    head_dim = width // all_heads
    arguments.check_heads("qkv", qkv, head_dim)
    return head_dim


def _check_plan(executor: Executor, plan: PaddingPlan, num_tokens: int, angles: Angles | None) -> tuple[Any, Any, Any]:
    """Return the indices, padding and cu_seqlens of the plan, where the kernel runs."""
    if plan.num_tokens != num_tokens:
        raise ShapeError(f"qkv has {num_tokens} tokens and the plan {plan.num_tokens}; they must be as many")
    padded = plan.batch * plan.seqlen - num_tokens
    arrays = []
    for name, extent in (("indices", num_tokens), ("padding", padded), ("cu_seqlens", plan.batch + 1)):
        array, seen = arguments.integers(executor, f"plan.{name}", getattr(plan, name))
        if tuple(array.shape) != (extent,) or array.dtype != np.int32:
            raise ShapeError(f"plan.{name} is {array.dtype} of shape {tuple(array.shape)}; int32 ({extent},) is needed")
        arrays.append(contiguous(executor, array))
    _check_lengths("plan", np.diff(seen) if seen is not None else None, angles)
    return arrays[0], arrays[1], arrays[2]


def _check_lengths(name: str, lengths: np.ndarray[Any, Any] | None, angles: Angles | None) -> None:
    """Raise if tables are too short for positions that count from the start of a sequence."""
    if lengths is None or angles is None or angles.cos is None:
        return
    limit, longest = int(angles.cos.shape[0]), int(lengths.max(initial=0))
    if longest > limit:
        raise ArgumentError(f"{name} has a sequence of {longest} tokens; cos and sin hold {limit} positions")


def _check_cu_seqlens(executor: Executor, cu_seqlens: Any, num_tokens: int, angles: Angles | None) -> Any:
    array, seen = arguments.integers(executor, "cu_seqlens", cu_seqlens)
    if array.ndim != 1 or not array.shape[0]:
        raise ShapeError(f"cu_seqlens has shape {tuple(array.shape)}; [batch + 1] is needed")
    if seen is not None:
        if seen[0] != 0 or seen[-1] != num_tokens:
            raise ArgumentError(
                f"cu_seqlens runs from {seen[0]} to {seen[-1]}; from 0 to {num_tokens}, the tokens, is needed"
            )
        lengths = np.diff(seen.astype(np.int64))
        if (lengths < 0).any():
            i = int(np.argmax(lengths < 0))
            raise ArgumentError(f"cu_seqlens descends from {seen[i]} to {seen[i + 1]} at index {i + 1}")
        _check_lengths("cu_seqlens", lengths, angles)
    if array.dtype != np.int32:
        if seen is None:
            raise DTypeError(f"cu_seqlens has dtype {array.dtype}; int32 is allowed on a device")
        array = seen.astype(np.int32)
    return executor.put(array, np.int32)


def _check_outs(problem: SplitProblem, outs: dict[str, Any]) -> None:
    angles, positions = problem.angles, problem.positions
    inputs = {"qkv": problem.qkv, "bias": problem.bias, "cu_seqlens": problem.cu_seqlens}
    inputs |= {"plan.indices": problem.indices, "plan.padding": problem.padding}
    if angles is not None:
        inputs |= {"cos": angles.cos, "sin": angles.sin}
    if positions is not None:
        inputs["positions"] = positions.array
    for (name, x), shape in zip(outs.items(), problem.shapes, strict=False):
        arguments.check_output(name, x, shape, problem.qkv.dtype, **inputs)
    ranges = sorted((*byte_bounds(x), name) for name, x in outs.items() if x.size)
    for (_, end, first), (start, _, second) in pairwise(ranges):
        if start < end:
            raise OverlapError(f"{first} and {second} lie in one memory range; they must not overlap")
