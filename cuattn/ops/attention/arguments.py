"""What the attention functions accept: every check that is made before anything is launched or written."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from cuattn.addresses import byte_bounds
from cuattn.dtypes import BFLOAT16, ELEMENTS, FP8_FORMATS, INPUT_DTYPES, STORAGE_8BIT
from cuattn.errors import DTypeError, ShapeError
from cuattn.head_dims import MAX_HEAD_DIM
from cuattn.ops.attention.operation import Operation
from cuattn.ops.attention.options import Options
from cuattn.ops.operand import Operand, deliver, target
from cuattn.runtime.checks import check_apart, check_out
from cuattn.runtime.executor import Executor, executor_for
from cuattn.scalars import MAX_EXTENT, choice

ATTENTION = Operation("attention", "attention")

_LAYOUTS = {
    "q": "seqlen_q, heads, head_dim]",
    "k": "seqlen_k, kv_heads, head_dim]",
    "v": "seqlen_k, kv_heads, head_dim_v]",
}


@dataclass(frozen=True, slots=True, eq=False)  # one object for each set of shapes: known by itself, which is faster
class Extents:
    """The sizes of a problem; letters as in the documentation: B, N, M, H, G, D, E.

    Of packed sequences, B is their number, and N and M are the tokens of all of them together.
    """

    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    packed: bool = False

    @property
    def out_shape(self) -> tuple[int, ...]:
        shape = self.seqlen_q, self.num_heads, self.head_dim_v
        return shape if self.packed else (self.batch, *shape)

    @property
    def lse_shape(self) -> tuple[int, ...]:
        shape = self.num_heads, self.seqlen_q
        return shape if self.packed else (self.batch, *shape)

    @property
    def lse_strides(self) -> tuple[int, int]:
        """Strides of lse on the axes batch and head, in elements; a packed sequence begins at its first token."""
        return (0 if self.packed else self.num_heads * self.seqlen_q), self.seqlen_q

    @property
    def heads_per_kv_head(self) -> int:
        return self.num_heads // max(self.num_kv_heads, 1)


@dataclass(slots=True)
class Problem:
    """A call whose arguments have passed every check."""

    executor: Executor
    q: Any
    k: Any
    v: Any
    out: Any
    dtype: np.dtype[Any]  # of the elements of q, k and v; they may lie in uint8 arrays
    extents: Extents
    scale: float
    options: Options

    @property
    def accumulator(self) -> type[np.floating[Any]]:
        """The type that sums are in, and lse is returned in."""
        return np.float64 if self.dtype == np.float64 else np.float32

    @property
    def unrounded(self) -> bool:
        """Whether the result is of the accumulator's type, where it is usually rounded to another."""
        return self.out is not None and self.out.dtype != output_dtype(self.dtype)

    def output(self) -> Operand:
        """Return what a kernel is to write: ``out`` where it can, else a new array that `deliver` copies from."""
        dtype = output_dtype(self.dtype) if self.out is None else self.out.dtype
        return target(self.executor, self.out, self.extents.out_shape, dtype)

    def deliver(self, output: Operand) -> Any:
        """Return the array for the caller, once the kernel has been launched."""
        return deliver(self.executor, self.out, output)


def output_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype of the result: that of q, or bfloat16 for 8-bit floats."""
    return BFLOAT16 if dtype.itemsize == 1 else dtype


def unrounded_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype of the result before it is rounded: that of the sums."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def check(
    q: Any,
    k: Any,
    v: Any,
    *,
    out: Any = None,
    fp8_format: Any = None,
    operation: Operation = ATTENTION,
    may_be_unrounded: bool = False,
    **options: Any,
) -> Problem:
    """Make every check of a call, and find the executor it runs on. Raises as documented at `cuattn.attention`.

    ``may_be_unrounded``: ``out`` may be of the accumulator's type.
    """
    executor = executor_of(q, k, v, out, operation.large_arrays(options))
    q, k, v = executor.asarray("q", q), executor.asarray("k", k), executor.asarray("v", v)
    dtype = check_dtypes(q, k, v, fp8_format)
    extents = check_qkv(q, k, v)
    resolved = operation.check(
        options,
        executor,
        logits_shape=(extents.batch, extents.num_heads, extents.seqlen_q, extents.seqlen_k),
        num_kv_heads=extents.num_kv_heads,
        dtype=dtype,
    )
    out = prepare_out(executor, out, extents.out_shape, dtype, may_be_unrounded, resolved, q=q, k=k, v=v)
    return Problem(executor, q, k, v, out, dtype, extents, resolved.scale_for(extents.head_dim), resolved)


def executor_of(q: Any, k: Any, v: Any, out: Any, of_options: dict[str, Any]) -> Executor:
    """Find where the arrays of a call live; all of them in one place."""
    arrays = {"q": q, "k": k, "v": v}
    if out is not None:
        arrays["out"] = out
    return executor_for(**arrays, **of_options)


def check_dtypes(q: Any, k: Any, v: Any, fp8_format: Any) -> np.dtype[Any]:
    """Return the dtype of the elements of all three. Raises `DTypeError`, naming the argument, if they share none."""
    dtype: np.dtype[Any] = q.dtype
    if fp8_format is None:
        allowed, native = INPUT_DTYPES, f"{', '.join((*ELEMENTS, *STORAGE_8BIT))} (native)"
        if q.dtype == np.uint8:
            native += ", or uint8 with fp8_format="
    else:
        choice("fp8_format", fp8_format, FP8_FORMATS, optional=True)
        dtype = FP8_FORMATS[fp8_format]
        allowed, native = frozenset((np.dtype(np.uint8), dtype)), f"uint8 and {dtype}, with fp8_format={fp8_format!r}"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in allowed:
            raise DTypeError(f"{name} has dtype {x.dtype} ({x.dtype.str}); allowed are {native}")
        if fp8_format is None and x.dtype != dtype:
            raise DTypeError(f"{name} has dtype {x.dtype} and q has dtype {dtype}; they must be the same")
    return dtype


def prepare_out(
    executor: Executor,
    out: Any,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    may_be_unrounded: bool,
    options: Options,
    **inputs: Any,
) -> Any:
    """Return ``out`` as an array of the executor that can take the result, or None. Raises as `check_out`."""
    if out is None:
        return None
    out = executor.asarray("out", out)
    check_out("out", out, shape, output_dtype(dtype), unrounded=unrounded_dtype(dtype) if may_be_unrounded else None)
    ranges = {name: byte_bounds(x) for name, x in (inputs | options.arrays).items()}
    check_apart("out", byte_bounds(out), ranges)
    return out


def check_qkv(q: Any, k: Any, v: Any, *, batch: int | None = None) -> Extents:
    """Return the extents of a problem. Raises `ShapeError`, naming the argument, if there is none.

    With ``batch``, the arrays are packed: so many sequences one after another, without a batch axis.
    """
    return _extents(tuple(q.shape), tuple(k.shape), tuple(v.shape), batch)


@lru_cache(maxsize=1024)
def _extents(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], batch: int | None) -> Extents:
    """Return the extents for shapes, checked when they are first seen."""
    packed = batch is not None
    _check_ranks(q, k, v, packed)
    seqlen_q, num_heads, head_dim = q[-3:]
    seqlen_k, num_kv_heads, k_head_dim = k[-3:]
    head_dim_v = v[-1]
    if batch is None:
        batch = q[0]
        if k[0] != batch:
            raise ShapeError(f"k has batch {k[0]} (shape {k}) and q has batch {batch}; they must be the same")
    if v[:-1] != k[:-1]:
        axes = "tokens and heads" if packed else "batch, seqlen and heads"
        raise ShapeError(f"v has shape {v} and k has shape {k}; {axes} must be the same")
    if k_head_dim != head_dim:
        raise ShapeError(f"k has head dim {k_head_dim} and q has head dim {head_dim}; they must be the same")
    for name, extent in (("q", head_dim), ("v", head_dim_v)):
        if not 1 <= extent <= MAX_HEAD_DIM:
            raise ShapeError(f"{name} has head dim {extent}; allowed are 1 to {MAX_HEAD_DIM}")
    if num_heads % num_kv_heads if num_kv_heads else num_heads:
        raise ShapeError(
            f"q has {num_heads} heads and k has {num_kv_heads}; the number of query heads must be a multiple of the "
            "number of key/value heads"
        )
    return Extents(batch, seqlen_q, seqlen_k, num_heads, num_kv_heads, head_dim, head_dim_v, packed)


def check_rank(q: Any, k: Any, v: Any, *, packed: bool) -> None:
    """Raise `ShapeError`, naming the argument, for a rank that none of them may have, and for an extent of 2^31."""
    _check_ranks(tuple(q.shape), tuple(k.shape), tuple(v.shape), packed)


@lru_cache(maxsize=1024)
def _check_ranks(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], packed: bool) -> None:
    rank = 3 if packed else 4
    for name, shape in (("q", q), ("k", k), ("v", v)):
        if len(shape) != rank:
            layout = _LAYOUTS[name].replace("seqlen_", "tokens_") if packed else f"batch, {_LAYOUTS[name]}"
            beside = ", beside cu_seqlens_q and cu_seqlens_k" if packed else ""
            raise ShapeError(f"{name} has shape {shape}, rank {len(shape)}; rank {rank} is needed: [{layout}{beside}")
        if max(shape) > MAX_EXTENT:
            raise ShapeError(f"{name} has shape {shape}; an extent may be at most {MAX_EXTENT}")
