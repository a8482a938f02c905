"""Every code and every input: what codes stand for, and which codes numbers become, against ml_dtypes."""

from __future__ import annotations

import shutil

import ml_dtypes
import numpy as np
import pytest

import cuattn
from cuattn import compile as kernel_compiler
from cuattn import host, reference
from cuattn.compile.expand import KERNELS
from cuattn.formats import KV_FORMATS, numpy_dtype, resolve

QUANTIZED = tuple(name for name, row in KV_FORMATS.items() if row.quantized)
BYTES = np.arange(256, dtype=np.uint8)

# What the loads of the decode kernels do: `widen`, and the block scales.
PROBE = """
#include "kv/kv_decode.cuh"
template <typename Format>
__device__ float scale_of(unsigned char scale) {
    if constexpr (KvFormat<Format>::BLOCK > 0) return block_scale(Format(), scale);
    return 1.0f;
}
extern "C" __global__ void cuattn_probe(const Storage* g_items, const unsigned char* g_scales, float* g_numbers) {
    constexpr int PER_ITEM = KvFormat<Storage>::PER_ITEM;
    const Storage items[1] = {g_items[threadIdx.x]};
    float numbers[PER_ITEM];
    widen<Storage, 1>(numbers, items);
    for (int i = 0; i < PER_ITEM; ++i) {
        g_numbers[threadIdx.x * PER_ITEM + i] = numbers[i] * scale_of<Storage>(g_scales[threadIdx.x]);
    }
}
"""


def codes_as_numbers(row, codes):
    """float64 of all codes, one an item."""
    return codes.view(numpy_dtype(row.code_dtype)).astype(np.float64)


@pytest.fixture(scope="module")
def headers(tmp_path_factory):
    """A folder with the headers of the kernels and the probe."""
    folder = tmp_path_factory.mktemp("kernels")
    for name in ("kv", "common"):
        shutil.copytree(KERNELS / name, folder / name)
    (folder / "probe.cu").write_text(PROBE, encoding="utf-8")
    return folder


def widened(headers, row, items, scales):
    source = kernel_compiler.source("probe", {"Storage": row.storage}, directory=headers)
    numbers = np.zeros(items.size * row.elements_per_item, np.float32)
    host.RawModule(code=source, arch="sm_80").get_function("cuattn_probe")((1,), (256,), (items, scales, numbers))
    return numbers


@pytest.mark.parametrize("name", [name for name in QUANTIZED if not KV_FORMATS[name].block_size])
def test_every_code_is_widened_to_its_number(headers, name):
    row = KV_FORMATS[name]
    numbers = widened(headers, row, BYTES, BYTES)
    np.testing.assert_array_equal(numbers.astype(np.float64), codes_as_numbers(row, BYTES))
    finite = numbers[np.isfinite(numbers)]
    assert max(finite) == row.max_code


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_every_pair_of_nibbles_and_every_block_scale_is_widened(headers, name):
    row = KV_FORMATS[name]
    nibbles = codes_as_numbers(row, np.stack([BYTES & 15, BYTES >> 4], axis=1).ravel().astype(np.uint8))
    scales = np.repeat(BYTES.view(numpy_dtype(row.block_scale_dtype)).astype(np.float64), 2)
    one = np.flatnonzero(scales == 1)[0] // 2
    np.testing.assert_array_equal(widened(headers, row, BYTES, np.full(256, one, np.uint8)), nibbles)
    for code in (1, 7, 10):  # of both nibbles
        with np.errstate(over="ignore"):  # 6 * 2^127
            expected = (codes_as_numbers(row, np.full(512, code, np.uint8)) * scales).astype(np.float32)
        found = widened(headers, row, np.full(256, code * 17, np.uint8), BYTES)
        np.testing.assert_array_equal(found, expected)


# --- from numbers ----------------------------------------------------------------------------------------------------


def stored(executor, numbers, name, **scales):
    """What `append_kv` makes of numbers [tokens, head_dim]: codes as bytes [tokens, items], block scales or None."""
    row = KV_FORMATS[name]
    tokens, dim = numbers.shape
    new = executor.array(numbers[:, None])
    # CuPy has no float8: bytes, and their format.
    dtype = np.uint8 if row.dtypes[-1] == "uint8" else np.int8
    pages = [executor.array(np.full((tokens, 1, 1, row.items(dim)), 0x55, dtype)) for _ in "kv"]
    blocks = [executor.array(np.full((tokens, 1, 1, row.blocks(dim)), 0x55, np.uint8)) for _ in "kv"]
    options = {"k_block_scales": blocks[0], "v_block_scales": blocks[1]} if row.block_size else {}
    cuattn.append_kv(new, new, *pages, np.arange(tokens), kv_format=name, **options, **scales)
    k, v = (executor.numpy(x)[:, 0, 0].view(np.uint8) for x in pages)
    np.testing.assert_array_equal(k, v)
    return k, executor.numpy(blocks[0])[:, 0, 0] if row.block_size else None


def all_inputs(dtype):
    """All 65,536 numbers of a 16-bit dtype, [256, 256]."""
    return np.arange(65536, dtype=np.uint16).view(dtype).reshape(256, 256)


def assert_nearest(numbers, codes, row):
    """Codes of the numbers as ml_dtypes rounds them; beyond the largest code, that one; NaN as documented."""
    found = codes_as_numbers(row, codes)
    missing = np.isnan(numbers)
    if row.code_dtype.startswith("float8"):
        assert np.isnan(found[missing]).all()
    else:
        assert (found[missing] == 0).all()
    beyond = ~missing & (np.abs(numbers) > row.max_code)
    np.testing.assert_array_equal(found[beyond], np.copysign(row.max_code, numbers[beyond]))
    inside = ~missing & ~beyond
    if row.code_dtype == "int8":
        np.testing.assert_array_equal(found[inside], np.rint(numbers[inside].astype(np.float64)))
    else:  # bits, so that the sign of a zero counts
        expected = numbers[inside].astype(numpy_dtype(row.code_dtype)).view(np.uint8)
        np.testing.assert_array_equal(codes[inside], expected)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "int8"])
def test_every_16_bit_number(executor, name, dtype):
    numbers = all_inputs(dtype)
    codes, _ = stored(executor, numbers, name)
    assert_nearest(numbers.astype(np.float32), codes, KV_FORMATS[name])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_every_16_bit_number_in_four_bits(executor, name, dtype):
    """In blocks with a 6, whose scale is 1 as long as no other number is much larger."""
    row = KV_FORMATS[name]
    numbers = all_inputs(dtype).ravel()
    limit = 8 if name == "mxfp4" else 6
    numbers = numbers[np.abs(numbers.astype(np.float32)) < limit]
    numbers = np.append(numbers, np.zeros(-numbers.size % 15, dtype)).reshape(-1, 15)
    numbers = np.append(numbers, np.full((len(numbers), 1), 6, dtype), axis=1)
    numbers = np.append(numbers, np.zeros((-len(numbers) % 16, 16), dtype), axis=0).reshape(-1, 256)
    codes, scales = stored(executor, numbers, name)
    scales = scales.view(numpy_dtype(row.block_scale_dtype)).astype(np.float32)
    whole = np.repeat(scales == 1, row.block_size, axis=1)
    assert whole.mean() > 0.9
    nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(numbers.shape)
    assert_nearest(numbers.astype(np.float32)[whole], nibbles[whole], row)


@pytest.mark.parametrize("name", QUANTIZED)
def test_ties_go_to_the_even_code(executor, name):
    """Halfway between neighboring codes, and the floats on both sides of it."""
    row = KV_FORMATS[name]
    numbers = codes_as_numbers(row, np.arange(16 if row.max_code == 6 else 256, dtype=np.uint8))
    numbers = np.unique(numbers[np.isfinite(numbers)])
    middles = ((numbers[1:] + numbers[:-1]) / 2).astype(np.float32)
    around = [np.nextafter(middles, np.float32(sign * np.inf)) for sign in (-1, 1)]
    values = np.concatenate([middles, *around, numbers.astype(np.float32), np.float32([np.inf, -np.inf, np.nan])])
    rows = 1 + values.size // 15 if row.block_size else -(-values.size // 16)
    grid = np.zeros((rows, 16), np.float32)
    if row.block_size:  # a 6 in each block
        values = values[np.isfinite(values)]
        grid[:, :15].flat[: values.size] = values
        grid[:, 15] = 6
    else:
        grid.flat[: values.size] = values
    codes, scales = stored(executor, grid, name)
    if row.block_size:
        assert (scales.view(numpy_dtype(row.block_scale_dtype)).astype(float) == 1).all()
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(grid.shape)
    assert_nearest(grid, codes, row)


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "int8"])
def test_codes_of_any_scale(executor, name):
    """Numbers are divided, not multiplied with an inverse."""
    rng = np.random.default_rng(0)
    numbers = (rng.standard_normal((40, 256)) * 2.0 ** rng.integers(-20, 20, (40, 256))).astype(np.float32)
    for scale in (3.0, 1 / 3, 1e-30, 1e30):
        codes, _ = stored(executor, numbers, name, k_scale=scale, v_scale=np.float32(scale))
        np.testing.assert_array_equal(codes, reference.quantize(numbers, name, scale=scale).codes.view(np.uint8))


# --- the table -------------------------------------------------------------------------------------------------------


def test_formats_by_name_and_by_dtype():
    assert list(KV_FORMATS) == ["float16", "bfloat16", "float32", "float64", *QUANTIZED]
    for name, row in KV_FORMATS.items():
        assert {np.dtype(numpy_dtype(dtype)).itemsize for dtype in row.dtypes} == {row.itemsize}
        assert resolve("x", numpy_dtype(row.dtypes[0]), name) is row
        if row.dtypes[0] != "uint8":
            assert resolve("x", numpy_dtype(row.dtypes[0])) is row
    assert KV_FORMATS["nvfp4"].bytes_per_head(72) == 36 + 5
    assert KV_FORMATS["mxfp4"].bytes_per_head(72) == 36 + 3
    assert KV_FORMATS["bfloat16"].bytes_per_head(72) == 144


@pytest.mark.parametrize(
    ("dtype", "name", "message"),
    [
        (np.uint8, None, "k_pages has dtype uint8; .* uint8 with kv_format e4m3fn, e5m2, nvfp4, mxfp4"),
        (np.int16, None, "k_pages has dtype int16"),
        (np.int8, "e5m2", "kv_format e5m2 is stored in float8_e5m2 or uint8"),
        (np.float16, "bfloat16", "kv_format bfloat16 is stored in bfloat16"),
        (">f2", None, "native byte order"),
    ],
)
def test_dtypes_that_do_not_fit(dtype, name, message):
    with pytest.raises(cuattn.errors.DTypeError, match=message):
        resolve("k_pages", np.dtype(dtype), name)


@pytest.mark.parametrize("name", ["e4m3", "", 8, ["int8"]])
def test_formats_that_do_not_exist(name):
    with pytest.raises(cuattn.errors.ArgumentError, match=r"kv_format is .*; allowed are None, 'float16', "):
        resolve("k_pages", np.dtype(np.uint8), name)
