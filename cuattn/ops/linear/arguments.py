"""What the functions of linear attention accept: every check that is made before anything is launched or written."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from cuattn.addresses import address, byte_bounds
from cuattn.dtypes import DTYPES
from cuattn.errors import ArgumentError, DTypeError, NonFiniteError, ShapeError
from cuattn.ops.linear.options import LinearOptions, check_options
from cuattn.ops.linear.state import LinearState, as_state, check_state, check_state_out, named_arrays
from cuattn.runtime.checks import check_apart, check_dtype, check_extents, check_out
from cuattn.runtime.executor import Executor, executor_for

__all__ = ["Decay", "LinearExtents", "LinearProblem", "check", "check_decay", "check_qkv"]

MAX_HEAD_DIM = 256  # of both sides of the state


@dataclass(frozen=True, slots=True)
class LinearExtents:
    """The extents of a problem: those of q [B, N, H, D], k [B, M, Gk, D] and v [B, M, Gv, E].

    ``packed``: there is no batch axis, ``batch`` counts sequences, and the lengths are those of all of them together.
    """

    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads: int
    num_k_heads: int
    num_v_heads: int
    head_dim: int
    head_dim_v: int
    packed: bool

    @property
    def num_states(self) -> int:
        """State heads, G: state g reads key head ``g // (G / Gk)`` and value head ``g // (G / Gv)``."""
        return max(self.num_k_heads, self.num_v_heads)

    @property
    def num_outputs(self) -> int:
        """Output heads, O: output o reads query head ``o // (O / H)`` and state ``o // (O / G)``."""
        return max(self.num_heads, self.num_states)

    @property
    def out_shape(self) -> tuple[int, ...]:
        batch = () if self.packed else (self.batch,)
        return *batch, self.seqlen_q, self.num_outputs, self.head_dim_v

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """The shape of s."""
        return self.batch, self.num_states, self.head_dim, self.head_dim_v


@dataclass(frozen=True, slots=True)
class Decay:
    """A decay as kernels read it: of the dtype of sums, channels contiguous.

    ``strides``: elements from batch to batch, token to token and state to state; 0 where all share one.
    ``channels``: there is one number for each channel of a key, [.., G, D], not one a state.
    """

    array: Any
    strides: tuple[int, int, int]
    channels: bool


@dataclass(slots=True)
class LinearProblem:
    """A call whose arguments have passed every check."""

    executor: Executor
    q: Any
    k: Any
    v: Any
    dtype: np.dtype[Any]
    extents: LinearExtents
    options: LinearOptions
    decay: Decay | None
    initial_state: LinearState | None
    out: Any = None
    state_out: LinearState | None = None

    @property
    def accumulator(self) -> np.dtype[Any]:
        """The dtype that sums and states are in."""
        return real_of(self.dtype)


def real_of(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype of sums and states: float64 for float64, else float32."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def check(
    q: Any,
    k: Any,
    v: Any,
    *,
    batch: int | None = None,
    decay: Any = None,
    initial_state: Any = None,
    out: Any = None,
    state_out: Any = None,
    extra: dict[str, Any] | None = None,
    causal: Any = True,
    **options: Any,
) -> LinearProblem:
    """Make every check of a call, and find the executor it runs on. Raises as documented at `cuattn.linear_attention`.

    Without ``q`` a state is made and nothing is read from it. With ``batch`` the arrays are packed: so many sequences
    one after another, without a batch axis. ``extra`` are further arrays that have to lie in the same place.
    """
    initial = None if initial_state is None else as_state("initial_state", initial_state)
    target = None if state_out is None else as_state("state_out", state_out)
    arrays = {"k": k, "v": v} if q is None else {"q": q, "k": k, "v": v}
    if out is not None:
        arrays["out"] = out
    if getattr(decay, "ndim", 0) > 1:
        arrays["decay"] = decay
    states = named_arrays("initial_state", initial) | named_arrays("state_out", target)
    executor = executor_for(**arrays, **states, **(extra or {}))
    inputs = {name: executor.asarray(name, x) for name, x in arrays.items() if name in ("q", "k", "v")}
    dtype = check_dtypes(**inputs)
    k, v = inputs["k"], inputs["v"]
    q = inputs.get("q")
    extents = check_qkv(k if q is None else q, k, v, batch=batch)
    resolved = check_options(extents.head_dim, causal=causal, **options)
    if resolved.causal and extents.seqlen_q != extents.seqlen_k:
        raise ShapeError(
            f"q has {extents.seqlen_q} tokens and k has {extents.seqlen_k}; with causal=True there must be as many, as "
            "the past is in the state"
        )
    checked_decay = check_decay(executor, decay, extents, dtype)
    if checked_decay is not None and not resolved.causal:
        raise ArgumentError("decay needs causal=True: without an order of tokens there is no time to decay over")
    sums = real_of(dtype)
    normalize = resolved.normalize
    initial = check_state(executor, "initial_state", initial, extents.state_shape, sums, normalize=normalize)
    target = check_state(executor, "state_out", target, extents.state_shape, sums, normalize=normalize)
    if checked_decay is not None:
        inputs["decay"] = checked_decay.array
    if out is not None:
        out = executor.asarray("out", out)
        check_out("out", out, extents.out_shape, dtype)
        others = inputs | named_arrays("initial_state", initial) | named_arrays("state_out", target)
        check_apart("out", byte_bounds(out), {name: byte_bounds(x) for name, x in others.items()})
    if target is not None:
        check_state_out(target, initial, inputs)
    return LinearProblem(executor, q, k, v, dtype, extents, resolved, checked_decay, initial, out, target)


def check_dtypes(**arrays: Any) -> np.dtype[Any]:
    """Return the dtype of all arrays; `DTypeError` if they share none, or no kernel takes it."""
    (first_name, first), *others = arrays.items()
    check_dtype(first_name, first.dtype)
    for name, x in others:
        if x.dtype != first.dtype:
            raise DTypeError(f"{name} has dtype {x.dtype} and {first_name} has dtype {first.dtype}; they must be equal")
    return first.dtype


def check_qkv(q: Any, k: Any, v: Any, *, batch: int | None = None) -> LinearExtents:
    """Return the extents of a problem. Raises `ShapeError`, naming the argument, if there is none."""
    return _extents(tuple(q.shape), tuple(k.shape), tuple(v.shape), batch)


@lru_cache(maxsize=1024)
def _extents(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], batch: int | None) -> LinearExtents:
    packed = batch is not None
    for name, shape in (("k", k), ("v", v), ("q", q)):  # k first: without queries, it is q as well
        if len(shape) != 4 - packed:
            layout = "[tokens, heads, head_dim]" if packed else "[batch, seqlen, heads, head_dim]"
            raise ShapeError(f"{name} has shape {shape}, rank {len(shape)}; {layout} is needed")
        check_extents(name, shape)
    if v[:-2] != k[:-2]:
        raise ShapeError(f"v has shape {v} and k has shape {k}; they must have the same tokens")
    if q[:-3] != k[:-3]:
        raise ShapeError(f"q has shape {q} and k has shape {k}; they must have the same batch")
    if q[-1] != k[-1]:
        raise ShapeError(f"k has head dim {k[-1]} and q has head dim {q[-1]}; they must be the same")
    for name, extent in (("k", k[-1]), ("v", v[-1])):
        if not 1 <= extent <= MAX_HEAD_DIM:
            raise ShapeError(f"{name} has head dim {extent}; allowed are 1 to {MAX_HEAD_DIM}")
    found = LinearExtents(q[0] if batch is None else batch, q[-3], k[-3], q[-2], k[-2], v[-2], q[-1], v[-1], packed)
    states, outputs = found.num_states, found.num_outputs
    for name, heads, total, what in (
        ("k", k[-2], states, "states"),
        ("v", v[-2], states, "states"),
        ("q", q[-2], outputs, "outputs"),
        ("k and v", states, outputs, "outputs"),
    ):
        if total % heads if heads else total:
            raise ShapeError(
                f"{name} has {heads} heads, of which {total}, the number of {what}, must be a multiple; q has {q[-2]}, "
                f"k has {k[-2]} and v has {v[-2]}"
            )
    return found


def check_decay(executor: Executor, decay: Any, extents: LinearExtents, dtype: np.dtype[Any]) -> Decay | None:
    """Return a decay [G], [B, N, G] or [B, N, G, D] (packed: [G], [T, G] or [T, G, D]) as kernels read it.

    Raises `ShapeError`, `DTypeError`, `ArrayTypeError`, or `NonFiniteError` for a NaN or +inf that the host can see.
    """
    if decay is None:
        return None
    large = getattr(decay, "ndim", 0) > 1
    array = executor.asarray("decay", decay) if large else executor.metadata("decay", decay)
    if array.dtype not in DTYPES and not (array.dtype.kind in "iuf" and array.ndim == 1):
        raise DTypeError(
            f"decay has dtype {array.dtype}; a float dtype is needed: {', '.join(sorted(map(str, DTYPES)))}"
        )
    states = extents.num_states
    rows = (extents.seqlen_k,) if extents.packed else (extents.batch, extents.seqlen_k)
    allowed = (states,), (*rows, states), (*rows, states, extents.head_dim)
    if tuple(array.shape) not in allowed:
        raise ShapeError(f"decay has shape {tuple(array.shape)}; allowed are {', '.join(map(str, allowed))}")
    if isinstance(array, np.ndarray) and (np.isnan(array) | np.isposinf(array)).any():
        raise NonFiniteError("decay holds NaN or +inf; numbers and -inf are allowed")
    channels = array.ndim == len(rows) + 2
    array = _readable(executor, array, real_of(dtype), channels)
    steps = [stride // array.dtype.itemsize for stride in array.strides]
    if channels:
        steps.pop()
    batch, seq, head = [0] * (3 - len(steps)) + steps
    return Decay(array, (batch, seq, head), channels)


def _readable(executor: Executor, array: Any, dtype: np.dtype[Any], channels: bool) -> Any:
    """Return the array itself if it lies where kernels can read it, else a copy."""
    here = executor.name == "host" or not isinstance(array, np.ndarray)
    if here and array.dtype == dtype and address(array) % dtype.itemsize == 0:
        whole = all(stride % dtype.itemsize == 0 for stride in array.strides)
        if whole and (not channels or array.strides[-1] == dtype.itemsize or array.shape[-1] == 1):
            return array
    return executor.put(array, dtype)
