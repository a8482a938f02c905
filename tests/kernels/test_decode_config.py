"""The table of decode kernel shapes: selection, legality, and what the compiler makes of every row."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from resource_cases import left_out, sampled

from cuattn import compile
from cuattn.errors import LaunchError
from cuattn.formats import KV_FORMATS
from cuattn.head_dims import HEAD_DIM_BUCKETS
from cuattn.ops.decode.config import FLASH_DECODE_CONFIGS, FlashDecodeConfig, compiled_dims, select

KIB = 1024
LIMITS = (99 * KIB, 163 * KIB, 227 * KIB)  # sm_86, sm_80, sm_90
QUANTIZED = tuple(name for name, row in KV_FORMATS.items() if row.quantized)
DTYPES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32), np.dtype(np.float64))
BLOCK_ROWS = (1, 2, 4, 8, 16, 17, 71, 4096)

PLAIN = {"SLOT_SCALES": False, "BOUND_LEFT": False, "BOUND_RIGHT": False, "ROTATE": False, "ALIGNED": True}
EVERYTHING = {"SLOT_SCALES": False, "BOUND_LEFT": True, "BOUND_RIGHT": True, "ROTATE": True, "ALIGNED": True}


def flags(chosen: dict[str, bool]) -> dict[str, Any]:
    """Constants of a kernel with pages; whatever is turned has softcap and ALiBi as well."""
    options = {name: chosen["ROTATE"] for name in ("SOFTCAP", "ALIBI")}
    unused = {"BIAS": False, "MASK": False, "BiasElement": "float"}
    rotation = {"INTERLEAVED": False, "TABLES": False, "Table": "float"}
    return {"PAGED": True, **chosen, **options, **unused, **rotation}


def formats_of(dtype: np.dtype) -> list[str]:
    return [dtype.name, *(QUANTIZED if dtype != np.float64 else ())]


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_problem_has_a_legal_row(dtype, limit):
    for name in formats_of(dtype):
        for pair in itertools.product(HEAD_DIM_BUCKETS, repeat=2):
            dims = compiled_dims(*pair)[:2]
            for num_rows in BLOCK_ROWS:
                row = select(dtype, KV_FORMATS[name], *dims, rows_per_kv_head=num_rows, smem_limit_bytes=limit)
                assert row.is_legal(*dims, KV_FORMATS[name], limit)
                assert row.max_rows == 0 or num_rows <= row.max_rows
                assert (row.products == "fma") >= (dtype.itemsize > 2)


def test_every_row_is_selected_somewhere():
    chosen = {
        select(dtype, KV_FORMATS[name], *compiled_dims(d, d)[:2], rows_per_kv_head=rows, smem_limit_bytes=limit)
        for dtype in DTYPES
        for name in formats_of(dtype)
        for d in HEAD_DIM_BUCKETS
        for rows in BLOCK_ROWS
        for limit in LIMITS
    }
    assert chosen == set(FLASH_DECODE_CONFIGS)


def test_the_range_of_e8m0_is_not_that_of_float16():
    shape = {"rows_per_kv_head": 64, "smem_limit_bytes": LIMITS[1]}
    assert select(np.dtype(np.float16), KV_FORMATS["mxfp4"], 64, 64, **shape).products == "fma"
    assert select(np.dtype(ml_dtypes.bfloat16), KV_FORMATS["mxfp4"], 64, 64, **shape).products == "mma"


def test_no_room():
    with pytest.raises(LaunchError, match="more shared memory than the 1024 bytes"):
        select(DTYPES[0], KV_FORMATS["float16"], 64, 64, rows_per_kv_head=64, smem_limit_bytes=KIB)


@pytest.mark.parametrize("row", FLASH_DECODE_CONFIGS, ids=str)
def test_blocks_cover_a_group_once(row):
    for group in (1, 2, 3, 8, 16, 17, 71):
        heads, tokens = row.heads_per_block(group), row.tokens_per_block(group)
        assert heads * tokens <= row.block_m
        assert (row.head_blocks(group) - 1) * heads < group <= row.head_blocks(group) * heads


def assert_no_spills(row: FlashDecodeConfig, arch: str, name: str, chosen: dict[str, bool]) -> None:
    dtype_name = plain_format(row)
    *dims, blocks = compiled_dims(row.max_head_dim, row.max_head_dim)
    constants = row.constants(dtype_name, KV_FORMATS[name], *dims, flags(chosen), column_blocks=blocks)
    (resources,) = compile.build(row.source, constants, arch=arch, kind="cubin").resources.values()
    spilled = resources.spill_stores, resources.spill_loads, resources.stack_bytes
    assert spilled == (0, 0, 0), (arch, name, chosen, resources)
    assert resources.registers * row.num_threads <= 65536


def plain_format(row: FlashDecodeConfig) -> str:
    return {2: "bfloat16", 4: "float32", 8: "float64"}[row.itemsize]


def rows_at_their_largest() -> Iterator[tuple[Any, ...]]:
    """(row, arch, format, flags) that the suite always looks at."""
    for row in FLASH_DECODE_CONFIGS:
        yield row, "sm_90a", plain_format(row), EVERYTHING
        if row.products == "mma":
            yield row, "sm_90a", plain_format(row), PLAIN


def rows_on_sm_80() -> list[tuple[Any, ...]]:
    return [(row, "sm_80", plain_format(row), EVERYTHING) for row in FLASH_DECODE_CONFIGS]


def other_rows() -> Iterator[tuple[Any, ...]]:
    """Narrow formats, and element-wise loads."""
    for row in FLASH_DECODE_CONFIGS:
        if row.itemsize <= 4:
            yield row, "sm_90a", "nvfp4", EVERYTHING
        if row.products == "mma":
            yield row, "sm_90a", "int8", EVERYTHING | {"SLOT_SCALES": True}
            yield row, "sm_90a", plain_format(row), EVERYTHING | {"ALIGNED": False}


@pytest.mark.parametrize(
    ("row", "arch", "name", "chosen"),
    [*rows_at_their_largest(), *sampled(rows_on_sm_80(), one_in=6), *left_out(other_rows())],
    ids=str,
)
def test_no_row_spills(row, arch, name, chosen):
    assert_no_spills(row, arch, name, chosen)
