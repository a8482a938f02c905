"""Strided attention: every stride-th key, and those near by, without a mask and without the work for other keys.

Rewon Child, Scott Gray, Alec Radford and Ilya Sutskever, "Generating long sequences with sparse transformers", 2019
(arXiv:1904.10509).
"""

from __future__ import annotations

from typing import Any, Literal, overload

import numpy as np

from cuattn.dtypes import BFLOAT16
from cuattn.errors import DTypeError
from cuattn.ops.attention import arguments
from cuattn.ops.attention.arguments import Problem
from cuattn.ops.attention.backward import arguments as backward_arguments
from cuattn.ops.attention.backward.dense import AttentionGrads, attention_backward
from cuattn.ops.attention.dense import attention
from cuattn.ops.attention.slow_calls import BACKWARD_FLOPS, warn_if_slow
from cuattn.ops.merge.states import merge_states
from cuattn.ops.sparse.strided_parts import Group, Layer, layers, lse_view, mergeable, usable, view
from cuattn.runtime.arrays import assign
from cuattn.runtime.executor import Executor
from cuattn.scalars import MAX_EXTENT, check_flag, integer
from cuattn.typing import ArrayT, Causal, Precision

__all__ = ["strided_attention", "strided_attention_backward"]


@overload
def strided_attention(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    stride: int,
    *,
    local: int | None = ...,
    causal: Causal = ...,
    scale: float | None = ...,
    softcap: float | None = ...,
    precision: Precision | None = ...,
    out: ArrayT | None = ...,
    return_lse: Literal[False] = ...,
) -> ArrayT: ...
@overload
def strided_attention(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    stride: int,
    *,
    local: int | None = ...,
    causal: Causal = ...,
    scale: float | None = ...,
    softcap: float | None = ...,
    precision: Precision | None = ...,
    out: ArrayT | None = ...,
    return_lse: Literal[True],
) -> tuple[ArrayT, ArrayT]: ...
@overload
def strided_attention(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    stride: int,
    *,
    local: int | None = ...,
    causal: Causal = ...,
    scale: float | None = ...,
    softcap: float | None = ...,
    precision: Precision | None = ...,
    out: ArrayT | None = ...,
    return_lse: bool,
) -> ArrayT | tuple[ArrayT, ArrayT]: ...
def strided_attention(
    q: Any,
    k: Any,
    v: Any,
    stride: int,
    *,
    local: int | None = None,
    causal: Causal = True,
    scale: float | None = None,
    softcap: float | None = None,
    precision: Precision | None = None,
    out: Any = None,
    return_lse: bool = False,
) -> Any:
    """Attention of each query to every ``stride``-th key before it, and to those less than ``local`` away.

    With a = i + seqlen_k - seqlen_q, the key that query i is aligned with, key j is visible if a - j is a multiple of
    ``stride``, or |a - j| < ``local``; and with ``causal``, if j <= a. The work is that of the visible keys: tokens a
    stride apart are taken for a sequence of their own, whose heads lie beside those of the other residues in a view of
    q, k and v, and the window of ``local`` keys is one more call. Nothing of seqlen_q x seqlen_k is made.

    Parameters
    ----------
    q : array [batch, seqlen_q, heads, head_dim]; float16, bfloat16, float32 or float64
        NumPy arrays run on the host executor, CuPy arrays on the GPU. Any strides; an array whose heads do not follow
        each other from token to token (a [batch, heads, seqlen, head_dim] array, a part of packed q, k and v) is
        copied.
    k : array [batch, seqlen_k, kv_heads, head_dim], dtype of ``q``
    v : array [batch, seqlen_k, kv_heads, head_dim_v], dtype of ``q``
        As for `cuattn.attention`.
    stride : int, at least 1
        Any; no length has to be a multiple of it.
    local : int, optional
        Keys of the window, the one that the query is aligned with included; None or 0 is no window.
    causal : {True, False, "bottom_right", "top_left"}
        As for `cuattn.attention`; "top_left" has a = i.
    scale, softcap, precision
        As for `cuattn.attention`.
    out : array [batch, seqlen_q, heads, head_dim_v], dtype of ``q``, optional
        Where to write the result. It must not overlap an input.
    return_lse : bool
        Return also the log-sum-exp of the logits.

    Returns
    -------
    out : array [batch, seqlen_q, heads, head_dim_v], dtype of ``q``
        A query that sees no key gives zeros. With ``local``, the attention to the window and to the keys farther away
        are merged, each rounded to the dtype of ``q``.
    lse : array [batch, heads, seqlen_q], float32 (float64 for float64); only with ``return_lse``

    Raises
    ------
    ArrayTypeError, DTypeError, ShapeError, NonFiniteError, ArgumentError, OverlapError
        As for `cuattn.attention`; ArgumentError also for a ``stride`` below 1 or a ``local`` below 0.

    References
    ----------
    Child et al., "Generating long sequences with sparse transformers", 2019 (arXiv:1904.10509).

    Examples
    --------
    >>> import numpy as np
    >>> import cuattn
    >>> q = np.zeros((1, 6, 1, 32), np.float32)
    >>> v = np.arange(6, dtype=np.float32).reshape(1, 6, 1, 1)
    >>> cuattn.strided_attention(q, q, v, 3)[0, :, 0, 0]  # the last: of keys 2 and 5
    array([0. , 1. , 2. , 1.5, 2.5, 3.5], dtype=float32)
    >>> cuattn.strided_attention(q, q, v, 3, local=2)[0, 5, 0, 0]  # and of key 4
    np.float32(3.6666667)
    """
    check_flag("return_lse", return_lse)
    shared: dict[str, Any] = {"scale": scale, "softcap": softcap, "precision": precision}
    problem = arguments.check(q, k, v, out=out, causal=causal, **shared)
    _refuse_formats(problem.dtype)
    found = _layers(problem, stride, local, causal, shared)
    warn_if_slow(problem, pairs=_pairs(found, problem.extents.batch))
    executor, extents = problem.executor, problem.extents
    operands = [usable(executor, x) for x in (problem.q, problem.k, problem.v)]
    with_lse = return_lse or len(found) > 1
    result = problem.out if problem.out is not None and mergeable(problem.out) else None
    if result is None:
        result = executor.empty(extents.out_shape, problem.dtype)
    lse = _forward(problem, found[0], operands, result, with_lse)
    if result is not problem.out:
        executor.finish(result)
    for layer in found[1:]:
        part = executor.empty(extents.out_shape, problem.dtype)
        part_lse = _forward(problem, layer, operands, part, True)
        executor.finish(part)
        merge_states(result, lse, part, part_lse, out=(result, lse))
    if problem.out is not None and result is not problem.out:
        assign(executor, problem.out, result)
        result = problem.out
    return (result, lse) if return_lse else result


def strided_attention_backward(
    dout: ArrayT,
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    out: ArrayT,
    lse: Any,
    stride: int,
    *,
    local: int | None = None,
    causal: Causal = True,
    scale: float | None = None,
    softcap: float | None = None,
    precision: Precision | None = None,
    dlse: Any = None,
    deterministic: bool = True,
    dq: ArrayT | None = None,
    dk: ArrayT | None = None,
    dv: ArrayT | None = None,
) -> AttentionGrads[ArrayT]:
    """Gradients of ``(out * dout).sum() + (lse * dlse).sum()``, ``out, lse = strided_attention(q, k, v, stride, ...)``.

    The same calls as forward makes, each with the out and lse of the whole, whose gradients are added.

    Parameters
    ----------
    dout : array [batch, seqlen_q, heads, head_dim_v], dtype of ``q``
    q, k, v : arrays as for `cuattn.strided_attention`, with head dims from 1 to 256
    out : array [batch, seqlen_q, heads, head_dim_v], dtype of ``q``
    lse : array [batch, heads, seqlen_q], float32 (float64 for float64)
        As `cuattn.strided_attention` returned them.
    stride, local, causal, scale, softcap, precision
        As they were there.
    dlse : array [batch, heads, seqlen_q], float32 (float64 for float64), optional
        Gradient of ``lse``; 0 by default.
    deterministic : bool
        As for `cuattn.attention_backward`.
    dq, dk, dv : array, shape and dtype of ``q``, ``k`` and ``v``, optional
        Where to write the gradients.

    Returns
    -------
    AttentionGrads(dq, dk, dv, dbias=None, dsinks=None)
        With ``local``, each a sum of parts that are rounded to the dtype of ``q``.

    Raises
    ------
    ArrayTypeError, DTypeError, ShapeError, NonFiniteError, ArgumentError, OverlapError
        As for `cuattn.attention_backward`; ArgumentError also for a ``stride`` below 1 or a ``local`` below 0.

    References
    ----------
    Child et al., "Generating long sequences with sparse transformers", 2019 (arXiv:1904.10509).

    Examples
    --------
    >>> import numpy as np
    >>> import cuattn
    >>> q = np.zeros((1, 4, 1, 32), np.float32)
    >>> v = np.arange(4, dtype=np.float32).reshape(1, 4, 1, 1)
    >>> out, lse = cuattn.strided_attention(q, q, v, 2, return_lse=True)
    >>> cuattn.strided_attention_backward(np.ones_like(out), q, q, v, out, lse, 2).dv[0, :, 0, 0]
    array([1.5, 1.5, 0.5, 0.5], dtype=float32)
    """
    shared: dict[str, Any] = {"scale": scale, "softcap": softcap, "precision": precision}
    targets: dict[str, Any] = {"dq": dq, "dk": dk, "dv": dv}
    problem = backward_arguments.check(
        dout, q, k, v, out, lse, causal=causal, dlse=dlse, deterministic=deterministic, **shared, **targets
    )
    forward, executor = problem.forward, problem.executor
    found = _layers(forward, stride, local, causal, shared)
    warn_if_slow(forward, work=BACKWARD_FLOPS, pairs=_pairs(found, forward.extents.batch))
    inputs = [usable(executor, x) for x in (problem.dout, forward.q, forward.k, forward.v, problem.out)]
    given = [problem.dq, problem.dk, problem.dv]
    like = forward.q, forward.k, forward.v
    sums: list[Any] = [
        x if x is not None and mergeable(x) else executor.empty(y.shape, y.dtype)
        for x, y in zip(given, like, strict=True)
    ]
    for number, layer in enumerate(found):
        parts = [executor.empty(x.shape, x.dtype) for x in like] if number else sums
        for group in layer.groups:
            _backward(executor, group, inputs, problem.lse, problem.dlse, parts, problem.deterministic)
        for i, part in enumerate(parts):
            if part is not given[i]:
                executor.finish(part)
            if number:
                _add(executor, sums[i], part)
    for i, x in enumerate(given):
        if x is not None and x is not sums[i]:
            assign(executor, x, sums[i])
            sums[i] = x
    return AttentionGrads(*sums)


def _refuse_formats(dtype: np.dtype[Any]) -> None:
    if dtype.itemsize == 1:
        raise DTypeError(f"q has dtype {dtype}; strided attention takes float16, bfloat16, float32 and float64")


def _layers(problem: Problem, stride: Any, local: Any, causal: Any, shared: dict[str, Any]) -> list[Layer]:
    stride = integer("stride", stride, 1, MAX_EXTENT)
    local = None if local is None else integer("local", local, 0, MAX_EXTENT, optional=True)
    n, m = problem.extents.seqlen_q, problem.extents.seqlen_k
    shift = 0 if isinstance(causal, str) and causal == "top_left" else m - n
    return layers(n, m, shift, stride, local, causal=bool(causal), shared=shared)


def _pairs(found: list[Layer], batch: int) -> float:
    """Return an upper bound of the pairs of a query and a key that the calls look at."""
    pairs = 0.0
    for layer in found:
        for group in layer.groups:
            left, right = group.options.get("window") or (None, None)
            width = group.rows_k if left is None or right is None else min(group.rows_k, left + right + 1)
            pairs += float(batch) * group.count * group.rows_q * width
    return pairs


def _forward(problem: Problem, layer: Layer, operands: list[Any], out: Any, with_lse: bool) -> Any:
    """Write the attention to the keys of a layer to ``out``; returns its lse, or None if it is not asked for."""
    executor, lse = problem.executor, None
    q, k, v = operands
    if with_lse and not layer.is_whole:
        with executor.on_device():
            lse = executor.xp.empty(problem.extents.lse_shape, problem.accumulator)
    for group in layer.groups:
        if layer.is_whole or group.rows_q:
            result = attention(
                view(executor, q, group.start_q, group.rows_q, group),
                view(executor, k, group.start_k, group.rows_k, group),
                view(executor, v, group.start_k, group.rows_k, group),
                out=view(executor, out, group.start_q, group.rows_q, group),
                return_lse=with_lse,
                **group.options,
            )
            if lse is not None:
                target = lse_view(executor, lse, group)
                assign(executor, target, result[1].reshape(target.shape))
            elif with_lse:
                lse = result[1]
    return lse


def _backward(
    executor: Executor, group: Group, inputs: list[Any], lse: Any, dlse: Any, targets: list[Any], deterministic: bool
) -> None:
    """Write the gradients of one call; ``inputs`` are dout, q, k, v and out."""

    def of_queries(x: Any) -> Any:
        return view(executor, x, group.start_q, group.rows_q, group)

    def of_keys(x: Any) -> Any:
        return view(executor, x, group.start_k, group.rows_k, group)

    def of_rows(x: Any) -> Any:
        if x is None or group.stride == 1:
            return x
        with executor.on_device():
            return lse_view(executor, x, group).reshape(x.shape[0], group.count * x.shape[1], group.rows_q)

    dout, q, k, v, out = inputs
    attention_backward(
        of_queries(dout),
        of_queries(q),
        of_keys(k),
        of_keys(v),
        of_queries(out),
        of_rows(lse),
        dlse=of_rows(dlse),
        deterministic=deterministic,
        dq=of_queries(targets[0]),
        dk=of_keys(targets[1]),
        dv=of_keys(targets[2]),
        **group.options,
    )


def _add(executor: Executor, total: Any, part: Any) -> None:
    """Add ``part`` to ``total``, with one rounding."""
    with executor.on_device():
        if total.dtype == BFLOAT16:  # array modules convert it, and do not all compute with it
            total[...] = (total.astype(np.float32) + part.astype(np.float32)).astype(BFLOAT16)
        else:
            total += part
