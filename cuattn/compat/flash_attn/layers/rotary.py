"""Rotary position embedding by the names of flash_attn.layers.rotary: thin layers over `cuattn.rope`."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuattn.compat.arguments import plain, unpack
from cuattn.compat.cache_calls import rotation_table
from cuattn.compat.cache_tokens import packed_tokens, tokens_of_each
from cuattn.compat.names import ROTARY
from cuattn.errors import ArgumentError, ShapeError
from cuattn.ops.decode.lengths import integers
from cuattn.ops.rotary.arguments import check_heads
from cuattn.ops.rotary.rope import rope
from cuattn.runtime.arrays import module_of
from cuattn.runtime.executor import executor_for
from cuattn.runtime.renaming import renamed
from cuattn.runtime.small_arrays import check_flag

__all__ = ["apply_rotary_emb", "apply_rotary_emb_func", "apply_rotary_emb_kv_"]


@renamed(ROTARY)
def apply_rotary_emb(
    x: Any,
    cos: Any,
    sin: Any,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: Any = 0,
    cu_seqlens: Any = None,
    max_seqlen: int | None = None,
    *,
    conjugate: bool = False,
) -> Any:
    """`cuattn.rope` of the first elements of every head, at positions that count on from an offset.

    Parameters
    ----------
    x : array [batch, seqlen, heads, head_dim], or [total, heads, head_dim] with ``cu_seqlens``
        float16, bfloat16, float32 or float64.
    cos, sin : arrays [seqlen_ro, rotary_dim / 2], float32, or a 16-bit type that is converted
        Row p is for position p. A position that they do not hold raises if the host sees it; on a GPU it gives NaN.
    interleaved : bool
        Pairs are the elements (2i, 2i + 1); otherwise (i, i + rotary_dim / 2).
    inplace : bool
        Write to ``x``.
    seqlen_offsets : int or int32 [batch]
        The position of the first token of each sequence.
    cu_seqlens : int32 [batch + 1], optional
        Sequence b has the tokens from cu_seqlens[b] up to, but without, cu_seqlens[b + 1].
    max_seqlen : int, optional
        Without effect.
    conjugate : bool
        Turn the other way: the gradient of a rotation is the opposite rotation of the gradient.

    Returns
    -------
    array, shape and dtype of ``x``
        ``x`` itself with ``inplace``.

    Raises
    ------
    ShapeError
        Another rank than that of the call, or lists of another length.
    CuattnError
        What `cuattn.rope` refuses, which calls a position positions[i].

    References
    ----------
    Su et al., "RoFormer: enhanced transformer with rotary position embedding", 2021 (arXiv:2104.09864).

    Examples
    --------
    >>> import numpy as np
    >>> from cuattn.compat.flash_attn.layers.rotary import apply_rotary_emb
    >>> angles = np.arange(3)[:, None] * np.array([np.pi / 2])
    >>> cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    >>> x = np.array([1.0, 0.0], np.float32).reshape(1, 1, 1, 2)
    >>> apply_rotary_emb(x, cos, sin, seqlen_offsets=2).round(4).ravel()
    array([-1.,  0.], dtype=float32)
    """
    inplace, conjugate = check_flag("inplace", inplace), check_flag("conjugate", conjugate)
    interleaved = check_flag("interleaved", interleaved)
    plain("max_seqlen", max_seqlen)
    executor = executor_for(x=x, cos=cos, sin=sin)
    x, cos, sin = (executor.asarray(name, array) for name, array in (("x", x), ("cos", cos), ("sin", sin)))
    rank = 4 if cu_seqlens is None else 3
    if x.ndim != rank:
        layout = "[batch, seqlen, heads, head_dim]" if rank == 4 else "[total, heads, head_dim] beside cu_seqlens"
        raise ShapeError(f"x has shape {tuple(x.shape)}; {layout} is needed")
    check_heads("x", x, int(x.shape[-1]))
    with executor.on_device():
        if cu_seqlens is None:
            tokens = tokens_of_each(int(x.shape[0]), int(x.shape[1]))
        else:
            tokens = packed_tokens(executor, "cu_seqlens", cu_seqlens, None, int(x.shape[0]))
        first = _offsets(executor, seqlen_offsets, tokens.batch)
        lists = (first,) if tokens.starts is None else (first, tokens.starts)
        xp = module_of(*lists)
        positions = tokens.numbers(xp, xp.asarray(first))
        cos, sin = (rotation_table(table, x.dtype) for table in (cos, sin))
        out = x if inplace else None
        return rope(x, positions, interleaved=interleaved, cos=cos, sin=sin, inverse=conjugate, out=out)


#: The name that older programs use.
apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_kv_(kv: Any, cos: Any, sin: Any, interleaved: bool = False, seqlen_offsets: Any = 0) -> Any:
    """`apply_rotary_emb` of the keys of an array of keys and values, in place.

    Parameters
    ----------
    kv : array [batch, seqlen, 2, heads, head_dim]
    cos, sin, interleaved, seqlen_offsets
        As for `apply_rotary_emb`.

    Returns
    -------
    array [batch, seqlen, 2, heads, head_dim]
        ``kv`` itself.

    Raises
    ------
    ShapeError
        ``kv`` has another rank, or its axis 2 is not 2 long.
    CuattnError
        As for `apply_rotary_emb`.

    References
    ----------
    Su et al., "RoFormer: enhanced transformer with rotary position embedding", 2021 (arXiv:2104.09864).

    Examples
    --------
    >>> import numpy as np
    >>> from cuattn.compat.flash_attn.layers.rotary import apply_rotary_emb_kv_
    >>> angles = np.array([[np.pi]])
    >>> kv = np.ones((1, 1, 2, 1, 2), np.float32)
    >>> apply_rotary_emb_kv_(kv, np.cos(angles, dtype=np.float32), np.sin(angles, dtype=np.float32)).round(4).ravel()
    array([-1., -1.,  1.,  1.], dtype=float32)
    """
    array = executor_for(kv=kv, cos=cos, sin=sin).asarray("kv", kv)
    keys, _ = unpack("kv", array, "[batch, seqlen, 2, heads, head_dim]", 2, 2)
    apply_rotary_emb(keys, cos, sin, interleaved, True, seqlen_offsets)
    return array


def _offsets(executor: Any, seqlen_offsets: Any, batch: int) -> Any:
    """The position of the first token of each sequence, [batch]."""
    if getattr(seqlen_offsets, "ndim", None) == 0:
        seqlen_offsets = plain("seqlen_offsets", seqlen_offsets)
    if isinstance(seqlen_offsets, int | np.integer) and not isinstance(seqlen_offsets, bool):
        if not -(2**31) <= seqlen_offsets < 2**31:
            raise ArgumentError(f"seqlen_offsets is {seqlen_offsets}; integers of 32 bits are allowed")
        return np.full(batch, seqlen_offsets, np.int64)
    return integers(executor, "seqlen_offsets", seqlen_offsets, batch, 1, "[batch]").array
