"""Dual-chunk attention: positions that a model was trained on, over contexts that are longer.

Chenxin An, Fei Huang, Jun Zhang, Shansan Gong, Xipeng Qiu, Chang Zhou and Lingpeng Kong, "Training-free long-context
scaling of large language models", 2024 (arXiv:2402.17463).
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict, Unpack, overload

from cuattn.ops.attention.slow_calls import warn_if_slow
from cuattn.ops.dual_chunk import arguments
from cuattn.ops.dual_chunk.launch import forward
from cuattn.ops.rotary.arguments import Rotary
from cuattn.runtime.small_arrays import check_flag
from cuattn.typing import ArrayT

__all__ = ["dual_chunk_attention"]


class DualChunkKeywords(TypedDict, total=False):
    """Keywords that neither have to be given nor change what is returned."""

    rope: Rotary
    keys_rotated: bool
    scale: float | None
    logit_factor: Any
    softcap: float | None
    cu_seqlens_q: Any
    cu_seqlens_k: Any
    out: Any


@overload
def dual_chunk_attention(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    *,
    chunk_size: int,
    local_size: int,
    return_lse: Literal[False] = ...,
    **keywords: Unpack[DualChunkKeywords],
) -> ArrayT: ...
@overload
def dual_chunk_attention(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    *,
    chunk_size: int,
    local_size: int,
    return_lse: Literal[True],
    **keywords: Unpack[DualChunkKeywords],
) -> tuple[ArrayT, ArrayT]: ...
@overload
def dual_chunk_attention(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    *,
    chunk_size: int,
    local_size: int,
    return_lse: bool,
    **keywords: Unpack[DualChunkKeywords],
) -> ArrayT | tuple[ArrayT, ArrayT]: ...
def dual_chunk_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    chunk_size: int,
    local_size: int,
    rope: Rotary = Rotary(),  # noqa: B008 - frozen
    keys_rotated: bool = False,
    scale: float | None = None,
    logit_factor: Any = 1.0,
    softcap: float | None = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    out: Any = None,
    return_lse: bool = False,
) -> Any:
    """Causal attention whose positions never exceed ``chunk_size``, however long the context is.

    Positions are cut into chunks of L = chunk_size - local_size. Key j is turned by RoPE to j mod L, once for all
    queries. Query i is at position p = i + seqlen_k - seqlen_q and is turned to p mod L for the keys of its own chunk,
    to min(p mod L + L, chunk_size) for those of the chunk before, and to min(2 L - 1, chunk_size) for all older ones.
    One softmax goes over all keys up to p. So the distance of neighbours within ``local_size`` is what it is, and none
    is larger than ``chunk_size``: a model works at a multiple of the length that it was trained on. Sequences of at
    most L keys are RoPE and causal attention, to the bit.

    Parameters
    ----------
    q : array [batch, seqlen_q, heads, head_dim]; float16, bfloat16, float32 or float64
        Not turned. NumPy arrays run on the host executor, CuPy arrays on the GPU. Any strides; an array whose last axis
        is not contiguous is copied. Head dims are 1 to 512.
    k : array [batch, seqlen_k, kv_heads, head_dim], dtype of ``q``
    v : array [batch, seqlen_k, kv_heads, head_dim_v], dtype of ``q``
        Query head h reads key/value head h // (heads // kv_heads). With seqlen_q < seqlen_k, the queries are the last
        ones: a chunk of a prompt, or one token. No length has to be a multiple of anything.
    chunk_size : int, C, from 2 to 2**31
    local_size : int, W, from 1 to C - 1
    rope : Rotary
        How heads are turned. Tables have to hold the positions up to ``chunk_size``, or what is reached of them.
    keys_rotated : bool
        ``k`` is turned already, to `cuattn.dual_chunk_positions` of its indices; then the call is one launch. Else
        the keys are turned in a copy.
    scale : float, optional
        1 / sqrt(head_dim) by default.
    logit_factor : float, or array [batch]
        Multiplies the scaled products, one a sequence or one for all: see `cuattn.dual_chunk_logit_factor`.
    softcap : float, optional
        Logits become softcap * tanh(logit / softcap), behind the factor.
    cu_seqlens_q, cu_seqlens_k : int32 [batch + 1], optional
        Both or none: packed sequences, as for `cuattn.attention_varlen`, of ``q`` [tokens_q, heads, head_dim], ``k``
        and ``v`` [tokens_k, kv_heads, ...].
    out : array, shape of the result and dtype of ``q``, optional
        Where to write it. It may not lie in the memory range of an input.
    return_lse : bool

    Returns
    -------
    out : array [batch, seqlen_q, heads, head_dim_v] or [tokens_q, heads, head_dim_v], dtype of ``q``
        Queries that see no key, as there are more queries than keys, give 0.
    lse : array [batch, heads, seqlen_q] or [heads, tokens_q], float32 (float64 for float64); only with ``return_lse``
        Natural log-sum-exp of the logits; -inf where no key is seen.

    Raises
    ------
    ArgumentError
        Not 0 < local_size < chunk_size <= 2**31; a ``rope`` that is no `Rotary` or that `cuattn.rope` refuses; tables
        that do not hold a position that is needed, where the host knows the lengths (NaN where it does not); only one
        of ``cu_seqlens_q`` and ``cu_seqlens_k``, or what `cuattn.attention_varlen` refuses of them.
    NonFiniteError
        ``scale``, ``logit_factor``, or their product.
    ArrayTypeError, DTypeError, ShapeError, OverlapError
        As for `cuattn.attention`.

    References
    ----------
    An et al., "Training-free long-context scaling of large language models", 2024 (arXiv:2402.17463). Where the paper
    has C - 1 for the largest distance, its code has C, and so has this.

    Examples
    --------
    Ten tokens in chunks of 8 - 2 = 6: the last ones see keys of the chunk before.

    >>> import numpy as np
    >>> import cuattn
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 10, 2, 32)).astype(np.float32)
    >>> out = cuattn.dual_chunk_attention(q, k, v, chunk_size=8, local_size=2)
    >>> turned = cuattn.rope(q, np.arange(10)), cuattn.rope(k, np.arange(10))
    >>> first = cuattn.attention(*turned, v, causal=True)
    >>> [bool(np.allclose(out[:, part], first[:, part])) for part in (slice(0, 6), slice(6, 10))]
    [True, False]
    """
    check_flag("return_lse", return_lse)
    problem = arguments.check(
        q,
        k,
        v,
        chunk_size=chunk_size,
        local_size=local_size,
        rope=rope,
        keys_rotated=keys_rotated,
        scale=scale,
        logit_factor=logit_factor,
        softcap=softcap,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        out=out,
    )
    warn_if_slow(problem.attention, problem.packed)
    return forward(problem, return_lse=return_lse)
