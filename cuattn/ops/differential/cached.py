"""Differential attention of a few new queries over a cache of keys and values, contiguous or in pages.

* Tianzhu Ye, Li Dong, Yuqing Xia, Yutao Sun, Yi Zhu, Gao Huang and Furu Wei, "Differential transformer", 2024
  (arXiv:2410.05258).
* Tri Dao, Daniel Haziza, Francisco Massa and Grigory Sizov, "Flash-Decoding for long-context inference", 2023.
"""

from __future__ import annotations

from typing import Any, Unpack

from cuattn.ops.attention.options import DifferentialDecodeOptions
from cuattn.ops.attention.signatures import takes_options
from cuattn.ops.attention.slow_calls import warn_if_slow
from cuattn.ops.differential import cached_launch
from cuattn.typing import ArrayT

__all__ = ["differential_decode"]


@takes_options(cached_launch.DECODE_CALL, before="norm")
def differential_decode(
    q: ArrayT,
    k_cache: Any,
    v_cache: Any,
    lambda_: Any,
    seqlens_k: Any,
    *,
    block_tables: Any = None,
    num_splits: int | None = None,
    norm: bool = False,
    norm_weight: Any = None,
    eps: float = 1e-5,
    output_scale: float = 1.0,
    out: ArrayT | None = None,
    **options: Unpack[DifferentialDecodeOptions],
) -> ArrayT:
    """`cuattn.differential_attention` of queries at the end of each sequence, over a cache with room for more keys.

    Heads are paired as there: with as many key heads as value heads both softmaxes read one key, and the cache of keys
    is not twice as large. Without ``block_tables`` the cache is contiguous, as for `cuattn.decode_attention`; with them
    it lies in pages, as for `cuattn.paged_attention`.

    Parameters
    ----------
    q : array [batch, seqlen_q, 2 * heads, head_dim]; float16, bfloat16, float32 or float64
    k_cache : array [batch, capacity, 2 * kv_heads or kv_heads, head_dim], dtype of ``q``
    v_cache : array [batch, capacity, kv_heads, head_dim_v], dtype of ``q``
        With ``block_tables``, [num_pages, page_size, ...]. What lies behind a sequence's length is never felt.
    lambda_ : float, or float array [], [heads] or [batch, seqlen_q, heads]
        As for `cuattn.differential_attention`.
    seqlens_k : integers [batch]
        Keys of each sequence, those of the queries themselves included.
    block_tables : integers [batch, max_pages], optional
        The pages of each sequence in order, as for `cuattn.paged_attention`.
    num_splits : int, 1 to 65536, optional
        Into how many parts the keys of each sequence go; by default as many as fill the device.
    causal : {True, False, "bottom_right", "top_left"}
        As for `cuattn.decode_attention`.
    alibi_slopes : float array [2 * heads] or [batch, 2 * heads], optional
        As for `cuattn.differential_attention`: [heads] and [batch, heads] are for both softmaxes of a pair.
    **options
        As for `cuattn.attention`.
    norm, norm_weight, eps, output_scale
        As for `cuattn.differential_attention`.
    out : array [batch, seqlen_q, heads, head_dim_v], dtype of ``q``, optional
        Where to write the result. It must not overlap an input.

    Returns
    -------
    array [batch, seqlen_q, heads, head_dim_v], dtype of ``q``
        The two attentions are rounded to the dtype of ``q`` before their difference is taken in float32 (float64 for
        float64). A query that sees no key gives zeros.

    Raises
    ------
    ArrayTypeError, DTypeError, ShapeError, NonFiniteError, ArgumentError, OverlapError
        As for `cuattn.differential_attention` and `cuattn.decode_attention`, or `cuattn.paged_attention`.

    Warns
    -----
    SlowHostCallWarning
        Once, when a call with NumPy arrays takes more than 10^11 floating-point operations.

    References
    ----------
    Ye et al., "Differential transformer", 2024; Dao et al., "Flash-Decoding for long-context inference", 2023.

    Examples
    --------
    A cache with room for four keys, of which the sequence has used three:

    >>> import numpy as np
    >>> import cuattn
    >>> q, keys = np.zeros((1, 1, 2, 32), np.float32), np.zeros((1, 4, 1, 32), np.float32)
    >>> values = np.arange(4, dtype=np.float32).reshape(1, 4, 1, 1)
    >>> cuattn.differential_decode(q, keys, values, 0.25, [3])[0, 0, 0]
    array([0.75], dtype=float32)
    """
    cached_launch.DECODE_CALL.refuse_unknown(options)
    of_norm = {"norm": norm, "norm_weight": norm_weight, "eps": eps, "output_scale": output_scale}
    problem = cached_launch.check(
        q,
        k_cache,
        v_cache,
        lambda_,
        seqlens_k,
        block_tables=block_tables,
        num_splits=num_splits,
        out=out,
        **of_norm,
        **options,
    )
    for stream in problem.streams:
        warn_if_slow(stream, pairs=stream.num_pairs)
    return cached_launch.decode_pairs(problem)
