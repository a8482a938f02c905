"""What the backward functions accept: every check that is made before anything is launched or written."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np

from cuattn.addresses import byte_bounds, share_elements
from cuattn.dtypes import DTYPES, ELEMENTS
from cuattn.errors import ArgumentError, DTypeError, OverlapError, ShapeError
from cuattn.head_dims import MAX_GRADIENT_HEAD_DIM, MAX_HEAD_DIM
from cuattn.ops.attention import arguments
from cuattn.ops.attention.arguments import Problem, unrounded_dtype
from cuattn.ops.attention.backward import workspace as workspace_parts
from cuattn.ops.attention.backward.problem import BackwardProblem
from cuattn.ops.attention.operation import Operation
from cuattn.ops.attention.sequences import PackedSequences
from cuattn.ops.attention.varlen import check as check_varlen
from cuattn.runtime.arrays import contiguous
from cuattn.runtime.checks import check_apart, check_out, check_workspace
from cuattn.runtime.executor import executor_for
from cuattn.runtime.small_arrays import check_flag

__all__ = ["DENSE", "PACKED", "check", "check_packed", "check_sizes"]

DENSE = Operation("attention_backward", "gradients")
PACKED = Operation("attention_varlen_backward", "gradients")

_GRADIENTS = "dq", "dk", "dv"


def check(dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, **options: Any) -> BackwardProblem:
    """Make every check of a call, of the `Operation` ``operation`` if it is another than `DENSE`.

    ``may_be_unrounded``: ``dq``, ``dk`` and ``dv`` may be of the accumulator's type. Raises as documented at
    `cuattn.attention_backward`.
    """
    return _check(q, k, v, {"dout": dout, "out": out, "lse": lse}, None, **{"operation": DENSE, **options})


def check_packed(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    **options: Any,
) -> BackwardProblem:
    """Make every check of a call, likewise. Raises as documented at `cuattn.attention_varlen_backward`."""
    saved, cu_seqlens = {"dout": dout, "out": out, "lse": lse}, (cu_seqlens_q, cu_seqlens_k)
    return _check(q, k, v, saved, cu_seqlens, **{"operation": PACKED, **options})


def check_sizes(q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, **options: Any) -> BackwardProblem:
    """Check a problem without gradients and results of forward, to plan for. Raises as `check` and `check_packed`."""
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        missing, given = ("cu_seqlens_k", "cu_seqlens_q") if cu_seqlens_k is None else ("cu_seqlens_q", "cu_seqlens_k")
        raise ArgumentError(f"{missing} is None and {given} is given; both are needed for packed sequences")
    cu_seqlens = None if cu_seqlens_q is None else (cu_seqlens_q, cu_seqlens_k)
    if cu_seqlens is None:
        for name in ("max_seqlen_q", "max_seqlen_k"):
            if options.pop(name, None) is not None:
                raise ArgumentError(f"{name} is given without cu_seqlens_q and cu_seqlens_k")
    return _check(q, k, v, {}, cu_seqlens, **options)


def _check(
    q: Any,
    k: Any,
    v: Any,
    saved: Mapping[str, Any],
    cu_seqlens: tuple[Any, Any] | None,
    *,
    operation: Operation,
    may_be_unrounded: bool = False,
    max_seqlen_q: Any = None,
    max_seqlen_k: Any = None,
    dlse: Any = None,
    deterministic: Any = True,
    return_dbias: Any = False,
    dq: Any = None,
    dk: Any = None,
    dv: Any = None,
    workspace: Any = None,
    **options: Any,
) -> BackwardProblem:
    deterministic = check_flag("deterministic", deterministic)
    return_dbias = check_flag("return_dbias", return_dbias)
    large = operation.large_arrays(options)
    if return_dbias and "bias" not in large:
        raise ArgumentError("return_dbias is True and bias is None; there is no bias to have a gradient")
    arrays: dict[str, Any] = {"q": q, "k": k, "v": v, **saved, **large}
    for name, x in (("dlse", dlse), ("dq", dq), ("dk", dk), ("dv", dv), ("workspace", workspace)):
        if x is not None:
            arrays[name] = x
    executor = executor_for(**arrays)
    arrays = {name: executor.asarray(name, x) for name, x in arrays.items()}
    for name in ("q", "k", "v"):
        if arrays[name].dtype not in DTYPES:
            dtype, allowed = arrays[name].dtype, ", ".join(ELEMENTS)
            raise DTypeError(f"{name} has dtype {dtype} ({dtype.str}); gradients are for {allowed} (native)")
    arguments.check_rank(*(arrays[name] for name in ("q", "k", "v")), packed=cu_seqlens is not None)
    _check_head_dims(arrays)
    options |= {name: arrays[name] for name in large}
    qkv = arrays["q"], arrays["k"], arrays["v"]
    if cu_seqlens is None:
        forward, packed = arguments.check(*qkv, operation=operation, **options), None
    else:
        options |= {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
        forward, packed = check_varlen(*qkv, *cu_seqlens, operation=operation, **options)
    _check_saved({name: arrays[name] for name in (*saved, "dlse") if name in arrays}, forward)
    gradients = {name: x for name, x in arrays.items() if name in _GRADIENTS}
    memory = {} if not gradients and workspace is None else _memory(arrays, forward, packed)
    _check_gradients(gradients, forward, memory, unrounded_dtype(forward.dtype) if may_be_unrounded else None)
    problem = BackwardProblem(
        forward=forward,
        **{name: arrays.get(name) for name in ("dout", "out", "lse", "dlse", "dq", "dk", "dv", "workspace")},
        return_dbias=return_dbias,
        bias_shape=tuple(arrays["bias"].shape) if "bias" in large else None,
        deterministic=deterministic,
        packed=packed,
    )
    if workspace is not None:
        _check_workspace(problem, memory)
    if saved:
        problem.lse = contiguous(executor, problem.lse)
    if dlse is not None:
        problem.dlse = contiguous(executor, problem.dlse)
    return problem


def _check_head_dims(arrays: Mapping[str, Any]) -> None:
    for name in ("q", "v"):
        extent = arrays[name].shape[-1]
        if extent > MAX_GRADIENT_HEAD_DIM:
            raise ShapeError(
                f"{name} has head dim {extent}; gradients are for 1 to {MAX_GRADIENT_HEAD_DIM} (attention without them "
                f"takes up to {MAX_HEAD_DIM})"
            )


def _check_saved(saved: Mapping[str, Any], forward: Problem) -> None:
    """Check what forward returned, and gradients of it: of the shapes and dtypes that forward gives for q, k and v."""
    extents = forward.extents
    for name, x in saved.items():
        of_lse = name in ("lse", "dlse")
        shape, dtype = (extents.lse_shape, forward.accumulator) if of_lse else (extents.out_shape, forward.dtype)
        if tuple(x.shape) != shape:
            raise ShapeError(f"{name} has shape {tuple(x.shape)}; {shape} is needed for these q, k and v")
        if x.dtype != dtype:
            raise DTypeError(f"{name} has dtype {x.dtype} ({x.dtype.str}); {np.dtype(dtype)} (native) is needed")


def _memory(arrays: Mapping[str, Any], forward: Problem, packed: PackedSequences | None) -> dict[str, tuple[int, int]]:
    """Return the memory range of every array of a call."""
    arrays = forward.options.arrays | dict(arrays)  # a bias as given, if that one had to be copied
    if packed is not None:
        arrays |= {"cu_seqlens_q": packed.cu_seqlens_q, "cu_seqlens_k": packed.cu_seqlens_k}
    return {name: byte_bounds(x) for name, x in arrays.items()}


def _check_gradients(
    gradients: Mapping[str, Any],
    forward: Problem,
    memory: Mapping[str, tuple[int, int]],
    unrounded: np.dtype[Any] | None,
) -> None:
    """Check the arrays that the caller wants gradients in: apart from every input, and from each other."""
    inputs = {name: bounds for name, bounds in memory.items() if name not in gradients and name != "workspace"}
    for name, x in gradients.items():
        shape = tuple(getattr(forward, name[1:]).shape)
        check_out(name, x, shape, forward.dtype, "gradient", unrounded=unrounded)
        check_apart(name, memory[name], inputs)
    for (name, x), (other_name, other) in combinations(gradients.items(), 2):
        (low, high), (other_low, other_high) = memory[name], memory[other_name]
        if low < other_high and other_low < high and share_elements(x, other):
            raise OverlapError(f"{name} and {other_name} share memory; gradients may be interleaved, but not overlap")


def _check_workspace(problem: BackwardProblem, memory: Mapping[str, tuple[int, int]]) -> None:
    workspace = problem.workspace
    check_workspace(workspace)
    needed = workspace_parts.nbytes(problem)
    if workspace.size < needed:
        raise ShapeError(
            f"workspace has {workspace.size} bytes; {needed} are needed (cuattn.attention_backward_workspace_size)"
        )
    others = {name: bounds for name, bounds in memory.items() if name != "workspace"}
    check_apart("workspace", memory["workspace"], others)
