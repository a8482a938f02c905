"""What append_kv stores, read by the decode kernels: each code is its number, and a cache is what was put into it."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import cuattn
from cuattn import Rotary, reference
from cuattn.formats import KV_FORMATS, numpy_dtype
from cuattn.testing import assert_paged_close

QUANTIZED = tuple(name for name, row in KV_FORMATS.items() if row.quantized)


@pytest.mark.parametrize("dtype", [np.float16, np.float32], ids=["tensor cores", "multiply-adds"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_every_code_is_read_as_its_number(executor, name, dtype):
    """A sequence with one key gives its value: 32 codes each, all bytes there are."""
    row = KV_FORMATS[name]
    codes = np.arange(256, dtype=np.uint8).reshape(8, 1, 1, 32)
    dim = 32 * row.elements_per_item
    keys = np.zeros_like(codes)
    stored = np.int8 if row.code_dtype == "int8" else np.uint8
    options = {}
    if row.block_size:
        one = int(np.flatnonzero(np.arange(256, dtype=np.uint8).view(numpy_dtype(row.block_scale_dtype)) == 1)[0])
        blocks = executor.array(np.full((8, 1, 1, row.blocks(dim)), one, np.uint8))
        options = {"k_block_scales": blocks, "v_block_scales": blocks}
    out = cuattn.paged_attention(
        executor.array(np.zeros((8, 1, 1, dim), dtype)),
        *(executor.array(x.view(stored)) for x in (keys, codes)),
        *(np.arange(8, dtype=np.int32).reshape(8, 1), np.ones(8, np.int32)),
        kv_format=name,
        **options,
    )
    if row.elements_per_item == 2:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(8, 1, 1, dim)
    wanted = codes.view(numpy_dtype(row.code_dtype)).astype(np.float64)
    np.testing.assert_array_equal(executor.numpy(out).astype(np.float64), wanted)


@pytest.mark.parametrize(
    ("name", "dtype", "per_slot"),
    [
        ("float16", np.float16, False),
        ("e4m3fn", ml_dtypes.bfloat16, False),
        ("int8", np.float16, True),
        ("nvfp4", np.float16, False),
        ("mxfp4", np.float32, False),
    ],
)
def test_a_cache_filled_in_pieces(executor, name, dtype, per_slot):
    """Two sequences, a few tokens at a time, keys turned on their way in; read back by `paged_attention`."""
    row, dim, page_size = KV_FORMATS[name], 64, 4
    rng = np.random.default_rng(0)
    shape = (8, page_size, 2)
    stored = row.dtypes[-1]
    pages = [executor.array(np.zeros((*shape, row.items(dim)), numpy_dtype(stored))) for _ in "kv"]
    scales = {}
    for side in "kv":
        if row.block_size:
            zeros = np.zeros((*shape, row.blocks(dim)), np.uint8)
            scales[f"{side}_block_scales"] = executor.array(zeros)
        elif row.quantized:
            scales[f"{side}_scale"] = executor.array(np.zeros(shape, np.float32)) if per_slot else 1 / 64
    tables, lengths = np.array([[5, 0, 3], [1, 6, -1]], np.int32), np.zeros(2, np.int64)
    for counts in ([3, 1], [2, 0], [4, 6]):
        tokens = sum(counts)
        k, v = (executor.array(rng.standard_normal((tokens, 2, dim)).astype(dtype)) for _ in "kv")
        slots = cuattn.slot_mapping(tables, lengths, counts, page_size)
        positions = np.concatenate([n + np.arange(count) for n, count in zip(lengths, counts, strict=True)])
        turned = {"positions": positions, "rope": Rotary()}
        cuattn.append_kv(k, v, *pages, slots, kv_format=name, **turned, **scales)
        lengths += counts
    q = rng.standard_normal((2, 1, 4, dim)).astype(dtype)
    seqlens = lengths.astype(np.int32)
    options = {"kv_format": name, **scales, "rope": Rotary()}
    out = cuattn.paged_attention(executor.array(q), *pages, tables, seqlens, **options)
    numbers = {key: executor.numpy(x) if hasattr(x, "shape") else x for key, x in options.items()}
    assert_paged_close(executor.numpy(out), q, *map(executor.numpy, pages), tables, seqlens, **numbers)
    there = reference.gather_pages(executor.numpy(pages[0]), tables[0], int(lengths[0]))
    assert there.view(np.uint8).any(axis=-1).all()
