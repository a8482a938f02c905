"""Each rank has a part of the batch, and all weights or a shard of them."""

from __future__ import annotations

import numpy as np

from cuattn.distributed import Group
from examples.char_transformer.model import Shape

from .common import Arrays, one_rank, share, summed


def data_parallel(shape: Shape):
    """Return the step in which every rank has all weights; gradients are added up in one all_reduce."""

    def step(group: Group, weights: Arrays, tokens: np.ndarray, targets: np.ndarray) -> tuple[float, Arrays]:
        mine = share(len(tokens), group)
        loss, grads = one_rank(weights, shape).loss_and_grads(tokens[mine], targets[mine])
        return summed(group, float(loss), grads, (mine.stop - mine.start) / len(tokens))

    return step


def sharded(shape: Shape):
    """Return the step in which a rank owns 1/R of the weights: gathered for the step, gradients go to their owners.

    What a rank keeps between steps (its weights, and the state of the optimizer) is its shard. Here the optimizer is
    the same for every way, so the gradients of all shards are handed out once more at the end, and not counted.
    """

    def step(group: Group, weights: Arrays, tokens: np.ndarray, targets: np.ndarray) -> tuple[float, Arrays]:
        names, sizes = list(weights), [w.size for w in weights.values()]
        flat = padded(np.concatenate([w.ravel() for w in weights.values()]), group.size)
        shard = np.ascontiguousarray(flat.reshape(group.size, -1)[group.rank])
        whole = group.all_gather(shard).ravel()[: sum(sizes)]
        pieces = np.split(whole, np.cumsum(sizes)[:-1])
        gathered = {name: x.reshape(weights[name].shape) for name, x in zip(names, pieces, strict=True)}

        mine = share(len(tokens), group)
        loss, grads = one_rank(gathered, shape).loss_and_grads(tokens[mine], targets[mine])
        weight = (mine.stop - mine.start) / len(tokens)
        found = padded(np.concatenate([grads[name].ravel() for name in names]) * weight, group.size)
        parts = np.empty_like(found).reshape(group.size, -1)
        group.all_to_all(list(found.reshape(group.size, -1)), list(parts))  # a reduce-scatter, in the order of ranks
        of_shard = parts.sum(axis=0)
        sent = group.traffic.bytes

        total = group.all_reduce(np.array([float(loss) * weight]))
        everything = group.all_gather(of_shard).ravel()[: sum(sizes)]
        pieces = np.split(everything, np.cumsum(sizes)[:-1])
        group.traffic.reset()
        group.traffic.count("sharded", sent)
        return float(total[0]), {name: x.reshape(weights[name].shape) for name, x in zip(names, pieces, strict=True)}

    return step


def padded(x: np.ndarray, size: int) -> np.ndarray:
    """Return numbers with zeros behind them, a multiple of ``size``."""
    return np.pad(x, (0, -x.size % size))
