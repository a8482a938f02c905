"""Steps of a `PagedKVCache`, checked against the model, for tests by examples."""

from __future__ import annotations

import cuattn


def step(model, seqs, counts, tokens=None):
    """A whole step, checked against the model."""
    made = model.reserve(seqs, counts, tokens)
    assert made is not None, "out of pages"
    for _ in range(model.cache.num_layers):
        model.append(made)
    model.commit(made)
    model.check()


def prompt(model, tokens, cache_key=None):
    """A sequence whose prompt has been computed."""
    seq = model.add(list(tokens), cache_key)
    step(model, [seq], [len(tokens) - seq.length])
    return seq


def make(num_pages=8, page_size=4, **options):
    """A cache whose tables are all that matters."""
    shape = dict(num_layers=1, num_kv_heads=1, head_dim=1, dtype="float32")
    return cuattn.PagedKVCache(num_pages, page_size, **{**shape, **options})
