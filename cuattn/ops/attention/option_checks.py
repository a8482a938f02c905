"""The checks of the options of attention: each puts what kernels and launches need into `Options`.

A check returns whether the option changes anything: a precision that is exact anyway does not. Those of options that
bound the keys of a query are in bounds.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from cuattn.addresses import address
from cuattn.dtypes import ELEMENT_TYPES
from cuattn.errors import ArgumentError, DTypeError, NonFiniteError, ShapeError
from cuattn.messages import shown
from cuattn.ops.attention.dropout import check_dropout, check_origin
from cuattn.ops.attention.params import LOG2_E
from cuattn.runtime.executor import Executor
from cuattn.runtime.small_arrays import small_array
from cuattn.scalars import choice, real

if TYPE_CHECKING:
    from cuattn.ops.attention.options import Options

__all__ = ["Call", "LogitArray"]

_MAX_WORD = 2**32  # a threshold that every random word is below


@dataclass(slots=True)
class Call:
    """What the check of an option has to know about its call.

    ``logits_shape`` is (batch, heads, seqlen_q, seqlen_k), what a bias and a mask broadcast to; packed sequences whose
    lengths only the device knows have None for lengths that the caller has not said. ``dtype`` is that of q. With two
    ``streams``, neighbouring heads are a pair, and an option with an axis of heads may have one for each pair.
    """

    executor: Executor
    logits_shape: tuple[int, int, int | None, int | None]
    num_kv_heads: int
    dtype: np.dtype[Any]
    streams: int = 1

    @property
    def accumulator(self) -> np.dtype[Any]:
        return np.dtype(np.float64 if self.dtype == np.float64 else np.float32)


@dataclass(slots=True)
class LogitArray:
    """A bias or a mask as a kernel sees it: element strides of the axes batch, head, query, key; 0 where broadcast.

    Of a call with streams, ``array`` is [batch, pairs, streams, seqlen_q, seqlen_k], the head of ``strides`` is a pair,
    and ``stream`` the stride from stream to stream.
    """

    array: Any
    strides: tuple[int, int, int, int]
    stream: int = 0


def scale(options: Options, call: Call, value: Any) -> bool:
    """Check ``scale``: it must be finite where the kernel uses it: times log2(e)."""
    limit, rule = _scale_limit(call.accumulator, call.dtype)
    options.scale = real("scale", value, rule, optional=True)
    if abs(options.scale) > limit:
        raise NonFiniteError(f"scale is {shown(value)}; {rule}")
    return True


@cache
def _scale_limit(accumulator: np.dtype[Any], dtype: np.dtype[Any]) -> tuple[float, str]:
    limit = float(np.finfo(accumulator).max) / LOG2_E
    return limit, f"a finite number is needed, of magnitude at most {limit:.3g} for {dtype}"


def softcap(options: Options, call: Call, value: Any) -> bool:
    options.softcap = real("softcap", value, *_softcap_rule(call.accumulator), optional=True)
    return True


@cache
def _softcap_rule(accumulator: np.dtype[Any]) -> tuple[str, Callable[[float], bool]]:
    limits = np.finfo(accumulator)
    low, high = float(limits.smallest_normal), float(limits.max)
    rule = f"it must be positive, from {low:.3g} to {high:.3g} (finite), or None"
    return rule, lambda value: low <= value <= high


def alibi_slopes(options: Options, call: Call, value: Any) -> bool:
    batch, num_heads = call.logits_shape[:2]
    shapes: tuple[tuple[int, ...], ...] = ((num_heads,), (batch, num_heads))
    if call.streams > 1:
        shapes += (num_heads // call.streams,), (batch, num_heads // call.streams)
    slopes = small_array(call.executor, "alibi_slopes", value, shapes, call.accumulator)
    options.alibi_slopes = slopes[None] if slopes.ndim == 1 else slopes
    return True


def sinks(options: Options, call: Call, value: Any) -> bool:
    shapes = ((call.logits_shape[1],),)
    options.sinks = small_array(call.executor, "sinks", value, shapes, call.accumulator, minus_infinity=True)
    return True


def dropout(options: Options, call: Call, p: Any, seed: Any, offset: Any, origin: Any) -> bool:
    checked = check_dropout(p, seed, offset)
    if origin is not None:
        checked = checked.of_part(check_origin(origin, call.logits_shape), call.logits_shape[1])
    options.dropout = checked if checked.threshold < _MAX_WORD else None
    return options.dropout is not None


#: What a precision is for.
_PRECISION_DTYPES = {"tf32": "float32", "fp8": "float8_e4m3fn"}


def precision(options: Options, call: Call, value: Any) -> bool:
    choice("precision", value, ("ieee", *_PRECISION_DTYPES), optional=True)
    needed = _PRECISION_DTYPES.get(value)
    if needed is not None and call.dtype.name != needed:
        raise DTypeError(f"precision={value!r} is for {needed}; q has dtype {call.dtype}")
    options.tf32, options.fp8 = value == "tf32", value == "fp8"
    return needed is not None


def descale(name: str) -> Callable[[Options, Call, Any], bool]:
    """Make the check of "q_descale", "k_descale" or "v_descale"."""

    def check(options: Options, call: Call, value: Any) -> bool:
        if call.dtype.itemsize != 1:
            raise ArgumentError(f"{name} is for 8-bit floats; q has dtype {call.dtype}")
        shapes = ((call.logits_shape[0], call.num_kv_heads),)
        setattr(options, name, small_array(call.executor, name, value, shapes, call.accumulator))
        return True

    return check


def bias(options: Options, call: Call, value: Any) -> bool:
    options.bias = _logit_array(call, "bias", value)
    return True


def mask(options: Options, call: Call, value: Any) -> bool:
    options.mask = _logit_array(call, "mask", value)
    return True


def _logit_array(call: Call, name: str, value: Any) -> LogitArray:
    """Return a bias or mask as kernels see it: broadcast by stride 0, not copied unless elements are misaligned."""
    executor, shape = call.executor, call.logits_shape
    x = executor.asarray(name, value)
    if name == "mask" and x.dtype != np.bool_:
        raise DTypeError(f"mask has dtype {x.dtype}; bool is needed (True: attend). Numbers to add are passed as bias")
    if (name == "bias" and x.dtype.name not in ELEMENT_TYPES) or not x.dtype.isnative:
        allowed = ", ".join(ELEMENT_TYPES)
        raise DTypeError(f"{name} has dtype {x.dtype}; allowed are {allowed} (native)")
    if None in shape:
        raise ArgumentError(
            f"{name} is broadcast to [batch, heads, max_seqlen_q, max_seqlen_k]: pass max_seqlen_q and max_seqlen_k, "
            "which cannot be read from cu_seqlens on a device without waiting for it"
        )
    itemsize = x.dtype.itemsize
    if any(stride % itemsize for stride in x.strides) or address(x) % itemsize:
        with executor.on_device():
            x = x.copy(order="C")
    try:
        with executor.on_device():
            view = executor.xp.broadcast_to(*((x, shape) if call.streams == 1 else _in_pairs(x, call)))
    except ValueError as error:
        pairs = " (or half as many heads)" if call.streams > 1 else ""
        raise ShapeError(
            f"{name} has shape {tuple(x.shape)}, which does not broadcast to [batch, heads, seqlen_q, seqlen_k] = "
            f"{list(shape)}{pairs}"
        ) from error
    strides = [stride // itemsize if extent > 1 else 0 for stride, extent in zip(view.strides, view.shape, strict=True)]
    stream = strides.pop(2) if call.streams > 1 else 0
    return LogitArray(view.view(np.uint8) if name == "mask" else view, tuple(strides), stream)  # type: ignore[arg-type]


def _in_pairs(x: Any, call: Call) -> tuple[Any, tuple[int | None, ...]]:
    """Return an array with an axis of streams behind that of heads, and the shape that it is to be broadcast to."""
    batch, heads, *seqlens = call.logits_shape
    pairs = heads // call.streams
    if x.ndim > 2:
        own = (pairs, call.streams) if x.shape[-3] == heads else (x.shape[-3], 1)
        x = x.reshape(*x.shape[:-3], *own, *x.shape[-2:])
    return x, (batch, pairs, call.streams, *seqlens)
