"""Rotary position embedding, and the fused projection taken apart."""

from __future__ import annotations

from decimal import Decimal, localcontext
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from cuattn.reference.softmax import Array

__all__ = ["rope", "rotary_angles", "split_qkv"]

_DIGITS = 60


def _arctangent_of_inverse(n: int) -> Decimal:
    """Compute arctan(1 / n) by its series."""
    power, total, k = Decimal(1) / n, Decimal(0), 0
    while abs(power) > Decimal(10) ** -(_DIGITS + 5):
        total += power / (2 * k + 1) * (-1) ** k
        power, k = power / (n * n), k + 1
    return total


@cache
def _full_turn() -> Decimal:
    """Compute 2 pi (Machin's formula)."""
    with localcontext() as context:
        context.prec = _DIGITS + 10
        return 2 * (16 * _arctangent_of_inverse(5) - 4 * _arctangent_of_inverse(239))


def rotary_angles(positions: ArrayLike, rotary_dim: int, base: float = 10000.0) -> NDArray[np.longdouble]:
    """``position * base ** (-2i / rotary_dim)`` radians less all whole turns, [*positions, rotary_dim / 2].

    With 60 decimal digits up to the last step: in float64 the product alone is off by 2e-7 radians at position 2^31.

    >>> rotary_angles([1, 7], 4).astype(float).round(4).tolist()
    [[1.0, 0.01], [0.7168, 0.07]]
    """
    places = np.asarray(positions)
    unique, inverse = np.unique(places, return_inverse=True)
    table = np.zeros((unique.size, rotary_dim // 2), np.longdouble)
    with localcontext() as context:
        context.prec = _DIGITS
        for i in range(rotary_dim // 2):
            frequency = Decimal(base) ** (Decimal(-2 * i) / rotary_dim)
            for row, position in enumerate(unique):
                table[row, i] = np.longdouble(str(int(position) * frequency % _full_turn()))
    return table[inverse].reshape(*places.shape, rotary_dim // 2)


def rope(
    x: ArrayLike,
    positions: ArrayLike,
    *,
    base: float = 10000.0,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    cos: ArrayLike | None = None,
    sin: ArrayLike | None = None,
    inverse: bool = False,
    dtype: DTypeLike = np.float64,
) -> Array:
    """Pairs (a, b) of the last axis of `x` become (a cos - b sin, b cos + a sin); computed and returned in `dtype`.

    `x` [B, N, H, D] or [T, H, D], `positions` [B, N], [N] or [T]. Pair i of r / 2 is (i, i + r / 2), or (2i, 2i + 1)
    with `interleaved`, and turns by ``position * base ** (-2i / r)`` radians, or as row `position` of the tables `cos`
    and `sin` [max_position, r / 2] says; `inverse` turns the other way. Elements from r = `rotary_dim` on stay.

    >>> rope([[[1.0, 0.0]]], [1]).round(4).tolist()
    [[[0.5403, 0.8415]]]
    """
    values = np.asarray(x).astype(dtype)
    if cos is None or sin is None:
        angles = rotary_angles(positions, values.shape[-1] if rotary_dim is None else rotary_dim, base)
        c, s = np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)
    else:
        c, s = (np.asarray(table).astype(dtype)[np.asarray(positions)] for table in (cos, sin))
    pairs = c.shape[-1]
    c, s = c[..., None, :], s[..., None, :] * (-1 if inverse else 1)  # the same for every head
    if interleaved:
        first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    else:
        first, second = slice(0, pairs), slice(pairs, 2 * pairs)
    a, b = values[..., first].copy(), values[..., second].copy()
    values[..., first] = a * c - b * s
    values[..., second] = b * c + a * s
    return values


def split_qkv(
    qkv: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    rope: dict[str, Any] | None = None,
    positions: ArrayLike | None = None,
    cu_seqlens: ArrayLike | None = None,
    plan: Any = None,
    dtype: DTypeLike = np.float64,
) -> tuple[Array, Array, Array]:
    """Split `qkv` [T, (H + 2G) D] + `bias` into q [T, H, D], k [T, G, D], v [T, G, D]; all in `dtype`.

    `rope` holds keywords of the function of that name, applied to q and k. Positions count from the start of each
    sequence of `cu_seqlens`, or of the `plan`, unless given. With a plan the results are [B, N, ...], zero where there
    is no token.
    """
    values = np.asarray(qkv).astype(dtype)
    if bias is not None:
        values = values + np.asarray(bias).astype(dtype)
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    num_all = num_heads + 2 * kv_heads
    heads = values.reshape(values.shape[0], num_all, values.shape[1] // num_all)
    q, k, v = np.split(heads, [num_heads, num_heads + kv_heads], axis=1)
    if rope is not None:
        if positions is None:
            starts = np.asarray(plan.cu_seqlens if plan is not None else cu_seqlens)
            positions = np.concatenate([np.arange(n) for n in np.diff(starts)]).astype(int)
        turn = globals()["rope"]  # the keyword has the function's name
        q, k = (turn(part, positions, dtype=dtype, **rope) for part in (q, k))
    if plan is None:
        return q, k, v
    padded = []
    for part in (q, k, v):
        rows = np.zeros((plan.batch * plan.seqlen, *part.shape[1:]), dtype)
        rows[np.asarray(plan.indices)] = part
        padded.append(rows.reshape(plan.batch, plan.seqlen, *part.shape[1:]))
    return padded[0], padded[1], padded[2]
