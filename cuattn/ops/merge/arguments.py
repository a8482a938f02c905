"""What `merge_states` accepts: every check that is made before anything is launched or written."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from cuattn.dtypes import ELEMENTS
from cuattn.errors import ArgumentError, DTypeError, ShapeError
from cuattn.runtime.checks import check_apart_or_same, check_writable
from cuattn.runtime.executor import Executor, executor_for
from cuattn.runtime.small_arrays import small_array
from cuattn.scalars import MAX_EXTENT

_LSE_NAMES = ("lse_a", "lse_b", "lses", "out[1]")


@dataclass(slots=True)
class MergeProblem:
    """A call that has passed every check.

    ``first`` and ``rest`` are (out, lse): of part 0, and of the others along a first axis. With no part at all,
    ``first`` is as empty as ``rest``.
    """

    executor: Executor
    first: tuple[Any, Any]
    rest: tuple[Any, Any]
    num_parts: int
    sinks: Any
    out: tuple[Any, Any] | None
    shape: tuple[int, ...]  # of the merged out
    lse_shape: tuple[int, ...]


def check(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, sinks: Any, out: Any) -> MergeProblem:
    """Make every check of a call, and find the executor it runs on. Raises as documented at `cuattn.merge_states`."""
    arrays = _named(out_a, lse_a, out_b, lse_b, out)
    executor = executor_for(**arrays)
    arrays = {name: executor.asarray(name, x) for name, x in arrays.items()}
    _check_dtypes(arrays)
    shape, lse_shape = _check_shapes(arrays)
    if "out_b" in arrays:
        first = arrays["out_a"], arrays["lse_a"]
        rest = arrays["out_b"][None], arrays["lse_b"][None]
        num_parts = 2
    else:
        outs, lses = arrays["outs"], arrays["lses"]
        first = (outs[0], lses[0]) if len(outs) else (outs, lses)
        rest = outs[1:], lses[1:]
        num_parts = len(outs)
    if sinks is not None:
        sinks = small_array(executor, "sinks", sinks, ((shape[-2],),), first[1].dtype, minus_infinity=True)
    results = None
    if out is not None:
        results = arrays["out[0]"], arrays["out[1]"]
        names = ("out_a", "lse_a", "out_b", "lse_b") if "out_b" in arrays else ("outs[0]", "lses[0]", "outs", "lses")
        inputs = dict(zip(names, (*first, *rest), strict=True)) | ({} if sinks is None else {"sinks": sinks})
        for name, result in zip(("out[0]", "out[1]"), results, strict=True):
            check_writable(name, result)
        check_apart_or_same("out[0]", results[0], inputs, names[0])
        check_apart_or_same("out[1]", results[1], inputs | {"out[0]": results[0]}, names[1])
    return MergeProblem(executor, first, rest, num_parts, sinks, results, shape, lse_shape)


def _named(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, out: Any) -> dict[str, Any]:
    """Return what was given, under the names of the form of the call; out and lse of the (first) part lead."""
    if (out_b is None) != (lse_b is None):
        raise ArgumentError(f"{'out_b' if out_b is None else 'lse_b'} is missing: give both, or neither")
    if out_b is None:
        arrays = {"outs": out_a, "lses": lse_a}
    else:
        arrays = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
    if out is not None:
        if not isinstance(out, tuple | list) or len(out) != 2:
            raise ArgumentError(f"out is a {type(out).__name__}; a pair of arrays (out, lse) is needed")
        arrays |= {"out[0]": out[0], "out[1]": out[1]}
    return arrays


def _check_dtypes(arrays: dict[str, Any]) -> None:
    first_name, first = next(iter(arrays.items()))
    for name, x in arrays.items():
        if name == first_name:
            allowed: Collection[str] = ELEMENTS
        elif name in _LSE_NAMES:
            allowed = ("float64" if first.dtype == np.float64 else "float32",)
        elif name == "out[0]" and first.dtype == np.float32:
            allowed = ("float32", "float16", "bfloat16")
        else:
            allowed = (first.dtype.name,)
        if x.dtype.name not in allowed or not x.dtype.isnative:
            given = "" if allowed is ELEMENTS else f", where {first_name} has dtype {first.dtype}"
            raise DTypeError(
                f"{name} has dtype {x.dtype} ({x.dtype.str}); allowed: {', '.join(allowed)} (native){given}"
            )


def _check_shapes(arrays: dict[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Check and return the shapes of the merged out and lse."""
    first_name, first = next(iter(arrays.items()))
    stacked = first_name == "outs"
    if first.ndim - stacked not in (3, 4):
        allowed = "[S, B, N, H, E] or [S, T, H, E]" if stacked else "[B, N, H, E] or [T, H, E]"
        raise ShapeError(f"{first_name} has shape {tuple(first.shape)}, rank {first.ndim}; {allowed} is needed")
    if max(first.shape) > MAX_EXTENT:
        raise ShapeError(f"{first_name} has shape {tuple(first.shape)}; an extent may be at most {MAX_EXTENT}")
    shape = tuple(first.shape[stacked:])
    *batch, seqlen, num_heads, _ = shape
    lse_shape = (*batch, num_heads, seqlen)
    for name, x in arrays.items():
        wanted = lse_shape if name in _LSE_NAMES else shape
        if name in ("outs", "lses"):
            wanted = (len(first), *wanted)
        if tuple(x.shape) != wanted:
            raise ShapeError(
                f"{name} has shape {tuple(x.shape)}; {wanted} is needed, as {first_name} has {tuple(first.shape)}"
            )
    return shape, lse_shape
