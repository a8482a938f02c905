"""When is a rotation right? Element by element, by the roundings that a kernel has to make::

    |out - ref| <= u (2 + t) (|a| + |b|) g + p + ulp(out) / 2

* ``ref`` is :func:`cuattn.reference.rope` in float64 (``longdouble`` for float64) of the very inputs, (a, b) the pair
  that the element belongs to, u the unit roundoff of the arithmetic (2^-24 or 2^-53);
* a cos - b sin is one product and one fused sum: 2 u of what they add up, which is at most ``(|a| + |b|) g`` with g the
  largest cosine or sine (1 unless a table says otherwise);
* t is what cosine and sine are off by, in units of u: 0 for tables, which are taken as they are. Computed, the angle
  (below pi/4 after whole quarters are taken off) carries 2.5 roundings: of the conversion, of pi/2 as a constant, of
  their product. That moves sine and cosine by 2.5 u y cos(y) <= 1.4 u; the series adds 0.6 u, its last sum 0.5 u;
* p is what 64 (128) bits of a frequency leave of a turn: ``2^-62 |position|`` (``2^-126``) times ``|a| + |b|``;
* a bias is added before, one more u;
* half an ulp, where the result is rounded to 16 bits; in float32 and float64 that is in the 2 u already. Denormals in
  the arithmetic lose another unit of theirs.

Elements that are not turned, and get no bias, must be equal.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuattn import reference
from cuattn.testing.rounding import accumulation_dtype, to_numpy, ulp, unit_roundoff
from cuattn.testing.tolerance import assert_within

__all__ = ["TRIGONOMETRIC_ROUNDINGS", "assert_rope_close", "assert_split_qkv_close", "rope_bound"]

#: What a computed cosine or sine may be off by, in units of the unit roundoff.
TRIGONOMETRIC_ROUNDINGS = 2.5


def _oracle(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(np.longdouble if dtype == np.float64 else np.float64)


def rope_bound(
    x: Any, positions: Any, dtype: np.dtype[Any], *, roundings: float = 0, **options: Any
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the reference and what a result of `dtype` may be away from it; `roundings` of x itself, in u."""
    oracle = _oracle(dtype)
    u = unit_roundoff(accumulation_dtype(dtype))
    expected = reference.rope(x, positions, dtype=oracle, **options)
    # The sum of the magnitudes of a pair, in both its places: turned by a table of 45 degrees without the square root.
    tables = {name: options[name] for name in ("cos", "sin") if options.get(name) is not None}
    rotary_dim = options.get("rotary_dim") or (2 * tables["cos"].shape[1] if tables else x.shape[-1])
    one, places = np.ones((1, rotary_dim // 2)), np.zeros(np.shape(positions), int)
    interleaved = options.get("interleaved", False)
    turned = np.abs(x.astype(oracle))
    plus = reference.rope(turned, places, cos=one, sin=one, interleaved=interleaved, dtype=oracle)
    minus = reference.rope(turned, places, cos=one, sin=-one, interleaved=interleaved, dtype=oracle)
    pair = np.maximum(plus, minus)
    pair[..., rotary_dim:] = 0
    error = (2 + roundings) * u * pair
    if tables:
        error = error * max(float(np.max(np.abs(to_numpy(table)), initial=0)) for table in tables.values())
    else:
        lost = 2.0 ** (-126 if dtype == np.float64 else -62)
        far = np.abs(np.asarray(positions).astype(np.float64)) * lost
        error = error + (TRIGONOMETRIC_ROUNDINGS * u + far[..., None, None]) * pair
    error = error + roundings * u * np.abs(x).astype(np.float64)
    return expected, _with_last_rounding(expected, error, dtype)


def _with_last_rounding(expected: NDArray[Any], error: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    # Two roundings of denormals in the arithmetic: bfloat16 has no larger ones than float32.
    bound = error + ulp(0.0, accumulation_dtype(dtype))
    if dtype.itemsize == 2:
        bound = bound + ulp(np.abs(expected) + bound, dtype) / 2
    return np.where(error == 0, 0.0, bound)


def assert_rope_close(out: Any, x: Any, positions: Any, **options: Any) -> None:
    """Assert that `out` is :func:`cuattn.rope` of `x`; `options` are its keywords.

    >>> from cuattn import reference
    >>> x = np.ones((2, 1, 4), np.float32)
    >>> assert_rope_close(reference.rope(x, [0, 5]).astype(np.float32), x, [0, 5])
    """
    values = to_numpy(x)
    assert out.dtype == values.dtype, f"out has dtype {out.dtype}, expected {values.dtype}, the dtype of x"
    options = {name: to_numpy(value) if name in ("cos", "sin") else value for name, value in options.items()}
    expected, bound = rope_bound(values, to_numpy(positions), values.dtype, **options)
    assert_within(out, expected, bound, "out")


def assert_split_qkv_close(
    outs: Any,
    qkv: Any,
    bias: Any = None,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    rope: dict[str, Any] | None = None,
    positions: Any = None,
    cu_seqlens: Any = None,
    plan: Any = None,
) -> None:
    """Assert that `outs` is :func:`cuattn.split_qkv` of the other arguments; `rope` holds the fields of its Rotary."""
    values, dtype = to_numpy(qkv), to_numpy(qkv).dtype
    parts = reference.split_qkv(
        values,
        None if bias is None else to_numpy(bias),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        dtype=_oracle(dtype),
    )
    if rope is not None and positions is None:
        starts = to_numpy(cu_seqlens if plan is None else plan.cu_seqlens)
        positions = np.concatenate([np.arange(n) for n in np.diff(starts)]).astype(int)
    for name, out, part in zip("qkv", outs, parts, strict=True):
        roundings = 0 if bias is None else 1
        if rope is not None and name != "v":
            expected, bound = rope_bound(part, to_numpy(positions), dtype, roundings=roundings, **rope)
        else:
            error = roundings * unit_roundoff(accumulation_dtype(dtype)) * np.abs(part)
            expected, bound = part, _with_last_rounding(part, error, dtype)
        if plan is not None:
            expected, bound = (_padded(array, plan) for array in (expected, bound))
        assert out.dtype == dtype, f"{name} has dtype {out.dtype}, expected {dtype}"
        assert_within(out, expected, bound, name)


def _padded(x: NDArray[Any], plan: Any) -> NDArray[Any]:
    rows = np.zeros((plan.batch * plan.seqlen, *x.shape[1:]), x.dtype)
    rows[to_numpy(plan.indices)] = x
    return rows.reshape(plan.batch, plan.seqlen, *x.shape[1:])
