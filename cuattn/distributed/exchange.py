"""Between tokens of all heads and heads of all tokens: the two ways in which an array can be divided.

An array is [..., tokens, heads, dim]. What goes to one rank, of all arrays, is one message.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cuattn.distributed.group import Group
from cuattn.runtime.executor import Executor

__all__ = ["Divided", "to_heads", "to_tokens"]

Integers = NDArray[np.int64]


class Divided(NamedTuple):
    """An array, and how ranks divide it: the places of their tokens in the whole, and their heads."""

    array: Any
    places: Sequence[Integers]
    heads: Sequence[slice]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.places))


def to_heads(executor: Executor, group: Group, arrays: Sequence[Divided]) -> list[Any]:
    """Return each array with all tokens and the heads of this rank, from those with its tokens and all heads."""
    with executor.on_device():
        send = [[x.array[..., x.heads[rank], :] for x in arrays] for rank in range(group.size)]
        shapes = [
            [_shape(x, len(x.places[rank]), x.heads[group.rank].stop - x.heads[group.rank].start) for x in arrays]
            for rank in range(group.size)
        ]
    received = _exchange(executor, group, send, shapes, arrays)
    found = []
    with executor.on_device():
        for number, x in enumerate(arrays):
            own = x.heads[group.rank]
            whole = executor.xp.empty(_shape(x, x.num_tokens, own.stop - own.start), x.array.dtype)
            for rank, places in enumerate(x.places):
                whole[..., _index(executor, places), :, :] = received[rank][number]
            found.append(whole)
    return found


def to_tokens(executor: Executor, group: Group, arrays: Sequence[Divided], num_heads: Sequence[int]) -> list[Any]:
    """Return each array with the tokens of this rank and all heads: the way back.

    ``num_heads``: of the wholes. Where several ranks have one head, their arrays are added, in the order of ranks.
    """
    with executor.on_device():
        send = [[x.array[..., _index(executor, x.places[rank]), :, :] for x in arrays] for rank in range(group.size)]
    shapes = [
        [_shape(x, len(x.places[group.rank]), x.heads[rank].stop - x.heads[rank].start) for x in arrays]
        for rank in range(group.size)
    ]
    received = _exchange(executor, group, send, shapes, arrays)
    found = []
    with executor.on_device():
        for number, x in enumerate(arrays):
            whole = executor.xp.empty(_shape(x, len(x.places[group.rank]), num_heads[number]), x.array.dtype)
            filled = 0
            for rank, heads in enumerate(x.heads):
                part = received[rank][number]
                both = max(0, filled - heads.start) if heads.stop > heads.start else 0
                whole[..., heads.start : heads.start + both, :] += part[..., :both, :]
                whole[..., heads.start + both : heads.stop, :] = part[..., both:, :]
                filled = max(filled, heads.stop)
            found.append(whole)
    return found


def _shape(x: Divided, tokens: int, heads: int) -> tuple[int, ...]:
    return (*x.array.shape[:-3], tokens, heads, x.array.shape[-1])


def _index(executor: Executor, places: Integers) -> Any:
    """Return an index of places: a slice where they follow each other."""
    if not len(places):
        return slice(0, 0)
    if places[-1] - places[0] == len(places) - 1 and (np.diff(places) == 1).all():
        return slice(int(places[0]), int(places[-1]) + 1)
    return executor.xp.asarray(places)


def _exchange(
    executor: Executor,
    group: Group,
    send: Sequence[Sequence[Any]],
    shapes: Sequence[Sequence[tuple[int, ...]]],
    arrays: Sequence[Divided],
) -> list[list[Any]]:
    """Send arrays to each rank, and return those of given shapes that each has sent."""
    dtypes = [x.array.dtype for x in arrays]
    # in a message, larger elements come first: so all lie at multiples of their size
    order = sorted(range(len(arrays)), key=lambda number: -dtypes[number].itemsize)
    outgoing, incoming, received = [], [], []
    with executor.on_device():
        for rank in range(group.size):
            message, views = _message(executor, [x.shape for x in send[rank]], dtypes, order)
            for view, x in zip(views, send[rank], strict=True):
                view[...] = x
            outgoing.append(message)
            room, views = _message(executor, shapes[rank], dtypes, order)
            incoming.append(room)
            received.append(views)
    group.all_to_all(outgoing, incoming)
    return received


def _message(
    executor: Executor, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[np.dtype[Any]], order: Sequence[int]
) -> tuple[Any, list[Any]]:
    """Return room for arrays, as bytes and as views, the latter in their own order."""
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
    message, first = executor.xp.empty(sum(sizes), np.uint8), 0
    views: list[Any] = [None] * len(sizes)
    for number in order:
        views[number] = message[first : first + sizes[number]].view(dtypes[number]).reshape(shapes[number])
        first += sizes[number]
    return message, views
