"""Dual-chunk attention of a few new queries over a paged cache of turned keys.

Chenxin An et al., "Training-free long-context scaling of large language models", 2024 (arXiv:2402.17463).
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict, Unpack, overload

from cuattn.ops.attention.slow_calls import warn_if_slow
from cuattn.ops.dual_chunk.decode_parts import check, decode_parts
from cuattn.ops.rotary.arguments import Rotary
from cuattn.runtime.small_arrays import check_flag
from cuattn.typing import ArrayT, KVFormatName

__all__ = ["dual_chunk_decode"]


class DualChunkDecodeKeywords(TypedDict, total=False):
    """Keywords that neither have to be given nor change what is returned."""

    rope: Rotary
    scale: float | None
    logit_factor: Any
    softcap: float | None
    num_splits: int | None
    kv_format: KVFormatName | None
    k_scale: Any
    v_scale: Any
    k_block_scales: Any
    v_block_scales: Any
    out: Any


@overload
def dual_chunk_decode(
    q: ArrayT,
    k_pages: Any,
    v_pages: Any,
    block_tables: Any,
    seqlens_k: Any,
    *,
    chunk_size: int,
    local_size: int,
    return_lse: Literal[False] = ...,
    **keywords: Unpack[DualChunkDecodeKeywords],
) -> ArrayT: ...
@overload
def dual_chunk_decode(
    q: ArrayT,
    k_pages: Any,
    v_pages: Any,
    block_tables: Any,
    seqlens_k: Any,
    *,
    chunk_size: int,
    local_size: int,
    return_lse: Literal[True],
    **keywords: Unpack[DualChunkDecodeKeywords],
) -> tuple[ArrayT, ArrayT]: ...
@overload
def dual_chunk_decode(
    q: ArrayT,
    k_pages: Any,
    v_pages: Any,
    block_tables: Any,
    seqlens_k: Any,
    *,
    chunk_size: int,
    local_size: int,
    return_lse: bool,
    **keywords: Unpack[DualChunkDecodeKeywords],
) -> ArrayT | tuple[ArrayT, ArrayT]: ...
def dual_chunk_decode(
    q: Any,
    k_pages: Any,
    v_pages: Any,
    block_tables: Any,
    seqlens_k: Any,
    *,
    chunk_size: int,
    local_size: int,
    rope: Rotary = Rotary(),  # noqa: B008 - frozen
    scale: float | None = None,
    logit_factor: Any = 1.0,
    softcap: float | None = None,
    num_splits: int | None = None,
    kv_format: KVFormatName | None = None,
    k_scale: Any = None,
    v_scale: Any = None,
    k_block_scales: Any = None,
    v_block_scales: Any = None,
    out: Any = None,
    return_lse: bool = False,
) -> Any:
    """`cuattn.dual_chunk_attention` of the newest tokens of each sequence, over a cache of keys that are turned.

    Keys are cached once, turned to `cuattn.dual_chunk_positions`: ``append_kv(..., positions=dual_chunk_positions(...),
    rope=rope)``. They serve every later query, which is turned three ways: for the keys of its own chunk, of the chunk
    before, and of all older ones. Each of the three is a call of `cuattn.paged_attention`, split over the keys, and
    `cuattn.merge_states` makes one softmax of them. No page size has to fit the chunks.

    Parameters
    ----------
    q : array [batch, seqlen_q, heads, head_dim]; float16, bfloat16, float32 or float64
        Not turned. One token a sequence, or a few: each reads the keys for itself, so that a long chunk of a prompt is
        better given to `cuattn.dual_chunk_attention`.
    k_pages : array [num_pages, page_size, kv_heads, head_dim], dtype of ``q`` or as ``kv_format`` says
    v_pages : array [num_pages, page_size, kv_heads, head_dim_v], dtype of ``k_pages``
        As for `cuattn.paged_attention`.
    block_tables : integers [batch, max_pages], or None
        The pages of each sequence in order, as for `cuattn.paged_attention`. None: a contiguous cache, [batch,
        capacity, kv_heads, ...].
    seqlens_k : integers [batch]
        Keys of each sequence, those of the queries included: query i is at position i + seqlens_k - seqlen_q. On a
        device it is not waited for.
    chunk_size, local_size, rope, scale, logit_factor, softcap
        As for `cuattn.dual_chunk_attention`.
    num_splits, kv_format, k_scale, v_scale, k_block_scales, v_block_scales
        As for `cuattn.paged_attention`.
    out : array [batch, seqlen_q, heads, head_dim_v], dtype of ``q``, optional
    return_lse : bool

    Returns
    -------
    out : array [batch, seqlen_q, heads, head_dim_v], dtype of ``q``
    lse : array [batch, heads, seqlen_q], float32 (float64 for float64); only with ``return_lse``

    Raises
    ------
    ArgumentError
        As for `cuattn.dual_chunk_attention` and `cuattn.paged_attention`.
    ArrayTypeError, DTypeError, ShapeError, NonFiniteError, OverlapError
        As for `cuattn.paged_attention`.

    References
    ----------
    An et al., "Training-free long-context scaling of large language models", 2024 (arXiv:2402.17463).

    Examples
    --------
    The last of 13 tokens, whose keys lie in pages of 4:

    >>> import numpy as np
    >>> import cuattn
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 13, 2, 32)).astype(np.float32)
    >>> chunks = {"chunk_size": 8, "local_size": 2}
    >>> pages = np.zeros((2, 5, 4, 2, 32), np.float32)
    >>> slots = np.arange(4, 17)
    >>> positions = cuattn.dual_chunk_positions(np.arange(13), **chunks)
    >>> cuattn.append_kv(k[0], v[0], *pages, slots, positions=positions, rope=cuattn.Rotary())
    >>> out = cuattn.dual_chunk_decode(q[:, 12:], *pages, [[1, 2, 3, 4]], [13], **chunks)
    >>> bool(np.allclose(out, cuattn.dual_chunk_attention(q, k, v, **chunks)[:, 12:], atol=1e-6))
    True
    """
    check_flag("return_lse", return_lse)
    problem = check(
        q,
        k_pages,
        v_pages,
        block_tables,
        seqlens_k,
        chunk_size=chunk_size,
        local_size=local_size,
        rope=rope,
        logit_factor=logit_factor,
        scale=scale,
        softcap=softcap,
        num_splits=num_splits,
        kv_format=kv_format,
        k_scale=k_scale,
        v_scale=v_scale,
        k_block_scales=k_block_scales,
        v_block_scales=v_block_scales,
        out=out,
    )
    warn_if_slow(problem.whole, pairs=problem.whole.num_pairs)
    return decode_parts(problem, return_lse=return_lse)
