"""Attention: softmax(scale q k^T) v without storing the logits.

* Tri Dao, Daniel Y. Fu, Stefano Ermon, Atri Rudra and Christopher Ré, "FlashAttention: fast and memory-efficient exact
  attention with IO-awareness", 2022 (arXiv:2205.14135).
* Tri Dao, "FlashAttention-2: faster attention with better parallelism and work partitioning", 2023 (arXiv:2307.08691).
* Maxim Milakov and Natalia Gimelshein, "Online normalizer calculation for softmax", 2018 (arXiv:1805.02867).
* Markus N. Rabe and Charles Staats, "Self-attention does not need O(n²) memory", 2021 (arXiv:2112.05682).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from cuattn import attention_arguments as arguments
from cuattn.attention_arguments import LOG2_E, Extents
from cuattn.config import BUCKETS, FlashFwdConfig, PlainFwdConfig, select
from cuattn.errors import NotSupportedError, SlowHostCallWarning
from cuattn.launch import Executor, Kernel

__all__ = ["attention"]

SLOW_HOST_FLOPS = 1e11  # a NumPy call of more warns


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    scale: float | None = None,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    bias: Any = None,
    mask: Any = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    dropout_p: float = 0.0,
    dropout_seed: int = 0,
    dropout_offset: int = 0,
    diagonal_offset: Any = None,
    precision: str | None = None,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    fp8_format: str | None = None,
    out: Any = None,
    return_lse: bool = False,
) -> Any:
    """``softmax(scale * q k^T) v`` for every head, with the logits kept on chip.

    Parameters
    ----------
    q : array [batch, seqlen_q, heads, head_dim]; float16, bfloat16, float32 or float64
        NumPy arrays run on the host executor, CuPy arrays on the GPU. Any strides: pass a
        [batch, heads, seqlen, head_dim] array as its transposed view. An array whose last axis is not contiguous is
        copied; bases and strides that are multiples of 16 bytes are the fastest.
    k : array [batch, seqlen_k, kv_heads, head_dim], dtype of ``q``
    v : array [batch, seqlen_k, kv_heads, head_dim_v], dtype of ``q``
        ``heads`` is a multiple of ``kv_heads``: query head h reads key/value head h // (heads // kv_heads). Head dims
        are 1 to 256, and ``head_dim_v`` may differ from ``head_dim``.
    scale : float, optional
        Factor of the logits; 1 / sqrt(head_dim) by default.
    causal : {False, True, "bottom_right", "top_left"}
        Key j is visible to query i when j <= i + o, with o = seqlen_k - seqlen_q (True, "bottom_right": the last query
        sees the last key) or o = 0 ("top_left").
    out : array [batch, seqlen_q, heads, head_dim_v], dtype of ``q``, optional
        Where to write the result. It must not overlap an input.
    return_lse : bool
        Return also the log-sum-exp of the logits.
    window, softcap, bias, mask, alibi_slopes, sinks, diagonal_offset, dropout_p, dropout_seed, dropout_offset
        Not working yet: any value but the default raises `NotSupportedError`.
    precision, q_descale, k_descale, v_descale, fp8_format
        Likewise.

    Returns
    -------
    out : array [batch, seqlen_q, heads, head_dim_v], dtype of ``q``
        Accumulated in float32 (float64 for float64). A query that sees no key gives zeros.
    lse : array [batch, heads, seqlen_q], float32 (float64 for float64); only with ``return_lse``
        Natural logarithm of the sum of the exponentials of the logits; -inf for a query that sees no key.

    Raises
    ------
    ArrayTypeError
        An argument is no array, the arrays are not of one kind or not on one device, or ``out`` is read-only.
    DTypeError
        A dtype that is not in the list, or dtypes that differ.
    ShapeError
        A rank other than 4, extents that do not fit each other, a head dim outside of 1 to 256, heads that are no
        multiple of kv_heads.
    NonFiniteError
        A ``scale`` that is not finite.
    ArgumentError
        Another value of ``causal``, or a ``scale`` that is no number.
    OverlapError
        ``out`` lies in the memory range of an input.
    NotSupportedError
        An option that does not work yet.

    Warns
    -----
    SlowHostCallWarning
        Once, when a call with NumPy arrays takes more than 10^11 floating-point operations.

    References
    ----------
    Dao et al., "FlashAttention", 2022; Dao, "FlashAttention-2", 2023; Milakov and Gimelshein, "Online normalizer
    calculation for softmax", 2018; Rabe and Staats, "Self-attention does not need O(n²) memory", 2021.

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
    """
    if (
        not (
            window is softcap is bias is mask is alibi_slopes is sinks is diagonal_offset is precision is None
            and q_descale is k_descale is v_descale is fp8_format is None
        )
        or dropout_p != 0.0
        or dropout_seed != 0
        or dropout_offset != 0
    ):
        _refuse(
            window=window,
            softcap=softcap,
            bias=bias,
            mask=mask,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            diagonal_offset=diagonal_offset,
            precision=precision,
            q_descale=q_descale,
            k_descale=k_descale,
            v_descale=v_descale,
            fp8_format=fp8_format,
            dropout_p=dropout_p or None,
            dropout_seed=dropout_seed or None,
            dropout_offset=dropout_offset or None,
        )
    return evaluate(q, k, v, scale=scale, causal=causal, out=out, return_lse=return_lse)


def _refuse(**options: Any) -> None:
    names = ", ".join(name for name, value in options.items() if value is not None)
    raise NotSupportedError(f"attention does not support {names} yet; leave the default")


def evaluate(
    q: Any,
    k: Any,
    v: Any,
    *,
    scale: float | None = None,
    causal: bool | str = False,
    out: Any = None,
    return_lse: bool = False,
    config: FlashFwdConfig | PlainFwdConfig | None = None,
) -> Any:
    """`attention` with a kernel shape of one's own choice: validate, choose a config, allocate, launch."""
    problem = arguments.check(q, k, v, scale, causal, out)
    executor, extents, accumulator = problem.executor, problem.extents, problem.accumulator
    output = problem.output()
    lse = executor.empty(extents.lse_shape, accumulator) if return_lse else None
    if output.array.size:
        if executor.name == "host":
            _warn_if_slow(extents, problem.causal)
        q, k, v = (arguments.operand(executor, x) for x in (problem.q, problem.k, problem.v))
        dtype = output.array.dtype
        buckets = BUCKETS[extents.head_dim], BUCKETS[extents.head_dim_v]
        if config is None:
            config = select(dtype, *buckets, seqlen_q=extents.seqlen_q, smem_limit_bytes=executor.smem_limit_bytes)
        plan = _plan(executor, dtype, *buckets, problem.causal, q.aligned and k.aligned and v.aligned, config)
        num_q_blocks = -(-extents.seqlen_q // plan.block_m)
        grid = (extents.batch * extents.num_heads * num_q_blocks,)
        args = (
            *(q.array, k.array, v.array, output.array, lse),
            *(*q.strides, *k.strides, *v.strides, *output.strides),
            np.int32(extents.num_heads),
            np.int32(extents.heads_per_kv_head),
            np.int32(extents.seqlen_q),
            np.int32(extents.seqlen_k),
            np.int32(extents.head_dim),
            np.int32(extents.head_dim_v),
            np.int32(problem.diagonal_offset),
            accumulator(problem.scale * LOG2_E),
        )
        executor.launch(plan.kernel, grid, (plan.num_threads,), args, plan.smem_bytes)
    out = problem.deliver(output)
    if lse is None:
        return out
    executor.finish(lse)
    return out, lse


@dataclass(frozen=True, slots=True)
class _Plan:
    kernel: Kernel
    block_m: int
    num_threads: int
    smem_bytes: int


@cache
def _plan(
    executor: Executor,
    dtype: np.dtype[Any],
    head_dim: int,
    head_dim_v: int,
    causal: bool,
    aligned: bool,
    config: FlashFwdConfig | PlainFwdConfig,
) -> _Plan:
    """The loaded kernel of a config, for two buckets of head dims."""
    constants = config.constants(dtype.name, head_dim, head_dim_v, CAUSAL=causal, ALIGNED=aligned)
    kernel = executor.kernel(config.source, constants, config.entry)
    return _Plan(kernel, config.block_m, config.num_threads, config.smem_bytes(head_dim, head_dim_v))


_warned_slow = False


def _warn_if_slow(extents: Extents, causal: bool) -> None:
    """Say, once a process, that the host executor is no place for a problem of this size."""
    global _warned_slow
    pairs = extents.batch * extents.num_heads * extents.seqlen_q * extents.seqlen_k
    flops = 2.0 * pairs * (extents.head_dim + extents.head_dim_v) / (2 if causal else 1)
    if flops > SLOW_HOST_FLOPS and not _warned_slow:
        _warned_slow = True
        warnings.warn(
            "attention on NumPy arrays runs on the host executor, which interprets the kernel: the "
            f"{flops:.2g} floating-point operations of this call may take minutes; CuPy arrays run on the GPU",
            SlowHostCallWarning,
            stacklevel=4,
        )
