"""What the attention functions accept: every check that is made before anything is launched or written."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from cuattn.config import DTYPES, ELEMENTS, MAX_HEAD_DIM
from cuattn.errors import ArgumentError, ArrayTypeError, DTypeError, NonFiniteError, OverlapError, ShapeError
from cuattn.extents import address, byte_bounds
from cuattn.launch import Executor, executor_for

MAX_EXTENT = 2**31 - 1
LOG2_E = math.log2(math.e)
_LAYOUTS = {"q": "[batch, seqlen_q, heads, head_dim]", "k": "[batch, seqlen_k, kv_heads, head_dim]"}
_LAYOUTS |= {"v": "[batch, seqlen_k, kv_heads, head_dim_v]"}


@dataclass(frozen=True, slots=True)
class Extents:
    """The sizes of a problem; letters as in the documentation: B, N, M, H, G, D, E."""

    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.seqlen_q, self.num_heads, self.head_dim_v

    @property
    def lse_shape(self) -> tuple[int, int, int]:
        return self.batch, self.num_heads, self.seqlen_q

    @property
    def heads_per_kv_head(self) -> int:
        return self.num_heads // max(self.num_kv_heads, 1)


@dataclass(slots=True)
class Problem:
    """A call whose arguments have passed every check. ``scale`` and ``diagonal_offset`` are resolved to numbers."""

    executor: Executor
    q: Any
    k: Any
    v: Any
    out: Any
    extents: Extents
    scale: float
    causal: bool
    diagonal_offset: int

    @property
    def accumulator(self) -> type[np.floating[Any]]:
        """The type that sums are in, and lse is returned in."""
        return np.float64 if self.q.dtype == np.float64 else np.float32

    def output(self) -> Operand:
        """What a kernel is to write: ``out`` where it can, else a new array that `deliver` copies from."""
        if self.out is not None:
            given = Operand(self.out)
            if given.direct:
                return given
        return Operand(self.executor.empty(self.extents.out_shape, self.q.dtype))

    def deliver(self, output: Operand) -> Any:
        """The array for the caller, once the kernel has been launched."""
        if output.array is self.out:
            return self.out
        self.executor.finish(output.array)
        if self.out is None:
            return output.array
        with self.executor.on_device():
            self.out[...] = output.array
        return self.out


def check(q: Any, k: Any, v: Any, scale: Any, causal: Any, out: Any) -> Problem:
    """Every check of a call, and the executor it runs on. Raises as documented at `cuattn.attention`."""
    executor = executor_for(q=q, k=k, v=v) if out is None else executor_for(q=q, k=k, v=v, out=out)
    q, k, v = executor.asarray(q), executor.asarray(k), executor.asarray(v)
    extents = check_qkv(q, k, v)
    scale = check_scale(scale, extents.head_dim, q.dtype)
    is_causal, diagonal_offset = check_causal(causal, extents.seqlen_q, extents.seqlen_k)
    if out is not None:
        out = executor.asarray(out)
        check_out(out, extents.out_shape, q.dtype, q=q, k=k, v=v)
    return Problem(executor, q, k, v, out, extents, scale, is_causal, diagonal_offset)


def check_qkv(q: Any, k: Any, v: Any) -> Extents:
    """The extents of a problem. Raises `ShapeError` or `DTypeError`, naming the argument, if there is none."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ShapeError(f"{name} has shape {tuple(x.shape)}, rank {x.ndim}; rank 4 is needed: {_LAYOUTS[name]}")
        if x.dtype not in DTYPES:
            raise DTypeError(f"{name} has dtype {x.dtype} ({x.dtype.str}); allowed are {', '.join(ELEMENTS)} (native)")
        if x.dtype != q.dtype:
            raise DTypeError(f"{name} has dtype {x.dtype} and q has dtype {q.dtype}; they must be the same")
        if max(x.shape) > MAX_EXTENT:
            raise ShapeError(f"{name} has shape {tuple(x.shape)}; an extent may be at most {MAX_EXTENT}")
    batch, seqlen_q, num_heads, head_dim = q.shape
    k_batch, seqlen_k, num_kv_heads, k_head_dim = k.shape
    head_dim_v = v.shape[3]
    if k_batch != batch:
        raise ShapeError(
            f"k has batch {k_batch} (shape {tuple(k.shape)}) and q has batch {batch}; they must be the same"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ShapeError(
            f"v has shape {tuple(v.shape)} and k has shape {tuple(k.shape)}; batch, seqlen and heads must be the same"
        )
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
    return Extents(batch, seqlen_q, seqlen_k, num_heads, num_kv_heads, head_dim, head_dim_v)


def check_scale(scale: Any, head_dim: int, dtype: np.dtype[Any]) -> float:
    """The scale as a float; 1 / sqrt(D) for None. It must be finite where the kernel uses it: times log2(e)."""
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    if isinstance(scale, bool | np.bool_) or not isinstance(scale, Real | np.floating):
        raise ArgumentError(f"scale is {scale!r} of type {type(scale).__name__}; a number or None is allowed")
    value = float(scale)
    limit = float(np.finfo(np.float64 if dtype == np.float64 else np.float32).max) / LOG2_E
    if not abs(value) <= limit:
        raise NonFiniteError(
            f"scale is {scale!r}; a finite number is needed, of magnitude at most {limit:.3g} for {dtype}"
        )
    return value


def check_causal(causal: Any, seqlen_q: int, seqlen_k: int) -> tuple[bool, int]:
    """Whether the mask is causal, and the offset o of the diagonal: query i is aligned with key i + o."""
    if isinstance(causal, bool | np.bool_):
        return bool(causal), seqlen_k - seqlen_q
    if isinstance(causal, str) and causal == "bottom_right":
        return True, seqlen_k - seqlen_q
    if isinstance(causal, str) and causal == "top_left":
        return True, 0
    raise ArgumentError(f"causal is {causal!r}; allowed are False, True, 'bottom_right' and 'top_left'")


def check_out(out: Any, shape: tuple[int, ...], dtype: np.dtype[Any], **inputs: Any) -> None:
    """Raise unless ``out`` can take a result of ``shape`` and ``dtype`` computed from ``inputs``."""
    if tuple(out.shape) != shape:
        raise ShapeError(f"out has shape {tuple(out.shape)}; the result has shape {shape}")
    if out.dtype != dtype:
        raise DTypeError(f"out has dtype {out.dtype}; the result has dtype {dtype}")
    if isinstance(out, np.ndarray) and not out.flags.writeable:
        raise ArrayTypeError("out is read-only; a writable array is needed")
    if any(stride == 0 and extent > 1 for stride, extent in zip(out.strides, out.shape, strict=True)):
        raise OverlapError(f"out has strides {out.strides} for shape {shape}: its elements share memory")
    low, high = byte_bounds(out)
    for name, x in inputs.items():
        x_low, x_high = byte_bounds(x)
        if low < x_high and x_low < high:
            raise OverlapError(f"out lies in the memory range of {name}; it must not overlap an input")


class Operand:
    """An array as a kernel sees it: ``array``, element strides, and where it lies.

    ``direct``: the last axis is contiguous and every element lies at a multiple of its size, as kernels need it.
    ``aligned``: every row starts at a multiple of 16 bytes.
    """

    __slots__ = ("aligned", "array", "direct", "strides")

    def __init__(self, array: Any) -> None:
        itemsize = array.dtype.itemsize
        batch, seq, head, last = array.strides
        bits = address(array) | batch | seq | head
        self.array = array
        self.direct = bits % itemsize == 0 and (last == itemsize or array.shape[3] == 1)
        self.aligned = bits % 16 == 0
        # of the axes batch, sequence and head, in elements
        self.strides = np.int64(batch // itemsize), np.int64(seq // itemsize), np.int64(head // itemsize)


def operand(executor: Executor, x: Any) -> Operand:
    """``x`` as an operand that a kernel can take: itself, or a copy if it does not lie as it must."""
    result = Operand(x)
    if result.direct:
        return result
    with executor.on_device():
        module = np if isinstance(x, np.ndarray) else sys.modules["cupy"]
        return Operand(module.array(x, order="C"))
