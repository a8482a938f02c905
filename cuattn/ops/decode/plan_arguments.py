"""What `plan_decode` accepts: every check of it, and the executor that a plan is made for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuattn.dtypes import ELEMENTS
from cuattn.errors import ArgumentError, DTypeError, ShapeError
from cuattn.formats import KV_FORMATS, KVFormat
from cuattn.head_dims import MAX_HEAD_DIM
from cuattn.messages import shown
from cuattn.ops.attention.sequences import check_cu_seqlens
from cuattn.runtime.executor import Executor, executor_for, executor_of_module
from cuattn.scalars import MAX_EXTENT, check_dtype, choice, integer

__all__ = ["PlanLengths", "check_extent", "check_format", "check_heads", "check_lengths", "executor_of"]


@dataclass(frozen=True, slots=True, eq=False)
class PlanLengths:
    """How many queries and keys the sequences of a plan have."""

    seqlens_q: NDArray[np.int64]  # [batch]
    seqlens_k: NDArray[np.int64]  # [batch]; the most it may be, where the host does not know it
    max_seqlen_k: int
    packed: bool


def executor_of(array_module: Any, seqlens_k: Any) -> Executor:
    """Find what a plan is made for: where ``seqlens_k`` lies if it is on a device, else what the module says."""
    if array_module is None:
        if seqlens_k is None or isinstance(seqlens_k, np.ndarray | list | tuple):
            return executor_for(seqlens_k=np.empty(0, np.int32))
        return executor_for(seqlens_k=seqlens_k)
    return executor_of_module(array_module)


def check_extent(name: str, value: Any, least: int, most: int = MAX_EXTENT) -> int:
    """Return an integer argument as an int."""
    return integer(name, value, least, most)


def check_heads(num_heads: Any, num_kv_heads: Any, head_dim: Any, head_dim_v: Any) -> tuple[int, int, int, int]:
    num_heads, num_kv_heads = check_extent("num_heads", num_heads, 1), check_extent("num_kv_heads", num_kv_heads, 1)
    if num_heads % num_kv_heads:
        raise ArgumentError(f"num_heads is {num_heads}; a multiple of num_kv_heads, {num_kv_heads}, is needed")
    head_dim = check_extent("head_dim", head_dim, 1, MAX_HEAD_DIM)
    if head_dim_v is None:
        return num_heads, num_kv_heads, head_dim, head_dim
    return num_heads, num_kv_heads, head_dim, check_extent("head_dim_v", head_dim_v, 1, MAX_HEAD_DIM)


def check_format(dtype: Any, kv_format: Any) -> tuple[np.dtype[Any], KVFormat]:
    """Return the dtype of q, and the format of the cache."""
    resolved = check_dtype("dtype", dtype, ELEMENTS)
    if kv_format is None:
        return resolved, KV_FORMATS[resolved.name]
    choice("kv_format", kv_format, KV_FORMATS, optional=True)
    row = KV_FORMATS[kv_format]
    if (row.quantized and resolved == np.float64) or (not row.quantized and row.name != resolved.name):
        raise DTypeError(f"dtype is {resolved.name} and kv_format {row.name}; they do not go together")
    return resolved, row


def check_lengths(
    executor: Executor, seqlens_k: Any, batch: Any, seqlen_q: Any, cu_seqlens_q: Any, max_seqlen_k: Any
) -> PlanLengths:
    if max_seqlen_k is not None:
        max_seqlen_k = check_extent("max_seqlen_k", max_seqlen_k, 0)
    known = None
    if seqlens_k is not None:
        seqlens_k = executor.metadata("seqlens_k", seqlens_k)
        if isinstance(seqlens_k, np.ndarray):
            seqlens_k = known = _integers("seqlens_k", seqlens_k)
        elif max_seqlen_k is None:
            raise ArgumentError(
                "seqlens_k is on a device, which a plan does not wait for: pass max_seqlen_k, or the lengths as a "
                "NumPy array or a list"
            )
        if seqlens_k.ndim != 1:
            raise ShapeError(f"seqlens_k has shape {tuple(seqlens_k.shape)}; [batch] is needed")
    elif max_seqlen_k is None:
        raise ArgumentError("seqlens_k and max_seqlen_k are both None; one of them is needed")
    seqlens_q = None if cu_seqlens_q is None else _query_lengths(executor, cu_seqlens_q)
    sizes = {
        "batch": None if batch is None else check_extent("batch", batch, 0),
        "cu_seqlens_q": None if seqlens_q is None else seqlens_q.size,
        "seqlens_k": None if seqlens_k is None else int(seqlens_k.shape[0]),
    }
    given = {name: size for name, size in sizes.items() if size is not None}
    if not given:
        raise ArgumentError("batch is None; with neither seqlens_k nor cu_seqlens_q it is needed")
    if len(set(given.values())) > 1:
        raise ShapeError(f"the number of sequences is {' but '.join(f'{n} by {name}' for name, n in given.items())}")
    num_sequences = next(iter(given.values()))
    if seqlens_q is None:
        queries = np.full(num_sequences, check_extent("seqlen_q", seqlen_q, 0), np.int64)
    elif seqlen_q != 1:
        raise ArgumentError(f"seqlen_q is {shown(seqlen_q)} beside cu_seqlens_q, which says it all; leave the default")
    else:
        queries = seqlens_q
    if known is None:
        known = np.full(num_sequences, max_seqlen_k, np.int64)
    elif known.size:
        limit = MAX_EXTENT if max_seqlen_k is None else max_seqlen_k
        if int(known.min()) < 0 or int(known.max()) > limit:
            at = int(np.argmax((known < 0) | (known > limit)))
            raise ArgumentError(f"seqlens_k[{at}] is {known[at]}; 0 to {limit} keys are allowed")
    longest = int(known.max(initial=0)) if max_seqlen_k is None else max_seqlen_k
    return PlanLengths(queries, known, longest, cu_seqlens_q is not None)


def _integers(name: str, x: NDArray[Any]) -> NDArray[np.int64]:
    """Return integers of the host, in memory that nobody else writes to."""
    if x.dtype.kind not in "iu" and x.size:
        raise DTypeError(f"{name} has dtype {x.dtype}; integers are needed")
    return np.array(x, np.int64)


def _query_lengths(executor: Executor, cu_seqlens_q: Any) -> NDArray[np.int64]:
    array = executor.metadata("cu_seqlens_q", cu_seqlens_q)
    if not isinstance(array, np.ndarray):
        raise ArgumentError(
            "cu_seqlens_q is on a device, which a plan does not wait for: pass a NumPy array or a list (with "
            "fixed_grid=True, of any lengths with the same total)"
        )
    if array.ndim != 1 or not array.size:
        raise ShapeError(f"cu_seqlens_q has shape {tuple(array.shape)}; [batch + 1] is needed")
    values = _integers("cu_seqlens_q", array)
    check_cu_seqlens("cu_seqlens_q", values, int(values[-1]), "max_seqlen_q", None)
    return np.diff(values)
