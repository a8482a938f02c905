"""What all ways of dividing the work share: the model, the batches, sums over ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from cuattn.distributed import Group
from examples.char_transformer.attention import KernelAttention
from examples.char_transformer.data import Batches, Corpus, zen_of_python
from examples.char_transformer.model import CharTransformer, Shape, initial_weights

Arrays = dict[str, np.ndarray]
#: (group, weights, tokens, targets) -> the loss and the gradients of the whole batch, on every rank.
Step = Callable[[Group, Arrays, np.ndarray, np.ndarray], tuple[float, Arrays]]


@dataclass(frozen=True)
class Way:
    """A way of dividing the work: what a step computes, and the bytes that a rank sends in it, by formula."""

    name: str
    step: Step
    formula: str
    bytes: Callable[[Setting], Fraction]


@dataclass(frozen=True)
class Setting:
    """The problem. Numbers are float64, so that losses of several ranks can be told from those of one."""

    size: int  # ranks
    shape: Shape
    batch: int = 8

    @property
    def token_bytes(self) -> int:
        """The bytes of what one layer hands to the next, for the whole batch."""
        return self.batch * self.shape.context * self.shape.width * 8

    @property
    def weight_bytes(self) -> int:
        return 8 * sum(math.prod(w.shape) for w in initial_weights(self.shape, 0).values())

    def weights(self) -> Arrays:
        return {name: w.astype(np.float64) for name, w in initial_weights(self.shape, 1).items()}

    def batches(self) -> Batches:
        corpus = Corpus.of(zen_of_python())
        return Batches(corpus.encode(corpus.text), self.batch, self.shape.context, 1)


def shape_of(size: int) -> Shape:
    """Return the model for so many ranks: a head and a block for each."""
    vocabulary = len(Corpus.of(zen_of_python()).characters)
    return Shape(vocabulary, context=24, width=16 * size, heads=size, blocks=size)


def one_rank(weights: Mapping[str, np.ndarray], shape: Shape) -> CharTransformer:
    return CharTransformer(shape, weights, KernelAttention(np.float64))


def share(total: int, group: Group) -> slice:
    """Return this rank's part of so many."""
    return slice(group.rank * total // group.size, (group.rank + 1) * total // group.size)


def summed(group: Group, loss: float, grads: Mapping[str, np.ndarray], weight: float) -> tuple[float, Arrays]:
    """Add up what ranks have found of the loss and the gradients, each times its weight: one all_reduce of all."""
    parts = [np.array([loss]), *(x.ravel() for x in grads.values())]
    total = group.all_reduce(np.concatenate(parts) * weight)
    found, first = {}, 1
    for name, x in grads.items():
        found[name] = total[first : first + x.size].reshape(x.shape)
        first += x.size
    return float(total[0]), found


def all_reduce_bytes(nbytes: int, size: int) -> Fraction:
    return Fraction(2 * (size - 1) * nbytes, size)
