"""rope: rotary position embedding.

Jianlin Su, Yu Lu, Shengfeng Pan, Ahmed Murtadha, Bo Wen and Yunfeng Liu, "RoFormer: enhanced transformer with rotary
position embedding", 2021 (arXiv:2104.09864).
"""

from __future__ import annotations

from typing import Any

from cuattn.addresses import address
from cuattn.errors import ShapeError
from cuattn.ops.operand import Operand, operand
from cuattn.ops.rotary import arguments
from cuattn.ops.rotary.arguments import DEFAULT_BASE, NUM_THREADS, Angles, Positions, Rotary
from cuattn.runtime.arrays import assign
from cuattn.runtime.executor import MAX_GRID, Executor, executor_for
from cuattn.runtime.structs import struct_layout
from cuattn.scalars import check_flag
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
    turned: ArrayT = evaluate(x, positions, rotary, inverse=inverse, out=out)
    return turned


def evaluate(
    x: Any, positions: Any, rotary: Rotary, *, inverse: bool = False, out: Any = None, look: bool = True
) -> Any:
    """Validate, allocate, launch. Without ``look``, positions that the host sees go unchecked, as a device's do."""
    inverse = check_flag("inverse", inverse)
    executor = executor_for(
        x=x,
        **rotary.arrays,
        **({} if out is None else {"out": out}),
        **({"positions": positions} if arguments.on_device("positions", positions) else {}),
    )
    x = executor.asarray("x", x)
    if x.ndim not in (3, 4):
        raise ShapeError(
            f"x has shape {tuple(x.shape)}, rank {x.ndim}; [batch, seqlen, heads, head_dim] or [tokens, heads, "
            "head_dim] is needed"
        )
    arguments.check_heads("x", x, x.shape[-1])
    angles = arguments.resolve(executor, rotary, x.shape[-1], x.dtype)
    places = arguments.check_positions(executor, positions, tuple(x.shape[:-2]), angles, look=look)
    if out is not None:
        out = executor.asarray("out", out)
        inputs = {"positions": places.array, "cos": angles.cos, "sin": angles.sin}
        if x.shape != out.shape or not arguments.same_memory(x, out):
            inputs["x"] = x
        arguments.check_output("out", out, tuple(x.shape), x.dtype, **inputs)
    result = executor.empty(x.shape, x.dtype) if out is None else out
    if x.size:
        _compute(executor, x, result, places, angles, bool(inverse))
    if out is None:
        executor.finish(result)
    return result


def _compute(executor: Executor, x: Any, out: Any, positions: Positions, angles: Angles, inverse: bool) -> None:
    """Launch on arrays that the kernel can take: copies of those whose last axis is not contiguous."""
    source = operand(executor, _with_batch(x))
    target = Operand(_with_batch(out))
    if target.direct:
        _launch(executor, source, target, positions, angles, inverse)
        return
    copy = executor.empty(out.shape, out.dtype)
    _launch(executor, source, Operand(_with_batch(copy)), positions, angles, inverse)
    executor.finish(copy)
    assign(executor, out, copy)


def _with_batch(x: Any) -> Any:
    return x if x.ndim == 4 else x[None]


def _launch(executor: Executor, x: Operand, out: Operand, positions: Positions, angles: Angles, inverse: bool) -> None:
    batch, seqlen, num_heads, head_dim = out.array.shape
    dtype = out.array.dtype
    vectorized, turned, num_units = angles.units(head_dim, dtype.itemsize, x.aligned and out.aligned)
    if address(x.array) == address(out.array):  # in place: what is not turned is there already
        num_units = turned
    num_groups = arguments.num_groups(num_heads)
    (x_batch, x_seq, x_head), (out_batch, out_seq, out_head) = x.strides, out.strides
    layout = struct_layout("rope", "RopeLayout").pack(
        num_tokens=batch * seqlen,
        seqlen=seqlen,
        x_batch_stride=x_batch,
        x_seq_stride=x_seq,
        x_head_stride=x_head,
        out_batch_stride=out_batch,
        out_seq_stride=out_seq,
        out_head_stride=out_head,
        positions_batch_stride=positions.batch_stride,
        positions_seq_stride=positions.seq_stride,
        num_heads=num_heads,
        num_groups=num_groups,
        num_pairs=angles.num_pairs,
        num_units=num_units,
        positions_are_64_bit=positions.are_64_bit,
        inverse=inverse,
        vectorized=vectorized,
        tables=angles.table_layout,
    )
    kernel = executor.kernel("rope", angles.constants(dtype), "cuattn_rope")
    grid = min(-(-batch * seqlen * num_units * num_groups // NUM_THREADS), MAX_GRID[0])
    args = {
        "g_x": x.array,
        "g_out": out.array,
        "g_positions": positions.array,
        **angles.arrays,
        "layout": layout,
    }
    executor.launch(kernel, (grid,), (NUM_THREADS,), args)
