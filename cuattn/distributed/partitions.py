"""Which rank holds which tokens.

A partition says it for a sequence of any length n and R ranks: no length has to be divisible by anything. With 2 R
chunks, chunk c = [c n // 2R, (c + 1) n // 2R), rank r holds

* "contiguous": chunks 2r and 2r + 1, the piece [r n // R, (r + 1) n // R);
* "zigzag": chunks r and 2R - 1 - r, so that under a causal mask every rank has as much to do;
* "striped": tokens r, r + R, r + 2R, ...: balanced as well, but for n/R pairs.

Packed sequences are divided one by one: a rank holds its part of each, one after another.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cuattn.distributed.group import Group, check_group
from cuattn.errors import ArgumentError, DTypeError, ShapeError
from cuattn.runtime.executor import executor_for
from cuattn.scalars import MAX_EXTENT, choice, integer

__all__ = [
    "PARTITIONS",
    "Partition",
    "Strip",
    "partition",
    "positions_of",
    "rope_positions",
    "shard",
    "strips",
    "unshard",
]

Partition = Literal["contiguous", "zigzag", "striped"]
PARTITIONS = ("contiguous", "zigzag", "striped")
Integers = NDArray[np.int64]
_ON_THE_HOST = np.zeros(0)


class Strip(NamedTuple):
    """Tokens start, start + step, ... of a sequence, ``length`` of them."""

    start: int
    length: int
    step: int = 1


@lru_cache(maxsize=4096)
def strips(n: int, rank: int, size: int, kind: str) -> tuple[Strip, ...]:
    """Return the tokens of a rank, in the order in which it holds them; of either count, also 0.

    >>> strips(10, 0, 2, "zigzag")
    (Strip(start=0, length=2, step=1), Strip(start=7, length=3, step=1))
    """
    if kind == "striped":
        return (Strip(rank, max(0, -(-(n - rank) // size)), size),)
    if kind == "contiguous":
        first, end = rank * n // size, (rank + 1) * n // size
        return (Strip(first, end - first),)
    chunks = rank, 2 * size - 1 - rank
    return tuple(Strip(first := c * n // (2 * size), (c + 1) * n // (2 * size) - first) for c in chunks)


def partition(n: int, size: int, kind: Partition = "zigzag") -> list[Integers]:
    """Return the positions of the tokens of each rank, in the order in which it holds them.

    Parameters
    ----------
    n : int
        Tokens of the sequence, any number.
    size : int
        Ranks.
    kind : {"zigzag", "contiguous", "striped"}

    Returns
    -------
    positions : list of ``size`` int64 arrays, which hold 0 to n - 1 once

    Raises
    ------
    ArgumentError
        A negative length, no ranks, an unknown kind.

    Examples
    --------
    >>> from cuattn.distributed import partition
    >>> [x.tolist() for x in partition(7, 2, "zigzag")]
    [[0, 5, 6], [1, 2, 3, 4]]
    >>> [x.tolist() for x in partition(7, 2, "striped")]
    [[0, 2, 4, 6], [1, 3, 5]]
    """
    n, size = integer("n", n, 0, MAX_EXTENT), integer("size", size, 1, MAX_EXTENT)
    choice("kind", kind, PARTITIONS)
    return [_positions(n, rank, size, kind) for rank in range(size)]


def _positions(n: int, rank: int, size: int, kind: str) -> Integers:
    parts = [start + step * np.arange(length) for start, length, step in strips(n, rank, size, kind)]
    return np.concatenate(parts).astype(np.int64)


def positions_of(n: int, rank: int, size: int, kind: str, cu_seqlens: Any = None) -> Integers:
    """Return the places of a rank's tokens in the whole array: in a packed one with ``cu_seqlens``."""
    if cu_seqlens is None:
        return _positions(n, rank, size, kind)
    lengths = np.diff(cu_seqlens)
    parts = [first + _positions(int(m), rank, size, kind) for first, m in zip(cu_seqlens[:-1], lengths, strict=True)]
    return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)


def rope_positions(n: int | None, group: Group, *, partition: Partition = "zigzag", cu_seqlens: Any = None) -> Integers:
    """Return the position of each token that this rank holds in its sequence: what `cuattn.rope` turns it by.

    Parameters
    ----------
    n : int or None
        Tokens of the sequence of all ranks; None with ``cu_seqlens``.
    group : Group
    partition : {"zigzag", "contiguous", "striped"}
    cu_seqlens : integers [sequences + 1], optional
        Of packed sequences, of all ranks together.

    Returns
    -------
    positions : int64 array [tokens of the rank]

    Raises
    ------
    ArgumentError
        An unknown partition, a negative length, both or neither of ``n`` and ``cu_seqlens``, lengths that descend.

    Examples
    --------
    >>> from cuattn.distributed import ThreadGroup, rope_positions
    >>> ThreadGroup.run(2, lambda group: rope_positions(6, group).tolist())
    [[0, 4, 5], [1, 2, 3]]
    """
    group = check_group(group)
    choice("partition", partition, PARTITIONS)
    if (n is None) == (cu_seqlens is None):
        raise ArgumentError("rope_positions takes n or cu_seqlens: one of the two")
    if cu_seqlens is None:
        return _positions(integer("n", n, 0, MAX_EXTENT), group.rank, group.size, partition)
    lengths = np.diff(check_cu_seqlens(cu_seqlens))
    parts = [_positions(int(m), group.rank, group.size, partition) for m in lengths]
    return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)


def check_cu_seqlens(value: Any) -> Integers:
    """Return boundaries of packed sequences, which the host has to know; raises as `cuattn.attention_varlen` does."""
    array = executor_for(x=_ON_THE_HOST).metadata("cu_seqlens", value)
    if array.ndim != 1 or not array.size:
        raise ShapeError(f"cu_seqlens has shape {list(array.shape)}; [batch + 1] is needed")
    if array.dtype.kind not in "iu":
        raise DTypeError(f"cu_seqlens has dtype {array.dtype}; integers are needed")
    if array[0] != 0 or (array[1:] < array[:-1]).any() or int(array[-1]) > MAX_EXTENT:
        raise ArgumentError(f"cu_seqlens has to begin with 0, must not descend, and may end at {MAX_EXTENT}")
    return array.astype(np.int64)


def shard(x: Any, group: Group, *, partition: Partition = "zigzag", axis: int = 1, cu_seqlens: Any = None) -> Any:
    """Return the part of an array of all tokens that this rank holds.

    Parameters
    ----------
    x : array
        NumPy or CuPy. The same on every rank, of which only this rank's tokens are read.
    group : Group
    partition : {"zigzag", "contiguous", "striped"}
    axis : int
        Of the tokens: 1 of [batch, seqlen, heads, head_dim]; 0 of packed tokens, 2 of an lse.
    cu_seqlens : integers [sequences + 1], optional
        Of packed sequences, each of which is divided.

    Returns
    -------
    part : array
        A copy, contiguous.

    Raises
    ------
    ArgumentError, ShapeError
        An unknown partition, an axis that ``x`` has not, lengths that are not those of ``x``.

    Examples
    --------
    >>> import numpy as np
    >>> from cuattn.distributed import ThreadGroup, shard
    >>> ThreadGroup.run(2, lambda group: shard(np.arange(7), group, axis=0).tolist())
    [[0, 5, 6], [1, 2, 3, 4]]
    """
    group, executor = check_group(group), executor_for(x=x)
    x = executor.asarray("x", x)
    axis, n, cu = _axis(x, axis, partition, cu_seqlens)
    with executor.on_device():
        places = executor.xp.asarray(positions_of(n, group.rank, group.size, partition, cu))
        return executor.xp.ascontiguousarray(x.take(places, axis=axis))


def unshard(x: Any, group: Group, *, partition: Partition = "zigzag", axis: int = 1, cu_seqlens: Any = None) -> Any:
    """Return the array of all tokens, on every rank, from the part that each holds: the inverse of `shard`.

    Parameters
    ----------
    x : array
        The part of this rank.
    group, partition, axis, cu_seqlens
        As for `shard`.

    Returns
    -------
    whole : array

    Raises
    ------
    ArgumentError, ShapeError
        As for `shard`; MismatchError for parts that do not fit each other.

    Examples
    --------
    >>> import numpy as np
    >>> from cuattn.distributed import ThreadGroup, shard, unshard
    >>> x = np.arange(7)
    >>> ThreadGroup.run(2, lambda group: unshard(shard(x, group, axis=0), group, axis=0).tolist())[1]
    [0, 1, 2, 3, 4, 5, 6]
    """
    from cuattn.distributed.agreement import agree

    group, executor = check_group(group), executor_for(x=x)
    x = executor.asarray("x", x)
    axis, own, _ = _axis(x, axis, partition, None)
    cu = None if cu_seqlens is None else check_cu_seqlens(cu_seqlens)
    others = (*x.shape[:axis], *x.shape[axis + 1 :])
    said = agree(group, "unshard", {"dtype": str(x.dtype), "shape": others, "axis": axis, "partition": partition}, own)
    n = sum(said) if cu is None else int(cu[-1])
    places = [positions_of(n, rank, group.size, partition, cu) for rank in range(group.size)]
    if said != [len(p) for p in places]:
        raise ShapeError(f"ranks hold {said} tokens; {[len(p) for p in places]} is the partition {partition!r} of {n}")
    with executor.on_device(), group.together():
        xp = executor.xp
        longest = max(said)
        rows = xp.zeros((longest, *others), x.dtype)
        rows[:own] = xp.moveaxis(x, axis, 0)
        whole = xp.empty((n, *others), x.dtype)
        for rank, part in enumerate(group.all_gather(rows)):
            whole[xp.asarray(places[rank])] = part[: said[rank]]
        return xp.ascontiguousarray(xp.moveaxis(whole, 0, axis))


def _axis(x: Any, axis: Any, kind: Any, cu_seqlens: Any) -> tuple[int, int, Integers | None]:
    """Return the axis of tokens, how many there are, and the boundaries of their sequences."""
    choice("partition", kind, PARTITIONS)
    if not x.ndim:
        raise ShapeError("x is a number; an axis of tokens is needed")
    axis = integer("axis", axis, -x.ndim, x.ndim - 1) % x.ndim
    cu = None if cu_seqlens is None else check_cu_seqlens(cu_seqlens)
    if cu is not None and cu[-1] != x.shape[axis]:
        raise ShapeError(f"cu_seqlens ends with {cu[-1]} and x has {x.shape[axis]} tokens; they must be the same")
    return axis, int(x.shape[axis]), cu
