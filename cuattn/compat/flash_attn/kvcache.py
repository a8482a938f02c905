"""flash-attn for decoding: new keys and values go into a cache, and queries attend to what is then in it."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuattn.compat.arguments import score_options
from cuattn.compat.flash_attn.cache_places import places_of
from cuattn.compat.names import WITH_KVCACHE
from cuattn.config import DTYPES
from cuattn.decode.launch import decode
from cuattn.errors import ArgumentError, ShapeError
from cuattn.launch import executor_for
from cuattn.metadata import check_flag
from cuattn.paging.append import append_kv
from cuattn.paging.arguments import check_apart
from cuattn.renaming import renamed
from cuattn.rope import Rotary
from cuattn.rope import evaluate as rotate
from cuattn.rotary_arguments import DEFAULT_BASE
from cuattn.scalars import as_integer, shown
from cuattn.slow_calls import warn_if_slow


@renamed(WITH_KVCACHE)
def flash_attn_with_kvcache(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    k: Any = None,
    v: Any = None,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    cache_seqlens: Any = None,
    cache_batch_idx: Any = None,
    cache_leftpad: Any = None,
    block_table: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Any = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Write ``k`` and ``v`` behind the first cache_seqlens[b] entries of the cache, then attend to all of them.

    Below, M = cache_seqlens[b] + seqlen_new is what sequence b has then (seqlen_new = 0 without ``k``).

    Parameters
    ----------
    q : array [batch, seqlen_q, heads, head_dim]; float16, bfloat16, float32 or float64
    k_cache : array [batch_cache, capacity, kv_heads, head_dim], dtype of ``q``
    v_cache : array [batch_cache, capacity, kv_heads, head_dim_v], dtype of ``q``
        Written in place. With ``block_table`` they are pages, [num_blocks, page_block_size, kv_heads, ...]; every page
        size is allowed, not only multiples of 256. Query head h reads key/value head h // (heads // kv_heads).
    k : array [batch, seqlen_new, kv_heads, head_dim], dtype of ``q``, optional
    v : array [batch, seqlen_new, kv_heads, head_dim_v], dtype of ``q``, optional
        Both or neither. They need ``cache_seqlens``.
    rotary_cos, rotary_sin : array [seqlen_ro, rotary_dim / 2], float32, or a 16-bit type that is converted, optional
        Rotates ``k`` at the positions cache_seqlens[b], cache_seqlens[b] + 1, ..., and ``q`` likewise if ``causal`` or
        ``window_size`` is given, else all of ``q`` at cache_seqlens[b]. They need ``k``. Every even rotary_dim works.
    cache_seqlens : int or int32 [batch], optional
        Entries of each sequence that are in the cache before the call; all by default. A list or NumPy array is checked
        before anything is written. Of an array on a GPU nothing is: new entries beyond the capacity are dropped there.
    cache_batch_idx : int32 [batch], optional
        The entry of the cache that each sequence has; 0, 1, ... by default. With ``k``, no two may be the same.
    cache_leftpad : int32 [batch], optional
        Entries at the start of the cache that sequence b does not see. ``cache_seqlens`` and the positions of rotations
        include them.
    block_table : int32 [batch, max_blocks], optional
        The pages of each sequence, in order; entries behind the used ones are not read.
    softmax_scale : float, optional
        Factor of the logits; 1 / sqrt(head_dim) by default.
    causal : bool
        Key j is visible to query i when j <= i + M - seqlen_q (bottom right).
    window_size : (int, int)
        Keys from i + M - seqlen_q - left to i + M - seqlen_q + right are visible; -1 is unbounded.
    softcap : float
        Logits become softcap * tanh(logit / softcap); 0 or less is off.
    rotary_interleaved : bool
        Pairs are the elements (2i, 2i + 1); otherwise (i, i + rotary_dim / 2).
    alibi_slopes : array [heads] or [batch, heads], optional
        Adds -slope * |i + M - seqlen_q - j| to the logits.
    num_splits : int
        Parts of the keys that are attended to at the same time; 0 leaves the choice to `cuattn.plan_decode`'s model.
    return_softmax_lse : bool
        Return also the log-sum-exp.

    Returns
    -------
    out : array [batch, seqlen_q, heads, head_dim_v], dtype of ``q``
    softmax_lse : array [batch, heads, seqlen_q], float32 (float64 for float64); only with ``return_softmax_lse``

    Raises
    ------
    ArgumentError
        Only one of ``k`` and ``v``, or of ``rotary_cos`` and ``rotary_sin``; rotations or new entries without what they
        need; lengths, batch indices or pages that the host sees to be outside of the cache; a value of an option that
        is not allowed. The cache is as before.
    NotSupportedError
        ``cache_batch_idx`` or ``cache_leftpad`` beside ``block_table``, as in the package; ``cache_leftpad`` with a
        cache whose batch entries do not follow one another in memory.
    CuattnError
        What `cuattn.decode_attention`, `cuattn.paged_attention` and `cuattn.append_kv` refuse, which call a cache with
        ``block_table`` pages; and, with ``k``, a cache that shares memory with ``q``, lengths or a table, which are
        read after it was written. The cache is as before.

    References
    ----------
    Dao, "FlashAttention-2", 2023.

    Examples
    --------
    >>> import numpy as np
    >>> from cuattn.compat.flash_attn import flash_attn_with_kvcache
    >>> k_cache, v_cache = np.zeros((1, 8, 1, 32), np.float32), np.zeros((1, 8, 1, 1), np.float32)
    >>> token = np.zeros((1, 1, 1, 32), np.float32)
    >>> for n in range(3):
    ...     v = np.full((1, 1, 1, 1), n, np.float32)
    ...     out = flash_attn_with_kvcache(token, k_cache, v_cache, token, v, cache_seqlens=n, causal=True)
    ...     print(out[0, 0, 0], v_cache[0, :4, 0, 0])
    [0.] [0. 0. 0. 0.]
    [0.5] [0. 1. 0. 0.]
    [1.] [0. 1. 2. 0.]
    """
    options = score_options(softmax_scale, window_size, softcap, alibi_slopes)
    options |= {"causal": check_flag("causal", causal), "num_splits": _num_splits(num_splits)}
    check_flag("return_softmax_lse", return_softmax_lse)
    interleaved = check_flag("rotary_interleaved", rotary_interleaved)
    _check_pairs({"k": k, "v": v}, {"rotary_cos": rotary_cos, "rotary_sin": rotary_sin}, cache_seqlens is not None)
    given = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v}
    given |= {"rotary_cos": rotary_cos, "rotary_sin": rotary_sin}
    needed = ("q", "k_cache", "v_cache")
    executor = executor_for(**{name: x for name, x in given.items() if x is not None or name in needed})
    arrays: dict[str, Any] = {name: None if x is None else executor.asarray(name, x) for name, x in given.items()}
    _check_shapes(arrays)
    seqlen_q, seqlen_new = arrays["q"].shape[1], 0 if k is None else arrays["k"].shape[1]
    with executor.on_device():
        places = places_of(executor, arrays, seqlen_new, cache_seqlens, cache_batch_idx, cache_leftpad, block_table)
        rotary, consecutive = None, causal or seqlen_q == 1 or tuple(window_size) != (-1, -1)
        if rotary_cos is not None:
            tables = (_table(arrays[name], arrays["q"].dtype) for name in ("rotary_cos", "rotary_sin"))
            rotary = Rotary(DEFAULT_BASE, interleaved, None, *tables)
        if rotary is not None and consecutive and seqlen_q == seqlen_new and cache_leftpad is None:
            options["rope"] = rotary  # query i is then where the kernel takes it to be, among the last keys
        elif rotary is not None:
            arrays["q"] = rotate(arrays["q"], places.query_positions(consecutive), rotary)
        problem = places.problem(arrays["q"], options)  # nothing is written before everything is checked
        if seqlen_new:
            lists = {"cache_seqlens": cache_seqlens, "cache_batch_idx": cache_batch_idx}
            lists |= {"cache_leftpad": cache_leftpad, "block_table": block_table}
            read = {name: executor.metadata(name, x) for name, x in lists.items() if getattr(x, "ndim", 0)}
            written = {name: arrays[name] for name in ("k_cache", "v_cache")}
            check_apart(written, {"q": arrays["q"], **read})
            slots = places.slots()
            new_k, new_v = (arrays[name].reshape(slots.size, *arrays[name].shape[2:]) for name in "kv")
            positions = None if rotary is None else places.positions.reshape(-1)
            append_kv(new_k, new_v, arrays["k_cache"], arrays["v_cache"], slots, positions=positions, rope=rotary)
    warn_if_slow(problem, pairs=problem.num_pairs)
    return decode(problem, return_lse=return_softmax_lse)


def _num_splits(value: Any) -> int | None:
    """``num_splits`` of `cuattn.decode_attention`, where None is the choice of a model."""
    number = as_integer(value)
    if number is None or number < 0:
        raise ArgumentError(f"num_splits is {shown(value)}; 0 (chosen) or a positive integer is allowed")
    return number or None


def _check_pairs(new: dict[str, Any], rotary: dict[str, Any], has_lengths: bool) -> None:
    """Raise `ArgumentError` for one array without the other, or without what it is to be used for."""
    for pair in (new, rotary):
        there = [name for name, x in pair.items() if x is not None]
        if len(there) == 1:
            raise ArgumentError(f"{there[0]} is given alone; give both of {' and '.join(pair)}, or neither")
    if rotary["rotary_cos"] is not None and new["k"] is None:
        raise ArgumentError("rotary_cos and rotary_sin are given without k and v; they rotate k and q")
    if new["k"] is not None and not has_lengths:
        raise ArgumentError("k and v are given without cache_seqlens; it says behind which entries they go")


def _check_shapes(arrays: dict[str, Any]) -> None:
    """Raise `ShapeError` for ranks, and new entries that are not of the sequences of q; the rest is checked later."""
    for name in ("q", "k_cache", "v_cache", "k", "v"):
        x = arrays[name]
        if x is not None and x.ndim != 4:
            raise ShapeError(f"{name} has shape {tuple(x.shape)}, rank {x.ndim}; rank 4 is needed")
    batch, k, v = arrays["q"].shape[0], arrays["k"], arrays["v"]
    if k is not None and (k.shape[0] != batch or v.shape[:2] != k.shape[:2]):
        raise ShapeError(
            f"k has shape {tuple(k.shape)}, v has shape {tuple(v.shape)} and q has batch {batch}; "
            "[batch, seqlen_new, kv_heads, ...] is needed"
        )


def _table(table: Any, dtype: np.dtype[Any]) -> Any:
    """A table of rotations in the dtype that `cuattn.Rotary` takes; those of the package have the dtype of q."""
    if dtype != np.float64 and table.dtype in DTYPES and table.dtype.itemsize == 2:
        return table.astype(np.float32)
    return table
