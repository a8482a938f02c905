"""The options of attention: one table, from which every call, kernel and signature takes what it needs of them.

A row of `OPTIONS` says what an option is called and defaults to, which operations take it, how it is checked, and what
kernels are told: the flag that they are compiled with, fields of the struct attention/attention_params.cuh, a pointer.
Types stand in the TypedDicts, for type checkers; what an option means, in the docstring of `cuattn.attention`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypedDict

from cuattn.ops.attention import option_checks as checks
from cuattn.ops.attention.bounds import (
    NO_BOUNDS,
    Bounds,
    check_causal,
    check_chunk,
    check_diagonal_offset,
    check_window,
)
from cuattn.ops.attention.dropout import Dropout, DropoutOrigin
from cuattn.ops.attention.option_checks import LogitArray
from cuattn.ops.attention.variants import ForwardOptions
from cuattn.runtime.declarations import of_kernel
from cuattn.typing import Causal, FP8Format, Precision

__all__ = [
    "OPTIONS",
    "AttentionKeywords",
    "AttentionOptions",
    "CascadeOptions",
    "DecodeOptions",
    "DifferentialDecodeOptions",
    "DifferentialOptions",
    "GradientOptions",
    "Option",
    "Options",
    "PlanOptions",
]


class PlanOptions(TypedDict, total=False):
    """Keywords that bound the keys of a query by their position."""

    causal: Causal
    window: tuple[int | None, int | None] | None
    chunk: int | None


class DecodeOptions(PlanOptions, total=False):
    """Keywords of calls with a cache."""

    scale: float | None
    softcap: float | None
    alibi_slopes: Any
    sinks: Any


class CascadeOptions(TypedDict, total=False):
    """Keywords of calls with a shared prefix, whose queries have no position in it."""

    scale: float | None
    causal: Causal
    softcap: float | None
    sinks: Any


class GradientOptions(DecodeOptions, total=False):
    """Keywords of the backward pass."""

    bias: Any
    mask: Any
    dropout_p: float
    dropout_seed: int
    dropout_offset: int
    dropout_origin: DropoutOrigin | tuple[int, ...] | None
    diagonal_offset: Any
    precision: Precision | None


class DifferentialOptions(PlanOptions, total=False):
    """Keywords of differential attention and of its gradients."""

    scale: float | None
    softcap: float | None
    bias: Any
    mask: Any
    alibi_slopes: Any
    dropout_p: float
    dropout_seed: int
    dropout_offset: int
    dropout_origin: DropoutOrigin | tuple[int, ...] | None
    diagonal_offset: Any


class DifferentialDecodeOptions(PlanOptions, total=False):
    """Keywords of differential attention with a cache."""

    scale: float | None
    softcap: float | None
    alibi_slopes: Any


class AttentionOptions(GradientOptions, total=False):
    """Keywords of `cuattn.attention`, and of what computes the same."""

    q_descale: Any
    k_descale: Any
    v_descale: Any


class AttentionKeywords(AttentionOptions, total=False):
    """All keywords of `cuattn.attention` but the one that its result depends on."""

    fp8_format: FP8Format | None
    out: Any


#: What each family of operations takes.
KEYWORDS: dict[str, Any] = {
    "attention": AttentionOptions,
    "gradients": GradientOptions,
    "differential": DifferentialOptions,
    "differential_decode": DifferentialDecodeOptions,
    "decode": DecodeOptions,
    "cascade": CascadeOptions,
    "plan": PlanOptions,
}


@dataclass(slots=True, eq=False)
class Options:
    """Options that have passed every check. The defaults are those of a call without any."""

    scale: float | None = None
    bounds: Bounds = NO_BOUNDS
    diagonal_offsets: Any = None  # int32 [batch]
    softcap: float = 0.0
    bias: LogitArray | None = None
    mask: LogitArray | None = None
    alibi_slopes: Any = None  # [batch or 1, heads], of the accumulator's type
    sinks: Any = None  # [heads], likewise
    dropout: Dropout | None = None
    tf32: bool = False
    fp8: bool = False  # probabilities may be rounded to the 8-bit type of q, k and v
    q_descale: Any = None  # float32 [batch, kv_heads]
    k_descale: Any = None
    v_descale: Any = None
    given: tuple[Option, ...] = ()  # the rows of what the call has
    shared: bool = False  # it serves many calls: nobody changes it, it holds no arrays, and it is known by itself
    _variant: ForwardOptions | None = field(default=None, init=False, repr=False, compare=False)
    _kernel_options: ForwardOptions | None = field(default=None, init=False, repr=False, compare=False)
    _fields: dict[str, Any] | None = field(default=None, init=False, repr=False, compare=False)

    def scale_for(self, head_dim: int) -> float:
        return 1.0 / math.sqrt(head_dim) if self.scale is None else self.scale

    @property
    def flags(self) -> tuple[str, ...]:
        """What happens to scores, by the names of `ForwardOptions`."""
        return tuple([row.flag for row in self.given if row.flag is not None])

    @property
    def variant(self) -> ForwardOptions:
        """What a kernel with these options, and no others, is compiled with."""
        if self._variant is None:
            self._variant, self._kernel_options = self._found_variants()
        return self._variant

    @property
    def kernel_options(self) -> ForwardOptions:
        """The options of the portable kernel that serves a call."""
        if self._kernel_options is None:
            self._variant, self._kernel_options = self._found_variants()
        return self._kernel_options

    def _found_variants(self) -> tuple[ForwardOptions, ForwardOptions]:
        bias_dtype = "float32" if self.bias is None else self.bias.array.dtype.name
        by_element = self.dropout is not None and self.dropout.by_element
        return _variants(self.bounds.sides, self.bounds.chunk != 0, self.given, by_element, bias_dtype)

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of AttentionParams that say what the options are; not to be changed."""
        if self._fields is None:
            self._fields = _NO_FIELDS.copy()
            for row in self.given:
                if row.fields is not None:
                    self._fields |= row.fields(self)
        return self._fields

    def pointers(self, source: str, entry: str) -> dict[str, Any]:
        """Return the arrays that the kernel ``entry`` of a file has parameters for, by name; not to be changed."""
        pointers = _no_pointers(source, entry)
        for row in self.given:
            if row.pointer in pointers and row.array is not None:
                pointers = {**pointers, row.pointer: row.array(self)}
        return pointers

    @property
    def arrays(self) -> dict[str, Any]:
        """The arrays of the options that a call has, by the names of their arguments."""
        arrays = {row.name: row.array(self) for row in self.given if row.array is not None}
        return {name: x for name, x in arrays.items() if x is not None}


@cache
def _variants(
    sides: tuple[bool, bool], chunk: bool, given: tuple[Option, ...], by_element: bool, bias_dtype: str
) -> tuple[ForwardOptions, ForwardOptions]:
    """Return the options of a call, and those of the kernel that serves it."""
    flags = {row.flag: True for row in given if row.flag is not None}
    variant = ForwardOptions(*sides, chunk, **flags, bias_dtype=bias_dtype)
    return variant, variant.compiled(dropout_by_element=by_element)


@cache
def _no_pointers(source: str, entry: str) -> dict[str, Any]:
    return {p.name: None for p in of_kernel(source).parameters(entry) if p.name in _POINTERS}


@dataclass(frozen=True, slots=True, eq=False)
class Option:
    """One option: a row of the table.

    Attributes
    ----------
    name : str
        Also of the keyword, if there is one.
    keywords : mapping
        The keywords and their defaults, with which the option is absent.
    on : collection of str
        The families of operations that take it: keys of `KEYWORDS`.
    check : callable (options, call, *values of the keywords) -> bool
        Puts the values into `Options`; whether they change anything. Raises as documented at `cuattn.attention`.
    flag : str, optional
        Of `ForwardOptions`: what kernels are compiled with. Bounds by position have those of `Bounds.sides`.
    fields : callable (options) -> mapping, optional
        Of AttentionParams.
    pointer : str, optional
        The parameter of kernels that takes its array.
    array : callable (options) -> array or None, optional
    large : bool
        Whether the array has to lie where q does; a small one is copied there.
    no_hopper : str, optional
        What a call has that the Hopper kernel does not take.
    default_with_cache : optional
        The default where queries are the newest of a cache, if it is another.
    """

    name: str
    keywords: Mapping[str, Any]
    on: Collection[str]
    check: Callable[..., bool]
    flag: str | None = None
    fields: Callable[[Options], Mapping[str, Any]] | None = None
    pointer: str | None = None
    array: Callable[[Options], Any] | None = None
    large: bool = False
    no_hopper: str | None = None
    default_with_cache: Any = None


_FORWARD = frozenset(("attention",))
_TILED = frozenset(("attention", "gradients"))
_DENSE = _TILED | {"differential"}
_EVERY_KEY = _DENSE | {"decode", "differential_decode"}
_NO_STRIDES = 0, 0, 0, 0
_NO_DROPOUT = 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0


def _bound_fields(options: Options) -> dict[str, Any]:
    left, right, from_end, offset, chunk = options.bounds
    fields = {"window_left": left, "window_right": right, "diagonal_from_end": from_end, "diagonal_offset": offset}
    return fields | {"chunk": chunk}


def _dropout_fields(options: Options) -> dict[str, Any]:
    if options.dropout is None:
        return {"use_dropout": False, "dropout": _NO_DROPOUT, "keep_scale": 1.0}
    threshold, low, high, offset, rescale, *part = options.dropout
    return {"use_dropout": True, "dropout": (low, high, offset, threshold, *part), "keep_scale": rescale}


def _alibi_fields(options: Options) -> dict[str, Any]:
    slopes = options.alibi_slopes
    return {"alibi_batch": 0 if slopes is None or slopes.shape[0] == 1 else slopes.shape[1]}


#: In the order of signatures.
OPTIONS = (
    Option("scale", {"scale": None}, _EVERY_KEY | {"cascade"}, checks.scale),
    Option(
        "causal",
        {"causal": False},
        _EVERY_KEY | {"cascade", "plan"},
        check_causal,
        fields=_bound_fields,
        default_with_cache=True,
    ),
    Option("window", {"window": None}, _EVERY_KEY | {"plan"}, check_window, fields=_bound_fields),
    Option("chunk", {"chunk": None}, _EVERY_KEY | {"plan"}, check_chunk, fields=_bound_fields),
    Option(
        "softcap",
        {"softcap": None},
        _EVERY_KEY | {"cascade"},
        checks.softcap,
        flag="softcap",
        fields=lambda options: {"softcap": options.softcap},
    ),
    Option(
        "bias",
        {"bias": None},
        _DENSE,
        checks.bias,
        flag="bias",
        fields=lambda options: {"bias": _NO_STRIDES if options.bias is None else options.bias.strides},
        pointer="g_bias",
        array=lambda options: options.bias and options.bias.array,
        large=True,
        no_hopper="a bias",
    ),
    Option(
        "mask",
        {"mask": None},
        _DENSE,
        checks.mask,
        flag="mask",
        fields=lambda options: {"mask": _NO_STRIDES if options.mask is None else options.mask.strides},
        pointer="g_mask",
        array=lambda options: options.mask and options.mask.array,
        large=True,
        no_hopper="a mask",
    ),
    Option(
        "alibi_slopes",
        {"alibi_slopes": None},
        _EVERY_KEY,
        checks.alibi_slopes,
        flag="alibi",
        fields=_alibi_fields,
        pointer="g_alibi_slopes",
        array=lambda options: options.alibi_slopes,
    ),
    Option(
        "sinks",
        {"sinks": None},
        _TILED | {"decode", "cascade"},
        checks.sinks,
        pointer="g_sinks",
        array=lambda options: options.sinks,
    ),
    Option(
        "dropout",
        {"dropout_p": 0.0, "dropout_seed": 0, "dropout_offset": 0, "dropout_origin": None},
        _DENSE,
        checks.dropout,
        flag="dropout",
        fields=_dropout_fields,
        no_hopper="dropout",
    ),
    Option(
        "diagonal_offset",
        {"diagonal_offset": None},
        _DENSE,
        check_diagonal_offset,
        fields=_bound_fields,
        pointer="g_diagonal_offsets",
        array=lambda options: options.diagonal_offsets,
    ),
    Option("precision", {"precision": None}, _TILED, checks.precision),
    *(
        Option(
            name,
            {name: None},
            _FORWARD,
            checks.descale(name),
            pointer=f"g_{name}",
            array=lambda options, name=name: getattr(options, name),  # type: ignore[misc]
        )
        for name in ("q_descale", "k_descale", "v_descale")
    ),
)
_POINTERS = frozenset(row.pointer for row in OPTIONS if row.pointer is not None)
_NO_FIELDS = {name: x for row in OPTIONS if row.fields is not None for name, x in row.fields(Options()).items()}
