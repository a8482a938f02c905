"""Attention over a union of disjoint sets of keys, merged from the attention over each set.

M. Milakov and N. Gimelshein, "Online normalizer calculation for softmax", 2018 (arXiv:1805.02867); T. Dao et al.,
"Flash-Decoding for long-context inference", 2023; Z. Ye et al., "Cascade inference: memory bandwidth efficient shared
prefix batch decoding", 2024 (FlashInfer).
"""

from __future__ import annotations

from typing import Any

from cuattn.ops.merge.arguments import MergeProblem, check
from cuattn.ops.merge.launch import launch, usable
from cuattn.runtime.arrays import assign, contiguous
from cuattn.runtime.executor import Executor
from cuattn.typing import ArrayT, LseT

__all__ = ["merge_states"]


def merge_states(
    out_a: ArrayT,
    lse_a: LseT,
    out_b: ArrayT | None = None,
    lse_b: LseT | None = None,
    /,
    *,
    sinks: Any = None,
    out: tuple[Any, LseT] | None = None,
) -> tuple[ArrayT, LseT]:
    """Merge the attention over disjoint sets of keys into the attention over all of them.

    Two forms::

        merge_states(out_a, lse_a, out_b, lse_b)    two parts
        merge_states(outs, lses)                    S parts, along a new first axis

    ``lse = log(Σ e^lse_s)``, ``out = Σ e^(lse_s - lse)·out_s``: associative and commutative within rounding, and
    two parts give the same bits in either order. An lse is one float, exact to 2^-24 of its size: from about 10^7 on
    weights lose what it does not say, and parts whose lse differ in less than the last bit weigh the same. A part
    with lse -inf saw no key and changes nothing; its out is not read, NaN or not. Where every part is empty, out = 0
    and lse = -inf (with a sink: lse = sink). A NaN or +inf lse makes its row NaN in both results. One launch, whatever
    S is.

    Parameters
    ----------
    out_a, out_b : array [B, N, H, E] or [T, H, E]; float16, bfloat16, float32 or float64
        Attention over each set of keys. Any strides; a last axis that is not contiguous is copied. Rows at multiples
        of 16 bytes are the fastest.
    lse_a, lse_b : array [B, H, N] or [H, T]; float32 (float64 for float64)
        The natural-log sum-exp of each, without the sink. Any strides.
    outs, lses : array [S, B, N, H, E] or [S, T, H, E], and [S, B, H, N] or [S, H, T]
        The same of S parts; S may be 0.
    sinks : array [H] of a float dtype, optional
        One more logit a head, in the denominator only. It enters once: give it to the last merge.
    out : pair of arrays, optional
        (out, lse) of the shapes and dtypes of the result, for no allocation. They may be ``(out_a, lse_a)``, or the
        first of ``outs`` and ``lses``, themselves: then the merge is in place. Of float32 parts, out may also be
        float16 or bfloat16.

    Returns
    -------
    out : array [B, N, H, E] or [T, H, E], dtype of the parts
        Accumulated in float32 (float64 for float64).
    lse : array [B, H, N] or [H, T], float32 (float64 for float64)
        Of the union, the sink included.

    Raises
    ------
    ArrayTypeError
        An argument is no array, or they are not all of one kind.
    DTypeError, ShapeError
        Dtypes or shapes that are not allowed, or do not fit each other.
    ArgumentError
        ``out_b`` without ``lse_b``, or an ``out`` that is no pair.
    OverlapError
        A result overlaps an input (and is not the first part), or the other result.

    References
    ----------
    Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018 (arXiv:1805.02867).

    Examples
    --------
    >>> import numpy as np
    >>> import cuattn
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 8, 2, 16)).astype(np.float32)
    >>> parts = [cuattn.attention(q, k[:, i], v[:, i], return_lse=True) for i in (slice(0, 3), slice(3, 8))]
    >>> out, lse = cuattn.merge_states(*parts[0], *parts[1])
    >>> bool(np.allclose(out, cuattn.attention(q, k, v), atol=1e-6))
    True
    """
    return _evaluate(check(out_a, lse_a, out_b, lse_b, sinks, out))


def _evaluate(problem: MergeProblem) -> tuple[Any, Any]:
    executor, first = problem.executor, problem.first
    if problem.out is not None:
        results = problem.out
    else:
        results = executor.empty(problem.shape, first[0].dtype), executor.empty(problem.lse_shape, first[1].dtype)
    if not results[1].size:
        return results
    parts = [_usable(executor, pair) for pair in (first, problem.rest)]
    # What a kernel cannot write is written to a new array, and copied.
    targets = [x if usable(x, i == 0) else executor.empty(x.shape, x.dtype) for i, x in enumerate(results)]
    launch(executor, parts[0], parts[1], problem.num_parts, problem.sinks, (targets[0], targets[1]))
    for result, target in zip(results, targets, strict=True):
        if problem.out is None:
            executor.finish(result)
        elif target is not result:
            executor.finish(target)
            assign(executor, result, target)
    return results


def _usable(executor: Executor, pair: tuple[Any, Any]) -> tuple[Any, Any]:
    """Return (out, lse) of parts, as copies where a kernel cannot take them."""
    out, lse = (x if usable(x, i == 0) else contiguous(executor, x) for i, x in enumerate(pair))
    return out, lse
