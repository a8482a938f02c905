"""Plain lists in the place of `KVCache` and `StreamingKVCache`: what each token sees, one token after the other."""

from __future__ import annotations

import numpy as np

from cuattn import KVCache, StreamingKVCache
from cuattn.testing import assert_decode_close

LAYERS, HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM_V = 2, 4, 2, 8, 5


class Stream:
    """One sequence: the numbers of the tokens that are kept, and all tokens that there ever were by number."""

    def __init__(self, num_sinks=0, window=None):
        self.num_sinks, self.window = num_sinks, window
        self.kept, self.length, self.contents = [], 0, {}

    def copy(self):
        other = Stream(self.num_sinks, self.window)
        other.kept, other.length, other.contents = list(self.kept), self.length, dict(self.contents)
        return other

    @property
    def latest(self):
        return [n for n in self.kept if n >= self.num_sinks]

    def push(self, content):
        """One more token; what it sees afterwards, itself last."""
        self.contents[self.length] = content
        self.kept.append(self.length)
        self.length += 1
        if self.window is not None and len(self.latest) > self.window:
            self.kept.remove(self.latest[0])
        return [self.contents[n] for n in self.kept]

    def lengths(self):
        """Those that it can be truncated to."""
        oldest = self.latest[0] if self.latest else self.length
        return [n for n in range(self.length + 1) if n <= self.num_sinks or n >= oldest]

    def truncate(self, length):
        self.kept = [n for n in self.kept if n < length]
        self.length = length


def sizes(executor, **more):
    own = dict(num_layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, head_dim_v=HEAD_DIM_V, dtype=np.float32)
    return {**own, "array_module": executor.xp, **more}


class Model:
    """A cache, and beside it a `Stream` for each of its sequences."""

    def __init__(self, executor, cache, dtype=np.float32):
        self.executor, self.cache, self.dtype = executor, cache, np.dtype(dtype)
        self.rng = np.random.default_rng(0)
        self.streaming = isinstance(cache, StreamingKVCache)
        self.streams = {}

    def add(self):
        seq = self.cache.add()
        limits = (self.cache.num_sinks, self.cache.window) if self.streaming else ()
        self.streams[seq] = Stream(*limits)
        return seq

    def numbers(self, *shape):
        return self.rng.standard_normal(shape).astype(self.dtype)

    def reserve(self, seqs, counts):
        """An open step, with its tokens and what each of them will see: `layers` of (q, k, v), and `seen`."""
        step = self.cache.reserve(seqs, counts)
        shapes = (HEADS, HEAD_DIM), (KV_HEADS, HEAD_DIM), (KV_HEADS, HEAD_DIM_V)
        step.layers = [tuple(self.numbers(sum(counts), *shape) for shape in shapes) for _ in range(LAYERS)]
        step.after = {seq: self.streams[seq].copy() for seq in seqs}
        owners = [seq for seq, count in zip(seqs, counts, strict=True) for _ in range(count)]
        step.seen = [step.after[seq].push((step, token)) for token, seq in enumerate(owners)]
        return step

    def append(self, step, layer):
        _, k, v = step.layers[layer]
        step.append(layer, self.executor.array(k), self.executor.array(v))

    def attend(self, step, layer, *, batched=False, **options):
        """Attend, and compare each token with a sequence of its own that has just the keys that it sees."""
        q = step.layers[layer][0]
        shaped = q.reshape(len(step.sequences), -1, *q.shape[1:]) if batched else q
        out, lse = step.attend(layer, self.executor.array(shaped), return_lse=True, **options)
        out, lse = self.executor.numpy(out), self.executor.numpy(lse)
        if batched:
            assert out.shape[:2] == shaped.shape[:2] and lse.shape == (len(out), HEADS, shaped.shape[1])
            out, lse = out.reshape(-1, *out.shape[2:]), lse.transpose(1, 0, 2).reshape(HEADS, -1)
        if not len(q):
            assert out.shape == (0, HEADS, HEAD_DIM_V) and lse.shape == (HEADS, 0)
            return
        k, v, lengths = self.gathered(step, layer)
        if self.streaming:
            options |= {"rope": self.cache.rope, "rotate_keys": self.cache.rope is not None}
        if np.ndim(options.get("alibi_slopes", 0)) == 2:
            options["alibi_slopes"] = np.repeat(options["alibi_slopes"], step.counts, axis=0)
        assert_decode_close(out[:, None], q[:, None], k, v, lengths, lse=lse.T[:, :, None], **options)

    def gathered(self, step, layer):
        """What each token of a step sees: k and v [T, longest, ...] and how much of them there is."""
        lengths = [len(seen) for seen in step.seen]
        shape = len(lengths), max(lengths, default=0)
        k, v = (np.full((*shape, *x.shape[1:]), np.nan, x.dtype) for x in step.layers[layer][1:])
        for row, seen in enumerate(step.seen):
            for place, (its_step, token) in enumerate(seen):
                k[row, place], v[row, place] = (x[token] for x in its_step.layers[layer][1:])
        return k, v, lengths

    def commit(self, step):
        step.commit()
        self.streams.update(step.after)

    def step(self, seqs, counts, **options):
        """A whole step, checked in every layer."""
        step = self.reserve(seqs, counts)
        for layer in range(LAYERS):
            self.append(step, layer)
            self.attend(step, layer, **options)
        self.commit(step)
        return step

    def truncate(self, seq, length):
        self.cache.truncate(seq, length)
        self.streams[seq].truncate(length)

    def free(self, seq):
        self.cache.free(seq)
        del self.streams[seq]

    def state(self):
        """All that may not change when a call fails."""
        return self.cache.stats(), [(seq, seq.length, seq.state, seq.row) for seq in self.cache.sequences]

    def check(self):
        """The cache counts as the lists do; what a `KVCache` holds is what was put there."""
        stats = self.cache.stats()
        assert self.cache.sequences == tuple(self.streams)
        assert stats.sequences == len(self.streams) <= stats.batch
        assert stats.cached == sum(len(stream.kept) for stream in self.streams.values())
        assert stats.total == sum(stream.length for stream in self.streams.values())
        assert stats.waste == stats.sequences * stats.capacity - stats.cached >= 0
        rows = [seq.row for seq in self.streams]
        assert len(set(rows)) == len(rows) and all(0 <= row < stats.batch for row in rows)
        for seq, stream in self.streams.items():
            assert seq.length == stream.length and seq.state == "live"
            if self.streaming:
                assert self.cache.cached_tokens(seq).tolist() == stream.kept
                continue
            for layer in range(LAYERS):
                arrays = self.cache.layer_arrays(layer)
                for i, name in ((1, "k_cache"), (2, "v_cache")):
                    held = self.executor.numpy(arrays[name][seq.row, : seq.length])
                    given = [step.layers[layer][i][token] for step, token in map(stream.contents.get, stream.kept)]
                    assert [x.tobytes() for x in held] == [x.tobytes() for x in given]


def contiguous(executor, batch=3, max_seqlen=12, **more):
    own = sizes(executor, **more)
    return Model(executor, KVCache(batch, max_seqlen, **own), own["dtype"])


def streaming(executor, num_sinks=2, window=4, *, batch=3, max_chunk=3, **more):
    own = sizes(executor, batch=batch, max_chunk=max_chunk, **more)
    return Model(executor, StreamingKVCache(num_sinks, window, **own), own["dtype"])
