"""flash_attn_combine of flash-attn 3: attention over all keys, from that over parts of them."""

from __future__ import annotations

from typing import Any

import numpy as np

import cuattn
from cuattn.compat.names import COMBINE
from cuattn.dtypes import ELEMENTS
from cuattn.errors import DTypeError, ShapeError
from cuattn.formats import numpy_dtype
from cuattn.runtime.executor import executor_for
from cuattn.runtime.renaming import renamed


@renamed(COMBINE)
def flash_attn_combine(out_partial: Any, lse_partial: Any, out: Any = None, out_dtype: Any = None) -> tuple[Any, Any]:
    """`cuattn.merge_states` with the arguments and layouts of flash-attn 3.

    Parameters
    ----------
    out_partial : array [splits, batch, seqlen, heads, head_dim_v] or [splits, total, heads, head_dim_v]
        Attention over each part of the keys; float32 in the package, and every dtype of `cuattn.merge_states` here.
    lse_partial : array [splits, batch, seqlen, heads] or [splits, total, heads]; float32 (float64 for float64)
        Its log-sum-exp; -inf for a part that has no key.
    out : array [batch, seqlen, heads, head_dim_v] or [total, heads, head_dim_v], optional
        Where to write the result.
    out_dtype : dtype or its name, optional
        Of the result, float16, bfloat16 or float32 for float32 parts; that of ``out_partial`` by default.

    Returns
    -------
    out : array [batch, seqlen, heads, head_dim_v] or [total, heads, head_dim_v]
    softmax_lse : array [batch, seqlen, heads] or [total, heads], float32 (float64 for float64)
        A transposed view, as in the package.

    Raises
    ------
    ShapeError
        Another rank, or an ``lse_partial`` that is not as above.
    DTypeError
        An ``out_dtype`` that is no dtype of these, or not that of ``out``.
    CuattnError
        What `cuattn.merge_states` refuses.

    References
    ----------
    Dao et al., "Flash-Decoding for long-context inference", 2023.

    Examples
    --------
    >>> import numpy as np
    >>> from cuattn.compat.flash_attn_interface import flash_attn_combine
    >>> parts = np.array([1.0, 3.0], np.float32).reshape(2, 1, 1, 1)
    >>> out, lse = flash_attn_combine(parts, np.zeros((2, 1, 1), np.float32))
    >>> out.ravel(), np.exp(lse).round(4).ravel()
    (array([2.], dtype=float32), array([2.], dtype=float32))
    """
    given = {"out_partial": out_partial, "lse_partial": lse_partial} | ({} if out is None else {"out": out})
    executor = executor_for(**given)
    parts, lses = (executor.asarray(name, x) for name, x in list(given.items())[:2])
    if parts.ndim not in (4, 5):
        raise ShapeError(
            f"out_partial has shape {tuple(parts.shape)}; [splits, batch, seqlen, heads, head_dim_v] or [splits, "
            "total, heads, head_dim_v] is needed"
        )
    if tuple(lses.shape) != tuple(parts.shape[:-1]):
        raise ShapeError(
            f"lse_partial has shape {tuple(lses.shape)}; {tuple(parts.shape[:-1])} is needed for "
            f"an out_partial of shape {tuple(parts.shape)}"
        )
    lses = lses.swapaxes(-1, -2)
    dtype = parts.dtype if out_dtype is None else _dtype(out_dtype)
    if out is not None:
        out = executor.asarray("out", out)
        if out_dtype is not None and out.dtype != dtype:
            raise DTypeError(f"out_dtype is {dtype} and out has dtype {out.dtype}; they must be the same")
    elif dtype == parts.dtype:
        merged, lse = cuattn.merge_states(parts, lses)
        return merged, lse.swapaxes(-1, -2)
    target = executor.empty(parts.shape[1:], dtype) if out is None else out
    lse = executor.empty(lses.shape[1:], lses.dtype)
    cuattn.merge_states(parts, lses, out=(target, lse))
    executor.finish(lse, *([target] if out is None else []))
    return target, lse.swapaxes(-1, -2)


def _dtype(value: Any) -> np.dtype[Any]:
    if isinstance(value, str):
        name = value
    else:
        try:
            name = np.dtype(value).name
        except (TypeError, ValueError):
            name = ""
    if name not in ELEMENTS:
        raise DTypeError(f"out_dtype is {value!r}; {', '.join(ELEMENTS)} or None are allowed")
    return numpy_dtype(name)
