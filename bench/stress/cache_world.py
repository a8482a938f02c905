"""A paged cache, and its twin that gets the same calls without any exception: what the cache must be like."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cuattn import PagedKVCache, errors

__all__ = ["SIZES", "RowTwin", "Twin", "World"]

PAGES, PAGE_SIZE, HEAD_DIM = 14, 3, 2
SIZES = {"num_layers": 1, "num_kv_heads": 1, "head_dim": HEAD_DIM, "dtype": np.float32}


def paged_cache() -> PagedKVCache:
    """A small paged cache, which is soon full."""
    return PagedKVCache(PAGES, PAGE_SIZE, prefix_caching=True, **SIZES)


@dataclass(eq=False)
class Twin:
    """A cache with its sequences and open steps by number, so that two of them can be given the same calls."""

    cache: Any = field(default_factory=paged_cache)
    seqs: dict[int, Any] = field(default_factory=dict)
    steps: dict[int, Any] = field(default_factory=dict)

    def call(self, name: str, number: int, args: tuple[Any, ...]) -> Any:
        """Make one call; what it returns is for `keep`. Numbers stand for sequences and steps."""
        cache = self.cache
        if name == "add":
            return cache.add(*args)
        if name == "fork":
            return cache.fork(self.seqs[args[0]])
        if name == "reserve":
            seqs, counts, tokens = args
            return cache.reserve([self.seqs[seq] for seq in seqs], counts, tokens)
        if name == "append":
            step = self.steps[args[0]]
            rows = np.array([key_after(seq) for seq in self.prefixes(step)], np.float32).reshape(-1, 1, HEAD_DIM)
            return step.append(0, rows, -rows)
        if name in ("commit", "abort"):
            return getattr(self.steps[args[0]], name)()
        if name == "truncate":
            return cache.truncate(self.seqs[args[0]], args[1])
        if name == "free":
            return cache.free(self.seqs[args[0]])
        return getattr(cache, name)([self.seqs[seq] for seq in args[0]])

    def keep(self, name: str, number: int, args: tuple[Any, ...], result: Any) -> None:
        """Note what a call that happened has made or ended."""
        if name in ("add", "fork"):
            self.seqs[number] = result if result is not None else self.cache.sequences[-1]
        elif name == "reserve" and result is not None:
            self.steps[number] = result
        elif name in ("commit", "abort"):
            del self.steps[args[0]]
        elif name == "free":
            del self.seqs[args[0]]

    def prefixes(self, step: Any) -> list[tuple[int, ...]]:
        """Return for each token of a step all tokens up to it; those of every sequence are known."""
        found = []
        for seq, count, new in zip(step.sequences, step.counts.tolist(), step._opened.tokens, strict=True):
            tokens = (*seq.tokens, *new)
            found += [tokens[: seq.length + i + 1] for i in range(count)]
        return found

    def state(self) -> tuple[Any, ...]:
        """Everything that is to be as before or as after, in an order that does not depend on what was undone."""
        cache, pool, arrays = self.cache, self.cache._pool, self.cache._storage.arrays
        stats = cache.stats()  # first: this also settles what was interrupted

        def rows(page: int, num_slots: int) -> tuple[bytes, ...]:
            return tuple(x[page, :, :num_slots].tobytes() for x in arrays.values())

        seqs = []
        for number, seq in sorted(self.seqs.items()):
            filled = [min(PAGE_SIZE, max(0, seq.length - i * PAGE_SIZE)) for i in range(len(seq.pages))]
            held = [rows(page, n) for page, n in zip(seq.pages, filled, strict=True)]
            on_host = [[x.tobytes() for x in cache._host.contents(page)] for page in seq._host_pages]
            on_device = [cache._host.page_of(page) for page in seq._host_pages]
            in_step = seq._step is not None
            seqs.append((number, seq.length, seq.tokens, seq.pages, seq.state, in_step, held, on_host, on_device))
        published = {page: (node.tokens, rows(page, PAGE_SIZE)) for page, node in cache._index._node_of_page.items()}
        of_pool = list(pool.references), pool.free_pages, pool.cached_pages
        return stats, seqs, published, of_pool, len(cache._index), len(cache.sequences)

    def faults(self) -> list[str]:
        """What does not hold of the tables by themselves."""
        cache, pool, stats = self.cache, self.cache._pool, self.cache.stats()
        seqs = cache.sequences
        tables = Counter(page for seq in seqs for page in seq.pages)
        tables.update(page for step in cache._open for _, page, _ in step._reservation.copies)
        on_host = Counter(page for seq in seqs for page in seq._host_pages)
        reserved = {seq: n for step in cache._open for seq, n in zip(step.sequences, step.counts, strict=True)}
        claims = {
            "references": list(pool.references) == [tables[page] for page in range(PAGES)],
            "every page once": sorted([*pool.free_pages, *pool.cached_pages, *tables]) == list(range(PAGES)),
            "counts": stats.used == len(tables) and stats.used + stats.cached + stats.free == PAGES,
            "cached pages are found": set(pool.cached_pages) <= set(cache._index._node_of_page),
            "tables are long enough": all(
                len(seq.pages) == -(-(seq.length + reserved.get(seq, 0)) // PAGE_SIZE)
                for seq in seqs
                if seq.state == "live"
            ),
            "host pages": all(cache._host.references(page) == n for page, n in on_host.items())
            and len(cache._host) == len(on_host),
            "steps": {seq for seq in seqs if seq._step is not None} == set(reserved),
            "nodes": all(node.page == page for page, node in cache._index._node_of_page.items()),
            "the lock is free": not cache._lock._is_owned(),
            "nothing is left to undo": not cache._journal,
        }
        return [claim for claim, holds in claims.items() if not holds]


class RowTwin(Twin):
    """A twin of a cache of rows."""

    def state(self) -> tuple[Any, ...]:
        cache, stats = self.cache, self.cache.stats()
        seqs = [
            (number, seq.length, seq.tokens, seq.row, seq.state, seq._first, seq._step is not None)
            for number, seq in sorted(self.seqs.items())
        ]
        return stats, seqs, list(cache._free_rows), len(cache.sequences)

    def faults(self) -> list[str]:
        cache, rows = self.cache, [seq.row for seq in self.cache.sequences]
        claims = {
            "every row once": sorted([*cache._free_rows, *rows]) == list(range(cache.batch)),
            "steps": {seq for seq in cache.sequences if seq._step is not None}
            == {seq for step in cache._open for seq in step.sequences},
            "the lock is free": not cache._lock._is_owned(),
            "nothing is left to undo": not cache._journal,
        }
        return [claim for claim, holds in claims.items() if not holds]


@dataclass(eq=False)
class World:
    """A cache whose calls are interrupted by an exception at some bytecode, and its twin whose calls are not."""

    real: Twin = field(default_factory=Twin)
    twin: Twin = field(default_factory=Twin)
    next_number: int = 0

    def appended(self, number: int) -> bool:
        """Whether the step has its keys and values."""
        return 0 in self.real.steps[number]._appended

    def do(self, name: str, *args: Any) -> None:
        """Make a call of both, without an exception; `OutOfPagesError` of both counts as none."""
        number = self.next_number
        self.next_number += 1
        results = []
        for side in (self.real, self.twin):
            try:
                result = side.call(name, number, args)
            except errors.OutOfPagesError as error:
                results.append(str(error))
                continue
            side.keep(name, number, args, result)
            results.append(None)
        assert results[0] == results[1], (name, args, results)


def key_after(tokens: tuple[int, ...]) -> tuple[float, ...]:
    """Numbers for the key of the last of some tokens: a function of all of them, as in a model."""
    return tuple(float(x) for x in np.random.default_rng([len(tokens), *tokens]).integers(-9, 9, HEAD_DIM))
