"""Arrays by what they are made from: a shape, a dtype, a kind of values, a seed, and how they lie in memory.

>>> made = Array((2, 3), "float32", "normal", seed=1, pad=(0, 5)).make()
>>> made.array.shape, made.array.strides
((2, 3), (32, 4))
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from cuattn.testing.arrays import Guarded, Layout, place
from cuattn.testing.options import (
    BIAS_KINDS,
    MASK_KINDS,
    make_bias,
    make_descale,
    make_mask,
    make_sinks,
    make_slopes,
)
from cuattn.testing.strategies import VALUE_KINDS, fill

__all__ = ["ELEMENT_KINDS", "Array", "dtype_of", "quoted", "values"]

#: What the elements of queries, keys, values and gradients are drawn from.
ELEMENT_KINDS = (*VALUE_KINDS, "one_huge")

_NARROW = {name: getattr(ml_dtypes, name) for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")}


def quoted(text: str) -> str:
    """Source text of a string, in double quotes: programs that are printed look like those of the documentation."""
    return json.dumps(text, ensure_ascii=False)


def dtype_of(name: str) -> np.dtype[Any]:
    """Return the dtype of that name, those of `ml_dtypes` among them."""
    return np.dtype(_NARROW.get(name, name))


def _one_huge(shape: tuple[int, ...], dtype: np.dtype[Any], rng: np.random.Generator) -> NDArray[Any]:
    """Draw tiny numbers and a huge one among them."""
    x = rng.standard_normal(shape) * 2.0**-9
    if x.size:
        x[tuple(int(rng.integers(n)) for n in shape)] = 2.0**7 if dtype.itemsize == 1 else 2.0**9
    return x.astype(dtype)


def _decay(strength: float, resets: float = 0.0) -> Callable[..., NDArray[Any]]:
    def make(shape: tuple[int, ...], dtype: np.dtype[Any], rng: np.random.Generator) -> NDArray[Any]:
        x = np.asarray(-strength * rng.exponential(size=shape))
        x[rng.random(shape) < resets] = -np.inf
        return x.astype(dtype)

    return make


def _logs(shape: tuple[int, ...], dtype: np.dtype[Any], rng: np.random.Generator) -> NDArray[Any]:
    """Draw sums of exponentials as logarithms, those of empty rows and far ones among them."""
    x = np.asarray(rng.standard_normal(shape) * rng.choice([1.0, 30.0]) + rng.choice([0.0, -1e4, 1e4]))
    x[rng.random(shape) < 0.15] = -np.inf
    return x.astype(dtype)


def _with_infinities(shape: tuple[int, ...], dtype: np.dtype[Any], rng: np.random.Generator) -> NDArray[Any]:
    """Draw rows with -inf among them, rows of nothing else, and a few +inf."""
    x = np.asarray(rng.standard_normal(shape))
    x[rng.random(shape) < 0.2] = -np.inf
    x[rng.random(shape[:-1]) < 0.3] = -np.inf
    x[rng.random(shape) < 0.2 / max(shape[-1], 1)] = np.inf
    return x.astype(dtype)


#: Values that are no plain elements, by kind: a function of shape, dtype and generator.
_KINDS: dict[str, Callable[[tuple[int, ...], np.dtype[Any], np.random.Generator], NDArray[Any]]] = {
    "one_huge": _one_huge,
    "zeros": lambda shape, dtype, rng: np.zeros(shape, dtype),
    "with_infinities": _with_infinities,
    "slopes": lambda shape, dtype, rng: make_slopes(rng, shape).astype(dtype),
    "sinks": lambda shape, dtype, rng: make_sinks(rng, shape[0]).astype(dtype),
    "descale": lambda shape, dtype, rng: make_descale(rng, (shape[0], shape[1])).astype(dtype),
    "logs": _logs,
    "decay": _decay(0.3),
    "decay_strong": _decay(60.0),
    "decay_resets": _decay(0.3, 0.2),
    "positive": lambda shape, dtype, rng: (np.abs(rng.standard_normal(shape)) * 9 + 1).astype(dtype),
    "unit": lambda shape, dtype, rng: np.asarray(rng.random(shape)).astype(dtype),
    "positions": lambda shape, dtype, rng: rng.integers(0, 5000, shape).astype(dtype),
    **{f"bias_{kind}": lambda s, d, rng, kind=kind: np.asarray(make_bias(rng, s, d, kind)) for kind in BIAS_KINDS},  # type: ignore[misc]
    **{f"mask_{kind}": lambda s, d, rng, kind=kind: make_mask(rng, s, kind).astype(d) for kind in MASK_KINDS},  # type: ignore[misc]
}


def values(shape: tuple[int, ...], dtype: str, kind: str, seed: int) -> NDArray[Any]:
    """Make the elements of an array: the same for the same arguments, on every machine."""
    rng, real = np.random.default_rng(seed), dtype_of(dtype)
    return _KINDS[kind](shape, real, rng) if kind in _KINDS else fill(shape, real, kind, rng)


@dataclass(frozen=True)
class Array:
    """What an array is made from.

    Attributes
    ----------
    shape, dtype, kind, seed
        Of :func:`values`.
    order, pad, offset
        Of :class:`cuattn.testing.arrays.Layout`: where the elements lie in a buffer of poison.
    """

    shape: tuple[int, ...]
    dtype: str
    kind: str = "normal"
    seed: int = 0
    order: tuple[int, ...] | None = None
    pad: tuple[int, ...] = ()
    offset: int = 0

    @property
    def layout(self) -> Layout:
        """How it lies in memory."""
        return Layout(self.order, self.pad, self.offset)

    def lying(self, layout: Layout) -> Array:
        """Return the same elements, lying as `layout` says."""
        return Array(self.shape, self.dtype, self.kind, self.seed, layout.order, layout.pad, layout.offset)

    def make(self) -> Guarded:
        """Make it, surrounded by poison."""
        return place(values(self.shape, self.dtype, self.kind, self.seed), self.layout)

    def __repr__(self) -> str:
        """Return what makes it again; what is left at its default is left out."""
        parts = [repr(self.shape), quoted(self.dtype), quoted(self.kind)]
        for field in fields(self)[3:]:
            value = getattr(self, field.name)
            if value != field.default:
                parts.append(f"{field.name}={value!r}")
        return f"Array({', '.join(parts)})"
