"""Hypothesis strategies for attention and softmax problems: awkward sizes first, awkward memory, awkward values.

Only sizes, kinds and a seed are drawn; the elements come from a generator with that seed, so that an example stays
small and shrinks by its shape. Sizes are bounded for an executor of about 10 GFLOP/s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from numpy.typing import DTypeLike, NDArray

from cuattn.testing.arrays import Guarded, Layout, place

__all__ = [
    "AWKWARD_SEQLENS",
    "DTYPES",
    "HEAD_DIM_PAIRS",
    "HEAD_PAIRS",
    "VALUE_KINDS",
    "AttentionProblem",
    "attention_options",
    "attention_problems",
    "dtypes",
    "examples",
    "fill",
    "head_dim_pairs",
    "layouts",
    "seqlens",
    "softmax_inputs",
    "value_kinds",
]

DTYPES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32), np.dtype(np.float64))

#: One, small primes, and the tile sizes of the kernels and of a warp, each with both neighbours.
AWKWARD_SEQLENS = (1, 2, 3, 5, 7, 8, 9, 13, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 97, 127, 128, 129)

#: (D, E) pairs from four pairs of compiled buckets, at their edges and inside; few, because each pair of buckets is
#: compiled once per dtype and mask.
HEAD_DIM_PAIRS = (
    *((32, 32), (1, 1), (8, 8), (31, 32), (16, 7)),
    *((64, 64), (40, 40), (33, 64), (63, 48)),
    *((64, 32), (40, 8)),
    *((128, 128), (100, 120), (128, 97)),
)

#: (H, G): query heads and key/value heads.
HEAD_PAIRS = ((1, 1), (2, 2), (2, 1), (3, 1), (4, 2), (6, 3))

VALUE_KINDS = ("normal", "huge_logit", "constant_rows", "denormal", "wide")


def examples(number: int) -> settings:
    """Decorator: `number` examples, or as many as the loaded Hypothesis profile wants if that is more (a fuzzer's)."""
    return settings(max_examples=max(number, settings().max_examples))


def seqlens(max_value: int = 130, *, allow_empty: bool = False) -> st.SearchStrategy[int]:
    """Sequence lengths up to `max_value`, mostly :data:`AWKWARD_SEQLENS`; shrinks towards 1."""
    awkward = [n for n in AWKWARD_SEQLENS if n <= max_value]
    return st.one_of(st.sampled_from(awkward + [0] * allow_empty), st.integers(1, max_value))


def dtypes() -> st.SearchStrategy[np.dtype[Any]]:
    """float16, bfloat16, float32, float64."""
    return st.sampled_from(DTYPES)


def head_dim_pairs() -> st.SearchStrategy[tuple[int, int]]:
    """(D, E) out of :data:`HEAD_DIM_PAIRS`."""
    return st.sampled_from(HEAD_DIM_PAIRS)


def value_kinds() -> st.SearchStrategy[str]:
    """One of :data:`VALUE_KINDS`, see :func:`fill`."""
    return st.sampled_from(VALUE_KINDS)


def fill(shape: Sequence[int], dtype: DTypeLike, kind: str, rng: np.random.Generator) -> NDArray[Any]:
    """An array of `dtype`: every value of it is finite.

    * "normal": standard normal;
    * "huge_logit": normal, with one row of the last axis 40 times as large;
    * "constant_rows": every row of the last axis holds one value;
    * "denormal": below the smallest normal number of the dtype;
    * "wide": normal times 2 to a power between -12 and 4, a different one for each element.
    """
    x = rng.standard_normal(tuple(shape))
    if kind == "huge_logit" and x.size:
        x[tuple(int(rng.integers(n)) for n in shape[:-1])] *= 40
    elif kind == "constant_rows":
        x = np.broadcast_to(x[..., :1], x.shape)
    elif kind == "denormal":
        x = np.clip(x / 8, -1, 1) * float(ml_dtypes.finfo(np.dtype(dtype)).smallest_normal)
    elif kind == "wide":
        x = x * np.exp2(rng.integers(-12, 5, x.shape))
    return x.astype(dtype)


@st.composite
def layouts(draw: st.DrawFn, ndim: int = 4) -> Layout:
    """Layouts of an array: contiguous first; then padded, transposed (the axes 1 and 2 of 4) and misaligned ones.

    The last axis stays the fastest: other orders are copied before a kernel sees them.
    """
    orders: list[tuple[int, ...] | None] = [None] if ndim != 4 else [None, (0, 2, 1, 3), (1, 0, 2, 3)]
    return Layout(
        order=draw(st.sampled_from(orders)),
        pad=draw(st.one_of(st.just(()), st.tuples(*[st.sampled_from((0, 1, 3, 8)) for _ in range(ndim)]))),
        offset=draw(st.sampled_from((0, 0, 8, 1, 3))),
    )


@dataclass(frozen=True)
class AttentionProblem:
    """Inputs of an attention call: q [B, N, H, D], k [B, M, G, D], v [B, M, G, E], each in a layout of its own."""

    q: Guarded
    k: Guarded
    v: Guarded
    options: dict[str, Any] = field(default_factory=dict)
    kind: str = "normal"

    @property
    def arrays(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """(q, k, v) as NumPy views."""
        return self.q.array, self.k.array, self.v.array

    def __repr__(self) -> str:
        q, k, v = self.arrays
        layouts_told = ", ".join(f"{name} strides {x.strides}" for name, x in zip("qkv", self.arrays, strict=True))
        return (
            f"AttentionProblem({q.dtype} q {q.shape}, k {k.shape}, v {v.shape}, {self.kind} values, {layouts_told}, "
            f"{self.options})"
        )

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Hypothesis would print every element of a dataclass of arrays."""
        printer.text(repr(self))


@st.composite
def attention_options(
    draw: st.DrawFn,
    shape: tuple[int, int, int, int],
    names: Sequence[str] = ("scale", "causal"),
) -> dict[str, Any]:
    """Options of a call with [B, H, N, M] = `shape`, those of `names` only; each is left out half of the time.

    Known names: scale, causal, window, softcap, bias, mask, alibi_slopes, sinks, diagonal_offset. A bias may hold
    infinities, of both signs, and rows of -inf; a mask may have rows without a key.
    """
    batch, heads, seqlen_q, seqlen_k = shape
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    broadcast = st.sampled_from([shape, (1, 1, seqlen_q, seqlen_k), (batch, 1, 1, seqlen_k), (1, heads, seqlen_q, 1)])
    edge = st.one_of(st.none(), st.integers(0, max(seqlen_k, 1)))
    choices: dict[str, st.SearchStrategy[Any]] = {
        "scale": st.sampled_from([1.0, 0.5, 0.03, -0.25, 0.0]),
        "causal": st.sampled_from([True, "bottom_right", "top_left"]),
        "window": st.tuples(edge, edge),
        "softcap": st.sampled_from([1.0, 15.0, 50.0]),
        "bias": broadcast.map(lambda s: _bias(rng, s)),
        "mask": broadcast.map(lambda s: rng.random(s) < 0.7),
        "alibi_slopes": st.sampled_from([(heads,), (batch, heads)]).map(lambda s: rng.random(s).astype(np.float32)),
        "sinks": st.just((heads,)).map(lambda s: rng.standard_normal(s).astype(np.float32)),
        "diagonal_offset": st.integers(-3, 3).map(lambda o: o + seqlen_k - seqlen_q),
    }
    return {name: draw(choices[name]) for name in names if draw(st.booleans())}


def _bias(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    bias = rng.standard_normal(shape).astype(np.float32)
    bias[rng.random(shape) < 0.1] = -np.inf
    bias[rng.random(shape) < 0.1 / max(shape[-1], 1)] = np.inf
    bias[rng.random(shape[:-1]) < 0.1] = -np.inf
    return bias


@st.composite
def attention_problems(
    draw: st.DrawFn,
    *,
    dtype: st.SearchStrategy[np.dtype[Any]] | None = None,
    head_dims: st.SearchStrategy[tuple[int, int]] | None = None,
    heads: st.SearchStrategy[tuple[int, int]] | None = None,
    options: Sequence[str] = ("scale", "causal"),
    kinds: st.SearchStrategy[str] | None = None,
    max_seqlen: int = 130,
    allow_empty: bool = False,
) -> AttentionProblem:
    """Whole problems; N and M are independent, so that N > M is as frequent as M > N."""
    real = draw(dtype if dtype is not None else dtypes())
    head_dim, head_dim_v = draw(head_dims if head_dims is not None else head_dim_pairs())
    num_heads, num_kv_heads = draw(heads if heads is not None else st.sampled_from(HEAD_PAIRS))
    batch = draw(st.sampled_from((1, 2, 3) + (0,) * allow_empty))
    seqlen_q, seqlen_k = (draw(seqlens(max_seqlen, allow_empty=allow_empty)) for _ in "qk")
    kind = draw(kinds if kinds is not None else value_kinds())
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shapes = (
        (batch, seqlen_q, num_heads, head_dim),
        (batch, seqlen_k, num_kv_heads, head_dim),
        (batch, seqlen_k, num_kv_heads, head_dim_v),
    )
    q, k, v = (place(fill(shape, real, kind, rng), draw(layouts())) for shape in shapes)
    return AttentionProblem(q, k, v, draw(attention_options((batch, num_heads, seqlen_q, seqlen_k), options)), kind)


@st.composite
def softmax_inputs(
    draw: st.DrawFn,
    *,
    dtype: st.SearchStrategy[np.dtype[Any]] | None = None,
    max_columns: int = 3000,
    infinities: bool = True,
) -> Guarded:
    """Arrays [rows, columns] to take a softmax of; with `infinities`, -inf elements, rows of -inf and some +inf."""
    real = draw(dtype if dtype is not None else dtypes())
    awkward = [n for n in (*AWKWARD_SEQLENS, 255, 256, 257, 1023, 1024, 1025, 2049) if n <= max_columns]
    shape = draw(st.integers(1, 5)), draw(st.one_of(st.sampled_from(awkward), st.integers(1, max_columns)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = fill(shape, real, draw(value_kinds()), rng)
    if infinities and draw(st.booleans()):
        x[rng.random(shape) < 0.2] = -np.inf
        x[rng.random(shape[0]) < 0.3] = -np.inf
        x[rng.random(shape) < 0.2 / shape[1]] = np.inf
    return place(x, draw(layouts(ndim=2)))
