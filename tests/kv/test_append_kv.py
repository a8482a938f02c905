"""append_kv against quantization in NumPy, bit for bit: formats, layouts, scales, rotations, slots of every kind."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from append_calls import assert_right, assert_same_bits, expected, make, run
from hypothesis import given
from hypothesis import strategies as st

import cuattn
from cuattn import Rotary, host, reference
from cuattn.formats import KV_FORMATS, numpy_dtype
from cuattn.testing.arrays import Layout
from cuattn.testing.strategies import examples, fill, value_kinds
from cuattn.testing.strategies import layouts as any_layouts

QUANTIZED = tuple(name for name, row in KV_FORMATS.items() if row.quantized)
DTYPES = tuple(np.dtype(t) for t in (np.float16, ml_dtypes.bfloat16, np.float32))
#: Whole words, whole runs of 16 bytes, tails of both; one block, parts of a block, several.
DIMS = (64, 128, 256, 2, 6, 8, 14, 18, 34, 40, 72, 130, 250)


def normal(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def some_slots(rng, tokens, num_slots):
    """Different slots in any order, some of them negative."""
    slots = rng.permutation(num_slots)[:tokens].astype(np.int64)
    slots[rng.random(tokens) < 0.2] = -rng.integers(1, 5)
    return slots


#: Each variant of the kernel takes a compilation: what is drawn together with rotations. (format, dtype, interleaved,
#: from tables).
ROTATED = (
    ("float64", np.dtype(np.float64), False, False),
    ("float64", np.dtype(np.float64), True, True),
    ("int8", np.dtype(ml_dtypes.bfloat16), True, False),
    ("int8", np.dtype(ml_dtypes.bfloat16), False, True),
    ("nvfp4", np.dtype(np.float16), False, False),
)


@st.composite
def problems(draw, rotate=False):
    if rotate:
        name, dtype, interleaved, tables = draw(st.sampled_from(ROTATED))
        row = KV_FORMATS[name]
    else:
        name = draw(st.sampled_from((*KV_FORMATS, *QUANTIZED)))
        row = KV_FORMATS[name]
        dtype = draw(st.sampled_from(DTYPES)) if row.quantized else numpy_dtype(name)
    dims = [draw(st.sampled_from(DIMS)) for _ in "kv"]
    if not row.block_size and draw(st.booleans()):
        dims[1] -= 1
    num_pages, page_size = draw(st.sampled_from((1, 3, 7))), draw(st.sampled_from((1, 2, 3, 16)))
    tokens = draw(st.integers(1, min(num_pages * page_size, 9)))
    heads = draw(st.sampled_from((1, 2, 3)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    new = tuple(fill((tokens, heads, dim), dtype, draw(value_kinds()), rng) for dim in dims)
    options = {}
    per_slot = row.quantized and not row.block_size and draw(st.booleans())
    if row.quantized and not per_slot:
        for key in ("k_scale", "v_scale"):
            kind = draw(st.sampled_from(("none", "number", "array") + ("heads",) * (not row.block_size)))
            if kind != "none":
                value = np.exp(rng.standard_normal(heads if kind == "heads" else ())).astype(np.float32)
                options[key] = value if kind != "number" else float(value)
    if rotate:
        pairs = draw(st.sampled_from((dims[0] // 2, 1)))
        words = {"interleaved": interleaved, "rotary_dim": 2 * pairs}
        if tables:
            words |= {key: normal(50, pairs, seed=i) for i, key in enumerate(("cos", "sin"))}
        options |= {"rope": Rotary(**words), "positions": rng.integers(0, 50, tokens)}
    slots = some_slots(rng, tokens, num_pages * page_size)
    return make(
        *(name, new, slots, num_pages, page_size),
        per_slot=per_slot,
        layouts=lambda ndim: draw(any_layouts(ndim=ndim)),
        **options,
    )


@examples(120)
@given(problem=problems())
def test_against_numpy(executor, problem):
    """In any format and layout, with any scales: the slots of the list hold the codes, and not a bit else changes."""
    assert_right(executor, problem)


@examples(50)
@given(problem=problems(rotate=True))
def test_rotation_is_that_of_rope(executor, problem):
    """Turned in the same launch, or by `rope` before: the same bits."""
    assert_right(executor, problem)


@pytest.mark.parametrize("name", list(KV_FORMATS))
def test_a_round_trip_is_as_exact_as_the_format(executor, name):
    """The error of a number is at most half the distance of codes there, times its scales."""
    row = KV_FORMATS[name]
    dtype = np.float32 if row.quantized else numpy_dtype(name)
    new = normal(24, 2, 96, dtype=dtype), normal(24, 2, 32, dtype=dtype, seed=1)
    per_slot = row.quantized and not row.block_size
    found = assert_right(executor, make(name, new, np.arange(24), 3, 8, per_slot=per_slot))
    numbers = reference.dequantize(
        found["k_pages"], name, scale=found.get("k_scale"), block_scales=found.get("k_block_scales")
    ).astype(np.float64)
    x = new[0].astype(np.float64).reshape(numbers.shape)
    error = np.abs(numbers - x)
    if not row.quantized:
        assert not error.any()
        return
    size = row.block_size or x.shape[-1]
    largest = np.repeat(np.abs(x).reshape(*x.shape[:-1], -1, size).max(axis=-1), size, axis=-1)
    # (relative to the number, relative to the largest that shares its scale): half a unit in the last place of a normal
    # code; of the largest of the others. nvfp4's scale is off by 2^-4, so 6 may saturate; mxfp4 saturates up to 8.
    bound = {"e4m3fn": (2**-4, 2**-10 / 448), "e5m2": (2**-3, 2**-17 / 57344), "int8": (0, 0.5001 / 127)}
    bound |= {"nvfp4": (0, 1.07 / 6), "mxfp4": (0, 2 / 8)}
    of_number, of_largest = bound[name]
    assert (error <= of_number * 1.0001 * np.abs(x) + of_largest * largest).all()
    assert error.max() > 0


# --- numbers that have no code ----------------------------------------------------------------------------------------


def special(dim=64, dtype=np.float32):
    """Rows of zeros, of the smallest numbers, and with NaN or infinity among ordinary ones."""
    x = normal(8, 1, dim, dtype=dtype)
    x[0] = 0
    x[1] = -0.0
    x[2] *= np.finfo(np.float32).smallest_subnormal * 3
    x[3, 0, 5] = np.nan
    x[4, 0, 40] = -np.inf
    x[5, 0, [1, 33]] = np.nan, np.inf
    x[6] = np.nan
    x[7] *= 2.0**120
    return x


@pytest.mark.parametrize("name", QUANTIZED)
def test_zeros_and_what_is_not_finite(executor, name):
    row, x = KV_FORMATS[name], special()
    problem = make(name, (x, x), np.arange(8), 8, 1, per_slot=not row.block_size)
    found = assert_right(executor, problem)
    with np.errstate(invalid="ignore", over="ignore"):
        numbers = reference.dequantize(
            found["k_pages"], name, scale=found.get("k_scale"), block_scales=found.get("k_block_scales")
        )[:, 0, 0].astype(np.float64)
    assert (numbers[:2] == 0).all()
    assert not np.isnan(numbers[2]).any()
    size = row.block_size or 64
    if not row.block_size and not row.code_dtype.startswith("float8"):
        assert np.isnan(numbers[[3, 5, 6]]).all()
    elif row.code_dtype.startswith("float8"):
        np.testing.assert_array_equal(np.isnan(numbers[[3, 5, 6]]), np.isnan(x[[3, 5, 6], 0]))
    else:
        assert np.isnan(numbers[3, :size]).all() and not np.isnan(numbers[3, size:]).any()
        assert np.isnan(numbers[6]).all()
    assert np.isfinite(numbers[4]).all()
    assert numbers[4].argmin() == 40 and numbers[4, 40] < -1e3
    assert np.isfinite(numbers[7]).all()


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("scale", [1e-30, 1e30, 0.37])
def test_block_scales_below_a_scale_of_the_tensor(executor, name, scale):
    """Those that do not fit are the largest or the smallest that there is."""
    x = np.concatenate([special(), normal(4, 1, 64, seed=3)])
    assert_right(executor, make(name, (x, x), np.arange(12), 4, 3, k_scale=scale, v_scale=np.float32(scale)))


def test_plain_numbers_keep_their_bits(executor):
    """NaN with any payload included."""
    bits = np.arange(65536, dtype=np.uint16).reshape(256, 1, 256)
    for name in ("float16", "bfloat16"):
        x = bits.view(numpy_dtype(name))
        found = run(executor, make(name, (x, x), np.arange(256), 256, 1))
        for pages in (found["k_pages"], found["v_pages"]):
            np.testing.assert_array_equal(pages.view(np.uint16)[:, 0], bits)


# --- slots ------------------------------------------------------------------------------------------------------------


def test_slots_that_nobody_has_looked_at(executor):
    """One that does not exist writes nowhere, however far away it is."""
    x = normal(6, 2, 16)
    for name, per_slot in (("float32", False), ("int8", True), ("nvfp4", False)):
        problem = make(name, (x, x), [3, 6, -1, 2**40, -(2**62), 5], 2, 3, per_slot=per_slot)
        assert_same_bits(run(executor, problem, look=False), expected(problem))


def test_lists_and_small_integers(executor):
    x, pages = normal(3, 1, 8), np.zeros((2, 2, 1, 8), np.float32)
    for slots in ([3, -1, 0], np.array([3, -1, 0], np.int8), np.array([3, 9, -1, 9, 0, 9], np.int32)[::2]):
        found = [executor.array(pages.copy()) for _ in "kv"]
        cuattn.append_kv(executor.array(x), executor.array(x), *found, slots)
        for side in found:
            np.testing.assert_array_equal(
                executor.numpy(side).reshape(4, 8)[[3, 0, 1, 2]], [*x[[0, 2], 0], *pages[0, :, 0]]
            )


def test_only_negative_slots_change_nothing(executor):
    x = normal(3, 2, 8)
    problem = make("int8", (x, x), [-1, -1, -7], 2, 2, per_slot=True)
    assert_same_bits(run(executor, problem), expected(problem))


@pytest.mark.parametrize(
    ("tokens", "heads", "num_pages"),
    [(0, 2, 3), (3, 0, 3), (0, 2, 0), (2, 2, 0)],
    ids=["tokens", "heads", "both", "pages"],
)
def test_zero_extents(executor, tokens, heads, num_pages):
    x = normal(tokens, heads, 8)
    slots = [-1] * tokens if not num_pages else np.arange(tokens)
    for name in ("float32", "e4m3fn", "mxfp4"):
        run(executor, make(name, (x, x), slots, num_pages, 2))
    with host.profile() as profile:
        run(executor, make("float32", (x, x), slots, num_pages, 2))
    assert profile.launches == 0


def test_more_rows_than_one_launch_has_warps(executor, monkeypatch):
    """Warps take several rows then, one behind the other in the same shared memory."""
    monkeypatch.setattr("cuattn.kv.append.MAX_GRID", (2, 1, 1))
    x = normal(11, 3, 40, dtype=np.float16), normal(11, 3, 24, dtype=np.float16)
    for name in ("float16", "mxfp4"):
        rope = {"rope": Rotary(), "positions": np.arange(11)}
        assert_right(executor, make(name, x, np.arange(11)[::-1], 4, 4, **rope))


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["float16", "int8", "nvfp4"])
def test_head_major_pages_and_one_array_for_keys_and_values(executor, name):
    """Views of [2, pages, heads, slots, dim], neither copied; interleaved, they share no element."""
    row = KV_FORMATS[name]
    x = normal(5, 2, 32, dtype=np.float16)
    cache = executor.array(np.full((3, 2, 2, 4, row.items(32)), 17, numpy_dtype(row.dtypes[0])))
    pages = [cache[:, side].transpose(0, 2, 1, 3) for side in (0, 1)]
    blocks = [executor.array(np.zeros((3, 4, 2, row.blocks(32)), np.uint8)) for _ in "kv"]
    options = {"k_block_scales": blocks[0], "v_block_scales": blocks[1]} if row.block_size else {}
    slots = np.array([11, 0, 5, -1, 7])
    before = executor.numpy(cache).copy()
    cuattn.append_kv(executor.array(x), executor.array(x), *pages, slots, kv_format=name, **options)
    after = executor.numpy(cache)
    codes = reference.quantize(x, name).codes if row.quantized else x
    for token, slot in enumerate(slots):
        if slot >= 0:
            before[slot // 4, :, :, slot % 4] = codes[token]
    np.testing.assert_array_equal(after, before)


def test_numbers_of_a_head_apart_from_each_other(executor):
    """A last axis with a stride: of what is appended, of pages, and of block scales."""
    x = normal(4, 2, 64)
    for name in ("float32", "e5m2", "mxfp4"):
        order = {3: Layout(order=(2, 0, 1)), 4: Layout(order=(3, 1, 0, 2), pad=(0, 0, 1, 0))}
        assert_right(executor, make(name, (x, x), [5, 1, 2, 0], 2, 3, layouts=order.__getitem__))


def test_in_any_order_of_warps(executor):
    x = normal(9, 2, 72, dtype=np.float16)
    problem = make("nvfp4", (x, x), np.arange(9)[::-1], 3, 3, rope=Rotary(), positions=np.arange(9))
    for seed in range(3):
        with executor.active(asynchrony="random" if executor.name == "host" else "late", seed=seed):
            assert_right(executor, problem)
