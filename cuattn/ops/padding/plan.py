"""Packed batches: the real tokens of a padded one, without the padding between them, and back.

EffectiveTransformer (ByteDance, 2020); Y. Zhai et al., "ByteTransformer: a high-performance transformer boosted for
variable-length inputs", 2022 (arXiv:2210.03052).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cuattn import environment
from cuattn.addresses import as_bytes, byte_bounds
from cuattn.errors import ArgumentError, ArrayTypeError, DTypeError, OverlapError, ShapeError
from cuattn.ops.padding.rows import NUM_THREADS, Movement, fold
from cuattn.ops.padding.scan import scan
from cuattn.runtime.arrays import assign, contiguous
from cuattn.runtime.checks import check_apart_or_same, check_extents, check_out
from cuattn.runtime.executor import Executor, executor_for, executor_of_module
from cuattn.scalars import MAX_EXTENT, integer
from cuattn.typing import ArrayT

__all__ = ["PaddingPlan", "check_plan", "padding_plan", "remove_padding", "restore_padding"]

MAX_SLOTS = 2**31 - 1
ITEMSIZES = (1, 2, 4, 8, 16)


@dataclass(frozen=True, eq=False, repr=False)
class PaddingPlan:
    """Where the real tokens of a padded batch are; made by `padding_plan`.

    Position n of sequence b is slot ``b * seqlen + n``. A token of the packed batch is numbered as its slots are.

    Attributes
    ----------
    indices : int32 array [T]
        The slot of each token, ascending.
    padding : int32 array [batch * seqlen - T]
        The other slots, ascending.
    cu_seqlens : int32 array [batch + 1]
        The first token of each sequence, and T behind the last: as `cuattn.attention_varlen` takes it.
    max_seqlen : int
        Tokens of the longest sequence; or an upper bound, where that was all that was known.
    num_tokens : int
        T, the real tokens.
    batch, seqlen : int
        The shape of the mask.
    """

    indices: Any
    padding: Any
    cu_seqlens: Any
    max_seqlen: int
    num_tokens: int
    batch: int
    seqlen: int

    def __repr__(self) -> str:
        return (
            f"PaddingPlan({self.num_tokens} tokens in {self.batch} x {self.seqlen} slots, max_seqlen={self.max_seqlen})"
        )


def padding_plan(
    mask: Any, *, num_tokens: int | None = None, max_seqlen: int | None = None, array_module: Any = None
) -> PaddingPlan:
    """Find the real tokens of a padded batch by an exclusive prefix sum over ``mask``.

    Any pattern: padding may be to the right, to the left, or anywhere between the tokens. Make it once a batch, and use
    it in every layer.

    Parameters
    ----------
    mask : array [B, N] of bool or of any integer type; nonzero = a real token
        A NumPy array is worked on by the host executor, a CuPy array on the GPU. Any strides.
    num_tokens : int, optional
        How many tokens are real. The number decides the shape of everything packed, so the host must know it: for a
        CuPy mask without it, this function waits for the GPU, once (and therefore cannot be captured in a graph; no
        other function here waits). A wrong number is an error where the mask is a NumPy array or ``CUATTN_CHECK=1``;
        else tokens are taken for padding or padding for tokens, but no memory outside of the arrays is touched.
    max_seqlen : int, optional
        A number that no sequence has more tokens than; N if only ``num_tokens`` is given. Otherwise it is counted.
    array_module : module, optional
        ``cupy`` with a NumPy mask: the plan is made on the current GPU, for CuPy data. The mask is counted on the host
        and copied, which waits for nothing.

    Returns
    -------
    PaddingPlan

    Raises
    ------
    ArrayTypeError
        ``mask`` is no array, or ``array_module`` is neither ``numpy`` nor ``cupy``, or ``numpy`` for a CuPy mask.
    DTypeError
        The mask is neither boolean nor integer.
    ShapeError
        The mask has another rank than 2, or 2**31 slots or more.
    ArgumentError
        ``num_tokens`` or ``max_seqlen`` is no integer, impossible for the shape, or does not fit the mask.

    References
    ----------
    Zhai et al., "ByteTransformer", 2022 (arXiv:2210.03052).

    Examples
    --------
    >>> import numpy as np
    >>> import cuattn
    >>> plan = cuattn.padding_plan(np.array([[1, 1, 0], [0, 0, 0], [0, 1, 1]]))
    >>> plan
    PaddingPlan(4 tokens in 3 x 3 slots, max_seqlen=2)
    >>> plan.indices.tolist(), plan.cu_seqlens.tolist()
    ([0, 1, 7, 8], [0, 2, 2, 4])
    """
    executor = executor_for(mask=mask)
    mask = executor.asarray("mask", mask)
    _check_mask(mask)
    batch, seqlen = mask.shape
    num_tokens = _check_count("num_tokens", num_tokens, batch * seqlen)
    max_seqlen = _check_count("max_seqlen", max_seqlen, seqlen)
    if array_module is not None:
        target = executor_of_module(array_module)
        if target.name == "host" and executor.name != "host":
            raise ArrayTypeError("array_module is numpy and mask a CuPy array: copy the mask with cupy.asnumpy first")
        if target.name != executor.name:
            is_real = np.asarray(mask != 0)  # a byte a slot, of whatever dtype the mask is
            num_tokens, max_seqlen = _counted(np.count_nonzero(is_real, axis=1), num_tokens, max_seqlen)
            executor, mask = target, target.put(is_real, np.bool_)

    order, cu_seqlens = scan(executor, mask)
    if executor.name == "host" or num_tokens is None or environment.check():
        num_tokens, max_seqlen = _counted(np.diff(_on_host(executor, cu_seqlens)), num_tokens, max_seqlen)
    return PaddingPlan(
        indices=order[:num_tokens],
        padding=order[num_tokens:],
        cu_seqlens=cu_seqlens,
        max_seqlen=seqlen if max_seqlen is None else max_seqlen,
        num_tokens=num_tokens,
        batch=batch,
        seqlen=seqlen,
    )


def remove_padding(x: ArrayT, plan: PaddingPlan, *, out: ArrayT | None = None) -> ArrayT:
    """Return the real tokens of a padded batch, one behind the other: ``x.reshape(B * N, ...)[plan.indices]``.

    What the padding slots of ``x`` hold is never read.

    Parameters
    ----------
    x : array [B, N, ...], of any dtype with elements of 1, 2, 4, 8 or 16 bytes
        Any strides; a row whose trailing axes are not one stretch of memory, nor several equally spaced ones, is
        copied. Rows at multiples of 16 bytes are the fastest.
    plan : PaddingPlan
        Of a mask [B, N]; a plan of NumPy arrays is copied to the GPU of a CuPy ``x``, in each call.
    out : array [T, ...], optional; dtype of ``x``
        Where to write the result; it may not overlap ``x`` or the plan.

    Returns
    -------
    array [T, ...], dtype of ``x``

    Raises
    ------
    ArrayTypeError
        An argument is no array, ``plan`` is no PaddingPlan, or they are in different places.
    DTypeError
        Elements of another size, or Python objects; ``out`` of another dtype.
    ShapeError
        ``x``, ``out`` or the plan's arrays do not fit the plan.
    OverlapError
        ``out`` overlaps ``x`` or the plan.

    References
    ----------
    Zhai et al., "ByteTransformer", 2022 (arXiv:2210.03052).

    Examples
    --------
    >>> import numpy as np
    >>> import cuattn
    >>> plan = cuattn.padding_plan(np.array([[True, False], [True, True]]))
    >>> cuattn.remove_padding(np.array([[1.0, np.nan], [2.0, 3.0]]), plan)
    array([1., 2., 3.])
    """
    plan = check_plan(plan)
    executor, x, indices, _, out = _arguments(x, plan, out)
    if tuple(x.shape[:2]) != (plan.batch, plan.seqlen):
        raise ShapeError(f"x has shape {tuple(x.shape)}; the plan wants [{plan.batch}, {plan.seqlen}, ...]")
    result = _result(executor, x, out, (plan.num_tokens, *x.shape[2:]), indices)
    if not result.size:
        return result

    def launch(source: Any, target: Any) -> bool:
        arrays = {"g_padded": as_bytes(source), "g_tokens": indices, "g_packed": as_bytes(target)}
        return _launch(executor, "cuattn_remove_padding", arrays, fold(source, target), plan.num_tokens)

    return _deliver(executor, launch, x, result, out)


def restore_padding(x: ArrayT, plan: PaddingPlan, *, out: ArrayT | None = None) -> ArrayT:
    """Return the padded batch of packed tokens, zeros in the padding slots: the inverse of `remove_padding`.

    One pass: every element of the result is written once, with a token or with zero.

    Parameters
    ----------
    x : array [T, ...], of any dtype with elements of 1, 2, 4, 8 or 16 bytes
        Any strides, as for `remove_padding`.
    plan : PaddingPlan
        Of a mask [B, N] with T tokens.
    out : array [B, N, ...], optional; dtype of ``x``
        Where to write the result; it may not overlap ``x`` or the plan.

    Returns
    -------
    array [B, N, ...], dtype of ``x``

    Raises
    ------
    ArrayTypeError, DTypeError, ShapeError, OverlapError
        As for `remove_padding`.

    References
    ----------
    Zhai et al., "ByteTransformer", 2022 (arXiv:2210.03052).

    Examples
    --------
    >>> import numpy as np
    >>> import cuattn
    >>> plan = cuattn.padding_plan(np.array([[True, False], [True, True]]))
    >>> cuattn.restore_padding(np.array([1.0, 2.0, 3.0]), plan)
    array([[1., 0.],
           [2., 3.]])
    """
    plan = check_plan(plan)
    executor, x, indices, padding, out = _arguments(x, plan, out)
    if x.ndim < 1 or x.shape[0] != plan.num_tokens:
        raise ShapeError(f"x has shape {tuple(x.shape)}; the plan wants [{plan.num_tokens}, ...]")
    result = _result(executor, x, out, (plan.batch, plan.seqlen, *x.shape[1:]), indices, padding)
    if not result.size:
        return result

    def launch(source: Any, target: Any) -> bool:
        arrays = {"g_packed": as_bytes(source), "g_tokens": indices, "g_padding": padding}
        arrays["g_padded"] = as_bytes(target)
        return _launch(executor, "cuattn_restore_padding", arrays, fold(target, source), plan.batch * plan.seqlen)

    return _deliver(executor, launch, x, result, out)


def _check_mask(mask: Any) -> None:
    if mask.dtype.kind not in "biu":
        raise DTypeError(f"mask has dtype {mask.dtype}; bool and integer types are allowed")
    if mask.ndim != 2:
        raise ShapeError(f"mask has shape {tuple(mask.shape)}, rank {mask.ndim}; rank 2 is needed: [batch, seqlen]")
    num_slots = mask.shape[0] * mask.shape[1]
    if max(*mask.shape, num_slots) > MAX_SLOTS:
        raise ShapeError(f"mask has shape {tuple(mask.shape)}, {num_slots} slots; at most {MAX_SLOTS} are allowed")


def _check_count(name: str, count: Any, most: int) -> int | None:
    return None if count is None else integer(name, count, 0, most, optional=True)


def _counted(lengths: np.ndarray, num_tokens: int | None, max_seqlen: int | None) -> tuple[int, int]:
    """Return the tokens in all, and of the longest sequence; what was given must agree."""
    total, longest = int(lengths.sum(dtype=np.int64)), int(lengths.max(initial=0))
    if num_tokens not in (None, total):
        raise ArgumentError(f"num_tokens is {num_tokens}; the mask has {total} tokens")
    if max_seqlen is not None and max_seqlen < longest:
        raise ArgumentError(f"max_seqlen is {max_seqlen}; the mask has a sequence of {longest} tokens")
    return total, longest if max_seqlen is None else max_seqlen


def _on_host(executor: Executor, x: Any) -> np.ndarray:
    """Return ``x`` as a NumPy array; of a CuPy array, once the GPU has computed it."""
    if isinstance(x, np.ndarray):
        return x
    with executor.on_device():
        return np.asarray(x.get())


def check_plan(plan: Any) -> PaddingPlan:
    """Check a plan whose extents are ints, as `padding_plan` makes it; raises `ArrayTypeError` or `ArgumentError`."""
    if not isinstance(plan, PaddingPlan):
        raise ArrayTypeError(f"plan is a {type(plan).__name__}; a PaddingPlan is needed, from padding_plan()")
    numbers = {name: getattr(plan, name) for name in ("max_seqlen", "num_tokens", "batch", "seqlen")}
    if all(type(number) is int and 0 <= number <= MAX_EXTENT for number in numbers.values()):
        return plan
    return replace(plan, **{name: integer(f"plan.{name}", number, 0, MAX_EXTENT) for name, number in numbers.items()})


def _arguments(x: Any, plan: PaddingPlan, out: Any) -> tuple[Executor, Any, Any, Any, Any]:
    """Return the executor, ``x``, the plan's indices and padding, and ``out`` on it; all but shapes is checked."""
    executor = executor_for(x=x) if out is None else executor_for(x=x, out=out)
    lists = {"plan.indices": plan.indices, "plan.padding": plan.padding}
    if not all(isinstance(slots, np.ndarray) for slots in lists.values()):
        executor_for(x=x, **lists)  # raises unless all are on one device; NumPy ones are copied there
    lists = {name: executor.metadata(name, slots) for name, slots in lists.items()}
    padding_slots = plan.batch * plan.seqlen - plan.num_tokens
    for (name, slots), length in zip(lists.items(), (plan.num_tokens, padding_slots), strict=True):
        if slots.shape != (length,) or slots.dtype != np.int32 or not slots.flags.c_contiguous:
            raise ShapeError(
                f"{name} is {slots.dtype} {slots.shape}; contiguous int32 ({length},) is needed for plan.num_tokens = "
                f"{plan.num_tokens}, plan.batch = {plan.batch} and plan.seqlen = {plan.seqlen}"
            )
    x = executor.asarray("x", x)
    check_extents("x", x.shape)
    if x.dtype.itemsize not in ITEMSIZES or x.dtype.hasobject:
        raise DTypeError(f"x has dtype {x.dtype}; elements of {', '.join(map(str, ITEMSIZES))} bytes are allowed")
    indices, padding = (executor.put(slots, np.int32) for slots in lists.values())
    return executor, x, indices, padding, None if out is None else executor.asarray("out", out)


def _result(executor: Executor, x: Any, out: Any, shape: tuple[int, ...], *plan: Any) -> Any:
    """Return a new array, or ``out`` if that will do."""
    if out is None:
        return executor.empty(shape, x.dtype)
    check_out("out", out, shape, x.dtype)
    check_apart_or_same("out", out, {"x": x}, "x")
    low, high = byte_bounds(out)
    if any(low < bounds[1] and bounds[0] < high for bounds in map(byte_bounds, plan)):
        raise OverlapError("out lies in the memory range of the plan; it must not overlap it")
    return out


def _launch(
    executor: Executor, entry: str, arrays: Mapping[str, Any], movement: Movement | None, num_rows: int
) -> bool:
    """Launch if the arrays lie in a way that a kernel can take; returns whether they do."""
    if movement is None:
        return False
    kernel = executor.kernel("padding_rows", {"NUM_THREADS": NUM_THREADS}, entry)
    executor.launch(kernel, movement.grid(num_rows), movement.block, {**arrays, "layout": movement.layout})
    return True


def _deliver(executor: Executor, launch: Callable[[Any, Any], bool], x: Any, result: Any, out: Any) -> Any:
    """Launch with the arrays themselves where a kernel can take them, else with copies."""
    if launch(x, result) or launch(x := contiguous(executor, x), result):
        if out is None:
            executor.finish(result)
        return result
    copy = executor.empty(result.shape, result.dtype)
    launched = launch(x, copy)
    assert launched, "contiguous arrays have rows of one segment"
    executor.finish(copy)
    assign(executor, result, copy)
    return result
