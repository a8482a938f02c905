"""The layers around attention: each forward, and next to it its backward.

A forward returns ``(y, saved)``. Its backward takes `saved` and dy, the gradient of the loss with respect to y, and
returns the gradients with respect to the inputs, in their order. Leading axes are free: ``[..., width]``. Only
operators, methods and NumPy's elementwise functions appear, which CuPy's arrays take over: the code runs on both.
"""

from __future__ import annotations

import math
import sys
from types import ModuleType
from typing import Any

import numpy as np

Array = Any  # numpy.ndarray or cupy.ndarray
Saved = tuple[Any, ...]  # what a backward needs of its forward

RMS_EPS = 1e-5
GELU_SLOPE = math.sqrt(2 / math.pi)
GELU_CUBIC = 0.044715


def array_module(x: Array) -> ModuleType:
    """The module that `x` is an array of: NumPy, or CuPy (which is not imported for it)."""
    return sys.modules[type(x).__module__.partition(".")[0]]


def one_hot(indices: Array, count: int, dtype: Any) -> Array:
    """[..., count]: 1 at the index, else 0."""
    return (indices[..., None] == array_module(indices).arange(count)).astype(dtype)


def rows(x: Array) -> Array:
    """[..., width] as a matrix [rows, width]."""
    return x.reshape(-1, x.shape[-1])


def embedding(indices: Array, table: Array) -> tuple[Array, Saved]:
    """Rows of `table` [count, width]; `indices` are integers of any shape."""
    return table[indices], (indices, table.shape[0])


def embedding_backward(dy: Array, saved: Saved) -> Array:
    """Return dtable. A product with a one-hot matrix adds up the rows of equal index in one order, on a GPU too."""
    indices, count = saved
    return rows(one_hot(indices, count, dy.dtype)).T @ rows(dy)


def linear(x: Array, weight: Array) -> tuple[Array, Saved]:
    """``x weight``, with `weight` [inputs, outputs] and no bias."""
    return x @ weight, (x, weight)


def linear_backward(dy: Array, saved: Saved) -> tuple[Array, Array]:
    """Return dx and dweight."""
    x, weight = saved
    return dy @ weight.T, rows(x).T @ rows(dy)


def rms_norm(x: Array, gain: Array) -> tuple[Array, Saved]:
    """``gain x / sqrt(mean(x²) + eps)`` over the last axis (Zhang and Sennrich, 2019)."""
    inverse = 1 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + RMS_EPS)
    unit = x * inverse
    return unit * gain, (unit, inverse, gain)


def rms_norm_backward(dy: Array, saved: Saved) -> tuple[Array, Array]:
    """Return dx and dgain."""
    unit, inverse, gain = saved
    dunit = dy * gain
    dx = inverse * (dunit - unit * (dunit * unit).mean(axis=-1, keepdims=True))
    return dx, rows(dy * unit).sum(axis=0)


def gelu(x: Array) -> tuple[Array, Saved]:
    """``x Φ(x)`` with the usual formula in tanh for Φ (Hendrycks and Gimpel, 2016)."""
    t = np.tanh(GELU_SLOPE * (x + GELU_CUBIC * x * x * x))
    return 0.5 * x * (1 + t), (x, t)


def gelu_backward(dy: Array, saved: Saved) -> Array:
    """Return dx."""
    x, t = saved
    slope = GELU_SLOPE * (1 + 3 * GELU_CUBIC * x * x)
    return dy * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * slope)


def cross_entropy(logits: Array, targets: Array) -> tuple[Array, Saved]:
    """Mean over all positions of ``-log softmax(logits)[target]``, in nats; `logits` [..., count]."""
    hot = one_hot(targets, logits.shape[-1], logits.dtype)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return -(hot * log_p).sum() / targets.size, (log_p, hot)


def cross_entropy_backward(saved: Saved) -> Array:
    """Return dlogits. The loss is where the gradients start, so there is no dy."""
    log_p, hot = saved
    return (np.exp(log_p) - hot) / (hot.size // hot.shape[-1])
