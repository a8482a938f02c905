"""Attention over sequences of different lengths, packed one after another without padding.

* Tri Dao, Daniel Y. Fu, Stefano Ermon, Atri Rudra and Christopher Ré, "FlashAttention: fast and memory-efficient exact
  attention with IO-awareness", 2022 (arXiv:2205.14135).
* Yujia Zhai et al., "ByteTransformer: a high-performance transformer boosted for variable-length inputs", 2022
  (arXiv:2210.03052).
"""

from __future__ import annotations

from typing import Any, Literal, Unpack, overload

from cuattn.ops.attention import arguments
from cuattn.ops.attention.arguments import Problem
from cuattn.ops.attention.forward.launch import forward
from cuattn.ops.attention.operation import Operation
from cuattn.ops.attention.options import AttentionKeywords, AttentionOptions
from cuattn.ops.attention.sequences import PackedSequences, check_packed
from cuattn.ops.attention.signatures import takes_options
from cuattn.ops.attention.slow_calls import warn_if_slow
from cuattn.runtime.small_arrays import check_flag
from cuattn.typing import ArrayT, FP8Format

__all__ = ["attention_varlen"]


_OPERATION = Operation("attention_varlen", "attention")


@overload
def attention_varlen(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    *,
    max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ...,
    return_lse: Literal[False] = ...,
    **keywords: Unpack[AttentionKeywords],
) -> ArrayT: ...
@overload
def attention_varlen(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    *,
    max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ...,
    return_lse: Literal[True],
    **keywords: Unpack[AttentionKeywords],
) -> tuple[ArrayT, ArrayT]: ...
@overload
def attention_varlen(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    *,
    max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ...,
    return_lse: bool,
    **keywords: Unpack[AttentionKeywords],
) -> ArrayT | tuple[ArrayT, ArrayT]: ...
@takes_options(_OPERATION, before="fp8_format")
def attention_varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    fp8_format: FP8Format | None = None,
    out: Any = None,
    return_lse: bool = False,
    **options: Unpack[AttentionOptions],
) -> Any:
    """`cuattn.attention` of each sequence of a packed batch; sequences never see each other.

    Parameters
    ----------
    q : array [tokens_q, heads, head_dim]
        The queries of all sequences, one sequence after another. Dtypes, strides and head dims as for
        `cuattn.attention`.
    k : array [tokens_k, kv_heads, head_dim], dtype of ``q``
    v : array [tokens_k, kv_heads, head_dim_v], dtype of ``q``
    cu_seqlens_q : int32 [batch + 1]
        Sequence b has the queries cu_seqlens_q[b] to cu_seqlens_q[b + 1] - 1. It begins with 0, ascends, and ends with
        tokens_q; a sequence may be empty. A NumPy array or a list, also beside CuPy arrays, is checked before anything
        runs, and the longest sequences are started first. An array on the GPU is not waited for: the list of work is
        made there, and entries that lead outside of ``q`` are cut.
    cu_seqlens_k : int32 [batch + 1]
        Likewise for keys and values. A sequence may have queries and no keys, or keys and no queries.
    max_seqlen_q, max_seqlen_k : int, optional
        Length of the longest sequence. Needed only for a bias or a mask beside cu_seqlens on a GPU; a length on the GPU
        that is larger is cut, and ``out`` keeps what it had for the queries beyond.
    **options
        As for `cuattn.attention`.
    out : array [tokens_q, heads, head_dim_v], dtype as for `cuattn.attention`, optional
    fp8_format, return_lse
        As for `cuattn.attention`.

    Options with a batch axis have one entry a sequence, and o follows from the queries and keys of each. A bias and a
    mask are broadcast to [batch, heads, max_seqlen_q, max_seqlen_k] and indexed by positions within the sequence, as
    dropout counts them.

    Returns
    -------
    out : array [tokens_q, heads, head_dim_v], dtype of ``q`` (bfloat16 for 8-bit floats), or the ``out`` given
    lse : array [heads, tokens_q], float32 (float64 for float64); only with ``return_lse``

    Raises
    ------
    ArrayTypeError, DTypeError, ShapeError, NonFiniteError, ArgumentError, OverlapError
        As for `cuattn.attention`; ArgumentError also for lengths that descend, do not begin with 0 or do not end with
        the number of tokens, where the host knows them (or with ``CUATTN_CHECK=1``, which waits for the GPU).

    Examples
    --------
    Sequences of one, none and two tokens:

    >>> import numpy as np
    >>> import cuattn
    >>> q = np.zeros((3, 1, 32), np.float32)
    >>> v = np.array([5, 1, 3], np.float32).reshape(3, 1, 1)
    >>> cuattn.attention_varlen(q, q, v, [0, 1, 1, 3], [0, 1, 1, 3])[:, 0, 0]
    array([5., 2., 2.], dtype=float32)
    """
    _OPERATION.refuse_unknown(options)
    check_flag("return_lse", return_lse)
    problem, packed = check(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        fp8_format=fp8_format,
        out=out,
        may_be_unrounded=True,
        **options,
    )
    warn_if_slow(problem, packed)
    return forward(problem, return_lse=return_lse, packed=packed)


def check(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    *,
    max_seqlen_q: Any = None,
    max_seqlen_k: Any = None,
    out: Any = None,
    fp8_format: Any = None,
    operation: Operation = _OPERATION,
    may_be_unrounded: bool = False,
    **options: Any,
) -> tuple[Problem, PackedSequences]:
    """Make every check of a call, and find the executor it runs on. Raises as documented at `attention_varlen`.

    ``may_be_unrounded``: ``out`` may be of the accumulator's type.
    """
    executor = arguments.executor_of(q, k, v, out, operation.large_arrays(options))
    q, k, v = executor.asarray("q", q), executor.asarray("k", k), executor.asarray("v", v)
    dtype = arguments.check_dtypes(q, k, v, fp8_format)
    arguments.check_rank(q, k, v, packed=True)
    packed = check_packed(executor, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, q.shape[0], k.shape[0])
    extents = arguments.check_qkv(q, k, v, batch=packed.batch)
    resolved = operation.check(
        options,
        executor,
        logits_shape=(packed.batch, extents.num_heads, packed.max_seqlen_q, packed.max_seqlen_k),
        num_kv_heads=extents.num_kv_heads,
        dtype=dtype,
    )
    arrays = {"q": q, "k": k, "v": v, "cu_seqlens_q": packed.cu_seqlens_q, "cu_seqlens_k": packed.cu_seqlens_k}
    out = arguments.prepare_out(executor, out, extents.out_shape, dtype, may_be_unrounded, resolved, **arrays)
    scale = resolved.scale_for(extents.head_dim)
    return Problem(executor, q, k, v, out, dtype, extents, scale, resolved), packed
