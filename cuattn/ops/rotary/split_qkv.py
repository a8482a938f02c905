"""split_qkv: the output of the fused query/key/value projection, taken apart in one pass.

Y. Zhai et al., "ByteTransformer: a high-performance transformer boosted for variable-length inputs", 2022
(arXiv:2210.03052), fuses bias, split and padding this way; the rotation is that of Su et al., "RoFormer", 2021
(arXiv:2104.09864).
"""

from __future__ import annotations

from typing import Any

from cuattn.ops.padding.plan import PaddingPlan
from cuattn.ops.rotary.arguments import Rotary
from cuattn.ops.rotary.split_arguments import check
from cuattn.ops.rotary.split_launch import split
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
    return split(check(qkv, bias, num_heads, num_kv_heads, rope, positions, cu_seqlens, plan, out))
