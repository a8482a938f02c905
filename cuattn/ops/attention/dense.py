"""Attention: softmax(scale q k^T) v without storing the logits.

* Tri Dao, Daniel Y. Fu, Stefano Ermon, Atri Rudra and Christopher Ré, "FlashAttention: fast and memory-efficient exact
  attention with IO-awareness", 2022 (arXiv:2205.14135).
* Tri Dao, "FlashAttention-2: faster attention with better parallelism and work partitioning", 2023 (arXiv:2307.08691).
* Maxim Milakov and Natalia Gimelshein, "Online normalizer calculation for softmax", 2018 (arXiv:1805.02867).
* Markus N. Rabe and Charles Staats, "Self-attention does not need O(n²) memory", 2021 (arXiv:2112.05682).
"""

from __future__ import annotations

from typing import Any, Literal, Unpack, overload

from cuattn.ops.attention import arguments
from cuattn.ops.attention.dropout import DropoutOrigin
from cuattn.ops.attention.forward.launch import forward
from cuattn.ops.attention.options import AttentionKeywords
from cuattn.ops.attention.slow_calls import warn_if_slow
from cuattn.runtime.small_arrays import check_flag
from cuattn.typing import ArrayT, Causal, FP8Format, Precision

__all__ = ["attention"]


@overload
def attention(
    q: ArrayT, k: ArrayT, v: ArrayT, *, return_lse: Literal[False] = ..., **keywords: Unpack[AttentionKeywords]
) -> ArrayT: ...
@overload
def attention(
    q: ArrayT, k: ArrayT, v: ArrayT, *, return_lse: Literal[True], **keywords: Unpack[AttentionKeywords]
) -> tuple[ArrayT, ArrayT]: ...
@overload
def attention(
    q: ArrayT, k: ArrayT, v: ArrayT, *, return_lse: bool, **keywords: Unpack[AttentionKeywords]
) -> ArrayT | tuple[ArrayT, ArrayT]: ...
def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    scale: float | None = None,
    causal: Causal = False,
    window: tuple[int | None, int | None] | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    bias: Any = None,
    mask: Any = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    dropout_p: float = 0.0,
    dropout_seed: int = 0,
    dropout_offset: int = 0,
    dropout_origin: DropoutOrigin | tuple[int, ...] | None = None,
    diagonal_offset: Any = None,
    precision: Precision | None = None,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    fp8_format: FP8Format | None = None,
    out: Any = None,
    return_lse: bool = False,
) -> Any:
    """``softmax(scale * q k^T) v`` for every head, with the logits kept on chip.

    The logit of query i and key j is ``scale * (q[i] . k[j])``; then, in this order and each only if given: softcap,
    ALiBi, bias, masks. Options combine freely.

    Parameters
    ----------
    q : array [batch, seqlen_q, heads, head_dim]; float16, bfloat16, float32, float64, float8_e4m3fn or float8_e5m2
        NumPy arrays run on the host executor, CuPy arrays on the GPU. Any strides: pass a
        [batch, heads, seqlen, head_dim] array as its transposed view. An array whose last axis is not contiguous is
        copied; bases and strides that are multiples of 16 bytes are the fastest.
    k : array [batch, seqlen_k, kv_heads, head_dim], dtype of ``q``
    v : array [batch, seqlen_k, kv_heads, head_dim_v], dtype of ``q``
        ``heads`` is a multiple of ``kv_heads``: query head h reads key/value head h // (heads // kv_heads). Head dims
        are 1 to 512, and ``head_dim_v`` may differ from ``head_dim``.
    scale : float, optional
        Factor of the logits; 1 / sqrt(head_dim) by default.
    causal : {False, True, "bottom_right", "top_left"}
        Key j is visible to query i when j <= i + o, with o = seqlen_k - seqlen_q (True, "bottom_right": the last query
        sees the last key) or o = 0 ("top_left").
    diagonal_offset : int or int32 [batch], optional
        Another o. It is the diagonal of ``causal``, ``window``, ``chunk`` and ``alibi_slopes``, whichever are given.
    window : (left, right), optional
        Key j is visible to query i when i + o - left <= j <= i + o + right; None on a side is no bound. The work grows
        with the window, not with seqlen_k.
    chunk : int, optional
        Key j is visible to query i when (i + o) // chunk == j // chunk: both lie in one piece of so many keys (chunked
        local attention). The work grows with the chunk, not with seqlen_k.
    softcap : float, optional
        Logits become ``softcap * tanh(logit / softcap)``.
    alibi_slopes : float array [heads] or [batch, heads], optional
        Logits lose ``slope * |i + o - j|``.
    bias : array, broadcast to [batch, heads, seqlen_q, seqlen_k]; float16, bfloat16, float32 or float64; optional
        Added to the logits; -inf hides a key. Broadcast axes are not materialised.
    mask : bool array, broadcast likewise, optional
        True: attend. Tiles of the logits in which a mask (or a bias of -inf) hides everything are skipped, those in
        which it hides nothing cost nothing.
    sinks : float array [heads], optional
        One more logit in the denominator of each row, whose value is nowhere; -inf is none. lse includes it.
    dropout_p : float, 0 <= dropout_p < 1
        Probability with which a probability is set to 0; the others are divided by 1 - dropout_p. lse is that without
        dropout.
    dropout_seed, dropout_offset : int, below 2^64 and 2^32
        What is kept is a function of them and of (batch, head, i, j) alone: `cuattn.dropout_mask`.
    dropout_origin : (batch, head, query, key) or `cuattn.DropoutOrigin`, optional
        The call is a part of a larger one, whose mask it has from there on.
    precision : {None, "ieee", "tf32", "fp8"}
        "tf32" rounds float32 operands of the two products to 10 bits of mantissa, for tensor cores. "fp8" lets
        probabilities of float8_e4m3fn arrays be rounded to that type as well, to within 1/16, which Hopper needs to
        multiply them as fast as such arrays can be; elsewhere, and without it, they are rounded to float16.
    q_descale, k_descale, v_descale : float array [batch, kv_heads], optional
        Factors of 8-bit floats: logits are scale * q_descale * k_descale * (q . k), and the result is out * v_descale.
    fp8_format : {None, "e4m3fn", "e5m2"}
        Reads uint8 arrays as 8-bit floats (CuPy has no dtype for them). They become float16, exactly, on chip.
    out : array [batch, seqlen_q, heads, head_dim_v], dtype of the result, or float32 for 16- and 8-bit inputs; optional
        Where to write the result. float32 takes it as it was accumulated, before it is rounded to 16 bits: a part that
        is to be merged with others (`cuattn.merge_states`). It must not overlap an input.
    return_lse : bool
        Return also the log-sum-exp of the logits.

    Small arrays (slopes, sinks, descales, a diagonal_offset of int32) may be NumPy arrays or lists beside CuPy arrays.

    Returns
    -------
    out : array [batch, seqlen_q, heads, head_dim_v], dtype of ``q``; bfloat16 for 8-bit floats; or the ``out`` given
        Accumulated in float32 (float64 for float64). A query that sees no key gives zeros.
    lse : array [batch, heads, seqlen_q], float32 (float64 for float64); only with ``return_lse``
        Natural logarithm of the sum of the exponentials of the logits; -inf (or the sink) for a query that sees no key.

    Raises
    ------
    ArrayTypeError
        An argument is no array, the arrays are not of one kind or not on one device, or ``out`` is read-only.
    DTypeError
        A dtype that is not in the list, or dtypes that differ.
    ShapeError
        A rank other than 4, extents that do not fit each other, a head dim outside of 1 to 512, heads that are no
        multiple of kv_heads, an option whose shape is not as above.
    NonFiniteError
        A ``scale``, ``softcap`` or ``dropout_p`` that is not finite; slopes, descales or sinks that are not, where they
        are NumPy arrays or lists.
    ArgumentError
        Another value of an option than those above.
    OverlapError
        ``out`` lies in the memory range of an input.

    Warns
    -----
    SlowHostCallWarning
        Once, when a call with NumPy arrays takes more than 10^11 floating-point operations.

    References
    ----------
    Dao et al., "FlashAttention", 2022; Dao, "FlashAttention-2", 2023; Milakov and Gimelshein, "Online normalizer
    calculation for softmax", 2018; Rabe and Staats, "Self-attention does not need O(n²) memory", 2021. ALiBi: Press,
    Smith and Lewis, "Train short, test long", 2021. Sinks: Xiao et al., "Efficient streaming language models with
    attention sinks", 2023. Random numbers: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.

    Examples
    --------
    >>> import numpy as np
    >>> import cuattn
    >>> q = np.zeros((1, 2, 1, 32), np.float32)
    >>> v = np.arange(2, dtype=np.float32).reshape(1, 2, 1, 1)
    >>> out, lse = cuattn.attention(q, q, v, causal=True, return_lse=True)
    >>> out[0, :, 0, 0]
    array([0. , 0.5], dtype=float32)
    >>> np.exp(lse[0, 0]).round(4)
    array([1., 2.], dtype=float32)
    >>> cuattn.attention(q, q, v, mask=np.array([True, False]))[0, :, 0, 0]
    array([0., 0.], dtype=float32)
    """
    check_flag("return_lse", return_lse)
    problem = arguments.check(
        q,
        k,
        v,
        scale=scale,
        causal=causal,
        out=out,
        may_be_unrounded=True,
        window=window,
        chunk=chunk,
        softcap=softcap,
        bias=bias,
        mask=mask,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        dropout_offset=dropout_offset,
        dropout_origin=dropout_origin,
        diagonal_offset=diagonal_offset,
        precision=precision,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        fp8_format=fp8_format,
    )
    warn_if_slow(problem)
    return forward(problem, return_lse=return_lse)
