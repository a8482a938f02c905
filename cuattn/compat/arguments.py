"""What the compatibility functions check themselves: arguments that `cuattn.attention` spells in another way."""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Any

import numpy as np

from cuattn.dtypes import DTYPES
from cuattn.errors import ArgumentError, ArrayTypeError, NonFiniteError, ShapeError
from cuattn.messages import shown
from cuattn.ops.attention.arguments import MAX_EXTENT
from cuattn.runtime.executor import executor_for
from cuattn.runtime.small_arrays import as_float
from cuattn.scalars import as_integer, as_real


def plain(name: str, value: Any) -> Any:
    """Return the number in an array of one element on the host, such as a tensor; anything else as it is.

    Programs that compute their lengths with tensors pass what comes out. An array on a GPU is refused: to read it is to
    wait for the GPU, which no call does unasked.
    """
    if not _is_array(value):
        return value
    array = _on_host(name, value, "a number")
    if array.size != 1:
        raise ArgumentError(f"{name} is an array of shape {list(array.shape)}; one number is allowed")
    if array.dtype.kind in "biu":
        return array.item()
    return float(array.item()) if array.dtype in DTYPES else array.reshape(())[()]


def max_seqlens(max_seqlen_q: Any, max_seqlen_k: Any) -> dict[str, Any]:
    """Lengths of the longest sequences as the varlen functions take them, out of arrays if they are in such."""
    return {
        "max_seqlen_q": plain("max_seqlen_q", max_seqlen_q),
        "max_seqlen_k": plain("max_seqlen_k", max_seqlen_k),
    }


def whole_number(name: str, value: Any, allowed: str) -> int:
    """``value`` as an int of at least 0; else `ArgumentError`, which says what is ``allowed``."""
    value = plain(name, value)
    number = as_integer(value)
    if number is None or number < 0:
        raise ArgumentError(f"{name} is {shown(value)}; {allowed} is allowed")
    return number


def dropout_option(dropout_p: Any, dropout_seed: Any, dropout_offset: Any) -> tuple[Any, Any, Any]:
    """Return ``dropout_p``, ``dropout_seed`` and ``dropout_offset`` of `cuattn.attention`.

    A seed by default would drop the same probabilities in every call of a training run, and nothing would show it.
    """
    dropout_p = plain("dropout_p", dropout_p)
    if dropout_seed is None:
        if 0 < (as_real(dropout_p) or 0.0) < 1:
            raise ArgumentError(
                f"dropout_p is {dropout_p} and dropout_seed is None; there is no global generator to draw a "
                "seed from: pass dropout_seed=, another one (or another dropout_offset=) in each call"
            )
        dropout_seed = 0
    return dropout_p, dropout_seed, dropout_offset


def window_option(window_size: Any) -> tuple[int | None, int | None] | None:
    """``window`` of `cuattn.attention` for a flash-attn ``window_size``, where -1 (or None) is unbounded."""
    if _is_array(window_size):
        array = _on_host("window_size", window_size, "a pair of integers")
        window_size = tuple(array.tolist()) if array.ndim == 1 and array.dtype.kind in "iu" else array
    try:
        if not isinstance(window_size, list | tuple):
            raise TypeError("no pair")
        left, right = map(_side, window_size)
        if min(left or 0, right or 0) < 0:
            raise ValueError("a negative width")
    except (TypeError, ValueError):
        raise ArgumentError(
            f"window_size is {shown(window_size)}; a pair of integers is allowed, each -1 (unbounded) or at least 0"
        ) from None
    return None if left is None and right is None else (left, right)


def scale_option(softmax_scale: Any) -> Any:
    """``scale`` of `cuattn.attention`, where the rest of the checks is, under the name that the caller knows."""
    softmax_scale = plain("softmax_scale", softmax_scale)
    if softmax_scale is None:
        return None
    if isinstance(softmax_scale, bool | np.bool_) or not isinstance(softmax_scale, Real):
        name = type(softmax_scale).__name__
        raise ArgumentError(f"softmax_scale is {shown(softmax_scale)} of type {name}; a number or None is allowed")
    if not math.isfinite(as_float(softmax_scale)):
        raise NonFiniteError(f"softmax_scale is {shown(softmax_scale)}; a finite number or None is needed")
    return softmax_scale


def softcap_option(softcap: Any) -> Any:
    """``softcap`` of `cuattn.attention` for a flash-attn one, where 0 and less is off."""
    softcap = plain("softcap", softcap)
    if isinstance(softcap, bool | np.bool_) or not isinstance(softcap, Real):
        raise ArgumentError(f"softcap is {shown(softcap)} of type {type(softcap).__name__}; a number is allowed")
    return None if -math.inf < as_float(softcap) <= 0 else softcap


def chunk_option(attention_chunk: Any) -> int | None:
    """``chunk`` of `cuattn.attention` for a flash-attn one, where 0 is off."""
    return whole_number("attention_chunk", attention_chunk, "0 (off) or a positive integer") or None


def results(result: Any, return_attn_probs: bool) -> Any:
    return (*result, None) if return_attn_probs else result


def unpack(name: str, packed: Any, layout: str, axis: int, count: int, **others: Any) -> list[Any]:
    """The ``count`` arrays that ``packed`` holds along ``axis``, as views. ``others`` must be of the same kind."""
    packed = executor_for(**others, **{name: packed}).asarray(name, packed)
    rank = layout.count(",") + 1
    if packed.ndim != rank or packed.shape[axis] != count:
        raise ShapeError(f"{name} has shape {tuple(packed.shape)}; {layout} is needed")
    return [packed[(slice(None),) * axis + (index,)] for index in range(count)]


def _is_array(value: Any) -> bool:
    if isinstance(value, np.generic | type):
        return False
    return any(hasattr(value, name) for name in ("__dlpack_device__", "__array__", "__cuda_array_interface__"))


def _on_host(name: str, value: Any, needed: str) -> np.ndarray[Any, Any]:
    """Return the values of a small array, which must lie where the host sees them."""
    executor = executor_for(**{name: value})
    if executor.name != "host":
        raise ArrayTypeError(f"{name} is an array on a GPU; {needed} is needed, which the host has to know")
    return np.asarray(executor.metadata(name, value))


def _side(value: Any) -> int | None:
    value = plain("window_size", value)
    if value is None:
        return None
    if isinstance(value, bool | np.bool_):
        raise TypeError("a bool is no width")
    side = operator.index(value)
    return None if side == -1 or side > MAX_EXTENT - 1 else side  # no sequence is as long as that
