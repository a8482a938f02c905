"""When is attention to cached keys right? The rule of :mod:`cuattn.testing.tolerance`, sequence by sequence::

    |out - ref| <= 2 max|naive - ref| + 2 ulp(ref) + (u_P + u_V) (P |V|) + min((e^r - 1) (P |V|), h) + t |V|
    |lse - ref| <= r,    r = u_acc (4 (1 + max|s|) + sqrt(M) + e + log(f)) + u_acc (4 (1 + |lse|) + sqrt(M)) + c

* ``ref`` is the float64 reference of what the cache holds, exactly: codes times their scales, turned if asked;
* ``naive`` computes with what a kernel multiplies on chip: codes that a scale per slot has multiplied, and whatever has
  been rotated, rounded to the dtype of q; a scale per tensor or head enters logits and out in float32. Block scales
  round nothing: the product with a code of two bits is exact, except in float16 with "mxfp4", computed in float32;
* the second term of r is the merge of splits, always granted, for every number of splits must do: lse of a part is
  rounded where ``|lse|`` is, and so is its difference from the whole;
* ``c`` is what rounding K and q to 16 bits may move a logit. ``naive`` has errors of that kind, but a kernel that turns
  by an angle that differs in its last bit has others. Roundings are independent, half a unit at most and a quarter
  typically (0.41 u in the root mean square), so 3 u of the root of the sum of squares, ``scale |q k|_2``, are more than
  seven standard deviations; the sum of magnitudes bounds them in any case. In float32 the sum of magnitudes it is;
* ``u_V`` is the unit roundoff of the dtype of q where a scale per slot multiplies V, else 0.

Everything else is as there, a row that sees nothing exactly 0 included.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuattn import reference
from cuattn.reference.decode import CachedSequence, cached_sequences
from cuattn.reference.logits import heads_first
from cuattn.testing.means import what_logits_move
from cuattn.testing.rotary_tolerance import TRIGONOMETRIC_ROUNDINGS
from cuattn.testing.rounding import accumulation_dtype, to_numpy, ulp, unit_roundoff
from cuattn.testing.tolerance import (
    ToleranceError,
    assert_within,
    logit_errors,
    oracle_dtype,
    rounding_of_factor,
    row_error,
    smallest_probability,
    sum_of_kept,
)

__all__ = [
    "assert_decode_close",
    "assert_paged_close",
    "assert_paged_varlen_close",
    "decode_bounds",
    "on_chip_sequences",
]

Array = NDArray[Any]

#: Keywords of the calls that change how they compute and not what.
_HOW = ("num_splits", "plan", "workspace", "max_seqlen_q")


def _in_slots(options: dict[str, Any], name: str) -> bool:
    """Whether every slot of "k" or "v" has a scale of its own."""
    scale = options.get(f"{name}_scale")
    return scale is not None and np.ndim(scale) == 3


def on_chip_sequences(arrays: tuple[Any, ...], options: dict[str, Any], given: np.dtype[Any]) -> list[CachedSequence]:
    """Return the sequences as a kernel multiplies them on chip; scales per tensor or head stay behind as descales."""
    narrow = np.dtype(np.float32) if _wide(options, given) else given
    real = accumulation_dtype(given)
    num_kv_heads = np.shape(arrays[1])[2]
    left = dict(options)
    for name in "kv":
        scale = options.get(f"{name}_scale")
        if scale is not None and not _in_slots(options, name):
            left[f"{name}_scale"] = None
            left[f"{name}_descale"] = np.broadcast_to(np.asarray(scale, real), (1, num_kv_heads))

    def rounded(x: Array) -> Array:
        with np.errstate(over="ignore"):
            return np.asarray(x.astype(narrow).astype(real))

    parts = cached_sequences(*arrays, operand=rounded, dtype=real, **left)
    return [CachedSequence(p.where, p.q.astype(given), p.k, p.v.astype(narrow), p.options) for p in parts]


def _wide(options: dict[str, Any], given: np.dtype[Any]) -> bool:
    return given == np.float16 and getattr(options.get("kv_format"), "name", options.get("kv_format")) == "mxfp4"


def _rounding_of_logits(part: CachedSequence, options: dict[str, Any], given: np.dtype[Any]) -> Array:
    """Return the c of the rule for each logit, [1, H, N, M]."""
    turned = options.get("rope") is not None
    keys_turned = turned and bool(options.get("rotate_keys"))
    keys_rounded = keys_turned or _in_slots(options, "k")
    if not (turned or keys_rounded):
        return np.zeros((1, 1, 1, 1))
    scale = part.options.get("scale")
    scale = abs(1 / math.sqrt(part.q.shape[3]) if scale is None else scale)
    q, k = (np.abs(heads_first(x, part.q.shape[2], np.float64)) for x in (part.q, part.k))
    k = k.swapaxes(-1, -2)
    u = unit_roundoff(accumulation_dtype(given))
    # A pair (a, b) is turned with an error of so many units of |a| + |b|, at most sqrt(2) times the length of the pair;
    # summed over the pairs of both vectors, at most the product of their lengths, and of nothing turned the magnitudes.
    lengths = np.sqrt(np.square(q).sum(-1, keepdims=True) * np.square(k).sum(-2, keepdims=True))
    error = u * (2 + turned * (1 + keys_turned) * (2 + TRIGONOMETRIC_ROUNDINGS)) * math.sqrt(2) * lengths
    if given.itemsize == 2:
        num_rounded = turned + (keys_rounded and not _wide(options, given))
        typical = 3 * math.sqrt(num_rounded) * np.sqrt(np.square(q) @ np.square(k))
        error = error + unit_roundoff(given) * np.minimum(num_rounded * (q @ k), typical)
    return np.asarray(scale * error)


def _bound(exact: CachedSequence, on_chip: CachedSequence, options: dict[str, Any], given: np.dtype[Any]) -> Any:
    """Return (out, bound of out, lse, bound of lse) of one sequence, [1, N, H, E] and [1, H, N]."""
    oracle, real = oracle_dtype(given), accumulation_dtype(given)
    u = unit_roundoff(real)
    of_logits = {name: value for name, value in exact.options.items() if name != "sinks"}
    sinks, softcap = exact.options.get("sinks"), exact.options.get("softcap")
    out, lse = reference.attention(*exact[1:4], dtype=oracle, **exact.options)
    naive, _ = reference.attention_naive(*on_chip[1:4], **on_chip.options)

    logits, error = logit_errors(exact.q, exact.k, u, **of_logits)
    error = error + _rounding_of_logits(exact, options, given) / u
    row = row_error(logits, error, u, sinks=sinks, softcap=softcap) + 2 * math.sqrt(exact.k.shape[1])
    row = row + rounding_of_factor(given)
    row = u * (row + 4 * (1 + np.abs(np.where(np.isfinite(lse), lse, 0).astype(np.float64))))

    magnitudes = np.abs(exact.v).astype(np.float64)
    spread, _ = reference.attention(exact.q, exact.k, magnitudes, **exact.options)
    p = reference.probabilities(exact.q, exact.k, **exact.options)
    u_p = unit_roundoff(real if _wide(options, given) else given) * (1 + _in_slots(options, "v"))
    with np.errstate(invalid="ignore", over="ignore"):
        naive_error = np.abs(naive.astype(oracle) - out)
        naive_max = float(np.max(naive_error, where=np.isfinite(naive_error), initial=0.0))
        bound = 2 * naive_max + 2 * ulp(out, given)
        bound = bound + u_p * spread + what_logits_move(out, spread, row, *exact[1:4], **exact.options)
    bound = bound + smallest_probability(given) * sum_of_kept(p, magnitudes)
    p_sum = p.sum(axis=-1).swapaxes(1, 2)[..., None]
    return out, np.where(p_sum == 0, 0.0, bound), lse, row


def decode_bounds(arrays: tuple[Any, ...], options: dict[str, Any]) -> list[tuple[Any, Array, Array, Array, Array]]:
    """Yield for each sequence where it is, and the reference with its bounds: (out, bound, lse, bound).

    Args:
        arrays: q, k_pages, v_pages, block_tables, seqlens_k, and cu_seqlens_q for packed queries.
        options: those of :func:`cuattn.paged_attention`.
    """
    arrays = tuple(to_numpy(x) for x in arrays)
    options = {name: value for name, value in options.items() if name not in _HOW and value is not None}
    options.setdefault("causal", True)
    given = arrays[0].dtype
    exact = cached_sequences(*arrays, dtype=oracle_dtype(given), **options)
    pairs = zip(exact, on_chip_sequences(arrays, options, given), strict=True)
    return [(part.where, *_bound(part, on_chip, options, given)) for part, on_chip in pairs]


def _assert_close(
    out: Any, lse: Any, arrays: tuple[Any, ...], options: dict[str, Any], lse_of: Callable[[Any, Any], Any]
) -> None:
    q, v_pages = arrays[0], arrays[2]
    head_dim_v = v_pages.shape[-1] * (2 if options.get("v_block_scales") is not None else 1)
    if tuple(out.shape) != (*q.shape[:-1], head_dim_v):
        raise ToleranceError(f"out has shape {tuple(out.shape)}, expected {(*q.shape[:-1], head_dim_v)}")
    if out.dtype != q.dtype:
        raise ToleranceError(f"out has dtype {out.dtype}, expected that of q, {q.dtype}")
    if lse is not None:
        shape = (*q.shape[:-3], q.shape[-2], q.shape[-3])
        if tuple(lse.shape) != shape or lse.dtype != accumulation_dtype(q.dtype):
            expected = f"{accumulation_dtype(q.dtype)} {shape}"
            raise ToleranceError(f"lse is {lse.dtype} of shape {tuple(lse.shape)}, expected {expected}")
    got, got_lse = to_numpy(out), None if lse is None else to_numpy(lse)
    for b, (where, want, bound, want_lse, bound_lse) in enumerate(decode_bounds(arrays, options)):
        try:
            assert_within(got[where].reshape(want.shape), want, bound, "out")
            if got_lse is not None:
                assert_within(lse_of(got_lse, where).reshape(want_lse.shape), want_lse, bound_lse, "lse")
        except ToleranceError as error:
            raise ToleranceError(f"sequence {b} of length {int(to_numpy(arrays[4])[b])}: {error}") from None


def assert_paged_close(
    out: Any, q: Any, k_pages: Any, v_pages: Any, block_tables: Any, seqlens_k: Any, *, lse: Any = None, **options: Any
) -> None:
    """Assert that `out` [B, N, H, E] (and `lse` [B, H, N]) is :func:`cuattn.paged_attention` of the other arguments.

    Args:
        out, lse: what the kernel returned; lse is not checked when None.
        q, k_pages, v_pages, block_tables, seqlens_k: what it was given.
        options: its keywords.

    Raises:
        ToleranceError: naming the sequence, and the worst element, its index, values and bound.
    """
    arrays = q, k_pages, v_pages, block_tables, np.asarray(seqlens_k)
    _assert_close(out, lse, arrays, options, lambda x, where: x[where])


def assert_decode_close(
    out: Any, q: Any, k_cache: Any, v_cache: Any, seqlens_k: Any, *, lse: Any = None, **options: Any
) -> None:
    """:func:`assert_paged_close` for :func:`cuattn.decode_attention` and its contiguous caches.

    >>> x = np.ones((2, 3, 1, 4), np.float32)
    >>> assert_decode_close(np.ones((2, 1, 1, 4), np.float32), x[:, :1], x, x, [3, 1])
    """
    own_page = np.arange(k_cache.shape[0]).reshape(-1, 1)
    assert_paged_close(out, q, k_cache, v_cache, own_page, seqlens_k, lse=lse, **options)


def assert_paged_varlen_close(
    out: Any,
    q: Any,
    k_pages: Any,
    v_pages: Any,
    block_tables: Any,
    cu_seqlens_q: Any,
    seqlens_k: Any,
    *,
    lse: Any = None,
    **options: Any,
) -> None:
    """:func:`assert_paged_close` for :func:`cuattn.paged_attention_varlen`: out [T, H, E], lse [H, T]."""
    arrays = q, k_pages, v_pages, block_tables, np.asarray(seqlens_k), np.asarray(cu_seqlens_q)
    _assert_close(out, lse, arrays, options, lambda x, where: x[:, where])
