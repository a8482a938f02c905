"""Attention of sequences that begin alike: the keys that they share are read once for all of them.

* Zihao Ye, Ruihang Lai, Bo-Ru Lu et al., "Cascade inference: memory bandwidth efficient shared prefix batch decoding",
  2024 (FlashInfer).
* Jordan Juravsky et al., "Hydragen: high-throughput LLM inference with shared prefixes", 2024 (arXiv:2402.05099).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from cuattn.errors import ArgumentError, DTypeError, ShapeError
from cuattn.messages import shown
from cuattn.ops.attention.operation import Operation
from cuattn.ops.attention.options import CascadeOptions
from cuattn.ops.attention.sequences import check_cu_seqlens
from cuattn.ops.attention.signatures import takes_options
from cuattn.ops.attention.slow_calls import warn_if_slow
from cuattn.ops.decode import arguments
from cuattn.ops.decode.keywords import CascadeKeywords
from cuattn.ops.decode.launch import decode
from cuattn.ops.decode.problem import DecodeProblem
from cuattn.ops.merge.states import merge_states
from cuattn.runtime.executor import Executor
from cuattn.runtime.renaming import renamed
from cuattn.runtime.small_arrays import check_flag
from cuattn.scalars import as_integer
from cuattn.typing import ArrayT, KVFormatName

__all__ = ["SharedPrefix", "cascade_attention"]

#: What a prefix calls its arguments of `cuattn.paged_attention_varlen`.
_PREFIX_NAMES = {"block_tables": "block_table", "seqlens_k": "seqlen", "cu_seqlens_q": "group_starts"}


#: Options that a prefix has no part in: it is older than every query, and the sink enters once.
_OF_OWN_KEYS = "causal", "sinks"


class SharedPrefix(NamedTuple):
    """Pages that sequences have in common.

    Attributes
    ----------
    block_table : integers [num_pages], or [groups, max_pages]
        The pages, in order; of each group of sequences.
    seqlen : int, or integers [groups]
        Keys in them.
    group_starts : integers [groups + 1], optional
        A list or a NumPy array: group g is the sequences group_starts[g] to group_starts[g + 1] - 1. It begins with 0,
        ascends, and ends with batch. By default the whole batch is one group.
    """

    block_table: Any
    seqlen: Any
    group_starts: Any = None


_OPERATION = Operation("cascade_attention", "cascade")


@overload
def cascade_attention(
    q: ArrayT,
    k_pages: Any,
    v_pages: Any,
    prefixes: SharedPrefix | Sequence[SharedPrefix],
    block_tables: Any,
    seqlens_k: Any,
    *,
    return_lse: Literal[False] = ...,
    **keywords: Unpack[CascadeKeywords],
) -> ArrayT: ...
@overload
def cascade_attention(
    q: ArrayT,
    k_pages: Any,
    v_pages: Any,
    prefixes: SharedPrefix | Sequence[SharedPrefix],
    block_tables: Any,
    seqlens_k: Any,
    *,
    return_lse: Literal[True],
    **keywords: Unpack[CascadeKeywords],
) -> tuple[ArrayT, ArrayT]: ...
@overload
def cascade_attention(
    q: ArrayT,
    k_pages: Any,
    v_pages: Any,
    prefixes: SharedPrefix | Sequence[SharedPrefix],
    block_tables: Any,
    seqlens_k: Any,
    *,
    return_lse: bool,
    **keywords: Unpack[CascadeKeywords],
) -> ArrayT | tuple[ArrayT, ArrayT]: ...
@takes_options(_OPERATION, before="kv_format")
def cascade_attention(
    q: Any,
    k_pages: Any,
    v_pages: Any,
    prefixes: SharedPrefix | Sequence[SharedPrefix],
    block_tables: Any,
    seqlens_k: Any,
    *,
    kv_format: KVFormatName | None = None,
    k_scale: Any = None,
    v_scale: Any = None,
    k_block_scales: Any = None,
    v_block_scales: Any = None,
    out: Any = None,
    return_lse: bool = False,
    **options: Unpack[CascadeOptions],
) -> Any:
    """`cuattn.paged_attention` of sequences whose first keys are shared, and read once for all that share them.

    The keys of a sequence are those of its group in every prefix, then its own. The queries of a group become one long
    sequence over the prefix: its keys go through a tile of many queries, not once through each of many tiles of a few.
    What each prefix and the sequences' own keys give is merged by log-sum-exp. With B sequences of P shared and M own
    keys, K/V of about P + B·M slots are read instead of B·(P + M).

    Keys and queries are taken as turned by RoPE already: a position counts the prefixes, which differ between calls.

    Parameters
    ----------
    q : array [batch, seqlen_q, heads, head_dim]; float16, bfloat16, float32 or float64
    k_pages : array [num_pages, page_size, kv_heads, head_dim], dtype of ``q`` or as ``kv_format`` says
    v_pages : array [num_pages, page_size, kv_heads, head_dim_v], dtype of ``k_pages``
    prefixes : SharedPrefix, or a list or tuple of them
        What is shared, the longest-shared first: one level for a prompt that the whole batch has, more for a tree of
        prompts. A prefix of no keys is allowed, as is no prefix at all.
    block_tables : integers [batch, max_pages]
        Of the keys of each sequence behind its prefixes.
    seqlens_k : integers [batch]
        So many they are, the queries' own keys included: at least ``seqlen_q`` if the call is causal. (On a device that
        is not checked; a query that would lie within the prefix sees all of it.)
    causal : {True, False, "bottom_right"}
        Within the sequences' own keys. Everything in a prefix is older than every query.
    **options
        As for `cuattn.attention`.
    out : array [batch, seqlen_q, heads, head_dim_v], dtype of ``q``, optional
    kv_format, k_scale, v_scale, k_block_scales, v_block_scales, return_lse
        As for `cuattn.paged_attention`.

    A sink enters once. There is no window and no ALiBi.

    Returns
    -------
    out : array [batch, seqlen_q, heads, head_dim_v], dtype of ``q``
        That of one call over all keys, up to the rounding of each part to ``dtype``.
    lse : array [batch, heads, seqlen_q], float32 (float64 for float64); only with ``return_lse``

    Raises
    ------
    ArrayTypeError, DTypeError, ShapeError, NonFiniteError, ArgumentError, OverlapError
        As for `cuattn.paged_attention`; ArgumentError also for groups that do not span the batch, for fewer own keys
        than queries, and for ``causal="top_left"``.

    References
    ----------
    Ye et al., "Cascade inference: memory bandwidth efficient shared prefix batch decoding", 2024; Juravsky et al.,
    "Hydragen", 2024 (arXiv:2402.05099).

    Examples
    --------
    Two sequences share page 0; each has one key of its own:

    >>> import numpy as np
    >>> import cuattn
    >>> keys, q = np.zeros((3, 2, 1, 32), np.float32), np.zeros((2, 1, 1, 32), np.float32)
    >>> values = np.arange(6, dtype=np.float32).reshape(3, 2, 1, 1)
    >>> shared = cuattn.SharedPrefix([0], 2)
    >>> out = cuattn.cascade_attention(q, keys, values, shared, [[1], [2]], [1, 1])
    >>> out[:, 0, 0, 0].round(5)
    array([1.     , 1.66667], dtype=float32)
    """
    _OPERATION.refuse_unknown(options)
    check_flag("return_lse", return_lse)
    causal = options.get("causal")
    if isinstance(causal, str) and causal == "top_left":
        raise ArgumentError("causal is 'top_left', which is no position behind a prefix; True and False are allowed")
    formats = {"kv_format": kv_format, "k_scale": k_scale, "v_scale": v_scale}
    formats |= {"k_block_scales": k_block_scales, "v_block_scales": v_block_scales}
    own = arguments.check_paged(q, k_pages, v_pages, block_tables, seqlens_k, out=out, **formats, **options)
    if own.options.bounds.right == 0:
        _check_own_keys(own)
    if not isinstance(prefixes, SharedPrefix | list | tuple):
        raise ArgumentError(
            f"prefixes is {shown(prefixes)}; a cuattn.SharedPrefix, or a list or tuple of them, is needed"
        )
    levels = [prefixes] if isinstance(prefixes, SharedPrefix) else list(prefixes)
    shared = {**formats, **{name: x for name, x in options.items() if name not in _OF_OWN_KEYS}}
    problems = [own, *(_level(own, level, **shared) for level in levels)]
    for problem in problems:
        warn_if_slow(problem, pairs=problem.num_pairs)
    return _evaluate(problems, return_lse=return_lse)


def _check_own_keys(own: DecodeProblem) -> None:
    lengths, num_queries = own.host_seqlens_k, own.extents.seqlen_q
    if lengths is not None and lengths.size and int(lengths.min()) < num_queries:
        at = int(lengths.argmin())
        raise ArgumentError(
            f"seqlens_k[{at}] is {lengths[at]}; at least the {num_queries} keys of the queries themselves are needed"
        )


def _level(own: DecodeProblem, level: Any, **options: Any) -> DecodeProblem:
    """Take the queries of each group of a prefix as one sequence over it."""
    if not isinstance(level, SharedPrefix):
        raise ArgumentError(f"prefixes holds {shown(level)}; a cuattn.SharedPrefix is needed")
    executor, (batch, num_queries) = own.executor, own.q.shape[:2]
    table = executor.metadata("block_table", level.block_table)
    if table.ndim == 1:
        table = table[None]
    seqlens = [level.seqlen] if as_integer(level.seqlen) is not None else level.seqlen
    starts = _group_starts(executor, level.group_starts, batch)
    if table.ndim != 2 or table.shape[0] != starts.size - 1:
        raise ShapeError(
            f"block_table of a prefix has shape {list(table.shape)}; [num_pages], or [groups, max_pages] with "
            f"{starts.size - 1} groups, is needed"
        )
    with executor.on_device():
        q = own.q.reshape(batch * num_queries, *own.q.shape[2:])
    with renamed(_PREFIX_NAMES):
        starts = starts * num_queries
        return arguments.check_paged_varlen(q, own.k, own.v, table, starts, seqlens, causal=False, **options)


def _group_starts(executor: Executor, given: Any, batch: int) -> NDArray[np.int64]:
    if given is None:
        return np.array([0, batch])
    starts = executor.metadata("group_starts", given)
    if not isinstance(starts, np.ndarray):
        raise ArgumentError("group_starts is on a device; a NumPy array or a list is needed")
    if starts.ndim != 1 or not starts.size:
        raise ShapeError(f"group_starts has shape {list(starts.shape)}; [groups + 1] is needed")
    if starts.dtype.kind not in "iu":
        raise DTypeError(f"group_starts has dtype {starts.dtype}; integers are needed")
    values = starts.astype(np.int64)
    check_cu_seqlens("group_starts", values, batch, "batch", None)
    return values


def _evaluate(problems: Sequence[DecodeProblem], *, return_lse: bool) -> Any:
    own, *levels = problems
    sinks, shape = own.options.sinks, own.extents
    if levels:  # it enters with the last merge
        own.options = replace(own.options, sinks=None)
    out, lse = decode(own, return_lse=True)
    for i, problem in enumerate(levels):
        prefix_out, prefix_lse = decode(problem, return_lse=True)
        with own.executor.on_device():
            prefix_out = prefix_out.reshape(shape.out_shape)
            # [heads, batch * seqlen_q] -> [batch, heads, seqlen_q], a view
            prefix_lse = prefix_lse.reshape(shape.num_heads, shape.batch, shape.seqlen_q).swapaxes(0, 1)
        last = i == len(levels) - 1
        merge_states(out, lse, prefix_out, prefix_lse, sinks=sinks if last else None, out=(out, lse))
    return (out, lse) if return_lse else out
