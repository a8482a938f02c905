"""When is differential attention right? When its two softmaxes are, and their difference loses nothing more.

With b1 and b2 the bounds of :mod:`cuattn.testing.tolerance` for the two attentions, without the 2 ulp that a rounded
result may have there, and u the unit roundoff of the sums::

    |o - ref| <= b = b1 + |lambda| b2 + 2 u (|out1| + |lambda out2|)        o = out1 - lambda out2

A norm divides by s = sqrt(mean(o^2) + eps), which moves by at most ``mean(|o| b) / s + mean(b^2) / s``, and never by
more than sqrt(mean(b^2)); so that o / s moves by ``b / s`` and by ``|o| / s`` times what s moves, relative to it. To
which 8 u (1 + sqrt(E)) of the result is added for the operations themselves, and 2 ulp of the result, which is rounded
once.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuattn import reference
from cuattn.testing.rounding import accumulation_dtype, to_numpy, ulp, unit_roundoff
from cuattn.testing.tolerance import assert_lse_close, assert_within, attention_bound, oracle_dtype

__all__ = ["assert_decoded_close", "assert_differential_close", "differential_bound"]

Array = NDArray[Any]


def differential_bound(
    q: Any,
    k: Any,
    v: Any,
    lambda_: Any,
    *,
    norm: bool = False,
    norm_weight: Any = None,
    eps: float = 1e-5,
    output_scale: float = 1.0,
    rounded: bool = False,
    **options: Any,
) -> tuple[Array, Array]:
    """Return the reference [B, N, H, E] and what a result may be away from it; as `cuattn.differential_attention`.

    `rounded`: the two attentions are rounded before their difference is taken.
    """
    dtype = to_numpy(q).dtype
    oracle, u = oracle_dtype(dtype), unit_roundoff(accumulation_dtype(dtype))
    lam = np.asarray(to_numpy(lambda_) if hasattr(lambda_, "shape") else lambda_).astype(accumulation_dtype(dtype))
    outs, bounds = [], []
    for stream in reference.differential_streams(*(to_numpy(x) for x in (q, k, v)), **options):
        out, bound, _, _ = attention_bound(stream.q, stream.k, stream.v, **stream.options)
        outs.append(out)
        bounds.append(bound if rounded else np.maximum(bound - 2 * ulp(out, dtype), 0))
    of_norm: dict[str, Any] = {"norm": norm, "norm_weight": norm_weight, "eps": eps, "output_scale": output_scale}
    expected = reference.differential_combine(outs[0], outs[1], lam, dtype=oracle, **of_norm)
    factor = np.abs(lam.astype(oracle))[..., None]
    bound = bounds[0] + factor * bounds[1] + 2 * u * (np.abs(outs[0]) + factor * np.abs(outs[1]))
    scale = abs(output_scale)
    if norm:
        o = outs[0] - lam.astype(oracle)[..., None] * outs[1]
        s = np.sqrt(np.mean(np.square(o), axis=-1, keepdims=True) + eps)
        moved = np.sqrt(np.mean(np.square(bound), axis=-1, keepdims=True))
        moved = np.minimum(
            moved, (np.mean(np.abs(o) * bound, axis=-1, keepdims=True) + moved**2) / np.maximum(s, 1e-300)
        )
        least = np.maximum(s - moved, math.sqrt(eps))  # s is never below that
        with np.errstate(divide="ignore", invalid="ignore"):
            bound = np.where(moved > 0, bound / least + np.abs(o) / np.maximum(s, 1e-300) * moved / least, 0)
        scale = scale * (1 if norm_weight is None else np.abs(to_numpy(norm_weight).astype(oracle)))
    bound = bound * scale + 8 * u * (1 + math.sqrt(expected.shape[-1])) * np.abs(expected)
    return expected, np.where(bound == 0, 0.0, bound + 2 * ulp(expected, dtype))


def assert_differential_close(
    out: Any, q: Any, k: Any, v: Any, lambda_: Any, *, state: Any = None, **options: Any
) -> None:
    """Assert that `out` (and `state`) is the differential attention of q, k, v under the rule at the top of this file.

    Args:
        out: what the kernel returned, [B, N, H, E], of the dtype of q.
        q, k, v, lambda_: what the kernel was given, exactly.
        state: what it returned beside, lse [B, H, 2, N], out1 and out2; not checked when None.
        options: those of :func:`cuattn.differential_attention`.

    Raises:
        ToleranceError: naming the worst element, its index, values and bound.
    """
    assert out.dtype == to_numpy(q).dtype, out.dtype
    expected, bound = differential_bound(q, k, v, lambda_, **options)
    assert_within(out, expected, bound, "out")
    if state is None:
        return
    of_logits = {name: x for name, x in options.items() if name not in ("norm", "norm_weight", "eps", "output_scale")}
    streams = reference.differential_streams(*(to_numpy(x) for x in (q, k, v)), **of_logits)
    for s, (stream, saved) in enumerate(zip(streams, (state.out1, state.out2), strict=True)):
        assert saved.dtype == to_numpy(q).dtype, saved.dtype
        out_of_stream, bound_of_stream, _, _ = attention_bound(stream.q, stream.k, stream.v, **stream.options)
        assert_within(saved, out_of_stream, bound_of_stream, f"out{s + 1}")
        own = {name: x for name, x in stream.options.items() if not name.startswith("dropout_")}
        assert_lse_close(to_numpy(state.lse)[:, :, s], stream.q, stream.k, **own)


def assert_decoded_close(
    out: Any, q: Any, k_cache: Any, v_cache: Any, lambda_: Any, seqlens_k: Any, **options: Any
) -> None:
    """Assert that `out` is the differential attention of each sequence of a contiguous cache, under the same rule.

    The two attentions are rounded before their difference is taken: they may be 2 ulp away more, each.

    Args:
        out: what the kernels returned, [B, N, H, E].
        q, k_cache, v_cache, lambda_, seqlens_k: what they were given, exactly.
        options: those of :func:`cuattn.differential_decode` but for splits and pages.

    Raises:
        ToleranceError: naming the worst element of a sequence, its values and bound.
    """
    queries, keys, values = (to_numpy(x) for x in (q, k_cache, v_cache))
    options = {"causal": True, **options}
    for b, length in enumerate(seqlens_k):
        of_sequence = queries[b : b + 1], keys[b : b + 1, :length], values[b : b + 1, :length]
        lam = np.asarray(lambda_)
        lam = lam[b : b + 1] if lam.ndim == 3 else lam
        expected, bound = differential_bound(*of_sequence, lam, rounded=True, **options)
        assert_within(out[b : b + 1], expected, bound, f"out of sequence {b}")
