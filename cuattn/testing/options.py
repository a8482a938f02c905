"""Values of the options of attention, of every kind that has gone wrong somewhere: by name, from a generator.

>>> make_mask(np.random.default_rng(0), (1, 1, 2, 6), "lengths").astype(int).tolist()
[[[[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0]]]]
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from cuattn.errors import ArgumentError

__all__ = [
    "BIAS_DTYPES",
    "BIAS_KINDS",
    "BLOCK_SIZES",
    "MASK_KINDS",
    "broadcast_shapes",
    "make_bias",
    "make_descale",
    "make_mask",
    "make_sinks",
    "make_slopes",
]

BIAS_DTYPES = tuple(map(np.dtype, (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)))
BIAS_KINDS = ("normal", "infinities", "lowest")
MASK_KINDS = ("random", "sparse", "blocks", "lengths", "nothing", "everything")

#: Of masks made of blocks: the tile sizes of the kernels, and what is no multiple of any.
BLOCK_SIZES = (16, 32, 48, 64, 128)


def broadcast_shapes(shape: tuple[int, int, int, int]) -> list[tuple[int, ...]]:
    """List shapes that broadcast to [B, H, N, M] = `shape`: whole, one axis short, few axes, few dimensions, none."""
    batch, heads, seqlen_q, seqlen_k = shape
    return [
        shape,
        (1, 1, seqlen_q, seqlen_k),
        (batch, 1, 1, seqlen_k),
        (1, heads, seqlen_q, 1),
        (batch, heads, 1, 1),
        (heads, seqlen_q, seqlen_k),
        (seqlen_q, seqlen_k),
        (seqlen_k,),
        (),
    ]


def make_bias(rng: np.random.Generator, shape: tuple[int, ...], dtype: DTypeLike, kind: str) -> NDArray[np.generic]:
    """Draw a bias of `shape` and `dtype`.

    * "normal": standard normal;
    * "infinities": normal, with -inf elements, rows of -inf and a few +inf;
    * "lowest": normal, with the lowest finite number of the dtype (of float32 for float64) where others write -inf: a
      row that holds nothing else is not empty, its keys are equal.
    """
    if kind not in BIAS_KINDS:
        raise ArgumentError(f"kind is {kind!r}; allowed are {', '.join(map(repr, BIAS_KINDS))}")
    real = np.dtype(dtype)
    bias = np.asarray(rng.standard_normal(shape))
    rows = bias if bias.ndim else bias.reshape(1)
    low = -np.inf
    if kind == "lowest":
        low = float(ml_dtypes.finfo(np.dtype(np.float32) if real == np.float64 else real).min)
    if kind != "normal":
        rows[rng.random(rows.shape) < 0.1] = low
        rows[rng.random(rows.shape[:-1]) < 0.1] = low
    if kind == "infinities":
        rows[rng.random(rows.shape) < 0.1 / max(rows.shape[-1], 1)] = np.inf
    return rows.reshape(shape).astype(real)


def make_mask(
    rng: np.random.Generator, shape: tuple[int, ...], kind: str, block_size: int | None = None
) -> NDArray[np.bool_]:
    """Draw a boolean mask of `shape`, True = attend.

    * "random": seven of ten; "sparse": one of twenty, so that many queries see nothing;
    * "blocks": squares of `block_size` (drawn from :data:`BLOCK_SIZES` when None) that are wholly visible, wholly
      hidden, or random;
    * "lengths": the first keys only, as many for each query and head of a batch entry;
    * "nothing" and "everything".
    """
    if kind not in MASK_KINDS:
        raise ArgumentError(f"kind is {kind!r}; allowed are {', '.join(map(repr, MASK_KINDS))}")
    if kind in ("nothing", "everything"):
        return np.full(shape, kind == "everything")
    if kind in ("random", "sparse") or len(shape) == 0:
        return np.asarray(rng.random(shape) < (0.05 if kind == "sparse" else 0.7))
    if kind == "lengths":
        lengths = rng.integers(0, shape[-1] + 1, (*shape[:1], *(1,) * (len(shape) - 1)) if len(shape) == 4 else 1)
        return np.broadcast_to(np.arange(shape[-1]) < lengths, shape).copy()
    size = int(rng.choice(BLOCK_SIZES)) if block_size is None else block_size
    mask = np.asarray(rng.random(shape) < 0.5)
    squares = rng.integers(0, 3, (*shape[:-2], *(-(-n // size) for n in shape[-2:])))
    for axis in range(max(len(shape) - 2, 0), len(shape)):
        squares = np.repeat(squares, size, axis=axis).take(range(shape[axis]), axis=axis)
    return np.where(squares == 2, mask, squares == 1)


def make_slopes(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Draw ALiBi slopes from 2^-8 to 1, in no order (Press, Smith and Lewis, "Train short, test long", 2022)."""
    return np.exp2(rng.uniform(-8, 0, shape)).astype(np.float32)


def make_sinks(rng: np.random.Generator, num_heads: int) -> NDArray[np.float32]:
    """Draw normal sinks; now and then one that counts for nothing (-inf), and one that outweighs every key."""
    sinks = rng.standard_normal(num_heads)
    sinks[rng.random(num_heads) < 0.2] = -np.inf
    sinks[rng.random(num_heads) < 0.1] = 30.0
    return sinks.astype(np.float32)


def make_descale(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Draw factors [B, G] of float8 inputs, between 1/8 and 2."""
    return np.exp2(rng.uniform(-3, 1, shape)).astype(np.float32)
