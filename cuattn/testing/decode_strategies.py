"""Hypothesis strategies for decode calls: awkward lengths, groups and page sizes first, poison where no key is.

Only sizes, kinds and a seed are drawn, as in :mod:`cuattn.testing.strategies`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from cuattn.testing.arrays import Layout
from cuattn.testing.decode_problems import SCALE_KINDS, CachedProblem, cached_problem
from cuattn.testing.option_strategies import STRATEGIES, Drawn, names_on
from cuattn.testing.strategies import dtypes, fill, layouts, value_kinds

__all__ = [
    "AWKWARD_LENGTHS",
    "DECODE_OPTIONS",
    "GROUPS",
    "PAGE_SIZES",
    "cache_lengths",
    "cached_problems",
    "decode_options",
    "packed_problems",
    "page_sizes",
]

#: Keys of a sequence: none, one, primes, and the tile sizes of the kernels with both neighbours.
AWKWARD_LENGTHS = (1, 0, 2, 3, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97, 127, 128, 129, 191, 257)

#: (H, G): one head, MQA, GQA with groups of powers of two and others, groups of more heads than a tile has rows.
GROUPS = ((1, 1), (2, 1), (2, 2), (3, 1), (6, 2), (8, 1), (16, 2), (17, 1), (71, 1))

PAGE_SIZES = (16, 1, 3, 100, 256)

#: What :func:`decode_options` can draw.
DECODE_OPTIONS = (*names_on("decode"), "num_splits")


def page_sizes() -> st.SearchStrategy[int]:
    """Draw page sizes, mostly :data:`PAGE_SIZES`; any up to 300."""
    return st.one_of(st.sampled_from(PAGE_SIZES), st.integers(1, 300))


@st.composite
def cache_lengths(draw: st.DrawFn, max_length: int = 260, max_batch: int = 4) -> list[int]:
    """Draw lengths of some sequences: awkward ones, or one long among short ones."""
    awkward = [n for n in AWKWARD_LENGTHS if n <= max_length]
    length = st.one_of(st.sampled_from(awkward), st.integers(0, max_length))
    if draw(st.booleans()):
        return draw(st.lists(length, min_size=1, max_size=max_batch))
    tiny = draw(st.lists(st.integers(0, 3), min_size=1, max_size=max_batch + 2))
    tiny[draw(st.integers(0, len(tiny) - 1))] = draw(length)
    return tiny


@st.composite
def decode_options(
    draw: st.DrawFn, batch: int, num_heads: int, max_length: int, names: Sequence[str] = DECODE_OPTIONS
) -> dict[str, Any]:
    """Draw options of a call, those of `names` only; each is left out half of the time."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    call = Drawn(rng, batch, num_heads, 1, 0, max_length)
    choices = {**STRATEGIES, "causal": lambda call: st.sampled_from([False, "bottom_right", "top_left"])}
    return {name: draw(choices[name](call)) for name in names if draw(st.booleans())}


@st.composite
def cached_problems(
    draw: st.DrawFn,
    *,
    dtype: st.SearchStrategy[np.dtype[Any]] | None = None,
    head_dims: st.SearchStrategy[tuple[int, int]] | None = None,
    heads: st.SearchStrategy[tuple[int, int]] | None = None,
    lengths: st.SearchStrategy[list[int]] | None = None,
    seqlen_q: st.SearchStrategy[int] | None = None,
    page_size: st.SearchStrategy[int | None] | None = None,
    formats: st.SearchStrategy[str | None] | None = None,
    options: Sequence[str] = (),
    kinds: st.SearchStrategy[str] | None = None,
    layout: st.SearchStrategy[Layout] | None = None,
) -> CachedProblem:
    """Draw whole problems of equally many queries a sequence, contiguous or paged. Queries may outnumber keys."""
    return _problem(draw, False, dtype, head_dims, heads, lengths, seqlen_q, page_size, formats, options, kinds, layout)


@st.composite
def packed_problems(
    draw: st.DrawFn,
    *,
    dtype: st.SearchStrategy[np.dtype[Any]] | None = None,
    head_dims: st.SearchStrategy[tuple[int, int]] | None = None,
    heads: st.SearchStrategy[tuple[int, int]] | None = None,
    lengths: st.SearchStrategy[list[int]] | None = None,
    seqlen_q: st.SearchStrategy[int] | None = None,
    page_size: st.SearchStrategy[int] | None = None,
    formats: st.SearchStrategy[str | None] | None = None,
    options: Sequence[str] = (),
    kinds: st.SearchStrategy[str] | None = None,
    layout: st.SearchStrategy[Layout] | None = None,
) -> CachedProblem:
    """Draw whole problems of prefill and decode mixed: each sequence has a number of queries of its own, or none."""
    pages = page_size if page_size is not None else page_sizes()
    return _problem(draw, True, dtype, head_dims, heads, lengths, seqlen_q, pages, formats, options, kinds, layout)


def _problem(
    draw: st.DrawFn,
    packed: bool,
    dtype: st.SearchStrategy[np.dtype[Any]] | None,
    head_dims: st.SearchStrategy[tuple[int, int]] | None,
    heads: st.SearchStrategy[tuple[int, int]] | None,
    lengths: st.SearchStrategy[list[int]] | None,
    seqlen_q: st.SearchStrategy[int] | None,
    page_size: Any,
    formats: st.SearchStrategy[str | None] | None,
    options: Sequence[str],
    kinds: st.SearchStrategy[str] | None,
    layout: st.SearchStrategy[Layout] | None,
) -> CachedProblem:
    own_lengths = draw(lengths if lengths is not None else cache_lengths())
    queries = seqlen_q if seqlen_q is not None else st.sampled_from((1, 1, 2, 5, 9, 0, 17))
    num_heads, num_kv_heads = draw(heads if heads is not None else st.sampled_from(GROUPS))
    kind = draw(kinds if kinds is not None else value_kinds())
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch, real = len(own_lengths), draw(dtype if dtype is not None else dtypes())
    kv_format = draw(formats if formats is not None else st.none())
    return cached_problem(
        rng,
        lengths=own_lengths,
        seqlens_q=[draw(queries) for _ in own_lengths] if packed else draw(queries),
        heads=(num_heads, num_kv_heads),
        head_dims=draw(head_dims if head_dims is not None else st.sampled_from(((32, 32), (31, 17), (8, 8), (24, 32)))),
        dtype=real,
        kv_format=None if real == np.float64 else kv_format,  # nothing narrow is for float64 queries
        scales=draw(st.sampled_from(SCALE_KINDS)),
        page_size=draw(page_size if page_size is not None else st.one_of(st.none(), page_sizes())),
        layouts=[draw(layout if layout is not None else layouts(3 if packed and i == 0 else 4)) for i in range(3)],
        room=draw(st.sampled_from((1, 0, 40))),
        fill=lambda shape, real, of: fill(shape, real, kind, of),
        **draw(decode_options(batch, num_heads, max(own_lengths), options)),
    )
