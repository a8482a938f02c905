"""The structs that attention kernels are passed by value: attention/attention_params.cuh and those derived from it."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from cuattn.runtime.structs import StructLayout, struct_layout

if TYPE_CHECKING:
    from cuattn.ops.attention.arguments import Extents
    from cuattn.ops.attention.option_checks import LogitArray
    from cuattn.ops.attention.options import Options
    from cuattn.ops.operand import Operand

__all__ = ["LOG2_E", "REALS", "UNBOUNDED", "backward_layout", "decode_layout", "forward_layout", "pack_params"]

UNBOUNDED = 2**31 - 1  # a side of the window

#: Real, the type of the accumulators, as the kernels call it.
REALS: dict[type[np.floating[Any]], str] = {np.float32: "float", np.float64: "double"}
LOG2_E = math.log2(math.e)
_NO_STRIDES = 0, 0, 0, 0
_UNBOUNDED_LENGTHS = None, None


class PackedLengths(Protocol):
    """The lengths of the longest of packed sequences, where they are known."""

    @property
    def max_seqlen_q(self) -> int | None: ...
    @property
    def max_seqlen_k(self) -> int | None: ...


class LogitProblem(Protocol):
    """What a call of any family says about its logits."""

    @property
    def extents(self) -> Extents: ...
    @property
    def scale(self) -> float: ...
    @property
    def options(self) -> Options: ...


def forward_layout(accumulator: type[np.floating[Any]]) -> StructLayout:
    """Lay out the struct of a forward kernel."""
    return struct_layout("attention_forward", "AttentionParams", REALS[accumulator])


def backward_layout(accumulator: type[np.floating[Any]]) -> StructLayout:
    """Lay out the struct of the backward kernels: that of the forward, and strides of dout, dq, dk and dv."""
    return struct_layout("attention_backward", "AttentionBackwardParams", REALS[accumulator])


def decode_layout(accumulator: type[np.floating[Any]]) -> StructLayout:
    """Lay out the struct of a decode kernel: that of the forward pass, and what caches, tables and splits need."""
    return struct_layout("attention_decode", "DecodeParams", REALS[accumulator])


def pack_params(
    layout: StructLayout,
    problem: LogitProblem,
    q: Operand,
    k: Operand,
    v: Operand,
    output: Operand,
    *,
    classes: LogitArray | None = None,
    packed: PackedLengths | None = None,
    more: tuple[tuple[str, Any], ...] = (),
) -> np.void:
    """Pack AttentionParams or a struct that begins with it, ``more`` being the other fields by name.

    The struct of a call like an earlier one, options that are arrays aside, is that of the earlier one.
    """
    tile_class = _NO_STRIDES if classes is None else classes.strides
    most = _UNBOUNDED_LENGTHS if packed is None else (packed.max_seqlen_q, packed.max_seqlen_k)
    options = problem.options
    strides = q.strides, k.strides, v.strides, output.strides, tile_class
    pack = _remembered if options.shared else _packed
    return pack(layout, options, problem.extents, problem.scale, strides, most, more)


def _packed(
    layout: StructLayout,
    options: Options,
    extents: Extents,
    scale: float,
    strides: tuple[tuple[int, ...], ...],
    most: tuple[int | None, int | None],
    more: tuple[tuple[str, Any], ...],
) -> np.void:
    lse_batch, lse_head = extents.lse_strides
    max_seqlen_q, max_seqlen_k = most
    fields = {
        **options.fields,
        **dict(zip(("q", "k", "v", "out", "tile_class"), strides, strict=True)),
        "lse_batch": lse_batch,
        "lse_head": lse_head,
        "num_heads": extents.num_heads,
        "heads_per_kv_head": extents.heads_per_kv_head,
        "seqlen_q": extents.seqlen_q,
        "seqlen_k": extents.seqlen_k,
        "max_seqlen_q": UNBOUNDED if max_seqlen_q is None else max_seqlen_q,
        "max_seqlen_k": UNBOUNDED if max_seqlen_k is None else max_seqlen_k,
        "head_dim": extents.head_dim,
        "head_dim_v": extents.head_dim_v,
        "scale": scale,
        "scale_log2": scale * LOG2_E,
    }
    return layout.pack(**fields, **dict(more))


_remembered = lru_cache(maxsize=4096)(_packed)
