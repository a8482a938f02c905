"""Whole inputs of decode calls: caches with poison wherever no key of a sequence is, and tables with tails of garbage.

>>> problem = cached_problem(np.random.default_rng(0), lengths=[3, 0], seqlens_q=1, heads=(2, 1), head_dims=(4, 4))
>>> problem.k.array.shape, np.isnan(problem.k.array[0]).all(axis=(1, 2)).tolist()
((2, 4, 1, 4), [False, False, False, True])
>>> paged = problem.in_pages(np.random.default_rng(0), 2)
>>> paged.k.array.shape, paged.block_tables.shape
((3, 2, 1, 4), (2, 2))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cuattn.formats import KV_FORMATS, numpy_dtype
from cuattn.testing.arrays import Guarded, Layout, place

__all__ = ["GARBAGE", "SCALE_KINDS", "CachedProblem", "cached_problem", "fill_codes", "make_scales", "poison"]

Array = NDArray[Any]

#: What table entries hold that no key needs: no page at all, and pages that exist.
GARBAGE = (-1, 2**31 - 1, -(2**31), 0, 1, 10**6)

#: Where the scales of a quantized cache are: one for all, one for each key/value head, one for each slot and head.
SCALE_KINDS = ("tensor", "head", "slot")

#: Keywords that are arrays with one entry for each slot.
_OF_SLOTS = ("k_scale", "v_scale", "k_block_scales", "v_block_scales")


@dataclass(frozen=True)
class CachedProblem:
    """Arguments of :func:`cuattn.decode_attention`, or with `block_tables` of :func:`cuattn.paged_attention`, or with
    `cu_seqlens_q` too of :func:`cuattn.paged_attention_varlen`.
    """

    q: Guarded
    k: Guarded
    v: Guarded
    seqlens_k: NDArray[np.int32]
    block_tables: NDArray[np.int32] | None = None
    cu_seqlens_q: NDArray[np.int32] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def arrays(self) -> tuple[Array, ...]:
        """The positional arguments as NumPy views."""
        heads = (self.q.array, self.k.array, self.v.array)
        tables = (self.block_tables, self.cu_seqlens_q)
        return (*heads, *(x for x in tables if x is not None), self.seqlens_k)

    @property
    def reference_arrays(self) -> tuple[Array, ...]:
        """Arrays of :func:`cuattn.testing.decode_tolerance.decode_bounds`; a contiguous cache is a page a sequence."""
        tables = np.arange(len(self.seqlens_k)).reshape(-1, 1) if self.block_tables is None else self.block_tables
        starts = () if self.cu_seqlens_q is None else (self.cu_seqlens_q,)
        return self.q.array, self.k.array, self.v.array, tables, self.seqlens_k, *starts

    @property
    def head_dim_v(self) -> int:
        """E, of which the formats of 4 bits have two in a byte."""
        return int(self.v.array.shape[-1]) * (2 if "v_block_scales" in self.options else 1)

    @property
    def kind(self) -> str:
        """Name the function that takes the problem: "decode", "paged" or "varlen"."""
        return "decode" if self.block_tables is None else "paged" if self.cu_seqlens_q is None else "varlen"

    def in_pages(
        self,
        rng: np.random.Generator,
        page_size: int,
        *,
        layouts: Sequence[Layout | None] = (None, None),
        spare_pages: int = 1,
    ) -> CachedProblem:
        """Put the problem of a contiguous cache on pages in random order among `spare_pages` more of poison."""
        if self.block_tables is not None:
            raise ValueError("the cache is paged already")
        counts = -(-self.seqlens_k.astype(np.int64) // page_size)
        num_pages = int(counts.sum()) + spare_pages
        pages = rng.permutation(num_pages)
        columns = -(-self.k.array.shape[1] // page_size) + int(rng.integers(2))
        tables = rng.choice(GARBAGE, (len(counts), columns)).astype(np.int32)
        for b, stop in enumerate(np.cumsum(counts)):
            tables[b, : counts[b]] = pages[stop - counts[b] : stop]

        def scattered(cache: Array) -> Array:
            result = np.empty((num_pages, page_size, *cache.shape[2:]), cache.dtype)
            result[...] = poison(cache.dtype)
            for b, length in enumerate(self.seqlens_k.tolist()):
                slots = np.arange(length)
                result[tables[b, slots // page_size], slots % page_size] = cache[b, :length]
            return result

        options = {
            name: scattered(x) if name in _OF_SLOTS and np.ndim(x) >= 3 else x for name, x in self.options.items()
        }
        k, v = (place(scattered(x.array), layout) for x, layout in zip((self.k, self.v), layouts, strict=True))
        return replace(self, k=k, v=v, block_tables=tables, options=options)

    def with_options(self, **options: Any) -> CachedProblem:
        """Return the same arrays with more options, or others."""
        return replace(self, options={**self.options, **options})

    def __repr__(self) -> str:
        q, k, v = self.q.array, self.k.array, self.v.array
        told = {name: f"{x.dtype}{x.shape}" if isinstance(x, np.ndarray) else x for name, x in self.options.items()}
        lengths = None if self.cu_seqlens_q is None else np.diff(self.cu_seqlens_q).tolist()
        return (
            f"CachedProblem({self.kind}, q {q.dtype} {q.shape} strides {q.strides}, k {k.dtype} {k.shape} strides "
            f"{k.strides}, v {v.shape} strides {v.strides}, seqlens_k {self.seqlens_k.tolist()}, seqlens_q {lengths}, "
            f"{told})"
        )

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Hypothesis would print every element of a dataclass of arrays."""
        printer.text(repr(self))


def poison(dtype: DTypeLike) -> Any:
    """Return NaN, or in a dtype without it the most harmful number: -128 in int8, 6 in both halves of a byte."""
    real = np.dtype(dtype)
    if real == np.uint8:
        return np.uint8(0x7F)  # NaN in e4m3 and e5m2, (-6, 6) in e2m1, 2^0 in e8m0
    if real == np.int8:
        return np.int8(-128)
    return np.full((), np.nan).astype(real)[()]


def fill_codes(shape: Sequence[int], kv_format: str, rng: np.random.Generator) -> Array:
    """Draw codes of heads, `shape` being [..., head_dim]: those of normal numbers, or any at all in 4 bits."""
    row = KV_FORMATS[kv_format]
    if kv_format == "int8":
        return np.clip(np.rint(rng.standard_normal(shape) * 40), -127, 127).astype(np.int8)
    if row.elements_per_item == 2:
        return rng.integers(0, 256, (*shape[:-1], row.items(shape[-1])), dtype=np.uint8)
    return np.asarray(rng.standard_normal(shape).astype(numpy_dtype(row.code_dtype)))


def make_scales(
    rng: np.random.Generator, kv_format: str, kind: str, slots: tuple[int, ...], head_dims: tuple[int, int]
) -> dict[str, Any]:
    """Draw scales of k and v for codes in `slots` [B, Mmax, G] (or [P, S, G]); `kind` is one of :data:`SCALE_KINDS`.

    The formats of 4 bits have block scales, and besides "nvfp4" alone a scale, per tensor, whatever `kind` is.
    """
    row = KV_FORMATS[kv_format]
    shape = {"tensor": (), "head": slots[2:], "slot": slots}["tensor" if row.block_size else kind]
    scales: dict[str, Any] = {}
    for name, dim in zip("kv", head_dims, strict=True):
        if kv_format != "mxfp4":
            base = 1 / 40 if kv_format == "int8" else 1.0
            scales[f"{name}_scale"] = (base * np.exp2(rng.uniform(-1, 1, shape))).astype(np.float32)
        if row.block_size:
            real = numpy_dtype(str(row.block_scale_dtype))
            exponents = rng.integers(-3, 1, (*slots, row.blocks(dim)))
            scales[f"{name}_block_scales"] = np.exp2(exponents).astype(real)
    return scales


def cached_problem(
    rng: np.random.Generator,
    *,
    lengths: Sequence[int],
    seqlens_q: int | Sequence[int],
    heads: tuple[int, int],
    head_dims: tuple[int, int],
    dtype: DTypeLike = np.float16,
    kv_format: str | None = None,
    scales: str = "tensor",
    page_size: int | None = None,
    layouts: Sequence[Layout | None] = (None, None, None),
    room: int = 1,
    fill: Any = None,
    **options: Any,
) -> CachedProblem:
    """Make a problem with sequences of these `lengths`; `seqlens_q`, if a list, are of packed queries over pages.

    A contiguous cache has `room` slots more than the longest sequence; with `page_size` the cache is paged. `layouts`
    are those of q, k and v. `fill` (shape, dtype, generator) makes floats, standard normal ones by default.
    """
    real, (num_heads, num_kv_heads) = np.dtype(dtype), heads
    make = fill or (lambda shape, dtype, rng: rng.standard_normal(shape).astype(dtype))
    seqlens_k = np.asarray(lengths, dtype=np.int32).reshape(-1)
    batch, capacity = len(seqlens_k), int(seqlens_k.max(initial=0)) + room
    packed = not isinstance(seqlens_q, int)
    rows = (int(np.sum(seqlens_q)),) if packed else (batch, seqlens_q)
    q = place(make((*rows, num_heads, head_dims[0]), real, rng), layouts[0])
    caches = []
    for dim in head_dims:
        shape = batch, capacity, num_kv_heads, dim
        caches.append(make(shape, real, rng) if kv_format is None else fill_codes(shape, kv_format, rng))
    if kv_format is not None:
        slots = batch, capacity, num_kv_heads
        options = {"kv_format": kv_format, **make_scales(rng, kv_format, scales, slots, head_dims), **options}
    beyond = np.arange(capacity) >= seqlens_k[:, None]
    for x in (*caches, *(options[name] for name in _OF_SLOTS if np.ndim(options.get(name, 0)) >= 3)):
        x[beyond] = poison(x.dtype)
    starts = np.concatenate([[0], np.cumsum(seqlens_q)]).astype(np.int32) if packed else None
    k, v = (place(x, None if page_size else layout) for x, layout in zip(caches, layouts[1:], strict=True))
    problem = CachedProblem(q, k, v, seqlens_k, None, starts, options)
    return problem if page_size is None else problem.in_pages(rng, page_size, layouts=layouts[1:])
