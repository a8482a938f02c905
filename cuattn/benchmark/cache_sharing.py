"""What pages save: slots that no token fills, and pages that several sequences share.

Counts of a real `cuattn.PagedKVCache` that does what a server does to it. Keys and values are one number a token:
how many pages a workload takes does not depend on them. The measures are those of W. Kwon et al., "Efficient memory
management for large language model serving with PagedAttention", 2023 (arXiv:2309.06180), sections 6.2 and 6.3.

Examples
--------
>>> waste_of([128, 256, 64, 512, 32, 384, 96, 448])
Waste(tokens=1920, pages=120, reserved_pages=240, fraction=0.0)
>>> parallel_sampling(4, prompt_len=32, output_len=16).saved
0.5
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

import cuattn
from cuattn.kv.caches.paged import PagedKVCache
from cuattn.kv.caches.sequence import Sequence as CachedSequence

__all__ = ["Sharing", "Waste", "beam_search", "parallel_sampling", "serve", "waste_of"]


@dataclass(frozen=True, slots=True)
class Waste:
    """Pages that a set of sequences takes, and their slots that no token fills.

    Attributes
    ----------
    tokens : int
    pages : int
        That the sequences take.
    reserved_pages : int
        That they would take if room for twice their length were reserved, as for an answer of unknown length.
    fraction : float
        Slots of the pages that no token fills, as a part of all.
    """

    tokens: int
    pages: int
    reserved_pages: int
    fraction: float


@dataclass(frozen=True, slots=True)
class Sharing:
    """Pages of sequences that share some, summed over the steps in which they grow.

    Attributes
    ----------
    pages : int
        In use.
    unshared_pages : int
        That there would be if every sequence had its own.
    copies : int
        Pages that were copied before they were written.
    """

    pages: int
    unshared_pages: int
    copies: int

    @property
    def saved(self) -> float:
        """Pages saved by sharing, as a part of the pages without it."""
        return 1 - self.pages / self.unshared_pages


def waste_of(lengths: Sequence[int], *, page_size: int = 16) -> Waste:
    """Pages of sequences of these lengths, computed in one step each."""
    pages = [-(-length // page_size) for length in lengths]
    cache = _cache(sum(pages), page_size)
    for length in lengths:
        _step(cache, [cache.add()], length)
    stats = cache.stats()
    reserved = sum(-(-2 * length // page_size) for length in lengths)
    return Waste(sum(lengths), stats.used, reserved, stats.waste_fraction)


def serve(
    num_sequences: int,
    *,
    prompt_len: int = 161,
    output_len: int = 338,
    batch: int = 8,
    page_size: int = 16,
    seed: int = 0,
) -> float:
    """The wasted part of the pages in use, on average over the steps of a server that always has ``batch`` sequences.

    Lengths of prompts and outputs are drawn from exponential distributions of these means, by default those of the
    ShareGPT conversations in the paper.
    """
    rng = np.random.default_rng(seed)
    drawn = 1 + rng.exponential((prompt_len, output_len), (num_sequences, 2)).astype(np.int64)
    most = np.sort(-(-drawn.sum(axis=1) // page_size))[-batch:]
    cache = _cache(int(most.sum()), page_size)
    waiting: Iterator[list[int]] = iter(drawn.tolist())
    remaining: dict[CachedSequence, int] = {}
    wasted = slots = 0
    while True:
        while len(remaining) < batch and (request := next(waiting, None)) is not None:
            seq = cache.add()
            _step(cache, [seq], request[0])
            remaining[seq] = request[1]
        if not remaining:
            return wasted / slots
        _step(cache, list(remaining), 1)
        stats = cache.stats()
        wasted += stats.waste
        slots += stats.used * page_size
        for seq in list(remaining):
            remaining[seq] -= 1
            if not remaining[seq]:
                cache.free(seq)
                del remaining[seq]


def parallel_sampling(num_samples: int, *, prompt_len: int, output_len: int, page_size: int = 16) -> Sharing:
    """Pages of several outputs of one prompt: they share its pages, and nothing else."""
    return _grow(num_samples, prompt_len, output_len, page_size, lambda: np.arange(num_samples))


def beam_search(
    width: int, *, prompt_len: int, output_len: int, page_size: int = 16, switch: float = 0.2, seed: int = 0
) -> Sharing:
    """Pages of beams of one prompt that replace each other: they share what they have in common.

    In each step every beam is replaced by one that is drawn at random, with the probability ``switch``. How often real
    beams do that depends on the model and the text; it decides how much is shared.
    """
    rng = np.random.default_rng(seed)

    def parents() -> np.ndarray:
        return np.where(rng.random(width) < switch, rng.integers(0, width, width), np.arange(width))

    return _grow(width, prompt_len, output_len, page_size, parents)


def _grow(width: int, prompt_len: int, output_len: int, page_size: int, parents: Callable[[], np.ndarray]) -> Sharing:
    cache = _cache(2 * width * -(-(prompt_len + output_len) // page_size), page_size)
    seqs = [cache.add()]
    _step(cache, seqs, prompt_len)
    seqs += [cache.fork(seqs[0]) for _ in range(width - 1)]
    pages = unshared = 0
    for _ in range(output_len):
        chosen = parents()
        children = [seqs[parent] if parent == i else cache.fork(seqs[parent]) for i, parent in enumerate(chosen)]
        for i, parent in enumerate(chosen):
            if parent != i:
                cache.free(seqs[i])
        seqs = children
        _step(cache, seqs, 1)
        stats = cache.stats()
        pages += stats.used
        unshared += stats.used + stats.shared
    return Sharing(pages, unshared, stats.copies)


def _cache(num_pages: int, page_size: int) -> PagedKVCache:
    return cuattn.PagedKVCache(num_pages, page_size, num_layers=1, num_kv_heads=1, head_dim=1, dtype=np.float32)


def _step(cache: PagedKVCache, seqs: list[CachedSequence], count: int) -> None:
    with cache.reserve(seqs, count) as step:
        numbers = np.zeros((step.num_tokens, 1, 1), np.float32)
        step.append(0, numbers, numbers)
        step.commit()
