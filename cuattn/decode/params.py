"""The struct that decode kernels are passed by value: the Python twin of kernels/attention_decode_params.cuh.

>>> magic, shift = divisor(48)
>>> [key * magic >> shift for key in (0, 47, 48, 2**31 - 1)] == [0, 0, 1, (2**31 - 1) // 48]
True
"""

from __future__ import annotations

import struct
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from cuattn import attention_params
from cuattn.attention_arguments import LOG2_E, Operand
from cuattn.attention_params import UNBOUNDED
from cuattn.decode.config import FlashDecodeConfig
from cuattn.decode.scales import Scale

if TYPE_CHECKING:
    from cuattn.decode.arguments import DecodeProblem
    from cuattn.decode.schedule import Schedule

__all__ = ["divisor", "pack_decode"]

# Behind the struct of a forward pass: 16 strides, then 13 integers; "0q" completes it to a multiple of its alignment.
_EXTRA = struct.Struct("@16q3iI5iI3i0q")
_NO_STRIDES = 0, 0, 0
_NO_LOGIT_ARRAYS = (0,) * 12


@cache
def divisor(page_size: int) -> tuple[int, int]:
    """(magic, shift) with ``key // page_size == key * magic >> shift`` for every key below 2^31."""
    bits = (page_size - 1).bit_length()
    return -(-(2 ** (31 + bits)) // page_size), 31 + bits


def pack_decode(
    problem: DecodeProblem,
    config: FlashDecodeConfig,
    schedule: Schedule,
    q: Operand,
    k: Operand,
    v: Operand,
    output: Operand,
    *,
    rotary_vectors: bool,
) -> np.void:
    """The scalars and strides of the problem."""
    extents, options = problem.extents, problem.options
    slopes, group = options.alibi_slopes, problem.group
    forward = attention_params.pack(
        problem.accumulator,
        strides=(
            *(*q.strides, *k.strides, *v.strides, *output.strides, *_NO_LOGIT_ARRAYS),
            *extents.lse_strides,
            extents.num_heads if slopes is not None and slopes.shape[0] > 1 else 0,
        ),
        integers=(
            *(extents.num_heads, group, extents.seqlen_q, extents.seqlen_k),
            *(UNBOUNDED if problem.max_seqlen_q is None else problem.max_seqlen_q, extents.seqlen_k),
            *(extents.head_dim, extents.head_dim_v, options.diagonal_offset, options.diagonal_from_end),
            *(options.window_left, options.window_right, 0),
        ),
        dropout=(0, 0, 0, 0),
        reals=(1.0, problem.scale, problem.scale * LOG2_E, options.softcap),
    )
    heads = config.heads_per_block(group)
    extra = _EXTRA.pack(
        *(*_scale_strides(problem.k_scale), *_scale_strides(problem.v_scale)),
        *(*_block_strides(problem.k_blocks), *_block_strides(problem.v_blocks)),
        0 if problem.block_tables is None else problem.block_tables.shape[1],
        *((0, 0, 0) if problem.rotary is None else problem.rotary.table_layout),
        *(extents.batch, problem.page_size, problem.num_pages, *divisor(max(problem.page_size, 1))),
        *(schedule.num_splits, schedule.work_columns, config.tokens_per_block(group), heads, -(-65536 // heads)),
        *(0 if problem.rotary is None else problem.rotary.num_pairs, rotary_vectors, problem.rotate_keys),
    )
    return np.void(forward.tobytes() + extra)


def _scale_strides(scale: Scale | None) -> tuple[int, int, int]:
    return _NO_STRIDES if scale is None else scale.strides


def _block_strides(blocks: Any) -> tuple[int, ...]:
    return _NO_STRIDES if blocks is None else tuple(blocks.strides[:3])
