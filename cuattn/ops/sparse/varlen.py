"""Block-sparse attention of packed sequences, each with a mask of its own.

* Scott Gray, Alec Radford and Diederik P. Kingma, "GPU kernels for block-sparse weights", 2017.
* Tri Dao, Daniel Y. Fu, Stefano Ermon, Atri Rudra and Christopher Ré, "FlashAttention: fast and memory-efficient exact
  attention with IO-awareness", 2022 (arXiv:2205.14135), section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Unpack, overload

from cuattn.ops.attention import varlen
from cuattn.ops.attention.arguments import Problem
from cuattn.ops.attention.backward import arguments as backward_arguments
from cuattn.ops.attention.backward.launch import backward
from cuattn.ops.attention.backward.problem import AttentionGrads
from cuattn.ops.attention.forward.launch import forward
from cuattn.ops.attention.listed import check_listed_dtypes
from cuattn.ops.attention.operation import Operation
from cuattn.ops.attention.options import GradientOptions
from cuattn.ops.attention.sequences import PackedSequences
from cuattn.ops.attention.signatures import takes_options
from cuattn.ops.attention.slow_calls import BACKWARD_FLOPS, warn_if_slow
from cuattn.ops.sparse.arguments import masks_of
from cuattn.ops.sparse.block_mask import BlockMask
from cuattn.ops.sparse.launch import Masks, backward_tiles, forward_tiles
from cuattn.runtime.small_arrays import check_flag
from cuattn.typing import ArrayT

__all__ = ["block_sparse_attention_varlen", "block_sparse_attention_varlen_backward"]

_FORWARD = Operation("block_sparse_attention_varlen", "gradients")
_BACKWARD = Operation("block_sparse_attention_varlen_backward", "gradients")

BlockMasks = Sequence[BlockMask] | tuple[Any, Any, Any]


@overload
def block_sparse_attention_varlen(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    block_masks: BlockMasks,
    *,
    block_size: int | tuple[int, int] = ...,
    max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ...,
    out: ArrayT | None = ...,
    return_lse: Literal[False] = ...,
    **options: Unpack[GradientOptions],
) -> ArrayT: ...
@overload
def block_sparse_attention_varlen(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    block_masks: BlockMasks,
    *,
    block_size: int | tuple[int, int] = ...,
    max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ...,
    out: ArrayT | None = ...,
    return_lse: Literal[True],
    **options: Unpack[GradientOptions],
) -> tuple[ArrayT, ArrayT]: ...
@overload
def block_sparse_attention_varlen(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    block_masks: BlockMasks,
    *,
    block_size: int | tuple[int, int] = ...,
    max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ...,
    out: ArrayT | None = ...,
    return_lse: bool,
    **options: Unpack[GradientOptions],
) -> ArrayT | tuple[ArrayT, ArrayT]: ...
@takes_options(_FORWARD, before="out")
def block_sparse_attention_varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    block_masks: BlockMasks,
    *,
    block_size: int | tuple[int, int] = 64,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    out: Any = None,
    return_lse: bool = False,
    **options: Unpack[GradientOptions],
) -> Any:
    """`cuattn.block_sparse_attention` of each sequence of a packed batch, each with its own mask.

    Parameters
    ----------
    q : array [tokens_q, heads, head_dim]; float16, bfloat16, float32 or float64
    k : array [tokens_k, kv_heads, head_dim], dtype of ``q``
    v : array [tokens_k, kv_heads, head_dim_v], dtype of ``q``
    cu_seqlens_q, cu_seqlens_k : int32 [batch + 1]
        As for `cuattn.attention_varlen`. Lengths on a GPU are not waited for, and have to be those of the masks: what
        lies beyond these is not read, and ``out`` keeps what it had for queries beyond.
    block_masks : sequence of BlockMask, or (indptr, indices, row_offsets)
        A mask for each sequence, of its queries and keys; with an axis of heads, of all query heads. Or compressed rows
        of all sequences one after another: block of queries r keeps indices[indptr[r]] to indices[indptr[r + 1] - 1],
        counted within the sequence, and sequence b has the rows row_offsets[b] to row_offsets[b + 1] - 1; the lengths
        are then needed on the CPU. The lists that are made of the last few batches of masks are kept: pass the same
        masks to every layer.
    block_size : int or (int, int)
        Of masks that are given as rows; a `BlockMask` has its own.
    max_seqlen_q, max_seqlen_k : int, optional
        As for `cuattn.attention_varlen`.
    **options
        As for `cuattn.attention`.
    out : array [tokens_q, heads, head_dim_v], dtype of ``q``, optional
    return_lse : bool
        Return the natural-log sum-exp of the logits as well.

    Returns
    -------
    out : array [tokens_q, heads, head_dim_v], dtype of ``q``
    lse : array [heads, tokens_q], float32 (float64 for float64); only with ``return_lse``

    Raises
    ------
    ShapeError
        As for `cuattn.attention_varlen`; also another number of masks than of sequences, or a mask of other lengths or
        heads.
    ArgumentError
        As for `cuattn.attention_varlen`; also rows that `BlockMask.from_csr` refuses.
    ArrayTypeError, DTypeError, NonFiniteError, OverlapError
        As for `cuattn.block_sparse_attention`.

    References
    ----------
    Gray et al., "GPU kernels for block-sparse weights", 2017; Dao et al., "FlashAttention", 2022, section 3.3.

    Examples
    --------
    Sequences of two and of three tokens, in which a token sees itself alone:

    >>> import numpy as np
    >>> import cuattn
    >>> masks = [cuattn.BlockMask.from_blocks(np.eye(n, dtype=bool), n, n, block_size=1) for n in (2, 3)]
    >>> q = np.zeros((5, 1, 32), np.float32)
    >>> v = np.arange(5, dtype=np.float32).reshape(5, 1, 1)
    >>> cuattn.block_sparse_attention_varlen(q, q, v, [0, 2, 5], [0, 2, 5], masks)[:, 0, 0]
    array([0., 1., 2., 3., 4.], dtype=float32)
    """
    _FORWARD.refuse_unknown(options)
    check_flag("return_lse", return_lse)
    of_call: dict[str, Any] = {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k, "out": out, **options}
    arrays = q, k, v, cu_seqlens_q, cu_seqlens_k, block_masks
    problem, packed, masks = check(*arrays, block_size=block_size, **of_call)
    warn_if_slow(problem, packed, pairs=_num_pairs(masks))
    return forward(problem, return_lse=return_lse, packed=packed, listed=forward_tiles(problem, masks, packed))


def check(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    block_masks: Any,
    *,
    block_size: Any = 64,
    **options: Any,
) -> tuple[Problem, PackedSequences, Masks]:
    """Make every check of a call. Raises as documented at `block_sparse_attention_varlen`."""
    check_listed_dtypes(q=q, k=k, v=v)
    problem, packed = varlen.check(q, k, v, cu_seqlens_q, cu_seqlens_k, operation=_FORWARD, **options)
    return problem, packed, masks_of(block_masks, block_size, packed, problem.extents.num_heads)


@takes_options(_BACKWARD, before="dlse")
def block_sparse_attention_varlen_backward(
    dout: ArrayT,
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    out: ArrayT,
    lse: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    block_masks: BlockMasks,
    *,
    block_size: int | tuple[int, int] = 64,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dlse: Any = None,
    deterministic: bool = True,
    dq: ArrayT | None = None,
    dk: ArrayT | None = None,
    dv: ArrayT | None = None,
    workspace: Any = None,
    **options: Unpack[GradientOptions],
) -> AttentionGrads[ArrayT]:
    """Gradients of `cuattn.block_sparse_attention_varlen`: see `cuattn.block_sparse_attention_backward`.

    Parameters
    ----------
    dout : array [tokens_q, heads, head_dim_v], dtype of ``q``
    q : array [tokens_q, heads, head_dim]; float16, bfloat16, float32 or float64
    k : array [tokens_k, kv_heads, head_dim], dtype of ``q``
    v : array [tokens_k, kv_heads, head_dim_v], dtype of ``q``
    out : array [tokens_q, heads, head_dim_v], dtype of ``q``
    lse : array [heads, tokens_q], float32 (float64 for float64)
        As forward returned them.
    cu_seqlens_q, cu_seqlens_k, block_masks, block_size, max_seqlen_q, max_seqlen_k
        As for `cuattn.block_sparse_attention_varlen`, and the same as there.
    **options
        As for `cuattn.attention`.
    dlse : array [heads, tokens_q], float32 (float64 for float64), optional
    deterministic, dq, dk, dv, workspace
        As for `cuattn.block_sparse_attention_backward`.

    Returns
    -------
    AttentionGrads(dq, dk, dv, dbias, dsinks)
        As `cuattn.block_sparse_attention_backward`.

    Raises
    ------
    ArrayTypeError, DTypeError, ShapeError, NonFiniteError, ArgumentError, OverlapError
        As for `cuattn.attention_varlen_backward` and `cuattn.block_sparse_attention_varlen`.

    References
    ----------
    Gray et al., "GPU kernels for block-sparse weights", 2017; Dao et al., "FlashAttention", 2022, section 3.3.

    Examples
    --------
    >>> import numpy as np
    >>> import cuattn
    >>> masks = [cuattn.BlockMask.from_blocks(np.ones((1, 1), bool), n, n) for n in (2, 3)]
    >>> q, starts = np.zeros((5, 1, 32), np.float32), [0, 2, 5]
    >>> out, lse = cuattn.block_sparse_attention_varlen(q, q, q, starts, starts, masks, return_lse=True)
    >>> dout = np.ones_like(out)
    >>> cuattn.block_sparse_attention_varlen_backward(dout, q, q, q, out, lse, starts, starts, masks).dv[:, 0, 0]
    array([1., 1., 1., 1., 1.], dtype=float32)
    """
    _BACKWARD.refuse_unknown(options)
    check_listed_dtypes(q=q, k=k, v=v)
    of_call: dict[str, Any] = {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k, **options}
    of_call |= {"dlse": dlse, "deterministic": deterministic, "workspace": workspace}
    of_call |= {"dq": dq, "dk": dk, "dv": dv}
    saved = dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k
    problem = backward_arguments.check_packed(*saved, operation=_BACKWARD, **of_call)
    assert problem.packed is not None
    masks = masks_of(block_masks, block_size, problem.packed, problem.forward.extents.num_heads)
    warn_if_slow(problem.forward, problem.packed, work=BACKWARD_FLOPS, pairs=_num_pairs(masks))
    problem.listed = backward_tiles(problem.forward, masks)
    return backward(problem)


def _num_pairs(masks: Masks) -> float:
    """Return how many pairs of a query and a key the masks of a batch keep, of each head."""
    return sum(float(mask.seqlen_q) * mask.seqlen_k * mask.density for mask in masks.masks)
