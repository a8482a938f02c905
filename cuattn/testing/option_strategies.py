"""How each option of attention is drawn: a Hypothesis strategy for every row of the table.

>>> sorted(set(STRATEGIES) - {row.name for row in OPTIONS})
['num_splits']
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from cuattn.ops.attention.dropout import DropoutOrigin
from cuattn.ops.attention.options import OPTIONS
from cuattn.testing.options import (
    BIAS_DTYPES,
    BIAS_KINDS,
    MASK_KINDS,
    broadcast_shapes,
    make_bias,
    make_descale,
    make_mask,
    make_sinks,
    make_slopes,
)

__all__ = ["STRATEGIES", "Drawn", "bias_dtypes", "names_on"]


class Drawn(NamedTuple):
    """The call that options are drawn for; ``seqlen_k`` of a cache is the longest sequence in it."""

    rng: np.random.Generator
    batch: int
    num_heads: int
    num_kv_heads: int
    seqlen_q: int
    seqlen_k: int


def names_on(family: str) -> tuple[str, ...]:
    """Return the rows of the table that operations of a family take."""
    return tuple(row.name for row in OPTIONS if family in row.on)


def bias_dtypes() -> st.SearchStrategy[np.dtype[Any]]:
    """Draw float16, bfloat16, float32 or float64, whatever the dtype of q is."""
    return st.sampled_from(BIAS_DTYPES)


def _window(of: Drawn) -> st.SearchStrategy[Any]:
    far = st.sampled_from([0, of.seqlen_k + 3, 2**31 - 2])
    edge = st.one_of(st.none(), st.integers(0, max(of.seqlen_k, 1)), far)
    return st.tuples(edge, edge)


def _bias(of: Drawn) -> st.SearchStrategy[Any]:
    return st.builds(
        lambda s, d, k: make_bias(of.rng, s, d, k), _broadcast(of), bias_dtypes(), st.sampled_from(BIAS_KINDS)
    )


def _mask(of: Drawn) -> st.SearchStrategy[Any]:
    return st.builds(lambda s, k: make_mask(of.rng, s, k), _broadcast(of), st.sampled_from(MASK_KINDS))


def _broadcast(of: Drawn) -> st.SearchStrategy[tuple[int, ...]]:
    return st.sampled_from(broadcast_shapes((of.batch, of.num_heads, of.seqlen_q, of.seqlen_k)))


def _slopes(of: Drawn) -> st.SearchStrategy[Any]:
    shapes = st.sampled_from([(of.num_heads,), (of.batch, of.num_heads)])
    return shapes.map(lambda shape: make_slopes(of.rng, shape))


def _diagonal_offset(of: Drawn) -> st.SearchStrategy[Any]:
    near = st.integers(-3, 3).map(lambda o: o + of.seqlen_k - of.seqlen_q)
    far = st.sampled_from([-of.seqlen_q - 1, of.seqlen_k + 1, -1000, 1000])
    per_batch = st.lists(st.one_of(near, far), min_size=of.batch, max_size=of.batch)
    return st.one_of(near, far, per_batch.map(lambda offsets: np.array(offsets, np.int32)))


def _dropout(of: Drawn) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries(
        {
            "dropout_p": st.sampled_from([0.1, 0.5, 0.9, 1e-3]),
            "dropout_seed": st.integers(0, 2**64 - 1),
            "dropout_offset": st.integers(0, 2**32 - 1),
            "dropout_origin": st.one_of(st.none(), st.none(), _dropout_origin(of)),
        }
    )


def _dropout_origin(of: Drawn) -> st.SearchStrategy[Any]:
    """A place for the call in a larger one: at whole blocks of 16, as tensor cores would have it, or anywhere."""
    place = st.one_of(st.integers(0, 8).map(lambda block: 16 * block), st.integers(0, 100), st.just(2**30 + 7))
    head = st.integers(0, 3)
    return st.builds(
        lambda batch, head, more, query, key, step: DropoutOrigin(
            batch, head, query, key, head + of.num_heads + more, step
        ),
        head,
        head,
        head,
        place,
        place,
        st.sampled_from([1, 1, 1, 2, 8]),
    )


def _descale(of: Drawn) -> st.SearchStrategy[Any]:
    return st.just((of.batch, of.num_kv_heads)).map(lambda shape: make_descale(of.rng, shape))


#: By the name of the row. That of "dropout" draws its keywords; "num_splits" is of decode calls alone.
STRATEGIES: dict[str, Callable[[Drawn], st.SearchStrategy[Any]]] = {
    "scale": lambda of: st.sampled_from([1.0, 0.5, 0.03, -0.25, 0.0]),
    "causal": lambda of: st.sampled_from([True, "bottom_right", "top_left"]),
    "window": _window,
    "chunk": lambda of: st.one_of(st.integers(1, max(of.seqlen_k, 1)), st.sampled_from([16, 64, 2**31 - 1])),
    "softcap": lambda of: st.sampled_from([1.0, 15.0, 50.0]),
    "bias": _bias,
    "mask": _mask,
    "alibi_slopes": _slopes,
    "sinks": lambda of: st.just(of.num_heads).map(lambda n: make_sinks(of.rng, n)),
    "dropout": _dropout,
    "diagonal_offset": _diagonal_offset,
    "precision": lambda of: st.sampled_from(["ieee", "tf32"]),
    **{f"{name}_descale": _descale for name in "qkv"},
    "num_splits": lambda of: st.sampled_from([1, 2, 3, 7, 64]),
}
