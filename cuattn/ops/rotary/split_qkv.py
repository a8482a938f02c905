"""split_qkv: the output of the fused query/key/value projection, taken apart in one pass.

Y. Zhai et al., "ByteTransformer: a high-performance transformer boosted for variable-length inputs", 2022
(arXiv:2210.03052), fuses bias, split and padding this way; the rotation is that of Su et al., "RoFormer", 2021
(arXiv:2104.09864).
"""

from __future__ import annotations

from typing import Any

from cuattn.addresses import address
from cuattn.ops.operand import Operand
from cuattn.ops.padding.plan import PaddingPlan
from cuattn.ops.rotary.arguments import NUM_THREADS, Angles, Rotary, num_groups
from cuattn.ops.rotary.split_arguments import Problem, check
from cuattn.runtime.arrays import assign, contiguous
from cuattn.runtime.executor import MAX_GRID, Executor
from cuattn.runtime.structs import struct_layout
from cuattn.typing import ArrayT

__all__ = ["split_qkv"]


def split_qkv(
    qkv: ArrayT,
    bias: ArrayT | None = None,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    rope: Rotary | None = None,
    positions: Any = None,
    cu_seqlens: Any = None,
    plan: PaddingPlan | None = None,
    out: tuple[ArrayT, ArrayT, ArrayT] | None = None,
) -> tuple[ArrayT, ArrayT, ArrayT]:
    """Add the bias, split into q, k and v, turn q and k by their positions, and put padding back: in one pass.

    One launch reads every element of ``qkv`` once and writes every element of q, k and v once, whichever of the steps
    are asked for. The sum with the bias is not rounded before it is turned.

    Parameters
    ----------
    qkv : array [T, (heads + 2 kv_heads) * head_dim]; float16, bfloat16, float32 or float64
        Three blocks one behind the other, all heads of q, then of k, then of v (not the heads of a group side by
        side). NumPy arrays run on the host executor, CuPy arrays on the GPU. Any strides; an array whose last axis is
        not contiguous is copied. Head dims are 1 to 512.
    bias : array [(heads + 2 kv_heads) * head_dim], dtype of ``qkv``, optional
    num_heads, num_kv_heads : int
        Heads of q, and of k and v each; as many by default. ``num_heads`` is a multiple of ``num_kv_heads``.
    rope : Rotary, optional
        How q and k are turned, as `rope` does it; not at all by default.
    positions : integers [T], optional
        Of the tokens; a list, a NumPy array, or an int32 or int64 array on the device of ``qkv``. By default they count
        from 0 in every sequence of the ``plan`` or of ``cu_seqlens``. Only with ``rope``.
    cu_seqlens : integers [batch + 1], optional
        The first token of each sequence, and T at the end; int32 on a device. Only for ``rope`` without positions and
        plan.
    plan : PaddingPlan, optional
        Of T tokens, from `padding_plan`: q, k and v become padded batches, zero where there is no token.
    out : tuple of arrays (q, k, v), optional
        Where to write the results. They must not overlap an input or each other.

    Returns
    -------
    q : array [T, heads, head_dim], or [batch, seqlen, heads, head_dim] with a plan; dtype of ``qkv``
    k, v : arrays with kv_heads heads instead
        Computed in float32 (float64 for float64). ``out`` if that was given.

    Raises
    ------
    ArrayTypeError
        An argument is no array, ``rope`` is no Rotary, ``plan`` is no PaddingPlan, or the arrays are not of one kind.
    DTypeError
        A dtype that is not in the list, or dtypes that differ.
    ShapeError
        Shapes that do not fit each other, or a width that is no multiple of heads + 2 kv_heads.
    ArgumentError
        Heads that are no multiple of kv_heads; ``positions`` or ``cu_seqlens`` that nothing uses, ``rope`` without any
        way to know positions; ``cu_seqlens`` that descend or do not span 0 to T; and the errors of `rope`.
    OverlapError
        An ``out`` lies in the memory range of an input or of another.

    References
    ----------
    Zhai et al., "ByteTransformer", 2022; Su et al., "RoFormer", 2021.

    Examples
    --------
    >>> import numpy as np
    >>> import cuattn
    >>> qkv = np.arange(12, dtype=np.float32).reshape(2, 6)  # two tokens; one head of q, k and v each
    >>> q, k, v = cuattn.split_qkv(qkv, num_heads=1)
    >>> k[:, 0]
    array([[2., 3.],
           [8., 9.]], dtype=float32)
    """
    return evaluate(qkv, bias, num_heads, num_kv_heads, rope, positions, cu_seqlens, plan, out)


def evaluate(*arguments: Any, look: bool = True) -> tuple[Any, Any, Any]:
    """Validate, allocate, launch. Without ``look``, positions that the host sees go unchecked, as a device's do."""
    problem = check(*arguments, look=look)
    executor, outs = problem.executor, problem.outs
    results = outs or [executor.empty(shape, problem.qkv.dtype) for shape in problem.shapes]
    _compute(problem, results)
    if not outs:
        executor.finish(*results)
    return results[0], results[1], results[2]


def _compute(problem: Problem, outs: list[Any]) -> None:
    """Launch on arrays that the kernel can take: copies of those whose last axis is not contiguous."""
    executor = problem.executor
    targets = [Operand(_with_batch(x)) for x in outs]
    copies = {i: executor.empty(outs[i].shape, outs[i].dtype) for i, target in enumerate(targets) if not target.direct}
    for i, copy in copies.items():
        targets[i] = Operand(_with_batch(copy))
    if any(target.array.size for target in targets):
        _launch(problem, targets)
    for i, copy in copies.items():
        executor.finish(copy)
        assign(executor, outs[i], copy)


def _with_batch(x: Any) -> Any:
    return x if x.ndim == 4 else x[None]


def _launch(problem: Problem, outs: list[Operand]) -> None:
    executor, plan, dtype = problem.executor, problem.plan, problem.qkv.dtype
    qkv, bias = _row_operand(executor, problem.qkv), problem.bias
    if bias is not None and (bias.strides[0] != dtype.itemsize or address(bias) % dtype.itemsize):
        bias = contiguous(executor, bias)
    aligned = [x.aligned for x in outs] + [address(qkv) % 16 == 0 and qkv.strides[0] % 16 == 0]
    aligned += [bias is None or address(bias) % 16 == 0]
    angles = problem.angles or Angles(0, False)
    vectorized, _, num_units = angles.units(problem.head_dim, dtype.itemsize, all(aligned))
    num_tokens, num_rows = qkv.shape[0], outs[0].array.shape[0] * outs[0].array.shape[1]
    groups = num_groups(problem.num_heads + 2 * problem.num_kv_heads)
    positions = problem.positions
    batch_strides, seq_strides, head_strides = zip(*(x.strides for x in outs), strict=True)
    layout = struct_layout("split_qkv", "SplitLayout").pack(
        num_rows=num_rows,
        num_tokens=num_tokens,
        seqlen=outs[0].array.shape[1],
        qkv_stride=qkv.strides[0] // dtype.itemsize,
        batch_stride=batch_strides,
        seq_stride=seq_strides,
        head_stride=head_strides,
        positions_stride=0 if positions is None else positions.seq_stride,
        num_heads=problem.num_heads,
        num_kv_heads=problem.num_kv_heads,
        head_dim=problem.head_dim,
        num_groups=groups,
        num_pairs=angles.num_pairs,
        num_units=num_units,
        num_sequences=0 if problem.cu_seqlens is None else problem.cu_seqlens.shape[0] - 1,
        positions_are_64_bit=positions is not None and positions.are_64_bit,
        vectorized=vectorized,
        tables=angles.table_layout,
    )
    constants = {**angles.constants(dtype), "ROTATE": problem.angles is not None}
    kernel = executor.kernel("split_qkv", constants, "cuattn_split_qkv")
    grid = min(-(-num_rows * num_units * groups // NUM_THREADS), MAX_GRID[0])
    g_q, g_k, g_v = (x.array for x in outs)
    args = {
        "g_qkv": qkv,
        "g_bias": bias,
        "g_q": g_q,
        "g_k": g_k,
        "g_v": g_v,
        "g_indices": None if plan is None else problem.indices,
        "g_padding": None if plan is None else problem.padding,
        "g_cu_seqlens": problem.cu_seqlens,
        "g_positions": None if positions is None else positions.array,
        **angles.arrays,
        "layout": layout,
    }
    executor.launch(kernel, (grid,), (NUM_THREADS,), args)


def _row_operand(executor: Executor, qkv: Any) -> Any:
    """``qkv`` with rows that the kernel can take: itself, or a copy."""
    itemsize = qkv.dtype.itemsize
    whole = qkv.shape[1] == 1 or qkv.strides[1] == itemsize
    if whole and (address(qkv) | qkv.strides[0]) % itemsize == 0:
        return qkv
    return contiguous(executor, qkv)
