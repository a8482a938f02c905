"""Hypothesis strategies for attention and softmax problems: awkward sizes first, awkward memory, awkward values.

Only sizes, kinds and a seed are drawn; the elements come from a generator with that seed, so that an example stays
small and shrinks by its shape. Sizes are bounded for an executor of about 10 GFLOP/s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from numpy.typing import DTypeLike, NDArray

from cuattn.testing.arrays import Guarded, Layout, place
from cuattn.testing.option_strategies import STRATEGIES, Drawn, bias_dtypes, names_on
from cuattn.testing.pool import Blessed
from cuattn.testing.problems import AttentionProblem, VarlenProblem

__all__ = [
    "AWKWARD_SEQLENS",
    "BOUNDS",
    "DTYPES",
    "FLOAT8_DTYPES",
    "HEAD_DIM_PAIRS",
    "HEAD_PAIRS",
    "OPTIONS",
    "VALUE_KINDS",
    "AttentionProblem",
    "VarlenProblem",
    "aligned_layouts",
    "attention_options",
    "attention_problems",
    "bias_dtypes",
    "dtypes",
    "examples",
    "fill",
    "head_dim_pairs",
    "layouts",
    "seqlens",
    "sequence_lengths",
    "softmax_inputs",
    "unaligned_layouts",
    "value_kinds",
    "varlen_problems",
]

DTYPES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32), np.dtype(np.float64))

FLOAT8_DTYPES = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))

#: What :func:`attention_options` can draw; "dropout" is three options together.
OPTIONS = names_on("attention")

#: Those of :data:`OPTIONS` that hide keys by position: kernels with them are compiled apart.
BOUNDS = ("causal", "window", "chunk")

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
    """Draw sequence lengths up to `max_value`, mostly :data:`AWKWARD_SEQLENS`; shrinks towards 1."""
    awkward = [n for n in AWKWARD_SEQLENS if n <= max_value]
    return st.one_of(st.sampled_from(awkward + [0] * allow_empty), st.integers(1, max_value))


def dtypes() -> st.SearchStrategy[np.dtype[Any]]:
    """Draw float16, bfloat16, float32 or float64."""
    return st.sampled_from(DTYPES)


def head_dim_pairs() -> st.SearchStrategy[tuple[int, int]]:
    """Draw (D, E) out of :data:`HEAD_DIM_PAIRS`."""
    return st.sampled_from(HEAD_DIM_PAIRS)


def value_kinds() -> st.SearchStrategy[str]:
    """Draw one of :data:`VALUE_KINDS`, see :func:`fill`."""
    return st.sampled_from(VALUE_KINDS)


def fill(shape: Sequence[int], dtype: DTypeLike, kind: str, rng: np.random.Generator) -> NDArray[Any]:
    """Fill an array of `dtype`: every value of it is finite.

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
    """Draw layouts of an array: contiguous first; then padded, transposed (axes of 3 or 4) and misaligned ones.

    The last axis stays the fastest: other orders are copied before a kernel sees them.
    """
    others: dict[int, list[tuple[int, ...]]] = {3: [(1, 0, 2)], 4: [(0, 2, 1, 3), (1, 0, 2, 3)]}
    orders = [None, *others.get(ndim, [])]
    return Layout(
        order=draw(st.sampled_from(orders)),
        pad=draw(st.one_of(st.just(()), st.tuples(*[st.sampled_from((0, 1, 3, 8)) for _ in range(ndim)]))),
        offset=draw(st.sampled_from((0, 0, 8, 1, 3))),
    )


@st.composite
def aligned_layouts(draw: st.DrawFn, ndim: int = 4) -> Layout:
    """Draw :func:`layouts` in which every row begins at a multiple of 16 bytes, if head dims are multiples of 8.

    Kernels are compiled twice, for such arrays and for all others: these keep to the one of the two.
    """
    layout = draw(layouts(ndim))
    return Layout(layout.order, tuple(8 * (pad > 1) for pad in layout.pad), 8 * (layout.offset > 1))


@st.composite
def unaligned_layouts(draw: st.DrawFn, ndim: int = 4) -> Layout:
    """Draw :func:`layouts` that begin between two multiples of 16 bytes."""
    layout = draw(layouts(ndim))
    return Layout(layout.order, layout.pad, draw(st.sampled_from((1, 3))))


@st.composite
def attention_options(
    draw: st.DrawFn,
    shape: tuple[int, int, int, int],
    names: Sequence[str] = ("scale", "causal"),
    *,
    num_kv_heads: int = 1,
    dtype: DTypeLike = np.float32,
    bounded: bool | None = None,
) -> dict[str, Any]:
    """Draw options of a call with [B, H, N, M] = `shape`, those of `names` only; each is left out half of the time.

    Known names are :data:`OPTIONS`. A bias may hold infinities, of both signs, rows of -inf, and rows of the lowest
    finite number; a mask may have rows without a key, and squares that are all visible or all hidden. Both are of any
    shape that broadcasts, of fewer dimensions too, and may lie anywhere in memory. "dropout" stands for dropout_p,
    dropout_seed and dropout_offset. Those that are only for some dtype are drawn for no other: precision for float32,
    the descales [B, `num_kv_heads`] for float8.

    `bounded`: whether one of :data:`BOUNDS` is among them, and no other of those; left to chance when None.
    """
    batch, heads, seqlen_q, seqlen_k = shape
    real = np.dtype(dtype)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    call = Drawn(rng, batch, heads, num_kv_heads, seqlen_q, seqlen_k)
    bounds = [name for name in names if name in BOUNDS] if bounded is not None else []
    wanted = [name for name in names if name not in bounds and draw(st.booleans())]
    wanted += [draw(st.sampled_from(bounds))] if bounded and bounds else []
    chosen = {name: draw(STRATEGIES[name](call)) for name in wanted}
    chosen |= chosen.pop("dropout", {})
    for name in ("bias", "mask"):
        if name in chosen:
            chosen[name] = place(chosen[name], draw(layouts(chosen[name].ndim))).array
    unfit = [name for name in chosen if name.endswith("_descale") and real not in FLOAT8_DTYPES]
    unfit += ["precision"] if real != np.float32 else []
    return {name: value for name, value in chosen.items() if name not in unfit}


@st.composite
def attention_problems(
    draw: st.DrawFn,
    *,
    dtype: st.SearchStrategy[np.dtype[Any]] | None = None,
    head_dims: st.SearchStrategy[tuple[int, int]] | None = None,
    heads: st.SearchStrategy[tuple[int, int]] | None = None,
    options: Sequence[str] = ("scale", "causal"),
    kinds: st.SearchStrategy[str] | None = None,
    layout: st.SearchStrategy[Layout] | None = None,
    max_seqlen: int = 130,
    allow_empty: bool = False,
    variants: st.SearchStrategy[Blessed] | None = None,
) -> AttentionProblem:
    """Draw whole problems; N and M are independent, so that N > M is as frequent as M > N.

    `variants` draws what the kernel is compiled for, out of a pool: it decides the dtype, the head dims, whether rows
    are aligned and whether keys are hidden by position, whatever the other arguments draw.
    Float8 problems, where `dtype` draws them, hold uint8 arrays and the option fp8_format half of the time.
    """
    variant = None if variants is None else draw(variants)
    if variant is not None:
        dtype, head_dims = st.just(variant.dtype), st.sampled_from(variant.head_dims)
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
    values, of_bytes = _as_bytes(draw, [fill(shape, real, kind, rng) for shape in shapes])
    of_k = layouts() if layout is None else layout
    of_q = of_k
    if variant is not None:
        of_q, of_k = (aligned_layouts(), aligned_layouts()) if variant.aligned else (unaligned_layouts(), layouts())
    q, k, v = (place(x, draw(own)) for x, own in zip(values, (of_q, of_k, of_k), strict=True))
    bounded = None if variant is None else variant.bounded
    logits_shape = batch, num_heads, seqlen_q, seqlen_k
    chosen = draw(attention_options(logits_shape, options, num_kv_heads=num_kv_heads, dtype=real, bounded=bounded))
    return AttentionProblem(q, k, v, {**chosen, **of_bytes}, kind)


def _as_bytes(draw: st.DrawFn, arrays: list[NDArray[Any]]) -> tuple[list[NDArray[Any]], dict[str, Any]]:
    """Return the arrays as they are, or float8 ones as uint8 with the option that says what they are."""
    name = arrays[0].dtype.name
    if arrays[0].dtype not in FLOAT8_DTYPES or draw(st.booleans()):
        return arrays, {}
    return [x.view(np.uint8) for x in arrays], {"fp8_format": name.removeprefix("float8_")}


@st.composite
def sequence_lengths(draw: st.DrawFn, max_seqlen: int = 130) -> list[tuple[int, int]]:
    """Draw (query length, key length) of some sequences: any, empty ones too, or one long among many tiny ones."""
    if draw(st.booleans()):
        length = seqlens(max_seqlen, allow_empty=True)
        return draw(st.lists(st.tuples(length, length), min_size=1, max_size=5))
    tiny = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=4, max_size=12))
    tiny[draw(st.integers(0, len(tiny) - 1))] = draw(seqlens(max_seqlen)), draw(seqlens(max_seqlen))
    return tiny


@st.composite
def varlen_problems(
    draw: st.DrawFn,
    *,
    dtype: st.SearchStrategy[np.dtype[Any]] | None = None,
    head_dims: st.SearchStrategy[tuple[int, int]] | None = None,
    options: Sequence[str] = ("scale", "causal"),
    kinds: st.SearchStrategy[str] | None = None,
    layout: st.SearchStrategy[Layout] | None = None,
    max_seqlen: int = 130,
) -> VarlenProblem:
    """Draw whole packed problems; query and key lengths of a sequence are independent, and either may be 0."""
    real = draw(dtype if dtype is not None else dtypes())
    head_dim, head_dim_v = draw(head_dims if head_dims is not None else head_dim_pairs())
    num_heads, num_kv_heads = draw(st.sampled_from(HEAD_PAIRS))
    lengths = np.array(draw(sequence_lengths(max_seqlen)), dtype=np.int32)
    starts_q, starts_k = (np.concatenate([[0], np.cumsum(own)]).astype(np.int32) for own in lengths.T)
    kind = draw(kinds if kinds is not None else value_kinds())
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shapes = (
        (int(starts_q[-1]), num_heads, head_dim),
        (int(starts_k[-1]), num_kv_heads, head_dim),
        (int(starts_k[-1]), num_kv_heads, head_dim_v),
    )
    values, of_bytes = _as_bytes(draw, [fill(shape, real, kind, rng) for shape in shapes])
    q, k, v = (place(x, draw(layouts(3) if layout is None else layout)) for x in values)
    logits_shape = len(lengths), num_heads, int(lengths[:, 0].max()), int(lengths[:, 1].max())
    chosen = draw(attention_options(logits_shape, options, num_kv_heads=num_kv_heads, dtype=real))
    return VarlenProblem(q, k, v, starts_q, starts_k, {**chosen, **of_bytes}, kind)


@st.composite
def softmax_inputs(
    draw: st.DrawFn,
    *,
    dtype: st.SearchStrategy[np.dtype[Any]] | None = None,
    max_columns: int = 3000,
    infinities: bool = True,
) -> Guarded:
    """Draw arrays [rows, columns] to take a softmax of; `infinities`: -inf elements, rows of -inf, some +inf."""
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
