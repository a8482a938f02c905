"""When is a merge of attention states right? What rounding may do to it, derived.

With u the unit roundoff of the accumulation, S parts (a sink is one), exact weights ``p_s = e^(lse_s - lse)`` that sum
to 1, and ``d_s = |lse_s - max lse|``:

* a computed weight is off by ``u e_s`` of itself, ``e_s = d_s + 4``: rounding the exponent costs ``u d_s``, an
  exponential is right to 2 ulp;
* a sum of S weights is off by ``u (Σ p_s e_s + S)`` of itself, in any order, and a sum of S weighted outs by
  ``u Σ p_s |out_s| (e_s + S + 1)``, each product being rounded too;
* the quotient adds ``u |out|``, storing it 1 ulp of its dtype; a logarithm is right to 2 ulp.

A weight below the smallest normal number may be flushed. In a tree of merges, of some number of levels, the lse of one
level, off by all of the above and by rounding itself, is the exponent of a weight in the next.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuattn import reference
from cuattn.testing.rounding import accumulation_dtype, to_numpy, ulp, unit_roundoff
from cuattn.testing.tolerance import ToleranceError, assert_within

__all__ = ["assert_merge_close"]


def assert_merge_close(result: tuple[Any, Any], outs: Any, lses: Any, *, sinks: Any = None, levels: int = 1) -> None:
    """Assert that `result`, (out, lse), is the merge of `outs` [S, ..., N, H, E] and `lses` [S, ..., H, N].

    `levels` is how often a part has been merged on its way into the result: 1 for one call of merge_states.

    Raises:
        ToleranceError: naming the worst element, its index, values and bound; or a wrong dtype.

    >>> outs, lses = np.ones((2, 1, 1, 3), np.float32), np.zeros((2, 1, 1), np.float32)
    >>> assert_merge_close((outs[0], np.log(np.float32([[2.0]]))), outs, lses)
    """
    out, lse = result
    parts, logs = to_numpy(outs), to_numpy(lses)
    sinks = None if sinks is None else to_numpy(sinks)
    accumulation = accumulation_dtype(parts.dtype)
    if lse.dtype != accumulation:
        raise ToleranceError(f"lse has dtype {lse.dtype}, expected {accumulation}")
    oracle = np.dtype(np.longdouble if accumulation == np.float64 else np.float64)
    expected, expected_lse = reference.merge_states(list(parts), list(logs), sinks=sinks, dtype=oracle)

    if sinks is not None:
        sink = np.broadcast_to(sinks.astype(oracle)[:, None], logs.shape[1:])
        logs = np.concatenate([logs.astype(oracle), sink[None]])
    u, count = unit_roundoff(accumulation), len(logs)
    weight, error = _weights(logs.astype(oracle), expected_lse)
    if levels > 1:
        magnitude = np.max(np.abs(_finite(logs)), axis=0, initial=0.0)
        error = levels * (error + magnitude + 4 + count)
    relative = (weight * error).sum(axis=0) + count
    with np.errstate(invalid="ignore"):
        spread = np.abs(_finite(expected_lse - _largest(logs)))
    lse_bound = levels * u * (relative + 4 * spread + np.abs(_finite(expected_lse)))
    assert_within(lse, expected_lse, lse_bound, "lse")

    weight, error, relative = (np.moveaxis(x, -1, -2)[..., None] for x in (weight, error, relative))
    weight, error = weight[: len(parts)], error[: len(parts)]
    sizes = _finite(np.abs(parts.astype(oracle)))
    total = (weight * sizes).sum(axis=0)
    flushed = float(np.finfo(accumulation).tiny) * np.where(weight > 0, sizes, 0).sum(axis=0)
    bound = u * ((weight * sizes * (error + count + 1)).sum(axis=0) + (relative + 1) * np.abs(_finite(expected)))
    stored = ulp(expected, out.dtype) if levels == 1 else levels * ulp(total, out.dtype)
    assert_within(out, expected, levels * (bound + flushed) + stored, "out")


def _finite(x: NDArray[Any]) -> NDArray[Any]:
    return np.where(np.isfinite(x), x, 0)


def _largest(logs: NDArray[Any]) -> NDArray[Any]:
    return np.max(logs, axis=0, initial=-np.inf)


def _weights(logs: NDArray[Any], lse: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the exact weights p_s, and the error e_s of computing each in units of u; 0 where there is none."""
    with np.errstate(invalid="ignore"):
        weight = _finite(np.exp(logs - lse))
        return weight, np.where(weight > 0, _finite(np.abs(logs - _largest(logs))) + 4, 0)
