"""rope: rotary position embedding.

Jianlin Su, Yu Lu, Shengfeng Pan, Ahmed Murtadha, Bo Wen and Yunfeng Liu, "RoFormer: enhanced transformer with rotary
position embedding", 2021 (arXiv:2104.09864).
"""

from __future__ import annotations

from typing import Any

from cuattn.ops.rotary.arguments import DEFAULT_BASE, Rotary
from cuattn.ops.rotary.rope_arguments import check
from cuattn.ops.rotary.rope_launch import rotate
from cuattn.typing import ArrayT

__all__ = ["Rotary", "rope"]


def rope(
    x: ArrayT,
    positions: Any,
    *,
    base: float = DEFAULT_BASE,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    cos: Any = None,
    sin: Any = None,
    inverse: bool = False,
    out: ArrayT | None = None,
) -> ArrayT:
    """Turn pairs of elements of every head by angles that grow with the token's position.

    Pair i, of rotary_dim / 2, turns by ``position * base ** (-2i / rotary_dim)`` radians: (a, b) becomes
    (a cos - b sin, b cos + a sin). The product of a turned query and a turned key then depends on the distance of their
    positions only.

    Parameters
    ----------
    x : array [batch, seqlen, heads, head_dim] or [tokens, heads, head_dim]; float16, bfloat16, float32 or float64
        NumPy arrays run on the host executor, CuPy arrays on the GPU. Any strides; an array whose last axis is not
        contiguous is copied. Head dims are 1 to 512.
    positions : integers [batch, seqlen], [seqlen] or [tokens]
        Of any sign and size; a list, a NumPy array, or an int32 or int64 array on the device of ``x``. Without tables,
        cosines and sines are off by less than 3 roundings of float32 (float64 for float64) at every position from
        -2**31 to 2**31; beyond, by ``|position| * 2**-62`` radians more (float64: 2**-126).
    base : float, at least 1
        How much slower the last pairs turn than the first.
    interleaved : bool
        Pairs are the elements (2i, 2i + 1), as in the paper; by default (i, i + rotary_dim / 2).
    rotary_dim : int, even, optional
        Elements of a head that are turned, the first ones; the others are copied. All by default, or as many as the
        tables are for.
    cos, sin : arrays [max_position, rotary_dim / 2], float32 (or float64 for float64 ``x``), optional
        Looked up instead of computed: see `rope_frequencies`. A position that they do not hold raises if the host sees
        it, as in lists and NumPy arrays; on a device it gives NaN.
    inverse : bool
        Turn the other way.
    out : array, shape and dtype of ``x``, optional
        Where to write the result. It may be ``x`` itself; else it may not lie in the memory range of an input.

    Returns
    -------
    array, shape and dtype of ``x``
        Computed in float32 (float64 for float64). ``out`` if that was given.

    Raises
    ------
    ArrayTypeError
        ``x``, ``cos``, ``sin`` or ``out`` is no array, or they are not of one kind.
    DTypeError
        A dtype that is not in the list, or an ``out`` of another dtype.
    ShapeError
        Shapes that do not fit each other, or a head dim outside of 1 to 512.
    ArgumentError
        ``rotary_dim`` odd, below 2 or above the head dim; a ``base`` below 1 or not finite, or one beside tables; only
        one of ``cos`` and ``sin``; a position that the tables do not hold.
    OverlapError
        ``out`` lies in the memory range of an input and is not ``x``, or elements of it share memory.

    References
    ----------
    Su et al., "RoFormer", 2021.

    Examples
    --------
    >>> import numpy as np
    >>> import cuattn
    >>> x = np.array([[[1.0, 0.0]], [[1.0, 0.0]]], np.float32)  # two tokens, one head, one pair
    >>> cuattn.rope(x, [0, 1])[:, 0].round(4)
    array([[1.    , 0.    ],
           [0.5403, 0.8415]], dtype=float32)
    """
    rotary = Rotary(base, interleaved, rotary_dim, cos, sin)
    turned: ArrayT = rotate(check(x, positions, rotary, inverse=inverse, out=out))
    return turned
