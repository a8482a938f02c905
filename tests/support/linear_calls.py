"""Inputs of linear attention, and its calls on an executor under test."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

import cuattn
from cuattn.testing.executors import ExecutorUnderTest

F16, BF16, F32, F64 = (np.dtype(x) for x in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))
DTYPES = (F16, BF16, F32, F64)


def qkv(
    rng: np.random.Generator,
    dtype: np.dtype[Any],
    seqlen: int,
    heads: tuple[int, int, int] = (2, 2, 2),
    dims: tuple[int, int] = (32, 32),
    *,
    batch: int = 2,
    seqlen_k: int | None = None,
) -> tuple[Any, Any, Any]:
    """Normal numbers; heads are those of q, k, v, dims are D and E."""
    of_keys = seqlen if seqlen_k is None else seqlen_k
    shapes = (
        (batch, seqlen, heads[0], dims[0]),
        (batch, of_keys, heads[1], dims[0]),
        (batch, of_keys, heads[2], dims[1]),
    )
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)  # type: ignore[return-value]


def decay_like(rng: np.random.Generator, k: Any, v: Any, kind: str, strength: float = 0.3) -> Any:
    """A decay of a kind: None, "head", "token" or "channel", of about -strength a token."""
    states = max(k.shape[-2], v.shape[-2])
    shapes = {"head": (states,), "token": (*k.shape[:-2], states), "channel": (*k.shape[:-2], states, k.shape[-1])}
    return -strength * rng.exponential(size=shapes[kind]) if kind in shapes else None


def state_like(rng: np.random.Generator, k: Any, v: Any, *, normalize: bool = True, batch: int | None = None) -> Any:
    """A state that some past may have left."""
    real = F64 if k.dtype == F64 else F32
    shape = (k.shape[0] if batch is None else batch, max(k.shape[-2], v.shape[-2]), k.shape[-1])
    s = rng.standard_normal((*shape, v.shape[-1])).astype(real)
    return cuattn.LinearState(s, (np.abs(rng.standard_normal(shape)) * 9 + 1).astype(real) if normalize else None)


def on(executor: ExecutorUnderTest, value: Any) -> Any:
    """An array, a state or None on the executor."""
    if value is None or isinstance(value, list):
        return value
    if isinstance(value, tuple):
        return cuattn.LinearState(*(on(executor, x) for x in value))
    return executor.array(np.asarray(value))


def run(executor: ExecutorUnderTest, q: Any, k: Any, v: Any, **options: Any) -> tuple[Any, Any]:
    """Out and state of `linear_attention`, as NumPy arrays."""
    return fetched(executor, _call(executor, cuattn.linear_attention, (q, k, v), options))


def run_varlen(executor: ExecutorUnderTest, q: Any, k: Any, v: Any, cu_seqlens: Any, **options: Any) -> Any:
    """Out and state of `linear_attention_varlen`, as NumPy arrays."""
    return fetched(executor, _call(executor, cuattn.linear_attention_varlen, (q, k, v), options, cu_seqlens))


def _call(executor: ExecutorUnderTest, function: Any, arrays: Any, options: dict[str, Any], *more: Any) -> Any:
    given = {name: on(executor, x) if name in ("decay", "initial_state") else x for name, x in options.items()}
    return function(*(on(executor, x) for x in arrays), *more, return_state=True, **given)


def fetched(executor: ExecutorUnderTest, result: Any) -> tuple[Any, Any]:
    """The result of a call with its state, as NumPy arrays."""
    out, state = result
    return executor.numpy(out), cuattn.LinearState(*(None if x is None else executor.numpy(x) for x in state))
