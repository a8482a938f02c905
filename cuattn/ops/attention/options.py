"""The options of an attention call: every check of them, and their form for a kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from cuattn.addresses import address
from cuattn.dtypes import ELEMENT_TYPES
from cuattn.errors import ArgumentError, DTypeError, ShapeError
from cuattn.messages import shown
from cuattn.ops.attention.dropout import Dropout, check_dropout
from cuattn.ops.attention.params import UNBOUNDED
from cuattn.ops.attention.variants import ForwardOptions
from cuattn.runtime.executor import Executor
from cuattn.runtime.small_arrays import small_array
from cuattn.scalars import as_flag, as_integer, choice, real

__all__ = ["LogitArray", "Options", "check_options"]

_MAX_WORD = 2**32  # a threshold that every random word is below


@dataclass(slots=True)
class LogitArray:
    """A bias or a mask as a kernel sees it: element strides of the axes batch, head, query, key; 0 where broadcast."""

    array: Any
    strides: tuple[int, int, int, int]


@dataclass(slots=True)
class Options:
    """Options that have passed every check. The defaults are those of a plain call, aligned at the end."""

    window_left: int = UNBOUNDED
    window_right: int = UNBOUNDED
    diagonal_offset: int = 0
    diagonal_from_end: int = 1
    diagonal_offsets: Any = None  # int32 [batch]
    softcap: float = 0.0
    bias: LogitArray | None = None
    mask: LogitArray | None = None
    alibi_slopes: Any = None  # [batch or 1, heads], of the accumulator's type
    sinks: Any = None  # [heads], likewise
    dropout: Dropout | None = None
    tf32: bool = False
    fp8: bool = False  # probabilities may be rounded to the 8-bit type of q, k and v
    q_descale: Any = None  # float32 [batch, kv_heads]
    k_descale: Any = None
    v_descale: Any = None

    @property
    def kernel_options(self) -> ForwardOptions:
        """Those of the kernel that serves them."""
        return _kernel_options(
            self.window_left != UNBOUNDED,
            self.window_right != UNBOUNDED,
            self.softcap != 0.0,
            self.alibi_slopes is not None,
            self.bias is not None,
            self.mask is not None,
            self.dropout is not None,
            "float32" if self.bias is None else self.bias.array.dtype.name,
        )


@cache
def _kernel_options(*fields: Any) -> ForwardOptions:
    return ForwardOptions(*fields).compiled()


def check_options(
    executor: Executor,
    *,
    logits_shape: tuple[int, int, int | None, int | None],
    num_kv_heads: int,
    dtype: np.dtype[Any],
    causal: Any,
    window: Any = None,
    softcap: Any = None,
    bias: Any = None,
    mask: Any = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    dropout_p: Any = 0.0,
    dropout_seed: Any = 0,
    dropout_offset: Any = 0,
    diagonal_offset: Any = None,
    precision: Any = None,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
) -> Options:
    """Check every option of a call, as documented at `cuattn.attention`.

    ``logits_shape`` is (batch, heads, seqlen_q, seqlen_k), what a bias and a mask broadcast to; packed sequences whose
    lengths only the device knows have None for lengths that the caller has not said. ``dtype`` is that of q.
    """
    options = Options()
    batch, num_heads = logits_shape[:2]
    accumulator = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    _check_bounds(options, causal, window)
    if diagonal_offset is not None:
        _check_diagonal(options, executor, diagonal_offset, batch)
    if softcap is not None:
        options.softcap = _check_softcap(softcap, accumulator)
    if bias is not None:
        options.bias = _check_logit_array(executor, "bias", bias, logits_shape)
    if mask is not None:
        options.mask = _check_logit_array(executor, "mask", mask, logits_shape)
    if alibi_slopes is not None:
        shapes = (num_heads,), (batch, num_heads)
        slopes = small_array(executor, "alibi_slopes", alibi_slopes, shapes, accumulator)
        options.alibi_slopes = slopes[None] if slopes.ndim == 1 else slopes
    if sinks is not None:
        options.sinks = small_array(executor, "sinks", sinks, ((num_heads,),), accumulator, minus_infinity=True)
    if not (type(dropout_p) is float and type(dropout_seed) is type(dropout_offset) is int and dropout_p == 0.0) or (
        dropout_seed != 0 or dropout_offset != 0
    ):
        dropout = check_dropout(dropout_p, dropout_seed, dropout_offset)
        options.dropout = dropout if dropout.threshold < _MAX_WORD else None
    if precision is not None:
        _check_precision(precision, dtype)
        options.tf32, options.fp8 = precision == "tf32", precision == "fp8"
    for name, value in (("q_descale", q_descale), ("k_descale", k_descale), ("v_descale", v_descale)):
        if value is not None:
            if dtype.itemsize != 1:
                raise ArgumentError(f"{name} is for 8-bit floats; q has dtype {dtype}")
            setattr(options, name, small_array(executor, name, value, ((batch, num_kv_heads),), accumulator))
    return options


def _check_bounds(options: Options, causal: Any, window: Any) -> None:
    """Causal mask and window become one window; the diagonal, where "top_left" puts it."""
    if isinstance(causal, str) and causal in ("bottom_right", "top_left"):
        is_causal: bool | None = True
        options.diagonal_from_end = int(causal == "bottom_right")
    else:
        is_causal = causal if type(causal) is bool else as_flag(causal)
        if is_causal is None:
            raise ArgumentError(f"causal is {shown(causal)}; allowed are False, True, 'bottom_right' and 'top_left'")
    if window is not None:
        if not isinstance(window, tuple | list) or len(window) != 2:
            raise ArgumentError(f"window is {shown(window)}; a pair (left, right) or None is allowed")
        options.window_left, options.window_right = (_check_side(window, side) for side in window)
    if is_causal:
        options.window_right = 0


def _check_side(window: Any, side: Any) -> int:
    if side is None:
        return UNBOUNDED
    number = as_integer(side)
    if number is None or not 0 <= number < UNBOUNDED:
        raise ArgumentError(
            f"window is {shown(window)}; each side is None (unbounded) or an integer from 0 to {UNBOUNDED - 1}"
        )
    return number


def _check_diagonal(options: Options, executor: Executor, diagonal_offset: Any, batch: int) -> None:
    options.diagonal_from_end = 0
    number = as_integer(diagonal_offset)
    if number is not None:
        if not -(2**31) < number < 2**31:
            raise ArgumentError(f"diagonal_offset is {shown(diagonal_offset)}; its magnitude must be below 2^31")
        options.diagonal_offset = number
        return
    if isinstance(diagonal_offset, bool | float | str | np.generic):
        raise ArgumentError(f"diagonal_offset is {shown(diagonal_offset)}; an integer or int32 [batch] is allowed")
    options.diagonal_offsets = small_array(
        executor, "diagonal_offset", diagonal_offset, ((batch,),), np.dtype(np.int32)
    )


def _check_softcap(softcap: Any, accumulator: np.dtype[Any]) -> float:
    return real("softcap", softcap, *_softcap_rule(accumulator), optional=True)


@cache
def _softcap_rule(accumulator: np.dtype[Any]) -> tuple[str, Callable[[float], bool]]:
    limits = np.finfo(accumulator)
    low, high = float(limits.smallest_normal), float(limits.max)
    rule = f"it must be positive, from {low:.3g} to {high:.3g} (finite), or None"
    return rule, lambda value: low <= value <= high


#: What a precision is for.
_PRECISION_DTYPES = {"tf32": "float32", "fp8": "float8_e4m3fn"}


def _check_precision(precision: Any, dtype: np.dtype[Any]) -> None:
    choice("precision", precision, ("ieee", *_PRECISION_DTYPES), optional=True)
    needed = _PRECISION_DTYPES.get(precision)
    if needed is not None and dtype.name != needed:
        raise DTypeError(f"precision={precision!r} is for {needed}; q has dtype {dtype}")


def _check_logit_array(
    executor: Executor, name: str, value: Any, shape: tuple[int, int, int | None, int | None]
) -> LogitArray:
    """A bias or mask, broadcast by stride 0 to `shape` and never copied unless its elements are misaligned."""
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
            view = executor.xp.broadcast_to(x, shape)
    except ValueError as error:
        raise ShapeError(
            f"{name} has shape {tuple(x.shape)}, which does not broadcast to [batch, heads, seqlen_q, seqlen_k] = "
            f"{list(shape)}"
        ) from error
    strides = tuple(
        stride // itemsize if extent > 1 else 0 for stride, extent in zip(view.strides, view.shape, strict=True)
    )
    return LogitArray(view.view(np.uint8) if name == "mask" else view, strides)  # type: ignore[arg-type]
