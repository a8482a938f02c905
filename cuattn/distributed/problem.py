"""A call of ring attention whose arguments have passed every check, on this rank and on all others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from cuattn.distributed.agreement import agree_checked
from cuattn.distributed.group import Group, check_group
from cuattn.distributed.layout import Layout, layout
from cuattn.distributed.partitions import PARTITIONS, check_cu_seqlens
from cuattn.distributed.pieces import Band
from cuattn.dtypes import DTYPES, ELEMENTS
from cuattn.errors import DTypeError, ShapeError
from cuattn.ops.attention import arguments
from cuattn.ops.attention.arguments import Problem
from cuattn.ops.attention.operation import Operation
from cuattn.ops.attention.params import UNBOUNDED
from cuattn.runtime.executor import Executor
from cuattn.scalars import check_flag, choice
from cuattn.typing import Causal, Precision

__all__ = [
    "DistributedOptions",
    "RingProblem",
    "check_rank",
    "check_ring",
    "check_saved",
    "with_defaults",
]


class DistributedOptions(TypedDict, total=False):
    """Keywords of attention, with the meaning that they have for the whole sequence and all heads."""

    scale: float | None
    causal: Causal
    window: tuple[int | None, int | None] | None
    chunk: int | None
    softcap: float | None
    alibi_slopes: Any
    sinks: Any
    dropout_p: float
    dropout_seed: int
    dropout_offset: int
    precision: Precision | None


_OPERATION = Operation("ring_attention", "gradients")
_DEFAULTS: dict[str, Any] = {name: _OPERATION.defaults[name] for name in DistributedOptions.__annotations__}
_DEFAULTS["causal"] = True


def with_defaults(call: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return all options of a call, of which some are given; raises `TypeError` for a keyword that is none of them."""
    for name in options:
        if name not in _DEFAULTS:
            raise TypeError(f"{call}() got an unexpected keyword argument {name!r}")
    return {**_DEFAULTS, **options}


@dataclass
class RingProblem:
    """What a rank has to do.

    Attributes
    ----------
    of_rank : Problem
        The tokens of this rank as one attention, for its extents and options.
    lengths_q, lengths_k : tuple of int
        Of the sequences of all ranks together; of dense arrays one.
    numbers, dropout : dict
        Options that are the same for every piece; those of dropout also need its place in the whole.
    """

    group: Group
    of_rank: Problem
    kind: str
    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    packed: bool
    numbers: dict[str, Any]
    dropout: dict[str, Any]  # the keywords of dropout; empty without
    first_head: int = 0  # of the heads of the mask of dropout
    num_heads: int | None = None  # of that mask; those of q where None
    bands: tuple[Band, ...] = field(init=False)  # of each sequence

    def __post_init__(self) -> None:
        bounds = self.of_rank.options.bounds
        left = None if bounds.left == UNBOUNDED else bounds.left
        right = None if bounds.right == UNBOUNDED else bounds.right
        offsets = [(m - n) * bounds.from_end for n, m in zip(self.lengths_q, self.lengths_k, strict=True)]
        self.bands = tuple(Band(offset, left, right) for offset in offsets)

    @property
    def executor(self) -> Executor:
        return self.of_rank.executor

    @property
    def accumulator(self) -> np.dtype[Any]:
        return np.dtype(self.of_rank.accumulator)

    @property
    def axis(self) -> int:
        """The axis of tokens of q, k, v and out."""
        return 0 if self.packed else 1

    @property
    def queries(self) -> Layout:
        return self._layout(self.lengths_q, self.group.rank)

    def keys(self, rank: int) -> Layout:
        return self._layout(self.lengths_k, rank)

    def _layout(self, lengths: tuple[int, ...], rank: int) -> Layout:
        found = layout(lengths, rank, self.group.size, self.kind)
        if not (self.packed and self.dropout):
            return found
        # a call of dropout has one place in the whole: packed sequences have one each
        return found._replace(slots=tuple(part for slot in found.slots for part in slot.one_by_one()))

    def boundaries(self, lengths: tuple[int, ...]) -> NDArray[np.int32]:
        """Return where packed sequences of these lengths begin and end."""
        return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32)

    def shapes_of_keys(self) -> list[list[tuple[int, ...]]]:
        """Return the shapes of the keys and of the values of each rank."""
        extents = self.of_rank.extents
        batch = () if self.packed else (extents.batch,)
        tokens = [self.keys(rank).tokens for rank in range(self.group.size)]
        return [[(*batch, n, extents.num_kv_heads, d) for d in (extents.head_dim, extents.head_dim_v)] for n in tokens]

    def tokens(self, x: Any, first: int, end: int) -> Any:
        """Return a view of tokens of an array like q."""
        return x[first:end] if self.packed else x[:, first:end]

    def by_slots(self, x: Any, of: Layout) -> Any:
        """Return an array like q, the tokens in the order of slots: the array itself where they are."""
        if of.order is None:
            return x
        with self.executor.on_device():
            return x.take(self.executor.xp.asarray(of.order), axis=self.axis)

    def lse_by_slots(self, x: Any, of: Layout) -> Any:
        """Return an array like lse, the tokens in the order of slots."""
        if of.order is None or x is None:
            return x
        with self.executor.on_device():
            return x.take(self.executor.xp.asarray(of.order), axis=-1)

    def as_given(self, x: Any, of: Layout, *, axis: int | None = None) -> Any:
        """Return an array in the order of slots as the caller has tokens."""
        if of.order is None:
            return x
        with self.executor.on_device():
            return x.take(self.executor.xp.asarray(np.argsort(of.order)), axis=self.axis if axis is None else axis)


def check_ring(
    call: str,
    q: Any,
    k: Any,
    v: Any,
    group: Any,
    *,
    partition: Any,
    cu_seqlens: Any,
    overlap: Any,
    extra: Mapping[str, Any] | None = None,
    heads: tuple[int, int | None] = (0, None),
    **options: Any,
) -> RingProblem:
    """Make every check of a call, and agree with all ranks. Raises as documented at `ring_attention`."""
    group = check_group(group)

    def check() -> RingProblem:
        choice("partition", partition, PARTITIONS)
        check_flag("overlap", overlap)
        lengths = None if cu_seqlens is None else tuple(np.diff(check_cu_seqlens(cu_seqlens)).tolist())
        problem = check_rank(q, k, v, lengths, options)
        numbers = {name: options[name] for name in ("scale", "softcap", "precision")}
        dropout = {name: x for name, x in options.items() if name.startswith("dropout_")}
        dropout = dropout if problem.options.dropout is not None else {}
        lengths_of = (lengths or (),) * 2
        return RingProblem(group, problem, partition, *lengths_of, lengths is not None, numbers, dropout, *heads)

    def described(problem: RingProblem) -> tuple[dict[str, Any], Any]:
        extents = problem.of_rank.extents
        shapes = {name: getattr(extents, name) for name in ("batch", "num_heads", "num_kv_heads", "head_dim")}
        shapes |= {"head_dim_v": extents.head_dim_v, "dtype": str(problem.of_rank.dtype)}
        shapes |= {"executor": problem.executor.name, "partition": partition, "cu_seqlens": problem.lengths_q}
        return shapes | options | dict(extra or {}), [extents.seqlen_q, extents.seqlen_k]

    problem, said = agree_checked(group, call, check, described)
    if not problem.packed:
        problem.lengths_q, problem.lengths_k = ((sum(sizes),) for sizes in zip(*said, strict=True))
        problem.__post_init__()
    for name, number in (("q", 0), ("k", 1)):
        lengths = (problem.lengths_q, problem.lengths_k)[number]
        expected = [layout(lengths, rank, group.size, partition).tokens for rank in range(group.size)]
        if group.checked and [sizes[number] for sizes in said] != expected:
            raise ShapeError(
                f"{name} has {[sizes[number] for sizes in said]} tokens on the ranks; {expected} are needed with the "
                f"partition {partition!r}"
            )
    return problem


def check_saved(
    of_rank: Problem, group: Group, call: str, *, own_heads: int | None = None, **saved: Any
) -> dict[str, Any]:
    """Return what forward returned, and gradients of it, as arrays of the executor; all ranks raise if one does.

    ``own_heads``: what the arrays have of the heads of the problem.
    """

    def check() -> dict[str, Any]:
        return {
            name: None if x is None and name == "dlse" else _saved(of_rank, own_heads, name, x)
            for name, x in saved.items()
        }

    return agree_checked(group, call, check, lambda _: ({}, None))[0]


def _saved(of_rank: Problem, own_heads: int | None, name: str, x: Any) -> Any:
    extents, of_lse = of_rank.extents, name in ("lse", "dlse")
    if own_heads is not None:
        extents = replace(extents, num_heads=own_heads)
    shape = extents.lse_shape if of_lse else extents.out_shape
    dtype = of_rank.accumulator if of_lse else of_rank.dtype
    x = of_rank.executor.asarray(name, x)
    if tuple(x.shape) != shape:
        raise ShapeError(f"{name} has shape {tuple(x.shape)}; {shape} is needed for these q, k and v")
    if x.dtype != dtype:
        raise DTypeError(f"{name} has dtype {x.dtype}; {np.dtype(dtype)} is needed")
    return x


def check_rank(q: Any, k: Any, v: Any, lengths: tuple[int, ...] | None, options: Mapping[str, Any]) -> Problem:
    """Check the tokens of this rank as one attention."""
    executor = arguments.executor_of(q, k, v, None, {})
    q, k, v = executor.asarray("q", q), executor.asarray("k", k), executor.asarray("v", v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in DTYPES:
            raise DTypeError(f"{name} has dtype {x.dtype}; allowed are {', '.join(ELEMENTS)}")
    dtype = arguments.check_dtypes(q, k, v, None)
    arguments.check_rank(q, k, v, packed=lengths is not None)
    extents = arguments.check_qkv(q, k, v, batch=None if lengths is None else len(lengths))
    resolved = _OPERATION.check(
        options,
        executor,
        logits_shape=(extents.batch, extents.num_heads, extents.seqlen_q, extents.seqlen_k),
        num_kv_heads=extents.num_kv_heads,
        dtype=dtype,
    )
    return Problem(executor, q, k, v, None, dtype, extents, resolved.scale_for(extents.head_dim), resolved)
