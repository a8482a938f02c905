"""The rule for merged attention states: plain correct code passes, small mistakes do not."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from cuattn.testing.merging import assert_merge_close
from cuattn.testing.tolerance import ToleranceError

DTYPES = tuple(np.dtype(t) for t in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))


def problem(seed: int, dtype: np.dtype, num_parts: int | None = None):
    """outs [S, N, H, E], lses [S, H, N], sinks [H] or None."""
    rng = np.random.default_rng(seed)
    num_parts = num_parts or int(rng.integers(1, 40))
    accumulation = np.float64 if dtype == np.float64 else np.float32
    lses = (rng.standard_normal((num_parts, 2, 3)) * rng.choice([0.5, 5, 200])).astype(accumulation)
    lses[rng.random(lses.shape) < 0.2] = -np.inf
    outs = (rng.standard_normal((num_parts, 3, 2, 8)) * rng.choice([1, 1e-3, 100])).astype(dtype)
    sinks = rng.standard_normal(2).astype(accumulation) if rng.random() < 0.5 else None
    return outs, lses, sinks


def plain(outs, lses, sinks, *, shift=None, order=None):
    """The formulas in the accumulation dtype."""
    stack = lses if sinks is None else np.concatenate([lses, np.broadcast_to(sinks[:, None], lses[:1].shape)])
    shift = stack.max(axis=0) if shift is None else shift
    shift = np.where(np.isneginf(shift), 0, shift).astype(lses.dtype)
    weights = np.exp(stack - shift)
    total = weights.sum(axis=0, dtype=lses.dtype)
    parts = weights[: len(lses)].swapaxes(1, 2)[..., None] * outs.astype(lses.dtype)
    divisor = np.where(total == 0, 1, total).astype(lses.dtype).T[..., None]
    out = parts[slice(None) if order is None else order].sum(axis=0, dtype=lses.dtype) / divisor
    with np.errstate(divide="ignore"):
        return out.astype(outs.dtype), (shift + np.log(total)).astype(lses.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_code_passes(dtype):
    for seed in range(300):
        outs, lses, sinks = problem(seed, dtype)
        for order in (None, np.random.default_rng(seed).permutation(len(outs))):
            assert_merge_close(plain(outs, lses, sinks, order=order), outs, lses, sinks=sinks)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "mistake",
    ["a part left out", "no maximum", "base 2", "the sink left out", "lse of the parts", "slightly too large"],
)
def test_mistakes_fail(dtype, mistake):
    caught, tried = 0, 0
    for seed in range(40):
        outs, lses, sinks = problem(seed, dtype, num_parts=6)
        sinks = np.ones(2, lses.dtype)
        lses = np.clip(lses, -3, 3)
        result = plain(outs, lses, sinks)
        if mistake == "a part left out":
            result = plain(outs[1:], lses[1:], sinks)
        elif mistake == "no maximum":  # and so an overflow
            lses = lses + lses.dtype.type(1000)
            with np.errstate(over="ignore", invalid="ignore"):
                result = plain(outs, lses, sinks, shift=np.zeros(lses.shape[1:]))
        elif mistake == "base 2":
            result = result[0], result[1] * lses.dtype.type(np.log2(np.e))
        elif mistake == "the sink left out":
            result = plain(outs, lses, None)
        elif mistake == "lse of the parts":
            result = result[0], lses.max(axis=0)
        else:
            scale = 1 + 2.0 ** (-7 if dtype.itemsize == 2 else -19 if dtype == np.float32 else -48)
            result = (result[0].astype(np.longdouble) * scale * scale).astype(dtype), result[1]
        tried += 1
        try:
            assert_merge_close(result, outs, lses, sinks=sinks)
        except ToleranceError:
            caught += 1
    assert caught == tried


def test_wrong_dtypes_fail():
    outs, lses, sinks = problem(0, np.dtype(np.float32))
    out, lse = plain(outs, lses, sinks)
    with pytest.raises(ToleranceError, match="lse has dtype float64"):
        assert_merge_close((out, lse.astype(np.float64)), outs, lses, sinks=sinks)
