"""The state of linear attention: what a call is given, returns, and may write to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from cuattn.addresses import byte_bounds
from cuattn.errors import ArgumentError, DTypeError, ShapeError
from cuattn.messages import shown
from cuattn.runtime.checks import check_apart, check_apart_or_same, check_out
from cuattn.runtime.executor import Executor

__all__ = ["LinearState", "as_state", "check_state", "check_state_out", "named_arrays"]


class LinearState(NamedTuple):
    """All that linear attention keeps of the past: what `cuattn.linear_attention` returns, and goes on from.

    Attributes
    ----------
    s : array [B, G, D, E], float32 (float64 for float64)
        The sum over tokens of keys times values, decayed. In a packed batch, B counts the sequences.
    z : array [B, G, D] of the same dtype, or None
        The sum of keys, decayed; None without normalisation.
    """

    s: Any
    z: Any


def as_state(name: str, value: Any) -> LinearState:
    """Return a pair as a state; `ArgumentError` for what is none."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ArgumentError(f"{name} is {shown(value)}; a LinearState (s, z) is needed")
    return LinearState(*value)


def named_arrays(name: str, state: LinearState | None) -> dict[str, Any]:
    """Return the arrays of a state by their names in messages."""
    if state is None:
        return {}
    return {f"{name}.{part}": x for part, x in zip(("s", "z"), state, strict=True) if x is not None}


def check_state(
    executor: Executor,
    name: str,
    state: LinearState | None,
    shape: tuple[int, int, int, int],
    dtype: np.dtype[Any],
    *,
    normalize: bool,
) -> LinearState | None:
    """Return a given state as arrays of the executor: s of ``shape`` [B, G, D, E], and z [B, G, D] with ``normalize``.

    Raises `ArgumentError`, `ShapeError`, `DTypeError` or `ArrayTypeError`.
    """
    if state is None:
        return None
    if normalize and state.z is None:
        raise ArgumentError(f"{name} has no z, the sum of keys, which normalize=True needs")
    parts = []
    for part, x, needed in (("s", state.s, shape), ("z", state.z if normalize else None, shape[:3])):
        if x is not None:
            x = executor.asarray(f"{name}.{part}", x)
            if tuple(x.shape) != needed:
                raise ShapeError(f"{name}.{part} has shape {tuple(x.shape)}; {needed} is needed")
            if x.dtype != dtype:
                raise DTypeError(f"{name}.{part} has dtype {x.dtype}; {dtype} is needed")
        parts.append(x)
    return LinearState(*parts)


def check_state_out(state: LinearState, initial: LinearState | None, inputs: Mapping[str, Any]) -> None:
    """Raise unless the checked ``state`` can be written: apart from all ``inputs``, or being ``initial`` itself."""
    initial_arrays = named_arrays("initial_state", initial)
    arrays = named_arrays("state_out", state)
    for name, x in arrays.items():
        check_out(name, x, tuple(x.shape), x.dtype, "state")
        check_apart(name, byte_bounds(x), {other: byte_bounds(y) for other, y in inputs.items()})
        same_as = name.replace("state_out", "initial_state")
        if same_as in initial_arrays:
            check_apart_or_same(name, x, initial_arrays, same_as)
    if len(arrays) == 2:
        check_apart("state_out.s", byte_bounds(state.s), {"state_out.z": byte_bounds(state.z)})
