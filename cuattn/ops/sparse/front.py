"""One function for the patterns of sparse attention that there are."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, overload

from cuattn.errors import ArgumentError
from cuattn.messages import shown
from cuattn.ops.attention.dense import attention
from cuattn.ops.sparse.block_mask import BlockMask
from cuattn.ops.sparse.dense import block_sparse_attention
from cuattn.ops.sparse.strided import strided_attention
from cuattn.typing import ArrayT, Causal, Precision

__all__ = ["Pattern", "sparse_attention"]

Pattern: TypeAlias = (
    BlockMask
    | tuple[Literal["window"], int | None, int | None]
    | tuple[Literal["strided"], int, int | None]
    | tuple[Literal["strided"], int]
)

#: How many numbers a pattern has behind its name.
_NUMBERS = {"window": (2,), "strided": (1, 2)}


@overload
def sparse_attention(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    *,
    pattern: Pattern,
    causal: Causal | None = ...,
    scale: float | None = ...,
    softcap: float | None = ...,
    precision: Precision | None = ...,
    out: ArrayT | None = ...,
    return_lse: Literal[False] = ...,
) -> ArrayT: ...
@overload
def sparse_attention(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    *,
    pattern: Pattern,
    causal: Causal | None = ...,
    scale: float | None = ...,
    softcap: float | None = ...,
    precision: Precision | None = ...,
    out: ArrayT | None = ...,
    return_lse: bool,
) -> ArrayT | tuple[ArrayT, ArrayT]: ...
def sparse_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    pattern: Pattern,
    causal: Causal | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    precision: Precision | None = None,
    out: Any = None,
    return_lse: bool = False,
) -> Any:
    """Attention under one of the patterns: a window, strides, or a mask of blocks.

    Each pattern is a function of its own, with more options, and this calls it: `cuattn.attention` with a ``window``,
    `cuattn.strided_attention`, `cuattn.block_sparse_attention`. The work is that of the keys that are seen.

    Parameters
    ----------
    q, k, v : arrays as for `cuattn.attention`
    pattern : tuple or BlockMask
        ``("window", left, right)``: key j is visible to query i when i + o - left <= j <= i + o + right, where
        o = seqlen_k - seqlen_q; None on a side is no bound. ``("strided", stride, local)``: when i + o - j is a
        multiple of ``stride`` or less than ``local`` from 0; ``local`` may be None or missing. A `BlockMask`: when
        block (i // bq, j // bk) is kept.
    causal : {None, False, True, "bottom_right", "top_left"}
        As for `cuattn.attention`. By default strides are causal, and the others say by themselves what is seen.
    scale, softcap, precision, out, return_lse
        As for `cuattn.attention`; "fp8" is for windows only.

    Returns
    -------
    out : array [batch, seqlen_q, heads, head_dim_v], dtype of ``q``
    lse : array [batch, heads, seqlen_q], float32 (float64 for float64); only with ``return_lse``

    Raises
    ------
    ArgumentError
        A ``pattern`` that is none of these.
    CuattnError
        What the function of the pattern refuses.

    References
    ----------
    Child et al., "Generating long sequences with sparse transformers", 2019 (arXiv:1904.10509); Beltagy, Peters and
    Cohan, "Longformer", 2020 (arXiv:2004.05150).

    Examples
    --------
    >>> import numpy as np
    >>> import cuattn
    >>> q = np.zeros((1, 4, 1, 32), np.float32)
    >>> v = np.arange(4, dtype=np.float32).reshape(1, 4, 1, 1)
    >>> cuattn.sparse_attention(q, q, v, pattern=("window", 1, 0))[0, :, 0, 0]
    array([0. , 0.5, 1.5, 2.5], dtype=float32)
    >>> cuattn.sparse_attention(q, q, v, pattern=("strided", 2, None))[0, :, 0, 0]
    array([0., 1., 1., 2.], dtype=float32)
    """
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "precision": precision, "out": out}
    options["return_lse"] = return_lse
    if causal is not None:
        options["causal"] = causal
    if isinstance(pattern, BlockMask):
        return block_sparse_attention(q, k, v, pattern, **options)
    given: list[Any] = list(pattern) if isinstance(pattern, tuple | list) else []
    kind, *numbers = given or [None]
    if not isinstance(kind, str) or len(numbers) not in _NUMBERS.get(kind, ()):
        allowed = "('window', left, right), ('strided', stride, local) and a BlockMask are allowed"
        raise ArgumentError(f"pattern is {shown(pattern)}; {allowed}")
    if kind == "window":
        return attention(q, k, v, window=(numbers[0], numbers[1]), **options)
    stride, *local = numbers
    return strided_attention(q, k, v, stride, local=local[0] if local else None, **options)
