"""The struct that decode kernels are passed by value, of kernels/decode/attention_decode_params.cuh.

>>> magic, shift = divisor(48)
>>> [key * magic >> shift for key in (0, 47, 48, 2**31 - 1)] == [0, 0, 1, (2**31 - 1) // 48]
True
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from cuattn.ops.attention.params import decode_layout, pack_params
from cuattn.ops.decode.config import FlashDecodeConfig
from cuattn.ops.decode.scales import Scale
from cuattn.ops.operand import Operand

if TYPE_CHECKING:
    from cuattn.ops.decode.problem import DecodeProblem
    from cuattn.ops.decode.schedule import Schedule

__all__ = ["divisor", "pack_decode"]

_NO_STRIDES = 0, 0, 0


@cache
def divisor(page_size: int) -> tuple[int, int]:
    """Return (magic, shift) with ``key // page_size == key * magic >> shift`` for every key below 2^31."""
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
    """Pack the scalars and strides of the problem."""
    extents, rotary, group = problem.extents, problem.rotary, problem.group
    page_magic, page_shift = divisor(max(problem.page_size, 1))
    heads = config.heads_per_block(group)
    more = (
        ("k_scale", _scale_strides(problem.k_scale)),
        ("v_scale", _scale_strides(problem.v_scale)),
        ("k_blocks", _block_strides(problem.k_blocks)),
        ("v_blocks", _block_strides(problem.v_blocks)),
        ("table_stride", 0 if problem.block_tables is None else problem.block_tables.shape[1]),
        ("tables", _NO_STRIDES if rotary is None else tuple(rotary.table_layout)),
        ("batch", extents.batch),
        ("page_size", problem.page_size),
        ("num_pages", problem.num_pages),
        ("page_magic", page_magic),
        ("page_shift", page_shift),
        ("num_splits", schedule.num_splits),
        ("work_columns", schedule.work_columns),
        ("tokens_per_block", config.tokens_per_block(group)),
        ("heads_per_block", heads),
        ("heads_inverse", -(-65536 // heads)),
        ("num_pairs", 0 if rotary is None else rotary.num_pairs),
        ("rotary_vectors", rotary_vectors),
        ("rotate_keys", problem.rotate_keys),
    )
    return pack_params(decode_layout(problem.accumulator), problem, q, k, v, output, packed=problem, more=more)


def _scale_strides(scale: Scale | None) -> tuple[int, int, int]:
    return _NO_STRIDES if scale is None else scale.strides


def _block_strides(blocks: Any) -> tuple[int, ...]:
    return _NO_STRIDES if blocks is None else tuple(blocks.strides[:3])
