"""What the functions of differential attention accept: every check that is made before anything is launched."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from cuattn.addresses import byte_bounds
from cuattn.dtypes import DTYPES, ELEMENTS
from cuattn.errors import ArgumentError, DTypeError, ShapeError
from cuattn.ops.attention.arguments import Extents
from cuattn.ops.attention.operation import Operation
from cuattn.ops.attention.option_checks import LogitArray
from cuattn.ops.attention.options import Options
from cuattn.ops.differential.weights import Lambda, check_lambda
from cuattn.ops.operand import Operand, deliver, target
from cuattn.runtime.checks import check_apart, check_out
from cuattn.runtime.executor import Executor, executor_for
from cuattn.runtime.small_arrays import check_flag, small_array
from cuattn.scalars import MAX_EXTENT, real

__all__ = ["CALL", "MAX_HEAD_DIM", "DifferentialProblem", "Norm", "PairExtents", "check", "check_heads", "check_norm"]

CALL = Operation("differential_attention", "differential")
#: Of D and E.
MAX_HEAD_DIM = 256

_LAYOUTS = (
    "[batch, seqlen_q, 2 heads, head_dim]",
    "[batch, seqlen_k, 2 kv_heads or kv_heads, head_dim]",
    "[batch, seqlen_k, kv_heads, head_dim_v]",
)


@dataclass(frozen=True, slots=True, eq=False)
class PairExtents(Extents):
    """The sizes of a problem, whose heads are pairs of query heads.

    ``shared_keys``: both heads of a pair read one key head (V2).
    """

    shared_keys: bool = False

    @property
    def lse_shape(self) -> tuple[int, ...]:
        return self.batch, self.num_heads, 2, self.seqlen_q

    @property
    def lse_strides(self) -> tuple[int, int]:
        """Strides of lse on the axes batch and head, where every stream is a head."""
        return 2 * self.num_heads * self.seqlen_q, self.seqlen_q


@dataclass(frozen=True, slots=True)
class Norm:
    """What becomes of the difference: the root mean square that it is divided by, its weight, and a factor."""

    on: bool
    weight: Any  # [head_dim_v], of the accumulator's type, or None
    eps: float
    output_scale: float


@dataclass(slots=True)
class DifferentialProblem:
    """A call whose arguments have passed every check."""

    executor: Executor
    q: Any
    k: Any
    v: Any
    out: Any
    dtype: np.dtype[Any]
    extents: PairExtents
    scale: float
    options: Options  # those of logits have an axis of streams: LogitArray
    lambda_: Lambda
    norm: Norm

    @property
    def accumulator(self) -> type[np.floating[Any]]:
        """The type that sums are in, and lse is returned in."""
        return np.float64 if self.dtype == np.float64 else np.float32

    def output(self) -> Operand:
        """Return what a kernel is to write: ``out`` where it can, else a new array that `deliver` copies from."""
        return target(self.executor, self.out, self.extents.out_shape, self.dtype)

    def deliver(self, output: Operand) -> Any:
        """Return the array for the caller, once the kernel has been launched."""
        return deliver(self.executor, self.out, output)

    def options_of_stream(self, stream: int) -> Options:
        """Return the options with the part of bias and mask that a stream has."""
        options = self.options
        return replace(
            options, bias=_of_stream(options.bias, stream), mask=_of_stream(options.mask, stream), shared=False
        )


def _of_stream(x: LogitArray | None, stream: int) -> LogitArray | None:
    return x and LogitArray(x.array[:, :, stream], x.strides)


def check(
    q: Any,
    k: Any,
    v: Any,
    lambda_: Any,
    *,
    norm: Any = False,
    norm_weight: Any = None,
    eps: Any = 1e-5,
    output_scale: Any = 1.0,
    out: Any = None,
    operation: Operation = CALL,
    more: dict[str, Any] | None = None,
    **options: Any,
) -> DifferentialProblem:
    """Make every check of a call, and find the executor it runs on.

    ``more`` are other arrays of the call, which lie where q does. Raises as documented at
    `cuattn.differential_attention`.
    """
    arrays = {"q": q, "k": k, "v": v} | ({} if out is None else {"out": out}) | operation.large_arrays(options)
    executor = executor_for(**arrays, **(more or {}))
    q, k, v = (executor.asarray(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    dtype = _check_dtypes(q, k, v)
    extents = _extents(tuple(q.shape), tuple(k.shape), tuple(v.shape))
    accumulator = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    resolved = operation.check(
        options,
        executor,
        logits_shape=(extents.batch, 2 * extents.num_heads, extents.seqlen_q, extents.seqlen_k),
        num_kv_heads=extents.num_kv_heads,
        dtype=dtype,
        streams=2,
    )
    rows = extents.batch, extents.seqlen_q, extents.num_heads
    factor = check_lambda(executor, lambda_, rows, accumulator)
    normed = check_norm(executor, norm, norm_weight, eps, output_scale, extents.head_dim_v, accumulator)
    if out is not None:
        out = executor.asarray("out", out)
        check_out("out", out, extents.out_shape, dtype)
        inputs = {"q": q, "k": k, "v": v, "lambda_": factor.array, "norm_weight": normed.weight} | resolved.arrays
        check_apart("out", byte_bounds(out), {name: byte_bounds(x) for name, x in inputs.items() if x is not None})
    scale = resolved.scale_for(extents.head_dim)
    return DifferentialProblem(executor, q, k, v, out, dtype, extents, scale, resolved, factor, normed)


def _check_dtypes(q: Any, k: Any, v: Any) -> np.dtype[Any]:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in DTYPES:
            raise DTypeError(f"{name} has dtype {x.dtype} ({x.dtype.str}); allowed are {', '.join(ELEMENTS)} (native)")
        if x.dtype != q.dtype:
            raise DTypeError(f"{name} has dtype {x.dtype} and q has dtype {q.dtype}; they must be the same")
    dtype: np.dtype[Any] = q.dtype
    return dtype


@lru_cache(maxsize=1024)
def _extents(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> PairExtents:
    """Return the extents for shapes. Raises `ShapeError`, naming the argument, if they fit no problem."""
    shared_keys = check_heads(q, k, v, names=("q", "k", "v"))
    batch, seqlen_q, query_heads, head_dim = q
    for name, shape in (("k", k), ("v", v)):
        if shape[0] != batch:
            raise ShapeError(f"{name} has batch {shape[0]} (shape {shape}) and q has batch {batch}")
    if v[1] != k[1]:
        raise ShapeError(f"v has seqlen {v[1]} (shape {v}) and k has seqlen {k[1]}; they must be the same")
    sizes = batch, seqlen_q, k[1], query_heads // 2, v[2], head_dim, v[3]
    return PairExtents(*sizes, shared_keys=shared_keys)


def check_heads(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], *, names: tuple[str, str, str]) -> bool:
    """Return whether both heads of a pair read one key head, for the shapes of q, keys and values.

    Raises `ShapeError`, naming the argument, if heads or head dims do not fit each other.
    """
    name_q, name_k, name_v = names
    for name, shape, layout in zip(names, (q, k, v), _LAYOUTS, strict=True):
        if len(shape) != 4:
            raise ShapeError(f"{name} has shape {shape}, rank {len(shape)}; rank 4 is needed: {layout}")
        if max(shape) > MAX_EXTENT:
            raise ShapeError(f"{name} has shape {shape}; an extent may be at most {MAX_EXTENT}")
    query_heads, head_dim = q[2:]
    num_kv_heads, head_dim_v = v[2:]
    if k[3] != head_dim:
        raise ShapeError(f"{name_k} has head dim {k[3]} and q has head dim {head_dim}; they must be the same")
    for name, extent in ((name_q, head_dim), (name_v, head_dim_v)):
        if not 1 <= extent <= MAX_HEAD_DIM:
            raise ShapeError(f"{name} has head dim {extent}; allowed are 1 to {MAX_HEAD_DIM}")
    if query_heads % 2:
        raise ShapeError(
            f"{name_q} has {query_heads} heads; they come in pairs, one head for each of the two softmaxes"
        )
    if k[2] not in (num_kv_heads, 2 * num_kv_heads):
        raise ShapeError(
            f"{name_k} has {k[2]} heads and {name_v} has {num_kv_heads}; {name_k} has twice as many as {name_v} (one "
            "for each softmax) or as many"
        )
    pairs = query_heads // 2
    if pairs % num_kv_heads if num_kv_heads else pairs:
        raise ShapeError(
            f"{name_q} has {pairs} pairs of heads and {name_v} has {num_kv_heads} heads; the number of pairs must be a "
            "multiple of the number of value heads"
        )
    return k[2] == num_kv_heads


def check_norm(
    executor: Executor, norm: Any, weight: Any, eps: Any, output_scale: Any, head_dim_v: int, dtype: np.dtype[Any]
) -> Norm:
    on = check_flag("norm", norm)
    limits = np.finfo(dtype)
    if weight is not None:
        if not on:
            raise ArgumentError("norm_weight is given and norm is False; there is no norm for it to weigh")
        weight = small_array(executor, "norm_weight", weight, ((head_dim_v,),), dtype)
    rule = f"a finite number from 0 to {float(limits.max):.3g} is needed"
    added = real("eps", eps, rule, lambda value: 0 <= value <= float(limits.max))
    rule = f"a finite number of magnitude at most {float(limits.max):.3g} is needed"
    factor = real("output_scale", output_scale, rule, lambda value: abs(value) <= float(limits.max))
    return Norm(on, weight, added, factor)
