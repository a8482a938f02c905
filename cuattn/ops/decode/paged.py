"""Attention over keys and values that lie in pages of a common pool, found through a table for every sequence.

* Woosuk Kwon et al., "Efficient memory management for large language model serving with PagedAttention", 2023
  (arXiv:2309.06180).
* Tri Dao, Daniel Haziza, Francisco Massa and Grigory Sizov, "Flash-Decoding for long-context inference", 2023.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

from cuattn.ops.attention.options import DecodeOptions
from cuattn.ops.attention.signatures import takes_options
from cuattn.ops.attention.slow_calls import warn_if_slow
from cuattn.ops.decode import arguments
from cuattn.ops.decode.keywords import DecodeKeywords, PackedKeywords
from cuattn.ops.decode.launch import decode
from cuattn.ops.rotary.arguments import Rotary
from cuattn.runtime.small_arrays import check_flag
from cuattn.typing import ArrayT, KVFormatName

if TYPE_CHECKING:
    from cuattn.ops.decode.plan import DecodePlan

__all__ = ["paged_attention", "paged_attention_varlen"]


@overload
def paged_attention(
    q: ArrayT,
    k_pages: Any,
    v_pages: Any,
    block_tables: Any,
    seqlens_k: Any,
    *,
    return_lse: Literal[False] = ...,
    **keywords: Unpack[DecodeKeywords],
) -> ArrayT: ...
@overload
def paged_attention(
    q: ArrayT,
    k_pages: Any,
    v_pages: Any,
    block_tables: Any,
    seqlens_k: Any,
    *,
    return_lse: Literal[True],
    **keywords: Unpack[DecodeKeywords],
) -> tuple[ArrayT, ArrayT]: ...
@overload
def paged_attention(
    q: ArrayT,
    k_pages: Any,
    v_pages: Any,
    block_tables: Any,
    seqlens_k: Any,
    *,
    return_lse: bool,
    **keywords: Unpack[DecodeKeywords],
) -> ArrayT | tuple[ArrayT, ArrayT]: ...
@takes_options(arguments.PAGED_CALL, before="kv_format")
def paged_attention(
    q: Any,
    k_pages: Any,
    v_pages: Any,
    block_tables: Any,
    seqlens_k: Any,
    *,
    num_splits: int | None = None,
    plan: DecodePlan | None = None,
    kv_format: KVFormatName | None = None,
    k_scale: Any = None,
    v_scale: Any = None,
    k_block_scales: Any = None,
    v_block_scales: Any = None,
    rope: Rotary | None = None,
    rotate_keys: bool = False,
    out: Any = None,
    workspace: Any = None,
    return_lse: bool = False,
    **options: Unpack[DecodeOptions],
) -> Any:
    """`cuattn.decode_attention` over a paged cache: key j of sequence b is in slot j % page_size of its page
    block_tables[b, j // page_size].

    Parameters
    ----------
    q : array [batch, seqlen_q, heads, head_dim]; float16, bfloat16, float32 or float64
    k_pages : array [num_pages, page_size, kv_heads, head_dim], dtype of ``q`` or as ``kv_format`` says
    v_pages : array [num_pages, page_size, kv_heads, head_dim_v], dtype of ``k_pages``
        Any page size from 1, and any strides: pass [num_pages, kv_heads, page_size, head_dim] as its transposed view.
        Only slots with a key of a sequence are felt.
    block_tables : integers [batch, max_pages]
        The pages of each sequence in order; sequences may share pages. Only the first ceil(seqlens_k / page_size)
        entries of a row are read, the others may hold anything. A list or a NumPy array, also beside CuPy arrays, is
        checked before anything runs. An int32 array on the GPU is not waited for; there, keys on a page that does not
        exist are zeros, and nothing outside of the pages is read.
    seqlens_k : integers [batch]
        Keys of each sequence, 0 to max_pages * page_size, those of the queries themselves included.
    k_scale, v_scale : float, float array [] or [kv_heads], or float32 array [num_pages, page_size, kv_heads]; optional
    k_block_scales, v_block_scales : array [num_pages, page_size, kv_heads, blocks]
        As for `cuattn.decode_attention`, with the axes of the pages.
    num_splits : int, optional
        1 is one pass over the keys, more are partitions that a second kernel merges; by default what is faster.
    causal : {True, False, "bottom_right", "top_left"}
        As for `cuattn.decode_attention`, with o = seqlens_k - seqlen_q of each sequence ("top_left": 0).
    **options
        As for `cuattn.attention`.
    plan, kv_format, rope, rotate_keys, out, workspace, return_lse
        As for `cuattn.decode_attention`.

    Returns
    -------
    out : array [batch, seqlen_q, heads, head_dim_v], dtype of ``q`` (that of ``out`` if it is given)
    lse : array [batch, heads, seqlen_q], float32 (float64 for float64); only with ``return_lse``

    Raises
    ------
    ArrayTypeError, DTypeError, ShapeError, NonFiniteError, ArgumentError, OverlapError
        As for `cuattn.decode_attention`; ArgumentError also for a page that a sequence needs and that does not exist,
        where the host sees it (or with ``CUATTN_CHECK=1``).

    References
    ----------
    Kwon et al., "Efficient memory management for large language model serving with PagedAttention", 2023.

    Examples
    --------
    Two sequences of three keys share page 2, which holds their first two:

    >>> import numpy as np
    >>> import cuattn
    >>> keys, q = np.zeros((3, 2, 1, 32), np.float32), np.zeros((2, 1, 1, 32), np.float32)
    >>> values = np.arange(6, dtype=np.float32).reshape(3, 2, 1, 1)
    >>> cuattn.paged_attention(q, keys, values, [[2, 0], [2, 1]], [3, 3])[:, 0, 0, 0]
    array([3.       , 3.6666667], dtype=float32)
    """
    arguments.PAGED_CALL.refuse_unknown(options)
    check_flag("return_lse", return_lse)
    problem = arguments.check_paged(
        q,
        k_pages,
        v_pages,
        block_tables,
        seqlens_k,
        num_splits=num_splits,
        plan=plan,
        kv_format=kv_format,
        k_scale=k_scale,
        v_scale=v_scale,
        k_block_scales=k_block_scales,
        v_block_scales=v_block_scales,
        rope=rope,
        rotate_keys=rotate_keys,
        out=out,
        may_be_unrounded=True,
        workspace=workspace,
        **options,
    )
    warn_if_slow(problem, pairs=problem.num_pairs)
    return decode(problem, return_lse=return_lse)


@overload
def paged_attention_varlen(
    q: ArrayT,
    k_pages: Any,
    v_pages: Any,
    block_tables: Any,
    cu_seqlens_q: Any,
    seqlens_k: Any,
    *,
    return_lse: Literal[False] = ...,
    **keywords: Unpack[PackedKeywords],
) -> ArrayT: ...
@overload
def paged_attention_varlen(
    q: ArrayT,
    k_pages: Any,
    v_pages: Any,
    block_tables: Any,
    cu_seqlens_q: Any,
    seqlens_k: Any,
    *,
    return_lse: Literal[True],
    **keywords: Unpack[PackedKeywords],
) -> tuple[ArrayT, ArrayT]: ...
@overload
def paged_attention_varlen(
    q: ArrayT,
    k_pages: Any,
    v_pages: Any,
    block_tables: Any,
    cu_seqlens_q: Any,
    seqlens_k: Any,
    *,
    return_lse: bool,
    **keywords: Unpack[PackedKeywords],
) -> ArrayT | tuple[ArrayT, ArrayT]: ...
@takes_options(arguments.PACKED_CALL, before="kv_format")
def paged_attention_varlen(
    q: Any,
    k_pages: Any,
    v_pages: Any,
    block_tables: Any,
    cu_seqlens_q: Any,
    seqlens_k: Any,
    *,
    max_seqlen_q: int | None = None,
    num_splits: int | None = None,
    plan: DecodePlan | None = None,
    kv_format: KVFormatName | None = None,
    k_scale: Any = None,
    v_scale: Any = None,
    k_block_scales: Any = None,
    v_block_scales: Any = None,
    rope: Rotary | None = None,
    rotate_keys: bool = False,
    out: Any = None,
    workspace: Any = None,
    return_lse: bool = False,
    **options: Unpack[DecodeOptions],
) -> Any:
    """`cuattn.paged_attention` of a packed batch: prompts, chunks of prompts and single tokens in one call.

    Parameters
    ----------
    q : array [tokens, heads, head_dim]; float16, bfloat16, float32 or float64
        The queries of all sequences, one sequence after another.
    k_pages, v_pages, block_tables
        As for `cuattn.paged_attention`.
    cu_seqlens_q : integers [batch + 1]
        Sequence b has the queries cu_seqlens_q[b] to cu_seqlens_q[b + 1] - 1. It begins with 0, ascends, and ends with
        ``tokens``; a sequence may have none. A list or a NumPy array, also beside CuPy arrays, is checked before
        anything runs. An int32 array on the GPU is not waited for; entries that lead outside of ``q`` are cut.
    seqlens_k : integers [batch]
        Keys of each sequence, those of its queries included.
    max_seqlen_q : int, optional
        Queries of the longest sequence. It is only a hint for lengths on the GPU; one that is larger is cut there, and
        ``out`` keeps what it had for the queries beyond.
    causal : {True, False, "bottom_right", "top_left"}
        As for `cuattn.decode_attention`; o is the number of keys minus the number of queries of each sequence
        ("top_left": 0).
    **options
        As for `cuattn.attention`.
    num_splits, plan, kv_format, k_scale, v_scale, k_block_scales, v_block_scales, rope, rotate_keys, out, workspace
    return_lse
        As for `cuattn.paged_attention`, with one entry a sequence where they have a batch axis, and so
        ``alibi_slopes``.

    Returns
    -------
    out : array [tokens, heads, head_dim_v], dtype of ``q`` (that of ``out`` if it is given)
    lse : array [heads, tokens], float32 (float64 for float64); only with ``return_lse``

    Raises
    ------
    ArrayTypeError, DTypeError, ShapeError, NonFiniteError, ArgumentError, OverlapError
        As for `cuattn.paged_attention`; ArgumentError also for a ``cu_seqlens_q`` that descends, does not begin with 0
        or does not end with the number of tokens, where the host sees it (or with ``CUATTN_CHECK=1``).

    Examples
    --------
    A prompt of two tokens, and the next token of a sequence of three:

    >>> import numpy as np
    >>> import cuattn
    >>> keys, q = np.zeros((3, 2, 1, 32), np.float32), np.zeros((3, 1, 32), np.float32)
    >>> values = np.arange(6, dtype=np.float32).reshape(3, 2, 1, 1)
    >>> cuattn.paged_attention_varlen(q, keys, values, [[0, -1], [1, 2]], [0, 2, 3], [2, 3])[:, 0, 0]
    array([0. , 0.5, 3. ], dtype=float32)
    """
    arguments.PACKED_CALL.refuse_unknown(options)
    check_flag("return_lse", return_lse)
    problem = arguments.check_paged_varlen(
        q,
        k_pages,
        v_pages,
        block_tables,
        cu_seqlens_q,
        seqlens_k,
        max_seqlen_q=max_seqlen_q,
        num_splits=num_splits,
        plan=plan,
        kv_format=kv_format,
        k_scale=k_scale,
        v_scale=v_scale,
        k_block_scales=k_block_scales,
        v_block_scales=v_block_scales,
        rope=rope,
        rotate_keys=rotate_keys,
        out=out,
        may_be_unrounded=True,
        workspace=workspace,
        **options,
    )
    warn_if_slow(problem, pairs=problem.num_pairs)
    return decode(problem, return_lse=return_lse)
