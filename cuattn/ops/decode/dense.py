"""Attention of a few new queries over a cache of keys and values, split over the keys: FlashDecoding.

* Tri Dao, Daniel Haziza, Francisco Massa and Grigory Sizov, "Flash-Decoding for long-context inference", 2023.
* Reiner Pope et al., "Efficiently scaling transformer inference", 2022 (arXiv:2211.05102).
* Joshua Ainslie et al., "GQA: training generalized multi-query transformer models from multi-head checkpoints", 2023
  (arXiv:2305.13245).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

from cuattn.ops.attention.options import DecodeOptions
from cuattn.ops.attention.signatures import takes_options
from cuattn.ops.attention.slow_calls import warn_if_slow
from cuattn.ops.decode import arguments
from cuattn.ops.decode.keywords import DecodeKeywords
from cuattn.ops.decode.launch import decode
from cuattn.ops.rotary.arguments import Rotary
from cuattn.runtime.small_arrays import check_flag
from cuattn.typing import ArrayT, KVFormatName

if TYPE_CHECKING:
    from cuattn.ops.decode.plan import DecodePlan

__all__ = ["decode_attention"]


@overload
def decode_attention(
    q: ArrayT,
    k_cache: Any,
    v_cache: Any,
    seqlens_k: Any,
    *,
    return_lse: Literal[False] = ...,
    **keywords: Unpack[DecodeKeywords],
) -> ArrayT: ...
@overload
def decode_attention(
    q: ArrayT,
    k_cache: Any,
    v_cache: Any,
    seqlens_k: Any,
    *,
    return_lse: Literal[True],
    **keywords: Unpack[DecodeKeywords],
) -> tuple[ArrayT, ArrayT]: ...
@overload
def decode_attention(
    q: ArrayT, k_cache: Any, v_cache: Any, seqlens_k: Any, *, return_lse: bool, **keywords: Unpack[DecodeKeywords]
) -> ArrayT | tuple[ArrayT, ArrayT]: ...
@takes_options(arguments.DENSE_CALL, before="kv_format")
def decode_attention(
    q: Any,
    k_cache: Any,
    v_cache: Any,
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
    """`cuattn.attention` of a few queries at the end of each sequence, over a cache with room for more keys.

    The keys of a sequence are divided into splits, so that one query over many keys keeps a whole GPU busy; a second
    kernel merges them. The query heads that share a key/value head are the rows of one tile, so that a key is read
    once for all of them. Splits that no query sees are not read: the work grows with the window.

    Parameters
    ----------
    q : array [batch, seqlen_q, heads, head_dim]; float16, bfloat16, float32 or float64
        One query a sequence, or several: speculative tokens, or a chunk of a prompt. NumPy arrays run on the host
        executor, CuPy arrays on the GPU. Any strides; an array whose last axis is not contiguous is copied. Head dims
        are 1 to 512.
    k_cache : array [batch, capacity, kv_heads, head_dim], dtype of ``q`` or as ``kv_format`` says
    v_cache : array [batch, capacity, kv_heads, head_dim_v], dtype of ``k_cache``
        Query head h reads key/value head h // (heads // kv_heads). Pass a cache of [batch, kv_heads, capacity,
        head_dim] as its transposed view. What lies behind a sequence's length is never felt, NaN or not.
    seqlens_k : integers [batch]
        Keys of each sequence, 0 to capacity. They count the ``seqlen_q`` newest ones, of the queries themselves, which
        are in the cache already: query i is at position i + seqlens_k - seqlen_q. A list or a NumPy array, also beside
        CuPy arrays, is checked before anything runs. An int32 array on the GPU is not waited for; a length there that
        is out of range is cut. A sequence may have fewer keys than queries: a query at a negative position sees
        nothing under the causal mask.
    num_splits : int, 1 to 65536, optional
        Into how many parts the keys of each sequence go; by default as many as fill the device. The result is the same
        for any number, up to the rounding of one merge.
    plan : DecodePlan, optional
        The result of `cuattn.plan_decode` for such a call, to be used for every layer of a model. Excludes
        ``num_splits``.
    causal : {True, False, "bottom_right", "top_left"}
        Key j is visible to query i when j <= i + o, with o = seqlens_k - seqlen_q of each sequence (True,
        "bottom_right") or o = 0 ("top_left"). This o, whether the call is causal or not, is that of the options below.
    **options
        As for `cuattn.attention`.
    kv_format : str, optional
        How the cache stores numbers: the default is what its dtype says, and "e4m3fn" or "e5m2" read uint8 arrays as
        8-bit floats. "int8" is stored in int8. "nvfp4" and "mxfp4" pack two numbers of 4 bits into a uint8, the first
        in the lower bits: the last axis of the cache is half of the head dim.
    k_scale, v_scale : float, float array [] or [kv_heads], or float32 array [batch, capacity, kv_heads]; optional
        What quantized numbers are multiplied by: per tensor, per head, or per slot and head. 1 by default. Formats of
        4 bits take one factor per tensor.
    k_block_scales, v_block_scales : array [batch, capacity, kv_heads, blocks]
        Of formats of 4 bits: float8_e4m3fn (or its bits as uint8) for every 16 numbers of "nvfp4", float8_e8m0fnu (or
        uint8) for every 32 of "mxfp4".
    rope : Rotary, optional
        Turns each query by its position, as `cuattn.rope` does, on its way; keys are taken as turned already.
    rotate_keys : bool
        With ``rope``: turns key j by position j too. For caches that keep keys unturned.
    out : array [batch, seqlen_q, heads, head_dim_v], dtype of ``q``, or float32 for a ``q`` of 16 bits; optional
        Where to write the result; float32 takes it before it is rounded to 16 bits. It must not overlap an input.
    workspace : uint8 array [bytes], optional
        Memory for the results of splits, contiguous, at a multiple of 16 bytes; ``plan.workspace_size()`` bytes with a
        plan. By default the call takes its own.
    return_lse : bool
        Return also the log-sum-exp of the logits.

    Small arrays (lengths, slopes, sinks, scales per tensor or head) may be NumPy arrays or lists beside CuPy arrays.

    Returns
    -------
    out : array [batch, seqlen_q, heads, head_dim_v], dtype of ``q`` (that of ``out`` if it is given)
        Accumulated in float32 (float64 for float64). A query that sees no key gives zeros.
    lse : array [batch, heads, seqlen_q], float32 (float64 for float64); only with ``return_lse``
        Natural logarithm of the sum of the exponentials of the logits; -inf (or the sink) for a query that sees no key.

    Raises
    ------
    ArrayTypeError
        An argument is no array, the arrays are not of one kind or not on one device, ``out`` or ``workspace`` is
        read-only.
    DTypeError
        A dtype that is not in the list, dtypes that differ, or one that ``kv_format`` is not stored in.
    ShapeError
        A rank other than 4, extents that do not fit each other, a head dim outside of 1 to 512, heads that are no
        multiple of kv_heads, an option whose shape is not as above, a ``workspace`` that is too small.
    NonFiniteError
        A ``scale`` or ``softcap`` that is not finite; slopes, sinks or scales per tensor or head that are not, where
        they are numbers, lists or NumPy arrays.
    ArgumentError
        A length that is negative or beyond the capacity, where the host sees it (or with ``CUATTN_CHECK=1``, which
        waits for the GPU); scales for a format that has none, or none for one that needs them; a ``plan`` of another
        problem; a position that ``rope.cos`` does not hold; another value of an option than those above.
    OverlapError
        ``out`` or ``workspace`` lies in the memory range of an input, or of the other.

    Warns
    -----
    SlowHostCallWarning
        Once, when a call with NumPy arrays takes more than 10^11 floating-point operations.

    References
    ----------
    Dao et al., "Flash-Decoding for long-context inference", 2023; Pope et al., "Efficiently scaling transformer
    inference", 2022; Ainslie et al., "GQA", 2023. Formats of 4 bits: Rouhani et al., "Microscaling data formats for
    deep learning", 2023.

    Examples
    --------
    A cache with room for four keys, of which one sequence has used two and the other three:

    >>> import numpy as np
    >>> import cuattn
    >>> keys, q = np.zeros((2, 4, 1, 32), np.float32), np.zeros((2, 1, 1, 32), np.float32)
    >>> values = np.arange(8, dtype=np.float32).reshape(2, 4, 1, 1)
    >>> out, lse = cuattn.decode_attention(q, keys, values, [2, 3], return_lse=True)
    >>> out[:, 0, 0, 0]
    array([0.5, 5. ], dtype=float32)
    >>> np.exp(lse[:, 0, 0]).round(4)
    array([2., 3.], dtype=float32)
    """
    arguments.DENSE_CALL.refuse_unknown(options)
    check_flag("return_lse", return_lse)
    problem = arguments.check(
        q,
        k_cache,
        v_cache,
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
