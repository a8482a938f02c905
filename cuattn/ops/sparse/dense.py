"""Attention to the blocks of keys that a mask keeps.

* Scott Gray, Alec Radford and Diederik P. Kingma, "GPU kernels for block-sparse weights", 2017.
* Rewon Child, Scott Gray, Alec Radford and Ilya Sutskever, "Generating long sequences with sparse transformers", 2019
  (arXiv:1904.10509).
* Tri Dao, Daniel Y. Fu, Stefano Ermon, Atri Rudra and Christopher Ré, "FlashAttention: fast and memory-efficient exact
  attention with IO-awareness", 2022 (arXiv:2205.14135), section 3.3.
"""

from __future__ import annotations

from typing import Any, Literal, Unpack, overload

from cuattn.ops.attention import arguments
from cuattn.ops.attention.arguments import Problem
from cuattn.ops.attention.forward.launch import forward
from cuattn.ops.attention.listed import check_listed_dtypes, check_mask
from cuattn.ops.attention.operation import Operation
from cuattn.ops.attention.options import GradientOptions
from cuattn.ops.attention.signatures import takes_options
from cuattn.ops.attention.slow_calls import warn_if_slow
from cuattn.ops.sparse.arguments import mask_of
from cuattn.ops.sparse.block_mask import BlockMask
from cuattn.ops.sparse.launch import Masks, forward_tiles
from cuattn.runtime.small_arrays import check_flag
from cuattn.typing import ArrayT

__all__ = ["block_sparse_attention"]

_OPERATION = Operation("block_sparse_attention", "gradients")


@overload
def block_sparse_attention(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    block_mask: BlockMask,
    *,
    out: ArrayT | None = ...,
    return_lse: Literal[False] = ...,
    **options: Unpack[GradientOptions],
) -> ArrayT: ...
@overload
def block_sparse_attention(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    block_mask: BlockMask,
    *,
    out: ArrayT | None = ...,
    return_lse: Literal[True],
    **options: Unpack[GradientOptions],
) -> tuple[ArrayT, ArrayT]: ...
@overload
def block_sparse_attention(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    block_mask: BlockMask,
    *,
    out: ArrayT | None = ...,
    return_lse: bool,
    **options: Unpack[GradientOptions],
) -> ArrayT | tuple[ArrayT, ArrayT]: ...
@takes_options(_OPERATION, before="out")
def block_sparse_attention(
    q: Any,
    k: Any,
    v: Any,
    block_mask: BlockMask,
    *,
    out: Any = None,
    return_lse: bool = False,
    **options: Unpack[GradientOptions],
) -> Any:
    """`cuattn.attention` to the keys that a block mask keeps; the work is that of the kept blocks.

    Key j is visible to query i when the mask keeps block (i // bq, j // bk), shows the element where it has elements,
    and ``causal``, ``window``, ``chunk`` and ``mask`` allow it too. Nothing of the size of the logits is ever made: the
    kernels walk over lists of tiles, which a mask makes when it is first used and keeps for later calls.

    Parameters
    ----------
    q : array [batch, seqlen_q, heads, head_dim]; float16, bfloat16, float32 or float64
    k : array [batch, seqlen_k, kv_heads, head_dim], dtype of ``q``
    v : array [batch, seqlen_k, kv_heads, head_dim_v], dtype of ``q``
        As for `cuattn.attention`: any strides, head dims of 1 to 512, ``heads`` a multiple of ``kv_heads``.
    block_mask : BlockMask
        Of seqlen_q queries and seqlen_k keys; with an axis of heads, of all query heads, and of all batch entries
        likewise. Blocks of any size; those of 64 or 128 queries and 64 keys, or multiples, are the fastest.
    **options
        As for `cuattn.attention`.
    out : array [batch, seqlen_q, heads, head_dim_v], dtype of ``q``, optional
        Where to write the result. It must not overlap an input.
    return_lse : bool
        Return the natural-log sum-exp of the logits as well.

    Returns
    -------
    out : array [batch, seqlen_q, heads, head_dim_v], dtype of ``q``
        0 for a query that sees no key.
    lse : array [batch, heads, seqlen_q], float32 (float64 for float64); only with ``return_lse``
        -inf for a query that sees no key; the sink where there is one.

    Raises
    ------
    ShapeError
        As for `cuattn.attention`; also a mask of other lengths, or whose heads or batch entries are neither 1 nor those
        of ``q``.
    ArgumentError
        As for `cuattn.attention`; also a ``block_mask`` that is no `cuattn.BlockMask`.
    ArrayTypeError, DTypeError, NonFiniteError, OverlapError
        As for `cuattn.attention`; DTypeError also for 8-bit floats.

    References
    ----------
    Gray et al., "GPU kernels for block-sparse weights", 2017; Child et al., "Generating long sequences with sparse
    transformers", 2019; Dao et al., "FlashAttention", 2022, section 3.3.

    Examples
    --------
    Two blocks of two tokens that see only themselves:

    >>> import numpy as np
    >>> import cuattn
    >>> mask = cuattn.BlockMask.from_blocks(np.eye(2, dtype=bool), 4, 4, block_size=2)
    >>> q = np.zeros((1, 4, 1, 32), np.float32)
    >>> v = np.array([1, 3, 10, 20], np.float32).reshape(1, 4, 1, 1)
    >>> cuattn.block_sparse_attention(q, q, v, mask)[0, :, 0, 0]
    array([ 2.,  2., 15., 15.], dtype=float32)
    """
    _OPERATION.refuse_unknown(options)
    check_flag("return_lse", return_lse)
    problem, masks = check(q, k, v, block_mask, out=out, **options)
    warn_if_slow(problem, work=block_mask.density)
    return forward(problem, return_lse=return_lse, listed=forward_tiles(problem, masks))


def check(q: Any, k: Any, v: Any, block_mask: Any, **options: Any) -> tuple[Problem, Masks]:
    """Make every check of a call. Raises as documented at `block_sparse_attention`."""
    mask = mask_of(block_mask)
    check_listed_dtypes(q=q, k=k, v=v)
    problem = arguments.check(q, k, v, operation=_OPERATION, **options)
    check_mask(mask, problem.extents)
    return problem, Masks([mask], packed=False)
