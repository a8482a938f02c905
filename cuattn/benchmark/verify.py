"""Is the thing that is about to be timed right? A quick answer, against float64, where the arrays are.

The tests apply the strict rule of `cuattn.testing.tolerance`. Here the question is only whether a wrong kernel, mask or
layout is being timed, for peers as well as for cuattn, and the answer may not take longer than the measurement:
``|out - ref| / |ref|`` over a sample of heads, in the Euclidean norm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from cuattn import reference
from cuattn.testing.backward_cases import BackwardCase, VarlenBackwardCase, gradients
from cuattn.testing.cases import AttentionCase, SoftmaxCase, VarlenCase
from cuattn.testing.rounding import to_numpy, unit_roundoff

MAX_ERROR_16_BIT = 8  # times the unit roundoff: probabilities and output are rounded once each, products add up
MAX_ERROR = 200  # times the unit roundoff, where sums of thousands of terms lose more than the output's rounding
SAMPLE_ROWS = 256
WHOLE_LOGITS = 1 << 21  # a problem with so many or fewer is looked at as a whole


class WrongResultError(AssertionError):
    """A result is too far from the float64 reference to be timed."""


def attention_error(case: AttentionCase, inputs: Mapping[str, Any], out: Any) -> float:
    """Relative error of `out`, [B, N, H, E], over blocks of rows of the first and the last head."""
    if not is_plain(case):
        return option_error(case, inputs, out)
    xp = np if isinstance(out, np.ndarray) else __import__("cupy")
    q, k, v = (inputs[name] for name in "qkv")
    heads, group = q.shape[2], q.shape[2] // k.shape[2]
    num_queries, num_keys = q.shape[1], k.shape[1]
    scale = 1 / math.sqrt(q.shape[3]) if case.scale is None else case.scale
    offset = 0 if case.causal == "top_left" else num_keys - num_queries
    rows = min(num_queries, SAMPLE_ROWS)
    wrong = right = 0.0
    for batch, head in {(0, 0), (q.shape[0] - 1, heads - 1)}:
        keys, values = (_float64(xp, x[batch, :, head // group]) for x in (k, v))
        for first in {0, (num_queries - rows) // 2, num_queries - rows}:
            block = slice(first, first + rows)
            logits = scale * (_float64(xp, q[batch, block, head]) @ keys.T)
            if case.causal:
                last_visible = xp.arange(first, first + rows)[:, None] + offset
                logits = xp.where(xp.arange(num_keys)[None, :] <= last_visible, logits, -xp.inf)
            p = xp.exp(logits - logits.max(axis=1, keepdims=True))
            expected = p @ values / p.sum(axis=1, keepdims=True)
            wrong += float(((_float64(xp, out[batch, block, head]) - expected) ** 2).sum())
            right += float((expected**2).sum())
    return math.sqrt(wrong / right) if right else math.sqrt(wrong)


def is_plain(case: AttentionCase) -> bool:
    """Whether a case has no option but a causal mask and a scale: what peers have as well."""
    return set(case.options) == {"causal", "scale"} and not (case.bias or case.mask or case.alibi or case.sinks)


def option_error(case: AttentionCase, inputs: Mapping[str, Any], out: Any) -> float:
    """Relative error of `out` with any option: by the reference, whatever it takes, over fewer rows."""
    wrong = right = 0.0
    for b, h, rows in case.samples():
        arrays, options = case.sample(inputs, b, h, rows)
        keywords: dict[str, Any] = {name: to_numpy(x) for name, x in arrays.items()} | options
        expected, _ = reference.attention(**keywords)
        got = to_numpy(out[b : b + 1, rows, h : h + 1]).astype(np.float64)
        wrong += float(((got - expected) ** 2).sum())
        right += float((expected**2).sum())
    return math.sqrt(wrong / right) if right else math.sqrt(wrong)


def varlen_error(case: VarlenCase, inputs: Mapping[str, Any], out: Any) -> float:
    """Relative error of `out`, [T, H, E], over packed sequences."""
    keywords: dict[str, Any] = {name: to_numpy(x) for name, x in inputs.items()} | case.options
    expected, _ = reference.attention_varlen(**keywords)
    return float(np.linalg.norm(to_numpy(out).astype(np.float64) - expected) / np.linalg.norm(expected))


def gradient_error(case: BackwardCase | VarlenBackwardCase, inputs: Mapping[str, Any], grads: Any) -> float:
    """The largest relative error of the gradients, against those of the saved out and lse; of a big problem, over
    parts of the first and the last key head, and of dq, dk and dv alone.
    """
    found = gradients(grads)
    errors: dict[str, list[tuple[float, float]]] = {}
    if isinstance(case, VarlenBackwardCase) or case.logits_bytes <= 4 * WHOLE_LOGITS:
        expected = _reference_gradients(case, inputs, case.options)
        for name, got in found.items():
            errors[name] = [_difference(got, getattr(expected, name))]
    else:
        for b, kv_head, queries, keys in case.samples():
            arrays, options = case.sample(inputs, b, kv_head, queries, keys)
            expected = _reference_gradients(case, arrays, options)
            group = arrays["q"].shape[2]
            heads, kv_heads = slice(kv_head * group, (kv_head + 1) * group), slice(kv_head, kv_head + 1)
            if keys == slice(0, case.forward.num_keys):
                part = _difference(found["dq"][b : b + 1, queries, heads], expected.dq)
                errors.setdefault("dq", []).append(part)
            if queries == slice(0, case.forward.seqlen_q):
                for name in ("dk", "dv"):
                    part = _difference(found[name][b : b + 1, keys, kv_heads], getattr(expected, name))
                    errors.setdefault(name, []).append(part)
    ratios = [
        math.sqrt(sum(wrong for wrong, _ in parts) / (sum(right for _, right in parts) or 1.0))
        for parts in errors.values()
    ]
    return max(ratios) if all(ratio == ratio for ratio in ratios) else math.nan


def _reference_gradients(case: Any, arrays: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    keywords: dict[str, Any] = {name: to_numpy(x) for name, x in arrays.items()} | dict(options)
    if isinstance(case, VarlenBackwardCase):
        return reference.attention_varlen_backward(**keywords)
    return reference.attention_backward(**keywords)


def _difference(got: Any, expected: Any) -> tuple[float, float]:
    """Squared Euclidean norms of the error and of what is right."""
    wide = to_numpy(got).astype(np.float64)
    return float(((wide - expected) ** 2).sum()), float((expected**2).sum())


def softmax_error(case: SoftmaxCase, inputs: Mapping[str, Any], out: Any) -> float:
    """Relative error of `out` over the first and last rows."""
    xp = np if isinstance(out, np.ndarray) else __import__("cupy")
    count = max(1, min(case.rows, 2**20 // case.columns))
    x = _float64(xp, xp.concatenate((inputs["x"][:count], inputs["x"][-count:])))
    got = _float64(xp, xp.concatenate((out[:count], out[-count:])))
    top = x.max(axis=-1, keepdims=True)
    total = xp.exp(x - top).sum(axis=-1, keepdims=True)
    if case.kind == "logsumexp":
        expected = (top + xp.log(total))[..., 0]
    elif case.kind == "log_softmax":
        expected = x - top - xp.log(total)
    else:
        expected = xp.exp(x - top) / total
    return math.sqrt(float(((got - expected) ** 2).sum()) / float((expected**2).sum()))


def require(error: float, dtype: str) -> None:
    """Raise `WrongResultError` if a relative error is too large for results of `dtype`; so does a NaN."""
    factor = MAX_ERROR_16_BIT if np.dtype(dtype).itemsize == 2 else MAX_ERROR
    bound = factor * unit_roundoff(np.dtype(dtype))
    if not error <= bound:
        raise WrongResultError(f"relative error {error:.3g} against float64, allowed is {bound:.3g} for {dtype}")


def _float64(xp: Any, x: Any) -> Any:
    if x.dtype.name == "bfloat16":  # by way of float32, which array modules convert it to
        x = x.astype(np.float32)
    return x.astype(xp.float64)
