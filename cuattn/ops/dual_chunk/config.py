"""Kernel shapes of dual-chunk attention: the rows of the forward table, which it selects as causal attention does.

So sequences of one chunk have the bits of causal attention in the same row.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from cuattn.dtypes import ELEMENT_TYPES
from cuattn.errors import LaunchError
from cuattn.ops.attention.forward.config import FLASH_FWD_CONFIGS, FlashFwdConfig, products_of
from cuattn.ops.attention.variants import ForwardOptions

__all__ = ["constants", "entry_of", "rotation_constants", "select", "smem_bytes", "source_of", "takes_tables"]

MAX_STEPS_HEAD_DIM = 256  # wider heads have no room for what rows share


def source_of(row: FlashFwdConfig) -> str:
    """Return the name of the kernel file."""
    return "dual_chunk_attention" if row.products == "mma" else "dual_chunk_attention_fma"


def entry_of(row: FlashFwdConfig) -> str:
    """Return the name of the kernel."""
    return f"cuattn_{source_of(row)}"


def _turn_bytes(row: FlashFwdConfig, head_dim: int, tables: bool) -> int:
    """Return the bytes of the rotations that the rows of a tile share: SharedTurns of rotary/rotate_rows.cuh."""
    if row.products != "mma":
        return 0
    pairs = head_dim // 2 if not tables and head_dim <= MAX_STEPS_HEAD_DIM else 4
    return 2 * 2 * pairs * 4


def takes_tables(row: FlashFwdConfig) -> bool:
    """Whether the row has registers to spare for rotations that are looked up: not beside its widest accumulators."""
    return row.score_options or row.max_head_dim <= 64


def smem_bytes(row: FlashFwdConfig, head_dim: int, columns: int, tables: bool) -> int:
    """Shared memory of a CTA for the bucket ``head_dim`` and so many columns of v: ``sizeof(Smem)`` of the kernel."""
    return row.smem_bytes(head_dim, columns, _turn_bytes(row, head_dim, tables))


def select(
    dtype: np.dtype[Any],
    head_dim: int,
    columns: int,
    *,
    few: bool,
    smem_limit_bytes: int,
    softcap: bool,
    tables: bool,
) -> FlashFwdConfig:
    """Select the row for ``few`` queries of a chunk (`FEW_QUERIES`) or many; head dims as in `smem_bytes`.

    Raises `LaunchError` where none fits.
    """
    return _select(*products_of(dtype, False), head_dim, columns, few, smem_limit_bytes, softcap, tables)


@cache
def _select(
    products: str, itemsize: int, head_dim: int, columns: int, few: bool, limit: int, softcap: bool, tables: bool
) -> FlashFwdConfig:
    for row in FLASH_FWD_CONFIGS:
        if (
            row.serves(products, itemsize, head_dim, columns, softcap)
            and (few or not row.max_seqlen_q)
            and (takes_tables(row) or not tables)
            and smem_bytes(row, head_dim, columns, tables) <= limit
        ):
            return row
    raise LaunchError(
        f"dual_chunk_attention with head dims up to {head_dim} and {columns} columns of v needs more shared memory "
        f"than the {limit} bytes that a CTA may use"
    )


def rotation_constants(dtype_name: str, interleaved: bool, table_dtype: str | None) -> dict[str, Any]:
    """Return the constants of rotary/rotate_tile.cuh; ``table_dtype`` is None where rotations are computed."""
    computed = "double" if dtype_name == "float64" else "float"
    return {
        "INTERLEAVED": interleaved,
        "TABLES": table_dtype is not None,
        "Table": computed if table_dtype is None else ELEMENT_TYPES[table_dtype],
    }


def constants(
    row: FlashFwdConfig,
    dtype_name: str,
    head_dim: int,
    columns: int,
    *,
    column_blocks: int,
    aligned: bool,
    softcap: bool,
    rotation: dict[str, Any],
) -> dict[str, Any]:
    """Return the kernel's compile-time constants; each of ``column_blocks`` CTAs computes so many columns."""
    options = ForwardOptions(bound_right=True, softcap=softcap)
    of_row = row.constants(dtype_name, head_dim, columns, options, aligned=aligned, column_blocks=column_blocks)
    return {**of_row, **rotation, "SMEM_BYTES": smem_bytes(row, head_dim, columns, rotation["TABLES"])}
