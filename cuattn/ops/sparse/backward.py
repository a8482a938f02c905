"""Gradients of attention to the blocks of keys that a mask keeps.

* Scott Gray, Alec Radford and Diederik P. Kingma, "GPU kernels for block-sparse weights", 2017.
* Tri Dao, Daniel Y. Fu, Stefano Ermon, Atri Rudra and Christopher Ré, "FlashAttention: fast and memory-efficient exact
  attention with IO-awareness", 2022 (arXiv:2205.14135), section 3.3.
"""

from __future__ import annotations

from typing import Any, Unpack

from cuattn.ops.attention.backward import arguments
from cuattn.ops.attention.backward.launch import backward
from cuattn.ops.attention.backward.problem import AttentionGrads
from cuattn.ops.attention.listed import check_listed_dtypes, check_mask
from cuattn.ops.attention.operation import Operation
from cuattn.ops.attention.options import GradientOptions
from cuattn.ops.attention.signatures import takes_options
from cuattn.ops.attention.slow_calls import BACKWARD_FLOPS, warn_if_slow
from cuattn.ops.sparse.arguments import mask_of
from cuattn.ops.sparse.block_mask import BlockMask
from cuattn.ops.sparse.launch import Masks, backward_tiles
from cuattn.typing import ArrayT

__all__ = ["block_sparse_attention_backward"]

_OPERATION = Operation("block_sparse_attention_backward", "gradients")


@takes_options(_OPERATION, before="dlse")
def block_sparse_attention_backward(
    dout: ArrayT,
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    out: ArrayT,
    lse: Any,
    block_mask: BlockMask,
    *,
    dlse: Any = None,
    deterministic: bool = True,
    dq: ArrayT | None = None,
    dk: ArrayT | None = None,
    dv: ArrayT | None = None,
    workspace: Any = None,
    **options: Unpack[GradientOptions],
) -> AttentionGrads[ArrayT]:
    """`cuattn.attention_backward` for `cuattn.block_sparse_attention`; the work is that of the kept blocks.

    Every option that changes the result has to be as it was forward. Gradients of queries are summed over the keys that
    they see, gradients of keys over the queries that see them, each in a fixed order: the same inputs give the same
    bits. Nothing of the size of the logits is made.

    Parameters
    ----------
    dout : array [batch, seqlen_q, heads, head_dim_v], dtype of ``q``
        Gradient of ``out``. It has to be finite, also for queries that see no key.
    q : array [batch, seqlen_q, heads, head_dim]; float16, bfloat16, float32 or float64
    k : array [batch, seqlen_k, kv_heads, head_dim], dtype of ``q``
    v : array [batch, seqlen_k, kv_heads, head_dim_v], dtype of ``q``
        With head dims from 1 to 256.
    out : array [batch, seqlen_q, heads, head_dim_v], dtype of ``q``
    lse : array [batch, heads, seqlen_q], float32 (float64 for float64)
        As forward returned them.
    block_mask : BlockMask
        As it was forward.
    **options
        As for `cuattn.attention`.
    dlse : array [batch, heads, seqlen_q], float32 (float64 for float64), optional
        Gradient of ``lse``; 0 by default.
    deterministic : bool
        As for `cuattn.attention_backward`; gradients are summed in a fixed order either way.
    dq, dk, dv : array, shape and dtype of ``q``, ``k`` and ``v``, optional
        Where to write the gradients, as for `cuattn.attention_backward`.
    workspace : uint8 array of one axis, optional
        As for `cuattn.attention_backward`: `cuattn.attention_backward_workspace_size` of the other arguments is enough.

    Returns
    -------
    AttentionGrads(dq, dk, dv, dbias, dsinks)
        As `cuattn.attention_backward`; dbias is None: the gradient of a bias under a mask of blocks is not computed.

    Raises
    ------
    ArrayTypeError, DTypeError, ShapeError, NonFiniteError, ArgumentError, OverlapError
        As for `cuattn.attention_backward` and `cuattn.block_sparse_attention`.

    References
    ----------
    Gray et al., "GPU kernels for block-sparse weights", 2017; Dao et al., "FlashAttention", 2022, section 3.3.

    Examples
    --------
    Two blocks of two tokens that see only themselves:

    >>> import numpy as np
    >>> import cuattn
    >>> mask = cuattn.BlockMask.from_blocks(np.eye(2, dtype=bool), 4, 4, block_size=2)
    >>> q = np.zeros((1, 4, 1, 32), np.float32)
    >>> v = np.array([1, 3, 10, 20], np.float32).reshape(1, 4, 1, 1)
    >>> out, lse = cuattn.block_sparse_attention(q, q, v, mask, return_lse=True)
    >>> dout = np.array([1, 0, 1, 1], np.float32).reshape(1, 4, 1, 1)
    >>> cuattn.block_sparse_attention_backward(dout, q, q, v, out, lse, mask).dv[0, :, 0, 0]
    array([0.5, 0.5, 1. , 1. ], dtype=float32)
    """
    _OPERATION.refuse_unknown(options)
    mask = mask_of(block_mask)
    check_listed_dtypes(q=q, k=k, v=v)
    of_call: dict[str, Any] = {"dlse": dlse, "deterministic": deterministic, "workspace": workspace, **options}
    of_call |= {"dq": dq, "dk": dk, "dv": dv}
    problem = arguments.check(dout, q, k, v, out, lse, operation=_OPERATION, **of_call)
    check_mask(mask, problem.forward.extents)
    warn_if_slow(problem.forward, work=BACKWARD_FLOPS * mask.density)
    problem.listed = backward_tiles(problem.forward, Masks([mask], packed=False))
    return backward(problem)
