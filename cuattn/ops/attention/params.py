"""The structs that attention kernels are passed by value: attention/attention_params.cuh and those derived from it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from cuattn.runtime.structs import StructLayout, struct_layout

if TYPE_CHECKING:
    from cuattn.ops.attention.arguments import Extents
    from cuattn.ops.attention.option_checks import LogitArray
    from cuattn.ops.attention.options import Options
    from cuattn.ops.attention.sequences import PackedSequences
    from cuattn.ops.operand import Operand

__all__ = ["LOG2_E", "REALS", "UNBOUNDED", "backward_layout", "decode_layout", "forward_fields", "forward_layout"]

UNBOUNDED = 2**31 - 1  # a side of the window

#: Real, the type of the accumulators, as the kernels call it.
REALS: dict[type[np.floating[Any]], str] = {np.float32: "float", np.float64: "double"}
LOG2_E = math.log2(math.e)
_NO_STRIDES = 0, 0, 0, 0


class LogitProblem(Protocol):
    """What a call of any family says about its logits."""

    @property
    def extents(self) -> Extents: ...
    @property
    def scale(self) -> float: ...
    @property
    def options(self) -> Options: ...


def forward_layout(accumulator: type[np.floating[Any]]) -> StructLayout:
    """The struct of a forward kernel."""
    return struct_layout("attention_forward", "AttentionParams", REALS[accumulator])


def backward_layout(accumulator: type[np.floating[Any]]) -> StructLayout:
    """The struct of a kernel of the backward pass: that of the forward pass, and strides of dout, dq, dk and dv."""
    return struct_layout("attention_backward", "AttentionBackwardParams", REALS[accumulator])


def decode_layout(accumulator: type[np.floating[Any]]) -> StructLayout:
    """The struct of a decode kernel: that of the forward pass, and what caches, tables and splits need."""
    return struct_layout("attention_decode", "DecodeParams", REALS[accumulator])


def forward_fields(
    problem: LogitProblem,
    q: Operand,
    k: Operand,
    v: Operand,
    output: Operand,
    classes: LogitArray | None = None,
    packed: PackedSequences | None = None,
) -> dict[str, Any]:
    """The fields of AttentionParams, by name."""
    extents = problem.extents
    lse_batch, lse_head = extents.lse_strides
    max_seqlen_q, max_seqlen_k = (None, None) if packed is None else (packed.max_seqlen_q, packed.max_seqlen_k)
    return {
        **problem.options.fields,
        "q": q.strides,
        "k": k.strides,
        "v": v.strides,
        "out": output.strides,
        "tile_class": _NO_STRIDES if classes is None else classes.strides,
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
        "scale": problem.scale,
        "scale_log2": problem.scale * LOG2_E,
    }
