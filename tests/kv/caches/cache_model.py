"""What a paged cache must be, said without pages: every sequence is a list of tokens with its own keys and values.

`CacheModel` drives a `PagedKVCache` and keeps, for every sequence, a plain list of what was stored for its tokens.
`check` compares the two, and holds every invariant of the cache against the tables themselves.
"""

from __future__ import annotations

import zlib
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from cuattn import PagedKVCache, errors
from cuattn.reference import dequantize

UNKNOWN = -1  # a token that the cache was not told


@dataclass(eq=False)
class Known:
    """The model of a sequence: `tokens` are those with keys and values, `rows` what is stored for each."""

    cache_key: object
    tokens: list[int]  # distinct negative numbers for those that the cache was not told
    rows: list[tuple[bytes, ...]]  # of a token: for each layer and array, the bytes of its slot
    pending: list[int] = field(default_factory=list)  # told, but not yet computed
    told: bool = True  # the cache knows every token so far

    def copy(self) -> Known:
        return Known(self.cache_key, list(self.tokens), list(self.rows), list(self.pending), self.told)


@dataclass(eq=False)
class Open:
    """The model of an open step."""

    seqs: list
    tokens: list[list[int]]  # of each sequence
    told: list[bool]
    rows: list[list[list[bytes]]]  # of each sequence and token: so far
    num_appended: int = 0
    held: list[int] = field(default_factory=list)  # pages that the step may have to give back


class CacheModel:
    def __init__(self, executor, *, num_pages=9, page_size=2, num_layers=2, kv_format=None, prefix_caching=True):
        self.executor = executor
        self.cache = PagedKVCache(
            num_pages,
            page_size,
            num_layers=num_layers,
            num_kv_heads=1,
            head_dim=4,
            head_dim_v=2,
            dtype=np.float32,
            kv_format=kv_format,
            array_module=executor.xp,
            prefix_caching=prefix_caching,
        )
        for x in self.cache._storage.arrays.values():  # what was never written must never be felt
            x.fill(127 if x.dtype.kind in "iu" else np.nan)
        self.seqs: dict = {}
        self.steps: dict = {}
        self.stored: dict = {}  # what was stored for the last token of (cache key, tokens), wherever it was
        self.num_unknown = 0

    # --- numbers ----------------------------------------------------------------------------------------------------

    def vectors(self, cache_key, tokens, layer, side):
        """Keys or values of the last of `tokens`: as in a model, a function of all of them."""
        seed = zlib.crc32(repr((cache_key, tokens, layer, side)).encode())
        return np.random.default_rng(seed).standard_normal((1, 4 if side == "k" else 2), np.float32)

    def snapshot(self):
        """The arrays of the cache, on the host."""
        return {name: np.array(self.executor.numpy(x)) for name, x in self.cache._storage.arrays.items()}

    def row(self, arrays, page, slot, layer):
        return tuple(x[page, layer, slot].tobytes() for x in arrays.values())

    def rows(self, arrays, pages, length):
        """For each token of a table: the bytes in every layer."""
        size = self.cache.page_size
        return [
            tuple(
                part
                for layer in range(self.cache.num_layers)
                for part in self.row(arrays, pages[i // size], i % size, layer)
            )
            for i in range(length)
        ]

    # --- what a user does -------------------------------------------------------------------------------------------

    def add(self, tokens=None, cache_key=None):
        expected = self.longest_prefix(tokens or [], cache_key) if self.cache.prefix_caching else 0
        seq = self.cache.add(tokens, cache_key)
        tokens = list(tokens or [])
        assert seq.length == expected
        prefix = tokens[: seq.length]
        rows = [self.stored[cache_key, tuple(prefix[: i + 1])] for i in range(seq.length)]
        self.seqs[seq] = Known(cache_key, prefix, rows, tokens[seq.length :])
        return seq

    def longest_prefix(self, tokens, cache_key):
        """Tokens that a new sequence need not compute: by asking which chains of pages are published."""
        size, chains = self.cache.page_size, {chain for chain in self.published().values()}
        length = 0
        while length + size < len(tokens) and (cache_key, tuple(tokens[: length + size])) in chains:
            length += size
        return length

    def published(self):
        """For each page that can be found: the cache key and all tokens up to its end."""
        found = {}
        for page, node in self.cache._index._node_of_page.items():
            tokens, root = (), node
            while root.parent is not None:
                tokens, root = root.tokens + tokens, root.parent
            found[page] = root.cache_key, tokens
        return found

    def reserve(self, seqs, counts, given=None):
        """`given` tokens of each sequence, or None for those that are pending or unknown."""
        needed, held = self.pages_needed(seqs, counts)
        allocatable = self.cache.stats().allocatable
        before = self.state()
        try:
            step = self.cache.reserve(seqs, counts, given)
        except errors.OutOfPagesError as error:
            assert needed > allocatable and (error.needed, error.allocatable) == (needed, allocatable)
            assert self.state() == before
            return None
        assert needed <= allocatable
        tokens, told = [], []
        for i, (seq, count) in enumerate(zip(seqs, counts, strict=True)):
            known = self.seqs[seq]
            new = known.pending[:count]
            if given is not None and given[i] is not None:
                new = list(given[i])
            told.append(known.told and len(new) == count)
            tokens.append(new + [self.unknown() for _ in range(count - len(new))])
        self.steps[step] = Open(list(seqs), tokens, told, [[[] for _ in new] for new in tokens], held=held)
        return step

    def unknown(self):
        self.num_unknown += 1
        return -self.num_unknown

    def pages_needed(self, seqs, counts):
        """By counting tables: new pages, and copies of those that a table outside of the step's writers holds too."""
        size, tables = self.cache.page_size, self.tables()
        new = sum(-(-(seq.length + n) // size) - -(-seq.length // size) for seq, n in zip(seqs, counts, strict=True))
        writers = Counter(seq.pages[-1] for seq, n in zip(seqs, counts, strict=True) if n and seq.length % size)
        held = [page for page, n in writers.items() for _ in range(n if tables[page] > n else n - 1)]
        return new + len(held), held

    def tables(self):
        """How many tables hold each page: those of sequences, and those that open steps keep to be given back."""
        return Counter(
            [page for seq in self.seqs for page in seq.pages]
            + [page for step in self.steps.values() for page in step.held]
        )

    def append(self, step):
        """The next layer of an open step."""
        open_step, layer = self.steps[step], self.steps[step].num_appended
        numbers = {
            side: np.array(
                [
                    self.vectors(self.seqs[seq].cache_key, tuple(self.seqs[seq].tokens + new[: i + 1]), layer, side)
                    for seq, new in zip(open_step.seqs, open_step.tokens, strict=True)
                    for i in range(len(new))
                ],
                np.float32,
            ).reshape(-1, 1, dim)
            for side, dim in (("k", 4), ("v", 2))
        }
        self.check_not_shared(open_step)
        before = self.snapshot()
        step.append(layer, *(self.executor.array(numbers[side]) for side in "kv"))
        open_step.num_appended += 1
        after, size = self.snapshot(), self.cache.page_size
        for (page, slot), at in zip(
            ((seq.pages[i // size], i % size) for seq, i in self.places(open_step)),
            ((n, i) for n, new in enumerate(open_step.tokens) for i in range(len(new))),
            strict=True,
        ):
            open_step.rows[at[0]][at[1]] += self.row(after, page, slot, layer)
            for x in before.values():
                x[page, layer, slot] = 0
            self.check_numbers(after, page, slot, layer, numbers, sum(map(len, open_step.tokens[: at[0]])) + at[1])
            for x in after.values():
                x[page, layer, slot] = 0
        for name, x in before.items():  # nothing else was written
            assert x.tobytes() == after[name].tobytes()

    def places(self, open_step):
        for seq, new in zip(open_step.seqs, open_step.tokens, strict=True):
            for i in range(len(new)):
                yield seq, seq.length + i

    def check_not_shared(self, open_step):
        """No page that is written is in another table, but for those to be given back, which end before."""
        for seq, i in self.places(open_step):
            page = seq.pages[i // self.cache.page_size]
            assert sum(page in other.pages for other in self.seqs) == 1
            assert page not in self.published()
            holders = [other for other in self.steps.values() if page in other.held]
            assert all(other is open_step for other in holders)
            assert self.cache._host.host_of(page) is None

    def check_numbers(self, arrays, page, slot, layer, numbers, t):
        """What is stored is what was given, as nearly as the format has it."""
        kv_format = self.cache.kv_format
        for side in "kv":
            at = {name[2:]: x[page, layer, slot] for name, x in arrays.items() if name[0] == side}
            stored = dequantize(at.pop("pages"), kv_format, **at)
            bound = 0.0
            if "scale" in at:  # half a step
                bound = 0.5001 * at["scale"][:, None]
            elif "block_scales" in at:  # half a step, and what the largest number loses by the rounding of the scale
                bound = 1.5 * dequantize(np.full_like(at["block_scales"], 0x22), kv_format, **at)[:, :1]
            assert (abs(stored - numbers[side][t]) <= bound).all()

    def commit(self, step):
        step.commit()
        open_step = self.steps.pop(step)
        for seq, new, told, rows in zip(open_step.seqs, open_step.tokens, open_step.told, open_step.rows, strict=True):
            known = self.seqs[seq]
            known.tokens += new
            known.pending = known.pending[len(new) :]
            known.told = told or (not new and known.told)
            for row in rows:
                known.rows.append(tuple(row))
            for end in range(len(known.tokens) - len(new) + 1, len(known.tokens) + 1):
                key = known.cache_key, tuple(known.tokens[:end])
                assert self.stored.setdefault(key, known.rows[end - 1]) == known.rows[end - 1]

    def abort(self, step):
        before = {seq: (seq.length, seq.tokens) for seq in step.sequences}
        held = list(self.steps[step].held)
        tables = {seq: seq.pages for seq in step.sequences}
        step.abort()
        del self.steps[step]
        for seq in step.sequences:
            assert (seq.length, seq.tokens) == before[seq]
            assert len(seq.pages) == -(-seq.length // self.cache.page_size)
            assert all(old == new or new in held for old, new in zip(tables[seq], seq.pages, strict=False))

    def fork(self, seq):
        other = self.cache.fork(seq)
        assert other.pages == seq.pages and other.length == seq.length
        self.seqs[other] = self.seqs[seq].copy()
        return other

    def truncate(self, seq, length):
        self.cache.truncate(seq, length)
        known = self.seqs[seq]
        del known.tokens[length:], known.rows[length:]
        known.pending = []
        known.told = all(token >= 0 for token in known.tokens)

    def free(self, seq):
        self.cache.free(seq)
        del self.seqs[seq]

    def swap_in(self, seqs):
        host, stats = self.cache._host, self.cache.stats()
        pages = {page for seq in seqs for page in seq._host_pages}
        linked = {page for host_page in pages if (page := host.page_of(host_page)) is not None}
        needed = len(pages) - len(linked)
        room = stats.allocatable - sum(page in self.cache._pool.cached_pages for page in linked)
        before = self.state()
        try:
            self.cache.swap_in(seqs)
        except errors.OutOfPagesError:
            assert needed > room
            assert self.state() == before
        else:
            assert needed <= room
            # Shared as before: one page for each that there was in host memory.
            assert len({page for seq in seqs for page in seq.pages}) == len(pages)

    # --- what must be so --------------------------------------------------------------------------------------------

    def state(self):
        """Everything that a failed call must leave as it was."""
        cache = self.cache
        return (
            cache.stats(),
            [(seq.pages, seq.length, seq.tokens, seq.state, tuple(seq._host_pages)) for seq in cache.sequences],
            list(cache._pool.references),
            (cache._pool.free_pages, cache._pool.cached_pages),
            (self.published(), len(cache._index)),
            {name: x.tobytes() for name, x in self.snapshot().items()},
        )

    def check(self):
        cache, pool, arrays = self.cache, self.cache._pool, self.snapshot()
        size, stats, tables = cache.page_size, cache.stats(), self.tables()
        free, cached, published = set(pool.free_pages), set(pool.cached_pages), self.published()

        # Every page is used, cached or free.
        assert list(pool.references) == [tables[page] for page in range(cache.num_pages)]
        assert len(free) == len(pool.free_pages) == stats.free and len(cached) == len(pool.cached_pages) == stats.cached
        assert sorted([*free, *cached, *tables]) == list(range(cache.num_pages))
        assert stats.used == len(tables) and stats.used + stats.cached + stats.free == stats.num_pages
        assert stats.allocatable == stats.cached + stats.free
        assert cached <= set(published) and not free & set(published)
        assert set(cache.sequences) == set(self.seqs)

        # Every table fits its sequence, and every sequence is as if it were alone.
        reserved = {
            seq: len(new) for step in self.steps.values() for seq, new in zip(step.seqs, step.tokens, strict=True)
        }
        for seq, known in self.seqs.items():
            assert seq.length == len(known.tokens) == len(known.rows)
            if known.told:
                assert list(seq.tokens) == known.tokens + known.pending
            if seq.state == "swapped":
                assert not seq.pages
                contents = [cache._host.contents(page) for page in seq._host_pages]
                images = [{name: x[None] for name, x in zip(arrays, parts, strict=True)} for parts in contents]
                assert known.rows == [self.rows(images[i // size], [0], size)[i % size] for i in range(len(known.rows))]
                continue
            assert len(set(seq.pages)) == len(seq.pages) == -(-(seq.length + reserved.get(seq, 0)) // size)
            held = [(old, new) for step in self.steps for _, old, new in step._reservation.copies]
            assert self.rows(arrays, seq.pages, seq.length) == known.rows, held

        # A page that can be found holds what its chain says.
        for page, (cache_key, tokens) in published.items():
            rows = self.rows(arrays, [page], size)
            start = len(tokens) - size
            assert rows == [self.stored[cache_key, tokens[: start + i + 1]] for i in range(size)]

        # Slots that no table fills, table by table.
        filled = {page: 0 for page in tables}
        for seq in self.seqs:
            for i, page in enumerate(seq.pages):
                filled[page] = max(filled[page], min(size, seq.length + reserved.get(seq, 0) - i * size))
        for step in self.steps:
            for seq, old, _ in step._reservation.copies:
                filled[old] = max(filled[old], seq.length % size)
        assert stats.waste == sum(size - n for n in filled.values())
        assert stats.shared == sum(tables.values()) - len(tables)

        # Pages in host memory, each once, while somebody needs it.
        on_host = Counter(page for seq in self.seqs for page in seq._host_pages)
        assert len(on_host) == stats.host_pages
        assert all(cache._host.references(page) == n for page, n in on_host.items())

    def finish(self):
        """Without sequences nothing is used, and the index knows only what is cached."""
        for step in list(self.steps):
            self.abort(step)
        for seq in list(self.seqs):
            self.free(seq)
        self.check()
        stats = self.cache.stats()
        assert stats.used == stats.host_pages == stats.waste == 0
        if not stats.cached:
            assert len(self.cache._index) == 0
