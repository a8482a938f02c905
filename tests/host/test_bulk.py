"""Bulk tensor copies against NumPy: every rank, swizzle, fill and step, enumerated element by element."""

from __future__ import annotations

import bulk_kernels
import ml_dtypes
import numpy as np
import pytest
from bulk_kernels import BF16, MODES, array_of, coordinates, launch

import cuattn.host as host
from cuattn import errors
from cuattn.runtime.tensor_map import tensor_map


def load(described, start, at=0, **options):
    """Shared memory after one load: bytes, with 128 guard bytes behind the tile."""
    smem = -(-(at + described.box_bytes + 128) // 128) * 128
    out = np.zeros(smem, np.uint8)
    kernel = bulk_kernels.tensor_module().get_function(f"load{len(described.dims)}")
    args = (described, out.view(np.uint32), *coordinates(start))
    launch(kernel, (*args, np.int32(at), np.int32(described.box_bytes), np.int32(smem)), smem=smem, **options)
    return out


def check_load(array, start, box, *, steps=None, swizzle="none", fill="zeros", at=0, **options):
    steps = steps or (1,) * len(box)
    described = tensor_map(array, box, swizzle=swizzle, fill=fill, element_strides=steps)
    found = load(described, start, at, **options)
    outside = b"\xf7\x7f" * (array.itemsize // 2) if fill == "nan" else None
    expected = np.full(found.size, 0xAB, np.uint8)
    wanted = bulk_kernels.tile(array, box, steps, start, swizzle=swizzle, outside=outside, at=at)
    assert len(wanted) == described.box_bytes
    expected[list(wanted)] = list(wanted.values())
    assert (found == expected).all()


# Array shape (outermost first), box and starts (innermost first), rank by rank; inside, across each edge, outside.
TILES = {
    1: ((200,), (64,), [(0,), (136,), (170,), (-24,), (-64,), (500,)]),
    2: ((37, 96), (64, 8), [(0, 0), (32, 29), (64, 30), (-8, -3), (96, 5), (3, 40)]),
    3: ((5, 11, 64), (64, 4, 2), [(0, 0, 0), (0, 9, 3), (16, -2, 4), (-16, 3, -1)]),
    4: ((2, 3, 20, 72), (64, 4, 2, 1), [(0, 0, 0, 0), (8, 16, 1, 1), (64, 17, 2, 1), (-4, -1, -1, -1), (0, 0, 0, 2)]),
    5: ((2, 2, 9, 3, 64), (64, 3, 4, 1, 2), [(0, 0, 0, 0, 0), (0, 1, 6, 1, 1), (32, -1, -2, 1, -1)]),
}


@pytest.mark.parametrize("swizzle", ["none", "32B", "64B", "128B"])
@pytest.mark.parametrize("rank", TILES)
def test_loads_of_every_rank_and_swizzle(rank, swizzle):
    shape, box, starts = TILES[rank]
    array = array_of(shape, BF16, rank)
    inner = {"none": box[0], "32B": 16, "64B": 32, "128B": 64}[swizzle]
    for number, start in enumerate(starts):
        mode, seed = MODES[number % len(MODES)]
        check_load(array, start, (inner, *box[1:]), swizzle=swizzle, mode=mode, seed=seed)


@pytest.mark.parametrize("swizzle", ["32B", "64B", "128B"])
def test_the_swizzle_follows_the_address_and_not_the_tile(swizzle):
    array = array_of((16, 64), np.float16)
    inner = {"32B": 16, "64B": 32, "128B": 64}[swizzle]
    for at in (128, 384, 896):
        check_load(array, (0, 2), (inner, 12), swizzle=swizzle, at=at)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.int64, ml_dtypes.float8_e4m3fn])
def test_loads_of_every_element_size(dtype):
    array = array_of((10, 48), dtype)
    inner = 16 // array.itemsize
    for start in ((0, 0), (48 - inner // 2, 7), (1, -1)):
        check_load(array, start, (inner, 4))
        check_load(array, start, (128 // array.itemsize, 5), swizzle="128B")


@pytest.mark.parametrize("swizzle", ["none", "128B"])
@pytest.mark.parametrize("steps", [(1, 2, 1), (1, 3, 2), (1, 8, 3)])
def test_steps_within_the_box(steps, swizzle):
    array = array_of((7, 30, 64), BF16)
    for start in ((0, 0, 0), (8, 20, 1), (-16, -2, -1)):
        check_load(array, start, (64, 16, 5), steps=steps, swizzle=swizzle)


@pytest.mark.parametrize("dtype", [np.float16, BF16, np.float32, np.float64])
def test_fill_with_nan(dtype):
    array = np.zeros((4, 64), dtype)
    aligned = array_of(array.shape, dtype)
    aligned[...] = array
    check_load(aligned, (56, 2), (16, 4), fill="nan")
    described = tensor_map(aligned, (16, 4), fill="nan")
    tile = load(described, (56, 2))[: described.box_bytes].view(dtype).reshape(4, 16)
    assert np.isnan(tile.astype(np.float64)).sum() == 64 - 2 * 8


def test_a_view_with_five_dimensions():
    """Queries [B, N, H, D] as (D, heads of a group, N, groups, B): the tile of a packed group."""
    queries = array_of((2, 10, 6, 64), BF16)
    b, n, h, d = queries.strides
    described = tensor_map(
        queries, (64, 3, 4, 1, 1), swizzle="128B", dims=(64, 3, 10, 2, 2), strides=(d, h, n, 3 * h, b)
    )
    view = np.lib.stride_tricks.as_strided(queries, (2, 2, 10, 3, 64), (b, 3 * h, n, h, d))
    for start in ((0, 0, 0, 0, 0), (0, 0, 8, 1, 1)):
        wanted = bulk_kernels.tile(view, (64, 3, 4, 1, 1), (1,) * 5, start, swizzle="128B")
        found = load(described, start)
        assert all(found[place] == value for place, value in wanted.items())


def test_a_large_box_is_copied_whole():
    array = array_of((3, 256, 128), BF16)
    with host.profile() as profile:
        check_load(array, (64, 0, 1), (64, 256, 1), swizzle="128B", checks=())
    assert profile.bytes["global"]["read"] == 64 * 256 * 2 and profile.bytes["shared"]["write"] >= 64 * 256 * 2


@pytest.mark.parametrize("swizzle", ["none", "32B", "64B", "128B"])
@pytest.mark.parametrize("rank", TILES)
def test_stores_of_every_rank_and_swizzle(rank, swizzle):
    shape, box, starts = TILES[rank]
    inner = {"none": box[0], "32B": 16, "64B": 32, "128B": 64}[swizzle]
    box = (inner, *box[1:])
    kernel = bulk_kernels.tensor_module().get_function(f"store{rank}")
    for number, start in enumerate(s for s in starts if min(s) >= 0):
        mode, seed = MODES[number % len(MODES)]
        array = array_of(shape, BF16, rank)
        described = tensor_map(array, box, swizzle=swizzle)
        data = array_of(described.box_bytes, np.uint8, 99)
        expected = array.copy().view(np.uint16)
        for at, place in enumerate(bulk_kernels.elements(shape[::-1], box, (1,) * rank, start)):
            if place is not None:
                expected[place] = data[bulk_kernels.swizzled(2 * at, swizzle) :][:2].view(np.uint16)[0]
        args = (described, data.view(np.uint32), *coordinates(start), np.int32(data.size))
        with host.profile() as profile:
            launch(kernel, args, smem=data.size, mode=mode, seed=seed)
        assert (array.view(np.uint16) == expected).all()
        assert profile.bytes["global"]["write"] == data.size  # what lies beyond the array is counted, and not written


def test_a_store_skips_elements_between_its_steps():
    array = array_of((9, 16), np.int32)
    before = array.copy()
    described = tensor_map(array, (4, 6), element_strides=(1, 2))
    data = np.arange(12, dtype=np.uint32)
    kernel = bulk_kernels.tensor_module().get_function("store2")
    launch(kernel, (described, data, *coordinates((4, 1)), np.int32(48)), smem=48)
    before[1:7:2, 4:8] = data.reshape(3, 4)
    assert (array == before).all()


def test_a_store_must_not_start_at_a_negative_coordinate():
    described = tensor_map(array_of((9, 16), np.int32), (4, 2))
    kernel = bulk_kernels.tensor_module().get_function("store2")
    with pytest.raises(errors.MemoryFaultError, match="coordinate 1 of a tensor store is -1"):
        launch(kernel, (described, np.zeros(8, np.uint32), *coordinates((0, -1)), np.int32(32)), smem=32)


def test_the_assembler_takes_every_form():
    assert bulk_kernels.assembles(bulk_kernels.tensor_source())


# ---- what is refused

REFUSED = {
    "im2col": "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes"
    " [%r1], [%d1, {%r1, %r1, %r1, %r1}], [%r1], {%h1, %h1};",
    "tile::gather4": "cp.async.bulk.tensor.2d.shared::cta.global.tile::gather4.mbarrier::complete_tx::bytes"
    " [%r1], [%d1, {%r1, %r1, %r1, %r1, %r1}], [%r1];",
    "cp_mask": "cp.async.bulk.global.shared::cta.bulk_group.cp_mask [%d1], [%r1], %r1, %h1;",
    "2 coordinates for 3 dimensions": "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%d1, {%r1, %r1}], [%r1];",
    ".inc has no .s32": "cp.reduce.async.bulk.global.shared::cta.bulk_group.inc.s32 [%d1], [%r1], %r1;",
    ".add has no .f32": "cp.reduce.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes.add.f32"
    " [%r1], [%r1], %r1, [%r1];",
    ".noftz belongs": "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f16 [%d1], [%r1], %r1;",
    "wrong number of operands": "cp.async.bulk.global.shared::cta.bulk_group [%d1], [%r1], %r1, %d1;",
}


def ptx(text, target="sm_90a"):
    return f"""
.version 8.6
.target {target}
.address_size 64
.visible .entry k()
{{
.reg .b16 %h<2>; .reg .b32 %r<2>; .reg .b64 %d<2>;
{text}
ret;
}}
"""


@pytest.mark.parametrize("words", REFUSED)
def test_forms_that_are_not_supported_are_named(words):
    with pytest.raises(errors.UnsupportedPTXError) as caught:
        host.RawModule(code=ptx(REFUSED[words]))
    assert words in str(caught.value)


def test_older_targets_have_no_bulk_copies():
    store = "cp.async.bulk.global.shared::cta.bulk_group [%d1], [%r1], %r1;"
    host.RawModule(code=ptx(store))
    with pytest.raises(errors.UnsupportedPTXError, match="needs sm_90"):
        host.RawModule(code=ptx(store, "sm_80"))
